"""CoSpaDi: every output picks its own few atoms out of a dictionary, W ~ codes dictionary, fitted to the inputs the layer has.

    minimise  tr((W - C D) H (W - C D)^T),  H = sum_t x_t x_t^T      D [k, in]: k atoms     C [out, k]: s entries per row

Truncated SVD is the case s = k: one subspace for all outputs. Here each has one of its own, spanned by s of the atoms, and a bit
per atom says which. With H = L^T L it is the problem of a sparse dictionary in the plain norm, for W L^T; D = A L^-T leads back.

    orthogonal   A A^T = I: codes are exact, the dictionary follows from an orthonormal Procrustes problem       COMPOT
    ksvd         any A with rows of length 1: codes by orthogonal matching pursuit, atoms one by one              CoSpaDi

(compress/linalg/orthogonal_dictionary.py, ksvd.py, sparse_coding.py). `ksvd` starts from the orthogonal dictionary, which it then
betters by some percent; from random columns, as in the paper, it stays behind it. In the end D is rounded to what is stored, and
the coefficients are fitted anew to that, where they are.

Sizes follow from bytes, the places included: of a budget B = keep_ratio 2 in out, with s = k / rho,

    2 (in k + s out) + k out / 8 <= B       orthonormal atoms are no more than inputs: k <= in, what is left goes to s

Departures from the paper: inputs come from the layers compressed before; the start of K-SVD, the extrapolation of the orthogonal
engine, blocks of atoms and pursuit by stages for large s, each said where it is done; the last fit of the coefficients.

Sources: CoSpaDi, 2025; K-SVD, Aharon et al., 2006. The orthogonal engine after COMPOT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.calibration.statistics import Request, SecondMoment, SiteStatistics
from compress.errors import NumericsError, RecipeError
from compress.linalg.finite import all_finite
from compress.linalg.ksvd import ksvd, random_atoms
from compress.linalg.orthogonal_dictionary import Learned, orthogonal_dictionary
from compress.linalg.quadratic import energy, fraction
from compress.linalg.sparse_coding import ALLOWANCE, EXACT_ATOMS, STAGES, fitted, pursue
from compress.linalg.whitening import Whitening, whitening
from compress.methods.base import Extent, Kept, Layer, LayerShape, MethodConfig, Outcome, SiteMethod, SiteTask, View
from compress.methods.cospadi_sizes import nbytes_of, sizes_of
from compress.methods.rtn import check_weight
from compress.modules.dictionary import DictionaryLinear
from compress.modules.dictionary_spec import LEAF, DictionarySpec
from compress.modules.factored import linear_with, weight_of

ORTHOGONAL_ROUNDS, KSVD_ROUNDS = 20, 20
EIGEN = 20.0  # n^3 of eigenvectors in float64, in operations of a float32 product
REFIT_STEPS = 20  # of conjugate gradients; the rounded dictionary is almost the one that the codes were made for
NOT_CALIBRATED = "NOT CALIBRATED: no calibration token reached this layer; its weight alone was coded"


class CoSpaDiConfig(MethodConfig):
    keep_ratio: float = Field(
        0.8, gt=0, lt=1, description="bytes of dictionary, codes and places, as a fraction of the layer's in 16 bits"
    )
    rho: float = Field(2.0, ge=1, le=16, description="atoms per coefficient of an output; 1: every output uses all")
    atoms: int | None = Field(None, ge=1, description="atoms of the dictionary, in place of keep_ratio")
    atoms_multiple: int = Field(1, ge=1, description="atoms are rounded down to a multiple of it")
    engine: Literal["orthogonal", "ksvd"] = Field(
        "orthogonal",
        description="orthonormal atoms, or any: some percent less error for many times the work",
    )
    rounds: int | None = Field(
        None, ge=1, description="codes and dictionary in turn, so often at most; by default 20 of either engine"
    )
    start: Literal["orthogonal", "columns"] = Field(
        "orthogonal", description="ksvd: from the orthogonal dictionary, or from random outputs (the paper)"
    )
    damping: float = Field(
        0.01, ge=0, lt=1, description="fraction of the mean of diag(H) that is added to diag(H) before whitening"
    )
    refit: bool = Field(True, description="fit the coefficients to the dictionary as it is stored")
    share: int = Field(
        1,
        ge=1,
        description="so many consecutive blocks share the dictionary of their layers of one name, learned for all of them",
    )

    @model_validator(mode="after")
    def _start_of_ksvd(self) -> CoSpaDiConfig:
        if self.start != "orthogonal" and self.engine != "ksvd":
            raise ValueError(f"start={self.start} needs engine=ksvd")
        return self


class Member(CoSpaDiConfig):
    """The settings of a layer that shares its dictionary with others: those of `members`, the first of which stores it."""

    members: tuple[str, ...]


class CoSpaDi(SiteMethod):
    name = "cospadi"
    summary = "a dictionary and sparse codes: every output uses its own few of the atoms"
    Config = CoSpaDiConfig
    on_leaves = False

    @classmethod
    def plan(cls, shape: LayerShape, config: CoSpaDiConfig) -> DictionarySpec | Kept:
        if shape.kind != "linear":
            raise RecipeError(f"{shape.name}: cospadi is for linears, not for tables; leave it out of layers")
        members = members_of(shape.name, config)
        n_atoms, n_kept = sizes_of(shape, config, len(members))
        share = nbytes_of(shape, n_atoms, n_kept, len(members)) / (
            2 * shape.out_features * shape.in_features * len(members)
        )
        if share >= 1:
            return Kept(f"{n_atoms} atoms, {n_kept} per output, would take {share:.2f} times its bytes in 16 bits")
        lender = None if shape.name == members[0] else members[0]
        return DictionarySpec.of_sizes(shape.in_features, shape.out_features, n_atoms, n_kept, lender)

    @classmethod
    def fitted(cls, config: CoSpaDiConfig, multiple: int) -> CoSpaDiConfig:
        return config.model_copy(update={"atoms_multiple": math.lcm(config.atoms_multiple, multiple)})

    @classmethod
    def arranged(cls, shapes: Mapping[str, LayerShape], configs: dict[str, Any]) -> dict[str, Any]:
        from compress.methods.cospadi_shared import arranged

        return arranged(shapes, configs)

    @classmethod
    def observes(cls, config: CoSpaDiConfig) -> bool:
        return isinstance(config, Member)

    @classmethod
    def observe(cls, view: View, configs: dict[str, Any]) -> dict[str, Any]:
        from compress.methods.cospadi_shared import observe

        return observe(view, configs)

    @classmethod
    def observation_bytes(cls, extent: Extent, config: CoSpaDiConfig) -> int:
        """The mean moments of a block's sites, and the work on one projection of a group."""
        moments = sum(4 * s.in_features**2 for s in extent.shapes) // max(extent.n_blocks, 1)
        return moments + max(cls.workspace((s,), config) for s in extent.shapes) * config.share

    @classmethod
    def statistics(cls, config: CoSpaDiConfig) -> tuple[Request, ...]:
        return (SecondMoment(),)

    @classmethod
    def workspace(cls, shapes: tuple[LayerShape, ...], config: CoSpaDiConfig) -> int:
        n = max(s.in_features for s in shapes)
        large = max(s.out_features * s.in_features for s in shapes)
        pursued = config.engine == "ksvd" or config.share > 1
        return 8 * 4 * n * n + 8 * 4 * large + (ALLOWANCE if pursued else 0)

    @classmethod
    def flops(cls, shapes: tuple[LayerShape, ...], config: CoSpaDiConfig) -> float:
        n = max(s.in_features for s in shapes)
        total = float(n**3)
        for s in shapes:
            k, kept = sizes_of(s, config, len(members_of(s.name, config)))
            rounds = ORTHOGONAL_ROUNDS if config.rounds is None else config.rounds
            total += EIGEN * min(s.out_features, s.in_features) ** 3
            total += rounds * (4.0 * s.out_features * s.in_features * k + EIGEN * k**3 + 6.0 * k * k * s.in_features)
            if config.engine == "ksvd":
                coding = 2.0 * k * k * s.out_features * min(kept, 80)
                total += rounds * (coding + 36.0 * s.out_features * s.in_features * k)
        return total

    @classmethod
    def compress(
        cls, site: SiteTask, statistics: SiteStatistics | None, generator: torch.Generator
    ) -> dict[str, Outcome]:
        known = SiteStatistics.usable(statistics, f"{', '.join(layer.name for layer in site.layers)}: cospadi")
        whitenings: dict[float, Whitening] = {}
        outcomes = {}
        for layer in site.layers:
            check_weight(layer)
            damping = layer.config.damping
            try:
                if damping not in whitenings:
                    whitenings[damping] = whitening(moment_of(layer, known), damping)
                outcomes[layer.name] = _compress_layer(layer, known, whitenings[damping], generator, site)
            except (NumericsError, torch.linalg.LinAlgError) as error:
                raise NumericsError(f"{layer.name}: cospadi: {' '.join(str(error).split())}") from None
        return outcomes


