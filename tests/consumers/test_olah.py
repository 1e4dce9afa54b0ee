"""Downloads through olah, an independent Hub server, which mirrors the Hub of these tests."""

import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.conftest import files
from tests.hub.store import Hub
from tests.typed import ROOT, shell

OLAH = shutil.which("olah-cli", path=str(ROOT / ".consumers" / "olah" / "bin"))
pytestmark = [
    pytest.mark.consumers,
    pytest.mark.skipif(OLAH is None, reason="needs olah: make consumers installs it"),
]
PATIENCE = 60  # seconds until the server answers


@pytest.fixture
def mirror(hub: Hub, tmp_path: Path) -> Iterator[str]:
    """The address of an olah that knows no other Hub than ours."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address, upstream = f"127.0.0.1:{port}", hub.address.removeprefix("http://")
    words = [OLAH, "--host", "127.0.0.1", "--port", str(port), "--hf-scheme", "http"]
    words += ["--hf-netloc", upstream, "--hf-lfs-netloc", upstream, "--mirror-scheme", "http"]
    words += ["--mirror-netloc", address, "--mirror-lfs-netloc", address]
    words += ["--repos-path", str(tmp_path / "repos"), "--log-path", str(tmp_path / "logs")]
    server = subprocess.Popen(
        words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait(f"http://{address}/", server)
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait(10)


def _wait(url: str, server: "subprocess.Popen[bytes]") -> None:
    for _ in range(PATIENCE * 5):
        assert server.poll() is None, "olah ended"
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError("olah does not answer")


def test_a_pull_through_it_brings_the_same_bytes(
    mirror: str, hub: Hub, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    hub.create("me/x", adapter)
    home = {"HF_ENDPOINT": mirror, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    done = shell("loramerge pull me/x -o got", tmp_path, env=home)
    assert done.code == 0, done.err
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert files(tmp_path / "got")[name] == adapter[name]


def test_headers_are_read_through_it_by_range_and_a_result_is_that_of_the_file_itself(
    mirror: str, hub: Hub, adapter: dict[str, bytes], tmp_path: Path
) -> None:
    repository = hub.create("me/x", {f"sub/{name}": data for name, data in adapter.items()})
    repository.refs["v1"] = repository.head.sha
    home = {"HF_ENDPOINT": mirror, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    looked = shell("loramerge inspect me/x@v1:sub --json", tmp_path, env=home)
    assert looked.code == 0, looked.err
    assert not list((tmp_path / "home").glob("**/*.safetensors"))
    made = shell("loramerge squeeze me/x@v1:sub --rank 2 -o there", tmp_path, env=home)
    assert made.code == 0, made.err
    (tmp_path / "x").mkdir()
    for name, data in adapter.items():
        (tmp_path / "x" / name).write_bytes(data)
    again = shell("loramerge squeeze x --rank 2 -o here && loramerge diff here there", tmp_path)
    assert again.code == 0, again.err
    weights = "adapter_model.safetensors"
    assert tensors(tmp_path / "here" / weights) == tensors(tmp_path / "there" / weights)


def tensors(file: Path) -> bytes:
    """All that follows the header."""
    data = file.read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]
