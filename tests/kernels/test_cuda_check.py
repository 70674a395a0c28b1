"""The parts of scripts/gpu_check.py that need no GPU: its cases on the emulated kernels, its verdicts, its table."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from compress.kernels.cuda import gpus, status
from compress.kernels.cuda.check import Outcome, cases, run_case
from compress.kernels.cuda.gpus import UNKNOWN, Choice
from compress.kernels.cuda.timing import Time, best, n_copies, quickest_waves, shortfalls, suggested, summary, table
from tests.kernels.emulated import emulation

CPU = torch.device("cpu")


def test_cases_pass_on_the_emulated_kernels():
    generator = torch.Generator().manual_seed(0)
    every = list(cases(small=True))
    picked = [*every[::23], *(case for case in every if case.op == "low_rank")][:24]
    outcomes = [run_case(emulation(), case, CPU, generator) for case in picked]
    assert [outcome for outcome in outcomes if not outcome.passed] == []
    assert {case.op for case in picked} == {"linear", "low_rank", "dequantize"}


def test_cases_cover_widths_groups_kinds_dtypes_and_paths():
    every = list(cases(small=False))
    linears = [case for case in every if case.op == "linear"]
    assert {(c.bits, c.group, c.symmetric, c.dtype, c.path) for c in linears} >= {
        (bits, group, symmetric, dtype, path)
        for bits in (2, 3, 4, 8)
        for group in (32, 64, 128, -1)
        for symmetric in (True, False)
        for dtype in (torch.float16, torch.bfloat16)
        for path in ("decode", "tensor", "dequantize")
    }
    assert any(case.op == "hadamard" for case in every) and len(set(map(str, every))) > 300


def test_what_is_wrong_fails():
    class Silent:  # returns "done" and writes nothing
        def cc_linear_workspace(self, *_):
            return 0

        def cc_linear_decode(self, *_):
            return 0

    case = next(case for case in cases(small=True) if case.op == "linear" and case.path == "decode")
    outcome = run_case(Silent(), replace(case, splits=1), CPU, torch.Generator().manual_seed(0))
    assert not outcome.passed and not outcome.raised and outcome.error != outcome.error  # NaN: what was never written
    raised = run_case(object(), case, CPU, torch.Generator().manual_seed(0))
    assert not raised.passed and "AttributeError" in raised.raised
    assert not Outcome("", float("nan"), 1.0, True).passed
    assert not Outcome("", 0.0, 1.0, False).passed
    assert Outcome("", 0.0, 0.0, True).passed


def time(bits, tokens, path, microseconds, shape=(8192, 8192)):
    n_bytes = shape[0] * shape[1] * bits // 8 + (0 if bits == 16 else shape[0] * shape[1] // 128 * 2)
    return Time(*shape, bits, 0 if bits == 16 else 128, tokens, path, microseconds, 0.01, n_bytes)


def test_goals_are_held_against_what_was_measured():
    # a GPU that copies 1000 GB/s
    fine = [time(16, 1, "library", 135.0), time(4, 1, "decode", 35.0), time(2, 1, "decode", 19.0)]
    assert shortfalls(fine, 1000) == []
    slow = [time(16, 1, "library", 135.0), time(4, 1, "decode", 41.0), time(4, 1, "tensor", 140.0)]
    assert [line.split(": ")[1] for line in shortfalls(slow, 1000)] == [
        "0.84 of the copy, 0.85 wanted",
        "3.29 x bf16, 3.6 wanted",
    ]
    assert "slower" in shortfalls([time(16, 4096, "library", 100.0), time(8, 4096, "dequantize", 110.0)], 1000)[0]
    assert "of its bytes" in shortfalls([*fine[:2], time(2, 1, "decode", 30.0)], 1000)[0]


def test_thresholds_follow_the_times():
    times = []
    for tokens, decode, tensor, dense in (
        (1, 10, 20, 90),
        (8, 12, 20, 90),
        (16, 30, 22, 90),
        (64, None, 40, 95),
        (128, None, 120, 99),
    ):
        times += [
            time(4, tokens, "tensor", tensor),
            time(4, tokens, "dequantize", dense),
            time(16, tokens, "library", 60),
        ]
        times += [time(4, tokens, "decode", decode)] if decode else []
    found = suggested(times, Choice(decode_waves=3, tensor_waves=2))
    assert found == Choice(8, 64, 3, 2)
    assert [t.path for t in best(times) if t.bits == 4] == ["decode", "decode", "tensor", "tensor", "dequantize"]
    lines = table(times, 1000).splitlines()
    assert len(lines) == 1 + len(best(times)) and len({len(line) for line in lines}) == 1
    assert UNKNOWN.decode == 16


def test_waves_are_those_that_lose_least_over_all_cases():
    small = {("small", 1): 2.0, ("small", 2): 1.0, ("small", 4): 1.1}
    large = {("large", 1): 100.0, ("large", 2): 150.0, ("large", 4): 105.0}
    assert quickest_waves({**small, **large}) == 4
    assert quickest_waves(small) == 2 and quickest_waves(large) == 1


def test_copies_of_a_weight_together_do_not_fit_the_cache():
    for n_bytes in (2**20, 8 * 2**20, 2**28):
        copies = n_copies(n_bytes, 50 * 2**20)
        assert copies == 64 or copies * n_bytes >= 4 * 50 * 2**20
        assert copies >= 2
    assert summary([3.0, 1.0, 2.0]) == (2.0, 1.0)


def test_doctor_names_what_is_missing():
    gpu = ("a GPU that nobody knows", (9, 0))
    machine = status.Machine([gpu], "/bin/nvcc", None)
    assert status.report(status.Machine([], None, "not built"))[0] == "ok"
    assert status.report(replace(machine, absent="not built yet"))[2] == "python -m compress.kernels.cuda.build"
    assert "install the CUDA toolkit" in status.report(replace(machine, absent="not built yet", nvcc=None))[2]
    assert "never run on a GPU that nobody knows" in status.report(machine)[1]
    assert status.report(replace(machine, stale=True))[0] == "note"
    assert "was built for sm_86, sm_90a, and" not in status.report(replace(machine, architectures="86 90a"))[1]
    assert "was built for sm_90a, and" in status.report(replace(machine, gpus=[("A", (8, 0))], architectures="90a"))[1]


@pytest.mark.parametrize(
    ("architectures", "runs", "refused"),
    [
        ("80 86 89 90a", [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (12, 0)], []),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0)]),
        ("90a", [(9, 0)], [(8, 9), (10, 0)]),
    ],
)
def test_a_library_runs_on_what_it_was_built_for(architectures, runs, refused, monkeypatch):
    monkeypatch.setenv("COMPRESS_CUDA_KERNELS", "1")
    assert [gpus.unusable("a GPU", capability, architectures) for capability in runs] == [None] * len(runs)
    for capability in refused:
        assert "and a GPU needs another: python -m" in gpus.unusable("a GPU", capability, architectures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_check_says_so_in_one_line(root):
    done = subprocess.run(
        ["bash", "scripts/gpu_check.sh"],
        cwd=root,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable},
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "no NVIDIA GPU" in done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_cases_pass_on_the_gpu():
    from compress.kernels.cuda import native

    library = native.library()
    if library is None:
        pytest.skip(f"no CUDA kernels: {native.absent()}")
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    outcomes = [run_case(library, case, torch.device("cuda"), generator) for case in cases(small=True)]
    assert [outcome for outcome in outcomes if not outcome.passed] == []
