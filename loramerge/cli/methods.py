"""One click command per method and preset, its flags made from the method's declarations."""

import sys
from pathlib import Path
from typing import Any

import click

from loramerge.errors import UsageError, listed
from loramerge.options import Option
from loramerge.recipe import Named, find, make_recipe, options_of
from loramerge.registry import Method, Preset

__all__ = ["command"]


class Value(click.ParamType[object]):
    """A number or a word: converted here, judged by the declaration."""

    def __init__(self, option: Option) -> None:
        self.option = option
        self.name = option.range

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> object:
        """An int or float where the text is one, else the text."""
        if not isinstance(value, str) or value in self.option.words:
            return value
        for kind in (int, float):
            try:
                return kind(value) if self.option.type in (int, float) else value
            except ValueError:
                continue
        return value


def command(name: str) -> click.Command:
    """The command of a method or a preset."""
    method, preset = find(name)
    preset_values = preset.values if preset else {}
    options = [_flag(o) for o in options_of(method) if o.name not in preset_values]
    many = method.takes == "many"

    def callback(**given: Any) -> None:
        _run(name, method, given)

    return click.Command(
        name,
        callback=callback,
        params=[_adapters(many), *(_WEIGHTS if many else ()), *options, *_output(many)],
        help=_help(method, preset),
        short_help=preset.summary if preset else method.summary,
        epilog=f"Example: {method.example if not preset else _example(preset)}",
    )


def _example(preset: Preset) -> str:
    return f"loramerge {preset.name} a b"


def _help(method: Method, preset: Preset | None) -> str:
    if preset:
        values = " ".join(f"--{key} {value}" for key, value in preset.values.items())
        return f"{preset.summary}\n\nThe same as: loramerge {method.name} {values}"
    return f"{method.documentation}\n\n{method.paper}"


def _flag(option: Option) -> click.Option:
    names = [option.name, option.flag] + ([option.short] if option.short else [])
    kind = click.Choice(option.choices) if option.choices else Value(option)
    default = "" if option.default in (None, ()) else f"  [default: {option.default}]"
    return click.Option(
        names,
        type=kind,
        multiple=option.repeated,
        default=None,
        help=option.description + default,
        metavar=None if option.choices else option.range.upper().replace(" ", ""),
    )


def _adapters(many: bool) -> click.Argument:
    return click.Argument(["adapters"], nargs=-1, required=many, metavar="ADAPTER...")


_WEIGHTS = (
    click.Option(
        ["-w", "--weight", "weight"],
        type=float,
        multiple=True,
        help="Weight of each adapter, in their order; may be negative.  [default: 1 each]",
    ),
)


def _output(many: bool) -> list[click.Option]:
    batch = (
        []
        if many
        else [
            click.Option(
                ["--out-dir"],
                type=click.Path(),
                help="Directory for the results of several adapters.",
            )
        ]
    )
    return [
        click.Option(
            ["--alpha"],
            type=float,
            multiple=True,
            help="lora_alpha of each adapter, for bare files that do not say it.",
        ),
        click.Option(
            ["-o", "--out"],
            type=click.Path(),
            help="Output directory, or one file where it ends in .safetensors.",
        ),
        *batch,
        click.Option(["-f", "--force"], is_flag=True, help="Replace an existing output."),
        click.Option(
            ["--dry-run"], is_flag=True, help="Show the plan; read headers only, write nothing."
        ),
        click.Option(
            ["--json", "as_json"], is_flag=True, help="Print the report as JSON on stdout."
        ),
        click.Option(["-q", "--quiet"], is_flag=True, help="Print only the output path."),
    ]


def _run(name: str, method: Method, given: dict[str, Any]) -> None:
    adapters = list(given.pop("adapters"))
    flags = {key: given.pop(key) for key in ("out", "force", "dry_run", "as_json", "quiet")}
    out_dir, alphas = given.pop("out_dir", None), given.pop("alpha")
    weights = given.pop("weight", ())
    values = {key: value for key, value in given.items() if value is not None and value != ()}
    if not adapters:
        adapters = [_here(name)]
    if method.takes == "one" and len(adapters) > 1:
        if out_dir is None or flags["out"]:
            raise UsageError(
                f"{name} takes one adapter, or several with --out-dir DIR.",
                f"for example: loramerge {name} {' '.join(adapters[:2])} --rank 8 --out-dir small",
            )
        for position, adapter in enumerate(adapters):
            alpha = alphas[position : position + 1] if len(alphas) > 1 else alphas
            _one(name, _named([adapter], (), alpha), values, flags, out_dir)
        return
    _one(name, _named(adapters, weights, alphas), values, flags, out_dir)


def _named(
    adapters: list[str], weights: tuple[float, ...], alphas: tuple[float, ...]
) -> list[Named]:
    """Adapters with their weights and alphas. Raises UsageError for a count that does not fit."""
    if weights and len(weights) != len(adapters):
        raise UsageError(
            f"{len(weights)} weights for {len(adapters)} adapters: give one -w for each."
        )
    if len(alphas) > 1 and len(alphas) != len(adapters):
        raise UsageError(
            f"{len(alphas)} alphas for {len(adapters)} adapters: give one, or one each."
        )
    factors = weights or (1.0,) * len(adapters)
    stated = alphas * len(adapters) if len(alphas) == 1 else alphas or (None,) * len(adapters)
    return [Named(a, w, s) for a, w, s in zip(adapters, factors, stated, strict=True)]


def _here(name: str) -> str:
    """The adapter of the current directory. Raises UsageError where none, or no telling."""
    if Path("adapter_config.json").is_file():
        found = "."
    else:
        files = sorted(path.name for path in Path().glob("*.safetensors"))
        if not files:
            raise UsageError(
                "there is no adapter in this directory.",
                f"name one: loramerge {name} my-adapter --rank 8",
            )
        if len(files) > 1:
            raise UsageError(
                f"this directory holds {len(files)} safetensors files: {listed(files)}.",
                f"name one: loramerge {name} {files[0]} --rank 8",
            )
        found = files[0]
    sys.stderr.write(f"{name}: {Path(found).resolve().name if found == '.' else found}\n")
    return found


def _one(
    name: str,
    named: list[Named],
    values: dict[str, object],
    flags: dict[str, Any],
    out_dir: str | None,
) -> None:
    from loramerge.cli import ui
    from loramerge.io._open import open_adapter
    from loramerge.plan import make_plan
    from loramerge.publish import default_name, destination, publish

    recipe = make_recipe(name, named, values)
    plan = make_plan(recipe, [open_adapter(one.reference, one.alpha) for one in named])
    out = str(Path(out_dir) / default_name(plan)) if out_dir else flags["out"]
    final = destination(plan, out, flags["force"])
    if flags["dry_run"]:
        ui.show_plan(plan, final, flags["as_json"])
        return
    with ui.progress(flags["quiet"]) as listen:
        report = publish(plan, final, flags["force"], listen)
    ui.show_report(report, final, as_json=flags["as_json"], quiet=flags["quiet"])
