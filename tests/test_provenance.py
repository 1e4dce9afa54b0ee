"""What a result says about its making: one document, no secrets, the same bytes every time."""

import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loramerge as lm
from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.typed import typed

SECRET = "hush-4711"
MERGES = [
    ("arithmetic", "-w", "1", "-w", "-0.5", "--rank", "3"),
    ("cat",),
    ("cluster", "-k", "3"),
    ("arithmetic", "--energy", "0.9", "--scale", "auto"),
]


def header(file: Path) -> dict[str, str]:
    """The metadata in a safetensors header."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])["__metadata__"]


@pytest.fixture
def vault(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Adapters of every kind that leads to a note, below a directory whose name is a secret."""
    vault = tmp_path / SECRET
    extra = {"base_model.model.head.weight": np.ones((2, 3), np.float32)}
    base = f"/home/{SECRET}/base"
    write_peft(vault / "a", factors(rng, 4), extras=extra, base_model_name_or_path=base)
    write_peft(vault / "b", factors(rng, 4), extras=extra, base_model_name_or_path=f"{base}-2")
    write_peft(vault / "wrong", factors(rng, 4), r=9, strange_field=1)
    write_peft(vault / "bare.safetensors", factors(rng, 4))
    A, B = factors(rng, 4)["layers.0.q_proj"]
    for name in ("one", "two"):
        write_kohya(vault / f"{name}.safetensors", {"lora_unet_x": (A, B, None)})
    return vault


