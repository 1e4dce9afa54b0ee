"""A recipe file: methods, one after another, on adapters and on each other's results.

The keys of a step are those of flags and Python keywords, flat, beside `method`, `adapters` and a
`name` by which a later step takes its result. One step stands at the top of the file; several
stand in a list, `steps`. `output` is where the result of its step goes, or, at the top, the last.
"""

import re
from collections.abc import Mapping

from msgspec import Struct, field
from msgspec.structs import replace

from loramerge.errors import UsageError
from loramerge.io._open import layout
from loramerge.io._yaml import Value
from loramerge.mergekit import Problem, translated
from loramerge.options import Option, OptionError, did_you_mean
from loramerge.recipe import Named, find, make_recipe
from loramerge.steps import KINDS, Asked, step_options
from loramerge.translation import Translation

__all__ = ["NAME", "OF_FILE", "OF_STEP", "Step", "Workflow", "make_workflow"]

# The keys that are no options, of a step and of a whole file.
OF_STEP = ("name", "method", "adapters", "output")
OF_FILE = ("steps", "output", "base_model", "$schema")
OF_ADAPTER = ("reference", "weight", "alpha", "from")
# A result is named like a word, so that anything with a slash or a suffix is a path.
NAME = re.compile(r"[A-Za-z_][\w-]*", re.ASCII)
# What to do about a result that nothing takes.
WRITTEN = "give it an output to write it"


class Step(Struct, frozen=True):
    """One method or command, on adapters or on the results of earlier steps, by their names."""

    recipe: Asked
    name: str | None = None
    output: str | None = None


class Workflow(Struct, frozen=True):
    """The steps of a recipe file, checked; `base_model` is what every adapter must be for."""

    steps: tuple[Step, ...]
    base_model: str | None = None

    @property
    def sources(self) -> list[Named]:
        """Every adapter that is no result of a step, as often as it is named."""
        names = {step.name for step in self.steps}
        named = (one for step in self.steps for one in step.recipe.adapters)
        return [one for one in named if one.reference not in names]

    def ending(self, output: str) -> "Workflow":
        """The same steps, the result of the last of them written to `output`."""
        *steps, last = self.steps
        return replace(self, steps=(*steps, replace(last, output=output)))


def make_workflow(found: Value, where: str) -> Workflow:
    """Check a document. Raises UsageError that names every problem by its path in the file."""
    reader = _Reader()
    workflow = reader.workflow(found)
    problems = reader.problems
    if not problems and workflow is not None:
        return workflow
    if len(problems) == 1:
        path, text, hint = problems[0]
        raise UsageError(f"{where}: {path} {text}.", hint or "see: loramerge run --help")
    told = (f"{p} {text} ({hint})" if hint else f"{p} {text}" for p, text, hint in problems)
    raise UsageError(
        f"{where} has {len(problems)} problems: {'; '.join(told)}.", "see: loramerge run --help"
    )


