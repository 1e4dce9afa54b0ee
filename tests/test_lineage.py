"""The way of a result as a recipe file, which makes the same bytes."""

import shutil
from pathlib import Path

import pytest

from loramerge.io._yaml import read_yaml
from tests.build import write_peft
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.test_recipes_run import LINES, THREE
from tests.typed import typed


@pytest.fixture(autouse=True)
def here(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c and the recipe of three steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(THREE)
    return tmp_path


@pytest.mark.parametrize("line", ["run r.yaml", *LINES])
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


def test_a_conversion_has_no_recipe(here: Path) -> None:
    typed("convert", "a", "--to", "mlx", "-o", "out")
    done = typed("reproduce", "out", "--save-recipe", "way.yaml")
    assert (done.code, done.lines[0]) == (2, "error: A conversion is no step of a recipe.")
    assert not (here / "way.yaml").exists()
