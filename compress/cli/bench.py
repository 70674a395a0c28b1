"""`compress bench`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compress.cli.options import (
    Arithmetic,
    Debug,
    Device,
    Json,
    Quiet,
    RemoteCode,
    Revision,
    check_arithmetic,
    check_device,
    refuse_unfinished,
)

Reference = Annotated[
    str | None,
    typer.Option("--reference", metavar="ORIGINAL", help="the model to stand beside, timed in turns with it"),
]
PromptTokens = Annotated[
    int | None,
    typer.Option(
        "--prompt-tokens",
        min=1,
        help="length of the prompt  [default: 512, or what the model has positions for]",
        show_default=False,
    ),
]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=1, help="tokens to decode")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="sequences that run together")]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="rounds; one more before them warms up")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="of what is not packed, and of the arithmetic: auto (as stored), float32, …")
]
Attention = Annotated[str | None, typer.Option("--attention", help="sdpa, eager, …, as transformers names them")]
Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="a folder, a Hub id or `shipped`; original or compressed; not with --kernels"),
]
Kernels = Annotated[
    bool,
    typer.Option("--kernels", help="time the compiled operations instead of a model, beside what the processor can do"),
]


def _list(flag: str, metavar: str, what: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=f"with --kernels: {what}", show_default=False)


Shapes = Annotated[str | None, _list("--shapes", "OUTxIN,…", "of the weights  [default: 4096x4096]")]
Tokens = Annotated[str | None, _list("--tokens", "N,…", "in a call  [default: 1,16]")]
Bits = Annotated[str | None, _list("--bits", "N,…", "of the weights  [default: 2,3,4,8]")]
GroupSizes = Annotated[str | None, _list("--group-sizes", "N,…", "inputs that share a scale, -1: all  [default: 128]")]
Threads = Annotated[str | None, _list("--threads", "N,…", "to run on  [default: 1]")]
DTYPES = ("auto", "float32", "bfloat16", "float16")


def bench(
    model: Model = None,
    reference: Reference = None,
    prompt_tokens: PromptTokens = None,
    new_tokens: NewTokens = 64,
    batch_size: BatchSize = 1,
    repeats: Repeats = 5,
    dtype: Dtype = "auto",
    attention: Attention = None,
    arithmetic: Arithmetic = "int8",
    kernels: Kernels = False,
    shapes: Shapes = None,
    tokens: Tokens = None,
    bits: Bits = None,
    group_sizes: GroupSizes = None,
    threads: Threads = None,
    device: Device = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Time prefill and decode of a model, and weigh it, beside the original. The whole model must fit into memory.

    With --kernels: time the compiled operations, beside what this processor can do.

    \b
    Example:  compress bench out/demo --reference shipped
    """
    from compress.cli.progress import Display
    from compress.cli.show import print_json
    from compress.errors import RecipeError
    from compress.evaluation.speed import SpeedSettings, measure_speed
    from compress.pipeline.run import Machine

    sizes = {"shapes": shapes, "tokens": tokens, "bits": bits, "group_sizes": group_sizes, "threads": threads}
    if kernels:
        from compress.cli.bench_kernels import bench_kernels

        if model is not None or reference is not None:
            raise RecipeError("--kernels times operations, not a model: leave out MODEL and --reference")
        bench_kernels(sizes, repeats, as_json, quiet)
        return
    for name, value in sizes.items():
        if value is not None:
            raise RecipeError(f"--{name.replace('_', '-')} goes with --kernels")
    if model is None:
        raise RecipeError("bench: name a MODEL to time, or --kernels for the compiled operations")
    for folder in filter(None, (model, reference)):
        refuse_unfinished(folder)
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype {dtype}: not a dtype that is used here; choose {', '.join(DTYPES)}")
    check_arithmetic(arithmetic)
    settings = SpeedSettings(prompt_tokens, new_tokens, batch_size, repeats, dtype, attention, arithmetic)
    with Display(quiet) as display:
        found = measure_speed(
            model,
            reference=reference,
            settings=settings,
            machine=Machine(check_device(device)),
            progress=display,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print_json({**found, "notes": display.notes})
    else:
        show_speed(found)
        if reference is None and not quiet:
            from compress.cli.show import note

            note(f"note: alone, these say nothing about being quicker or slower: add --reference {_origin(model)}")


def _origin(model: str) -> str:
    """What a result of ours was made from, by its report."""
    import json
    from pathlib import Path

    from compress.checkpoint.headers import read_json
    from compress.errors import CompressError
    from compress.pipeline.output import REPORT

    try:
        return json.dumps(read_json(Path(model).expanduser() / REPORT)["model"]).strip('"')
    except (CompressError, OSError, KeyError):
        return "ORIGINAL"


def show_speed(found: dict[str, Any]) -> None:
    """The table of timings and memory, on stdout."""
    from compress.cli.show import out, pairs, show, table

    columns = (["original"] if "reference" in found else []) + ["model"]
    ratio = ["model / original"] if "reference" in found else []
    show(table(("", *(f">{name}" for name in (*columns, *ratio))), speed_rows(found)))
    out("")
    used, machine = found["settings"], found["machine"]
    rounds = "one round" if used["repeats"] == 1 else f"medians of {used['repeats']} rounds"
    spread = f"{rounds} after one that warms up, in brackets the slowest and the quickest"
    show(
        pairs(
            [
                ("prefill", f"{used['prompt_tokens']:,} tokens x {used['batch_size']} in one forward"),
                (
                    "decode",
                    f"{used['new_tokens']:,} tokens x {used['batch_size']}, one per forward, greedy, from the cache",
                ),
                ("figures", spread + (", the models in turns" if "reference" in found else "")),
                ("on", described_machine(machine)),
                *_runs_on(found),
            ]
        )
    )


def _runs_on(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What runs the quantized layers of each model that has some on native kernels."""
    names = {"reference": "original", "model": "model"}
    said = {role: found[role].get("arithmetic") for role in names if role in found}
    return [(f"quantized layers, {names[role]}", words) for role, words in said.items() if words]


def described_machine(machine: dict[str, Any]) -> str:
    threads = f", {machine['threads']} threads" if machine["device"] == "cpu" else ""
    return (
        f"{machine['device']} ({machine['device_name']}){threads}, {machine['dtype']}, attention {machine['attention']}, "
        f"torch {machine['torch']}"
    )


def speed_rows(found: dict[str, Any]) -> list[tuple[str, ...]]:
    """What, the original, the model, and model / original; without an original, the model alone."""
    from compress.cli.show import human_bytes, human_time

    roles = [role for role in ("reference", "model") if role in found]
    rows: list[tuple[str, ...]] = []
    for phase in ("prefill", "decode"):
        cells = [_speed(found[role][phase]) for role in roles]
        rows.append(
            (f"{phase}, tokens per second", *cells, *([f"{found['ratio'][phase]:.2f}"] if "ratio" in found else []))
        )
    for key, name, form in (
        ("load_seconds", "time to load", human_time),
        ("bytes_of_weight_files", "weights on disk", human_bytes),
        ("bytes_in_memory", "weights in memory", human_bytes),
        ("peak_resident_bytes", "peak memory of the process", human_bytes),
        ("resident_bytes_before", "of that before loading", human_bytes),
        ("peak_cuda_bytes", "peak memory of the GPU", human_bytes),
    ):
        values = [found[role][key] for role in roles]
        if None not in values:
            share = [f"{values[1] / values[0]:.2f}" if values[0] else "–"] if len(values) == 2 else []
            rows.append((name, *(form(value) for value in values), *share))
    return rows


def _speed(speed: dict[str, Any]) -> str:
    from compress.report.numbers import rate

    return f"{rate(speed['tokens_per_second'])} [{rate(speed['min'])}–{rate(speed['max'])}]"
