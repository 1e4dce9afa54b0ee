"""Pickles on the Hub: looked at by their beginning, downloaded when a number of them is read."""

import json
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

import pytest
import torch

import loramerge as lm
from loramerge.io import _pickle
from loramerge.io._pickle import outlines
from tests.hub.store import Hub
from tests.test_api import bytes_of
from tests.typed import typed

STEM = "base_model.model.layers.0.q_proj"
CONFIG = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}).encode()


def saved(found: object) -> bytes:
    stored = BytesIO()
    torch.save(found, stored)
    return stored.getvalue()


def factors(rank: int = 4, wide: int = 24, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    torch.manual_seed(0)
    return {
        f"{STEM}.lora_A.weight": torch.randn(rank, wide).to(dtype),
        f"{STEM}.lora_B.weight": torch.randn(wide, rank).to(dtype),
    }


@pytest.fixture
def there(hub: Hub) -> Hub:
    """me/x on the Hub, whose weights of 2 MB are a pickle."""
    stored = {"adapter_config.json": CONFIG, "adapter_model.bin": saved(factors(128, 2048))}
    hub.create("me/x", stored)
    return hub


@pytest.mark.parametrize(
    "found",
    [
        factors(),
        OrderedDict(factors(dtype=torch.bfloat16)),
        torch.nn.Linear(3, 2).half().state_dict(),
        {"view": torch.arange(24.0).reshape(4, 6)[1:3].T, "scalar": torch.tensor(8.0)},
        {"parameter": torch.nn.Parameter(torch.ones(2, 3))},
        {name: torch.zeros(2, dtype=getattr(torch, name)) for name in _pickle.DTYPES},
        {f"{number}": torch.ones(number) for number in range(300)},
        {},
    ],
)
def test_the_beginning_tells_what_torch_finds(found: object, tmp_path: Path) -> None:
    data = saved(found)
    (tmp_path / "x.bin").write_bytes(data)
    told = outlines(data[: 1 << 18], len(data))
    assert told is not None
    read = _pickle.Unpickled(tmp_path / "x.bin").outlines
    assert list(told.items()) == list(read.items())


class Planted:
    """What runs when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("planted"),)  # type: ignore[return-value]


def zipped(content: bytes, kind: int = 0, name: bytes = b"x/data.pkl") -> bytes:
    """The local header of a zip's first part, and its content."""
    return (
        struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, kind, 0, 0, 0, 0, 0, len(name), 0)
        + name
        + content
    )


@pytest.mark.parametrize(
    "head",
    [
        b"",
        saved({"x": Planted()}),
        saved({"x": 3}),
        saved([torch.ones(2)]),
        saved({3: torch.ones(2)}),
        saved({"x": torch.ones(2).expand(10**9, 2)}),
        saved({"x": torch.ones(2, dtype=torch.complex64)}),
        saved(factors())[:200],
        zipped(pickle.dumps({})[:-1]),
        zipped(pickle.dumps({}), kind=8),
        zipped(pickle.dumps({}), name=b"x/data/12"),
        pickle.dumps({}),
        zipped(b"ctorch\nFloatStorage\n."),
        zipped(b"ctorch._utils\n_rebuild_tensor_v2\n(lp0\ntR."),
        zipped(b"ccollections\nOrderedDict\n}(X\x01\0\0\0xK\x01ub."),
    ],
)
def test_what_does_not_begin_as_tensors_by_name_tells_nothing_and_runs_nothing(
    head: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert outlines(head, len(head)) is None
    assert not list(tmp_path.iterdir())


def test_no_memory_is_taken_because_a_file_says_so() -> None:
    head = zipped(b"\x80\x02}r\0\0\0\x01.")  # the 2**24th place of a memo
    tracemalloc.start()
    assert outlines(head, len(head)) == {}
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "words", [("inspect", "me/x"), ("squeeze", "me/x", "-r", "2", "--dry-run"), ("run", "r.yaml")]
)
def test_a_look_takes_three_requests_and_no_tensor(
    words: tuple[str, ...], there: Hub, here: Path
) -> None:
    Path("r.yaml").write_text("method: squeeze\nadapters: me/x\nrank: 2\n")
    dry = ("--dry-run",) if words[0] == "run" else ()
    done = typed(*words, *dry, "--allow-pickle")
    assert done.code == 0, done.err
    assert len([r for r in there.asked() if not r.path.startswith("/cdn/")]) == 3
    (asked,) = there.asked("/cdn/")
    assert asked.range == "bytes=0-262143"
    assert not list((here.parent / "cache").glob("**/*.bin"))


@pytest.mark.parametrize("wide", [24, 2048])
def test_a_result_is_that_of_the_same_pickle_here(wide: int, hub: Hub, here: Path) -> None:
    files = {"adapter_config.json": CONFIG, "adapter_model.bin": saved(factors(4, wide))}
    hub.create("me/x", files)
    for name, data in files.items():
        Path("x").mkdir(exist_ok=True)
        (Path("x") / name).write_bytes(data)
    for name, out in (("me/x", "a"), ("x", "b")):
        line = ("convert", name, "--to", "peft", "--allow-pickle", "-o", out, "-q")
        assert typed(*line).code == 0
    weights = [bytes_of(Path(out)) for out in "ab"]
    assert lm.load("a").modules.keys() == lm.load("b").modules.keys()
    tensors = [json.loads(one["loramerge.json"])["tensors_sha256"] for one in weights]
    assert tensors[0] == tensors[1]
    shown = [typed("inspect", n, "--allow-pickle", "--json").out for n in ("me/x", "x")]
    assert json.loads(shown[0])["ranks"] == json.loads(shown[1])["ranks"]


def test_a_pickle_that_is_not_what_its_beginning_says_is_refused(
    there: Hub, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lie = outlines(saved(factors(128, 2048, torch.bfloat16)), 10**7)
    monkeypatch.setattr(_pickle, "outlines", lambda head, size: lie)
    done = typed("squeeze", "me/x", "-r", "2", "--allow-pickle")
    assert (done.code, len(done.lines)) == (1, 2)
    assert "holds other tensors than its beginning says" in done.lines[0]
    assert not Path("x-r2").exists()


def test_a_pickle_that_tells_nothing_by_its_beginning_is_refused_as_one_here(
    hub: Hub, here: Path
) -> None:
    files = {"adapter_config.json": CONFIG, "adapter_model.bin": saved({"x": Planted()})}
    hub.create("me/x", files)
    done = typed("inspect", "me/x", "--allow-pickle")
    assert (done.code, "holds more than tensors" in done.lines[0]) == (1, True)
    assert not Path("planted").exists()