class _Reader(Struct):
    """Reads a document and collects what is wrong with it."""

    problems: list[Problem] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def refuse(self, path: str, text: str, hint: str | None = None) -> None:
        self.problems.append((path, text, hint))

    def workflow(self, found: Value) -> Workflow | None:
        if not isinstance(found, dict):
            self.refuse("$", "is no mapping", "for example: method: ties")
            return None
        found = translated(found, "$", self.problems)
        if found is None:
            return None
        output, base = (self.text(found, "$", key) for key in ("output", "base_model"))
        own = {key: value for key, value in found.items() if key not in OF_FILE}
        if "steps" not in found:
            steps = [self.step(own, "$")]
        else:
            for key in own:
                self.refuse(f"$.{key}", "belongs to a step", f"for example: steps[0].{key}")
            listed = found["steps"]
            if not isinstance(listed, list) or not listed:
                self.refuse("$.steps", "is no list of steps", "for example: - method: ties")
                return None
            steps = [self.nested(one, f"$.steps[{place}]") for place, one in enumerate(listed)]
        workflow = Workflow(tuple(step for step in steps if step is not None), base)
        if self.problems:
            return None
        self.check_use(workflow.steps)
        if output is None:
            return workflow
        if workflow.steps[-1].output is not None:
            self.refuse("$.output", "is for the last step, which has an output", "leave one out")
        return workflow.ending(output)

    def nested(self, found: Value, path: str) -> Step | None:
        if not isinstance(found, dict):
            self.refuse(path, "is no mapping", "for example: - method: ties")
            return None
        found = translated(found, path, self.problems)
        if found is None:
            return None
        if misplaced := [key for key in found if key in OF_FILE and key not in OF_STEP]:
            for key in misplaced:
                self.refuse(f"{path}.{key}", "belongs to the whole recipe", "move it to the top")
            found = {key: value for key, value in found.items() if key not in misplaced}
        return self.step(found, path)

    def step(self, found: Mapping[str, Value], path: str) -> Step | None:
        """One step; the names of earlier ones are known."""
        known = len(self.problems)
        adapters = self.adapters(found, path)
        method = self.text(found, path, "method")
        name, output = (self.text(found, path, key) for key in ("name", "output"))
        if "method" not in found:
            self.refuse(f"{path}.method", "is missing", "see: loramerge methods")
            return None
        recipe = self.recipe(method, adapters, found, path, known) if method is not None else None
        if name is not None:
            if not NAME.fullmatch(name):
                self.refuse(f"{path}.name", f"is {name!r}; it must be one word of letters, _ and -")
            if name in self.names:
                self.refuse(f"{path}.name", f"is {name!r}, as that of an earlier step")
            self.names.append(name)
        return Step(recipe, name, output) if recipe is not None else None

    def recipe(
        self, method: str, adapters: list[Named], found: Mapping[str, Value], path: str, known: int
    ) -> Asked | None:
        """The recipe of a step with `known` problems before it; every refused option is told."""
        try:
            options = {option.key: option for option in step_options(method)}
        except UsageError as error:
            close = did_you_mean(method, KINDS)
            hint = f"did you mean '{close}'?" if close else error.hint
            self.refuse(f"{path}.method", f"is '{method}', no method", hint)
            return None
        if method in KINDS or find(method)[0].takes == "one":
            for place, named in enumerate(adapters):
                if named.weight != 1:
                    self.refuse(f"{path}.adapters[{place}].weight", f"is nothing {method} takes")
        values = {
            (options[key].name if key in options else key): _value(options.get(key), value)
            for key, value in found.items()
            if key not in OF_STEP
        }
        for key in [key for key in values if key in found and key not in options]:
            close = did_you_mean(key, [*options, *OF_STEP])
            hint = f"did you mean '{close}'?" if close else f"see: loramerge {method} --help"
            self.refuse(f"{path}.{key}", f"is no option of {method}", hint)
            del values[key]
        while True:
            try:
                if method not in KINDS:
                    return make_recipe(method, adapters, values)
                return self.other(KINDS[method].make(adapters, values), path)
            except OptionError as error:
                self.refuse(f"{path}.{error.name.strip('_')}", error.text, error.hint)
                del values[error.name]
            except UsageError as error:
                if len(self.problems) == known:  # or it follows from what was told already
                    self.refuse(f"{path}:", error.message.rstrip("."), error.hint)
                return None

    def other(self, made: Asked, path: str) -> Asked:
        """A step that is no method; of a result nothing is kept elsewhere."""
        first = made.adapters[0] if isinstance(made, Translation) else None
        if first and first.shared is not None and first.reference in self.names:
            self.refuse(
                f"{path}.shared", f"is for files; {first.reference} is the result of a step"
            )
        return made

    def adapters(self, found: Mapping[str, Value], path: str) -> list[Named]:
        given = found.get("adapters", [])
        several = given if isinstance(given, list) else [given]
        made = (self.adapter(one, f"{path}.adapters[{i}]") for i, one in enumerate(several))
        return [named for named in made if named is not None]

    def adapter(self, found: Value, path: str) -> Named | None:
        """One input: a reference, or a mapping with its weight, alpha and layout."""
        if isinstance(found, str) and found:
            return Named(found)
        if not isinstance(found, dict):
            self.refuse(path, f"is {found!r}; it must be a path, a reference or a step")
            return None
        for key in found:
            if key not in OF_ADAPTER:
                close = "from" if key == "layout" else did_you_mean(key, OF_ADAPTER)
                self.refuse(f"{path}.{key}", "is unknown", f"did you mean '{close or 'weight'}'?")
        reference = self.text(found, path, "reference")
        weight, alpha = (self.number(found, path, key) for key in ("weight", "alpha"))
        named = self.layout(found, path)
        if alpha is not None and not alpha > 0:
            self.refuse(f"{path}.alpha", f"is {alpha:g}; it must be a number > 0")
        if reference is None:
            if "reference" not in found:
                self.refuse(f"{path}.reference", "is missing")
            return None
        for key, said in (("alpha", alpha), ("from", named)):
            if said is not None and reference in self.names:
                self.refuse(f"{path}.{key}", f"is for files; {reference} is the result of a step")
        return Named(reference, 1.0 if weight is None else weight, alpha, named)

    def layout(self, found: Mapping[str, Value], path: str) -> str | None:
        name = self.text(found, path, "from")
        try:
            return layout(name).name if name is not None else None
        except UsageError as error:
            self.refuse(f"{path}.from", f"is '{name}', no layout", error.hint)
            return None

    def text(self, found: Mapping[str, Value], path: str, key: str) -> str | None:
        value = found.get(key)
        if key in found and not (isinstance(value, str) and value):
            self.refuse(f"{path}.{key}", f"is {value!r}; it must be text")
            return None
        return str(value) if key in found else None

    def number(self, found: Mapping[str, Value], path: str, key: str) -> float | None:
        value = found.get(key)
        if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            return None if value is None else float(value)
        self.refuse(f"{path}.{key}", f"is {value!r}; it must be a number")
        return None

    def check_use(self, steps: tuple[Step, ...]) -> None:
        """Every result but the last is for a later step, or written."""
        used = {one.reference for step in steps for one in step.recipe.adapters}
        names = {step.name for step in steps if step.name}
        for place, step in enumerate(steps[:-1]):
            if step.output is not None:
                continue
            if step.name is None:
                said = "has no name for a later step to take its result"
                self.refuse(f"$.steps[{place}]", said, WRITTEN)
            elif step.name not in used:
                said = f"is used by no later step as {step.name!r}"
                self.refuse(f"$.steps[{place}]", said, WRITTEN)
        seen: set[str] = set()
        written: set[str] = set()
        for place, step in enumerate(steps):
            path = f"$.steps[{place}].adapters"
            for named in step.recipe.adapters:
                if named.reference in names - seen:
                    self.refuse(path, f"names {named.reference!r}, a later step")
                elif named.reference in written - seen:
                    said = f"names {named.reference!r}, where an earlier step writes"
                    self.refuse(path, said, "give that step a name, and take its result by it")
            seen.add(step.name or "")
            written.add(step.output or "")


def _value(option: Option | None, value: Value) -> object:
    """What a person may well write: one glob without its list, a size without quotes."""
    if option is not None and option.repeated and not isinstance(value, list | None):
        return [value]
    if option is not None and option.type is str and type(value) is int:
        return str(value)
    return value
