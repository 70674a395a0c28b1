"""What a compressed module stores, as data: known in the plan before any weight is read, written to `config.json`,
validated before anything is allocated, and checked against the tensors on disk.

Readable without torch. One spec class per representation; it names the module that holds the tensors. Other packages add
representations by an entry point of the group `compress.representations`: name = "package.file:SpecClass".
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from math import prod
from typing import ClassVar

from compress.errors import CheckpointError

DTYPE_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
MAX_FEATURES = 2**31 - 1  # more than any model has, and products of two still fit 64 bits


@dataclass(frozen=True)
class ModuleSpec(ABC):
    """One replaced module. `in_features`, `out_features` as in nn.Linear. `module` is where its nn.Module lives.

    `plain`: it is stored as the layer's own weight, and loaders find an ordinary layer there; nothing describes it.
    `scales_rows`: its module can multiply its rows (`CompressedModule.scale_rows`).
    """

    plain: ClassVar[bool] = False
    scales_rows: ClassVar[bool] = False
    representation: ClassVar[str]
    module: ClassVar[str]  # "package.file:Class", a CompressedModule; imported when one is built
    in_features: int
    out_features: int

    @abstractmethod
    def tensors(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Stored tensors, less the bias: suffix -> (safetensors dtype, shape). `float_dtype`: the model's ("BF16")."""

    @abstractmethod
    def validate(self) -> None:
        """Raises CheckpointError where the numbers do not describe a module that can exist."""

    def leaf_shapes(self) -> dict[str, tuple[int, int]]:
        """The matrices inside that a later step may compress, in data order: name -> (out_features, in_features).

        By default one without a name: the weight as a whole. Names are prefixes of the leaf's tensors once it is compressed:
        leaf "right" is stored as right.weight_packed, ….
        """
        return {"": (self.out_features, self.in_features)}

    def masked_leaves(self) -> frozenset[str]:
        """The leaves some entries of which are 0 and stay so: those of pruned weights."""
        return frozenset()

    def with_leaf(self, name: str, spec: ModuleSpec) -> ModuleSpec:
        """This module with leaf `name` stored as `spec`."""
        assert name == "", name
        return spec

    @property
    def n_levels(self) -> int:
        """How many levels the module is stored in: any number of the first ones makes a module that runs. Usually one."""
        return 1

    def first(self, n_levels: int) -> ModuleSpec:
        """The module of the first `n_levels` levels only."""
        assert n_levels == self.n_levels, n_levels
        return self

    def level(self, number: int, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that level `number` adds to those before it (from 0), in the order in which they are stored."""
        before = self.first(number).tensors(float_dtype) if number else {}
        return {key: value for key, value in self.first(number + 1).tensors(float_dtype).items() if key not in before}

    def level_bytes(self, number: int, float_dtype: str) -> int:
        """Bytes of the tensors of one level."""
        return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in self.level(number, float_dtype).values())

    def lender(self) -> str | None:
        """Name on disk of another module, of the same representation, some tensors of which this one uses too. It stores them."""
        return None

    def borrowed(self, float_dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The tensors that the lender stores and this module uses too, as in `tensors`; suffixes are the same in both."""
        return {}

    def borrowing(self, lender: ModuleSpec) -> ModuleSpec:
        """This module with what it borrows as `lender` stores it. Raises: CheckpointError if that has nothing that fits."""
        return self

    def lent_by(self, name: str | None) -> ModuleSpec:
        """This module with its lender under another name on disk."""
        return self

    def nbytes(self, float_dtype: str) -> int:
        """Bytes of the stored tensors, without the bias."""
        return sum(DTYPE_BYTES[dtype] * prod(shape) for dtype, shape in self.tensors(float_dtype).values())

    def to_dict(self) -> dict[str, object]:
        """As it stands in `config.json`."""
        return {"representation": self.representation, **asdict(self)}

    @classmethod
    def from_fields(cls, fields: dict[str, object], where: str) -> ModuleSpec:
        """The inverse of `to_dict`, less `representation`. What it makes is not validated yet.

        Raises: TypeError for a field that is missing or unknown, CheckpointError naming `where` for what cannot be read.
        """
        return cls(**fields)  # type: ignore[arg-type]


SPECS = {  # representation -> where its spec lives
    "dense": "compress.modules.dense_spec:DenseSpec",
    "quantized": "compress.modules.quantized_spec:QuantizedSpec",
    "lut": "compress.modules.lut_spec:LUTSpec",
    "low_rank": "compress.modules.low_rank_spec:LowRankSpec",
    "corrected": "compress.modules.corrected_spec:CorrectedSpec",
    "cur": "compress.modules.cur_spec:CURSpec",
    "sparse": "compress.modules.sparse_spec:SparseSpec",
    "armor": "compress.modules.armor_spec:ArmorSpec",
    "dictionary": "compress.modules.dictionary_spec:DictionarySpec",
    "remapped_low_rank": "compress.modules.remapped_spec:RemappedSpec",
    "bitstack": "compress.modules.bitstack_spec:BitStackSpec",
}
ENTRY_POINTS = "compress.representations"


def representations() -> list[str]:
    """The names of all representations, those of installed packages included."""
    return sorted({*SPECS, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def spec_class(representation: str) -> type[ModuleSpec] | None:
    """The spec class of a representation, ours or an installed package's; None if nobody knows it."""
    if representation in SPECS:
        module, _, name = SPECS[representation].partition(":")
        return getattr(importlib.import_module(module), name)
    for point in entry_points(group=ENTRY_POINTS, name=representation):
        return point.load()
    return None


def spec_from_dict(fields: dict[str, object], where: str) -> ModuleSpec:
    """The inverse of `to_dict`, for descriptions that come from strangers' `config.json`.

    Raises: CheckpointError naming `where` if the representation is unknown, a field is missing or of another type, or
    the numbers are impossible.
    """
    fields = dict(fields)
    name = fields.pop("representation", None)
    cls = spec_class(name) if isinstance(name, str) else None
    if cls is None:
        raise CheckpointError(
            f"{where}: representation {name!r} is not known here; known: {', '.join(representations())}. Upgrade with "
            f"pip install -U compress-llm, or install the package that made it"
        )
    try:
        spec = cls.from_fields(fields, where)
    except TypeError as error:
        raise CheckpointError(f"{where}: description of a {name} module does not fit: {error}") from None
    try:
        spec.validate()
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    return spec


def check_whole(name: str, value: object, low: int, high: int) -> None:
    """Raises: CheckpointError if `value` is not a whole number from `low` to `high`."""
    if type(value) is not int or not low <= value <= high:
        raise CheckpointError(f"{name}={value!r} is not a whole number from {low} to {high}")
