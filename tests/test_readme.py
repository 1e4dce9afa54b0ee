"""Every command in the README works, in a directory with the adapters it names."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.typed import BIN, ROOT, bare, clean, shell

README = (ROOT / "README.md").read_text("utf-8")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = FENCE.findall(README)
SHELL = [code for language, code in BLOCKS if language == "sh"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a.safetensors and b.safetensors, kept for the whole README."""
    directory = tmp_path_factory.mktemp("readme")
    bare("sh3_rev", directory / "a.safetensors")
    bare("sort_inter", directory / "b.safetensors")
    return directory


def run(code: str, place: Path) -> subprocess.CompletedProcess[str]:
    """A block as a script that stops at its first failure."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code],
        cwd=place,
        env=clean({"PATH": f"{BIN}:/usr/bin:/bin"}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_shell_block_runs_after_those_before_it(place: Path) -> None:
    for code in SHELL:
        if not code.startswith("make "):
            done = run(code, place)
            assert done.returncode == 0, f"{code}: {done.stderr}"


def test_the_first_block_is_the_two_set_up_commands() -> None:
    targets = re.findall(r"^make (\w+)", SHELL[0], re.MULTILINE)
    assert targets == ["demo", "test"]
    assert set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)) >= {*targets}


def test_the_emblem_commands_stand_there_as_they_are_typed() -> None:
    assert "loramerge cluster a.safetensors b.safetensors -k 16\n" in SHELL[1]
    assert "loramerge squeeze --rank 8\n" in SHELL[2]


def test_every_python_block_runs(place: Path) -> None:
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert blocks
    for code in blocks:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=place,
            env=clean({"PYTHONPATH": str(ROOT)}),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"0\.\d{3}, worst in model\.layers\.\S+\n", done.stdout)


def test_the_report_shown_is_the_report_printed(place: Path) -> None:
    """Numbers and the worst module's name aside: they differ between machines."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    assert spec
    assert spec.loader
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    shown = next(code for language, code in BLOCKS if language == "text")
    done = shell("loramerge cluster a.safetensors b.safetensors -k 16 -o again", place)
    assert make.plain_words(shown) == make.plain_words(done.err)


def test_every_link_leads_somewhere() -> None:
    for document in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        links = re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text("utf-8"))
        local = [link for link in links if not link.startswith("https://")]
        assert [link for link in local if not (ROOT / link).exists()] == []
