"""Steps one after another: planned from headers alone, then computed, each on what came before."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter, public_base
from loramerge.conversion import Conversion, conversion_name, plan_translation
from loramerge.derivation import Derivation
from loramerge.derive import difference, undecomposed
from loramerge.errors import IncompatibleError, LoramergeError
from loramerge.io._checkpoint import open_checkpoint
from loramerge.io._open import open_adapter
from loramerge.io._write import start_file
from loramerge.plan import Plan, make_plan
from loramerge.publish import destination
from loramerge.result import result_name
from loramerge.translation import Translation
from loramerge.workflow import Workflow

__all__ = ["Places", "converted_adapter", "outline", "place_of", "plan_derivation", "plans"]

# Tensors up to this many bytes are facts that a reader of headers looks at, such as an alpha.
FACT = 8


class Places(Struct, frozen=True):
    """Where conversions go: the last step to `out`, those before it below the directory `held`."""

    out: str | None
    held: Path
    force: bool = False
    allow_pickle: bool = False


def plans(
    workflow: Workflow,
    adapters: Sequence[Adapter],
    places: Places,
    made: Callable[[Plan | Conversion], Adapter],
) -> Iterator[Plan | Conversion]:
    """The plan of every step; `made` gives the result of one when the next is planned.

    `adapters` are those of `workflow.sources`. Raises what make_plan and plan_conversion raise,
    naming the step.
    """
    _check_base(workflow, adapters)
    results: dict[str | None, Adapter] = {}
    given = iter(adapters)
    for number, step in enumerate(workflow.steps, 1):
        names = [named.reference for named in step.recipe.adapters]
        inputs = [results[name] if name in results else next(given) for name in names]
        last = number == len(workflow.steps)
        try:
            if isinstance(step.recipe, Translation):
                plan: Plan | Conversion = _conversion(
                    step.recipe, inputs, places, None if last else str(number)
                )
            elif isinstance(step.recipe, Derivation):
                plan = plan_derivation(step.recipe, inputs)
            else:
                plan = make_plan(step.recipe, inputs)
        except LoramergeError as error:
            if len(workflow.steps) > 1:
                error.message = f"step {number} ({step.recipe.name}): {error.message}"
            raise
        yield plan
        if not last:
            results[step.name] = made(plan)


def _conversion(
    asked: Translation, inputs: Sequence[Adapter], places: Places, below: str | None
) -> Conversion:
    """The plan of a conversion; of one that a later step takes, `below` a directory of its own."""
    out = places.out
    if below is not None:
        out = str(places.held / below / conversion_name(inputs[0], asked.to))
    return plan_translation(
        asked, inputs, out, force=places.force, allow_pickle=places.allow_pickle
    )


def plan_derivation(asked: Derivation, inputs: Sequence[Adapter]) -> Plan:
    """The squeeze of what follows from the models."""
    base = open_checkpoint(asked.base)
    if asked.tuned is None:
        (adapter,) = inputs
        derived = undecomposed(adapter, base)
    else:
        derived = difference(base, open_checkpoint(asked.tuned), asked.tuned)
    return make_plan(asked.squeeze, [derived])


def place_of(plan: Plan | Conversion, out: str | None, force: bool) -> Path:
    """Where the last result goes; checked before anything is computed."""
    return plan.final if isinstance(plan, Conversion) else destination(plan, out, force)


def converted_adapter(plan: Conversion) -> Adapter:
    """What was converted, as an input of the next step."""
    return replace(open_adapter(str(plan.final)), reference=plan.final.name)


def _check_base(workflow: Workflow, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if workflow.base_model and adapter.base_model not in (None, workflow.base_model):
            raise IncompatibleError(
                f"{adapter.reference} is for {public_base(adapter) or 'a local base model'}; the "
                f"recipe says base_model: {workflow.base_model}.",
                "leave base_model out to merge all the same",
            )


def outline(plan: Plan | Conversion, directory: Path) -> Adapter:
    """The result of a plan as far as its header goes: a file in `directory` full of holes.

    Where ranks are chosen from singular values, they are at most these.
    """
    directory.mkdir()
    path = directory / plan.layout.weights
    if isinstance(plan, Conversion):
        name, written = plan.final.name, plan.layout.write(plan.draft)
    else:
        name, written = result_name(plan), plan.written(plan.ranks)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        writer = start_file(descriptor, written)
        for stored in written.tensors:
            start, stop = writer.offsets[stored.key]
            if stored.part is None and stop - start <= FACT:
                writer.write(stored.key, stored.content())
    finally:
        os.close(descriptor)
    for companion, content in written.companions.items():
        (directory / companion).write_bytes(content)
    return replace(open_adapter(str(path)), reference=name)
