"""How many atoms a dictionary has and how many of them an output uses: sizes of `cospadi`, from bytes.

2 (in k / m + s out) + k out / 8 <= keep_ratio 2 in out,   s = k / rho        m layers share a dictionary
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from compress.errors import RecipeError
from compress.modules.dictionary_spec import DictionarySpec

if TYPE_CHECKING:
    from compress.methods.base import LayerShape
    from compress.methods.cospadi import CoSpaDiConfig


def sizes_of(shape: LayerShape, config: CoSpaDiConfig, members: int = 1) -> tuple[int, int]:
    """k and s of each of `members` layers that share a dictionary.

    Raises: RecipeError where the settings give none that can be, with the nearest value that does.
    """
    out_features, in_features, multiple = shape.out_features, shape.in_features, config.atoms_multiple
    most = most_atoms(shape, config, members)
    if multiple > most:
        raise RecipeError(
            f"{shape.name}: a later step needs atoms in multiples of {multiple}, and {most} are the most that this layer can "
            f"have; use smaller groups there, or skip the layer"
        )
    if config.atoms is not None:
        if config.atoms > most:
            limit = "in_features" if most == in_features else "out_features"
            raise RecipeError(
                f"{shape.name}: atoms={config.atoms} is more than {limit}={most}; use at most {most}"
                + (", or engine: ksvd" if config.engine == "orthogonal" and most < out_features else "")
            )
        n_atoms = max(config.atoms // multiple, 1) * multiple
        return n_atoms, _kept_of(n_atoms, config)
    budget = int(Fraction(str(config.keep_ratio)) * 2 * out_features * in_features * members)
    ideal = budget / (2 * in_features + members * (2 / config.rho + 1 / 8 * (config.rho > 1)) * out_features)
    highest = min(int(ideal) + 2 * multiple, most)  # an s that is rounded down may make room for another atom
    for n_atoms in range(highest // multiple * multiple, 0, -multiple):
        n_kept = _kept_of(n_atoms, config)
        if nbytes_of(shape, n_atoms, n_kept, members) <= budget and (n_kept < n_atoms or config.rho == 1):
            return n_atoms, n_kept if config.rho == 1 else _most_kept(shape, n_atoms, n_kept, budget, members)
    least = max(multiple, 1 if config.rho == 1 else 2)
    needed = nbytes_of(shape, least, _kept_of(least, config), members)
    ratio = math.ceil(1e4 * needed / (2 * out_features * in_features * members)) / 1e4
    ways = [f"use at least {ratio:g}"] if ratio < 1 else []
    ways += ["smaller groups in the later step that needs multiples of them"] if multiple > 1 else []
    raise RecipeError(
        f"{shape.name}: keep_ratio={config.keep_ratio:g} is {budget:,} bytes, less than {least} atoms take ({needed:,}); "
        f"{', '.join([*ways, 'or skip the layer'])}"
    )


def most_atoms(shape: LayerShape, config: CoSpaDiConfig, members: int = 1) -> int:
    """Orthonormal atoms are no more than inputs; and with as many as outputs, the outputs' own weights would do."""
    outputs = members * shape.out_features
    if config.engine == "orthogonal":
        return min(shape.in_features, outputs)
    return min(outputs, max(shape.in_features, shape.out_features))


def nbytes_of(shape: LayerShape, n_atoms: int, n_kept: int, members: int = 1) -> int:
    """Of all members together in 16 bits, the places counted."""
    one = DictionarySpec.of_sizes(shape.in_features, shape.out_features, n_atoms, n_kept).nbytes("BF16")
    return members * one - (members - 1) * 2 * n_atoms * shape.in_features


def _kept_of(n_atoms: int, config: CoSpaDiConfig) -> int:
    return n_atoms if config.rho == 1 else min(max(round(n_atoms / config.rho), 1), max(n_atoms - 1, 1))


def _most_kept(shape: LayerShape, n_atoms: int, n_kept: int, budget: int, members: int) -> int:
    """What is left of the budget goes to coefficients."""
    left = budget - nbytes_of(shape, n_atoms, n_kept, members)
    return min(n_kept + left // (2 * shape.out_features * members), n_atoms - 1)
