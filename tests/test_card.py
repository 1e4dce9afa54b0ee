"""The model card: readable by the Hub, escaped, and its command makes the file again."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

import loramerge as lm
from loramerge.card import card
from tests.build import write_peft
from tests.conftest import factors
from tests.typed import typed


def front(text: str) -> dict[str, object]:
    """The YAML between the first two rules."""
    _, matter, _ = text.split("---\n", 2)
    return yaml.safe_load(matter)


def test_the_front_matter_names_library_tags_and_base(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    a = write_peft(tmp_path / "a", factors(rng, 4), base_model_name_or_path="org/base")
    found = front(card(lm.squeeze(a, rank=2)[1]))
    assert found["base_model"] == "org/base"
    assert found["base_model_relation"] == "adapter"
    assert found["library_name"] == "peft"
    assert found["tags"] == ["lora", "merge", "loramerge"]


@pytest.mark.parametrize("base", ["x\nlicense: mit", "a: b", "[x]", "# no", 'q"uote', "yes"])
def test_a_base_model_cannot_add_to_the_front_matter(
    tmp_path: Path, rng: np.random.Generator, base: str
) -> None:
    a = write_peft(tmp_path / "a", factors(rng, 4), base_model_name_or_path=base)
    found = front(card(lm.squeeze(a, rank=2)[1]))
    assert found["base_model"] == base
    assert "license" not in found


@pytest.mark.parametrize("base", [None, "/home/me/base", "./base", "~/base", "C:\\base", "a/b/c"])
def test_a_local_base_model_is_not_published(
    tmp_path: Path, rng: np.random.Generator, base: str | None
) -> None:
    a = write_peft(tmp_path / "a", factors(rng, 4), base_model_name_or_path=base)
    assert "base_model" not in front(card(lm.squeeze(a, rank=2)[1]))


def test_base_models_that_differ_are_left_out(tmp_path: Path, rng: np.random.Generator) -> None:
    a, b = (
        write_peft(tmp_path / name, factors(rng, 4), base_model_name_or_path=f"org/{name}")
        for name in "ab"
    )
    assert "base_model" not in front(card(lm.cat([a, b])[1]))


def test_a_strange_name_stays_in_its_cell(tmp_path: Path, rng: np.random.Generator) -> None:
    a = write_peft(tmp_path / "a|b`*[c]\n# d", factors(rng, 4))
    text = card(lm.squeeze(a, rank=2)[1])
    row = next(line for line in text.splitlines() if line.startswith("| a"))
    assert len(re.findall(r"(?<!\\)\|", row)) == 4
    assert "\n# d" not in text


@pytest.mark.parametrize(
    "words",
    [
        "cat a b -w 1 -w -0.3333333333333333",
        "arithmetic a b c --rank 3 --lambda 0.7 --save-dtype float16",
        "ties a b -w 1 -w 2 --module-weight '2:layers.0-0.*=-0.1' --module-weight *.q_proj=0.3",
        "cluster a b -k 3 --gauge raw --seed 7 --scale 0.5",
        "squeeze c --energy 0.9 --allocate sigma --include *.q_proj --include *.up_proj",
        "squeeze c --size 20kB",
        "prune a --threshold 0.1 --absolute",
        "squeeze bare.safetensors --alpha 12 --rank 2",
        "squeeze 'my adapter' --rank 2",
        "cat bare.safetensors a --from peft --from auto",
    ],
)
def test_the_command_of_the_card_makes_the_file_again(
    three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(1)
    write_peft(tmp_path / "bare.safetensors", factors(rng, 4))
    write_peft(tmp_path / "my adapter", factors(rng, 4))
    assert typed(*shlex.split(words), "-o", "first").code == 0
    text = (tmp_path / "first" / "README.md").read_text()
    line = re.search(r"```sh\nloramerge (.+)\n```", text)
    assert line
    assert typed(*shlex.split(line[1]), "-o", "second").code == 0
    weights = "adapter_model.safetensors"
    assert (tmp_path / "first" / weights).read_bytes() == (
        tmp_path / "second" / weights
    ).read_bytes()


def test_the_card_shows_the_measured_errors(three: list[Path]) -> None:
    _, report = lm.arithmetic(three, rank=2)
    text = card(report)
    assert f"| whole adapter | {report.relative_error:.3g} | {report.energy:.6g} |" in text
    assert f"| {report.worst.name} | {report.worst.relative_error:.3g} |" in text


def test_the_card_says_how_to_check_it(three: list[Path], tmp_path: Path) -> None:
    out = lm.squeeze(three[0], rank=2)[0].save(tmp_path / "out")
    line = re.search(
        r"`loramerge reproduce path/to/this/directory`", (out / "README.md").read_text()
    )
    assert line
    assert typed("reproduce", out).code == 0


def test_the_card_of_a_converted_adapter_says_from_what_and_how(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_peft(Path("a"), factors(rng, 4), lora_alpha=6, base_model_name_or_path="org/base")
    assert typed("convert", "a", "--to", "mlx", "-o", "b").code == 0
    text = Path("b/README.md").read_text()
    found = front(text)
    assert (found["base_model"], found["library_name"]) == ("org/base", "mlx")
    assert found["tags"] == ["lora", "loramerge"]
    command = re.search(r"```sh\nloramerge (.+)\n```", text)
    assert command
    again = typed(*shlex.split(command[1]), "-o", "c")
    assert again.code == 0, again.err
    for name in ("README.md", "adapters.safetensors"):
        assert Path("b", name).read_bytes() == Path("c", name).read_bytes()
    assert re.search(r"(\d+) of \1 modules, (\d+) of \2 tensors", text)
    assert "from_pretrained" not in text


@pytest.mark.parametrize("layout", ["peft", "mlx"])
def test_the_card_says_how_the_library_of_its_layout_loads_it(
    three: list[Path], tmp_path: Path, layout: str
) -> None:
    result, _ = lm.squeeze(three[0], rank=2, to=layout)
    text = (result.save(tmp_path / "out") / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.S)
    assert code
    compile(code[1], layout, "exec")
    assert front(text)["library_name"] == layout
    assert {"peft": "PeftModel.from_pretrained", "mlx": "adapter_path="}[layout] in code[1]
