"""The similar command: which of several adapters are alike, pair by pair."""

from typing import TYPE_CHECKING, Any

from loramerge.cli.command import Command
from loramerge.cli.flags import ADAPTERS, INPUTS, SHOWN
from loramerge.cli.terminal import print_table

if TYPE_CHECKING:
    from loramerge.similarity import Alike, Pair

__all__ = ["SIMILAR"]


def similar(
    adapters: tuple[str, ...],
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    json: bool,
    quiet: bool,
) -> None:
    """Compare every two of several adapters, the most similar first: what a merge would meet.

    Cosine is that of the delta weights, all modules as one long vector: near 1 are copies, which an
    average serves and a sum doubles; below 0 they undo each other. Overlaps are of the spaces that
    updates read from (inputs) and write to (outputs), ||U^T V||_F^2 / min(r, s), the mean over the
    modules both have: two random spaces have about r / d. Adapters trained from one initial A share
    their inputs; where tasks differ but spaces overlap, try `tsv` or `decorrelate`.
    """
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json
    from loramerge.compute import own_process
    from loramerge.io._hub import fetch
    from loramerge.similarity import similarity

    own_process()
    found = opened(named_adapters(adapters, (), alpha, from_))
    with progress(quiet or json) as listen:
        fetch(found, listen)
        pairs = similarity(found, listen)
    if json:
        echo_json({"pairs": [_facts(adapters, pair) for pair in pairs]})
        return
    rows = [
        [adapters[i], adapters[j], *map(_number, (pair.cosine, pair.inputs, pair.outputs))]
        for pair in pairs
        for i, j in [pair.places]
    ]
    print_table(["", "", "cosine", "inputs", "outputs"], rows, words=2)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _facts(adapters: tuple[str, ...], pair: "Pair") -> dict[str, Any]:
    i, j = pair.places
    return {
        "adapters": [adapters[i], adapters[j]],
        **_numbers(pair),
        "modules": [{"name": module.name, **_numbers(module)} for module in pair.modules],
    }


def _numbers(of: "Pair | Alike") -> dict[str, float | None]:
    return {"cosine": of.cosine, "inputs": of.inputs, "outputs": of.outputs}


SIMILAR = Command(
    "similar",
    callback=similar,
    params=[ADAPTERS, *INPUTS, *SHOWN],
    help=similar.__doc__,
    short_help="Compare every two of several adapters: directions and spaces.",
    example="loramerge similar a b",
)
