"""--report and --plot-file: pages and pictures that need nothing else, and say what JSON says."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import loramerge as lm
from loramerge.drawing import HEIGHT, WIDTH, columns, curves
from loramerge.page import page
from tests.build import write_peft
from tests.typed import merged, typed

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(autouse=True)
def here(three: list[Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of the adapters a, b, c."""
    monkeypatch.chdir(three[0].parent)
    return three[0].parent


class Tags(HTMLParser):
    """Every tag with its attributes, and that each one is closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in ("meta", "line"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_fetches_nothing() -> None:
    assert merged("--report", "r.html").code == 0
    text = Path("r.html").read_text("utf-8")
    tags = Tags(text).found
    assert [tag for tag, _ in tags].count("svg") == 1
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert not [a for _, attributes in tags for a in attributes if a in ("src", "href")]
    assert "url(" not in text
    assert "@import" not in text


def test_the_page_says_what_the_report_says() -> None:
    _, report = lm.arithmetic(["a", "b", "c"], weights=[1, 0.5, -1], rank=3)
    text = page(report)
    assert "loramerge arithmetic a b c -w 1 -w 0.5 -w -1 --rank 3" in text
    assert f"{report.relative_error:.4g} against the exact weighted sum" in text
    for digest in (*report.sources_sha256, report.tensors_sha256):
        assert digest in text
    rows = dict(re.findall(r"<tr><td>(layers[^<]*)</td>(.*)</tr>", text))
    assert list(rows) == [module.name for module in report.modules]
    for module in report.modules:
        numbers = re.findall(r"<td class=number>([^<]*)<", rows[module.name])
        assert numbers == ["3", f"{module.relative_error:.4g}", f"{module.energy:.6g}"]


def test_the_columns_are_as_high_as_the_errors() -> None:
    _, report = lm.arithmetic(["a", "b", "c"], rank=2)
    drawn = re.search(r"<svg.*?</svg>", page(report), re.DOTALL)
    assert drawn
    found = ElementTree.fromstring(drawn[0]).findall(f"{SVG}rect")
    heights = np.array([float(column.attrib["height"]) for column in found])
    errors = np.array([module.relative_error for module in report.modules])
    # written to a hundredth
    assert heights / heights.max() == pytest.approx(errors / errors.max(), abs=1e-3)
    titles = [column.find(f"{SVG}title") for column in found]
    for title, module in zip(titles, report.modules, strict=True):
        assert title is not None
        assert title.text == f"{module.name}: {module.relative_error:.3g}"


def test_names_from_files_cannot_write_into_the_page(here: Path, rng: np.random.Generator) -> None:
    pairs = {"<script>alert(1)</script>": (rng.random((2, 4)), rng.random((4, 2)))}
    write_peft(here / "a<b>&c", pairs)
    tags = Tags(page(lm.squeeze(here / "a<b>&c", rank=1)[1])).found
    assert not {"script", "b"} & {tag for tag, _ in tags}


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("squeeze a -r 2 --report r.txt", 2, "--report writes HTML, not r.txt"),
        ("squeeze a b -r 2 --out-dir small --report r.html", 2, "--report tells of one result"),
        ("cluster a b --sweep-k 2,3 --report r.html", 2, "it takes no --report"),
        ("squeeze a -r 2 --report taken.html", 1, "taken.html exists"),
        ("squeeze a -r 2 --report no/r.html", 1, "no/r.html cannot be written"),
        ("inspect a --plot-file p.png", 2, "--plot-file draws SVG, not p.png"),
        ("inspect a b --plot-file p.svg", 2, "--plot-file draws one adapter"),
        ("inspect a --plot-file taken.svg", 1, "taken.svg exists"),
    ],
)
def test_a_page_that_cannot_be_is_refused_before_anything_is_computed(
    words: str, code: int, said: str, here: Path
) -> None:
    for name in ("taken.html", "taken.svg"):
        Path(name).write_text("mine")
    before = sorted(here.rglob("*"))
    done = typed(*words.split())
    assert (done.code, done.out) == (code, "")
    assert said in done.lines[0]
    assert sorted(here.rglob("*")) == before


def test_force_replaces_a_page_and_a_recipe_writes_one_too() -> None:
    Path("r.yaml").write_text("{method: squeeze, adapters: a, rank: 2}")
    Path("r.html").write_text("old")
    done = typed("run", "r.yaml", "-o", "out", "--report", "r.html", "-f")
    assert (done.code, done.out) == (0, "out\n")
    ran = Path("r.html").read_text()
    assert typed("squeeze", "a", "-r", "2", "-o", "again", "--report", "s.html").code == 0
    assert ran == Path("s.html").read_text()


def test_the_picture_of_spectra_has_a_curve_for_each_module() -> None:
    assert typed("inspect", "a", "--plot-file", "p.svg").code == 0
    found = ElementTree.parse("p.svg").getroot().findall(f"{SVG}polyline")
    titles = [curve.find(f"{SVG}title") for curve in found]
    assert [title is not None and title.text for title in titles] == list(lm.load("a").modules)
    points = [curve.attrib["points"].split() for curve in found]
    assert [len(one) for one in points] == [4] * 3
    assert len({one[0] for one in points}) == 1  # each begins at 1, its largest


@pytest.mark.parametrize("values", [{}, {"one": 0.0}, {"one": 2.0, "two": 0.0}, {"x": 1e-30}])
def test_any_numbers_stay_inside_the_picture(values: dict[str, float]) -> None:
    drawn = [columns(values, "up"), curves({k: [v] for k, v in values.items()}, "up", "across")]
    for text in drawn:
        for name, number in re.findall(r'\b(x|y|x1|y1|x2|y2|width|height)="([^"]+)"', text):
            assert 0 <= float(number) <= (WIDTH if name in ("x", "x1", "x2", "width") else HEIGHT)
        ElementTree.fromstring(text)
