"""Some ranks of an update, or some of its modules."""

from typing import Annotated, TypeAlias

from msgspec import Meta

from loramerge.adapter import LowRank, Updates
from loramerge.errors import UsageError
from loramerge.linalg.factors import concat
from loramerge.linalg.kernels import namespace
from loramerge.linalg.spectrum import decompose
from loramerge.options import Options
from loramerge.registry import compressor, never

Places: TypeAlias = Annotated[str, Meta(pattern=r"^\d+(-\d+)?(,\d+(-\d+)?)*$")]


class SelectOptions(Options, frozen=True):
    """Which ranks."""

    ranks: Annotated[
        Places | None,
        Meta(
            description="Which terms of the singular value decomposition, from 0 for the largest: "
            "0-7, or 0,2,4-5. Without it all, as stored.",
            extra={"metavar": "RANKS", "expected": "places such as 0-7 or 0,2,4-5"},
        ),
    ] = None

    stored: Annotated[
        bool,
        Meta(
            description="Count terms as the file stores them instead: the first ranks of a DyLoRA "
            "are an adapter by themselves."
        ),
    ] = False

    @property
    def places(self) -> list[int]:
        """The places that are asked for, each once, in order."""
        found: set[int] = set()
        for part in (self.ranks or "").split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first or 0), int(last or first or -1) + 1))
        return sorted(found)

    def __post_init__(self) -> None:
        """Raise ValueError where nothing is selected."""
        if self.ranks is not None and not self.places:
            raise ValueError(f"--ranks {self.ranks} names no rank")
        if self.stored and self.ranks is None:
            raise ValueError("--stored says how --ranks counts: give both")

    def rank_below(self, highest: int) -> int | None:
        """The rank that is left of this one. Raises UsageError where none is, in any module."""
        if self.ranks is None:
            return None
        left = sum(place < highest for place in self.places)
        if left == 0:
            last = highest - 1
            raise UsageError(
                f"--ranks {self.ranks} selects nothing: the largest rank there is is {highest}, "
                f"with the terms 0 to {last}.",
                f"name some of --ranks 0-{last}",
            )
        return left


@compressor(
    "select",
    paper="arXiv:2409.16167",
    options=SelectOptions,
    example="loramerge select my-adapter --ranks 0-7",
    surgery=True,
    exact=never,
)
def select(updates: Updates, options: SelectOptions) -> LowRank:
    """Keep some ranks of an adapter, or some of its modules.

    --ranks counts the terms of each module's singular value decomposition, so that what is selected
    does not depend on how a file factors its update: 0-7 is the best approximation of rank 8, 8-15
    of a rank-16 adapter what that leaves out. --include and --exclude select modules. Modules that
    have none of the ranks become zero.

    With --stored the terms are those of the file, exactly, and the scale of each stays what it was.
    DyLoRA (arXiv:2210.07558) trains every prefix of them as an adapter: sd-scripts with a factor
    sqrt(R / k) on the first k of R, LyCORIS with R / b on the first b blocks, and the script that
    takes such files apart leaves R / k. `scale --factor` gives any of these.
    """
    whole = concat(updates.factors, updates.weights)
    if options.ranks is None:
        return whole
    terms = whole
    if not options.stored:
        spectrum = decompose(whole)
        terms = spectrum.truncated(spectrum.s.shape[-1])
    xp = namespace(terms.A)
    places = [place for place in options.places if place < terms.rank]
    kept = xp.asarray(places, dtype=xp.int64, device=terms.A.device)
    return LowRank(A=xp.take(terms.A, kept, axis=-2), B=xp.take(terms.B, kept, axis=-1))
