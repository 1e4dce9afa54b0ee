"""The central types: what an adapter is, before and after its numbers are read.

One alphabet everywhere: k adapters, *b batched modules of equal shape, m out features,
n in features, r rank, s sum of ranks.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from msgspec import Struct, field

from loramerge.origin import Origin

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]
else:
    Array: TypeAlias = object

__all__ = [
    "Adapter",
    "Array",
    "Extra",
    "Form",
    "Kind",
    "LowRank",
    "Module",
    "TensorInfo",
    "TensorSource",
    "Updates",
    "Variant",
    "is_local",
    "paired",
    "pinned_name",
    "public_base",
    "source_name",
]

Kind: TypeAlias = Literal["linear", "embedding", "conv", "parameter"]


class LowRank(Struct, frozen=True):
    """A delta weight in factored form, scaling folded in: dW = B @ A.

    A [*b, r, n], B [*b, m, r]; numpy arrays on the CPU, torch tensors on a GPU.
    """

    A: Array
    B: Array

    @property
    def rank(self) -> int:
        """r: how many rank-1 terms are stored, zero ones included."""
        return int(self.A.shape[-2])


# What a module does: queries or keys, values or the way out of an attention, the way out of an MLP.
Role: TypeAlias = Literal["query", "value", "output", "down", "other"]


class Updates(Struct, frozen=True):
    """What a merge method sees of one module (or a batch of equal ones).

    `factors` hold the adapters that have the module, in the user's order, `weights` their weights
    and `scalings` the files' own factors, which are folded into each B already. `rank` is the rank
    the output will be cut to (None where it is chosen later), `seed` the user's. `keys` are what
    random masks are drawn from: for each adapter one number per batch item, made of seed, position
    of the adapter and name of the module, so that no batch or tile changes a mask. `gates` [*b, r]
    are the magnitudes of each adapter's SoRA gates, folded into the factors; None without any.
    `present` says of every adapter of the merge whether it has the module; () where all have it.
    `names` are those of the modules, one for each batch item; `known` is what the method's census
    of the whole adapter found, None without one. `siblings` are each adapter's updates of the other
    modules that read the same input, where the method asks for them, and `role` what such modules
    do: queries or keys, values or the way out of an attention, the way out of an MLP, or other.
    `place` says how many siblings stand before them, and `shared` keeps what is computed once for
    all that ask for it: the weighted sum, and for the siblings what was found for one.
    """

    factors: tuple[LowRank, ...]
    weights: tuple[float, ...]
    scalings: tuple[float, ...]
    rank: int | None = None
    seed: int = 0
    keys: tuple[tuple[int, ...], ...] = ()
    gates: tuple[Array | None, ...] = ()
    present: tuple[bool, ...] = ()
    names: tuple[str, ...] = ()
    known: Any = None
    siblings: tuple[tuple[LowRank, ...], ...] = ()
    role: Role = "other"
    place: int = 0
    shared: dict[Any, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """How many adapters are merged, those that lack the module included."""
        return len(self.present) or len(self.factors)

    @property
    def positions(self) -> tuple[int, ...]:
        """The place of each of `factors` among all adapters."""
        return tuple(t for t in range(self.count) if not self.present or self.present[t])

    @property
    def mean_rank(self) -> float:
        """The mean of the input ranks."""
        return sum(f.rank for f in self.factors) / len(self.factors)


class TensorInfo(Struct, frozen=True):
    """One tensor as a safetensors header describes it: dtype name, shape, byte range."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Stored size in bytes."""
        return self.stop - self.start


class TensorSource(Protocol):
    """Where an adapter's tensors are: header known, values on demand."""

    @property
    def path(self) -> Path:
        """The file."""

    @property
    def size(self) -> int:
        """Its length in bytes."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every stored tensor by key, in file order."""

    def read(self, key: str) -> bytes:
        """The stored bytes of one tensor."""

    def array(self, key: str) -> Array:
        """One tensor as a float32 numpy array (float64 if stored so), in its stored shape."""

    def chunks(self) -> Iterator[bytes]:
        """The whole file from its first byte, for hashing."""


# How the tensors stored for a module become factors of its update, scaling and gates left out.
Form: TypeAlias = Callable[[TensorSource, "Module"], LowRank]


def paired(source: TensorSource, module: "Module") -> LowRank:
    """The form nearly every layout has: A [r, in, *kernel] and B [out, r, 1...] as stored."""
    A, B = (source.array(module.keys[part]) for part in ("A", "B"))
    terms = A.shape[0]
    return LowRank(A.reshape(terms, module.in_features), B.reshape(module.out_features, terms))


