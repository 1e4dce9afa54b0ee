"""Files of a tokenizer beside adapters: carried as they are, compared where it matters."""

import json
from pathlib import Path

import numpy as np
import pytest

import loramerge
from loramerge.errors import IncompatibleError
from tests.build import PREFIX, Pair, write_peft
from tests.typed import typed

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
draw = np.random.default_rng(53)


def pair(rows: int = 4, columns: int = 6) -> Pair:
    return draw.standard_normal((2, columns)), draw.standard_normal((rows, 2))


def with_tokenizer(
    path: Path,
    added: dict[str, int] | None = None,
    *,
    config: str = "",
    embeddings: bool = False,
    head: bool = False,
) -> Path:
    """An adapter with a tokenizer that has these tokens added."""
    modules = {"layers.0.q_proj": pair()}
    if embeddings:
        modules["model.embed_tokens"] = pair(6, 10)
    heads = {f"{PREFIX}lm_head.weight": draw.standard_normal((10, 6)).astype("f4")} if head else {}
    write_peft(
        path, modules, extras=heads, embeddings=[m for m in modules if m.endswith("embed_tokens")]
    )
    decoder = {str(number): {"content": token} for token, number in (added or {}).items()}
    facts = {"added_tokens_decoder": decoder, "say": config}
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    (path / "tokenizer_config.json").write_text(json.dumps(facts))
    (path / "special_tokens_map.json").write_text("{}")
    (path / "chat_template.jinja").write_text("{{ 1/0 }}")
    return path


def tokenizer(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES if (path / name).is_file()}


@pytest.mark.parametrize(
    "words",
    [("squeeze", "--rank", "1"), ("convert", "--to", "peft"), ("scale", "--factor", "0.5")],
    ids=lambda words: words[0],
)
def test_the_tokenizer_of_one_adapter_goes_with_the_result(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    source, out = with_tokenizer(tmp_path / "a"), tmp_path / "out"
    done = typed(words[0], source, *words[1:], "-o", out)
    assert done.code == 0, done.err
    assert tokenizer(out) == tokenizer(source)
    assert len(tokenizer(out)) == len(FILES)


def test_a_single_file_takes_none_along_and_a_drop_leaves_them(tmp_path: Path) -> None:
    source = with_tokenizer(tmp_path / "a")
    assert typed("squeeze", source, "-r", "1", "-o", tmp_path / "x.safetensors").code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.safetensors"]
    words = ("--to", "mlx", "--extras", "drop", "-o", tmp_path / "b")
    assert typed("convert", source, *words).code == 0
    assert tokenizer(tmp_path / "b") == {}


def test_of_several_adapters_files_that_agree_are_carried_and_others_named(tmp_path: Path) -> None:
    one = with_tokenizer(tmp_path / "a", config="x")
    two = with_tokenizer(tmp_path / "b", config="y")
    done = typed("cat", one, two, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    differ = "tokenizer_config.json"
    assert f"files of a tokenizer that differ are left out: {differ}" in done.err
    assert set(tokenizer(tmp_path / "out")) == set(FILES) - {differ}


@pytest.mark.parametrize(("extras", "kept"), [("first", len(FILES)), ("drop", 0)])
def test_extras_says_what_becomes_of_them(extras: str, kept: int, tmp_path: Path) -> None:
    one = with_tokenizer(tmp_path / "a", config="x")
    two = with_tokenizer(tmp_path / "b", config="y")
    done = typed("cat", one, two, "--extras", extras, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert len(tokenizer(tmp_path / "out")) == kept
    if kept:
        assert tokenizer(tmp_path / "out") == tokenizer(one)


def test_other_added_tokens_do_not_matter_to_layers_that_know_no_tokens(tmp_path: Path) -> None:
    one = with_tokenizer(tmp_path / "a", {"<x>": 8})
    two = with_tokenizer(tmp_path / "b", {"<y>": 8})
    assert typed("cat", one, two, "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("extras", ["error", "first", "drop"])
def test_embeddings_of_other_tokens_are_refused_whatever_becomes_of_the_rest(
    extras: str, tmp_path: Path
) -> None:
    one = with_tokenizer(tmp_path / "a", {"<x>": 8}, embeddings=True)
    two = with_tokenizer(tmp_path / "b", {"<y>": 8}, embeddings=True)
    done = typed("cat", one, two, "--extras", extras, "-o", tmp_path / "out")
    assert done.code == 1
    assert "a, b have added other tokens, or others of a number: <x>, <y>" in done.err
    assert "model.embed_tokens" in done.err
    words = ("--extras", extras, "--exclude", "*embed_tokens", "-o", tmp_path / "out")
    assert typed("cat", one, two, *words).code == 0


def test_a_head_of_other_tokens_is_the_firsts_or_none(tmp_path: Path) -> None:
    one = with_tokenizer(tmp_path / "a", {"<x>": 8}, head=True)
    two = with_tokenizer(tmp_path / "b", {"<y>": 8}, head=True)
    with pytest.raises(IncompatibleError, match=r"hold something of each token"):
        loramerge.arithmetic([one, two], extras="mean")
    result, _ = loramerge.arithmetic([one, two], extras="first")
    assert tokenizer(result.save(tmp_path / "out")) == tokenizer(one)


@pytest.mark.parametrize("name", ["added_tokens.json", "tokenizer.json"])
def test_added_tokens_are_found_wherever_a_tokenizer_says_them(name: str, tmp_path: Path) -> None:
    paths = []
    for token in ("<x>", "<y>"):
        path = with_tokenizer(tmp_path / token[1], embeddings=True)
        facts = (
            {token: 8}
            if name.startswith("added")
            else {"added_tokens": [{"id": 8, "content": token}]}
        )
        (path / "tokenizer_config.json").write_text("{}")
        (path / name).write_text(json.dumps(facts))
        paths.append(path)
    with pytest.raises(IncompatibleError, match="<x>, <y>"):
        loramerge.arithmetic(paths)


def test_a_tokenizer_that_is_none_says_nothing_and_is_carried(tmp_path: Path) -> None:
    path = with_tokenizer(tmp_path / "a", embeddings=True)
    (path / "tokenizer_config.json").write_text("no json")
    other = with_tokenizer(tmp_path / "b", {"<y>": 8}, embeddings=True)
    assert typed("cat", path, other, "-o", tmp_path / "out").code == 0
    assert typed("squeeze", path, "-r", "1", "-o", tmp_path / "small").code == 0
    assert tokenizer(tmp_path / "small") == tokenizer(path)


def test_tokenizers_go_through_the_steps_of_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = with_tokenizer(tmp_path / "a")
    Path("recipe.yaml").write_text(
        "steps:\n- {name: m, method: cat, adapters: [a, a]}\n"
        "- {method: squeeze, adapters: m, rank: 1}\noutput: out\n"
    )
    assert typed("run", "recipe.yaml").code == 0
    assert tokenizer(tmp_path / "out") == tokenizer(source)
