"""What a compressed module stores, as data: known in the plan before any weight is read, written to `config.json`,
validated before anything is allocated, and checked against the tensors on disk.

Readable without torch. One spec class per representation; the module with the same name holds the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from math import prod
from typing import ClassVar

from compress.errors import CheckpointError

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class ModuleSpec(ABC):
    """One replaced module. `in_features`, `out_features` as in nn.Linear; `bias` says whether one is stored."""

    representation: ClassVar[str]
    in_features: int
    out_features: int

    @abstractmethod
    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors, less the bias: suffix -> (safetensors dtype, shape). `float_dtype`: the model's ("BF16")."""

    @abstractmethod
    def validate(self) -> None:
        """Raises CheckpointError where the numbers do not describe a module that can exist."""

    def nbytes(self, float_dtype: str) -> int:
        """Bytes of the stored tensors, without the bias."""
        return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in self.tensors(float_dtype).values())

    def to_dict(self) -> dict[str, object]:
        return {"representation": self.representation, **asdict(self)}


def _quantized() -> type[ModuleSpec]:
    from compress.modules.quantized_spec import QuantizedSpec

    return QuantizedSpec


SPECS = {"quantized": _quantized}


def spec_from_dict(fields: dict[str, object], where: str) -> ModuleSpec:
    """The inverse of `to_dict`, for descriptions that come from strangers' `config.json`.

    Raises: CheckpointError naming `where` if the representation is unknown, a field is missing or of another type, or
    the numbers are impossible.
    """
    fields = dict(fields)
    name = fields.pop("representation", None)
    if not isinstance(name, str) or name not in SPECS:
        raise CheckpointError(
            f"{where}: representation {name!r} is not known to this version of compress-llm; known: "
            f"{', '.join(sorted(SPECS))}. Upgrade with: pip install -U compress-llm"
        )
    cls = SPECS[name]()
    try:
        spec = cls(**fields)  # type: ignore[arg-type]
    except TypeError as error:
        raise CheckpointError(f"{where}: description of a {name} module does not fit: {error}") from None
    try:
        spec.validate()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return spec
