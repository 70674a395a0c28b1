"""How transformers loads our modules: its quantizer for `quant_method: compress`.

It replaces the described modules before weights are read, after holding the description to the config's model and to
the headers of the files: nothing is left random. It also runs compressed-tensors checkpoints on our modules, where
`compress.load` put their config under ours (key "standard"); those are saved as compressed-tensors again. GPTQ and AWQ
ones (key "foreign") are loaded as they are stored and then brought into our order of codes, module by module.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.checkpoint.budget import parse_budget
from compress.checkpoint.description import (
    GUARD,
    OWN,
    OWN_INDEX,
    STANDARD,
    modules_of,
    own_config,
    quantization_config,
    standard_holds,
)  # fmt: skip
from compress.checkpoint.foreign import Layout, Translated, translated
from compress.checkpoint.headers import TensorInfo, read_header
from compress.checkpoint.saving import guard_saving
from compress.checkpoint.stack import StackTable, no_stack, open_stack
from compress.checkpoint.stacked import fetch_stack, load_stack, loaded_bytes
from compress.checkpoint.translate import Untranslated
from compress.errors import CheckpointError, RecipeError
from compress.models.architecture import Architecture
from compress.models.experts import unfuse_experts, without_expert_converters
from compress.models.families import WRAPPED, architecture_of, disk_name, module_name, wrapped_linears
from compress.models.restructure import StreamNorm, Transformed, restructure
from compress.models.structure import Structure
from compress.modules.base import CompressedModule
from compress.modules.registry import module_class
from compress.modules.spec import ModuleSpec
from compress.runtime.prepare import pack_loaded


class CompressConfig(QuantizationConfigMixin):
    """The `quantization_config` of a model in our modules, kept as it stands in config.json."""

    def __init__(self, **fields: Any):
        self.quant_method = OWN  # type: ignore[assignment]
        self.fields = {**fields, "quant_method": OWN}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(**config_dict)
        return (config, kwargs) if return_unused_kwargs else config

    @property
    def standard(self) -> dict[str, Any] | None:
        """The compressed-tensors config that stands for the model on disk, if it is one."""
        return self.fields.get("standard")

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.standard or self.fields.get("foreign") or self._own)

    @property
    def _own(self) -> dict[str, Any]:
        """Less what is of one loading only."""
        return {key: value for key, value in self.fields.items() if key != "memory_budget"}


class CompressQuantizer(HfQuantizer):
    """Loads our modules and saves them. `guarded`: our own `save_pretrained` is at work."""

    requires_calibration = True
    quantization_config: CompressConfig
    guarded = False
    unfused = False
    architecture: Architecture | None = None  # of the model on disk, if its family is known
    cut = ""  # what names of the whole model begin with, where this one is a part of it
    wrapped: tuple[str, ...] = ()  # linears of a block whose input is transformed first
    complete = True  # the head is there: what is saved can be loaded again
    stack: StackTable | None = None  # of what is loaded behind the index's tensors …
    n_entries = 0  # … so many entries
    saved_names: Mapping[str, str] = {}  # names on disk that are others in a copy
    places: Mapping[str, str] = {}  # name of a compressed module on disk -> in the module tree

    def update_attn_implementation(self, config: Any) -> Any:
        """Point transformers to the weights; it calls this before it looks for them."""
        if getattr(config, "transformers_weights", None) == GUARD:
            config.transformers_weights = OWN_INDEX
        return config

    def _process_model_before_weight_loading(
        self, model: Any, dtype: torch.dtype | None = None, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        stored = _headers(checkpoint_files)
        config = {**model.config.to_dict(), "quantization_config": self.quantization_config.to_dict()}
        infos = translated(config, stored)
        specs = modules_of(config, infos)
        layouts = infos.layouts if isinstance(infos, Translated) else {}
        if config["quantization_config"].get("quant_method") == OWN:
            floats = dtype or torch.get_default_dtype()
            self._open_stack(modules_of(config), stored, floats, checkpoint_files)
        architecture = _architecture(config, infos)
        if architecture is not None:
            of_experts = {n for site in architecture.all_sites() if site.expert is not None for n in site.linears}
            self.unfused = not of_experts.isdisjoint(specs) or bool(of_experts and not architecture.structure.plain)
            if self.unfused:
                unfuse_experts(model, architecture)
        cut = _cut_prefix(model)
        self.architecture, self.cut = architecture, cut
        if architecture is not None:
            restructure(model, architecture, cut)
            self.wrapped = tuple(wrapped_linears(architecture))
        self.complete = not cut
        names = {name: module_name(architecture, name) if architecture is not None else name for name in specs}
        self.places = {name: inner.removeprefix(cut) for name, inner in names.items() if inner.startswith(cut)}
        for name, spec in specs.items():
            inner = names[name]
            if inner.startswith(cut):
                _replace(
                    model, inner.removeprefix(cut), name, spec, dtype or torch.get_default_dtype(), layouts.get(name)
                )
        for name, spec in specs.items():
            lender = spec.lender()
            if lender is not None:
                borrower, lends = (
                    model.get_submodule((module_name(architecture, n) if architecture else n).removeprefix(cut))
                    for n in (name, lender)
                )
                borrower.lend(lends)
        if architecture is not None:
            _check_complete(model, cut, architecture, stored.keys(), self.unfused)
            if not architecture.structure.plain:
                _check_restructured(model, cut, architecture, stored)
        if layouts:
            self._describe_translated(specs, architecture, config)
        if architecture is not None:
            self._describe_as_saved(specs, architecture, config)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            *(f"^{re.escape(marker)}$" for marker in _markers(model)),
        }

    def _open_stack(
        self,
        specs: Mapping[str, ModuleSpec],
        stored: Mapping[str, TensorInfo],
        dtype: torch.dtype,
        files: list[str] | None,
    ) -> None:
        """How much of the stack is to be loaded behind what the index names. `specs`: as config.json describes them.

        Raises: CheckpointError if not even that fits the budget, or there is no stack.
        """
        wanted = self.quantization_config.fields.get("memory_budget")
        budget = None if wanted is None else parse_budget(wanted)
        assert files
        folder = Path(files[0]).parent
        fetch_stack(folder, specs, stored, budget)
        self.stack = open_stack(folder, specs, loaded_bytes(stored, specs, dtype))
        if self.stack is not None:
            self.n_entries = self.stack.prefix_for(budget)
            if self.n_entries < self.stack.fits(budget):
                warnings.warn(self.stack.loss or "", stacklevel=2)
        elif budget is not None:
            raise no_stack(folder)

    def adjust_max_memory(self, max_memory: dict[str, int | str]) -> dict[str, int | str]:
        """Room is left on each device for the part of the stack that comes later."""
        if self.stack is None:
            return max_memory
        share = self.stack.minimum / self.stack.nbytes(self.n_entries)
        return {key: int(value * share) if isinstance(value, int) else value for key, value in max_memory.items()}

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, Untranslated):
                model.set_submodule(name, module.translated())
            if isinstance(module, CompressedModule):
                _check_shape(name, module)
                module.check_stored(name)
        if self.stack is not None:
            load_stack(model, self.stack, self.n_entries, self.places)
        pack_loaded(model, self.architecture, self.cut)
        if hasattr(model.config, "transformers_weights"):
            del model.config.transformers_weights
        if self.quantization_config.standard is None:
            guard_saving(model)
        return model

    def _describe_translated(
        self, specs: Mapping[str, ModuleSpec], architecture: Architecture | None, config: dict[str, Any]
    ) -> None:
        """A GPTQ or AWQ model is saved as what it has become."""
        if architecture is not None and standard_holds(specs, architecture) is None:
            self.quantization_config.fields = {
                "quant_method": OWN,
                "standard": quantization_config(STANDARD, specs, architecture),
            }
        else:
            self.quantization_config.fields = own_config(specs, Structure())

    def _describe_as_saved(self, specs: Mapping[str, ModuleSpec], architecture: Architecture, config: Any) -> None:
        """transformers saves under its own names, also where those on disk lacked the base model's prefix."""
        saved = architecture_of(config)
        if saved.embeddings != architecture.embeddings and self.quantization_config.standard is None:

            def anew(name: str) -> str:
                return disk_name(saved, module_name(architecture, name))

            renamed = {
                anew(name): spec if (lender := spec.lender()) is None else spec.lent_by(anew(lender))
                for name, spec in specs.items()
            }
            self.saved_names = {name: anew(name) for name in specs}
            self.quantization_config.fields = own_config(renamed, architecture.structure)

    def describe_as_it_is(self, model: Any) -> None:
        """Of a stack, as much as is loaded is saved."""
        if self.stack is None:
            return
        places = {name: model.get_submodule(place) for name, place in self.places.items()}
        specs = {name: module.spec for name, module in places.items() if isinstance(module, CompressedModule)}
        structure = {key: value for key, value in self.quantization_config.fields.items() if key == "structure"}
        renamed = {self.saved_names.get(name, name): spec for name, spec in specs.items()}
        self.quantization_config.fields = {**own_config(renamed, Structure()), **structure}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Experts that we unfused are named as on disk: there is nothing to merge. Linears in a wrapper are one deeper."""
        from transformers.core_model_loading import WeightRenaming

        kept = without_expert_converters(weight_conversions) if self.unfused else weight_conversions
        return [*kept, *(WeightRenaming(f".{name}.", f".{name}{WRAPPED}.") for name in self.wrapped)]

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What is saved. Should someone get round our `save_pretrained`, the copy must still not load without us."""
        if self.guarded or self.quantization_config.standard is not None:
            return None, {}
        markers = _markers(model)
        if not markers and any(isinstance(module, Transformed) for module in model.modules()):
            raise CheckpointError(
                "a copy of this model would load without compress-llm and compute something else; save it with its own "
                "save_pretrained: model.save_pretrained(folder)"
            )
        state = model.state_dict()
        return {**state, **{marker: torch.empty(0) for marker in markers}}, {}

    def is_serializable(self) -> bool:
        return self.complete

    @property
    def is_trainable(self) -> bool:
        return False


