"""The inspect command: identity cards of adapters, from headers; their spectra, where asked for."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from loramerge.cli.command import Command, Flag
from loramerge.cli.flags import ADAPTERS, FORCE, INPUTS, SHOWN
from loramerge.cli.spectrum import plot, plot_place, spectrum_of, table
from loramerge.cli.terminal import Row, print_rows, print_table

if TYPE_CHECKING:
    from loramerge.adapter import Adapter

__all__ = ["INSPECT"]

# A scale that is stored beside the weights of an adapter on the Hub.
UNREAD = "unread"


def inspect(
    adapters: tuple[str, ...],
    modules: bool,
    spectrum: bool,
    plot_file: str | None,
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    force: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Show the identity card of adapters: layout, base, ranks, scale, dtypes.

    Only headers are read, unless --spectrum asks for the singular values of every delta weight:
    what each rank would keep of the whole (as `squeeze --rank` will report it), and of each module
    its singular values beside the largest, its stable rank ||dW||_F^2 / ||dW||_2^2, and the rank
    that keeps 99 % of its energy.
    """
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json

    place = plot_place(plot_file, len(adapters), force)
    spectrum = spectrum or place is not None
    found = opened(named_adapters(adapters, (), alpha, from_), look=not spectrum)
    cards = [_card(one, modules) for one in found]
    if spectrum:
        with progress(quiet or json) as listen:
            for one, facts in zip(found, cards, strict=True):
                facts["spectrum"] = spectrum_of(one, listen)
    if place is not None:
        plot(place, cards[0]["spectrum"]["modules"], force)
    if json:
        echo_json(cards[0] if len(cards) == 1 else {"adapters": cards})
        return
    for position, facts in enumerate(cards):
        if position:
            click.echo()
        print_rows(_card_rows(facts), err=False)
        if spectrum:
            print_table(*table(facts["spectrum"]["modules"]), words=2)


def _card(adapter: "Adapter", modules: bool = False) -> dict[str, Any]:
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
    from loramerge.cli.ui import in_bytes, percent

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
    if "spectrum" in one:
        kept = (f"{percent(share)} at {rank}" for rank, share in one["spectrum"]["energy"].items())
        rows.append(Row("energy", ", ".join(kept)))
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


INSPECT = Command(
    "inspect",
    callback=inspect,
    params=[
        ADAPTERS,
        Flag("modules", "--modules", is_flag=True, help="List every module."),
        Flag(
            "plot_file",
            "--plot-file",
            type=click.Path(),
            metavar="FILE.svg",
            help="Draw the spectra into this file: a curve for each module, beside its largest "
            "singular value.",
        ),
        Flag(
            "spectrum",
            "--spectrum",
            is_flag=True,
            help="Read the weights, and show singular values and what each rank would keep.",
        ),
        *INPUTS,
        FORCE,
        *SHOWN,
    ],
    help=inspect.__doc__,
    short_help="Show the identity card of adapters: layout, base, ranks, scale, dtypes.",
    example="loramerge inspect my-adapter",
)
