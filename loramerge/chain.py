"""Steps one after another: planned from headers alone, then computed, each on what came before."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec.structs import replace

from loramerge.adapter import Adapter, public_base
from loramerge.errors import IncompatibleError, LoramergeError
from loramerge.io._open import open_adapter
from loramerge.io._write import start_file
from loramerge.plan import Plan, make_plan
from loramerge.result import result_name
from loramerge.workflow import Workflow

__all__ = ["outline", "plans"]

# Tensors up to this many bytes are facts that a reader of headers looks at, such as an alpha.
FACT = 8


def plans(
    workflow: Workflow, adapters: Sequence[Adapter], made: Callable[[Plan], Adapter]
) -> Iterator[Plan]:
    """The plan of every step; `made` gives the result of one when the next is planned.

    `adapters` are those of `workflow.sources`. Raises what make_plan raises, naming the step.
    """
    _check_base(workflow, adapters)
    results: dict[str | None, Adapter] = {}
    given = iter(adapters)
    for number, step in enumerate(workflow.steps, 1):
        names = [named.reference for named in step.recipe.adapters]
        inputs = [results[name] if name in results else next(given) for name in names]
        try:
            plan = make_plan(step.recipe, inputs)
        except LoramergeError as error:
            if len(workflow.steps) > 1:
                error.message = f"step {number} ({step.recipe.method.name}): {error.message}"
            raise
        yield plan
        if number < len(workflow.steps):
            results[step.name] = made(plan)


def _check_base(workflow: Workflow, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if workflow.base_model and adapter.base_model not in (None, workflow.base_model):
            raise IncompatibleError(
                f"{adapter.reference} is for {public_base(adapter) or 'a local base model'}; the "
                f"recipe says base_model: {workflow.base_model}.",
                "leave base_model out to merge all the same",
            )


def outline(plan: Plan, directory: Path) -> Adapter:
    """The result of a plan as far as its header goes: a file in `directory` full of holes.

    Where ranks are chosen from singular values, they are at most these.
    """
    directory.mkdir()
    path, written = directory / plan.layout.weights, plan.written(plan.ranks)
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
    return replace(open_adapter(str(path)), reference=result_name(plan))
