"""`compress bench --kernels`: figures that belong together, and what is refused."""

from __future__ import annotations

import json

import pytest

from compress.kernels import native

ABSENT = native.absent()
SMALL = ["--kernels", "--shapes", "48x256", "--tokens", "1,17", "--bits", "3,8", "--group-sizes", "-1", "--repeats", 3]
built = pytest.mark.skipif(ABSENT is not None, reason=f"no compiled kernels: {ABSENT}")


@built
def test_times_limits_and_errors_belong_together(compress, monkeypatch):
    monkeypatch.setattr("compress.evaluation.kernel_speed.MEGABYTE", 1 << 12)
    answer = compress("bench", *SMALL, "--json", "--quiet")
    assert answer.code == 0, answer.err
    found = json.loads(answer.out)
    limits = found["limits"]["1"]
    assert limits["read_2m"] > 0 and limits["float32"] > 0
    assert found["machine"]["isa"] in native.isas()
    names = {(r["operation"], r["tokens"]) for r in found["results"]}
    linears = {f"linear W{bits}A{activations}" for bits in (3, 8) for activations in (8, 16)}
    assert {(name, tokens) for name in linears | {"hadamard"} for tokens in (1, 17)} <= names
    for result in found["results"]:
        assert 0 < result["min"] <= result["microseconds"] <= result["max"]
        assert result["equals_reference"] and result["error"] <= result["error_bound"]
        if result["bound_by"] == "memory":
            rate = result["bytes_per_second"] / limits["read_2m"]
        else:
            rate = result["operations_per_second"] / (limits[result["bound_by"]] or limits["float32"])
        assert result["fraction_of_limit"] == pytest.approx(rate)


@built
def test_an_operation_that_differs_from_its_reference_is_an_error(compress, monkeypatch):
    monkeypatch.setattr("compress.evaluation.kernel_speed.MEGABYTE", 1 << 12)
    monkeypatch.setattr("compress.evaluation.kernel_speed._error", lambda found, expected: 0.5)
    answer = compress(
        "bench", "--kernels", "--shapes", "32x64", "--group-sizes", "32", "--bits", "4", "--tokens", "1", "--quiet"
    )
    assert answer.code == 1
    assert "differs from its reference by up to 5.0e-01" in answer.err
    assert "WRONG" in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--kernels", "shipped"], "leave out MODEL"),
        ([], "name a MODEL to time, or --kernels"),
        (["shipped", "--tokens", "4"], "--tokens goes with --kernels"),
        (["--kernels", "--shapes", "4096"], "--shapes 4096: not a list such as 4096x4096"),
        (["--kernels", "--tokens", "one"], "--tokens one: not a list such as 1,16"),
        (["--kernels", "--bits", "9"], "--bits 9: 1 to 8"),
        (["--kernels", "--group-sizes", "96"], "--group-sizes 96 does not divide the 4096 inputs"),
        (["--kernels", "--threads", "0"], "--threads: at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, words, compress):
    assert words in compress("bench", *arguments).error


def test_without_compiled_kernels_there_is_nothing_to_time(compress, monkeypatch):
    monkeypatch.setattr("compress.kernels.native.absent", lambda: "not built yet: python -m compress.kernels.build")
    assert "no compiled kernels to time: not built yet" in compress("bench", "--kernels").error
