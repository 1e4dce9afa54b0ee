"""Prefixes of names that versions of a model's code differ in, taken to another with convert."""

import shlex
from pathlib import Path

import numpy as np
import pytest

import loramerge
from loramerge.errors import IncompatibleError
from loramerge.io._open import open_adapter
from tests.build import Pair, write_peft
from tests.typed import typed

draw = np.random.default_rng(61)


def under(prefix: str, path: Path) -> Path:
    def pair() -> Pair:
        return draw.standard_normal((2, 6)), draw.standard_normal((4, 2))

    return write_peft(path, {f"{prefix}layers.{n}.q_proj": pair() for n in range(2)})


def test_the_hint_of_a_merge_is_the_command_that_mends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    under("model.language_model.", Path("a"))
    under("language_model.model.", Path("b"))
    refused = typed("cat", "a", "b")
    command = refused.lines[-1].partition("loramerge ")[2]
    done = typed(*shlex.split(command), "-o", "c")
    assert done.code == 0, done.err
    assert typed("cat", "a", "c", "-o", "d").code == 0
    assert typed("reproduce", "c").code == 0


def test_factors_stay_as_they_are_under_new_names(tmp_path: Path) -> None:
    before = open_adapter(str(under("", tmp_path / "a")))
    done = loramerge.convert(before, "peft", tmp_path / "b", rename={"": "model."})
    after = open_adapter(str(done.path))
    assert list(after.modules) == [f"model.{name}" for name in before.modules]
    for name in before.modules:
        np.testing.assert_array_equal(after.read(f"model.{name}").B, before.read(name).B)


def test_a_prefix_that_no_name_has_is_refused(tmp_path: Path) -> None:
    path = under("model.", tmp_path / "a")
    with pytest.raises(IncompatibleError, match=r"begins with net\.: its first is model\.layers"):
        loramerge.convert(path, "peft", tmp_path / "b", rename={"net.": ""})


def test_two_modules_never_get_one_name(tmp_path: Path) -> None:
    modules = {name: (np.ones((2, 6)), np.ones((4, 2))) for name in ("a.q", "b.q")}
    path = write_peft(tmp_path / "a", modules)
    with pytest.raises(IncompatibleError, match=r"two modules would be called b\.q"):
        loramerge.convert(path, "peft", tmp_path / "b", rename={"a.": "b."})


def test_a_renaming_says_what_takes_its_place(tmp_path: Path) -> None:
    path = under("model.", tmp_path / "a")
    done = typed("convert", path, "--to", "peft", "--rename", "model.")
    assert done.code == 2
    assert "--rename 'model.=model.'" in done.err
