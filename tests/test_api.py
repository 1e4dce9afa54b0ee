"""The library as Python functions: what the command line does, byte for byte."""

import gc
import inspect
import pydoc
from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from loramerge.errors import AdapterError, OutputError, UsageError
from loramerge.options import Option
from loramerge.recipe import find, fixed, options_of
from loramerge.registry import methods
from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.typed import typed

FIXED = ["Result", "__version__", "compare", "convert", "errors", "load"]
FIXED += ["pull", "push", "run", "sweep"]
COMMANDS = [
    *methods(),
    *(preset.name for method in methods().values() for preset in method.presets),
]


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(
    ("words", "count", "values"),
    [
        ("cluster -k 3", 3, {"k": 3}),
        ("cluster -k 2 --gauge raw --scale 0.5", 2, {"k": 2, "gauge": "raw", "scale": 0.5}),
        ("squeeze --rank 2", 1, {"rank": 2}),
        ("squeeze --energy 0.9", 1, {"energy": 0.9}),
        ("squeeze --size 20kB --allocate sigma", 1, {"size": "20kB", "allocate": "sigma"}),
        ("arithmetic -w 1 -w -0.5 --rank 3", 2, {"weights": [1, -0.5], "rank": 3}),
        ("arithmetic --lambda 3 --scale auto", 3, {"lambda_": 3, "scale": "auto"}),
        ("arithmetic --include *q* --include *up*", 2, {"include": ["*q*", "*up*"]}),
        ("cat --save-dtype bfloat16 --seed 3", 3, {"save_dtype": "bfloat16", "seed": 3}),
    ],
)
def test_a_function_writes_the_bytes_of_its_command(
    three: list[Path],
    tmp_path: Path,
    words: str,
    count: int,
    values: dict[str, object],
) -> None:
    name, *flags = words.split()
    given = three[:count]
    assert typed(name, *given, *flags, "-o", tmp_path / "typed").code == 0
    result, _ = getattr(lm, name)(given if count > 1 else given[0], **values)
    assert bytes_of(result.save(tmp_path / "called")) == bytes_of(tmp_path / "typed")


@pytest.mark.parametrize("kind", ["peft", "kohya"])
@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_save_writes_what_the_command_writes_to_the_same_path(
    tmp_path: Path, rng: np.random.Generator, kind: str, out: str
) -> None:
    made = factors(rng, 4)
    source = tmp_path / "a.safetensors"
    if kind == "peft":
        write_peft(source, made)
    else:
        write_kohya(source, {f"lora_unet_{i}": (A, B, 2) for i, (A, B) in enumerate(made.values())})
    typed("squeeze", source, "--rank", "2", "-o", tmp_path / "typed" / out)
    saved = lm.squeeze(source, rank=2)[0].save(tmp_path / "called" / out)
    if saved.is_dir():
        assert bytes_of(saved) == bytes_of(tmp_path / "typed" / out)
    else:
        assert saved.read_bytes() == (tmp_path / "typed" / out).read_bytes()


def test_an_alpha_counts_as_on_the_command_line(tmp_path: Path, rng: np.random.Generator) -> None:
    a = write_peft(tmp_path / "a.safetensors", factors(rng, 4))
    typed("cat", a, "--alpha", "12", "-o", tmp_path / "typed")
    result, report = lm.cat(lm.load(a, alpha=12))
    assert bytes_of(result.save(tmp_path / "called")) == bytes_of(tmp_path / "typed")
    assert not report.as_json()["scale_assumed"]


def test_adapters_are_taken_as_paths_strings_loaded_and_computed_ones(
    three: list[Path], tmp_path: Path
) -> None:
    merged, _ = lm.cat([three[0], str(three[1]), lm.load(three[2])])
    small, report = lm.squeeze(merged, rank=2)
    assert report.rank == (2, 2)
    direct = lm.arithmetic(three, rank=2)[1]
    assert small.adapter.modules.keys() == merged.adapter.modules.keys()
    assert report.energy == pytest.approx(direct.energy, rel=1e-6)  # float32 between the two


def test_a_result_outlives_what_it_was_made_of(three: list[Path]) -> None:
    merged, _ = lm.cat(three)
    small, _ = lm.squeeze(merged, rank=2)
    del merged
    gc.collect()
    assert lm.squeeze(small, rank=1)[1].rank == (1, 1)


def test_a_result_that_is_let_go_leaves_no_files(three: list[Path]) -> None:
    merged, _ = lm.cat(three)
    files = merged.adapter.source.path.parent
    assert files.is_dir()
    del merged
    gc.collect()
    assert not files.exists()


