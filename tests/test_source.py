"""Opening safetensors files: checked from the header alone, read as the safetensors library reads.

Every law here holds for any file, so it is tried on all fixtures or on thousands of damaged ones.
"""

import gc
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fixtures.storage import Tensor, entry, framed, safetensors
from loramerge.errors import AdapterError
from loramerge.io import _header, _source
from loramerge.io._source import open_source

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOOD = sorted(
    path for layout in ("peft", "kohya") for path in (FIXTURES / layout).rglob("*.safetensors")
)


def named(path: Path) -> str:
    return str(path.relative_to(FIXTURES))


@pytest.mark.parametrize("path", GOOD, ids=named)
def test_every_tensor_reads_as_the_safetensors_library_reads_it(path: Path) -> None:
    source = open_source(path)
    with safe_open(path, "pt") as theirs:
        assert set(source.tensors) == set(theirs.keys())
        assert dict(source.metadata) == (theirs.metadata() or {})
        for key in source.tensors:
            tensor = theirs.get_tensor(key)
            assert source.tensors[key].shape == tuple(tensor.shape)
            if tensor.is_floating_point():
                # Exact: every stored float fits the float32 or float64 it is read as.
                np.testing.assert_array_equal(source.array(key), tensor.double().numpy())


@pytest.mark.parametrize(("name", "dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_every_two_byte_float_decodes_to_its_value(name: str, dtype: torch.dtype) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    ours = _source.decode(bits.tobytes(), name, "all")
    theirs = torch.from_numpy(bits.view(np.int16)).view(dtype).float().numpy()
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float64, 0.1),
        (torch.float32, 0.5),
        (torch.float16, 0.1),
        (torch.bfloat16, 0.1),
        (torch.int64, -3),
        (torch.int32, 7),
        (torch.int16, 7),
        (torch.int8, -7),
        (torch.uint8, 200),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_number_of_any_dtype_and_shape_reads_as_torch_has_it(
    dtype: torch.dtype, value: float, shape: tuple[int, ...], tmp_path: Path
) -> None:
    stored = torch.full(shape, value, dtype=dtype)
    save_file({"alpha": stored}, tmp_path / "x.safetensors")
    assert open_source(tmp_path / "x.safetensors").scalar("alpha") == stored.double().item()


LIGHT = """
import sys
from loramerge.io._open import open_adapter
adapter = open_adapter(sys.argv[1])
assert adapter.modules
print(*sorted({"numpy", "torch", "safetensors", "click", "rich"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "name", ["peft/linear", "kohya/alphas.safetensors", "kohya/brain.safetensors"]
)
def test_headers_are_read_without_numpy_and_torch(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, FIXTURES / name], capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("", "")


def test_reading_a_tensor_is_what_imports_numpy() -> None:
    reading = LIGHT.replace("assert adapter.modules", "adapter.read(next(iter(adapter.modules)))")
    done = subprocess.run(
        [sys.executable, "-c", reading, FIXTURES / "peft" / "linear"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "numpy"


def padded(length: int) -> bytes:
    """A good file whose header is so long, by padding."""
    file = safetensors({"a.lora_A.weight": Tensor((2, 4)), "a.lora_B.weight": Tensor((4, 2))})
    start = 8 + int.from_bytes(file[:8], "little")
    text = file[8:start].rstrip().ljust(length)
    return len(text).to_bytes(8, "little") + text + file[start:]


# As little-endian numbers these lengths begin with bytes that pickles (640 = 80 02), zip files,
# web pages (3C) and JSON texts (7B) begin with, some after white space (15392 = 20 3C).
@pytest.mark.parametrize("length", [640, 896, 0x1A3C, 0x207B, 0x3C20, 0x7B20, 0x3C0A, 0x4B50])
def test_a_header_length_is_never_taken_for_another_kind_of_file(
    length: int, tmp_path: Path
) -> None:
    (tmp_path / "x.safetensors").write_bytes(padded(length))
    assert set(open_source(tmp_path / "x.safetensors").tensors) == {
        "a.lora_A.weight",
        "a.lora_B.weight",
    }


def test_every_truncation_is_refused_with_a_hint(tmp_path: Path) -> None:
    whole, path = padded(256), tmp_path / "x.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterError) as refused:
            open_source(path)
        assert refused.value.hint


def test_missing_bytes_are_counted(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(padded(256)[:-24])
    with pytest.raises(AdapterError, match="24 of 64 bytes are missing"):
        open_source(tmp_path / "x.safetensors")


def test_a_damaged_byte_is_refused_with_one_sentence_or_does_no_harm(tmp_path: Path) -> None:
    whole, path, draw = padded(256), tmp_path / "x.safetensors", random.Random(1)
    refused: list[AdapterError] = []
    for _ in range(4000):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 1, 2, 8))):
            damaged[draw.randrange(8 + 256)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            source = open_source(path)
        except AdapterError as error:
            refused.append(error)
        else:
            for key, info in source.tensors.items():
                assert len(source.read(key)) == info.nbytes
    assert len(refused) > 2000  # most damage hits a brace, a quote or a number
    assert all(error.hint and "\n" not in error.message for error in refused)


def test_what_the_safetensors_library_refuses_is_refused(tmp_path: Path) -> None:
    whole, path, draw = padded(256), tmp_path / "x.safetensors", random.Random(2)
    checked = 0
    for _ in range(1000):
        damaged = bytearray(whole)
        damaged[draw.randrange(8 + 256)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            with safe_open(path, "np"):
                continue
        except Exception:
            checked += 1
        with pytest.raises(AdapterError):
            open_source(path)
    assert checked > 300


def test_extra_fields_of_an_entry_do_no_harm(tmp_path: Path) -> None:
    text = json.dumps({"a": {**entry("F32", (1,), 0, 4), "note": "x"}})
    (tmp_path / "x.safetensors").write_bytes(framed(text, bytes(4)))
    assert open_source(tmp_path / "x.safetensors").tensors["a"].nbytes == 4


@pytest.mark.parametrize(
    ("limit", "said"), [("MAX_HEADER", "has a header of"), ("MAX_TENSORS", "names 2 tensors")]
)
def test_a_header_beyond_a_limit_is_refused_with_the_limit(
    limit: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.safetensors").write_bytes(padded(256))
    monkeypatch.setattr(_header, limit, 1)
    with pytest.raises(AdapterError, match=f"{said}.*the limit is 1"):
        open_source(tmp_path / "x.safetensors")


def test_many_duplicate_keys_are_found_in_linear_time(tmp_path: Path) -> None:
    one = json.dumps(entry("F32", (), 0, 4))
    text = "{" + ",".join(f'"k{i % 30000}":{one}' for i in range(60000)) + "}"
    (tmp_path / "x.safetensors").write_bytes(framed(text, bytes(4)))
    with pytest.raises(AdapterError, match=r"twice: k0, k1, .* and 29992 more"):
        open_source(tmp_path / "x.safetensors")


def test_a_tensor_longer_than_one_system_call_reads_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"a": torch.arange(1000.0)}, tmp_path / "x.safetensors")
    monkeypatch.setattr(_source, "ONE_READ", 7)
    assert open_source(tmp_path / "x.safetensors").array("a").tolist() == list(range(1000))


def test_a_file_shortened_while_it_is_read_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    os.truncate(tmp_path / "x.safetensors", source.size - 4)
    with pytest.raises(AdapterError, match="was shortened while it was read"):
        source.read("a")


def test_a_file_replaced_while_it_is_read_keeps_its_first_content(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(100)}, tmp_path / "y.safetensors")
    (tmp_path / "y.safetensors").replace(tmp_path / "x.safetensors")
    assert source.array("a").tolist() == [1.0] * 100


def test_hashing_covers_the_whole_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100)}, tmp_path / "x.safetensors")
    source = open_source(tmp_path / "x.safetensors")
    assert b"".join(source.chunks(33)) == (tmp_path / "x.safetensors").read_bytes()


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="is not a regular file"):
        open_source(tmp_path / "x.safetensors")


def test_what_the_system_refuses_is_said_in_its_words(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="cannot be read: No such file"):
        open_source(tmp_path / "x.safetensors")


def open_files() -> int:
    gc.collect()
    return len(list(Path("/dev/fd").iterdir()))


def test_files_are_let_go_with_their_last_owner(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "x.safetensors")
    before = open_files()
    opened = [open_source(tmp_path / "x.safetensors") for _ in range(50)]
    assert open_files() == before + 50
    opened[0].close()
    opened[0].close()  # a second time does no harm
    del opened
    assert open_files() == before


def test_a_refused_file_is_let_go_though_its_error_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(padded(256)[:-24])
    before = open_files()
    with pytest.raises(AdapterError) as refused:
        open_source(tmp_path / "x.safetensors")
    assert open_files() == before
    assert refused.value.hint
