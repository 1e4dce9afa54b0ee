"""Several methods in one table: what each would give is what it gives."""

import json
from pathlib import Path

import pytest

import loramerge
from tests.typed import typed

METHODS = ("arithmetic", "ties", "cluster", "karcher", "dare")


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


def test_every_module_is_read_once_for_all_methods(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from loramerge.adapter import Adapter

    read: list[tuple[str, str]] = []
    plain = Adapter.read

    def counting(adapter: Adapter, name: str, wide: bool = False) -> object:
        read.append((adapter.reference, name))
        return plain(adapter, name, wide)

    monkeypatch.setattr(Adapter, "read", counting)
    table("--methods", "arithmetic,karcher,cluster")
    assert len(read) == len(set(read)) == 9


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
    ("methods", "said"),
    [("squeeze", "squeeze merges nothing"), ("tiez", "no method 'tiez'"), ("", "needs methods")],
)
def test_what_is_no_merge_is_refused(here: Path, methods: str, said: str) -> None:
    done = typed("compare", "a", "b", f"--methods={methods}")
    assert done.code == 2
    assert said in done.err
