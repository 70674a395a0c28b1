import subprocess
import sys

import pytest

from compress.errors import CheckpointError
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import spec_from_dict

GOOD = QuantizedSpec(64, 32, 4, 16).to_dict()


def test_survives_a_dictionary():
    for spec in (QuantizedSpec(64, 32, 3, -1, False), QuantizedSpec(64, 100, 8, 64, True, "embedding")):
        assert spec_from_dict(spec.to_dict(), "here") == spec


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 0}, {"bits": 9}, {"bits": 4.0}, {"bits": True}, {"bits": "4"}, {"bits": None},
        {"in_features": 0}, {"in_features": -64}, {"in_features": 2**40}, {"out_features": [32]},
        {"group_size": 0}, {"group_size": -2}, {"group_size": 24}, {"group_size": 128}, {"symmetric": 1},
        {"kind": "conv"}, {"representation": "low_rank_of_the_future"}, {"representation": ["quantized"]}, {"extra": 1},
    ],
)  # fmt: skip
def test_impossible_numbers_are_refused(change):
    with pytest.raises(CheckpointError, match=r"^here: "):
        spec_from_dict({**GOOD, **change}, "here")


def test_a_missing_field_is_refused():
    with pytest.raises(CheckpointError, match=r"^here: .*bits"):
        spec_from_dict({key: value for key, value in GOOD.items() if key != "bits"}, "here")


def test_needs_no_torch():
    code = "import sys, compress.modules.quantized_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
