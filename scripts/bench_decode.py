"""Whole models at several widths: tokens per second of decode and prefill, and memory, as a table, a plot and JSON.

    python scripts/bench_decode.py [--model 1b|shipped|thin] [--ways fp32 bf16 w8 …] [--threads 1 2] [--json FILE] [--plot FILE]
    python scripts/bench_decode.py --ways "ggml q4_0" --ggml LIBPEER

Each cell is a process of its own: a Llama of the model's shapes is made in memory with random weights (speed does not depend
on them), decodes greedily from a prompt with `compress.runtime.decode`, and is weighed. `w4`: blocks in integers of 4 bits,
groups of 128, symmetric; the head in 8 bits. `w4 float`: activations are not rounded. `w4 reference`: torch alone.
`low rank`: the linears of the blocks as two bfloat16 factors of half their weights together; `low rank w4`: these in 4 bits.
Floats are bfloat16 beside packed weights. `thin` is as deep as `1b` and has next to no weights: what is left is what a token
costs around its products. `promised`: what reading the weights of a token would allow, at the bandwidth that
is measured in the same process (buffers on pages of 2M). Cells that are in the JSON file already, at the same commit, are kept.

`ggml TYPE`, `ik TYPE`: the linears of the blocks alone (no attention, norms, sampling) in the order of the model, each a graph
of its own, with the head in q8_0: less than a token costs there. Drivers: scripts/peers/CMakeLists.txt.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from measure import commit, machine, threads_environment

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package beside this script, installed or not

MODELS: dict[str, dict[str, int]] = {
    "1b": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 64, "vocab_size": 32000,
    },
    "thin": {
        "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 22, "num_attention_heads": 32,
        "num_key_value_heads": 4, "head_dim": 8, "vocab_size": 512,
    },
}  # fmt: skip
WAYS = ("fp32", "bf16", "w8", "w4", "w3", "w2", "w4 float", "low rank", "low rank w4")
GROUP = 128
SKIP = 4  # tokens before times count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*MODELS, "shipped"), default="1b")
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--prompt", type=int, default=128, help="tokens [default: 128]")
    parser.add_argument("--new", type=int, default=32, help="tokens [default: 32]")
    parser.add_argument("--rounds", type=int, default=2, help="[default: 2]")
    parser.add_argument("--ggml", type=Path, help="libpeer_ggml.so")
    parser.add_argument("--ik", type=Path, help="libpeer_ik.so")
    parser.add_argument("--json", type=Path, default=Path("out/bench_decode.json"), help="read and extended")
    parser.add_argument("--cpu-time", action="store_true", help="at one thread rate by CPU time: for a busy machine")
    parser.add_argument("--plot", type=Path, help="a PNG of decode beside memory")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measured(options.model, options.ways[0], options)))
        return
    found: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.is_file() else []
    state = commit()
    for threads in options.threads:
        for way in options.ways:
            if any(
                (c["model"], c["way"], c["threads"], c["commit"]) == (options.model, way, threads, state) for c in found
            ):
                continue
            cell = {
                "model": options.model,
                "way": way,
                "threads": threads,
                "commit": state,
                **asked(way, threads, options),
            }
            found = [c for c in found if (c["model"], c["way"], c["threads"]) != (options.model, way, threads)] + [cell]
            options.json.parent.mkdir(parents=True, exist_ok=True)
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{machine()}; {options.prompt} tokens of prompt")
    cells = [rated(c, options.cpu_time) for c in found if c["model"] == options.model]
    print("\n".join(table(cells)))
    if options.plot:
        plot(cells, options.plot)


def rated(cell: dict[str, Any], by_cpu_time: bool) -> dict[str, Any]:
    """With the rate of decoding to show, and the one that the bytes promise."""
    kind = "_cpu" if by_cpu_time and cell["threads"] == 1 else ""
    return {**cell, "rate": cell[f"decode{kind}"], "promised": cell[f"bandwidth{kind}"] / cell["read_bytes"]}


def asked(way: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one cell, from a process of its own."""
    numbers = [f"--{name}={getattr(options, name)}" for name in ("model", "prompt", "new", "rounds")]
    peers = [f"--{name}={getattr(options, name)}" for name in ("ggml", "ik") if getattr(options, name)]
    environment = {**os.environ, **threads_environment(threads), "OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "20000"}
    done = subprocess.run(
        [sys.executable, __file__, "--worker", "--ways", way, *numbers, *peers],
        env=environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    cell: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(way, threads, cell, file=sys.stderr)
    return cell


def measured(name: str, way: str, options: argparse.Namespace) -> dict[str, Any]:
    import torch

    config = config_of(name)
    torch.manual_seed(0)
    peer = way.split()[0]
    if peer in ("ggml", "ik"):
        return peer_cell(config, way.removeprefix(f"{peer} "), peer, getattr(options, peer), options)
    from compress.runtime.decode import chooser, decode
    from compress.runtime.prepare import arithmetic, packed_linears

    before = resident()
    model = built(config, way)
    inside, weights, read = resident() - before, *sizes(model)
    ids = torch.randint(config.vocab_size, (1, options.prompt))
    firsts, steps, efforts = [], [], []
    for _ in range(options.rounds):
        seen = [time.perf_counter()]

        worked: list[float] = []

        def passed(token: object, seen: list[float] = seen, worked: list[float] = worked) -> None:
            seen.append(time.perf_counter())
            worked.append(time.process_time())

        decode(model, ids, options.new, chooser(model, 0), on_token=passed)
        firsts.append(seen[1] - seen[0])
        efforts += [b - a for a, b in zip(worked[SKIP:], worked[1 + SKIP :], strict=False)]
        steps += [b - a for a, b in zip(seen[1 + SKIP :], seen[2 + SKIP :], strict=False)]
    return {
        "decode": 1 / median(steps), "decode_cpu": 1 / median(efforts),
        "decode_slow": 1 / sorted(steps)[-len(steps) // 4], "decode_best": 1 / min(steps),
        "prefill": options.prompt / min(firsts), "weight_bytes": weights, "read_bytes": read, "resident_bytes": inside,
        **read_bandwidth(), "packed": len(packed_linears(model)), **arithmetic(model),
    }  # fmt: skip


def config_of(name: str) -> Any:
    from transformers import AutoConfig

    if name == "shipped":
        from compress.shipped import model_path

        return AutoConfig.from_pretrained(model_path())
    return AutoConfig.for_model("llama", **MODELS[name], max_position_embeddings=2048, tie_word_embeddings=False)


def built(config: Any, way: str) -> Any:
    """A random model of this shape, its linears as `way` says, packed where it is quantized."""
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM

    from compress.kernels.choice import Choice
    from compress.models.families import architecture_of
    from compress.modules.low_rank import LowRankLinear
    from compress.runtime.prepare import pack_model

    dtype = torch.float32 if way == "fp32" else torch.bfloat16
    kind, _, rest = way.partition(" ")
    bits = int(kind[1:]) if kind[0] == "w" else None
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    architecture = architecture_of(config.to_dict())
    model.generation_config.eos_token_id = None
    choice = Choice("reference" if rest == "reference" else "auto", "float" if rest == "float" else "int8")
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        n_out, n_in = module.out_features, module.in_features
        if kind == "low" and not name.endswith("lm_head"):
            rank = max(GROUP, n_out * n_in // (n_out + n_in) // 2 // GROUP * GROUP)
            made: nn.Module = LowRankLinear.from_factors(noise(n_out, rank, dtype), noise(rank, n_in, dtype))
            if rest.endswith("w4"):
                made.left, made.right = quantized(n_out, rank, 4), quantized(rank, n_in, 4)
        elif kind == "low" or bits:
            made = quantized(n_out, n_in, 8 if name.endswith("lm_head") else bits or 4)
        else:
            module.weight = nn.Parameter(noise(n_out, n_in, dtype), requires_grad=False)
            continue
        model.set_submodule(name, made)
        if name.endswith(("o_proj", "down_proj")):  # bit by bit: no more than a block is there twice
            pack_model(model, choice, architecture)
    for parameter_name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, attribute = parameter_name.rpartition(".")
            shape = parameter.shape
            value = torch.ones(shape, dtype=dtype) if len(shape) == 1 else noise(shape[0], shape[1], dtype)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(value, requires_grad=False))
    pack_model(model, choice, architecture)
    return model


def noise(n_out: int, n_in: int, dtype: Any) -> Any:
    """Small random weights [out, in]; a piece is drawn and repeated."""
    import torch

    piece = torch.randn(min(n_out * n_in, 1 << 20)).mul_(0.02).to(dtype)
    return piece.repeat(-(-n_out * n_in // len(piece)))[: n_out * n_in].view(n_out, n_in).clone()


def quantized(n_out: int, n_in: int, bits: int) -> Any:
    """Random codes of about the scale of `noise`."""
    import torch

    from compress.modules.quantized import QuantizedLinear
    from compress.modules.quantized_spec import QuantizedSpec

    group = GROUP if n_in % GROUP == 0 else -1
    spec = QuantizedSpec(n_in, n_out, bits, group)
    stored = {
        "weight_packed": torch.randint(-(2**31), 2**31, (n_out, -(-n_in * bits // 32)), dtype=torch.int32),
        "weight_scale": torch.full((n_out, spec.n_groups), 0.06 / 2**bits, dtype=torch.bfloat16),
        "weight_shape": torch.tensor([n_out, n_in]),
    }
    return QuantizedLinear(spec, stored)


def sizes(model: Any) -> tuple[int, int]:
    """Bytes of all weights, and of those that a token reads: all but the token table."""
    from compress.runtime.prepare import packed_bytes

    total = sum(p.nbytes for p in model.parameters()) + packed_bytes(model)
    return total, total - model.get_input_embeddings().weight.nbytes


def read_bandwidth() -> dict[str, float]:
    """Bytes per second at which all threads together read memory (pages of 2M where there are): the best of some passes."""
    import torch

    from compress.kernels.buffers import allocate

    buffer = allocate(1 << 29)
    buffer.fill_(1)
    words = buffer.view(torch.int64)
    times, efforts = [], []
    for _ in range(7):
        start, effort = time.perf_counter(), time.process_time()
        words.sum()
        times.append(time.perf_counter() - start)
        efforts.append(time.process_time() - effort)
    return {"bandwidth": buffer.nbytes / min(times), "bandwidth_cpu": buffer.nbytes / min(efforts)}


def resident() -> int:
    """Anonymous memory of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def peer_cell(config: Any, kind: str, peer: str, library: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    """The linears of one token, and of the prompt, by ggml or ik_llama.cpp: one product after the other."""
    import numpy as np
    import torch
    from peers.native_peers import TYPES, Driver

    if library is None:
        raise SystemExit(f"--{peer}: the driver is needed for {peer} {kind}; scripts/peers/CMakeLists.txt builds it")
    threads = int(os.environ["OMP_NUM_THREADS"])
    driver, blocks = Driver(library), config.num_hidden_layers
    keys = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    hidden, mlp = config.hidden_size, config.intermediate_size
    shapes = [(hidden, hidden, 2), (keys, hidden, 2), (mlp, hidden, 2), (hidden, mlp, 1)]
    generator, seconds, nbytes, worked = torch.Generator().manual_seed(0), {}, 0, 0.0
    for tokens in (1, options.prompt):
        calls = []
        for out, n_in, each, copies, of_type in [
            *((o, i, each, each * blocks, kind) for o, i, each in shapes),
            (config.vocab_size, hidden, 1, 1, "q8_0" if peer == "ggml" else "q8_0_r8"),
        ]:
            rows = torch.randn(min(out, 256), n_in, generator=generator).numpy()
            wanted = TYPES[peer].get(of_type, (0, False))[1]
            opened = (driver.open(of_type, rows, out, tokens, copies, threads, way, False) for way in (wanted, False))
            handle = next((found for found in opened if found is not None), None)  # interleaved, or else plain
            assert handle is not None, of_type
            driver.set_input(handle, np.ones((tokens, n_in), np.float32))
            nbytes += driver.nbytes(handle) * copies if tokens == 1 else 0
            calls.append((handle, each, copies))
        order = [(h, block * each + i) for block in range(blocks) for h, each, _ in calls[:-1] for i in range(each)]
        order.append((calls[-1][0], 0))
        times, efforts = [], []
        for _ in range(options.new if tokens == 1 else options.rounds + 1):
            start, effort = time.perf_counter(), time.process_time()
            for handle, copy in order:
                driver.run(handle, copy)
            times.append(time.perf_counter() - start)
            efforts.append(time.process_time() - effort)
        if tokens == 1:
            worked = median(efforts[1:])
        seconds[tokens] = sorted(times[1:])
        for handle, _, _ in calls:
            driver.close(handle)
    one, prompt = seconds[1], seconds[options.prompt]
    return {
        "decode": 1 / median(one), "decode_cpu": 1 / worked, "decode_slow": 1 / one[-len(one) // 4], "decode_best": 1 / one[0],
        "prefill": options.prompt / prompt[0], "weight_bytes": nbytes, "read_bytes": nbytes, **read_bandwidth(),
        "kernels": peer, "activations": "int8",
    }  # fmt: skip


def table(cells: list[dict[str, Any]]) -> list[str]:
    """Markdown. Ratios are to bf16 at as many threads."""
    lines = [
        "| threads | weights | decode, tokens/s | x bf16 | promised | of it | prefill | weights, MB | resident, MB |",
        "| --- " * 9 + "|",
    ]
    for cell in sorted(cells, key=lambda c: c["threads"]):
        dense = next((c for c in cells if c["way"] == "bf16" and c["threads"] == cell["threads"]), None)
        ratio = f"{cell['rate'] / dense['rate']:.1f}" if dense else "–"
        inside = f"{cell['resident_bytes'] / 1e6:,.0f}" if "resident_bytes" in cell else "–"
        lines.append(
            f"| {cell['threads']} | {cell['way']} | {cell['rate']:.1f} | {ratio} | {cell['promised']:.1f} | "
            f"{cell['rate'] / cell['promised']:.2f} | {cell['prefill']:.0f} | {cell['weight_bytes'] / 1e6:,.0f} | {inside} |"
        )
    return lines


def plot(cells: list[dict[str, Any]], file: Path) -> None:
    """Decode over the bytes of the weights, one panel for each number of threads, with the line that the bandwidth draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    counts = sorted({c["threads"] for c in cells})
    figure, axes = pyplot.subplots(1, len(counts), figsize=(6 * len(counts), 4.5), squeeze=False)
    for axis, threads in zip(axes[0], counts, strict=True):
        these = [c for c in cells if c["threads"] == threads]
        for cell in these:
            ours = cell["way"].split()[0] not in ("ggml", "ik")
            axis.scatter(
                cell["read_bytes"] / 1e6, cell["rate"], marker="o" if ours else "x", color="C0" if ours else "C1"
            )
            axis.annotate(
                cell["way"], (cell["read_bytes"] / 1e6, cell["rate"]), xytext=(4, 4), textcoords="offset points"
            )
        sizes_ = sorted(c["read_bytes"] for c in these)
        bandwidth = max(c["promised"] * c["read_bytes"] for c in these)
        axis.plot([s / 1e6 for s in sizes_], [bandwidth / s for s in sizes_], color="grey", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="MB of weights read per token", ylabel="tokens per second")
        axis.set_title(f"{threads} thread{'s' if threads > 1 else ''}; grey: read bandwidth")
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    print(file)


if __name__ == "__main__":
    main()
