"""Globs on module names: fnmatch, and ranges of layer numbers."""

from fnmatch import fnmatchcase

import pytest

from loramerge.errors import UsageError
from loramerge.patterns import check_match, matches

NAMES = [f"model.layers.{i}.{leaf}_proj" for i in range(12) for leaf in ("q", "v")]
KOHYA = [f"lora_unet_down_blocks_{i}_attn_{j}_to_q" for i in range(4) for j in range(3)]


def layers(glob: str) -> list[int]:
    """The layers whose q_proj a glob matches."""
    return [i for i in range(12) if matches(f"model.layers.{i}.q_proj", glob)]


@pytest.mark.parametrize("name", [*NAMES, "Model.layers.1.q_proj", "a-b.0-7"])
@pytest.mark.parametrize(
    "glob", ["*", "*q_proj", "*.q_proj", "model.layers.1*", "*.[0-7].*", "*.[!0-7].*", "?odel*", ""]
)
def test_without_a_range_a_glob_is_the_one_of_fnmatch(name: str, glob: str) -> None:
    assert matches(name, glob) == fnmatchcase(name, glob)


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("model.layers.0-7.*", [0, 1, 2, 3, 4, 5, 6, 7]),
        ("*layers.9-10.q_proj", [9, 10]),
        ("*.1-1.*", [1]),
        ("*.0-99.*", [*range(12)]),
        ("*.7-0.*", []),
        ("model.layers.0-7", []),
        ("model.layers.x0-7.*", []),
        ("model.layers.[0-2].q_proj", [0, 1, 2]),
    ],
)
def test_a_range_is_every_number_from_the_first_to_the_last(glob: str, found: list[int]) -> None:
    assert layers(glob) == found


def test_two_ranges_are_each_a_range_of_their_own() -> None:
    glob = "*down_blocks_1-2_attn_0-1_*"
    found = [name for name in KOHYA if matches(name, glob)]
    assert found == [f"lora_unet_down_blocks_{i}_attn_{j}_to_q" for i in (1, 2) for j in (0, 1)]


def test_any_number_of_a_name_may_be_the_one_in_the_range() -> None:
    assert matches("blocks.30.experts.2.up", "*.0-7.*")
    assert not matches("blocks.30.experts.8.up", "*.0-7.*")
    assert not matches("blocks.30.experts.2.up", "blocks.0-7.*")


def test_a_range_is_a_whole_part_of_a_name() -> None:
    assert matches("layers.x0-7.q", "layers.x0-7.q")
    assert not matches("layers.x3.q", "layers.x0-7.q")


def test_numbers_of_any_length_are_read() -> None:
    assert matches("layers.007.q", "layers.0-7.q")
    assert not matches("layers." + "9" * 5000 + ".q", "layers.0-999999999.q")
    assert not matches("layers.1.q", "layers.0-" + "9" * 5000 + ".q")


@pytest.mark.parametrize(
    ("glob", "close"),
    [
        ("layers.0-7.", "*layers.0-7.*"),
        ("*layers.7-0.*", "*layers.0-7.*"),
        ("model.layers.3.", "model.layers.3.*"),
        ("layers.3.q_proj", "*layers.3.q_proj"),
        ("q_proj", "*.q_proj"),
        ("*.q_prjo", "*.q_proj"),
    ],
)
def test_a_glob_that_matches_nothing_is_refused_with_one_that_does(glob: str, close: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_match(glob, NAMES, "said")
    assert (refused.value.message, refused.value.hint) == ("said.", f"did you mean '{close}'?")
    assert any(matches(name, close) for name in NAMES)


def test_where_nothing_is_near_a_name_is_shown() -> None:
    with pytest.raises(UsageError) as refused:
        check_match("zzz", NAMES, "said")
    assert refused.value.hint == f"a module is called '{NAMES[0]}'"
