"""YAML as recipes are written in: plain data by the rules of YAML 1.2, and nothing clever."""

import json
import time
from pathlib import Path

import pytest
import yaml

from loramerge.errors import UsageError
from loramerge.io import _yaml
from loramerge.io._yaml import Value, read_text, read_yaml, write_yaml

DOCUMENTS: list[Value] = [
    {"method": "ties", "density": 0.5, "adapters": ["a", {"reference": "b", "weight": -0.5}]},
    {"steps": [{"name": "x", "include": ["*q*", "1e5", "no", "null", "~", ""]}], "empty": []},
    {"text": "colon: here", "path": "./a b/c", "uri": "hf://u/r@main/x.safetensors", "n": None},
    {"odd": ["#no comment", "- no item", "&a", "*b", "!t", "{", "'", '"', "é\n\t😀", "12", "1.5"]},
    {"numbers": [1, -1, 0.1, 1e-300, 1e22, 123456789012345678901234567890], "flags": [True, False]},
    {"nested": [["a", ["b"]], {"c": {"d": []}}], "map": {}},
]


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_what_is_written_is_read_back_the_same(document: Value) -> None:
    assert isinstance(document, dict)
    assert read_yaml(write_yaml(document), "x") == document


@pytest.mark.parametrize("document", DOCUMENTS, ids=range(len(DOCUMENTS)))
def test_json_is_yaml(document: Value) -> None:
    for indent in (None, 2, "\t"):
        assert read_yaml(json.dumps(document, indent=indent), "x") == document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1.", 1.0),
        ("-.5", -0.5),
        ("+3", 3),
        ("017", 17),
        ("no", "no"),
        ("on", "on"),
        ("True", True),
        ("~", None),
        ("", None),
        ("'1'", "1"),
        ("1:30", "1:30"),
        ("2024-01-02", "2024-01-02"),
        ("1_000", "1_000"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
        ("a: # nothing\nb: |\n  text\n", {"a": None, "b": "text\n"}),
        ("1: x\nno: y", {"1": "x", "no": "y"}),
    ],
)
def test_scalars_are_those_of_the_core_schema(text: str, value: Value) -> None:
    assert read_yaml(text, "x") == value


def test_ordinary_documents_are_read_as_pyyaml_reads_them() -> None:
    text = "a: 1\nb:\n- x\n- {c: 2.5, d: [true, 'q', \"r\"]}\nc: >\n  folded\n  text\n"
    assert read_yaml(text, "x") == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("a: 1\nb: 2\na: 3", 1, "'a' is given twice"),
        ("x: 1\ny:\n  a: 1\n  a: 2", 3, "'a' is given twice"),
        ('{"a": {"b": 1, "b": 2}}', None, "'b' is given twice"),
        ("a: &x 1", 1, "anchors"),
        ("a: 1\nb: *a", 2, "anchors"),
        ("a: !!python/object/apply:os.system [ls]", 1, "tags"),
        ("a: !x 1", 1, "tags"),
        ("a: 1\n---\nb: 2", 2, "second document"),
        ("? [a]\n: 1", 1, "cannot be a key"),
        ("a: [1", 1, "no YAML"),
        ("a: 'x", 1, "no YAML"),
        ("a: 1\n\tb: 2", 2, "no YAML"),
        ("a: \x00", None, "no YAML"),
        ('a: "\\ud800"', None, "half a surrogate pair"),
        ('{"a": "\\ud800"}', None, "half a surrogate pair"),
        ("[" * 50 + "]" * 50, 1, "deeper than 32 levels"),
    ],
)
def test_what_is_more_than_plain_data_is_refused_by_line(
    text: str, line: int | None, said: str
) -> None:
    with pytest.raises(UsageError) as caught:
        read_yaml(text if said != "deeper than 32 levels" else "a: " + text, "r.yaml")
    assert said in caught.value.message
    assert caught.value.message.startswith("r.yaml, line " if line else "r.yaml: ")


def test_aliases_that_would_multiply_are_refused_at_once() -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n"
        for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    )
    with pytest.raises(UsageError, match="anchors"):
        read_yaml(bomb, "x")


@pytest.mark.parametrize("text", ["[" * 200_000, "- " * 100_000, '{"a":' * 40_000])
def test_depth_costs_neither_the_stack_nor_much_time(text: str) -> None:
    began = time.perf_counter()
    with pytest.raises(UsageError):
        read_yaml(text, "x")
    assert time.perf_counter() - began < 10  # some 0.1 s; quadratic would be minutes


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "cannot be read"), (b"\xff\xfe", "not text"), (b" " * (_yaml.LARGEST + 1), "larger")],
)
def test_a_file_that_is_no_text_is_refused(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        read_text(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes("\ufeffa: 1".encode())
    assert read_yaml(read_text(path), "x") == {"a": 1}