def _markers(model: nn.Module) -> tuple[str, ...]:
    """Names of tensors, each of shape [0], that only an unguarded copy has.

    The first is a tensor of the original model: its shape makes stock transformers stop. The second says why in the
    report that comes with the error.
    """
    for name, module in model.named_modules():
        if isinstance(module, (CompressedModule, StreamNorm)):
            return f"{name}.weight", f"{name}.needs_pip_install_compress-llm"
    return ()


def _headers(files: list[str] | None) -> dict[str, TensorInfo]:
    if not files:
        raise CheckpointError("a compressed model can be built from its files only, not from a config or a state_dict")
    infos: dict[str, TensorInfo] = {}
    for file in files:
        infos.update(read_header(Path(file)))
    return infos


def _architecture(config: Mapping[str, Any], infos: Mapping[str, TensorInfo]) -> Architecture | None:
    """None for a family without a table, which others may have compressed."""
    try:
        return architecture_of(config, infos.keys())
    except RecipeError:
        return None


def _cut_prefix(model: Any) -> str:
    """What names of the whole model begin with, where `model` is the base model alone."""
    prefix = model.base_model_prefix
    return f"{prefix}." if prefix and not hasattr(model, prefix) else ""


def _replace(
    model: Any, inner: str, name: str, spec: ModuleSpec, dtype: torch.dtype, layout: Layout | None = None
) -> None:
    """Put an empty module for `spec` in the place of the module called `inner`, which must be one that it fits.

    With a `layout` its tensors are loaded as they lie in it.
    """
    try:
        original = model.get_submodule(inner)
    except AttributeError:
        raise CheckpointError(
            f"{name}: config.json describes this module, and {type(model).__name__} has none"
        ) from None
    weight = getattr(original, "weight", None)
    shape = tuple(weight.shape) if isinstance(weight, Tensor) else None
    if type(original).__name__ == "Conv1D" and shape is not None:
        shape = shape[::-1]
    if shape != (spec.out_features, spec.in_features):
        raise CheckpointError(
            f"{name}: config.json describes a weight of shape {[spec.out_features, spec.in_features]}, and the model "
            f"has {type(original).__name__} {list(shape or ())}; the two are not of one model"
        )
    if any(f"{inner}.weight" in pair for pair in model.all_tied_weights_keys.items()):
        raise CheckpointError(f"{name}: is compressed, but config.json ties it (tie_word_embeddings); it must be false")
    is_table = isinstance(original, nn.Embedding)
    if is_table != (getattr(spec, "kind", "linear") == "embedding"):
        raise CheckpointError(f"{name}: config.json describes it as {spec.kind}, it is {type(original).__name__}")  # type: ignore[attr-defined]
    bias = getattr(original, "bias", None) is not None
    if layout is not None:
        model.set_submodule(inner, Untranslated(name, layout, bias, dtype).train(original.training))
        return
    module = module_class(spec.representation).from_spec(spec, bias, dtype, "meta")
    module.adopt(original)
    model.set_submodule(inner, module.train(original.training))


