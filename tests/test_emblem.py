"""The commands this project is known by, exactly as typed, on adapters that were truly trained."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.typed import SHARED, bare, shell, typed

GPT2 = ("gpt2-legal", "gpt2-medical", "gpt2-sports")
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real adapters of ../shared/adapters"
)


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A directory with a.safetensors and b.safetensors and nothing else."""
    bare("sh3_rev", tmp_path / "a.safetensors")
    bare("sort_inter", tmp_path / "b.safetensors")
    return tmp_path


def ranks(file: Path) -> set[int]:
    """The ranks of every lora_A, as the safetensors library reads them."""
    with safe_open(file, "numpy") as opened:
        keys = [key for key in opened.keys() if ".lora_A." in key]  # noqa: SIM118 - not a dict
        return {opened.get_slice(key).get_shape()[0] for key in keys}


def config(directory: Path) -> dict[str, object]:
    return json.loads((directory / "adapter_config.json").read_text())


def test_cluster_merges_two_bare_files_as_typed(two: Path) -> None:
    done = shell("loramerge cluster a.safetensors b.safetensors -k 16", two)
    assert (done.code, done.out) == (0, "a+b-k16\n")
    assert "28 of 28 merged" in done.err
    assert "16 + 16 -> 16" in done.err
    assert sorted(path.name for path in (two / "a+b-k16").iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loramerge.json",
    ]
    assert ranks(two / "a+b-k16" / "adapter_model.safetensors") == {16}
    assert (config(two / "a+b-k16")["r"], config(two / "a+b-k16")["lora_alpha"]) == (16, 16)


def test_squeeze_in_an_adapter_directory_as_typed(two: Path) -> None:
    merged = shell("loramerge cluster a.safetensors b.safetensors -k 16 -q", two).out.strip()
    done = shell("loramerge squeeze --rank 8", two / merged)
    assert (done.code, done.out) == (0, "a+b-k16-r8\n")
    assert done.lines[0] == "squeeze a+b-k16/"
    assert ranks(two / merged / "a+b-k16-r8" / "adapter_model.safetensors") == {8}


def test_squeeze_in_a_directory_with_one_file_as_typed(two: Path) -> None:
    (two / "b.safetensors").unlink()
    done = shell("loramerge squeeze --rank 8", two)
    assert (done.code, done.out) == (0, "a-r8\n")
    assert done.lines[0] == "squeeze a.safetensors"
    assert ranks(two / "a-r8" / "adapter_model.safetensors") == {8}


def test_squeeze_in_a_directory_with_two_files_lists_them_and_guesses_nothing(two: Path) -> None:
    done = shell("loramerge squeeze --rank 8", two)
    assert (done.code, done.out) == (2, "")
    assert done.lines == [
        "error: this directory holds 2 safetensors files: a.safetensors, b.safetensors.",
        "hint: name one: loramerge squeeze a.safetensors --rank 8",
    ]
    assert sorted(path.name for path in two.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_the_line_squeeze_suggests_works(two: Path) -> None:
    hint = shell("loramerge squeeze --rank 8", two).lines[-1]
    done = shell(hint.partition("name one: ")[2], two)
    assert (done.code, done.out) == (0, "a-r8\n")


def test_squeeze_in_a_directory_without_an_adapter_says_so(tmp_path: Path) -> None:
    done = shell("loramerge squeeze --rank 8", tmp_path)
    assert done.code == 2
    assert done.lines == [
        "error: this directory holds no adapter.",
        "hint: name one: loramerge squeeze my-adapter --rank 8",
    ]


@needs_shared
def test_cluster_merges_three_published_gpt2_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = typed("cluster", *(SHARED / name for name in GPT2), "-k", "16")
    assert (done.code, done.out) == (0, "gpt2-legal+gpt2-medical+gpt2-sports-k16\n")
    made = tmp_path / done.out.strip()
    assert ranks(made / "adapter_model.safetensors") == {16}
    # Conv1D of the base: what every source says about its orientation must be passed on.
    assert config(made)["fan_in_fan_out"] is True


@needs_shared
@pytest.mark.parametrize("name", [*GPT2, "gptneo-movies"])
def test_squeeze_halves_a_published_adapter(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = typed("squeeze", SHARED / name, "--rank", "4", "-q")
    assert (done.code, done.out, done.err) == (0, f"{name}-r4\n", "")
    assert ranks(tmp_path / f"{name}-r4" / "adapter_model.safetensors") == {4}
