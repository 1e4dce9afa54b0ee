"""Several methods in one table: what each would give is what it gives."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from msgspec.structs import replace

import loramerge
from loramerge import registry
from loramerge.adapter import Updates
from loramerge.errors import UsageError
from loramerge.options import Options
from loramerge.registry import method
from tests.test_api import bytes_of
from tests.typed import bare, typed

METHODS = ("arithmetic", "ties", "cluster", "karcher", "dare")
# Rows with options of their own: among them passes that count first, lengths and ranks that follow
# from the whole adapter, and a method that looks at other modules too.
ROWS: Mapping[str, tuple[str, dict[str, object]]] = {
    "arithmetic": ("arithmetic", {}),
    "arithmetic:scale=auto": ("arithmetic", {"scale": "auto"}),
    "decorrelate:rank=3": ("decorrelate", {"rank": 3}),
    "ties": ("ties", {}),
    "ties:density=0.5:trim-scope=model": ("ties", {"density": 0.5, "trim_scope": "model"}),
    "ties:density=0.1:trim_scope=model:scale=norm": (
        "ties",
        {"density": 0.1, "trim_scope": "model", "scale": "norm"},
    ),
    "ctm:rank=2": ("ctm", {"rank": 2}),
    "consensus:lambda=0.5": ("consensus", {"lambda_": 0.5}),
    "tsv:energy=0.9": ("tsv", {"energy": 0.9}),
    "arithmetic:max-error=0.3": ("arithmetic", {"max_error": 0.3}),
    "ties:size=9k:scale=ls": ("ties", {"size": "9k", "scale": "ls"}),
    "dare:density=0.7": ("dare", {"density": 0.7}),
    "tsv:calibrate=pico": ("tsv", {"calibrate": "pico"}),
}


@pytest.fixture
def here(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of adapters a, b, c."""
    monkeypatch.chdir(three[0].parent)
    return three[0].parent


