"""The shape of the house, read from the source: what import contracts cannot say."""

import ast
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.typed import ROOT

HEAVY = {"numpy", "torch", "sklearn", "huggingface_hub", "scipy", "array_api_compat"}
# Which names of _lazy only these files may take.
OWNERS = {
    "torch": {"linalg/_torch.py", "compute.py", "io/_pickle.py"},
    "array_api_torch": {"linalg/_torch.py", "linalg/kernels.py"},
    "threadpoolctl": {"compute.py"},
}
LONGEST = 300
VAGUE = {"common", "helper", "helpers", "misc", "util", "utils"}


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Every file of the package, as its path inside and its syntax tree."""
    for path in sorted((root / "loramerge").rglob("*.py")):
        yield str(path.relative_to(root / "loramerge")), ast.parse(path.read_text())


def for_types(tree: ast.Module) -> set[ast.AST]:
    """Everything under `if TYPE_CHECKING`."""
    guards = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    ]
    return {below for guard in guards for part in guard.body for below in ast.walk(part)}


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every (module, name) imported at run time; the name is empty for `import module`."""
    hidden = for_types(tree)
    for node in ast.walk(tree):
        if node in hidden:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def heavy_imports(root: Path) -> list[str]:
    """Heavy libraries imported anywhere instead of being taken from _lazy."""
    return [
        f"{file}: {module}"
        for file, tree in sources(root)
        for module, _ in imports(tree)
        if module.partition(".")[0] in HEAVY
    ]


def lazy_names_out_of_place(root: Path) -> list[str]:
    """Backends that a file takes from _lazy although the seam does not allow it."""
    return [
        f"{file}: {name}"
        for file, tree in sources(root)
        for module, name in imports(tree)
        if module == "loramerge._lazy" and file not in OWNERS.get(name, {file})
    ]


def entangled_plugins(root: Path) -> list[str]:
    """Methods and layouts that import another one: they share only files with an underscore."""
    found = []
    for file, tree in sources(root):
        folder, _, name = file.rpartition("/")
        if folder not in ("algorithms", "io") or name.startswith("_"):
            continue
        package = f"loramerge.{folder}"
        for module, what in imports(tree):
            inside = module.removeprefix(package).lstrip(".") if module != package else what
            if module.startswith(package) and not inside.startswith("_"):
                found.append(f"{file}: {inside}")
    return found


def files(root: Path) -> list[Path]:
    """Every Python file people write; the testbed came from elsewhere."""
    folders = ("loramerge", "tests", "docs", "benchmarks", "fixtures")
    found = [path for folder in folders for path in (root / folder).rglob("*.py")]
    return [path for path in found if "testbed" not in path.parts]


def long_files(root: Path) -> list[str]:
    return [str(p) for p in files(root) if len(p.read_text().splitlines()) > LONGEST]


def vague_names(root: Path) -> list[str]:
    return [str(p) for p in files(root) if p.stem.strip("_") in VAGUE or p.parent.name in VAGUE]


def without_docstring(root: Path) -> list[str]:
    return [file for file, tree in sources(root) if not ast.get_docstring(tree)]


CHECKS: list[Callable[[Path], list[str]]] = [
    heavy_imports,
    lazy_names_out_of_place,
    entangled_plugins,
    long_files,
    vague_names,
    without_docstring,
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_house_is_in_order(check: Callable[[Path], list[str]]) -> None:
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("check", "file", "text"),
    [
        (heavy_imports, "report.py", "import numpy as np"),
        (heavy_imports, "align.py", "def late():\n    from torch import nn"),
        (heavy_imports, "_lazy.py", "import huggingface_hub.constants"),
        (lazy_names_out_of_place, "plan.py", "from loramerge._lazy import torch"),
        (lazy_names_out_of_place, "algorithms/cluster.py", "from loramerge._lazy import torch"),
        (lazy_names_out_of_place, "solve.py", "from loramerge._lazy import threadpoolctl"),
        (entangled_plugins, "algorithms/squeeze.py", "from loramerge.algorithms import cluster"),
        (entangled_plugins, "algorithms/new.py", "import loramerge.algorithms.cluster"),
        (entangled_plugins, "io/new.py", "from loramerge.io.peft import read"),
        (long_files, "report.py", "\n" * LONGEST),
        (vague_names, "utils.py", '"""Everything."""'),
        (vague_names, "helpers/thing.py", '"""Everything."""'),
        (without_docstring, "new.py", "x = 1"),
    ],
)
def test_disorder_is_seen(
    check: Callable[[Path], list[str]], file: str, text: str, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "loramerge", tmp_path / "loramerge")
    path = tmp_path / "loramerge" / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{path.read_text() if path.exists() else ''}\n{text}\n")
    assert any(path.name in problem for problem in check(tmp_path))
