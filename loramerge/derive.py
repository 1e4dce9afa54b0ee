"""Adapters that follow from a base model or from another adapter, read like any other.

Nothing is computed here: a derived adapter knows how to compute each module when it is read, so
that compressing and merging it stream as always, and measure their error against it.
"""

import math
from functools import partial

from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Adapter, Array, Form, LowRank, Module, TensorSource, source_name
from loramerge.errors import IncompatibleError, listed
from loramerge.io._checkpoint import Checkpoint
from loramerge.io._grammar import INCOMPLETE

__all__ = [
    "OTHER_BASE",
    "check_base",
    "difference",
    "stored_turned",
    "undecomposed",
    "updated",
    "weight_of",
]

OTHER_BASE = "name the base model that this adapter was trained on"
MAGNITUDES = ("magnitude", "dora_scale")
EMBEDDINGS = ("embed_tokens", "embeddings", "word_embeddings", "wte", "wpe", "position_embeddings")


def weight_of(base: Checkpoint, module: Module, turned: bool) -> Array:
    """The base weight of a module as its update is: [out, in], float32.

    `turned` says that linear layers store [in, out] (GPT-2's Conv1D); embeddings do always.
    """
    stored = base.array(_key(base, module))
    W: Array = (stored.T if stored_turned(module, turned) else stored).reshape(module.shape)
    return W


def stored_turned(module: Module, turned: bool) -> bool:
    """Whether the base stores the weight of a module as [in, out]."""
    return module.kind == "embedding" or (turned and module.kind == "linear")


def _key(base: Checkpoint, module: Module) -> str:
    """The key of a module's weight. Raises IncompatibleError for none, or another shape."""
    key = base.weight(module.name)
    if key is None:
        raise IncompatibleError(
            f"{base.path.name} has no weight for {module.name}.",
            OTHER_BASE + ("" if base.parts else "; of a pipeline, its whole directory"),
        )
    shape = base.holders[key].tensors[key].shape
    folded = (shape[0], math.prod(shape[1:]))
    if module.shape not in (folded, folded[::-1] if len(shape) == 2 else folded):
        raise IncompatibleError(
            f"{module.name} is {module.out_features}x{module.in_features} in the adapter, {key} "
            f"{'x'.join(map(str, shape))} in {base.path.name}.",
            OTHER_BASE,
        )
    return key


def updated(adapter: Adapter, base: Checkpoint, name: str) -> Array:
    """The weight of a module with its update added, [out, in]; DoRA's magnitudes applied.

    DoRA (arXiv:2402.09353, equation 5): W' = m (W + dW) / ||W + dW||, the norm over each row, or
    over each column where m is stored for columns: [1, in], as LyCORIS and OneTrainer do, also
    where the weight is square. Computed in float32. Raises IncompatibleError for m of another size.
    """
    module, update = adapter.modules[name], adapter.read(name)
    turned = bool(adapter.config.get("fan_in_fan_out"))
    W: Array = weight_of(base, module, turned) + update.B @ update.A
    key = next((module.keys[role] for role in MAGNITUDES if role in module.keys), None)
    if key is None:
        return W
    m = adapter.source.array(key)
    in_columns = "dora_scale" in module.keys and m.shape[0] == 1 < module.out_features
    if m.size == module.out_features and not in_columns:
        W *= _share(m, np.linalg.norm(W, axis=1))[:, None]
        return W
    inputs = module.in_features // math.prod(module.kernel)
    if m.size != inputs:
        raise IncompatibleError(
            f"{key} is {list(m.shape)}: magnitudes of neither the {module.out_features} rows of "
            f"{name} nor its {inputs} columns.",
            INCOMPLETE,
        )
    channels = W.reshape(len(W), inputs, -1)
    channels *= _share(m, np.sqrt((channels**2).sum(axis=(0, 2))))[:, None]
    return channels.reshape(W.shape)


def _share(magnitudes: Array, norms: Array) -> Array:
    """Magnitude over norm, 0 where the norm is."""
    live = norms > 0
    found: Array = magnitudes.reshape(-1) * live / np.where(live, norms, 1)
    return found


