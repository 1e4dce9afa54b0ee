"""cloneofsimo/lora: unet:0:down and unet:0:up, in the order in which the model is walked."""

import re

from loramerge.adapter import Adapter, Extra
from loramerge.errors import IncompatibleError, UsageError
from loramerge.io._grammar import Grammar, check_pairs, factor_shapes, pair
from loramerge.io._layout import Draft, Given, Layout, Stored, Written

NAME = r"(?P<module>[a-z_]+:\d+)"
GRAMMAR = Grammar((("A", re.compile(NAME + ":down")), ("B", re.compile(NAME + ":up"))))
TOKEN = re.compile(r"<[^<>]+>")
# What the metadata says of a tensor that is a textual inversion.
EMBEDDING = "<embed>"


def explains(key: str) -> bool:
    """Numbered factors, and the tokens of a textual inversion."""
    return GRAMMAR.parse(key) is not None or TOKEN.fullmatch(key) is not None


def marks(key: str) -> bool:
    """A numbered factor: what no other layout has."""
    return GRAMMAR.parse(key) is not None


def read(given: Given) -> Adapter:
    """Describe a file: dW = up down, scale 1; a module is known by component and number alone."""
    source, where = given.source, given.reference
    if given.alpha is not None:
        raise UsageError(f"{where}: cloneofsimo's files scale by 1, always.", "leave --alpha out")
    groups = GRAMMAR.group(source.tensors)
    check_pairs(groups, "A", "B", where)
    modules = {
        name: pair(name, roles, source.tensors[roles["A"]], source.tensors[roles["B"]], "linear")
        for name, roles in sorted(groups.items(), key=lambda item: _place(item[0]))
    }
    return Adapter(
        reference=where,
        layout="cloneofsimo",
        modules=modules,
        source=source,
        naming="cloneofsimo",
        extras=tuple(
            Extra(key, "token embedding", info)
            for key, info in source.tensors.items()
            if not marks(key)
        ),
        metadata=source.metadata,
    )


def _place(name: str) -> tuple[str, int]:
    """Component and number: 10 comes after 9."""
    component, _, number = name.partition(":")
    return component, int(number)


def write(draft: Draft) -> Written:
    """The same numbers again, with the classes of the modules that the sources name.

    Raises IncompatibleError where a number is missing, which would shift all after it, and where
    the sources walk the model in different ways.
    """
    tensors: list[Stored] = []
    metadata: dict[str, str] = {}
    counts: dict[str, int] = {}
    for module in sorted(draft.modules, key=lambda module: _place(module.name)):
        component, number = _place(module.name)
        expected = counts.get(component, 0)
        if number != expected:
            raise IncompatibleError(
                f"cloneofsimo numbers its modules without gaps; {component}:{expected} would be "
                "missing.",
                "leave out --include and --exclude",
            )
        counts[component] = expected + 1
        A, B = factor_shapes(module)
        whose = (module.name,)
        tensors.append(Stored(f"{module.name}:down", module.dtype, A, whose, "A"))
        tensors.append(Stored(f"{module.name}:up", module.dtype, B, whose, "B"))
        metadata[f"{module.name}:rank"] = str(module.rank)
    metadata |= {component: _classes(draft, component) for component in counts}
    for extra in draft.extras:
        content = draft.content(extra)
        tensors.append(Stored(extra.key, extra.info.dtype, extra.info.shape, content=content))
        metadata[extra.key] = EMBEDDING
    return Written(tensors=tuple(tensors), metadata=metadata)


def _classes(draft: Draft, component: str) -> str:
    """The classes whose modules are numbered, as JSON: what decides which module a number means."""
    stated = {text for source in draft.sources if (text := source.metadata.get(component))}
    # A set to its trainer, which writes it in any order.
    if len({tuple(sorted(re.findall(r'"(\w+)"', text))) for text in stated}) > 1:
        raise IncompatibleError(
            f"the adapters number the modules of {component} in different ways: "
            f"{' and '.join(sorted(stated))}.",
            "merge adapters that were trained with the same target classes",
        )
    return min(stated, default="[]")


LAYOUT = Layout(
    name="cloneofsimo",
    summary="cloneofsimo/lora: numbered pairs of Stable Diffusion, scale 1.",
    directory=False,
    explains=explains,
    read=read,
    write=write,
    marks=marks,
    naming="cloneofsimo",
    unscaled=True,
)
