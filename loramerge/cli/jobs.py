"""What a method's command does: check everything, then compute, then show."""

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from msgspec import Struct
from msgspec.structs import asdict

from loramerge.cli.command import those_set
from loramerge.cli.inputs import named_adapters, opened
from loramerge.cli.reporting import page_place, write_page
from loramerge.cli.saving import save_recipe
from loramerge.cli.sending import TOLD, Sending, sending
from loramerge.cli.sweep import show_sweep
from loramerge.errors import UsageError, listed
from loramerge.recipe import Named, make_recipe
from loramerge.registry import Method

if TYPE_CHECKING:
    from loramerge.plan import Plan

__all__ = ["run"]


class Wishes(Struct, frozen=True):
    """Where results go and how they are shown."""

    out: str | None
    out_dir: str | None
    force: bool
    dry_run: bool
    json: bool
    quiet: bool
    sweep: str | None
    save_recipe: str | None
    report: str | None
    push: Sending | None


def run(name: str, method: Method, given: dict[str, Any]) -> None:
    """Run one command line. Every job is planned before the first tensor is read."""
    from loramerge.cli import ui
    from loramerge.cli.planned import show_plans
    from loramerge.cli.progress import progress
    from loramerge.compute import own_process
    from loramerge.io._hub import fetch
    from loramerge.publish import publish

    own_process()
    context = click.get_current_context()
    typed = context.meta["typed"]
    adapters = list(given.pop("adapters"))
    said = given.pop("weight", ()), given.pop("alpha"), given.pop("from_")
    given["push"] = sending(name, **{key: given.pop(key) for key in TOLD})
    wishes = Wishes(**{key: given.pop(key, None) for key in Wishes.__struct_fields__})
    values = those_set(given)
    if not adapters and method.takes == "one":
        adapters = [_here(name, typed, wishes.quiet)]
    inputs = named_adapters(adapters, *said)
    if wishes.sweep is not None:
        show_sweep(name, method, inputs, values, asdict(wishes))
        return
    shared = _split(name, method, inputs, wishes, typed)
    jobs = _planned(name, shared, values, wishes)
    place = page_place(name, wishes.report, wishes.out_dir, wishes.force)
    if wishes.push is not None and not wishes.dry_run:
        if wishes.out_dir is not None:
            raise UsageError(f"{name} --push sends one result.", "leave out --out-dir")
        wishes.push.check()
    if wishes.save_recipe is not None:
        from loramerge.document import recipe_document

        finals = [final for _, final in jobs]
        steps = [
            recipe_document(
                name, named, values, str(Path(below, final.name)) if below else wishes.out
            )
            for (named, below), final in zip(shared, finals, strict=True)
        ]
        save_recipe(wishes.save_recipe, steps, finals, wishes.force)
    if wishes.dry_run:
        show_plans(jobs, as_json=wishes.json, quiet=wishes.quiet)
        return
    shown = ui.Results(batch=wishes.out_dir is not None, as_json=wishes.json, quiet=wishes.quiet)
    with progress(wishes.quiet) as listen:
        fetch([adapter for plan, _ in jobs for adapter in plan.adapters], listen)
    for plan, final in jobs:
        with progress(wishes.quiet) as listen:
            report = publish(plan, final, wishes.force, listen)
        sent = wishes.push.send(report, final, wishes.quiet) if wishes.push else None
        write_page(place, report, wishes.force)
        shown.add(report, final, sent)
    shown.close()


def _here(name: str, typed: Sequence[str], quiet: bool) -> str:
    """The adapter of the current directory. Raises UsageError where none, or no telling."""
    if Path("adapter_config.json").is_file():
        found = "."
    else:
        files = sorted(path.name for path in Path().glob("*.safetensors"))
        if len(files) != 1:
            holds = f"holds {len(files)} safetensors files: {listed(files)}"
            words = shlex.join([files[0] if files else "my-adapter", *typed])
            raise UsageError(
                f"this directory {holds if files else 'holds no adapter'}.",
                f"name one: loramerge {name} {words}",
            )
        found = files[0]
    if not quiet:
        sys.stderr.write(f"{name} {Path().resolve().name + '/' if found == '.' else found}\n")
    return found


def _split(
    name: str, method: Method, named: list[Named], wishes: Wishes, typed: Sequence[str]
) -> list[tuple[list[Named], str | None]]:
    """Which adapters become which result, with the directory it goes to."""
    if wishes.out is not None and wishes.out_dir is not None:
        raise UsageError(f"{name} takes only one of --out and --out-dir.", "leave one out")
    if method.takes == "many" or wishes.out_dir is None:
        if method.takes == "one" and len(named) > 1:
            if number := next((one.reference for one in named if _is_number(one.reference)), None):
                raise UsageError(
                    f"{name} takes one adapter, and {number} is none: numbers have options.",
                    f"for example: {method.example}",
                )
            raise UsageError(
                f"{name} takes one adapter, or several with --out-dir DIR.",
                f"for example: loramerge {name} {shlex.join(typed)} --out-dir small",
            )
        return [(named, None)]
    return [([one], wishes.out_dir) for one in named]


def _is_number(reference: str) -> bool:
    """Whether what stands in the place of an adapter is a number, and nothing of that name."""
    return re.fullmatch(r"\d*\.?\d+", reference) is not None and not Path(reference).exists()


def _planned(
    name: str,
    jobs: list[tuple[list[Named], str | None]],
    values: dict[str, object],
    wishes: Wishes,
) -> list[tuple["Plan", Path]]:
    """Every job as a plan and a free place for its result; options are judged before files."""
    from loramerge.plan import make_plan
    from loramerge.publish import check_apart, default_name, destination

    recipes = [make_recipe(name, named, values) for named, _ in jobs]
    every = [one for named, _ in jobs for one in named]
    adapters = iter(opened(every, look=wishes.dry_run))
    planned: list[tuple[Plan, Path]] = []
    for recipe, (named, directory) in zip(recipes, jobs, strict=True):
        plan = make_plan(recipe, [next(adapters) for _ in named])
        out = str(Path(directory) / default_name(plan)) if directory else wishes.out
        planned.append((plan, destination(plan, out, wishes.force)))
    check_apart(
        [final for _, final in planned], "rename the inputs, or run them one by one with -o"
    )
    return planned