def undecomposed(adapter: Adapter, base: Checkpoint) -> Adapter:
    """A DoRA as the plain difference it makes: of every rank, W' - W.

    Raises IncompatibleError where it is more than DoRA, and for magnitudes of embeddings.
    """
    others = [v for v in adapter.variants if not v.name.startswith("DoRA")]
    if others:
        first = others[0]
        raise IncompatibleError(f"{adapter.reference} is {first.name}: {first.reason}.", first.hint)
    decomposed = {n for n, m in adapter.modules.items() if set(MAGNITUDES) & set(m.keys)}
    embeddings = [n for n in decomposed if adapter.modules[n].kind == "embedding"]
    if embeddings:
        raise IncompatibleError(
            f"{adapter.reference}: {listed(embeddings)} are DoRA of embeddings, computed "
            "token by token.",
            "merge it in PEFT: model.merge_and_unload()",
        )
    turned = bool(adapter.config.get("fan_in_fan_out"))

    def dense(plain: Module, source: TensorSource, module: Module) -> LowRank:
        return beside_identity(updated(adapter, base, plain.name) - weight_of(base, plain, turned))

    modules = {
        name: _whole(module, partial(dense, module)) if name in decomposed else module
        for name, module in adapter.modules.items()
    }
    check_base(adapter, base)
    how = ("bake", source_name(adapter), "--base", base.path.name) if decomposed else ()
    return replace(adapter, modules=modules, variants=(), derived=how)


def check_base(adapter: Adapter, base: Checkpoint) -> None:
    """Raise IncompatibleError where a module has no weight in the base, or one of another shape.

    From headers alone, so that nothing fails after an hour.
    """
    if adapter.naming == "torchtune":
        raise IncompatibleError(
            f"{adapter.reference} has the names and the order of rows of torchtune.",
            adapter.variants[0].hint
            if adapter.variants
            else "convert it first: loramerge convert ADAPTER --to peft",
        )
    for module in adapter.modules.values():
        _key(base, module)


def _whole(module: Module, form: Form) -> Module:
    """A module of every rank its shape allows, unscaled."""
    return replace(module, rank=min(module.shape), scaling=1.0, form=form, gates=())


def beside_identity(W: Array) -> LowRank:
    """A matrix as factors: itself, and an identity on its shorter side."""
    rows, columns = W.shape
    if rows <= columns:
        return LowRank(A=W, B=np.eye(rows, dtype=W.dtype))
    return LowRank(A=np.eye(columns, dtype=W.dtype), B=W)


def difference(base: Checkpoint, tuned: Checkpoint, reference: str) -> Adapter:
    """What tuning changed, as an adapter of full rank: every matrix that differs.

    Vectors that differ (biases, norms) have no place in an adapter: a note names them. Raises
    IncompatibleError where the two are no versions of one model.
    """
    shared = [key for key in tuned.holders if key in base.holders]
    other = [k for k in shared if tuned.tensors[k].shape != base.tensors[k].shape]
    if not shared or other:
        what = f"differ in the shape of {listed(other, 3)}" if other else "share no tensor"
        raise IncompatibleError(
            f"{base.path} and {tuned.path} {what}.", "name two checkpoints of one architecture"
        )
    changed = [key for key in shared if _differs(base, tuned, key)]
    modules = {}
    for key in changed:
        info = tuned.tensors[key]
        if len(info.shape) >= 2 and key.endswith(".weight"):
            module = _tuned(key, info.shape, info.dtype, base)
            modules[module.name] = module
    if not modules:
        raise IncompatibleError(
            f"{tuned.path} has the weights of {base.path}.", "nothing to extract"
        )
    left = [key for key in changed if key.removesuffix(".weight") not in modules]
    left += [key for key in tuned.holders if key not in base.holders]
    notes = [
        f"{len(left)} tensors are new, or changed and no matrices: left out: {listed(left, 4)}"
    ]
    same = f"{len(shared) - len(changed)} of {len(shared)} tensors are unchanged"
    return Adapter(
        reference=reference,
        layout="diffusers" if tuned.parts else "peft",
        modules=modules,
        source=tuned,
        naming="diffusers" if tuned.parts else "model",
        base_model=None,
        assumed=(same, *(notes if left else ())),
        derived=("extract", base.path.name, tuned.path.name),
    )


def _differs(base: Checkpoint, tuned: Checkpoint, key: str) -> bool:
    one, two = base.tensors[key], tuned.tensors[key]
    if one.dtype == two.dtype:
        return base.read(key) != tuned.read(key)
    return not np.array_equal(base.array(key), tuned.array(key))


def _tuned(key: str, shape: tuple[int, ...], dtype: str, base: Checkpoint) -> Module:
    name = key.removesuffix(".weight")
    embedding = len(shape) == 2 and name.rpartition(".")[2] in EMBEDDINGS

    def changed(source: TensorSource, module: Module) -> LowRank:
        W = source.array(key) - base.array(key)
        return beside_identity(W.T if embedding else W.reshape(module.shape))

    out, channels, *kernel = (shape[1], shape[0]) if embedding else shape
    width = channels
    for size in kernel:
        width *= size
    return Module(
        name=name,
        kind="embedding" if embedding else "conv" if kernel else "linear",
        out_features=out,
        in_features=width,
        rank=min(out, width),
        scaling=1.0,
        dtype=dtype,
        keys={"tuned": key},
        kernel=tuple(kernel),
        form=changed,
    )
