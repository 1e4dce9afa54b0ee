"""Adapters whose start changed their base model (PiSSA, OLoRA, CorDA, LoRA-GA), as plain LoRA.

Such an adapter stands against W - s A0 B0, A0 and B0 being what training started from: relative to
W the update is s (B A - B0 A0), exactly, at twice the rank.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Adapter, Array, LowRank, Module, TensorSource, source_name
from loramerge.derive import OTHER_BASE, check_base, stored_turned, weight_of
from loramerge.errors import IncompatibleError, listed
from loramerge.io._checkpoint import Checkpoint
from loramerge.linalg.factors import compare
from loramerge.linalg.kernels import kernels

__all__ = ["rebased", "recomputed"]

# How a variant is called whose start changed its base.
REBASED = " initialisation"
# Starts that are parts of W, and the least cosine of what training makes of them: it leaves them by
# less than 10 times their own length.
PARTS = ("pissa", "olora", "corda")
LEAST = 0.1
# Singular values closer than this, relative to the largest, may have changed places in float32.
GAP = 1e-5
BEFORE = "name the directory in which this adapter was saved before it was trained"


def rebased(adapter: Adapter, initial: Adapter) -> Adapter:
    """The adapter against its true base, by the factors it started from.

    Raises IncompatibleError where these are of other modules, shapes or ranks, or of another kind
    of start.
    """
    missing = [
        name
        for name, module in adapter.modules.items()
        if (first := initial.modules.get(name)) is None
        or (first.shape, first.rank) != (module.shape, module.rank)
    ]
    if missing:
        raise IncompatibleError(
            f"{initial.reference} does not hold the start of {listed(missing, 3)}.", BEFORE
        )
    own, other = _kind(adapter), _kind(initial)
    if own and other and own != other:
        raise IncompatibleError(
            f"{adapter.reference} began as {own}, {initial.reference} as {other}.", BEFORE
        )

    def start(name: str) -> LowRank:
        first = initial.modules[name]
        update = first.form(initial.source, first)
        share = first.scaling / adapter.modules[name].scaling
        return update if share == 1 else LowRank(update.A, update.B * update.B.dtype.type(share))

    found = _against(adapter, start, initial.modules, initial.reference, BEFORE)
    return replace(found, assumed=(*found.assumed, *_notes(adapter, initial)))


def _kind(adapter: Adapter) -> str | None:
    """What its config says it began as, None where that left its base as it was."""
    changed = any(variant.name.endswith(REBASED) for variant in adapter.variants)
    return str(adapter.config["init_lora_weights"]).lower() if changed else None


def _notes(adapter: Adapter, initial: Adapter) -> Iterator[str]:
    """What was done, and what looks as if the start were another's."""
    name, modules = source_name(initial), adapter.modules
    yield f"what it started from, {name}, is taken off, which doubles its ranks"
    if _kind(adapter) is None:
        said = str(adapter.config.get("init_lora_weights")).lower()
        yield f"its init_lora_weights is {said}: it may stand against its base as it is"
    if other := [n for n, m in modules.items() if m.scaling != initial.modules[n].scaling]:
        yield f"the scale of {name} is another one for {listed(other, 3)}"
    if left := [n for n in initial.modules if n not in modules]:
        yield f"{name} also holds the start of {listed(left, 3)}, which is left out"


def recomputed(adapter: Adapter, base: Checkpoint) -> Adapter:
    """The adapter against its true base, where that alone says what it started from.

    PiSSA (arXiv:2404.02948) starts from the r largest terms of the SVD of W, OLoRA
    (arXiv:2406.01775) from the first r columns and rows of its QR decomposition; both as PEFT
    computes them, up to float32's rounding. Raises IncompatibleError for starts that depend on
    random numbers or data, for a spectrum without a gap behind its r largest values, and where the
    base is another.
    """
    kind = _kind(adapter)
    if kind is None:
        raise IncompatibleError(
            f"{adapter.reference} does not say that its start changed its base, so that --base "
            "tells nothing of it.",
            "leave --base out",
        )
    found = STARTS.get(kind)
    turned = bool(adapter.config.get("fan_in_fan_out"))
    others = [name for name, m in adapter.modules.items() if m.kind != "linear"]
    if found is None or others or (kind == "olora" and turned):
        what = f"modules such as {listed(others, 2)}" if others else f"initialisation {kind}"
        raise IncompatibleError(
            f"{adapter.reference}: what it started from cannot be computed again for {what}.",
            "name the adapter as it was saved before training: --initial",
        )
    check_base(adapter, base)

    def start(name: str) -> LowRank:
        module = adapter.modules[name]
        assert not stored_turned(module, False)
        return found(weight_of(base, module, turned), module)

    # A start is nearly as large as W, and what was learned a small difference from it.
    wide = {name: replace(module, dtype="F32") for name, module in adapter.modules.items()}
    note = f"what it started from, by {base.path.name}, is taken off, which doubles its ranks"
    against = _against(adapter, start, wide, base.path.name, OTHER_BASE)
    return replace(against, assumed=(*against.assumed, note))


def _principal(W: Array, module: Module) -> LowRank:
    """The largest terms of the SVD, divided by the scaling."""
    U, S, Vh = kernels(W).svd(W)
    r = module.rank
    if r < len(S) and S[r - 1] - S[r] <= GAP * S[0]:
        raise IncompatibleError(
            f"{module.name}: the singular values {r} and {r + 1} of its base weight are equal, so "
            "that what PiSSA started from is not determined.",
            "name the adapter as it was saved before training: --initial",
        )
    root = np.sqrt(S[:r] / module.scaling)
    return LowRank(A=root[:, None] * Vh[:r], B=U[:, :r] * root)


def _orthonormal(W: Array, module: Module) -> LowRank:
    """The first columns of Q and rows of R."""
    Q, R = np.linalg.qr(W)
    return LowRank(A=R[: module.rank], B=Q[:, : module.rank])


STARTS = {"pissa": _principal, "olora": _orthonormal}


def _against(
    adapter: Adapter,
    start: Callable[[str], LowRank],
    initial: Mapping[str, Module],
    whose: str,
    hint: str,
) -> Adapter:
    """The adapter less its start, whose B is for the adapter's own scaling.

    Stored in the dtype of both where it is one and nothing is scaled, else in float32. Raises
    IncompatibleError where it has nothing of a start that is one of `PARTS`.
    """
    near = (_kind(adapter) or "").startswith(PARTS)

    def both(own: Module, source: TensorSource, module: Module) -> LowRank:
        one, two = own.form(source, own), start(own.name)
        found = compare(one, two)
        if near and found.target and found.inner <= LEAST * (found.target * found.result) ** 0.5:
            raise IncompatibleError(
                f"{own.name} has nothing of what it would have started from by {whose}.", hint
            )
        return LowRank(np.concatenate([one.A, two.A]), np.concatenate([one.B, -two.B], axis=1))

    modules = {}
    for name, module in adapter.modules.items():
        first = initial[name]
        same = (first.dtype, first.scaling) == (module.dtype, module.scaling)
        modules[name] = replace(
            module,
            rank=module.rank + first.rank,
            dtype=module.dtype if same else "F32",
            form=partial(both, module),
        )
    kept = tuple(v for v in adapter.variants if not v.name.endswith(REBASED))
    config = {**adapter.config, "init_lora_weights": True}
    return replace(adapter, modules=modules, variants=kept, config=config)
