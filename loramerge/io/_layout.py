"""What a layout file declares: which keys it explains, how they become modules, and back."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from typing import Any, Literal, TypeAlias

from msgspec import Struct, field

from loramerge.adapter import Adapter, Array, Extra, Module
from loramerge.compute import encode
from loramerge.io._source import Source

__all__ = ["Draft", "Given", "Layout", "Part", "Stored", "Written", "alpha_of"]

# What float64 may lose when a scale becomes an alpha and a scale again.
ROUNDING = 1e-12

Part: TypeAlias = Literal["A", "B"]
# How the factors of one or more modules, A [r, n] or B [m, r], become the tensor that holds them.
Join: TypeAlias = Callable[[Sequence[Array]], Array]


class Given(Struct, frozen=True):
    """An opened file before its layout gives it meaning.

    `config` is the adapter_config.json found with the file (None without one); where it merely
    lies `beside` a file of another name, it counts only if it explains that file. `alpha` is what
    the user said with --alpha.
    """

    reference: str
    source: Source
    config: Mapping[str, Any] | None = None
    beside: bool = False
    alpha: float | None = None


class Draft(Struct, frozen=True):
    """A result before it is written: its modules with their final ranks, nothing computed yet.

    A module's `scaling` is what a reader will find, alpha / rank with alpha the largest rank: 1
    where the form is uniform. Factors are divided by it when they are written.
    `extras` are tensors of the first source that are carried, unchanged or as the `mean` of those
    of all sources.
    """

    modules: tuple[Module, ...]
    sources: tuple[Adapter, ...]
    extras: tuple[Extra, ...] = ()
    uniform: bool = True
    mean: bool = False

    def content(self, extra: Extra) -> Callable[[], bytes]:
        """How to get the bytes of an extra."""
        if not self.mean:
            return partial(self.sources[0].source.read, extra.key)

        def mean() -> bytes:
            read = [s.source.array(extra.key).astype("float64") for s in self.sources]
            total = reduce(add, read)
            data: bytes = encode(total / len(read), extra.info.dtype).tobytes()
            return data

        return mean

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return max((module.rank for module in self.modules), default=1)

    @property
    def alpha(self) -> float:
        """The alpha of the module of the largest rank; an integer where it is one."""
        highest = max(self.modules, key=lambda module: module.rank, default=None)
        return alpha_of(highest) if highest else self.rank


def alpha_of(module: Module) -> float:
    """The alpha that gives a module its scaling, alpha / rank; an integer where it is near one."""
    alpha = module.scaling * module.rank
    whole = round(alpha)
    return whole if abs(alpha - whole) <= abs(whole) * ROUNDING else alpha


def alone(factors: Sequence[Array]) -> Array:
    """The factor of the one module of a tensor, as it is."""
    return factors[0]


class Stored(Struct, frozen=True):
    """One tensor of an output file: a part of modules, or bytes from elsewhere, such as a head.

    `modules` are those whose A or B (`part`) it holds, nearly always one; `join` makes the tensor
    of their factors, in the order of `modules` and already in the stored dtype, up to a reshape.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    modules: tuple[str, ...] = ()
    part: Part | None = None
    join: Join = alone
    content: Callable[[], bytes] = bytes


class Written(Struct, frozen=True):
    """How a draft looks in a layout: tensors, header metadata, files beside it.

    `seal` gives the metadata that follows from the file once its tensors are written; until then
    something as long stands in its place.
    """

    tensors: tuple[Stored, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    companions: Mapping[str, bytes] = field(default_factory=dict)
    seal: Callable[["Written", Source], Mapping[str, str]] | None = None


def never(key: str) -> bool:
    """No key."""
    return False


def unwritten(draft: Draft) -> Written:
    """What a layout has for `write` whose results are written in another."""
    raise AssertionError("results of this layout are written in another")


class Layout(Struct, frozen=True):
    """One way to store LoRA tensors.

    `explains` says whether a key may be this layout's; a file is of the layout that explains all of
    its keys. Where a layout has keys that no other has (`marks`), it needs one of them, and one is
    enough to tell it. Where every key is of its plainest form (`owns`), no other can be meant.
    `directory` tells whether it is normally a directory (PEFT) or a single file, `writes` names the
    layout its results are written in where it has no `write` of its own. `naming` is the vocabulary
    of the module names that `write` takes (empty: any); `one_rank` says that it has room for only
    one rank, `unscaled` that readers apply every module of a result with scale 1; `scale` is what a
    converted file can say: an alpha for each module (`alphas`), one alpha for all, one multiplier,
    or nothing; `weights` is the usual name of the file in a directory.
    """

    name: str
    summary: str
    directory: bool
    explains: Callable[[str], bool]
    read: Callable[[Given], Adapter]
    write: Callable[[Draft], Written] = unwritten
    marks: Callable[[str], bool] = never
    owns: Callable[[str], bool] = never
    writes: str = ""
    naming: str = "model"
    one_rank: bool = False
    unscaled: bool = False
    scale: Literal["alphas", "alpha", "multiplier", "none"] = "none"
    weights: str = "adapter_model.safetensors"

    @property
    def marked(self) -> bool:
        """Whether files of this layout are told by keys that no other has."""
        return self.marks is not never
