"""Commands that write several results, as a recipe file: one that writes them all again."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from loramerge.adapter import Adapter
from loramerge.io._open import open_adapter
from loramerge.io._yaml import read_yaml
from tests.test_recipe_outputs import contents
from tests.typed import tree, typed


@pytest.fixture(autouse=True)
def here(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


SAVED = [
    ("split a --every 2 --alpha 8", "pieces"),
    ("split a --every 99 --out-dir one", "one"),
    ("split a --modules *q_proj --modules *up* --save-dtype bfloat16 --out-dir p", "p"),
    (
        "compare a b -w 1 -w -0.5 --methods ties,ties:density=0.5:lambda=2,dare --seed 3 --keep k",
        "k",
    ),
    ("squeeze a b c -r 2 --out-dir s", "s"),
]


@pytest.mark.parametrize(("line", "place"), SAVED)
def test_the_recipe_of_a_command_with_several_results_writes_all_its_bytes(
    here: Path, line: str, place: str
) -> None:
    done = typed(*line.split(), "--save-recipe", "s.yaml")
    assert done.code == 0, done.err
    found = contents(here / place)
    shutil.rmtree(place)
    again = typed("run", "s.yaml", "-q")
    assert again.code == 0, again.err
    assert found == contents(here / place)
    assert sorted(again.out.split()) == sorted(str(p) for p in Path(place).iterdir())


def test_a_saved_split_says_what_each_piece_is(here: Path) -> None:
    words = ("--modules", "*q_proj", "--modules", "layers.1.*", "--save-recipe", "s.yaml")
    assert typed("split", "./a", *words).code == 0
    assert read_yaml((here / "s.yaml").read_text(), "x") == {
        "steps": [
            {
                "method": "select",
                "adapters": ["./a"],
                "include": ["*q_proj"],
                "output": "pieces/modules-1",
            },
            {
                "method": "select",
                "adapters": ["./a"],
                "include": ["layers.1.*"],
                "exclude": ["*q_proj"],
                "output": "pieces/modules-2",
            },
            {
                "method": "select",
                "adapters": ["./a"],
                "exclude": ["*q_proj", "layers.1.*"],
                "output": "pieces/rest",
            },
        ]
    }


def test_a_comparison_that_keeps_nothing_has_no_recipe(here: Path) -> None:
    done = typed("compare", "a", "b", "--save-recipe", "s.yaml")
    assert (done.code, done.lines) == (
        2,
        [
            "error: compare writes nothing, of which there could be a recipe.",
            "hint: say where to store the merges: --keep merges",
        ],
    )
    assert not (here / "s.yaml").exists()


@pytest.mark.parametrize("line", [line for line, _ in SAVED])
def test_a_recipe_is_not_replaced_and_then_nothing_is_computed(here: Path, line: str) -> None:
    (here / "r.yaml").touch()
    before = tree(here)
    done = typed(*line.split(), "--save-recipe", "r.yaml")
    assert (done.code, done.lines[0]) == (1, "error: r.yaml exists.")
    assert tree(here) == before


@pytest.mark.parametrize(
    ("line", "recipe"),
    [
        ("squeeze a -r 2 -o out", "out/r.yaml"),
        ("squeeze a -r 2 -o out", "./out"),
        ("squeeze a b -r 2 --out-dir s", "s/b-r2/r.yaml"),
        ("convert a --to mlx -o out", "out/r.yaml"),
        ("split a --every 2", "pieces/ranks-0-1/r.yaml"),
        ("compare a b --methods cat --keep k", "k/cat/r.yaml"),
        ("reproduce made -o out", "out/r.yaml"),
        ("run r.yaml", "out/r.yaml"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_recipe_is_never_saved_where_an_output_would_replace_it(
    here: Path, line: str, recipe: str, there: bool
) -> None:
    assert typed("squeeze", "a", "-r", "2", "-o", "made").code == 0
    (here / "r.yaml").write_text("method: cat\nadapters: [a, b]\noutput: out\n")
    if there and Path(recipe).name == "r.yaml":
        shutil.copytree("made", Path(recipe).parent)
    before = tree(here)
    done = typed(*line.split(), "-f", "--save-recipe", recipe)
    assert (done.code, done.out, tree(here)) == (2, "", before)
    assert done.lines[1] == "hint: save the recipe beside what is written"


def test_a_source_of_several_steps_is_opened_once(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def counted(reference: str, alpha: float | None = None, **told: Any) -> Adapter:
        opened.append(reference)
        return open_adapter(reference, alpha, **told)

    monkeypatch.setattr("loramerge.io._open.open_adapter", counted)
    assert typed("split", "a", "--every", "1", "--save-recipe", "s.yaml").code == 0
    opened.clear()
    assert typed("run", "s.yaml", "--dry-run", "-f").code == 0
    assert opened == ["a"]
