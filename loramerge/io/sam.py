"""SAM_LoRA and LoRA-ViT: w_a_000 [r, d] and w_b_000 [d, r], numbered instead of named."""

import re

from loramerge.adapter import Adapter
from loramerge.errors import IncompatibleError, UsageError
from loramerge.io._grammar import Grammar, check_pairs, factor_shapes, pair
from loramerge.io._layout import Draft, Given, Layout, Stored, Written

GRAMMAR = Grammar(
    (
        ("A", re.compile(r"w_a_(?P<module>\d+)")),
        ("B", re.compile(r"w_b_(?P<module>\d+)")),
    )
)
# Two pairs a block, on the first and the last third of its fused projection.
PARTS = ("q", "v")
NAMED = re.compile(r"blocks\.(\d+)\.attn\.qkv\.([qv])")


def explains(key: str) -> bool:
    """Numbered factors, and nothing else."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a file: dW = w_b w_a. Pair 2i is the query of block i, pair 2i + 1 its value."""
    source, where = given.source, given.reference
    if given.alpha is not None:
        raise UsageError(f"{where}: SAM_LoRA scales by 1, always.", "leave --alpha out")
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    modules = {}
    for number, roles in groups.items():
        A, B = source.tensors[roles["A"]], source.tensors[roles["B"]]
        block, part = divmod(int(number), len(PARTS))
        name = f"blocks.{block}.attn.qkv.{PARTS[part]}"
        modules[name] = pair(name, roles, A, B, "linear")
    return Adapter(
        reference=where,
        layout="sam",
        modules=modules,
        source=source,
        naming="sam",
        metadata=source.metadata,
    )


def write(draft: Draft) -> Written:
    """The same numbers again. Raises IncompatibleError where one is missing: it would shift all."""
    numbers = {}
    for module in draft.modules:
        match = NAMED.fullmatch(module.name)
        assert match is not None  # the naming says so
        numbers[int(match[1]) * len(PARTS) + PARTS.index(match[2])] = module
    if missing := set(range(max(numbers) + 1)) - numbers.keys():
        raise IncompatibleError(
            f"SAM_LoRA numbers its pairs without gaps; {sorted(missing)[0]:03d} would be missing.",
            "leave out --include and --exclude",
        )
    tensors = []
    for number, module in sorted(numbers.items()):
        A, B = factor_shapes(module)
        tensors.append(Stored(f"w_a_{number:03d}", module.dtype, A, (module.name,), "A"))
        tensors.append(Stored(f"w_b_{number:03d}", module.dtype, B, (module.name,), "B"))
    return Written(tensors=tuple(tensors))


LAYOUT = Layout(
    name="sam",
    summary="SAM_LoRA and LoRA-ViT: numbered pairs, w_a_000 and w_b_000, scale 1.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    naming="sam",
    one_rank=True,
)
