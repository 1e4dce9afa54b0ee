"""Commands that only look. None but diff reads a tensor."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, Flag
from loramerge.cli.diff import DIFF
from loramerge.cli.flags import ADAPTERS, INPUTS, JSON
from loramerge.cli.terminal import Row, print_rows

if TYPE_CHECKING:
    from loramerge.adapter import Adapter

__all__ = ["COMMANDS", "card"]

# A scale that is stored beside the weights of an adapter on the Hub.
UNREAD = "unread"


def _echo(facts: dict[str, Any]) -> None:
    from loramerge.cli.ui import echo_json

    echo_json(facts)


def inspect(
    adapters: tuple[str, ...],
    modules: bool,
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    json: bool,
) -> None:
    """Show the identity card of adapters: layout, base, ranks, scale, dtypes."""
    from loramerge.cli.inputs import named_adapters, opened

    found = opened(named_adapters(adapters, (), alpha, from_), look=True)
    cards = [card(one, modules) for one in found]
    if json:
        _echo(cards[0] if len(cards) == 1 else {"adapters": cards})
        return
    for position, one in enumerate(cards):
        if position:
            click.echo()
        print_rows(_card_rows(one), err=False)


def card(adapter: "Adapter", modules: bool = False) -> dict[str, Any]:
    """What the header and the config say, as one JSON object."""
    found = list(adapter.modules.values())
    parameters = sum(module.rank * sum(module.shape) for module in found)
    result: dict[str, Any] = {
        "adapter": adapter.reference,
        "layout": adapter.layout,
        "origin": adapter.origin.uri if adapter.origin else None,
        "base_model": adapter.base_model,
        "licence": adapter.licence,
        "modules": len(found),
        "kinds": dict(Counter(module.kind for module in found)),
        "targets": dict(
            sorted(Counter(module.name.rpartition(".")[2] for module in found).items())
        ),
        "ranks": {str(k): v for k, v in sorted(Counter(module.rank for module in found).items())},
        "scalings": {
            UNREAD if math.isnan(k) else f"{k:g}": v
            for k, v in sorted(Counter(m.scaling for m in found).items())
        },
        "scale_assumed": adapter.scale_assumed,
        "dtypes": list(adapter.dtypes),
        "parameters": parameters,
        "bytes": sum(info.nbytes for info in adapter.source.tensors.values()),
        "beside_lora": {extra.key: extra.role for extra in adapter.extras},
        "variants": {variant.name: variant.reason for variant in adapter.variants},
        "notes": list(adapter.assumed),
    }
    if modules:
        result["each"] = {
            m.name: {
                "kind": m.kind,
                "shape": list(m.shape),
                "rank": m.rank,
                "scaling": None if math.isnan(m.scaling) else m.scaling,
            }
            for m in found
        }
    return result


def _card_rows(one: Mapping[str, Any]) -> list[Row]:
    from loramerge.cli.ui import in_bytes

    size = f"{in_bytes(one['bytes'])}, {', '.join(one['dtypes'])}"
    rows = [
        Row("adapter", one["adapter"]),
        *([Row("on the Hub", one["origin"])] if one["origin"] else []),
        Row("layout", one["layout"]),
        Row("base model", one["base_model"] or "not stated"),
        *([Row("licence", one["licence"])] if one["licence"] else []),
        Row("modules", f"{one['modules']}: {_counts(one['targets'])}"),
        Row("kinds", _counts(one["kinds"])),
        Row("rank", _counts(one["ranks"])),
        Row("scale", UNREAD if UNREAD in one["scalings"] else _counts(one["scalings"], "x")),
        Row("size", f"{one['parameters']:,} parameters, {size}"),
    ]
    rows += [Row("beside it", f"{key}: {role}") for key, role in one["beside_lora"].items()]
    rows += [Row("not plain", f"{name}: {why}", fg="red") for name, why in one["variants"].items()]
    rows += [
        Row("note", n, fg="yellow" if n.startswith("scale 1:") else None) for n in one["notes"]
    ]
    for name, facts in one.get("each", {}).items():
        shape = "x".join(map(str, facts["shape"]))
        scale = UNREAD if facts["scaling"] is None else f"x{facts['scaling']:g}"
        rows.append(Row("", f"{name}  {facts['kind']} {shape}, rank {facts['rank']}, {scale}"))
    return rows


def _counts(found: Mapping[str, int], sign: str = "") -> str:
    """16 where all are 16; 8 (12), 16 (4) where they differ."""
    if len(found) == 1:
        return f"{sign}{next(iter(found))}"
    return ", ".join(f"{sign}{key} ({count})" for key, count in found.items())


def methods(json: bool) -> None:
    """List every method: what it does, its paper, what it needs and costs, how it scored."""
    from loramerge.recipe import same_as
    from loramerge.registry import methods as registered

    found = registered().values()
    if json:
        rows = [
            {
                "name": method.name,
                "takes": method.takes,
                "summary": method.summary,
                "paper": method.paper,
                "example": method.example,
                "needs": method.needs,
                "place": method.place,
                "cost": method.cost,
                "exact_match": method.score.exact_match if method.score else None,
                "measured_by": method.score.command if method.score else None,
                "presets": {preset.name: dict(preset.values) for preset in method.presets},
            }
            for method in found
        ]
        _echo({"methods": rows})
        return
    shown: list[Row] = []
    for method in found:
        shown.append(Row(method.name, method.summary))
        shown.append(Row("", f"{method.paper}; {method.example}"))
        shown.append(Row("", method.traits))
        for preset in method.presets:
            shown.append(Row(preset.name, f"= {same_as(method, preset)}: {preset.summary}"))
    print_rows(shown, err=False)


def layouts(json: bool) -> None:
    """List the layouts that are read and written, and those only recognised."""
    from loramerge.io._foreign import FOREIGN
    from loramerge.io._open import layouts as known

    refused = [foreign.name for foreign in FOREIGN]
    if json:
        rows = [{"name": found.name, "summary": found.summary} for found in known()]
        _echo({"read": rows, "recognised": refused})
        return
    shown = [Row(found.name, found.summary) for found in known()]
    names = f"recognised, and refused by name: {', '.join(refused)}"
    print_rows([*shown, Row("others", names)], err=False)


PACKAGES = (
    "loramerge",
    "numpy",
    "torch",
    "safetensors",
    "huggingface-hub",
    "msgspec",
    "click",
    "rich",
)


def env(json: bool) -> None:
    """Show versions and devices, for a bug report."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from loramerge.compute import accelerator

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        **{package: found(package) for package in PACKAGES},
        "accelerator": accelerator(),
    }
    if json:
        _echo(facts)
        return
    rows = [Row(key, "none" if value is None else str(value)) for key, value in facts.items()]
    print_rows(rows, err=False)


def _command(callback: Any, example: str, *params: click.Parameter) -> Command:
    name = callback.__name__
    return Command(
        name,
        callback=callback,
        params=[*params, JSON],
        help=callback.__doc__,
        example=example,
    )


COMMANDS: dict[str, click.Command] = {
    "inspect": _command(
        inspect,
        "loramerge inspect my-adapter",
        ADAPTERS,
        Flag("modules", "--modules", is_flag=True, help="List every module."),
        *INPUTS,
    ),
    "diff": DIFF,
    "methods": _command(methods, "loramerge methods"),
    "layouts": _command(layouts, "loramerge layouts"),
    "env": _command(env, "loramerge env"),
}