def table(*words: str) -> dict[str, object]:
    done = typed("compare", "a", "b", "c", *words, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_every_row_is_what_the_method_itself_reports(here: Path) -> None:
    words = ("--methods", ",".join(METHODS), "-w", "1", "-w", "0.5", "-w", "-1", "--rank", "3")
    found = table(*words)["methods"]
    assert [row["name"] for row in found] == list(METHODS)
    for row in found:
        _, report = loramerge.run(
            row["name"], ["a", "b", "c"], weights=[1, 0.5, -1], rank=3, save_dtype="float32"
        )
        assert row["rank"] == list(report.rank)
        # float32 factors, rounded once more in a file
        assert row["relative_error"] == pytest.approx(report.relative_error, rel=1e-5)
        assert row["retained_energy"] == pytest.approx(report.energy, rel=1e-5)
        assert row["scale"] == {
            "used": report.plan.recipe.scale,
            "factor": pytest.approx(report.scale, rel=1e-5),
        }
        assert row["bytes"] == report.file_bytes or abs(row["bytes"] - report.file_bytes) < 200
        assert row["seconds"] > 0


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which module of which adapter was read, every time."""
    from loramerge.adapter import Adapter

    found: list[tuple[str, str]] = []
    plain = Adapter.read

    def counting(adapter: Adapter, name: str, wide: bool = False) -> object:
        found.append((adapter.reference, name))
        return plain(adapter, name, wide)

    monkeypatch.setattr(Adapter, "read", counting)
    return found


def test_every_module_is_read_once_for_all_methods(
    here: Path, reads: list[tuple[str, str]]
) -> None:
    table("--methods", "arithmetic,karcher,cluster")
    assert len(reads) == len(set(reads)) == 9


def test_methods_that_count_first_share_one_more_reading(
    here: Path, reads: list[tuple[str, str]]
) -> None:
    passes = loramerge.ties(["a", "b", "c"], trim_scope="model")[1].plan.counts
    reads.clear()
    rows = (f"ties:density={density}:trim_scope=model" for density in (0.1, 0.2, 0.5))
    table("--methods", ",".join(rows))
    assert len(reads) == 9 * (passes + 1)


@pytest.mark.parametrize("first", ROWS)
def test_a_row_with_options_of_its_own_is_what_the_method_gives(here: Path, first: str) -> None:
    names = [first, *(name for name in ROWS if name != first)]
    found = table("--methods", ",".join(names), "--keep", "kept", "--save-dtype", "float32")
    assert [row["name"] for row in found["methods"]] == names
    for name, row in zip(names, found["methods"], strict=True):
        method, options = ROWS[name]
        alone, report = loramerge.run(method, ["a", "b", "c"], save_dtype="float32", **options)
        assert row["recipe"] == json.loads(json.dumps(report.plan.recipe.canonical()))
        # float32 factors, rounded once more in a file
        assert row["relative_error"] == pytest.approx(report.relative_error, rel=1e-5)
        assert row["scale"]["factor"] == pytest.approx(report.scale, rel=1e-6)
        kept = here / "kept" / name.replace(":", "-")
        assert bytes_of(kept) == bytes_of(alone.save(here / "alone", force=True))


def test_a_method_that_looks_at_siblings_finds_them_in_any_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    files = [str(bare(name, Path(f"{name}.safetensors"))) for name in ("sh3_rev", "sort_inter")]
    done = typed("compare", *files, "--methods", "arithmetic,decorrelate", "--json")
    _, row = json.loads(done.out)["methods"]
    _, report = loramerge.decorrelate(files, save_dtype="float32")
    # float32 factors, rounded once more in a file
    assert row["relative_error"] == pytest.approx(report.relative_error, rel=1e-5)


def test_what_is_kept_is_not_computed_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    ties = method("ties")

    def counting(updates: Updates, options: Options) -> object:
        """The rule, counted."""
        called.extend(updates.names)
        return ties.rule(updates, options)

    monkeypatch.setitem(registry._registered, "ties", replace(ties, rule=counting))
    table("--methods", "ties:scale=auto,ties:density=0.5", "--keep", "kept")
    assert len(called) == 2 * 3


def test_kept_merges_are_those_of_the_methods(here: Path) -> None:
    found = table("--methods", "arithmetic,ties", "--rank", "4", "--keep", "kept")
    assert found["outputs"] == [str(Path("kept") / name) for name in ("arithmetic", "ties")]
    for name in ("arithmetic", "ties"):
        alone, _ = loramerge.run(name, ["a", "b", "c"], rank=4)
        kept = here / "kept" / name / "adapter_model.safetensors"
        mine, theirs = (loramerge.load(path).source for path in (kept, alone.adapter.source.path))
        for key in mine.tensors:
            assert mine.read(key) == theirs.read(key)
    again = typed("compare", "a", "b", "c", "--methods", "ties", "--keep", "kept")
    assert again.code == 1  # there is one already


def test_nothing_is_written_unless_it_is_to_be_kept(here: Path) -> None:
    before = sorted(here.rglob("*"))
    done = typed("compare", "a", "b", "c", "--methods", "arithmetic,cat")
    assert done.code == 0, done.err
    assert sorted(here.rglob("*")) == before
    lines = done.out.splitlines()
    assert lines[0].split() == ["method", "rank", "energy", "error", "scale", "seconds", "size"]
    assert [line.split()[0] for line in lines[1:3]] == ["arithmetic", "cat"]


@pytest.mark.parametrize(
    ("methods", "said", "hint"),
    [
        ("squeeze", "squeeze merges nothing", "methods that merge"),
        ("project", "project merges nothing", "methods that merge"),
        ("tiez", "no method 'tiez'", "'ties'"),
        ("", "needs methods", "--methods arithmetic,ties"),
        ("ties:densety=1", "ties has no option 'densety'", "'density'"),
        ("ties:density=2", "--density is 2; it must be a number > 0", "ties --help"),
        ("ties:density", "'density' in ties:density is no option with a value", "="),
        ("tiez:density=1", "no method 'tiez'", "'ties'"),
        ("cat:rank=3", "cat is arithmetic --rank full; it takes no --rank", "arithmetic"),
        ("tsv,ties,tsv", "tsv stands twice", "options"),
        ("ties:seed=3", "--seed is for all methods", "--seed by itself"),
        ("tsv:rank=3,ties:energy=2", "--energy is 2", "ties --help"),
    ],
)
def test_what_cannot_be_a_row_is_refused(here: Path, methods: str, said: str, hint: str) -> None:
    done = typed("compare", "a", "b", f"--methods={methods}")
    assert (done.code, done.out) == (2, "")
    assert said in done.lines[0]
    assert hint in done.lines[1]


def test_python_compares_the_same_rows(here: Path) -> None:
    names = "arithmetic,ties:density=0.5:trim_scope=model,tsv"
    told = table("--methods", names, "-w", "1", "-w", "0.5", "-w", "-1", "--rank", "3")["methods"]
    for methods in (names, names.split(",")):
        found = loramerge.compare(["a", "b", "c"], methods, weights=[1, 0.5, -1], rank=3)
        assert [row.entry.name for row in found] == names.split(",")
        errors = [row.trial.relative_error for row in found]
        assert errors == [row["relative_error"] for row in told]
    with pytest.raises(UsageError, match="ties has no option 'densety'"):
        loramerge.compare(["a", "b"], ["ties:densety=1"])


def test_what_is_to_be_said_of_one_row_names_it(here: Path) -> None:
    found = table("--methods", "arithmetic,tsv:rank=20")
    assert found["notes"] == ["tsv:rank=20: rank 14 is all there is; 20 was asked for"]
