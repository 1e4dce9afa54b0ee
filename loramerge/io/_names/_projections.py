"""Projections of language models that are one layer in some checkpoints and several in others.

Phi-3 and Phi-4, and vLLM inside, fuse q_proj, k_proj and v_proj into qkv_proj, and gate_proj and
up_proj into gate_up_proj: rows one below the other. GLM-4 does so with the latter alone. Heads in
turn are another thing: query_key_value of GPT-NeoX, Falcon and BLOOM is left alone, and qkv_proj of
CodeGen and MiniMax is refused. Projections of experts are one parameter in transformers 5, where
Mixtral's block_sparse_moe.experts.N.w1, w3 and w2 are mlp.experts.gate_up_proj and down_proj.
"""

import re
from collections.abc import Mapping
from typing import Literal, TypeAlias

from msgspec.structs import replace

from loramerge.adapter import Adapter, Kind, Module
from loramerge.errors import IncompatibleError, listed
from loramerge.io._names._forms import apart, stacked

__all__ = ["Heads", "Projections", "in_form", "like", "remarks"]

# How many heads queries have, and how many keys and values have.
Heads: TypeAlias = tuple[int, int]
Projections: TypeAlias = Literal["split", "fused", "experts"]

QKV, GATE_UP = "qkv_proj", "gate_up_proj"
PARTS = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}
WHOLE = {part: whole for whole, parts in PARTS.items() for part in parts}
EXPERT = re.compile(r".+\.experts\.\d+\.(gate|up|gate_up|down)_proj")
# Mixtral's experts by themselves, which as parameters have the names of other models.
MIXTRAL = re.compile(r"mixtral", re.IGNORECASE)
OF_MIXTRAL = re.compile(r"(.+\.)block_sparse_moe(\.experts\.\d+\.)(w[123])")
OF_OTHERS = re.compile(r"(.+\.)mlp(\.experts\.\d+\.)(gate_proj|down_proj|up_proj)")
OTHERWISE = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
OTHERWISE |= {name: own for own, name in OTHERWISE.items()}
# Models whose fused layers hold their parts in turn, and how.
IN_TURN = {
    QKV: (re.compile(r"codegen|minimax", re.IGNORECASE), "queries, keys and values head by head"),
    GATE_UP: (re.compile(r"gpt.?oss", re.IGNORECASE), "gate and up projections row by row"),
}
HOLDERS = (
    "qkv_proj and gate_up_proj are layers of Phi-3 and Phi-4; GLM-4 has the latter alone, Llama, "
    "Mistral, Qwen and Gemma have neither"
)
UNTOUCHED = "query_key_value, Wqkv, c_attn and the like are left as they are"


def in_form(adapter: Adapter, form: Projections, heads: Heads | None = None) -> Adapter:
    """The adapter with every projection by itself, or fused where there is a fused form; exact.

    `heads` are needed where shapes do not say how many rows are whose: for a qkv_proj, and where
    some part of one is not adapted. Experts become modules, or parameters; these alone where the
    form is that of `experts`. Raises IncompatibleError where heads are missing or do not fit.
    """
    if form == "split":
        wholes: dict[str, dict[str, int]] = {
            name: {} for name in adapter.modules if _leaf(name) in PARTS
        }
        found = _experts(_split(adapter, wholes, heads), "linear")
        mixtral = MIXTRAL.search(adapter.base_model or "")
        return _renamed(found, OF_OTHERS, "block_sparse_moe") if mixtral else found
    adapter = _renamed(adapter, OF_MIXTRAL, "mlp")
    fused = {
        _whole(name): None
        for name in adapter.modules
        if _leaf(name) in WHOLE and (form == "fused" or EXPERT.fullmatch(name))
    }
    return _experts(_fused(adapter, fused, heads), "parameter")


def remarks(before: Adapter, after: Adapter, form: Projections) -> list[str]:
    """What to say of an adapter in a form: which models have it, or that nothing was changed."""
    kinds, were = ({name: m.kind for name, m in a.modules.items()} for a in (after, before))
    if kinds == were:
        return [f"--projections {form} changes nothing here: {UNTOUCHED}"]
    fused = any(kind == "linear" and _leaf(name) in PARTS for name, kind in kinds.items())
    return [HOLDERS] if form == "fused" and fused else []


def like(adapter: Adapter, models: Mapping[str, Module]) -> Adapter:
    """The adapter with its projections in the form of these modules, whose shapes tell the rows.

    Experts take the kind of theirs. Raises IncompatibleError where shapes do not tell.
    """
    if any(map(OF_MIXTRAL.fullmatch, models)):
        adapter = _of_mixtral(adapter)
    elif any(map(EXPERT.fullmatch, models)):
        adapter = _renamed(adapter, OF_MIXTRAL, "mlp")
    wholes = {name: _members(models, name) for name in adapter.modules if _leaf(name) in PARTS}
    heights = {
        name: {part: member.out_features for part, member in members.items()}
        for name, members in wholes.items()
        if members
    }
    parts = [_whole(name) for name in adapter.modules if _leaf(name) in WHOLE]
    fused = {name: models[name].out_features for name in parts if name in models}
    found = _fused(_split(adapter, heights, None), fused, None)
    kinds = {models[n].kind for n in found.modules if n in models and EXPERT.fullmatch(n)}
    return _experts(found, kinds.pop()) if kinds else found


