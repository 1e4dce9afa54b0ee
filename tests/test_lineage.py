"""The way of a result as a recipe file, which makes the same bytes."""

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from loramerge.io._yaml import read_yaml
from tests.build import write_peft
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.test_recipes_run import LINES, THREE
from tests.typed import typed


def weights_of(place: Path) -> dict[str, bytes]:
    """The tensors of a result, whose record names what it was made from otherwise."""
    return {key: array.tobytes() for key, array in load_file(next(place.glob("*.safe*"))).items()}


@pytest.fixture(autouse=True)
def here(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c and the recipe of three steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(THREE)
    return tmp_path


@pytest.mark.parametrize("line", ["run r.yaml", "convert a --to mlx", *LINES])
def test_the_recipe_of_a_result_makes_its_bytes(here: Path, line: str) -> None:
    made = typed(*line.split(), "-q").out.strip()
    done = typed("reproduce", made, "--save-recipe", "way.yaml")
    assert done.code == 0, done.err
    single = (here / made).is_file()
    again = typed("run", "way.yaml", "-o", "again.safetensors" if single else "again")
    assert again.code == 0, again.err
    if single:
        assert (here / made).read_bytes() == (here / "again.safetensors").read_bytes()
    else:
        assert bytes_of(here / made) == bytes_of(here / "again")


def test_the_recipe_says_what_is_not_the_default_and_where_sources_are(here: Path) -> None:
    typed("run", "r.yaml", "-o", "out")
    (here / "deep").mkdir()
    shutil.move(here / "b", here / "deep" / "other")
    words = ("--sources", "deep", "--save-recipe", "way.yaml")
    assert typed("reproduce", "out", *words).code == 0
    found = read_yaml((here / "way.yaml").read_text(), "way.yaml")
    assert found == {
        "steps": [
            {
                "name": "step1",
                "method": "ties",
                "adapters": ["a", {"reference": "deep/other", "weight": -0.5}, "c"],
                "density": 0.6,
                "rank": 12,
                "save_dtype": "float32",
            },
            {"name": "step2", "method": "squeeze", "adapters": ["step1"], "energy": 0.95},
            {"method": "prune", "adapters": ["step2"], "threshold": 0.2, "shrink": "soft"},
        ]
    }


def test_a_stated_alpha_is_in_the_recipe(here: Path, rng: object) -> None:
    write_peft(here / "bare.safetensors", factors(rng, 4))
    typed("cat", "bare.safetensors", "--alpha", "12", "-o", "out")
    assert typed("reproduce", "out", "--save-recipe", "way.yaml").code == 0
    assert "alpha: 12" in (here / "way.yaml").read_text()
    assert typed("run", "way.yaml", "-o", "again").code == 0
    assert bytes_of(here / "out") == bytes_of(here / "again")


def test_a_conversion_on_the_way_is_a_step(here: Path) -> None:
    typed("convert", "a", "--to", "mlx", "--rename", "layers.=blocks.", "-o", "between")
    typed("squeeze", "between", "-r", "2", "-o", "out")
    (here / "between").rename(here / "a" / "hidden")
    assert typed("reproduce", "out", "--save-recipe", "way.yaml").code == 0
    assert read_yaml((here / "way.yaml").read_text(), "way.yaml") == {
        "steps": [
            {
                "name": "step1",
                "method": "convert",
                "adapters": ["a"],
                "to": "mlx",
                "rename": ["layers.=blocks."],
            },
            {"method": "squeeze", "adapters": ["step1"], "rank": 2},
        ]
    }
    assert typed("run", "way.yaml", "-o", "again").code == 0
    assert weights_of(here / "out") == weights_of(here / "again")


def test_a_conversion_that_was_kept_as_no_step_keeps_it_has_no_recipe(here: Path) -> None:
    typed("convert", "a", "--to", "mlx", "-o", "between.safetensors")
    typed("squeeze", "between.safetensors", "-r", "2", "-o", "out")
    (here / "between.safetensors").unlink()
    done = typed("reproduce", "out", "--save-recipe", "way.yaml")
    assert (done.code, done.lines[0]) == (
        2,
        "error: A step of a recipe keeps a conversion to mlx as a directory, which this one was "
        "not.",
    )
    assert not (here / "way.yaml").exists()
