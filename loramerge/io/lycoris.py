"""LyCORIS: one file of LoCon with Tucker cores, LoHa, LoKr, whole differences and plain pairs."""

import re

from msgspec.structs import replace

from loramerge.adapter import Adapter, Extra, Module
from loramerge.errors import AdapterError, listed
from loramerge.io._grammar import INCOMPLETE, Grammar, alpha_of, dora, pair
from loramerge.io._layout import Given, Layout
from loramerge.io._pipeline import own_scale
from loramerge.io._products import full, hadamard, kronecker, tucker
from loramerge.io._source import Source

NAME = r"(?P<module>(?:lora|lycoris)_[^.]+)"
# What gives each algorithm away, and its other tensors.
PARTS = {
    "hada": ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"),
    "lokr": ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"),
}
GRAMMAR = Grammar(
    (
        ("A", re.compile(NAME + r"\.lora_down\.weight")),
        ("B", re.compile(NAME + r"\.lora_up\.weight")),
        ("mid", re.compile(NAME + r"\.lora_mid\.weight")),
        ("alpha", re.compile(NAME + r"\.alpha")),
        ("diff", re.compile(NAME + r"\.diff")),
        ("dora_scale", re.compile(NAME + r"\.dora_scale")),
        *(
            (f"{algorithm} {part}", re.compile(NAME + rf"\.{algorithm}_{part}"))
            for algorithm, parts in PARTS.items()
            for part in parts
        ),
    )
)
# Changes of what is no weight matrix.
BESIDE = re.compile(NAME + r"\.(?P<role>diff_b|w_norm|b_norm)")
ROLES = {"diff_b": "bias difference", "w_norm": "norm weight", "b_norm": "norm bias"}
# What a convolution is called in the models LyCORIS is trained on.
CONVOLUTION = re.compile(r"_conv(\d|_in|_out|_shortcut)?$|_(up|down)samplers_\d_conv$")


def explains(key: str) -> bool:
    """Any tensor of these algorithms, plain pairs included."""
    return GRAMMAR.parse(key) is not None or BESIDE.fullmatch(key) is not None


def marks(key: str) -> bool:
    """A tensor that a plain LoRA of kohya's does not have."""
    parsed = GRAMMAR.parse(key)
    plain = parsed is not None and parsed[1] in ("A", "B", "alpha", "dora_scale")
    return not plain and explains(key)


def read(given: Given) -> Adapter:
    """Describe a file: every module as the low-rank update it is, exactly; a .diff has full rank.

    The scale is alpha / rank, but 1 where alpha is missing or 0, for a LoKr of two full factors,
    and for a .diff. Differences of biases and norms are kept beside, and named.
    """
    source, where = given.source, given.reference
    own_scale(given)
    groups = GRAMMAR.group(source.tensors)
    modules, silent = {}, []
    for name, roles in groups.items():
        modules[name], stated = _module(source, name, roles)
        silent += [] if stated else [name]
    if not modules:
        raise AdapterError(f"{where} holds no update of a weight.", "see: loramerge layouts")
    notes = []
    if silent:
        notes.append(
            f"scale 1 where alpha is missing or 0: {len(silent)} of {len(modules)} modules"
        )
    if flat := [m.name for m in modules.values() if not m.kernel and CONVOLUTION.search(m.name)]:
        notes.append(f"the kernel of {listed(flat, 3)} is not in the file: stored flat")
    return Adapter(
        reference=where,
        layout="lycoris",
        modules=modules,
        source=source,
        naming="kohya",
        extras=tuple(
            Extra(key, ROLES[match["role"]], info)
            for key, info in source.tensors.items()
            if (match := BESIDE.fullmatch(key))
        ),
        variants=dora(groups, "dora_scale"),
        metadata=source.metadata,
        base_model=source.metadata.get("ss_base_model_version"),
        assumed=tuple(notes),
    )


def _module(source: Source, name: str, roles: dict[str, str]) -> tuple[Module, bool]:
    """A module with its scaling, and whether the file states that."""
    used = {role: key for role, key in roles.items() if role not in ("alpha", "dora_scale")}
    algorithm = next((a for a in PARTS if any(role.startswith(a) for role in used)), "")
    own = {role.removeprefix(f"{algorithm} "): key for role, key in used.items()}
    known = set(PARTS.get(algorithm, ("A", "B", "mid", "diff")))
    several = {"A", "diff"} <= set(own)
    if not own or several or not set(own) <= known:
        raise AdapterError(
            f"{name}: {listed(sorted(roles.values()), 4)} are no update of one kind.", INCOMPLETE
        )
    if algorithm:
        make = hadamard if algorithm == "hada" else kronecker
        module, divisor = make(name, own, source.tensors)
    elif "diff" in own:
        module, divisor = full(name, own, source.tensors)
    else:
        if not {"A", "B"} <= set(own):
            raise AdapterError(
                f"{name}: {listed(sorted(own.values()))} is half a pair.", INCOMPLETE
            )
        if "mid" in own:
            module, divisor = tucker(name, own, source.tensors)
        else:
            module = pair(name, own, source.tensors[own["A"]], source.tensors[own["B"]], "linear")
            divisor = module.rank
    if "dora_scale" in roles:
        module = replace(module, keys={**module.keys, "dora_scale": roles["dora_scale"]})
    alpha = alpha_of(source, roles)
    if not divisor or not alpha:
        return module, not divisor
    return replace(module, scaling=alpha / divisor), True


LAYOUT = Layout(
    name="lycoris",
    summary="LyCORIS: LoCon with cores, LoHa, LoKr, whole differences. Written as kohya.",
    directory=False,
    explains=explains,
    read=read,
    marks=marks,
    writes="kohya",
)
