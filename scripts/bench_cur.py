"""`cur` beside the public CURing code: what C U R of the same rank leaves of the outputs, linear by linear.

Weights of the model that ships (`--model` for another Llama), second moments of its calibration text, the same for both. Theirs
in each of its modes; ours with DEIM, their selection matrix and their fit, as it comes, and in other ways. Fails if ours, as it
comes, is above theirs on any linear. Two versions of their code choose rows and columns differently; each is a checkout:

    git clone https://github.com/lukepark327/CURing current && git clone current initial && git -C initial checkout fcaaf1a
    python scripts/bench_cur.py --reference initial --reference current
    python scripts/bench_cur.py                  # ours alone, beside the truncated SVD of the same bytes
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from types import ModuleType
from typing import Any

import torch
from measure import commit, machine
from torch import Tensor

from compress import load, shipped
from compress.calibration.data import load_tokenizer
from compress.calibration.statistics import SecondMoment, SiteStatistics
from compress.linalg import ranks
from compress.linalg.cur import uniform_rank
from compress.linalg.low_rank import decompose
from compress.methods.base import Layer, SiteTask
from compress.methods.cur import CUR, CURConfig
from compress.shipped import calibration_text_path

Layers = dict[str, tuple[Tensor, Tensor]]  # name -> weight [out, in], second moment [in, in]
OURS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "`selection: qr`": {"selection": "qr"},
    "`selection: deim`": {"selection": "deim"},
}
MODES: dict[str, tuple[dict[str, Any], str]] = {  # theirs -> ours by DEIM with the same M and fit; what theirs takes
    "wanda": ({"matrix": "wanda", "fit": "weight"}, "root of the diagonal"),
    "cov_fast": ({"matrix": "scaled", "fit": "scaled", "damping": 0.0}, "root of the diagonal"),
    "cov": ({"matrix": "full", "fit": "full", "damping": 0.0}, "moment"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="append", default=[], type=Path, help="a checkout of CURing; repeatable")
    parser.add_argument("--keep-ratio", type=float, default=0.8)
    parser.add_argument("--rows", type=int, default=32, help="of 256 calibration tokens")
    parser.add_argument("--blocks", type=int, nargs="*", default=None, help="[default: all]")
    parser.add_argument("--model", type=Path, default=shipped.model_path(), help="[default: the one that ships]")
    parser.add_argument("--text", type=Path, default=calibration_text_path(), help="[default: the one that ships]")
    asked = parser.parse_args()
    layers = dict(layers_and_moments(asked.model, asked.text, asked.rows, asked.blocks))
    print(
        f"{machine()}, torch {torch.__version__}, commit {commit()}; {len(layers)} linears, keep_ratio {asked.keep_ratio:g}"
    )
    ours = {name: errors(layers, asked.keep_ratio, settings) for name, settings in OURS.items()}
    svd = []
    for weight, moment in layers.values():
        out, n = weight.shape
        truncated = decompose(weight, ranks.uniform_rank(out, n, asked.keep_ratio), moment)
        svd.append(truncated.loss / truncated.total)
    print("\n| | mean relative error of the outputs | seconds |\n|---|---|---|")
    print(f"| truncated SVD, whitened, same numbers | {mean(svd):.4f} | |")
    for name, (found, seconds) in ours.items():
        print(f"| {name} | {mean(found):.4f} | {seconds:.1f} |")
    lost = {name: found for name, (found, _) in ours.items()}
    worst = max((beside(folder, layers, asked.keep_ratio, lost) for folder in asked.reference), default=0.0)
    if worst > 1:
        raise SystemExit(f"ours is worse than theirs, {worst:.4f} times")


def beside(folder: Path, layers: Layers, keep: float, ours: dict[str, list[float]]) -> float:
    """Print a row for each mode of the code in `folder`; worst: the largest ratio of ours to theirs over all linears.

    Returns: the worst of ours as it comes.
    """
    worst = 0.0
    module = loaded(folder / "CURing" / "cur.py")
    print(
        f"\n| {folder.name} | theirs | DEIM, same M and fit | worst | " + "".join(f"{name} | worst | " for name in ours)
    )
    print("|---" * (4 + 2 * len(ours)) + "|")
    for mode, (settings, _) in modes_of(module).items():
        theirs = [their_error(module, mode, weight, moment, keep) for weight, moment in layers.values()]
        same, _ = errors(layers, keep, {"selection": "deim", **settings})
        worst = max(worst, *(a / b for a, b in zip(ours["as it comes"], theirs, strict=True)))
        cells = [f"{mean(theirs):.4f}"]
        for found in (same, *ours.values()):
            cells += [f"{mean(found):.4f}", f"{max(a / b for a, b in zip(found, theirs, strict=True)):.3f}"]
        print(f"| {mode} | " + " | ".join(cells) + " |", flush=True)
    return worst


def layers_and_moments(
    folder: Path, text: Path, n_rows: int, blocks: list[int] | None
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """Every linear of the blocks: name, weight [out, in], second moment [in, in] of its inputs."""
    model = load(folder, dtype=torch.float32)
    ids = load_tokenizer(folder)(text.read_text(), return_tensors="pt").input_ids[0]
    moments: dict[str, Tensor] = {}

    def adding(name: str) -> Callable[..., None]:
        def add(module: Any, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].flatten(0, -2).double()
            moments[name] = moments.get(name, torch.zeros(x.shape[1], x.shape[1]).double()) + x.T @ x

        return add

    linears = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
        and ".layers." in name
        and (blocks is None or int(name.split(".layers.")[1].split(".")[0]) in blocks)
    }
    for name, module in linears.items():
        module.register_forward_pre_hook(adding(name))
    with torch.no_grad():
        for batch in ids[: n_rows * 256].unflatten(0, (-1, 256)).split(8):
            model(batch)
    for name, module in linears.items():
        yield name, (module.weight.detach(), moments[name])


def errors(layers: Layers, keep: float, settings: dict[str, Any]) -> tuple[list[float], float]:
    """Relative error of the outputs of each linear, and seconds in all."""
    start, found = time.perf_counter(), []
    for name, (weight, moment) in layers.items():
        config = CURConfig(keep_ratio=keep, **settings)
        task = SiteTask("site", (Layer(name, weight, None, config, torch.float32),))
        statistics = SiteStatistics(1, {SecondMoment(): moment})
        module = CUR.compress(task, statistics, torch.Generator())[name].module
        found.append(relative(weight, module.dense(torch.float32), moment))
    return found, time.perf_counter() - start


def their_error(module: ModuleType, mode: str, weight: Tensor, moment: Tensor, keep: float) -> float:
    out, n = weight.shape
    rank = uniform_rank(out, n, keep)
    torch.manual_seed(0)  # they take randomised singular vectors
    given = moment.float() if MODES[mode][1] == "moment" else moment.diagonal().sqrt().float()
    more = {"aux_mode": mode} if "aux_mode" in inspect.signature(module.cur_decomposition).parameters else {}
    columns, link, rows, *_ = module.cur_decomposition(weight.clone(), given, rank, rank, **more)
    return relative(weight, columns.double() @ link.double() @ rows.double(), moment)


def modes_of(module: ModuleType) -> dict[str, tuple[dict[str, Any], str]]:
    many = "aux_mode" in inspect.signature(module.cur_decomposition).parameters
    return MODES if many else {"wanda": MODES["wanda"]}


def relative(weight: Tensor, found: Tensor, moment: Tensor) -> float:
    """tr((W - W') H (W - W')^T) / tr(W H W^T)."""
    difference = weight.double() - found.double()
    return float(((difference @ moment) * difference).sum() / ((weight.double() @ moment) * weight.double()).sum())


def loaded(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"reference_{file.parents[1].name}", file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    main()
