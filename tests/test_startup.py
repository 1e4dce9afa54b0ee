"""Starting stays light: what only looks at headers imports no numpy, torch, sklearn or rich."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.build import write_peft
from tests.conftest import factors
from tests.typed import ROOT, clean

HEAVY = ("huggingface_hub", "numpy", "rich", "safetensors", "scipy", "sklearn", "torch")
# Runs a command line as `loramerge` does, then prints which heavy modules were imported.
PROBE = f"""
import json, sys
try:
    exec(sys.argv[1])
except SystemExit as exit:
    assert not exit.code
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]), file=sys.stderr)
"""
COMMAND = "import sys; sys.argv = {words!r}; from loramerge.cli import main; main()"


def imported(code: str, cwd: Path, path: Path = ROOT) -> list[str]:
    """The heavy modules a fresh interpreter has imported after running the code."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, code],
        cwd=cwd,
        env=clean({"PYTHONPATH": str(path)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stderr.splitlines()[-1])


def command(*words: str) -> str:
    return COMMAND.format(words=["loramerge", *words])


@pytest.fixture
def adapter(tmp_path: Path, rng: object) -> Path:
    """A directory that holds the adapter x, and a recipe of two steps on it."""
    write_peft(tmp_path / "x", factors(rng, 4))
    (tmp_path / "two.yaml").write_text(
        "steps: [{name: y, method: squeeze, rank: 3, adapters: x}, {method: prune, adapters: y}]"
    )
    return tmp_path


@pytest.mark.parametrize(
    "code",
    [
        "import loramerge",
        "import loramerge; dir(loramerge); loramerge.cluster; loramerge.load",
        command("--help"),
        command("--version"),
        command("methods"),
        command("layouts", "--json"),
        command("cluster", "--help"),
        command("squeeze", "--help"),
        command("pull", "--help"),
        command("push", "--help"),
        command("run", "--help"),
        command("reproduce", "--help"),
        command("inspect", "x"),
        command("inspect", "x", "--modules", "--json"),
        command("squeeze", "x", "-r", "2", "--dry-run"),
        command("arithmetic", "x", "x", "--dry-run", "--json"),
        command("run", "two.yaml", "--dry-run"),
    ],
)
def test_looking_imports_nothing_heavy(code: str, adapter: Path) -> None:
    assert imported(code, adapter) == []


def test_computing_imports_numpy_but_neither_torch_nor_rich(adapter: Path) -> None:
    assert imported(command("squeeze", "x", "-r", "2", "-q"), adapter) == ["numpy"]


@pytest.mark.parametrize(
    ("file", "module"),
    [("adapter.py", "numpy"), ("cli/__init__.py", "rich"), ("algorithms/cluster.py", "sklearn")],
)
def test_the_probe_sees_a_heavy_import_where_there_is_one(
    file: str, module: str, adapter: Path, sabotaged: Path
) -> None:
    """A copy of the package in which one file imports something heavy at its top."""
    source = sabotaged / "loramerge" / file
    source.write_text(f"{source.read_text()}\nimport {module}\n")
    assert module in imported(command("methods"), adapter, sabotaged)


def test_the_copy_is_light_as_long_as_nothing_is_put_into_it(
    adapter: Path, sabotaged: Path
) -> None:
    assert imported(command("methods"), adapter, sabotaged) == []


def test_help_answers_within_a_generous_second(adapter: Path) -> None:
    # About 0.12 s on a quiet machine; the bound catches only what is grossly wrong.
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", command("--help")],
            cwd=adapter,
            env=clean({"PYTHONPATH": str(ROOT)}),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        microseconds = sum(
            int(line.split("|")[0].removeprefix("import time:"))
            for line in done.stderr.splitlines()
            if line.startswith("import time:") and "self" not in line
        )
        if microseconds < 1_000_000:
            return
    raise AssertionError(f"imports took {microseconds / 1e6:.2f} s")


@pytest.fixture
def sabotaged(tmp_path: Path) -> Path:
    """A directory with a copy of the package to put something into."""
    import shutil

    copy = tmp_path / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "loramerge", copy / "loramerge", ignore=ignored)
    return copy
