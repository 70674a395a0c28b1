"""`compress bench --kernels`."""

from __future__ import annotations

from typing import Any

from compress.errors import NumericsError, RecipeError


def bench_kernels(sizes: dict[str, str | None], repeats: int, as_json: bool, quiet: bool) -> None:
    """Time the compiled operations, show what was found. Raises: NumericsError if one does not equal its reference."""
    from compress.cli.progress import Display
    from compress.cli.show import print_json
    from compress.evaluation.kernel_speed import KernelSettings, measure_kernels

    given: dict[str, Any] = {name: _parsed(name, text) for name, text in sizes.items() if text is not None}
    settings = KernelSettings(repeats=repeats, **given)
    _check(settings)
    with Display(quiet) as display:
        found = measure_kernels(settings, display)
    if as_json:
        print_json({**found, "notes": display.notes})
    else:
        show_kernels(found)
    wrong = [result for result in found["results"] if not result["equals_reference"]]
    if wrong:
        names = ", ".join(sorted({result["operation"] for result in wrong}))
        raise NumericsError(
            f"{names}: differs from its reference by up to {max(result['error'] for result in wrong):.1e}; "
            f"COMPRESS_KERNELS=off runs the references, and please report it"
        )


def _parsed(name: str, text: str) -> tuple[Any, ...]:
    option = f"--{name.replace('_', '-')}"
    try:
        parts = [part.strip() for part in text.split(",")]
        if name == "shapes":
            pairs = [tuple(int(side) for side in part.split("x")) for part in parts]
            if any(len(pair) != 2 for pair in pairs):
                raise ValueError
            return tuple(pairs)
        return tuple(int(part) for part in parts)
    except ValueError:
        example = "4096x4096,14336x4096" if name == "shapes" else "1,16"
        raise RecipeError(f"{option} {text}: not a list such as {example}") from None


def _check(settings: Any) -> None:
    for out, n in settings.shapes:
        if min(out, n) < 1 or out * n > 1 << 31:
            raise RecipeError(f"--shapes {out}x{n}: both sides at least 1, together at most 2^31 weights")
        for group in settings.group_sizes:
            if group != -1 and (group < 1 or n % group):
                raise RecipeError(f"--group-sizes {group} does not divide the {n} inputs of --shapes {out}x{n}")
    if any(not 1 <= bits <= 8 for bits in settings.bits):
        raise RecipeError(f"--bits {','.join(map(str, settings.bits))}: 1 to 8")
    for name in ("tokens", "threads"):
        if min(getattr(settings, name)) < 1:
            raise RecipeError(f"--{name}: at least 1")


def show_kernels(found: dict[str, Any]) -> None:
    """Limits, then a row per operation and size, on stdout."""
    from compress.cli.show import out, show, table

    limits = [
        (f"{threads}", *(_giga(of[key]) for key in ("read_2m", "read_4k", "float32", "bfloat16", "int8")))
        for threads, of in found["limits"].items()
    ]
    columns = ("threads", ">read, 2M pages GB/s", ">4K pages", ">float32 Gop/s", ">bfloat16", ">int8")
    show(table(columns, limits, title=f"what this processor can do ({found['machine']['isa']})"))
    out("")
    header = (
        "operation", ">group", ">out x in", ">threads", ">tokens", ">us", ">[min–max]", ">GB/s", ">Gop/s", ">of the limit",
        "bound by", ">error",
    )  # fmt: skip
    show(table(header, [_row(result) for result in found["results"]]))
    out("")
    rounds = found["settings"]["repeats"]
    out(
        f"medians of {rounds} rounds, weights from memory; error: largest difference from the reference / largest value"
    )
    if found["machine"]["stale"]:
        out("the library was built from other sources than these: python -m compress.kernels.build")


def _giga(rate: float | None) -> str:
    return "–" if rate is None else f"{rate / 1e9:.1f}"


def _row(result: dict[str, Any]) -> tuple[str, ...]:
    return (
        result["operation"], "–" if result["group_size"] is None else str(result["group_size"]),
        "{} x {}".format(*result["shape"]), str(result["threads"]), str(result["tokens"]), f"{result['microseconds']:.0f}",
        f"{result['min']:.0f}–{result['max']:.0f}", _giga(result["bytes_per_second"]), _giga(result["operations_per_second"]),
        f"{result['fraction_of_limit']:.2f}", result["bound_by"],
        f"{result['error']:.1e}" + ("" if result["equals_reference"] else " WRONG"),
    )  # fmt: skip
