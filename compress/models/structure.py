"""How a rewritten model differs from the one that transformers builds from its config.json: data, checked, no torch.

It stands in the `quantization_config` of our own format:

    "structure": {"rms": true, "biases": true, "width": 3072, "last_width": 4096, "hadamard": {"mlp_out": 14336}, "check": "…"}

`check` belongs to `hadamard`: the size of a transform shows in no tensor's shape, so another one that fits would go unnoticed.
Everything follows from it and from the tables of the family: which modules change and what shapes they have
(`restructure.py` does it). Only what differs is written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.errors import CheckpointError

HADAMARD_SITES = ("attn_out", "mlp_out")  # whose inputs can be transformed while the model runs


@dataclass(frozen=True)
class Structure:
    """What is different.

    Attributes:
        rms: norms of the stream divide by its root mean square, over as many entries as config.json's hidden size has, and
            do nothing else: they hold no weights, their readers do.
        biases: all linears that read the stream have a bias, the head too.
        width: entries of the stream, fewer than config.json's hidden size. Each branch of a block then has a matrix that
            the stream is multiplied with where it passes by (`{block}.attn_shortcut`, `{block}.ffn_shortcut`).
        last_width: of the stream behind the last block.
        hadamard: kinds of sites, and the size of the Hadamard blocks by which their inputs are transformed first.
    """

    rms: bool = False
    biases: bool = False
    width: int | None = None
    last_width: int | None = None
    hadamard: tuple[tuple[str, int], ...] = ()

    @property
    def plain(self) -> bool:
        """Nothing differs."""
        return self == Structure()

    @property
    def reason(self) -> str:
        """Why no standard format holds it."""
        if self.width is not None:
            return "the blocks have shortcut matrices, which no config.json of transformers can say"
        if self.hadamard:
            kinds = " and ".join(kind for kind, _ in self.hadamard)
            return f"the inputs of {kinds} are transformed while the model runs"
        return "its norms take the root mean square where transformers would build LayerNorm"

    def to_dict(self) -> dict[str, Any]:
        """For config.json."""
        written: dict[str, Any] = {"rms": self.rms, "biases": self.biases, "width": self.width}
        written |= {"last_width": self.last_width, "hadamard": dict(self.hadamard)}
        if self.hadamard:
            written["check"] = _check(dict(self.hadamard))
        return {key: value for key, value in written.items() if value}


def _check(hadamard: Mapping[str, int]) -> str:
    """What is written beside the sizes of transforms, and must be what they give."""
    return hashlib.sha256(json.dumps(hadamard, sort_keys=True).encode()).hexdigest()[:8]


def structure_of(config: Mapping[str, Any], hidden_size: int) -> Structure:
    """The structure that config.json describes. Raises: CheckpointError naming what is impossible or unknown."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, Mapping) or quantization.get("quant_method") != "compress":
        return Structure()
    written = quantization.get("structure", {})
    where = "config.json: quantization_config.structure"
    if not isinstance(written, Mapping):
        raise CheckpointError(f"{where}={written!r:.100} is not an object; fetch it again")
    unknown = sorted(set(written) - {"rms", "biases", "width", "last_width", "hadamard", "check"})
    if unknown:
        raise CheckpointError(
            f"{where}: {unknown[0]!r:.100} is not known to this compress-llm; upgrade with: pip install -U compress-llm"
        )
    for key in ("rms", "biases"):
        if type(written.get(key, False)) is not bool:
            raise CheckpointError(f"{where}: {key}={written[key]!r:.100} is neither true nor false; fetch it again")
    for key in ("width", "last_width"):
        value = written.get(key)
        if value is not None and (type(value) is not int or not 1 <= value <= hidden_size):
            raise CheckpointError(f"{where}: {key}={value!r:.100} is not between 1 and {hidden_size}; fetch it again")
    if (written.get("width") is None) != (written.get("last_width") is None):
        raise CheckpointError(f"{where}: width and last_width go together; fetch it again")
    if written.get("width") is not None and not written.get("rms"):
        raise CheckpointError(f"{where}: a stream of another width needs rms; fetch it again")
    hadamard = written.get("hadamard", {})
    if not isinstance(hadamard, Mapping) or not all(
        kind in HADAMARD_SITES and type(size) is int and 2 <= size <= 2**20 for kind, size in hadamard.items()
    ):
        raise CheckpointError(f"{where}: hadamard={hadamard!r:.100} is impossible; fetch it again")
    if "check" in written and written["check"] != _check(hadamard):
        raise CheckpointError(
            f"{where}: hadamard={dict(hadamard)} is not what this model was made with (its check is {written['check']!r:.100}): "
            f"config.json was changed by hand; fetch it again"
        )
    return Structure(
        rms=written.get("rms", False),
        biases=written.get("biases", False),
        width=written.get("width"),
        last_width=written.get("last_width"),
        hadamard=tuple(sorted(hadamard.items())),
    )
