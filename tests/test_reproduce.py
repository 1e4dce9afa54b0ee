"""Results made again from their own records: the same bytes, or told how far from them."""

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import loramerge as lm
from loramerge.errors import UsageError
from loramerge.io._source import open_source
from loramerge.options import describe
from loramerge.registry import methods
from loramerge.verdict import digest_of
from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.test_api import bytes_of
from tests.test_method_options import good_values
from tests.test_recipes_run import THREE
from tests.typed import Typed, typed

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def here(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the adapters a, b, c and the recipe of three steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(THREE)
    return tmp_path


def unusual(name: str) -> Iterator[dict[str, Any]]:
    """Every value of every option of a method that is not the default, with unusual settings."""
    method = methods()[name]
    settings: dict[str, Any] = {"seed": 5, "save_dtype": "bfloat16"}
    if method.takes == "many":
        settings |= {"lambda_": 0.7, "scale": "norm", "missing": "skip"}
    for option in describe(method.options):
        for value in good_values(option):
            if value != option.default:
                yield {**settings, option.name: value}
    yield {**settings, "layout": "pattern", "include": ["*proj*"], "compute_dtype": "float64"}


def computed(name: str, inputs: Any, values: dict[str, Any]) -> lm.Result | None:
    """A result at a small rank, or a large one where the method is for that; None without one."""
    for rank in (3, 8):
        with suppress(UsageError):  # options that do not stand alone
            return lm.run(name, inputs, rank=rank, **values)[0]
    return None


@pytest.mark.parametrize("name", methods())
def test_every_method_is_reproduced_with_any_of_its_options(here: Path, name: str) -> None:
    method = methods()[name]
    inputs: Any = ["a", "b", "c"][: method.inputs or 3] if method.takes == "many" else "a"
    weights = {"weights": [1, 0.5, 2][: len(inputs)]} if method.takes == "many" else {}
    made = 0
    for values in unusual(name):
        result = computed(name, inputs, {**weights, **values})
        if result is None:
            continue
        result.save("out", force=True)
        done = typed("reproduce", "out", "-o", "again", "-f")
        assert done.code == 0, (values, done.err)
        assert "the same tensors, bit for bit" in done.err
        assert bytes_of(here / "out") == bytes_of(here / "again")
        made += 1
    assert made


@pytest.mark.parametrize(
    "line",
    [
        "run r.yaml",
        "arithmetic a b --size 9kB",
        "cluster a b -k 3 --scale auto --seed 9",
        "ties a b --module-weight *.q_proj=0.3",
        "squeeze a --energy 0.9 --allocate sigma",
        "squeeze a --max-error 0.5",
    ],
)
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_a_result_is_reproduced_as_directory_and_as_one_file(
    here: Path, line: str, out: str
) -> None:
    first = typed(*line.split(), "-o", out)
    assert first.code == 0, first.err
    again = f"again{Path(out).suffix}"
    done = typed("reproduce", out, "-o", again)
    assert (done.code, done.out) == (0, f"{again}\n"), done.err
    if Path(out).suffix:
        assert (here / out).read_bytes() == (here / again).read_bytes()
    else:
        assert bytes_of(here / out) == bytes_of(here / again)


def test_kohya_files_are_reproduced(here: Path, rng: np.random.Generator) -> None:
    for name in "xy":
        A, B = factors(rng, 4)["layers.0.q_proj"]
        write_kohya(here / f"{name}.safetensors", {"lora_unet_q": (A, B, 2)})
    assert typed("cat", "x.safetensors", "y.safetensors", "-o", "out.safetensors").code == 0
    done = typed("reproduce", "out.safetensors", "-o", "again.safetensors")
    assert done.code == 0, done.err
    assert (here / "out.safetensors").read_bytes() == (here / "again.safetensors").read_bytes()


def test_an_alpha_that_was_stated_is_stated_again(here: Path, rng: np.random.Generator) -> None:
    write_peft(here / "bare.safetensors", factors(rng, 4))
    assert typed("cat", "bare.safetensors", "--alpha", "12", "-o", "out").code == 0
    assert typed("reproduce", "out").code == 0


def test_the_layout_that_a_source_was_read_in_is_recorded(here: Path) -> None:
    result, _ = lm.squeeze(lm.load("a", layout="peft"), rank=2)
    result.save("out")
    facts = json.loads((here / "out" / "loramerge.json").read_text())
    assert facts["sources"][0]["layout"] == "peft"
    assert typed("reproduce", "out").code == 0


def test_nothing_is_kept_unless_asked_for(here: Path) -> None:
    typed("run", "r.yaml", "-o", "out")
    before = sorted(here.iterdir())
    done = typed("reproduce", "out", "-q")
    assert (done.code, done.out, done.err) == (0, "out\n", "")
    facts = json.loads(typed("reproduce", "out", "--json").out)
    assert (facts["output"], facts["same"], facts["ulps"]) == ("out", True, 0)
    assert sorted(here.iterdir()) == before


def test_sources_are_found_elsewhere_by_name_and_by_hash(here: Path) -> None:
    typed("run", "r.yaml", "-o", "out")
    store = here / "deep" / "store"
    for old, new in (("a", "a"), ("b", "renamed"), ("c", "other")):
        shutil.copytree(here / old, store / new)
        shutil.rmtree(here / old)
    gone = typed("reproduce", "out")
    assert gone.code == 1
    for name in "abc":
        assert f"{name} (sha256 " in gone.err
    done = typed("reproduce", "out", "--sources", store, "-o", "again")
    assert done.code == 0, done.err
    assert bytes_of(here / "out") == bytes_of(here / "again")


def test_a_result_between_that_is_still_there_is_taken_as_it_is(here: Path) -> None:
    typed("cat", "a", "b", "-o", "merged")
    typed("squeeze", "merged", "-r", "2", "-o", "out")
    for name in "abc":
        shutil.rmtree(here / name)
    assert typed("reproduce", "out").code == 0
    shutil.rmtree(here / "merged")
    assert typed("reproduce", "out").code == 1


def test_a_source_that_changed_is_refused_with_both_hashes(here: Path) -> None:
    typed("cat", "a", "b", "-o", "out")
    recorded = json.loads((here / "out" / "loramerge.json").read_text())["sources"][1]["sha256"]
    shutil.rmtree(here / "b")
    shutil.copytree(here / "c", here / "b")
    done = typed("reproduce", "out", "-o", "again")
    assert done.code == 1
    assert f"b had {recorded}" in done.err
    assert done.err.count("sha256") == 1
    assert not (here / "again").exists()


def test_a_source_whose_config_changed_is_refused(here: Path) -> None:
    typed("cat", "a", "b", "-o", "out")
    config = here / "b" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    done = typed("reproduce", "out")
    assert done.code == 1
    assert "has another adapter_config.json than b had" in done.err


def test_an_adapter_without_a_record_cannot_be_made_again(here: Path) -> None:
    done = typed("reproduce", "a")
    assert done.code == 1
    assert "a does not say how it was made" in done.err


def changed(here: Path, change: Any, machine: str | None) -> Typed:
    """Reproduce `out` after its tensors were changed, its record telling of the changed ones."""
    typed("cat", "a", "b", "-o", "out")
    path, record = here / "out" / WEIGHTS, here / "out" / "loramerge.json"
    with safe_open(path, "numpy") as opened:
        metadata = opened.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    facts = json.loads(record.read_text())
    facts["tensors_sha256"] = digest_of(open_source(path))
    record.write_text(json.dumps(facts | ({"machine": machine} if machine else {})))
    return typed("reproduce", "out", "--json")


def by_ulps(count: int) -> Any:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for x in tensors.values():
            x.view(np.int32)[...] += count

    return change


def regauged(tensors: dict[str, np.ndarray]) -> None:
    for key in tensors:
        tensors[key] *= 3 if "lora_A" in key else 1 / 3


@pytest.mark.parametrize(
    ("change", "machine", "code"),
    [
        (by_ulps(1), "another", 0),
        (by_ulps(1), None, 3),
        (by_ulps(100), "another", 3),
        (regauged, "another", 0),
        (regauged, None, 3),
    ],
)
def test_other_bits_are_judged_by_where_they_were_made(
    here: Path, change: Any, machine: str | None, code: int
) -> None:
    done = changed(here, change, machine)
    assert done.code == code, done.err
    if code == 0:
        facts = json.loads(done.out)
        assert not facts["same"]
        # One third of a float32 is off by 3e-8 of it.
        assert facts["ulps"] == 1 or facts["relative"] < 1e-6
    else:
        assert "comes out different" in done.err


def test_an_output_that_its_record_does_not_tell_of_is_refused(here: Path) -> None:
    typed("cat", "a", "b", "-o", "out")
    path = here / "out" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    done = typed("reproduce", "out")
    assert done.code == 3
    assert "holds other tensors than its loramerge.json tells of" in done.err
