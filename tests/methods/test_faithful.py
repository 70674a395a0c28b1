"""Our codes against the original code's. Needs a checkout of github.com/IST-DASLab/gptq, named by an environment variable."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

VARIABLE = "COMPRESS_GPTQ_REFERENCE"


@pytest.fixture(scope="module")
def bench(root: Path):
    spec = importlib.util.spec_from_file_location("bench_faithful", root / "scripts" / "bench_faithful.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_layer_losses_are_the_originals(bench, bits):
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no checkout of github.com/IST-DASLab/gptq: not compared with the original code")
    chosen = bench.settings((bits,))
    table = bench.compare(bench.load_reference(Path(folder)), bench.synthetic(1, n_rows=48, n=256), chosen)
    for setting, row in zip(chosen, table, strict=True):
        assert row["worst"] <= bench.WORST_RATIO, str(setting)


def test_settings_are_compared_like_with_like(bench):
    chosen = bench.settings()
    assert len(chosen) == len(set(chosen)) == 3 * 2 * (3 * 3 + 2)
    assert not any(s.order == "act" and not s.static_groups and s.group_size != -1 for s in chosen)