def _check_complete(model: Any, cut: str, architecture: Architecture, stored: Iterable[str], unfused: bool) -> None:
    """Every tensor of the decoder is in the files: transformers would fill in what is missing at random."""
    stored = set(stored)
    tied = set(model.all_tied_weights_keys)
    base, head = f"{model.base_model_prefix}.", module_name(architecture, architecture.head.linears[0]) + "."
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    for key in model.state_dict():
        inner = cut + key
        if key in tied or not inner.startswith((base, head)) or any(p.search(key) for p in ignored):
            continue
        if architecture.experts is not None and not unfused and ".experts." in inner:
            continue  # held as one tensor for all experts, merged while loading
        name = disk_name(architecture, inner)
        if name not in stored:
            raise CheckpointError(f"{name}: no file of the checkpoint holds this tensor; fetch the missing shards")


def _check_restructured(model: Any, cut: str, architecture: Architecture, stored: Mapping[str, TensorInfo]) -> None:
    """Shapes that follow from the described structure are those of the files."""
    for key, tensor in model.state_dict().items():
        info = stored.get(disk_name(architecture, cut + key))
        if info is not None and info.shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{info.name}: {list(info.shape)} is stored, and by config.json's quantization_config.structure it is "
                f"{list(tensor.shape)}; the two are not of one model: fetch both again"
            )


def _check_shape(name: str, module: CompressedModule) -> None:
    """The stored `weight_shape`, which nothing reads but others, says what the description says."""
    shape = getattr(module, "weight_shape", None)
    if isinstance(shape, Tensor) and not shape.is_meta:
        expected = [module.spec.out_features, module.spec.in_features]
        if shape.tolist() != expected:
            raise CheckpointError(f"{name}.weight_shape: {shape.tolist()} is stored, {expected} is described")
