"""Steps one after another: planned from headers alone, then computed, each on what came before."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from loramerge.adapter import Adapter, public_base
from loramerge.conversion import SINGLE, Conversion, conversion_name, plan_translation
from loramerge.derivation import Derivation
from loramerge.derive import difference, undecomposed
from loramerge.errors import IncompatibleError, LoramergeError, OutputError
from loramerge.io._checkpoint import open_checkpoint
from loramerge.io._open import open_adapter
from loramerge.io._write import start_file
from loramerge.plan import Plan, make_plan
from loramerge.publish import check_apart, default_name, destination, free_place
from loramerge.translation import Translation
from loramerge.workflow import Step, Workflow

__all__ = ["Places", "Stage", "outline", "plan_derivation", "stages"]

# Tensors up to this many bytes are facts that a reader of headers looks at, such as an alpha.
FACT = 8


class Places(Struct, frozen=True):
    """Where results are held that only later steps take, and what may be done at the others."""

    held: Path
    force: bool = False
    allow_pickle: bool = False


class Stage(Struct, frozen=True):
    """A step that is planned; `final` is where its result goes, an output if it is `written`."""

    plan: Plan | Conversion
    final: Path
    written: bool

    @property
    def reference(self) -> str:
        """What the result is called as an input of the next step."""
        return str(self.final) if self.written else self.final.name

    def result(self) -> Adapter:
        """The result, once it is there."""
        return replace(open_adapter(str(self.final)), reference=self.reference)


def stages(
    workflow: Workflow,
    adapters: Sequence[Adapter],
    places: Places,
    made: Callable[[Stage], Adapter],
) -> Iterator[Stage]:
    """Every step, planned; `made` gives the result of one when the next is planned.

    `adapters` are those of `workflow.sources`. Raises what make_plan and plan_conversion raise,
    naming the step; OutputError where an output is taken or would replace one of the adapters, and
    UsageError where one is in the place of another.
    """
    _check_base(workflow, adapters)
    outputs = [Path(step.output).expanduser() for step in workflow.steps if step.output]
    _check_outputs(outputs, (), adapters, places.force)
    results: dict[str | None, Adapter] = {}
    given = iter(adapters)
    for number, step in enumerate(workflow.steps, 1):
        names = [named.reference for named in step.recipe.adapters]
        inputs = [results[name] if name in results else next(given) for name in names]
        last = number == len(workflow.steps)
        written = last or step.output is not None
        held = None if written else places.held / str(number)
        try:
            stage = _stage(step, inputs, places, held)
        except LoramergeError as error:
            if len(workflow.steps) > 1 and not isinstance(error, OutputError):
                error.message = f"step {number} ({step.recipe.name}): {error.message}"
            raise
        if last and step.output is None:
            _check_outputs([stage.final], outputs, adapters, places.force)
        yield stage
        if not last:
            results[step.name] = made(stage)


def _stage(step: Step, inputs: Sequence[Adapter], places: Places, held: Path | None) -> Stage:
    """The plan of a step, whose result is written unless there is a directory to be `held` in."""
    asked, out = step.recipe, step.output
    if isinstance(asked, Translation):
        if held is not None:
            out = str(held / conversion_name(inputs[0], asked.to))
        converting = plan_translation(
            asked, inputs, out, force=places.force, allow_pickle=places.allow_pickle
        )
        return Stage(converting, converting.final, held is None)
    if isinstance(asked, Derivation):
        plan = plan_derivation(asked, inputs)
    else:
        plan = make_plan(asked, inputs)
    if held is not None:
        out = str(held / default_name(plan))
    return Stage(plan, destination(plan, out, places.force), held is None)


def plan_derivation(asked: Derivation, inputs: Sequence[Adapter]) -> Plan:
    """The squeeze of what follows from the models."""
    base = open_checkpoint(asked.base)
    if asked.tuned is None:
        (adapter,) = inputs
        derived = undecomposed(adapter, base)
    else:
        derived = difference(base, open_checkpoint(asked.tuned), asked.tuned)
    return make_plan(asked.squeeze, [derived])


def _check_base(workflow: Workflow, adapters: Sequence[Adapter]) -> None:
    for adapter in adapters:
        if workflow.base_model and adapter.base_model not in (None, workflow.base_model):
            raise IncompatibleError(
                f"{adapter.reference} is for {public_base(adapter) or 'a local base model'}; the "
                f"recipe says base_model: {workflow.base_model}.",
                "leave base_model out to merge all the same",
            )


def _check_outputs(
    outputs: Sequence[Path], others: Sequence[Path], adapters: Sequence[Adapter], force: bool
) -> None:
    """Raise for outputs in the place of each other, of `others`, of adapters or of anything."""
    check_apart([*others, *outputs], "give each step an output beside the others")
    for output in outputs:
        free_place(adapters, str(output), force)


def outline(stage: Stage, directory: Path) -> Adapter:
    """The result of a step as far as its header goes: a file in `directory` full of holes.

    Where ranks are chosen from singular values, they are at most these.
    """
    plan, single = stage.plan, stage.final.suffix == SINGLE
    if isinstance(plan, Conversion):
        written = plan.layout.write(plan.draft)
    else:
        written = plan.written(plan.ranks)
    directory.mkdir()
    path = directory / (stage.final.name if single else plan.layout.weights)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    try:
        writer = start_file(descriptor, written)
        for stored in written.tensors:
            start, stop = writer.offsets[stored.key]
            if stored.part is None and stop - start <= FACT:
                writer.write(stored.key, stored.content())
    finally:
        os.close(descriptor)
    for companion, content in ({} if single else written.companions).items():
        (directory / companion).write_bytes(content)
    return replace(open_adapter(str(path)), reference=stage.reference)
