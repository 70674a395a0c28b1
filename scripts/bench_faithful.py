"""Our GPTQ beside the original code, on the same weights and the same second moments.

    git clone https://github.com/IST-DASLab/gptq
    python scripts/bench_faithful.py --reference gptq

Layer losses tr((W - Q) H (W - Q)^T) at 4, 3 and 2 bits and groups of 128, 64, 32 and whole rows, on synthetic layers with
correlated inputs and on the linears of a model with real inputs. "ratio" is our loss over the original's at equal
settings: the mean over layers, and the worst layer. "default" is our default (act-order, static groups) over the
original's (natural order, grids that follow the updates). Scales stay in float32, as the original never rounds them.
Fails if a ratio is above 1.005 anywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from compress import shipped
from compress.linalg.cholesky import inverse_factor
from compress.linalg.error_feedback import round_columns
from compress.linalg.grid import GridRule
from compress.linalg.order import act_order
from compress.linalg.quadratic import row_energy

WORST_RATIO = 1.005
DAMPING = 0.01


class Setting(NamedTuple):
    bits: int
    group_size: int
    symmetric: bool
    order: str  # "none" or "act"
    static_groups: bool

    def __str__(self) -> str:
        groups = "row" if self.group_size == -1 else f"g{self.group_size}"
        kind = "sym " if self.symmetric else "asym"
        return f"{self.bits} bits {groups:>4} {kind} {self.order:>4} {'static' if self.static_groups else 'dynamic':>7}"


class Problem(NamedTuple):
    name: str
    weight: Tensor  # [out, in]
    hessian: Tensor  # [in, in], scaled as the original scales it


def settings(bits: tuple[int, ...] = (4, 3, 2), group_sizes: tuple[int, ...] = (128, 64, 32, -1)) -> list[Setting]:
    """Every combination that both codes know; of whole rows there is but one kind."""
    found = []
    for b, g, symmetric in itertools.product(bits, group_sizes, (True, False)):
        for order, static in (("none", False), ("none", True), ("act", True)):
            if g != -1 or (static == (order == "act")):
                found.append(Setting(b, g, symmetric, order, static and g != -1))
    return found


def load_reference(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Modules `gptq` and `quant` of a checkout of IST-DASLab/gptq."""
    modules = []
    with contextlib.redirect_stdout(io.StringIO()), mock.patch.dict(sys.modules):
        for name in ("quant", "gptq"):  # the second imports the first by its bare name
            spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
            if spec is None or spec.loader is None or not (folder / f"{name}.py").is_file():
                raise SystemExit(f"{folder} is not a checkout of https://github.com/IST-DASLab/gptq: no {name}.py")
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
            modules.append(module)
    return modules[1], modules[0]


def original(reference: tuple[ModuleType, ModuleType], problem: Problem, setting: Setting) -> Tensor:
    """The weight that the original code makes of `problem`."""
    gptq, quant = reference
    layer = nn.Linear(problem.weight.shape[1], problem.weight.shape[0], bias=False)
    layer.weight.data = problem.weight.clone()
    solver = gptq.GPTQ(layer)
    solver.quantizer = quant.Quantizer()
    solver.quantizer.configure(setting.bits, perchannel=True, sym=setting.symmetric, mse=False)
    solver.H = problem.hessian.clone()
    with contextlib.redirect_stdout(io.StringIO()), mock.patch("torch.cuda.synchronize"):
        solver.fasterquant(
            blocksize=128,
            percdamp=DAMPING,
            groupsize=setting.group_size,
            actorder=setting.order == "act",
            static_groups=setting.static_groups,
        )
    return layer.weight.data


def ours(problem: Problem, setting: Setting) -> Tensor:
    """The weight that we make of it."""
    order = act_order(problem.hessian.diagonal()) if setting.order == "act" else None
    hessian = problem.hessian if order is None else problem.hessian[order][:, order]
    rounded = round_columns(
        problem.weight,
        inverse_factor(hessian, DAMPING).upper,
        GridRule(setting.bits, setting.symmetric),
        setting.group_size,
        order,
        static_groups=setting.static_groups or setting.group_size == -1,
    )
    return rounded.grid.decode(rounded.codes)


def loss(problem: Problem, rounded: Tensor) -> float:
    return float(row_energy((problem.weight - rounded).double(), problem.hessian.double()).sum())


def synthetic(n_problems: int, n_rows: int = 192, n: int = 512) -> list[Problem]:
    """Layers whose inputs share directions and differ in size, of 2 n tokens."""
    problems = []
    for seed in range(n_problems):
        generator = torch.Generator().manual_seed(seed)
        mix = torch.randn(n, n, generator=generator)
        x = torch.randn(2 * n, n, generator=generator) @ mix * torch.rand(n, generator=generator)
        weight = torch.randn(n_rows, n, generator=generator) * 0.02
        problems.append(Problem(f"synthetic.{seed}", weight, 2 / len(x) * x.T @ x))
    return problems


