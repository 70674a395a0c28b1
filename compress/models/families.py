"""From a `config.json` to an `Architecture`: the family's table (`tables.py`) with every name written out as on disk.

Needs neither torch nor transformers, so the plan and the checks of a recipe can use it.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from compress.errors import CheckpointError, RecipeError
from compress.models.architecture import Architecture, Experts, Producer, Site
from compress.models.structure import structure_of
from compress.models.tables import FAMILIES, IGNORED_SUFFIXES, REFUSED, Family, Settings

WRAPPED = ".linear"  # where a linear lies in its wrapper

_COUNTS = {  # settings that have to be positive whole numbers
    "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "num_experts", "num_experts_per_tok", "decoder_sparse_step",
}  # fmt: skip


def known_families() -> dict[str, str]:
    """The families that can be compressed: `model_type` of config.json -> the name people use."""
    return {model_type: family.title for model_type, family in FAMILIES.items()}


def architecture_of(config: Mapping[str, Any], names: Collection[str] | None = None) -> Architecture:
    """What the model of this `config.json` consists of.

    Args:
        config: the contents of config.json.
        names: the tensors on disk. They settle whether the base model's prefix is there (the original GPT-2 has `h.0.…`
            for `transformer.h.0.…`), and whether a head of its own is stored. None: the names that transformers writes.

    Raises: RecipeError for a model that is not supported; CheckpointError where config or names do not fit the family.
    """
    model_type = str(config.get("model_type"))
    family = _family(model_type)
    settings = _settings(config, family)
    for flag, reason in family.refusals.items():
        if config.get(flag):
            raise RecipeError(f"config.json: {model_type} with {flag}={config[flag]!r} is not supported: {reason}")
    if family.adapt:
        family = family.adapt(family, settings)

    if names is not None:
        _check_names(family, settings, names)
    base = _base(family, names)
    blocks = tuple(f"{base}{family.layers}.{i}" for i in range(settings["num_hidden_layers"]))
    embeddings = tuple(base + name for name in family.embeddings)
    # transformers ties what config.json tells it to, unless both tensors are stored and differ
    head_stored = any(n.startswith(f"{family.head}.") for n in names or ())
    return Architecture(
        family=model_type,
        model_type=model_type,
        hidden_size=settings["hidden_size"],
        vocab_size=settings["vocab_size"],
        max_positions=settings["max_position_embeddings"],
        blocks=blocks,
        block_sites=tuple(_sites(family, settings, i, block) for i, block in enumerate(blocks)),
        block_norms=tuple(tuple(f"{block}.{norm}" for norm in family.norms) for block in blocks),
        embeddings=embeddings,
        final_norm=base + family.final_norm if family.final_norm else None,
        head=Site("head", "head", (family.head,)),
        embedding=Site("embedding", "embedding", embeddings[:1]),
        tied=bool(settings["tie_word_embeddings"]) and not head_stored,
        transposed=family.transposed,
        experts=_experts(family, settings),
        norm_offset=family.norm_offset,
        structure=structure_of(config, settings["hidden_size"]),
        table=family,
        settings=settings,
    )


def module_name(architecture: Architecture, disk_name: str) -> str:
    """The name in the module tree of what is `disk_name` on disk (a module or a tensor); experts are as `experts.py` unfuses
    them, linears whose input is transformed are inside a wrapper (`restructure.py`)."""
    family = FAMILIES[architecture.family]
    name = disk_name
    for linear in wrapped_linears(architecture):
        name = _spliced(name, linear, linear + WRAPPED)
    name = ".".join(family.renamed.get(part, part) for part in name.split("."))
    if _has_prefix(architecture) or disk_name.split(".")[0] == family.head:
        return name
    return f"{family.base}.{name}"


def disk_name(architecture: Architecture, module_name: str) -> str:
    """The inverse of `module_name`."""
    family = FAMILIES[architecture.family]
    original = {module: disk for disk, module in family.renamed.items()}
    name = ".".join(original.get(part, part) for part in module_name.split("."))
    for linear in wrapped_linears(architecture):
        name = _spliced(name, linear + WRAPPED, linear)
    return name if _has_prefix(architecture) else name.removeprefix(f"{family.base}.")


def changed_config(
    config: Mapping[str, Any], architecture: Architecture, *, blocks: Sequence[int] | None, untied: bool
) -> dict[str, Any]:
    """config.json of a model of which only `blocks` stay (None: all), and whose head has a weight of its own if `untied`.

    Whatever config.json says, or leaves to be understood, of single blocks follows them to their new places.

    Raises: RecipeError if a block computes something else in another place.
    """
    changed = copy.deepcopy(dict(config))
    if untied:
        changed["tie_word_embeddings"] = False
    if blocks is None:
        return changed
    table, n_blocks = architecture.table, architecture.n_blocks
    moved = next((old for new, old in enumerate(blocks) if new != old), None)
    if moved is not None and config.get("scale_attn_by_inverse_layer_idx"):
        raise RecipeError(
            f"config.json: scale_attn_by_inverse_layer_idx: attention is divided by the number of the block, which block {moved} "
            f"would lose; only the last blocks of this model can be left out"
        )
    usual = "num_hidden_layers"
    own = table.keys.get(usual, usual)
    changed |= {key: len(blocks) for key in (usual, own) if key == own or key in config}
    _check_listed(config, n_blocks)
    types = config.get("layer_types") or (table.layer_types(config, n_blocks) if table.layer_types else None)
    if types is not None and ("layer_types" in config or len(set(types)) > 1):
        changed["layer_types"] = [types[block] for block in blocks]
    if config.get("max_window_layers") is not None:
        changed["max_window_layers"] = sum(block < config["max_window_layers"] for block in blocks)
    if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
        dense = [new for new, old in enumerate(blocks) if not _is_sparse(architecture.settings, old)]
        changed |= {"mlp_only_layers": dense, "decoder_sparse_step": 1}
    return changed


def _check_listed(config: Mapping[str, Any], n_blocks: int) -> None:
    """Raises: CheckpointError where a setting that has one entry for each block, or counts blocks, does not."""
    types, first = config.get("layer_types"), config.get("max_window_layers")
    if types is not None and not (isinstance(types, list) and len(types) == n_blocks):
        raise CheckpointError(
            f"config.json: layer_types={types!r:.100} is not a list of one entry for each of {n_blocks} blocks; mend it there"
        )
    if first is not None and type(first) is not int:
        raise CheckpointError(f"config.json: max_window_layers={first!r:.100} is not a whole number; mend it there")


def wrapped_linears(architecture: Architecture) -> list[str]:
    """The linears in each block whose input is transformed, relative to the block."""
    table = architecture.table
    inner = {"attn_out": table.attn_out, "mlp_out": table.mlp_out}
    return [inner[kind] for kind, _ in architecture.structure.hadamard]


def _spliced(name: str, old: str, new: str) -> str:
    """`name` with the dotted part `old` replaced by `new`."""
    return f"{name}.".replace(f".{old}.", f".{new}.")[:-1]


def is_ignored(tensor_name: str) -> bool:
    """Whether a tensor on disk is a left-over of an old release that no model has any more."""
    return tensor_name.endswith(IGNORED_SUFFIXES)


def _family(model_type: str) -> Family:
    if model_type in REFUSED:
        raise RecipeError(f"config.json: model_type {model_type!r} {REFUSED[model_type]}")
    if model_type not in FAMILIES:
        near = difflib.get_close_matches(model_type, FAMILIES, n=1)
        hint = f"the nearest known is {near[0]!r}; " if near else ""
        raise RecipeError(
            f"config.json: model_type {model_type!r} is not a family that can be compressed; {hint}"
            f"known: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[model_type]


def _settings(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    settings = dict(family.defaults)
    for key in settings:
        for alias in (key, family.keys.get(key, key)):
            if alias in config:
                settings[key] = config[alias]
    for key in _COUNTS & settings.keys():
        if type(settings[key]) is not int or settings[key] <= 0:
            raise CheckpointError(
                f"config.json: {key}={settings[key]!r:.100} is not a positive whole number; mend it there"
            )
    positions = settings["max_position_embeddings"]
    if positions is not None and (type(positions) is not int or positions <= 0):
        raise CheckpointError(
            f"config.json: max_position_embeddings={positions!r:.100} is not a positive whole number; mend it there"
        )
    return settings


def _base(family: Family, names: Collection[str] | None) -> str:
    full = f"{family.base}."
    if names is None or any(name.startswith(f"{full}{family.layers}.") for name in names):
        return full
    return "" if any(name.startswith(f"{family.layers}.") for name in names) else full


def _has_prefix(architecture: Architecture) -> bool:
    family = FAMILIES[architecture.family]
    return architecture.embeddings[0] == f"{family.base}.{family.embeddings[0]}"


def _check_names(family: Family, settings: Settings, names: Collection[str]) -> None:
    prefix, n_blocks = _base(family, names) + family.layers + ".", settings["num_hidden_layers"]
    present = {name.removeprefix(prefix).split(".")[0] for name in names if name.startswith(prefix)}
    missing = next((i for i in range(n_blocks) if str(i) not in present), None)
    if missing is not None:
        raise CheckpointError(
            f"{prefix}{missing}: config.json has num_hidden_layers={n_blocks}, but no tensor of this block is stored; "
            f"mend config.json or fetch the missing shards"
        )
    surplus = next((part for part in sorted(present) if part.isdigit() and int(part) >= n_blocks), None)
    if surplus is not None:
        raise CheckpointError(
            f"{prefix}{surplus}: is stored, but config.json has num_hidden_layers={n_blocks}; mend it or fetch both again"
        )
    table = _base(family, names) + family.embeddings[0]
    if not any(name.startswith(f"{table}.") for name in names):
        raise CheckpointError(f"{table}: the token embedding is not stored; load and save the model with transformers")
    if settings.get("num_experts", 0) > len(names):
        raise CheckpointError(
            f"config.json: num_experts={settings['num_experts']}, but only {len(names)} tensors are stored; mend it"
        )


def _sites(family: Family, settings: Settings, index: int, block: str) -> tuple[Site, ...]:
    heads, kv_heads = settings["num_attention_heads"], settings.get("num_key_value_heads")
    repeats_kv = kv_heads is not None and kv_heads != heads

    def site(kind: str, linears: tuple[str, ...], producer: str | None, by: str, expert: int | None = None) -> Site:
        name = f"{block}.{kind}" if expert is None else f"{block}.{kind}.{expert}"
        source = Producer(f"{block}.{producer}", "norm" if by == "norm" else "rows") if producer else None
        return Site(name, kind, tuple(f"{block}.{linear}" for linear in linears), source, expert)

    attention = (
        site("attn_in", family.attn_in, family.attn_norm, "norm"),
        site("attn_out", (family.attn_out,), None if repeats_kv else family.attn_rows, "rows"),
    )
    table = family.experts if family.experts and _is_sparse(settings, index) else None
    if table is None:
        mlp_in = site("mlp_in", family.mlp_in, family.mlp_norm, "norm")
        return (*attention, mlp_in, site("mlp_out", (family.mlp_out,), family.mlp_rows, "rows"))

    sites = list(attention)
    for e in range(settings["num_experts"]):
        gate, up, down = (f"{table.name}.{e}.{role}" for role in (table.gate, table.up, table.down))
        # no producer: the norm before it is read by the router and by all experts, not by this one alone
        sites += [site("expert_in", (gate, up), None, "norm", e), site("expert_out", (down,), up, "rows", e)]
    return tuple(sites)


def _is_sparse(settings: Settings, index: int) -> bool:
    dense = settings.get("mlp_only_layers") or ()
    return index not in dense and (index + 1) % settings.get("decoder_sparse_step", 1) == 0


def _experts(family: Family, settings: Settings) -> Experts | None:
    t = family.experts
    if t is None or not any(_is_sparse(settings, i) for i in range(settings["num_hidden_layers"])):
        return None
    return Experts(t.name, settings["num_experts"], settings["num_experts_per_tok"], t.gate, t.up, t.down, t.router)
