"""`cospadi` beside a direct implementation of its papers' text: time at equal loss on one large matrix, and peak memory.

Direct: torch, batched, in float32; Procrustes by torch.linalg.svd of the k x d product, atoms of K-SVD one after another with
8 power iterations, pursuit with a gathered product and a Cholesky factor per row that grows. Ours runs until its loss is not
above. Every way runs in a process of its own, so that peaks do not mix.

    python scripts/bench_cospadi.py                              # orthogonal, 4096 x 4096, ratio 0.7
    python scripts/bench_cospadi.py --engine ksvd --size 512 --rounds 4
    python scripts/bench_cospadi.py --rounds 5 --direct-rounds 2 # a direct run too long to be waited for: seconds per round
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from measure import commit, machine
from torch import Tensor

from compress.linalg.ksvd import ksvd, random_atoms
from compress.linalg.orthogonal_dictionary import largest, orthogonal_dictionary
from compress.methods.base import LayerShape
from compress.methods.cospadi import CoSpaDiConfig
from compress.methods.cospadi_sizes import sizes_of

BATCH = 256  # rows whose codes the direct pursuit makes at a time: a Cholesky factor each
POWER_STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["orthogonal", "ksvd"], default="orthogonal")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--ratio", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=20, help="of the direct way; ours ends at its loss")
    parser.add_argument("--direct-rounds", type=int, help="so many of them are run, the rest is reckoned")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", choices=["ours", "direct"], help="run this way alone and print JSON")
    parser.add_argument("--loss", type=float, default=0.0, help="with --one ours: end at this loss")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.one:
        print(json.dumps(one(asked)))
        return
    n_atoms, n_kept = sizes(asked)
    print(
        f"{asked.engine}, {asked.size} x {asked.size}, keep_ratio {asked.ratio:g}: {n_atoms} atoms, {n_kept} per output"
    )
    print(f"{machine()}, {asked.threads} threads, commit {commit()}\n")
    print("| | rounds | loss | CPU s | wall s | peak GiB |\n|---|---|---|---|---|---|")
    direct = started(asked, "direct", 0.0)
    reckoned = asked.direct_rounds is not None and asked.direct_rounds < asked.rounds
    ours = started(asked, "ours", 0.0 if reckoned else direct["losses"][-1])
    for name, found in (("direct", direct), ("ours", ours)):
        print(
            f"| {name} | {len(found['losses']) - 1} | {found['losses'][-1]:.5f} | {found['cpu_s']:.1f} | {found['wall_s']:.1f} | "
            f"{found['peak_bytes'] / 2**30:.2f} |"
        )
    print(f"\nlosses: direct {shown(direct)}; ours {shown(ours)}")
    if reckoned:
        more = (direct["cpu_s"] - direct["start_s"]) / asked.direct_rounds * asked.rounds + direct["start_s"]
        print(f"direct, {asked.rounds} rounds, reckoned: {more:.0f} CPU s")


def shown(found: dict) -> str:
    return " ".join(f"{loss:.5f}" for loss in found["losses"])


def started(asked: argparse.Namespace, way: str, loss: float) -> dict:
    """The result of a way in a process of its own."""
    command = [sys.executable, str(Path(__file__)), "--one", way, "--loss", str(loss), "--engine", asked.engine]
    for name in ("size", "ratio", "rounds", "threads"):
        command += [f"--{name}", str(getattr(asked, name))]
    if asked.direct_rounds is not None:
        command += ["--direct-rounds", str(asked.direct_rounds)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def sizes(asked: argparse.Namespace) -> tuple[int, int]:
    shape = LayerShape("matrix", asked.size, asked.size)
    return sizes_of(shape, CoSpaDiConfig(keep_ratio=asked.ratio, engine=asked.engine))


def targets_of(size: int) -> Tensor:
    """A matrix like a whitened weight: singular values that fall by a power, no preferred basis."""
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(size, size, generator=generator) / size**0.5
    return (left * (1 + torch.arange(size)) ** -0.35) @ torch.randn(size, size, generator=generator) / size**0.5


def one(asked: argparse.Namespace) -> dict:
    n_atoms, n_kept = sizes(asked)
    targets = targets_of(asked.size)
    rounds = asked.rounds if asked.direct_rounds is None or asked.one == "ours" else asked.direct_rounds
    start, cpu = time.perf_counter(), time.process_time()
    marks: list[float] = []
    losses: list[float] = []

    def tell(done: int, loss: float) -> None:
        marks.append(time.process_time() - cpu)
        losses.append(loss)
        if asked.one == "ours" and 0 < loss <= asked.loss:
            raise StopIteration

    ways = {
        ("orthogonal", "direct"): lambda: direct_orthogonal(targets, n_atoms, n_kept, rounds, tell),
        ("orthogonal", "ours"): lambda: orthogonal_dictionary(targets, n_atoms, n_kept, rounds, tell),
        ("ksvd", "direct"): lambda: direct_ksvd(targets, n_atoms, n_kept, rounds, tell),
        ("ksvd", "ours"): lambda: our_ksvd(targets, n_atoms, n_kept, rounds, tell),
    }
    with suppress(StopIteration):
        ways[asked.engine, asked.one]()
    return {
        "losses": losses,
        "start_s": marks[0],
        "cpu_s": time.process_time() - cpu,
        "wall_s": time.perf_counter() - start,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def our_ksvd(targets: Tensor, n_atoms: int, n_kept: int, n_rounds: int, tell) -> None:  # type: ignore[no-untyped-def]
    atoms = random_atoms(targets, n_atoms, torch.Generator().manual_seed(42))
    tell(0, 1.0)
    ksvd(targets, atoms, n_kept, 2 * n_rounds, tell=tell)


def direct_orthogonal(targets: Tensor, n_atoms: int, n_kept: int, n_rounds: int, tell) -> None:  # type: ignore[no-untyped-def]
    """Largest coefficients and Procrustes in turn, from the singular vectors."""
    total = float(targets.double().square().sum())
    atoms = torch.linalg.svd(targets, full_matrices=False)[2][:n_atoms]
    for done in range(n_rounds + 1):
        codes = largest(targets @ atoms.T, n_kept)
        tell(done, 1 - float(codes.double().square().sum()) / total)
        if done < n_rounds:
            left, _, right = torch.linalg.svd(codes.T @ targets, full_matrices=False)
            atoms = left @ right


def direct_ksvd(targets: Tensor, n_atoms: int, n_kept: int, n_rounds: int, tell) -> None:  # type: ignore[no-untyped-def]
    """Pursuit, then every atom by power iterations on what the others leave, from random rows."""
    total = float(targets.double().square().sum())
    atoms = random_atoms(targets, n_atoms, torch.Generator().manual_seed(42))
    codes = torch.zeros(len(targets), n_atoms)
    residual = targets.clone()
    tell(0, 1.0)
    for done in range(n_rounds):
        found = torch.cat([direct_pursuit(rows, atoms, n_kept) for rows in targets.split(BATCH)])
        changed = targets - found @ atoms
        better = changed.square().sum(1) < residual.square().sum(1)
        codes[better], residual[better] = found[better], changed[better]
        for i in range(n_atoms):
            rows = codes[:, i].nonzero()[:, 0]
            if not len(rows):
                continue
            rest = residual[rows] + torch.outer(codes[rows, i], atoms[i])
            left = codes[rows, i] / codes[rows, i].norm()
            for _ in range(POWER_STEPS):
                right = left @ rest
                right = right / right.norm()
                left = rest @ right
            atoms[i], codes[rows, i] = right, left
            residual[rows] = rest - torch.outer(left, right)
        tell(done + 1, float(residual.double().square().sum()) / total)


def direct_pursuit(targets: Tensor, atoms: Tensor, n_kept: int) -> Tensor:
    """Batched OMP as it is usually written: G and p once, a Cholesky factor per row that grows, a gathered product."""
    gram, first = atoms @ atoms.T, targets @ atoms.T
    n_rows = len(targets)
    rest = first.clone()
    chosen = torch.zeros(n_rows, 0, dtype=torch.long)
    factor = torch.zeros(n_rows, n_kept, n_kept)
    rows = torch.arange(n_rows)
    for t in range(n_kept):
        best = rest.abs().scatter(1, chosen, -1.0).argmax(1)
        if t:
            across = torch.linalg.solve_triangular(
                factor[:, :t, :t], gram[chosen, best[:, None]][..., None], upper=False
            )[..., 0]
            factor[:, t, :t] = across
            factor[:, t, t] = (1 - across.square().sum(1)).clamp(min=1e-6).sqrt()
        else:
            factor[:, 0, 0] = 1
        chosen = torch.cat([chosen, best[:, None]], dim=1)
        own = factor[:, : t + 1, : t + 1]
        fit = torch.cholesky_solve(first.gather(1, chosen)[..., None], own)[..., 0]
        rest = first - torch.bmm(fit[:, None], gram[chosen])[:, 0]
    return torch.zeros(n_rows, len(atoms)).index_put((rows[:, None], chosen), fit)


if __name__ == "__main__":
    main()