@pytest.mark.parametrize(
    "words",
    [
        ("arithmetic", "a", "b", "--extras", "first"),
        ("cluster", "a", "b", "-k", "3", "--extras", "drop"),
        ("cat", "wrong", "bare.safetensors"),
        ("squeeze", "wrong", "--rank", "2"),
        ("squeeze", "bare.safetensors", "--energy", "0.9"),
        ("arithmetic", "one.safetensors", "two.safetensors", "-o", "merged"),
        ("arithmetic", "one.safetensors", "two.safetensors", "-o", "merged.safetensors"),
        ("cat", "a/adapter_model.safetensors", "bare.safetensors", "--extras", "drop"),
    ],
    ids=" ".join,
)
def test_no_output_names_the_directory_of_its_inputs(
    vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    full = [str(vault / word) if (vault / word).exists() else word for word in words]
    before = {*tmp_path.rglob("*")}
    done = typed(*full, "--json")
    assert done.code == 0, done.err
    written = [path for path in {*tmp_path.rglob("*")} - before if path.is_file()]
    assert written
    facts = json.loads(done.out)
    del facts["output"]
    for content in [*(path.read_bytes() for path in written), json.dumps(facts).encode()]:
        assert SECRET.encode() not in content
        assert str(tmp_path).encode() not in content


def test_no_step_of_a_recipe_tells_who_ran_it_where_or_with_what_token(
    vault: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("HF_TOKEN", "USER", "LOGNAME", "HOSTNAME", "HOME")
    text = (
        "steps:\n"
        f"- {{name: merged, method: cat, adapters: [{vault}/wrong, {vault}/bare.safetensors]}}\n"
        "- {method: squeeze, rank: 2, adapters: merged}\n"
    )
    (tmp_path / "r.yaml").write_text(text)
    for out in ("out", "out.safetensors"):
        done = typed("run", "r.yaml", "-o", out, env=dict.fromkeys(names, SECRET))
        assert done.code == 0, done.err
    written = [*(tmp_path / "out").iterdir(), tmp_path / "out.safetensors"]
    for content in (path.read_bytes() for path in written):
        assert SECRET.encode() not in content
        assert str(tmp_path).encode() not in content


def test_a_merge_of_results_names_no_temporary_directory(three: list[Path], tmp_path: Path) -> None:
    merged, _ = lm.cluster(three, k=3)
    small, _ = lm.squeeze(merged, rank=2)
    small.save(tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert str(merged.adapter.source.path.parent).encode() not in path.read_bytes()
    facts = json.loads((tmp_path / "out" / "loramerge.json").read_text())
    assert [source["name"] for source in facts["sources"]] == ["a+b+c-k3"]


@pytest.mark.parametrize("words", MERGES, ids=" ".join)
def test_two_runs_write_the_same_bytes(
    three: list[Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    name, *flags = words
    for out in ("first", "second"):
        assert typed(name, *three[:2], *flags, "-o", tmp_path / out).code == 0
    first = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "second").iterdir()}
    assert {"README.md", "adapter_config.json", "loramerge.json"} <= first.keys()


@pytest.mark.parametrize("words", MERGES, ids=" ".join)
def test_json_on_stdout_is_the_document_beside_the_weights_and_where_they_are(
    three: list[Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    name, *flags = words
    facts = json.loads(typed(name, *three[:2], *flags, "-o", tmp_path / "out", "--json").out)
    assert facts.pop("output") == str(tmp_path / "out")
    assert facts == json.loads((tmp_path / "out" / "loramerge.json").read_text())


def test_the_document_is_canonical_json(three: list[Path], tmp_path: Path) -> None:
    typed("cluster", *three, "-k", "3", "-o", tmp_path / "out")
    text = (tmp_path / "out" / "loramerge.json").read_text()
    facts = json.loads(text, parse_constant=pytest.fail)
    assert text == json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def test_the_document_names_every_source_with_its_hash_and_weight(
    three: list[Path], tmp_path: Path
) -> None:
    typed("cat", *three[:2], "-w", "1", "-w", "-2", "-o", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "loramerge.json").read_text())
    hashes = [
        hashlib.sha256((path / "adapter_model.safetensors").read_bytes()).hexdigest()
        for path in three[:2]
    ]
    found = [(s["name"], s["weight"], s["sha256"]) for s in facts["sources"]]
    assert found == [("a", 1, hashes[0]), ("b", -2, hashes[1])]


def test_the_tensors_hash_covers_names_dtypes_shapes_and_bytes(
    three: list[Path], tmp_path: Path
) -> None:
    result, report = lm.cat(three)
    tensors = load_file(result.save(tmp_path / "out.safetensors"))
    whole = [
        [key, "F32", list(tensors[key].shape), hashlib.sha256(tensors[key].tobytes()).hexdigest()]
        for key in sorted(tensors)
    ]
    text = json.dumps(whole, separators=(",", ":"))
    assert report.tensors_sha256 == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("suffix", ["", ".safetensors"])
def test_the_header_says_how_the_file_was_made(
    three: list[Path], tmp_path: Path, suffix: str
) -> None:
    result, report = lm.cluster(three, k=3, gauge="raw")
    out = result.save(tmp_path / f"out{suffix}")
    facts = json.loads(header(out if suffix else out / "adapter_model.safetensors")["loramerge"])
    assert facts["recipe"] == json.loads(json.dumps(report.as_json()["recipe"]))
    found = [(s["name"], s["sha256"], s["bytes"], s["config_sha256"]) for s in facts["sources"]]
    weights = [path / "adapter_model.safetensors" for path in three]
    configs = [json.loads((path / "adapter_config.json").read_text()) for path in three]
    assert found == [
        (path.name, sha256(file.read_bytes()), file.stat().st_size, sha256(sorted_json(config)))
        for path, file, config in zip(three, weights, configs, strict=True)
    ]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def sorted_json(config: dict[str, object]) -> bytes:
    return json.dumps(config, sort_keys=True, separators=(",", ":")).encode()


def test_a_result_carries_the_records_of_its_sources_along(three: list[Path]) -> None:
    merged, first = lm.cat(three[:2])
    small, _ = lm.squeeze(merged, rank=2)
    _, report = lm.arithmetic([small, three[2]])
    made = json.loads(json.dumps(report.as_json()["sources"][0]["made"]))
    assert made == json.loads(header(small.adapter.source.path)["loramerge"])
    assert made["recipe"]["settings"]["rank"] == 2
    deeper = made["sources"][0]["made"]
    assert deeper["recipe"] == json.loads(json.dumps(first.as_json()["recipe"]))
    assert report.as_json()["sources"][1]["made"] is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not JSON", "cannot be read"),
        ('{"recipe": 3}', "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (" " * 300_000, "300,000 characters"),
    ],
    ids=["text", "other", "deep", "long"],
)
def test_a_source_record_that_is_not_carried_along_is_named(
    tmp_path: Path, rng: np.random.Generator, text: str, said: str
) -> None:
    source = write_peft(tmp_path / "a", factors(rng, 4), metadata={"loramerge": text})
    _, report = lm.squeeze(source, rank=2)
    assert report.as_json()["sources"][0]["made"] is None
    assert [note for note in report.notes if note.startswith("a: its record of how it was made")]
    assert said in " ".join(report.notes)


def test_nothing_of_ours_stands_in_the_adapter_config(three: list[Path], tmp_path: Path) -> None:
    typed("cat", *three, "-o", tmp_path / "out")
    assert "loramerge" not in (tmp_path / "out" / "adapter_config.json").read_text()


def test_a_stated_alpha_is_part_of_the_recipe(tmp_path: Path, rng: np.random.Generator) -> None:
    a = write_peft(tmp_path / "a.safetensors", factors(rng, 4))
    plain, stated = (lm.cat(lm.load(a, alpha=alpha))[1] for alpha in (4, 8))
    assert plain.plan.recipe.canonical() != stated.plan.recipe.canonical()
