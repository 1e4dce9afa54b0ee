"""Pictures as SVG: a text that stands in a page or in a file of its own, without any library."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape

__all__ = ["columns", "curves"]

WIDTH, HEIGHT = 720.0, 240.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 8.0, 12.0, 36.0
# Lines across, from 0 to the largest value.
LINES = 4
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:currentColor}"
    "line{stroke:currentColor;stroke-opacity:.2}"
    "rect{fill:#4878a8}rect:hover{fill:#d1603d}"
    "polyline{fill:none;stroke:#4878a8;stroke-opacity:.4}"
    "polyline:hover{stroke:#d1603d;stroke-opacity:1;stroke-width:2}"
)


def columns(values: Mapping[str, float], up: str) -> str:
    """A column for each name, in order, that tells name and value under the pointer.

    `up` says what the height is.
    """
    highest = max(values.values(), default=0.0) or 1.0
    step = (WIDTH - LEFT - RIGHT) / max(len(values), 1)
    drawn = []
    for place, (name, value) in enumerate(values.items()):
        height = (HEIGHT - TOP - BOTTOM) * value / highest
        drawn.append(
            f'<rect x="{LEFT + place * step:.2f}" y="{HEIGHT - BOTTOM - height:.2f}" '
            f'width="{max(step * 0.8, 0.5):.2f}" height="{height:.2f}">'
            f"<title>{escape(name)}: {value:.3g}</title></rect>"
        )
    return _picture(drawn, highest, up, f"{len(values)} modules, in their order")


def curves(lines: Mapping[str, Sequence[float]], up: str, across: str) -> str:
    """A curve for each name over 1, 2, 3, ..., that tells its name under the pointer."""
    highest = max((value for values in lines.values() for value in values), default=0.0) or 1.0
    longest = max(map(len, lines.values()), default=1)
    step = (WIDTH - LEFT - RIGHT) / max(longest - 1, 1)
    drawn = []
    for name, values in lines.items():
        points = (
            f"{LEFT + place * step:.2f},{TOP + (HEIGHT - TOP - BOTTOM) * (1 - value / highest):.2f}"
            for place, value in enumerate(values)
        )
        drawn.append(
            f'<polyline points="{" ".join(points)}"><title>{escape(name)}</title></polyline>'
        )
    return _picture(drawn, highest, up, f"{across}, 1 to {longest}")


def _picture(drawn: Sequence[str], highest: float, up: str, across: str) -> str:
    inside = [*_scale(highest), *drawn, _text(WIDTH / 2, HEIGHT - 10, across, "middle")]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape(up)}"><style>{STYLE}</style>\n' + "\n".join(inside) + "\n</svg>\n"
    )


def _scale(highest: float) -> Iterator[str]:
    """Lines across with their values beside them."""
    for part in range(LINES + 1):
        y = TOP + (HEIGHT - TOP - BOTTOM) * (1 - part / LINES)
        yield f'<line x1="{LEFT:g}" x2="{WIDTH - RIGHT:g}" y1="{y:.2f}" y2="{y:.2f}"/>'
        yield _text(LEFT - 6, y + 4, f"{highest * part / LINES:.3g}", "end")


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:g}" y="{y:.2f}" text-anchor="{anchor}">{escape(words)}</text>'