def from_model(folder: Path, text: Path, n_rows: int, length: int, blocks: list[int]) -> list[Problem]:
    """Linears of some decoder blocks of a model, with the second moments of their inputs on `text`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text.read_text(encoding="utf-8")[: 12 * n_rows * length], return_tensors="pt")["input_ids"][0]
    n_rows = min(n_rows, len(ids) // length)
    moments: dict[str, Tensor] = {}
    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and any(f"layers.{b}." in name for b in blocks)
    }

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].flatten(0, -2).float()
            moments[name] = moments.get(name, torch.zeros(())) + 2 / n_rows * x.T @ x

        return add

    for name, module in linears.items():
        module.register_forward_hook(hook(name))
    with torch.no_grad():
        for batch in ids[: n_rows * length].view(n_rows, length).split(8):
            model(batch)
    return [Problem(name, module.weight.data.clone(), moments[name]) for name, module in linears.items()]


def compare(
    reference: tuple[ModuleType, ModuleType], problems: list[Problem], chosen: list[Setting]
) -> list[dict[str, object]]:
    """A row per setting: mean loss of the original over layers, mean (geometric) and worst ratio, and the default's."""
    table = []
    first: dict[tuple[int, int, bool], list[float]] = {}  # losses of the original at its own default
    for setting in chosen:
        fitting = [p for p in problems if setting.group_size == -1 or p.weight.shape[1] % setting.group_size == 0]
        theirs = [loss(p, original(reference, p, setting)) for p in fitting]
        mine = [loss(p, ours(p, setting)) for p in fitting]
        ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
        baseline = first.setdefault(setting[:3], theirs)
        row: dict[str, object] = {
            **setting._asdict(),
            "layers": len(fitting),
            "original": sum(theirs) / len(theirs),
            "ratio": _geometric_mean(ratios),
            "worst": max(ratios),
            "worst_layer": fitting[ratios.index(max(ratios))].name,
        }
        if setting.order == "act":
            row["default"] = _geometric_mean([a / b for a, b in zip(mine, baseline, strict=True)])
        table.append(row)
    return table


def _geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def show(title: str, table: list[dict[str, object]], chosen: list[Setting]) -> None:
    print(f"\n{title}")
    print(f"{'setting':34} {'layers':>6} {'original':>11} {'ratio':>8} {'worst':>8} {'default':>8}")
    for setting, row in zip(chosen, table, strict=True):
        default = f"{row['default']:8.4f}" if "default" in row else ""
        print(
            f"{setting!s:34} {row['layers']:>6} {row['original']:>11.5g} {row['ratio']:>8.5f} {row['worst']:>8.5f} {default}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="a checkout of IST-DASLab/gptq")
    parser.add_argument("--model", type=Path, default=shipped.model_path(), help="folder of a model [the shipped one]")
    parser.add_argument("--text", type=Path, default=shipped.calibration_text_path(), help="calibration text [shipped]")
    parser.add_argument("--rows", type=int, default=32, help="rows of calibration text [32]")
    parser.add_argument("--length", type=int, default=256, help="tokens per row [256]")
    parser.add_argument("--blocks", type=int, nargs="*", default=[3], help="decoder blocks to take linears from [3]")
    parser.add_argument("--synthetic", type=int, default=1, help="synthetic layers, 0: none [1]")
    parser.add_argument("--bits", type=int, nargs="*", default=[4, 3, 2], help="[4 3 2]")
    parser.add_argument("--json", action="store_true", help="print the tables as JSON")
    options = parser.parse_args()

    reference = load_reference(options.reference)
    chosen = settings(tuple(options.bits))
    tables = {}
    for title, problems in (
        ("synthetic layers, correlated inputs", synthetic(options.synthetic)),
        (
            f"{options.model.name}",
            from_model(options.model, options.text, options.rows, options.length, options.blocks),
        ),
    ):
        if not problems:
            continue
        tables[title] = compare(reference, problems, chosen)
        if not options.json:
            show(title, tables[title], chosen)
    worst = max((row for table in tables.values() for row in table), key=lambda row: float(str(row["worst"])))
    if options.json:
        print(json.dumps(tables, indent=1))
    failed = float(str(worst["worst"])) > WORST_RATIO
    print(f"\nworst ratio {worst['worst']:.5f} ({worst['worst_layer']}); allowed {WORST_RATIO}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
