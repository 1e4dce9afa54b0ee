"""Which ranks a result can have, as far as recipe and headers tell."""

import msgspec

from loramerge.align import Alignment
from loramerge.errors import UsageError
from loramerge.options import Options
from loramerge.recipe import Recipe

__all__ = ["highest_ranks", "resolved"]


def resolved(recipe: Recipe, alignment: Alignment) -> Options:
    """The method's options with a default rank option filled in: the largest input rank."""
    name = recipe.method.rank_option
    if name is None or getattr(recipe.options, name) is not None:
        return recipe.options
    return msgspec.structs.replace(recipe.options, **{name: _largest(alignment)})


def _largest(alignment: Alignment) -> int:
    return max(rank for module in alignment.modules for rank in module.ranks)


def highest_ranks(
    recipe: Recipe, options: Options, alignment: Alignment
) -> tuple[dict[str, int], list[str]]:
    """The rank of each module, an upper bound where a criterion chooses it; and notes."""
    own = options.rank_below(_largest(alignment))
    if recipe.method.rank_option:
        own = getattr(options, recipe.method.rank_option)
    every = recipe.method.every_rank(options)
    caps = {
        module.name: min(module.model.shape) if every else min(own or module.cap, sum(module.ranks))
        for module in alignment.modules
    }
    criterion, asked = recipe.criterion, recipe.settings.rank
    if criterion and criterion.kohya:  # theirs may keep one more than there are, and that is zero
        caps = {m.name: min(caps[m.name] + 1, *m.model.shape) for m in alignment.modules}
    if every and recipe.method.takes == "one" and isinstance(asked, int):
        largest = _largest(alignment)
        if asked < largest:
            raise UsageError(
                f"{recipe.method.name} --rank {asked} is less than the rank {largest} there is.",
                f"make it smaller: loramerge squeeze {recipe.adapters[0].reference} --rank {asked}",
            )
    if asked == "full" or (criterion and (asked is None or criterion.budgeted)):
        return caps, []
    limit = asked if isinstance(asked, int) else own or _largest(alignment)
    ranks = {name: min(limit, cap) for name, cap in caps.items()}
    if criterion:
        return ranks, []
    notes = []
    highest = max(ranks.values())
    wanted = own if own is not None and asked is None else limit
    if highest < wanted:
        notes.append(f"rank {highest} is all there is; {wanted} was asked for")
    cut = sum(rank < caps[name] for name, rank in ranks.items())
    if cut and recipe.method.flat(options):
        notes.append(
            f"the spectrum of {recipe.method.name} is flat: in {cut} modules what --rank {highest} "
            "cuts away is as large as what it keeps; --rank full keeps all"
        )
    short = [name for name, rank in ranks.items() if rank < highest]
    if short and own is not None:
        notes.append(f"{len(short)} modules have fewer than {highest} components; all are kept")
    return ranks, notes
