"""The import contracts: kept, complete, and each one broken on purpose to see it fire."""

import re
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest

from tests.typed import BIN, ROOT, clean

CONFIG = ROOT / ".importlinter"
# Contract, file, the line put at its end.
BREAKS = [
    ("one-way", "adapter.py", "from loramerge import plan"),
    ("one-way", "linalg/factors.py", "from loramerge.engine import run"),
    ("one-way", "io/peft.py", "from loramerge.cli import main"),
    ("one-way", "stray.py", '"""A module no layer names."""'),
    ("pure-algorithms", "algorithms/squeeze.py", "import safetensors"),
    ("pure-algorithms", "algorithms/_gauges.py", "from loramerge.io import peft"),
    ("pure-algorithms", "algorithms/newcomer.py", "import huggingface_hub"),
    ("independent-methods", "algorithms/squeeze.py", "from loramerge.algorithms import cluster"),
    ("independent-methods", "algorithms/newcomer.py", "import loramerge.algorithms.squeeze"),
    ("terminal", "report.py", "import rich"),
    ("terminal", "newcomer.py", "from click import echo"),
    ("lazy", "linalg/_numpy.py", "import numpy"),
    ("lazy", "compute.py", "def late():\n    import torch"),
    ("lazy", "newcomer.py", "import sklearn.cluster"),
]


def contracts() -> dict[str, str]:
    """The name of every contract by its key."""
    config = ConfigParser()
    config.read(CONFIG)
    start = "importlinter:contract:"
    return {
        section.removeprefix(start): config[section]["name"]
        for section in config.sections()
        if section.startswith(start)
    }


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A directory with the package and its contracts, to break."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "loramerge", tmp_path / "loramerge", ignore=ignored)
    shutil.copy(CONFIG, tmp_path)
    return tmp_path


def lint(directory: Path) -> tuple[int, str]:
    """Exit code and output of lint-imports on the package in a directory."""
    done = subprocess.run(
        [BIN / "lint-imports", "--no-cache"],
        cwd=directory,
        env=clean({"PYTHONPATH": str(directory)}),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def broken(output: str) -> set[str]:
    return {
        key
        for key, name in contracts().items()
        if re.search(rf"^{re.escape(name)} BROKEN", output, re.MULTILINE)
    }


def test_every_contract_is_kept(copy: Path) -> None:
    code, output = lint(copy)
    assert (code, broken(output)) == (0, set()), output
    assert f"{len(contracts())} kept, 0 broken" in output


def test_every_contract_is_broken_at_least_once_here() -> None:
    assert {contract for contract, _, _ in BREAKS} == set(contracts())


@pytest.mark.parametrize(("contract", "file", "line"), BREAKS)
def test_a_broken_contract_is_seen(contract: str, file: str, line: str, copy: Path) -> None:
    path = copy / "loramerge" / file
    before = path.read_text() if path.exists() else ""
    path.write_text(f"{before}\n{line}\n")
    code, output = lint(copy)
    assert code == 1
    # A module no layer names stops the whole layers contract, under the same name.
    assert contract in broken(output), output