class Module(Struct, frozen=True):
    """One adapted layer, from the header alone.

    out_features m and in_features n describe B @ A, so a convolution counts
    n = channels * prod(kernel) and an embedding n = vocabulary size. `scaling` is the file's own
    factor on B @ A (alpha / r, rsLoRA's alpha / sqrt(r), or 1). `gates` are those of a SoRA
    checkpoint, one per stored rank-1 term, dW = scaling * B diag(gates) A; terms whose gate is
    zero are no part of the module and do not count in `rank`. `keys` are the stored tensors it is
    made of, by role; `form` makes factors of them.
    """

    name: str
    kind: Kind
    out_features: int
    in_features: int
    rank: int
    scaling: float
    dtype: str
    keys: Mapping[str, str] = field(default_factory=dict)
    kernel: tuple[int, ...] = ()
    gates: tuple[float, ...] = ()
    form: Form = paired

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the delta weight."""
        return self.out_features, self.in_features


class Extra(Struct, frozen=True):
    """A stored tensor that is not part of a low-rank pair: a saved head, a bias, an embedding."""

    key: str
    role: str
    info: TensorInfo


class Variant(Struct, frozen=True):
    """Something that makes the file more than plain LoRA: why it is refused, what to do instead."""

    name: str
    reason: str
    hint: str


class Adapter(Struct, frozen=True):
    """A named set of modules, their tensors on demand, and everything else the file holds.

    `naming` is the vocabulary its module names are from: two adapters of one model agree in names
    only where they agree in naming. `alpha` is what the user said where the file does not, `named`
    the layout where the user named it; `derived` what was typed, without directories, for one that
    follows from a second model. `tokenizer` are the files of one that lie beside it, by name.
    """

    reference: str
    layout: str
    modules: Mapping[str, Module]
    source: TensorSource
    naming: str = "model"
    extras: tuple[Extra, ...] = ()
    variants: tuple[Variant, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    base_model: str | None = None
    assumed: tuple[str, ...] = ()
    scale_assumed: bool = False
    alpha: float | None = None
    named: str | None = None
    origin: Origin | None = None
    licence: str | None = None
    derived: tuple[str, ...] = ()
    tokenizer: Mapping[str, Path] = field(default_factory=dict)

    def read(self, name: str, wide: bool = False) -> LowRank:
        """The update of one module, convolutions and embeddings in two dimensions.

        Scaling is folded into B here, once; it is folded nowhere else. A [r, n], B [m, r], in
        float32, or float64 where they are stored so or are wanted `wide`.
        """
        module = self.modules[name]
        update = module.form(self.source, module)
        A, B = update.A, update.B
        if wide:
            A, B = A.astype("float64"), B.astype("float64")
        if module.gates:
            A, B = _opened(A, B, module.gates)
        return LowRank(A, B if module.scaling == 1 else B * B.dtype.type(module.scaling))

    @property
    def max_rank(self) -> int:
        """The largest rank of any module."""
        return max(module.rank for module in self.modules.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes its low-rank tensors are stored in, sorted."""
        return tuple(sorted({module.dtype for module in self.modules.values()}))


def _opened(A: Array, B: Array, gates: tuple[float, ...]) -> tuple[Array, Array]:
    """Gates folded in, sqrt(|g|) on each side and the sign on B; closed ones removed."""
    kept = [index for index, gate in enumerate(gates) if gate != 0]
    A, B = A[kept], B[:, kept]
    for place, index in enumerate(kept):
        root = abs(gates[index]) ** 0.5
        A[place] *= root
        B[:, place] *= root if gates[index] > 0 else -root
    return A, B


def source_name(adapter: Adapter) -> str:
    """A reference without its local directory or revision: what may be published."""
    if adapter.origin is not None:
        return adapter.origin.name
    path = Path(adapter.reference).expanduser()
    return path.resolve().name if path.name in ("", "..") else path.name


def pinned_name(adapter: Adapter) -> str:
    """What to type for a source, wherever one is: on the Hub, the very commit."""
    return adapter.origin.pinned if adapter.origin else source_name(adapter)


def public_base(adapter: Adapter) -> str | None:
    """The base model where it names one on the Hub; local paths are nobody's business."""
    base = adapter.base_model
    return None if base is None or is_local(base) else base


def is_local(name: str) -> bool:
    """Whether what is to name a model can only be a path."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1 or "\\" in name
