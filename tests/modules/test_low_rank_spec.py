import subprocess
import sys

import pytest

from compress.errors import CheckpointError
from compress.modules.low_rank_spec import LowRankSpec
from compress.modules.quantized_spec import QuantizedSpec
from compress.modules.spec import spec_from_dict

PLAIN = LowRankSpec(64, 32, 16)
RIGHT, LEFT = QuantizedSpec(64, 16, 4, 16), QuantizedSpec(16, 32, 3, -1, False)
NESTED = PLAIN.with_leaf("right", RIGHT).with_leaf("left", LEFT)


@pytest.mark.parametrize("spec", [PLAIN, NESTED, PLAIN.with_leaf("left", LEFT)])
def test_survives_a_dictionary(spec):
    spec.validate()
    assert spec_from_dict(spec.to_dict(), "here") == spec
    assert hash(spec_from_dict(spec.to_dict(), "here")) == hash(spec)


def test_description_names_what_is_not_plain():
    assert PLAIN.to_dict() == {"representation": "low_rank", "in_features": 64, "out_features": 32, "rank": 16}
    assert NESTED.to_dict()["right"] == RIGHT.to_dict()


def test_bytes_are_those_of_the_factors():
    assert PLAIN.nbytes("BF16") == 2 * 16 * (64 + 32)
    assert NESTED.nbytes("BF16") == RIGHT.nbytes("BF16") + LEFT.nbytes("BF16")
    assert PLAIN.with_leaf("right", RIGHT).nbytes("F32") == RIGHT.nbytes("F32") + 4 * 16 * 32


def test_tensors_stand_under_their_factor():
    assert PLAIN.tensors("BF16") == {"right.weight": ("BF16", (16, 64)), "left.weight": ("BF16", (32, 16))}
    assert list(NESTED.tensors("BF16")) == [
        "right.weight_packed", "right.weight_scale", "right.weight_shape",
        "left.weight_packed", "left.weight_scale", "left.weight_shape", "left.weight_zero_point",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"rank": 0}, {"rank": 33}, {"rank": 16.0}, {"rank": True}, {"rank": "16"}, {"rank": None}, {"rank": 2**40},
        {"in_features": 0}, {"in_features": 2**40}, {"out_features": -1}, {"out_features": [32]}, {"extra": 1},
        {"right": 4}, {"right": "quantized"}, {"right": {}}, {"left": {"representation": "no_such"}},
        {"right": PLAIN.to_dict()}, {"left": LowRankSpec(16, 32, 4).to_dict()},
        {"right": LEFT.to_dict()}, {"left": {**LEFT.to_dict(), "bits": 99}},
        {"left": {**LEFT.to_dict(), "kind": "embedding"}}, {"right": {**RIGHT.to_dict(), "out_features": 17}},
    ],
)  # fmt: skip
def test_impossible_descriptions_are_refused(change):
    with pytest.raises(CheckpointError, match=r"^here: "):
        spec_from_dict({**PLAIN.to_dict(), **change}, "here")


def test_a_missing_rank_is_refused():
    with pytest.raises(CheckpointError, match=r"^here: .*rank"):
        spec_from_dict({key: value for key, value in PLAIN.to_dict().items() if key != "rank"}, "here")


def test_a_deep_description_is_refused_and_does_not_recurse():
    deep = PLAIN.to_dict()
    for _ in range(2000):
        deep = {**PLAIN.to_dict(), "right": deep}
    with pytest.raises(CheckpointError, match="not how a factor can be stored"):
        spec_from_dict(deep, "here")


def test_needs_no_torch():
    code = "import sys, compress.modules.low_rank_spec; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
