"""A Hub of its own for every test: the real client asks it, and keeps a cache of its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants

from loramerge.io import _hub_client
from tests.build import write_peft
from tests.conftest import factors
from tests.hub.server import serving
from tests.hub.store import Hub

TOKEN = "hf_the-token-of-these-tests"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub where `me` has a token; the client of this process asks it, and nobody else.

    The client reads its environment when it is imported, which other tests may have done before.
    """
    found = Hub()
    found.tokens[TOKEN] = "me"
    with serving(found):
        template = found.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(_hub_client, "PAUSES", (0.0, 0.0, 0.0))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        huggingface_hub.logging.set_verbosity_error()
        huggingface_hub.utils.disable_progress_bars()
        _hub_client.client.cache_clear()
        yield found
        huggingface_hub.close_session()
        _hub_client.client.cache_clear()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    directory = tmp_path / "here"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return directory


def files(directory: Path, folder: str = "") -> dict[str, bytes]:
    """What a directory holds, as the files of a repository, below a folder of it."""
    return {folder + path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> dict[str, bytes]:
    """The files of a small PEFT adapter of rank 4, with a card."""
    path = write_peft(tmp_path / "made" / "a", factors(rng, 4), base_model_name_or_path="org/base")
    card = b"---\nlicense: apache-2.0\nlibrary_name: peft\n---\n# A\n"
    return {**files(path), "README.md": card}


@pytest.fixture
def a(here: Path, rng: np.random.Generator) -> Path:
    """The adapter a in the current directory."""
    return write_peft(Path("a"), factors(rng, 4), base_model_name_or_path="org/base")


def config_of(found: dict[str, bytes]) -> dict[str, object]:
    """The adapter_config.json among files."""
    return json.loads(found["adapter_config.json"])