def _of_mixtral(adapter: Adapter) -> Adapter:
    """The adapter with experts of Mixtral by themselves, whose shapes tell the rows."""
    wholes = [name for name in adapter.modules if EXPERT.fullmatch(name) and _leaf(name) in PARTS]
    found = _experts(_split(adapter, {name: {} for name in wholes}, None), "linear")
    return _renamed(found, OF_OTHERS, "block_sparse_moe")


def _renamed(adapter: Adapter, experts: re.Pattern[str], block: str) -> Adapter:
    """The adapter with the experts of Mixtral called as in that block."""
    modules = {}
    for name, module in adapter.modules.items():
        match = experts.fullmatch(name)
        own = match[1] + block + match[2] + OTHERWISE[match[3]] if match else name
        modules[own] = replace(module, name=own)
    return replace(adapter, modules=modules)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _whole(part: str) -> str:
    """The name of the fused layer that a part belongs to."""
    parent, dot, leaf = part.rpartition(".")
    return parent + dot + WHOLE[leaf]


def _members(modules: Mapping[str, Module], whole: str) -> dict[str, Module]:
    """The parts of a fused layer among modules, by the last word of their names."""
    parent, dot, leaf = whole.rpartition(".")
    names = {part: parent + dot + part for part in PARTS[leaf]}
    return {part: modules[name] for part, name in names.items() if name in modules}


def _split(
    adapter: Adapter, wholes: Mapping[str, Mapping[str, int]], heads: Heads | None
) -> Adapter:
    """These fused layers taken apart; the rows of some of their parts may be known."""
    modules: dict[str, Module] = {}
    for name, module in adapter.modules.items():
        if name not in wholes:
            modules[name] = module
            continue
        parent, dot, leaf = name.rpartition(".")
        models, how = IN_TURN[leaf]
        if models.search(adapter.base_model or ""):
            raise IncompatibleError(
                f"{adapter.reference}: {name} holds {how} in turn.", "keep it as it is"
            )
        heights = _heights(leaf, module.out_features, wholes[name], heads)
        if heights is None:
            raise _unknown(adapter, name, heads)
        for part, piece in zip(PARTS[leaf], apart(adapter.source, module, heights), strict=True):
            if piece is not None:
                own = parent + dot + part
                modules[own] = replace(piece, name=own)
    return replace(adapter, modules=modules)


def _fused(adapter: Adapter, wholes: Mapping[str, int | None], heads: Heads | None) -> Adapter:
    """The parts of these layers, of so many rows where that is known, put together."""
    modules: dict[str, Module] = {}
    for name, module in adapter.modules.items():
        whole = _whole(name) if _leaf(name) in WHOLE else name
        if whole not in wholes:
            modules[name] = module
        elif whole in adapter.modules:
            raise IncompatibleError(
                f"{adapter.reference} adapts {name} twice: by itself, and in {whole}.",
                "remove one of them from the file",
            )
        elif whole not in modules:
            members = _members(adapter.modules, whole)
            leaf, rows = _leaf(whole), {part: m.out_features for part, m in members.items()}
            heights = _heights(leaf, wholes[whole], rows, heads)
            if heights is None:
                raise _unknown(adapter, whole, heads)
            if any(member.gates for member in members.values()):
                raise IncompatibleError(
                    f"{adapter.reference}: {name} has gates.", "fold them first: loramerge prune"
                )
            found = [members.get(part) for part in PARTS[leaf]]
            modules[whole] = stacked(adapter.source, whole, found, heights)
    return replace(adapter, modules=modules)


def _heights(
    leaf: str, total: int | None, known: Mapping[str, int], heads: Heads | None
) -> tuple[int, ...] | None:
    """How many rows each part of a fused layer has; None where that is unknown, or does not fit.

    Keys have as many as values, a gate as many as what it opens.
    """
    found: tuple[int, ...]
    if leaf == GATE_UP:
        found = ((total or 2 * next(iter(known.values()))) // 2,) * 2
    else:
        q, kv = known.get("q_proj"), known.get("k_proj") or known.get("v_proj")
        if heads is not None:
            rows = total // (heads[0] + 2 * heads[1]) if total else 0
            rows = rows or (q // heads[0] if q else (kv or 0) // heads[1])
            q, kv = heads[0] * rows, heads[1] * rows
        elif total and kv:
            q = total - 2 * kv
        elif total and q:
            kv = (total - q) // 2
        if q is None or kv is None:
            return None
        found = (q, kv, kv)
    fits = min(found) > 0 and sum(found) == (total or sum(found))
    rows_of = dict(zip(PARTS[leaf], found, strict=True))
    return found if fits and all(rows_of[part] == own for part, own in known.items()) else None


def _experts(adapter: Adapter, kind: Kind) -> Adapter:
    """The adapter with the projections of its experts as modules, or as parameters."""
    modules = {
        name: replace(module, kind=kind) if EXPERT.fullmatch(name) else module
        for name, module in adapter.modules.items()
    }
    return replace(adapter, modules=modules)


def _unknown(adapter: Adapter, name: str, heads: Heads | None) -> IncompatibleError:
    parts = listed(list(PARTS[_leaf(name)]))
    said = f"{heads[0]} and {heads[1]} heads do not" if heads else "nothing does"
    return IncompatibleError(
        f"{adapter.reference}: which rows of {name} are {parts} must be told, and {said}.",
        "say how many heads queries and keys have: loramerge convert ... --heads 32,8",
    )
