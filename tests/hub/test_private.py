"""What is nobody's business stays here: tokens, user names, directories."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.build import write_peft
from tests.conftest import factors
from tests.hub.conftest import TOKEN, files
from tests.hub.store import Hub
from tests.hub.test_push import front, pushed

# Between the client and its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_no_token_no_path_and_no_user_name_leaks(
    out: str, hub: Hub, tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    """Everything printed, written and sent, of a run that used a token and a secret directory."""
    secret = tmp_path / "secret-4711"
    local = write_peft(secret / "b", factors(rng, 4), base_model_name_or_path=f"{secret}/base")
    hub.create("me/a", files(local), private=True).readers.add("me")
    done = pushed("cat", "me/a", str(local), "-o", out, "--push", "me/ab", "--json")
    facts = json.loads(done.out)
    sent = list(hub.repositories["me/ab"].head.files.values())
    # Here, the config goes on naming the base model's directory, for whoever loads it here.
    found = list(Path(out).iterdir()) if Path(out).is_dir() else [Path(out)]
    written = [path.read_bytes() for path in found if path.name != "adapter_config.json"]
    assert "adapter_config.json" in hub.repositories["me/ab"].head.files
    for content in [*sent, *written, json.dumps(facts).encode(), done.err.encode()]:
        for word in (TOKEN, "secret-4711", str(tmp_path)):
            assert word.encode() not in content


CARD = """---
base_model: {path}
library_name: peft
tags:
- base_model:adapter:{path}
- lora
---

# Trained on {path} with PEFT

Rank 4.
"""


@pytest.mark.parametrize(
    "path", ["/home/me-4711/llama", "./me-4711/llama", "~/me-4711/llama", "C:\\me-4711\\llama"]
)
def test_a_pushed_directory_does_not_name_the_directory_of_its_base_model(
    path: str, hub: Hub, here: Path, rng: np.random.Generator
) -> None:
    facts = {"data": "/home/me-4711/data", "task_type": "CAUSAL_LM"}
    write_peft(here / "a", factors(rng, 4), base_model_name_or_path=path, **facts)
    (here / "a" / "README.md").write_text(CARD.format(path=path))
    said = json.dumps({"name_or_path": path, "vocab_file": "vocab.json", "x": "0" * 1_000_001})
    (here / "a" / "tokenizer_config.json").write_text(said)
    pushed("push", "a", "me/a")
    stored = hub.repositories["me/a"].head.files
    assert not [name for name, data in stored.items() if b"4711" in data]
    config = json.loads(stored["adapter_config.json"])
    assert (config["base_model_name_or_path"], config["data"]) == (None, None)
    assert config["task_type"] == "CAUSAL_LM"
    said = json.loads(stored["tokenizer_config.json"])
    assert (said["name_or_path"], said["vocab_file"]) == (None, "vocab.json")
    assert front(stored["README.md"]) == {"library_name": "peft", "tags": ["lora"]}
    assert stored["README.md"].decode().endswith("with PEFT\n\nRank 4.\n")


@pytest.mark.parametrize("path", [".", "..", "/", "~"])
def test_a_directory_without_a_name_is_left_out_and_the_card_stays_whole(
    path: str, hub: Hub, here: Path, rng: np.random.Generator
) -> None:
    write_peft(here / "a", factors(rng, 4), base_model_name_or_path=path)
    (here / "a" / "tokenizer_config.json").write_text(json.dumps({"name_or_path": path}))
    card = "---\nlicense: apache-2.0\n---\n\nSee https://x.org/~y. The end...\n"
    (here / "a" / "README.md").write_text(card)
    pushed("push", "a", "me/a")
    stored = hub.repositories["me/a"].head.files
    assert stored["README.md"].decode() == card
    assert json.loads(stored["adapter_config.json"])["base_model_name_or_path"] is None
    assert json.loads(stored["tokenizer_config.json"]) == {"name_or_path": None}


def test_a_config_without_directories_is_pushed_byte_for_byte(
    hub: Hub, here: Path, rng: np.random.Generator
) -> None:
    modules = r".*\.(q|up|down)_proj"
    write_peft(here / "a", factors(rng, 4), base_model_name_or_path="o/b", target_modules=modules)
    pushed("push", "a", "me/a")
    stored = hub.repositories["me/a"].head.files["adapter_config.json"]
    assert stored == (here / "a" / "adapter_config.json").read_bytes()
