"""Options declared once: what flags, errors, help and bad values in tests are read from."""

from typing import Annotated, Literal

import pytest
from msgspec import Meta

from loramerge.errors import UsageError
from loramerge.options import Count, Factor, Option, Options, Share, build, describe, did_you_mean
from loramerge.recipe import Named, find, fixed, make_recipe, options_of, parse_size
from loramerge.registry import methods
from loramerge.settings import GROUPS, MergeSettings


class Sample(Options, frozen=True):
    """One option of every kind."""

    k: Annotated[Count | None, Meta(description="How many.")] = None
    restarts: Annotated[Count, Meta(description="Again.")] = 10
    density: Annotated[float, Meta(gt=0, le=1, description="Kept.")] = 0.2
    gauge: Annotated[Literal["svd", "raw"], Meta(description="Which.")] = "svd"
    scale: Annotated[Factor | Literal["auto"] | None, Meta(description="Long.")] = None
    energy: Annotated[Share | None, Meta(description="Share.")] = None
    only: Annotated[tuple[str, ...], Meta(description="Globs.", extra={"metavar": "GLOB"})] = ()
    device: Annotated[
        str, Meta(description="Where.", pattern="^(cpu|cuda)$", extra={"expected": "cpu or cuda"})
    ] = "cpu"
    lambda_: Annotated[float, Meta(description="Factor.")] = 1.0


FOUND = {option.name: option for option in describe(Sample)}


@pytest.mark.parametrize(
    ("name", "flag", "values", "limits", "range"),
    [
        ("k", "-k", "N", "N >= 1", "a whole number >= 1"),
        ("restarts", "--restarts", "N", "N >= 1", "a whole number >= 1"),
        ("density", "--density", "X", "0 < X <= 1", "a number > 0 and <= 1"),
        ("gauge", "--gauge", "svd|raw", "", "svd or raw"),
        ("scale", "--scale", "X|auto", "X > 0", "a number > 0 or auto"),
        ("energy", "--energy", "X", "0 < X <= 1", "a number > 0 and <= 1"),
        ("only", "--only", "GLOB", "", "text"),
        ("device", "--device", "TEXT", "", "cpu or cuda"),
        ("lambda_", "--lambda", "X", "", "a number"),
    ],
)
def test_a_declaration_says_flag_values_limits_and_range(
    name: str, flag: str, values: str, limits: str, range: str
) -> None:
    option = FOUND[name]
    assert (option.flag, option.values, option.limits, option.range) == (
        flag,
        values,
        limits,
        range,
    )


def test_every_option_keeps_its_sentence_also_where_its_type_is_annotated_already() -> None:
    sentences = [option.description for option in describe(Sample)]
    assert all(sentences), sentences


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"density": 0.0}, "x: --density is 0.0; it must be a number > 0 and <= 1."),
        ({"density": 1.1}, "x: --density is 1.1; it must be a number > 0 and <= 1."),
        ({"density": "1"}, "x: --density is '1'; it must be a number > 0 and <= 1."),
        ({"k": True}, "x: -k is True; it must be a whole number >= 1."),
        ({"k": 2.5}, "x: -k is 2.5; it must be a whole number >= 1."),
        ({"scale": "aut"}, "x: --scale is 'aut'; it must be a number > 0 or auto."),
        ({"device": "gpu"}, "x: --device is 'gpu'; it must be cpu or cuda."),
        ({"lambda_": float("nan")}, "x: --lambda is nan; it must be a number."),
        ({"scale": float("inf")}, "x: --scale is inf; it must be a number > 0 or auto."),
        ({"only": [1]}, "x: --only is [1]; it must be text."),
        ({"densty": 1}, "x has no option 'densty'."),
    ],
)
def test_a_bad_value_is_refused_with_its_option_value_and_range(
    values: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError) as caught:
        build(Sample, values, "x")
    assert str(caught.value) == message
    assert caught.value.hint


def test_a_whole_number_is_a_number_and_defaults_fill_the_rest() -> None:
    built = build(Sample, {"density": 1}, "x")
    assert (built.density, built.restarts, built.k) == (1.0, 10, None)


@pytest.mark.parametrize(
    ("name", "close"), [("densty", "density"), ("gauge", "gauge"), ("zzzz", None)]
)
def test_did_you_mean_offers_what_is_close(name: str, close: str | None) -> None:
    assert did_you_mean(name, FOUND) == close


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000),
        ("20MB", 20_000_000),
        ("5MiB", 5 * 1024**2),
        ("300k", 300_000),
        ("1.5 GB", 1_500_000_000),
        ("2g", 2_000_000_000),
    ],
)
def test_a_size_is_read_in_decimal_and_binary_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MB", "0", "-5", "1.2.3MB", "20 parsecs", "5MBB", "1e3"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be bytes such as 20MB"):
        parse_size(text)


EVERY = [(name, option) for name, method in methods().items() for option in options_of(method)]


@pytest.mark.parametrize(
    ("name", "option"), [pytest.param(n, o, id=f"{n} {o.flag}") for n, o in EVERY]
)
def test_every_declared_option_has_a_sentence_a_group_and_a_default_in_its_range(
    name: str, option: Option
) -> None:
    method = methods()[name]
    own = {o.name for o in describe(method.options)}
    assert option.description.endswith(".")
    assert (option.group in GROUPS) is (option.name not in own)
    if option.default in (None, ()):
        return
    decided = option.name == "rank" and option.default == method.rank_option
    accepted = option.choices or option.words
    if isinstance(option.default, str):
        assert decided or not accepted or option.default in accepted


@pytest.mark.parametrize("name", list(methods()))
def test_no_flag_of_a_method_hides_a_shared_one(name: str) -> None:
    flags = [flag for o in options_of(methods()[name]) for flag in (o.flag, o.short) if flag]
    assert len(flags) == len(set(flags))


def test_a_preset_that_sets_a_bound_decides_every_bound() -> None:
    assert fixed(find("cat")[1]) == (
        "rank",
        "energy",
        "max_error",
        "size",
        "sv_ratio",
        "sv_cumulative",
        "sv_fro",
        "round_to",
        "allocate",
        "compat",
    )
    assert fixed(find("dare")[1]) == ("sparsify",)
    assert fixed(None) == ()


def test_a_value_a_preset_decides_is_refused_in_python_too() -> None:
    with pytest.raises(UsageError, match="cat is arithmetic --rank full; it takes no --rank"):
        make_recipe("cat", [Named("a")], {"rank": 3})


def test_the_canonical_recipe_holds_every_value_and_neither_device_nor_paths() -> None:
    recipe = make_recipe("arithmetic", [Named("/home/me/a", 0.5)], {"device": "cpu", "rank": 4})
    found = recipe.canonical()
    assert found["weights"] == [0.5]
    assert "device" not in found["settings"]
    assert set(found["settings"]) == set(MergeSettings.__struct_fields__) - {"device"}
    assert "/home" not in repr(found)
