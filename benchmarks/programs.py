"""Symbol programs: the tasks the testbed's models are trained and judged on.

A sequence is 20 token ids, `BOS op1 op2 x1..x8 SEP y1..y8`: a program of one primitive (op2 is
NOP) or of two, eight letters, and what the program makes of them. A name is `rev` or `sh3_rev`
(shift by three, then reverse).
"""

from collections.abc import Callable

import torch
from torch import Tensor

NOP, BOS, SEP, BLANK = range(4)
LETTER, LETTERS = 4, 26
DIGIT = 30
OPERATION = 40
VOCABULARY = 80
LENGTH = 8
OUTPUT = 12  # where y1 stands
TOKENS = OUTPUT + LENGTH

# Compositions of two primitives the base learns, besides all 23 primitives alone.
LEARNED = 110
SUITES = {
    "hard": (
        *("cmax_rank", "cmin_dedup", "dupl_count", "psort_atb"),
        *("rotl1_swadj", "sh3_rev", "shm2_swhalf", "sort_inter"),
    ),
    "easy": (
        *("cmin_swadj", "inter_psort", "mirr_dupl", "rev_cmax"),
        *("rotr2_rotl1", "sh1_thr", "shm2_swadj", "sort_cmin"),
    ),
}

Primitive = Callable[[Tensor], Tensor]


def _order(places: str) -> Primitive:
    index = [int(place) for place in places]
    return lambda x: x[:, index]


def _pairs_sorted(x: Tensor) -> Tensor:
    return x.view(-1, 4, 2).sort(-1).values.view(-1, LENGTH)


def _blanked(x: Tensor, blank: Tensor) -> Tensor:
    return torch.where(blank, BLANK, x + LETTER)


def _repeated(x: Tensor) -> Tensor:
    return torch.tril(x[:, :, None] == x[:, None, :], -1).any(-1)


def _vowel(x: Tensor) -> Tensor:
    return torch.isin(x, torch.tensor([0, 4, 8, 14, 20], device=x.device))


# From letters 0..25 to letters, [n, 8] -> [n, 8]: may stand first or second.
INNER: dict[str, Primitive] = {
    "rev": lambda x: x.flip(1),
    "sort": lambda x: x.sort(1).values,
    "sortd": lambda x: x.sort(1, descending=True).values,
    "sh1": lambda x: (x + 1) % LETTERS,
    "sh3": lambda x: (x + 3) % LETTERS,
    "shm2": lambda x: (x - 2) % LETTERS,
    "atb": lambda x: LETTERS - 1 - x,
    "rotl1": lambda x: x.roll(-1, 1),
    "rotr2": lambda x: x.roll(2, 1),
    "swadj": _order("10325476"),
    "swhalf": _order("45670123"),
    "inter": _order("04152637"),
    "cmax": lambda x: x.cummax(1).values,
    "cmin": lambda x: x.cummin(1).values,
    "psort": _pairs_sorted,
    "dupl": _order("01230123"),
    "mirr": _order("01233210"),
}
# From letters 0..25 to token ids: may stand second only.
LAST: dict[str, Primitive] = {
    "copy": lambda x: x + LETTER,
    "dedup": lambda x: _blanked(x, _repeated(x)),
    "thr": lambda x: _blanked(x, x <= 12),
    "vow": lambda x: _blanked(x, _vowel(x)),
    "count": lambda x: DIGIT + (x[:, :, None] == x[:, None, :]).sum(-1),
    "rank": lambda x: DIGIT + (x[:, :, None] > x[:, None, :]).sum(-1),
}
OPERATIONS = [*INNER, *LAST]


def compositions() -> list[str]:
    """Every program of two different primitives, except those that end in copy."""
    seconds = [name for name in OPERATIONS if name != "copy"]
    return [f"{first}_{second}" for first in INNER for second in seconds if first != second]


def curriculum() -> tuple[list[str], list[str]]:
    """What the base learns (compositions, then primitives), and the compositions held out."""
    every = compositions()
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [every[place] for place in order]
    return shuffled[:LEARNED] + OPERATIONS, shuffled[LEARNED:]


def solve(program: str, x: Tensor) -> Tensor:
    """The token ids a program makes of letters 0..25. x [n, 8] -> [n, 8]

    Raises KeyError for an unknown primitive.
    """
    *inner, last = program.split("_")
    for name in inner:
        x = INNER[name](x)
    return INNER[last](x) + LETTER if last in INNER else LAST[last](x)


def sample(program: str, count: int, generator: torch.Generator) -> Tensor:
    """Random sequences of one program on the generator's device. [count, 20] int64

    Half of them draw from all letters, half from five, so that repeats are not rare.
    """
    device = generator.device
    x = torch.randint(0, LETTERS, (count, LENGTH), generator=generator, device=device)
    few = torch.rand(count, LETTERS, generator=generator, device=device).argsort(1)[:, :5]
    picks = torch.randint(0, 5, (count, LENGTH), generator=generator, device=device)
    plain = torch.rand(count, 1, generator=generator, device=device) < 0.5
    x = torch.where(plain, x, few.gather(1, picks))
    codes = [OPERATION + OPERATIONS.index(name) for name in program.split("_")]
    head = torch.tensor([BOS, *codes, NOP][:3], device=device).expand(count, 3)
    separator = torch.full((count, 1), SEP, device=device)
    return torch.cat([head, x + LETTER, separator, solve(program, x)], 1)