def test_a_failed_run_leaves_no_files(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    broken = factors(rng, 4)
    broken["layers.0.q_proj"][0][0, 0] = np.nan
    with pytest.raises(lm.errors.IncompatibleError):
        lm.cat(write_peft(tmp_path / "a", broken))
    assert list((tmp_path / "scratch").iterdir()) == []


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_save_refuses_an_existing_path_without_force(
    three: list[Path], tmp_path: Path, out: str
) -> None:
    first, second = lm.cat(three)[0], lm.arithmetic(three, rank=1)[0]
    path = first.save(tmp_path / out)
    with pytest.raises(OutputError, match="exists"):
        second.save(path)
    weights = path if out.endswith(".safetensors") else path / "adapter_model.safetensors"
    before = weights.read_bytes()
    second.save(path, force=True)
    assert weights.read_bytes() != before


@pytest.mark.parametrize("out", ["a", "a/adapter_model.safetensors", "."])
def test_save_never_replaces_an_input(three: list[Path], tmp_path: Path, out: str) -> None:
    merged, _ = lm.cat(three)
    with pytest.raises(OutputError, match="would replace the input"):
        merged.save(tmp_path / out, force=True)
    assert (three[0] / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("method", "values", "meant"),
    [
        ("squeeze", {"rnak": 4}, "rank"),
        ("cluster", {"gage": "svd"}, "gauge"),
        ("cluster", {"seeed": 1}, "seed"),
        ("arithmetic", {"weight": [1, 1, 1]}, "weights"),
        ("arithmetic", {"lamda": 2}, "lambda_"),
    ],
)
def test_an_unknown_option_is_refused_with_the_one_that_was_meant(
    three: list[Path], method: str, values: dict[str, object], meant: str
) -> None:
    given = three[0] if method == "squeeze" else three
    with pytest.raises(UsageError) as failure:
        getattr(lm, method)(given, **values)
    assert failure.value.hint == f"did you mean '{meant}'?"


@pytest.mark.parametrize("values", [{"out": "x"}, {"json": True}, {"method": "cat"}, {"name": 1}])
def test_what_is_no_option_is_refused_by_name(three: list[Path], values: dict[str, object]) -> None:
    with pytest.raises(UsageError, match=f"has no option '{next(iter(values))}'"):
        lm.arithmetic(three, **values)


def test_a_bad_value_is_refused_with_the_allowed_range(three: list[Path]) -> None:
    with pytest.raises(UsageError, match=r"-k is 0; it must be a whole number >= 1"):
        lm.cluster(three, k=0)


def test_a_preset_decides_its_own_options(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="it takes no --rank"):
        lm.cat(three, rank=2)


def test_weights_are_counted(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="2 weights for 3 adapters"):
        lm.cat(three, weights=[1, 2])


def test_a_compressor_takes_no_weights(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="squeeze has no option 'weights'"):
        lm.squeeze(three[0], weights=[2], rank=2)


def test_a_compressor_takes_one_adapter(three: list[Path]) -> None:
    with pytest.raises(UsageError, match="takes one adapter, not 3"):
        lm.squeeze(three, rank=2)


def test_what_is_no_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="does not exist"):
        lm.load(tmp_path / "nowhere")


def test_dir_is_the_sorted_public_surface() -> None:
    assert dir(lm) == sorted([*FIXED, *COMMANDS])


def test_every_public_name_resolves_and_no_other_does() -> None:
    for name in dir(lm):
        assert getattr(lm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lm.nothing  # noqa: B018  # asking is the test


def test_errors_are_part_of_the_surface() -> None:
    assert lm.errors.UsageError is UsageError
    assert issubclass(lm.errors.GateError, lm.errors.LoramergeError)


def offered(name: str) -> list[Option]:
    """The options of a command, without those its preset decides."""
    found, preset = find(name)
    return [option for option in options_of(found) if option.name not in fixed(preset)]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signature_holds_every_option_with_its_default(name: str) -> None:
    signature = inspect.signature(getattr(lm, name))
    method, _ = find(name)
    many = method.takes == "many"
    options = {option.name: option.default for option in offered(name)}
    if method.rank_option and options["rank"] == method.rank_option:
        options["rank"] = None  # cluster's rank is its k, which is no value to pass
    found = {p.name: p.default for p in signature.parameters.values() if p.kind == p.KEYWORD_ONLY}
    assert found == ({"weights": None} if many else {}) | options


@pytest.mark.parametrize("name", COMMANDS)
def test_passing_every_default_of_a_signature_changes_nothing(three: list[Path], name: str) -> None:
    function = getattr(lm, name)
    method, _ = find(name)
    given = three[0] if method.takes == "one" else three[: method.inputs]
    bound = {"rank": 8 if name == "pad" else 2} if method.takes == "one" else {}
    defaults = {
        p.name: p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind == p.KEYWORD_ONLY
    }
    plain, stated = function(given, **bound)[1], function(given, **{**defaults, **bound})[1]
    assert plain.tensors_sha256 == stated.tensors_sha256


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_option_with_its_default_and_sentence(name: str) -> None:
    text = " ".join(pydoc.plain(pydoc.render_doc(getattr(lm, name))).split())
    for option in offered(name):
        assert f"{option.name} ({option.values}" in text
        assert f"default {option.default!r}): {' '.join(option.description.split())}" in text
