"""Results made again by way of conversions, pieces, and with what a base model was needed for."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import loramerge as lm
from tests.test_api import bytes_of
from tests.typed import shell, typed


@pytest.fixture(autouse=True)
def here(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
@pytest.mark.parametrize("to", ["mlx", "peft"])
def test_a_conversion_is_reproduced_to_the_byte(here: Path, to: str, out: str) -> None:
    assert typed("convert", "a", "--to", to, "-o", out).code == 0
    again = f"again{Path(out).suffix}"
    done = typed("reproduce", out, "-o", again)
    assert done.code == 0, done.err
    assert "the same tensors, bit for bit" in done.err
    if Path(out).suffix:
        assert (here / out).read_bytes() == (here / again).read_bytes()
    else:
        assert bytes_of(here / out) == bytes_of(here / again)


@pytest.mark.parametrize("between", ["between", "between.safetensors"])
def test_a_conversion_that_is_gone_is_made_again_on_the_way(here: Path, between: str) -> None:
    typed("convert", "a", "--to", "mlx", "-o", between)
    typed("squeeze", between, "-r", "2", "-o", "out")
    (here / between).rename(here / "a" / "hidden")
    assert typed("reproduce", "out", "-o", "again").code == 0
    assert bytes_of(here / "out") == bytes_of(here / "again")


def test_the_pieces_of_a_split_are_reproduced_from_where_it_was_typed(here: Path) -> None:
    pieces = typed("split", "a", "--every", "2").out.split()
    assert len(pieces) > 1
    for piece in pieces:
        assert typed("reproduce", piece, "-o", "again", "-f").code == 0
        assert bytes_of(here / piece) == bytes_of(here / "again")


@pytest.fixture
def models(here: Path, rng: np.random.Generator) -> None:
    """Two versions of the model that the adapter a is for: base and tuned."""
    shapes = {f"{name}.weight": module.shape for name, module in lm.load("a").modules.items()}
    for name in ("base", "tuned"):
        (here / name).mkdir()
        weights = {key: rng.standard_normal(shape).astype("f4") for key, shape in shapes.items()}
        save_file(weights, here / name / "model.safetensors")


def test_what_was_made_with_a_base_model_is_refused_with_what_makes_it_again(
    here: Path, models: None
) -> None:
    words = ("--rank", "2", "--save-dtype", "float16", "-o", "out")
    assert typed("extract", "base", "tuned", *words).code == 0
    done = typed("reproduce", "out")
    assert done.code == 1
    assert done.lines[0] == (
        "error: out cannot be made again from its record, which does not hold the sha256 of the "
        "second model that it was made from."
    )
    line = done.lines[1].removeprefix("hint: type: ")
    assert line == (
        "loramerge extract base tuned --rank 2 --save-dtype float16 -o again "
        "&& loramerge diff again out"
    )
    assert f"```sh\n{line.partition(' -o')[0]}\n```" in (here / "out" / "README.md").read_text()
    assert "reproduce" not in (here / "out" / "README.md").read_text()
    assert shell(line, here).code == 0
    assert bytes_of(here / "out") == bytes_of(here / "again")


def test_a_step_that_was_made_with_a_base_model_is_named_where_it_is_gone(
    here: Path, models: None
) -> None:
    typed("extract", "base", "tuned", "--rank", "2", "-o", "between")
    typed("squeeze", "between", "-r", "1", "-o", "out")
    assert typed("reproduce", "out").code == 0
    shutil.rmtree(here / "between")
    done = typed("reproduce", "out")
    assert done.code == 1
    assert "between cannot be made again" in done.lines[0]
    assert typed(*done.lines[1].removeprefix("hint: type: loramerge ").split()).code == 0
    assert typed("reproduce", "out").code == 0


@pytest.mark.parametrize("more", [(), ("--rename", "layers.=blocks.", "--alphas", "keep")])
def test_a_start_that_changed_the_base_counts_as_a_second_model(
    here: Path, more: tuple[str, ...]
) -> None:
    typed("scale", "a", "--factor", "3", "-o", "start")
    words = ("convert", "a", "--to", "peft", "--initial", "start", *more)
    assert typed(*words, "-o", "out").code == 0
    done = typed("reproduce", "out")
    assert done.code == 1
    assert done.lines[1].count("--to peft") == 1
    assert shell(done.lines[1].removeprefix("hint: type: "), here).code == 0
    assert bytes_of(here / "out") == bytes_of(here / "again")


def test_a_baked_model_is_refused_as_one(here: Path, models: None) -> None:
    assert typed("bake", "a", "--base", "base", "-o", "baked").code == 0
    assert typed("reproduce", "baked").lines == [
        "error: baked holds the weights of a model, which keep no record of how they were made.",
        "hint: bake it again, and compare the files: loramerge bake ADAPTER --base MODEL",
    ]


def test_nothing_is_computed_where_the_place_is_taken(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed("cat", "a", "b", "-o", "out")
    monkeypatch.setattr("loramerge.retrace.compute_into", None)
    assert typed("reproduce", "out", "-o", "c").lines[0] == "error: c exists."
    for name in ("a", "out"):
        done = typed("reproduce", "out", "-o", name, "-f")
        assert done.lines[0].startswith(f"error: {name} would replace the input ")