def moment_of(layer: Layer, known: SiteStatistics | None) -> Tensor:
    n = layer.weight.shape[1]
    return torch.eye(n, device=layer.weight.device) if known is None else known[SecondMoment()].to(layer.weight.device)


class Tell:
    """Tells of a layer's rounds and their error."""

    def __init__(self, site: SiteTask, name: str):
        self._site, self._name = site, name

    def __call__(self, done: int, error: float) -> None:
        self._site.tell(f"{self._name}: round {done}, error {error:.4g}")


def learn(
    targets: Tensor, n_atoms: int, n_kept: int, config: CoSpaDiConfig, generator: torch.Generator, tell: Tell
) -> Learned:
    """Atoms and codes of `targets` [n, in], the outputs' weights in the whitened space."""
    if config.engine == "orthogonal":
        rounds = ORTHOGONAL_ROUNDS if config.rounds is None else config.rounds
        return orthogonal_dictionary(targets, n_atoms, n_kept, rounds, tell)
    rounds = KSVD_ROUNDS if config.rounds is None else config.rounds
    random = random_atoms(targets, n_atoms, generator)
    if config.start == "columns":
        return ksvd(targets, random, n_kept, rounds, tell=tell)
    n_orthogonal = min(n_atoms, targets.shape[1])
    first = orthogonal_dictionary(targets, n_orthogonal, min(n_kept, n_orthogonal), ORTHOGONAL_ROUNDS, tell)
    random[:n_orthogonal] = first.atoms
    codes = torch.nn.functional.pad(first.codes, (0, n_atoms - n_orthogonal))
    return ksvd(targets, random, n_kept, rounds, codes, tell)


