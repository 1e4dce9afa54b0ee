"""What every registered method declares. The suite grows by itself with every file that is one."""

import math
import re
import shlex
from ast import literal_eval
from collections import Counter
from collections.abc import Iterator

import click
import msgspec
import pytest

from loramerge.cli import cli
from loramerge.errors import UsageError
from loramerge.options import Option, Options, build, describe
from loramerge.recipe import Named, make_recipe, options_of
from loramerge.registry import Method, methods
from tests.variants import completed

each_method = pytest.mark.parametrize("method", methods().values(), ids=methods())


def bad_values(option: Option) -> Iterator[object]:
    """Values just outside the declared bounds, of another type, and words that are no choice."""
    if option.choices or option.expected != "text":
        yield "nonsense"
    elif option.type in (int, float):
        yield "nonsense"
        step = 1 if option.type is int else 1e-6
        outside = {"ge": -step, "gt": 0, "le": step, "lt": 0}
        yield from (bound + outside[key] for key, bound in option.bounds.items())
        yield from (0.5,) if option.type is int else (math.nan, math.inf, -math.inf)


def good_values(option: Option) -> Iterator[object]:
    """The default, every choice and word, and the bounds that are allowed themselves."""
    yield option.default
    yield from (*option.choices, *option.words)
    yield from (option.type(v) for key, v in option.bounds.items() if key in ("ge", "le"))


def cases(method: Method, own: bool) -> Iterator[tuple[Option, object]]:
    """Every option a command takes, the method's own or all, with every bad value for it."""
    for option in describe(method.options) if own else options_of(method):
        for value in bad_values(option):
            yield option, [value] if option.repeated else value


OWN = [(m, option, value) for m in methods().values() for option, value in cases(m, own=True)]
ALL = [(m, option, value) for m in methods().values() for option, value in cases(m, own=False)]


def named(case: object) -> str:
    return getattr(case, "name", repr(case))


@pytest.mark.parametrize(("method", "option", "bad"), OWN, ids=named)
def test_a_declaration_refuses_what_is_out_of_bounds(
    method: Method, option: Option, bad: object
) -> None:
    with pytest.raises(UsageError) as caught:
        build(method.options, {option.name: bad}, method.name)
    assert caught.value.exit_code == 2
    for words in (method.name, option.flag, option.range, repr(bad)):
        assert words in caught.value.message


@pytest.mark.parametrize(("method", "option", "bad"), ALL, ids=named)
def test_a_recipe_refuses_what_is_out_of_bounds(
    method: Method, option: Option, bad: object
) -> None:
    with pytest.raises(UsageError) as caught:
        make_recipe(method.name, [Named("a")], {option.name: bad})
    assert caught.value.exit_code == 2
    assert option.flag in caught.value.message
    assert option.range in caught.value.message


@each_method
def test_bounds_are_stated_in_the_range_of_every_option(method: Method) -> None:
    for option in options_of(method):
        for bound in option.bounds.values():
            assert f"{bound:.10g}" in option.range
        for word in (*option.choices, *option.words):
            assert word in option.range


@each_method
def test_defaults_choices_words_and_inclusive_bounds_are_accepted(method: Method) -> None:
    for option in describe(method.options):
        for value in good_values(option):
            values = msgspec.structs.asdict(completed(method, {option.name: value}))
            built = build(method.options, values, method.name)
            assert getattr(built, option.name) == value


@each_method
def test_a_misspelt_option_is_refused_with_the_closest_name(method: Method) -> None:
    for option in options_of(method):
        misspelt = option.name + "x"
        with pytest.raises(UsageError) as caught:
            make_recipe(method.name, [Named("a")], {misspelt: option.default})
        assert misspelt in caught.value.message
        if len(option.name) > 1:
            assert option.name in str(caught.value.hint)


@each_method
def test_own_options_do_not_clash_with_the_shared_settings(method: Method) -> None:
    taken = options_of(method)
    names = Counter(option.name for option in taken)
    flags = Counter(flag for o in taken for flag in (o.flag, o.short) if flag)
    assert set(names.values()) == set(flags.values()) == {1}


def _commands() -> list[str]:
    return cli.list_commands(click.Context(cli))


@pytest.mark.parametrize("name", _commands())
def test_no_flag_of_a_command_means_two_things(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    flags = Counter(f for p in command.params for f in (*p.opts, *p.secondary_opts))
    assert {flag for flag, times in flags.items() if times > 1} == set()


@each_method
def test_every_option_says_what_it_does_in_a_sentence(method: Method) -> None:
    for option in describe(method.options):
        assert re.search(r"[.)]$", option.description), option.name


@each_method
def test_the_docstring_starts_with_one_sentence_that_can_stand_in_a_table(method: Method) -> None:
    first = method.documentation.splitlines()[0]
    assert method.summary == first.strip()
    assert first.endswith(".")
    assert not first.startswith(" ")
    assert len(first) <= 100


@each_method
def test_a_paper_is_named(method: Method) -> None:
    assert re.fullmatch(r"(arXiv:\d{4}\.\d{4,5}|https://\S+)(, .+)?|ours", method.paper)


@each_method
def test_the_example_is_a_command_line_that_parses(method: Method) -> None:
    program, name, *arguments = shlex.split(method.example)
    assert (program, name) == ("loramerge", method.name)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    parsed = command.make_context(name, arguments).params
    own = {option.name for option in options_of(method)}
    values = {k: v for k, v in parsed.items() if k in own and v not in (None, ())}
    count = len(parsed["adapters"])
    assert count >= 1
    assert len(parsed.get("weight") or ()) in (0, count)
    recipe = make_recipe(name, [Named(adapter) for adapter in parsed["adapters"]], values)
    assert recipe.method is method


@each_method
def test_the_example_of_a_sweep_is_a_command_line_that_parses(method: Method) -> None:
    if method.sweep is None:
        return
    program, name, *arguments = shlex.split(method.sweep.example)
    assert (program, name) == ("loramerge", method.name)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    tried = command.make_context(name, arguments).params["sweep"].split(",")
    options = [{method.sweep.option: literal_eval(value)} for value in tried]
    assert len({build(method.options, values, name) for values in options}) == len(tried) > 1


@each_method
def test_options_cannot_be_changed_once_built(method: Method) -> None:
    assert issubclass(method.options, Options)
    assert method.options.__struct_config__.frozen
    assert method.options.__struct_config__.forbid_unknown_fields


@each_method
def test_the_rank_option_and_the_presets_name_options_that_exist(method: Method) -> None:
    own = {option.name for option in describe(method.options)}
    assert method.rank_option is None or method.rank_option in own
    known = {option.name for option in options_of(method)}
    for preset in method.presets:
        assert set(preset.values) <= known
        assert preset.summary.endswith(".")
        inputs = [Named("a"), Named("b")] if method.takes == "many" else [Named("a")]
        given = {} if method.takes == "many" or "rank" in preset.values else {"rank": 4}
        assert make_recipe(preset.name, inputs, given).method is method
