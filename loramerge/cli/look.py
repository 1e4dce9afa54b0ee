"""Commands that only look: inspect, methods, layouts, env. None of them reads a tensor."""

import json
from collections import Counter
from typing import Any

import click

from loramerge.adapter import Adapter

__all__ = ["COMMANDS", "card"]

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command(epilog="Example: loramerge inspect my-adapter")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER...")
@click.option("--modules", is_flag=True, help="List every module.")
@JSON
def inspect(adapters: tuple[str, ...], modules: bool, as_json: bool) -> None:
    """Show the identity card of adapters: layout, base, ranks, scale, dtypes; headers only."""
    from loramerge.io._open import open_adapter

    cards = [card(open_adapter(reference), modules) for reference in adapters]
    if as_json:
        found = cards[0] if len(cards) == 1 else cards
        click.echo(json.dumps(found, indent=1, ensure_ascii=False))
        return
    for one in cards:
        _print(one)


def card(adapter: Adapter, modules: bool = False) -> dict[str, Any]:
    """What the header and the config say, as one JSON object."""
    found = list(adapter.modules.values())
    parameters = sum(module.rank * sum(module.shape) for module in found)
    result: dict[str, Any] = {
        "adapter": adapter.reference,
        "layout": adapter.layout,
        "base_model": adapter.base_model,
        "modules": len(found),
        "kinds": dict(Counter(module.kind for module in found)),
        "targets": dict(
            sorted(Counter(module.name.rpartition(".")[2] for module in found).items())
        ),
        "ranks": {str(k): v for k, v in sorted(Counter(module.rank for module in found).items())},
        "scalings": {f"{k:g}": v for k, v in sorted(Counter(m.scaling for m in found).items())},
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
            m.name: {"kind": m.kind, "shape": list(m.shape), "rank": m.rank, "scaling": m.scaling}
            for m in found
        }
    return result


def _print(one: dict[str, Any]) -> None:
    width = max(len(key) for key in one)
    for key, value in one.items():
        if key == "each":
            for name, facts in value.items():
                shape = "x".join(map(str, facts["shape"]))
                click.echo(
                    f"  {name}  {facts['kind']} {shape}  r={facts['rank']}  x{facts['scaling']:g}"
                )
        elif value not in (None, {}, [], False):
            click.echo(f"{key.replace('_', ' '):{width}}  {_text(value)}")
    click.echo()


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} ({count})" for key, count in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


@click.command(epilog="Example: loramerge methods")
@JSON
def methods(as_json: bool) -> None:
    """List every method: what it does, its paper, an example."""
    from loramerge.registry import methods as registered

    if as_json:
        rows = [
            {
                "name": m.name,
                "takes": m.takes,
                "summary": m.summary,
                "paper": m.paper,
                "example": m.example,
            }
            for m in registered().values()
        ]
        click.echo(json.dumps(rows, indent=1))
        return
    for method in registered().values():
        click.echo(f"{method.name:12} {method.summary}")
        click.echo(f"{'':12} {method.paper}   {method.example}")
        for preset in method.presets:
            click.echo(f"  {preset.name:10} {preset.summary}")


@click.command(epilog="Example: loramerge layouts")
@JSON
def layouts(as_json: bool) -> None:
    """List the layouts that are read and written, and those only recognised."""
    from loramerge.io._foreign import FOREIGN
    from loramerge.io._open import layouts as known

    if as_json:
        rows = [{"name": found.name, "summary": found.summary} for found in known()]
        click.echo(json.dumps({"read": rows, "recognised": [f.name for f in FOREIGN]}, indent=1))
        return
    for found in known():
        click.echo(f"{found.name:12} {found.summary}")
    click.echo("\nRecognised and refused by name: " + ", ".join(f.name for f in FOREIGN) + ".")


@click.command(epilog="Example: loramerge env")
@JSON
def env(as_json: bool) -> None:
    """Show versions and devices, for a bug report."""
    import os
    import platform
    from importlib.metadata import PackageNotFoundError, version

    def found(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    packages = (
        "loramerge",
        "numpy",
        "torch",
        "scikit-learn",
        "safetensors",
        "click",
        "rich",
        "msgspec",
    )
    facts = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": os.cpu_count(),
        **{package: found(package) for package in packages},
        "device": _device(),
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for key, value in facts.items():
        click.echo(f"{key:12}  {value}")


def _device() -> str:
    from loramerge._lazy import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "mps" if torch.backends.mps.is_available() else "cpu"


COMMANDS: dict[str, click.Command] = {
    "inspect": inspect,
    "methods": methods,
    "layouts": layouts,
    "env": env,
}