def rounded_atoms(atoms: Tensor, dtype: torch.dtype) -> Tensor:
    """The dictionary [k, in] as it is stored, its rows brought to one length: entries then fit every dtype."""
    lengths = atoms.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, atoms / lengths, 0.0).to(dtype)


def support(codes: Tensor, n_kept: int) -> Tensor:
    """Where codes are stored: bool [out, k], exactly `n_kept` per row; where there are fewer, some zeros are stored too."""
    places = codes.abs().topk(n_kept, dim=1, sorted=False).indices
    return torch.zeros_like(codes, dtype=torch.bool).scatter_(1, places, True)


def members_of(name: str, config: CoSpaDiConfig) -> tuple[str, ...]:
    """The layers that share a dictionary with layer `name`, itself included; the first stores it."""
    return config.members if isinstance(config, Member) else (name,)


def _compress_layer(
    layer: Layer, known: SiteStatistics | None, white: Whitening, generator: torch.Generator, site: SiteTask
) -> Outcome:
    config: CoSpaDiConfig = layer.config
    spec = CoSpaDi.plan(layer.shape, config)
    assert isinstance(spec, DictionarySpec), f"{layer.name}: {spec}"
    members = members_of(layer.name, config)
    n_atoms, n_kept = sizes_of(layer.shape, config, len(members))
    targets = white.forward(layer.weight).float()
    if len(members) > 1:
        dictionary = _shared(layer, members, site)
        codes, errors = _coded(targets, white, weight_of(dictionary), n_kept)
    else:
        found = learn(targets, n_atoms, n_kept, config, generator, Tell(site, layer.name))
        exact = white.back(found.atoms)
        dictionary = linear_with(rounded_atoms(exact, layer.scale_dtype))
        codes, errors = found.codes * exact.norm(dim=1).to(found.codes), found.errors
    mask = support(codes, n_kept)
    if config.refit:
        codes = refitted(targets, white, weight_of(dictionary), codes, mask)
    module = DictionaryLinear.from_parts(
        dictionary if spec.shared else dictionary.get_parameter("weight"),
        codes.to(layer.scale_dtype),
        mask if n_kept < n_atoms else None,
        layer.bias,
        spec.shared,
    )
    assert replace(module.spec, dictionary=None) == spec, (module.spec, spec)
    if not all(all_finite(t) for t in module.stored().values() if t.is_floating_point()):
        raise NumericsError(
            f"dictionary or codes overflow {layer.scale_dtype}; store the result with model.dtype=float32 or bfloat16"
        )
    report = {"atoms": float(n_atoms), "kept": float(n_kept), "rounds": float(len(errors))}
    if (len(members) > 1 or config.engine == "ksvd") and n_kept > EXACT_ATOMS:
        report["pursuit_stages"] = float(STAGES)
    report |= {"code_error": errors[-1] if errors else 1.0, **figures(layer, module, known)}
    return Outcome(module, report, notes_of(layer, known, white))


