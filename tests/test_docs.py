"""Generated pages: drawn from the declarations, and seen to be stale when they are."""

import importlib.util
import shlex
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from shutil import copyfile
from types import ModuleType

import pytest

from loramerge.cli import cli
from loramerge.io._foreign import FOREIGN
from loramerge.options import describe
from loramerge.registry import layout_names, methods
from tests.typed import ROOT, typed


def load() -> ModuleType:
    """docs/make.py, which is a script and no part of a package."""
    spec = importlib.util.spec_from_file_location("make", ROOT / "docs" / "make.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKE = load()


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    return {name: draw() for name, draw in MAKE.pages().items()}


def test_every_method_has_a_page_with_all_its_options(drawn: dict[str, str]) -> None:
    for method in methods().values():
        page = drawn[f"methods/{method.name}.md"]
        assert page.startswith(f"# {method.name}\n\n{method.summary}")
        assert f"```sh\n{method.example}\n```" in page
        assert method.paper in page
        assert method.sweep is None or f"```sh\n{method.sweep.example}\n```" in page
        for option in describe(method.options):
            assert f"`{option.flag}`" in page
            assert option.description.replace("|", "\\|") in page


EXAMPLES = [
    example
    for method in methods().values()
    for example in (method.example, method.sweep and method.sweep.example)
    if example
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_runs_as_it_stands(
    example: str, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b, c = three
    for name, source in (("a.safetensors", a), ("b.safetensors", b)):
        copyfile(source / "adapter_model.safetensors", a.parent / name)
    c.rename(a.parent / "my-adapter")
    monkeypatch.chdir(a.parent)
    done = typed(*shlex.split(example)[1:])
    assert (done.code, bool(done.out)) == (0, True), done.err


def test_the_command_line_page_holds_every_help_page(drawn: dict[str, str]) -> None:
    context = cli.make_context("loramerge", ["--help"], resilient_parsing=True)
    for name in cli.list_commands(context):
        assert f"\n## loramerge {name}\n\n```text\nUsage: loramerge {name} " in drawn["cli.md"]


def test_the_layouts_page_names_what_is_read_and_what_is_refused(drawn: dict[str, str]) -> None:
    for name in [f"`{name}`" for name in layout_names()] + [f.name for f in FOREIGN]:
        assert f"| {name} |" in drawn["layouts.md"]


def test_the_picture_is_a_whole_svg_of_both_commands_that_loads_nothing(
    drawn: dict[str, str],
) -> None:
    picture = drawn["report.svg"]
    assert ET.fromstring(picture).tag.endswith("svg")
    assert "url(http" not in picture
    words = " ".join(MAKE.words_of(picture))
    for said in ("cluster a.safetensors b.safetensors -k #", "squeeze --rank #", "energy # %"):
        assert said in words


def test_pages_are_the_same_on_every_run(drawn: dict[str, str]) -> None:
    for name, draw in MAKE.pages().items():
        if name != MAKE.PICTURE:
            assert draw() == drawn[name]


def test_what_was_just_written_is_fresh(drawn: dict[str, str], tmp_path: Path) -> None:
    assert MAKE.stale(tmp_path, drawn) == sorted(drawn)
    MAKE.write(tmp_path, drawn)
    assert MAKE.stale(tmp_path, drawn) == []


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("methods/squeeze.md", "--oversample", "--undersample"),
        ("cli.md", "loramerge squeeze my-adapter --rank 8", "loramerge squeeze my-adapter -r 8"),
        ("layouts.md", "| `peft` |", "| `pefd` |"),
        ("report.svg", "verified", "believed"),
    ],
)
def test_a_page_that_says_something_else_is_stale(
    name: str, old: str, new: str, drawn: dict[str, str], tmp_path: Path
) -> None:
    MAKE.write(tmp_path, drawn)
    path = tmp_path / name
    assert old in path.read_text("utf-8")
    path.write_text(path.read_text("utf-8").replace(old, new), "utf-8")
    assert MAKE.stale(tmp_path, drawn) == [name]
    MAKE.write(tmp_path, drawn)
    assert MAKE.stale(tmp_path, drawn) == []


def test_the_page_of_a_method_that_is_gone_is_stale_and_goes(
    drawn: dict[str, str], tmp_path: Path
) -> None:
    MAKE.write(tmp_path, drawn)
    (tmp_path / "methods" / "gone.md").write_text("# gone\n")
    assert MAKE.stale(tmp_path, drawn) == ["methods/gone.md"]
    MAKE.write(tmp_path, drawn)
    assert not (tmp_path / "methods" / "gone.md").exists()


def test_a_picture_with_other_numbers_is_fresh(drawn: dict[str, str], tmp_path: Path) -> None:
    MAKE.write(tmp_path, drawn)
    path = tmp_path / "report.svg"
    text = path.read_text("utf-8")
    slower = text.replace("0.00029", "1e-07")
    assert slower != text
    path.write_text(slower, "utf-8")
    assert MAKE.stale(tmp_path, drawn) == []


def test_check_fails_by_name_where_a_page_is_stale(
    drawn: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MAKE, "DOCS", tmp_path)
    monkeypatch.setattr(
        MAKE, "pages", lambda: {name: partial(str, text) for name, text in drawn.items()}
    )
    monkeypatch.setattr("sys.argv", ["make.py", "--check"])
    with pytest.raises(SystemExit) as caught:
        MAKE.main()
    assert "methods/cluster.md" in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("sys.argv", ["make.py"])
    MAKE.main()
    monkeypatch.setattr("sys.argv", ["make.py", "--check"])
    MAKE.main()