def _shared(layer: Layer, members: tuple[str, ...], site: SiteTask) -> nn.Module:
    """The dictionary that was learned for all members: as it was stored, or, in the first of them, as it will be."""
    if layer.lender is not None:
        return layer.lender.get_submodule(LEAF)
    learned = site.kept(members[0]).to(layer.weight.device)
    return linear_with(rounded_atoms(learned, layer.scale_dtype))


def _coded(targets: Tensor, white: Whitening, dictionary: Tensor, n_kept: int) -> tuple[Tensor, list[float]]:
    """Codes by pursuit for a dictionary [k, in] that was learned for others too, and their error."""
    atoms = white.forward(dictionary).float()
    lengths = atoms.norm(dim=1).clamp(min=torch.finfo(atoms.dtype).tiny)
    atoms = atoms / lengths[:, None]
    energies = targets.square().sum(1)
    codes = pursue(atoms @ atoms.T, targets @ atoms.T, energies, n_kept)
    left = float((targets - codes @ atoms).double().square().sum())
    return codes / lengths, [fraction(left, float(energies.double().sum()))]


def refitted(targets: Tensor, white: Whitening, dictionary: Tensor, codes: Tensor, mask: Tensor) -> Tensor:
    """The coefficients where `mask` is, fitted to the dictionary as it is stored."""
    atoms = white.forward(dictionary).float()
    return fitted(atoms @ atoms.T, targets @ atoms.T, codes, mask, REFIT_STEPS)


def figures(layer: Layer, module: DictionaryLinear, known: SiteStatistics | None) -> dict[str, float]:
    """Of what is stored: `relative_error` of the outputs on the calibration inputs, `loss` the same per token, `weight_error`."""
    difference = layer.weight - module.dense(torch.float32)
    found = {"weight_error": fraction(energy(difference, None), energy(layer.weight, None))}
    if known is not None:
        hessian = known[SecondMoment()]
        loss = energy(difference, hessian)
        found["relative_error"] = fraction(loss, energy(layer.weight, hessian))
        found["loss"] = loss / known.n_tokens
        found["n_tokens"] = float(known.n_tokens)
    return found


def notes_of(layer: Layer, known: SiteStatistics | None, white: Whitening) -> list[str]:
    if known is None:
        return [NOT_CALIBRATED]
    notes, n_inputs = [], layer.weight.shape[1]
    if white.damping > layer.config.damping:
        notes.append(
            f"damping raised from {layer.config.damping:g} to {white.damping:.3g}: the second moment of the inputs is not "
            f"positive definite; calibrate on more, and more varied, tokens"
        )
    if known.n_tokens < n_inputs:
        notes.append(f"calibrated on {known.n_tokens} tokens for {n_inputs} inputs: too few to know them all")
    return notes
