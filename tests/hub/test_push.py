"""Pushing: one commit of what describes the adapter, a card, and nothing private."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

from tests.build import write_kohya, write_peft
from tests.conftest import factors
from tests.hub.conftest import TOKEN, files
from tests.hub.store import Fault, Hub
from tests.typed import Typed, typed

# Between the client and its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
ENV = {"HF_TOKEN": TOKEN}


def pushed(*words: str) -> Typed:
    done = typed(*words, env=ENV)
    assert done.code == 0, done.err
    return done


def front(card: bytes) -> dict[str, object]:
    return yaml.safe_load(card.decode().split("---\n")[1])


def test_a_push_makes_the_repository_and_prints_its_address(hub: Hub, a: Path) -> None:
    (a / "LICENSE").write_bytes(b"terms")
    (a / "tokenizer.json").write_bytes(b"{}")
    done = pushed("push", "a", "me/a", "-m", "first")
    assert (done.out, done.err) == (f"{hub.address}/me/a\n", "")
    head = hub.repositories["me/a"].head
    expected = {"adapter_config.json", "adapter_model.safetensors", "LICENSE", "README.md"}
    assert set(head.files) == {*expected, "tokenizer.json", ".gitattributes"}
    assert head.title == "first"
    assert head.files["adapter_model.safetensors"] == (a / "adapter_model.safetensors").read_bytes()
    assert front(head.files["README.md"])["base_model"] == "org/base"
    assert not hub.repositories["me/a"].private


def test_the_weights_of_a_directory_are_pushed_with_their_scale(hub: Hub, a: Path) -> None:
    pushed("push", str(a / "adapter_model.safetensors"), "me/a")
    files = hub.repositories["me/a"].head.files
    assert files["adapter_config.json"] == (a / "adapter_config.json").read_bytes()
    assert not pushed("push", "a", "me/a", "--json").out.count("true")


def test_what_is_left_out_is_named(hub: Hub, a: Path) -> None:
    (a / "optimizer.pt").write_bytes(b"x")
    (a / "checkpoint-10").mkdir()
    (a / ".DS_Store").touch()
    assert pushed("push", "a", "me/a").err == "left out: checkpoint-10/, optimizer.pt\n"
    assert json.loads(pushed("push", "a", "me/a", "--json").out)["left"] == [
        "checkpoint-10/",
        "optimizer.pt",
    ]
    assert pushed("push", "a", "me/a", "-q").err == ""
    assert not {"optimizer.pt", ".DS_Store"} & set(hub.repositories["me/a"].head.files)


def test_the_tokenizer_of_a_result_is_pushed_with_it_and_comes_back(hub: Hub, a: Path) -> None:
    (a / "tokenizer.json").write_bytes(b'{"added_tokens": []}')
    pushed("squeeze", "a", "-r", "2", "--push", "me/small")
    pushed("pull", "me/small")
    assert Path("small/tokenizer.json").read_bytes() == b'{"added_tokens": []}'


def test_a_private_push(hub: Hub, a: Path) -> None:
    pushed("push", "a", "me/a", "--private")
    assert hub.repositories["me/a"].private


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/api/whoami", "GET"),
        ("/api/repos/create", "POST"),
        ("/api/models/me/a", "GET"),
        ("/preupload/", "POST"),
        ("/commit/", "POST"),
    ],
)
def test_a_push_outlasts_a_busy_hub(
    path: str, method: str, status: int, hub: Hub, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.faults.append(Fault(path, times=2, status=status, method=method))
    pushed("push", "a", "me/a")
    assert hub.faults[0].times == 0
    assert len(hub.repositories["me/a"].commits) == 2  # the empty one it is made with, and ours


def test_an_unchanged_push_commits_nothing(hub: Hub, a: Path) -> None:
    pushed("push", "a", "me/a")
    sha = hub.repositories["me/a"].head.sha
    done = pushed("push", "a", "me/a", "--json")
    assert json.loads(done.out)["changed"] is False
    assert done.err == "nothing was sent: everything is there already\n"
    assert hub.repositories["me/a"].head.sha == sha


def test_an_unchanged_result_is_not_sent_again(hub: Hub, a: Path) -> None:
    words = ("squeeze", "a", "-r", "2", "-f", "--push", "me/a")
    pushed(*words)
    sha = hub.repositories["me/a"].head.sha
    assert f"pushed  {hub.address}/me/a, where it was already" in pushed(*words).err
    assert hub.repositories["me/a"].head.sha == sha


def test_a_pull_request_leaves_main_alone(hub: Hub, a: Path, adapter: dict[str, bytes]) -> None:
    repository = hub.create("me/a", adapter)
    before = repository.head.sha
    done = pushed("push", "a", "me/a", "--create-pr")
    assert done.out == f"{hub.address}/me/a/discussions/1\n"
    assert repository.head.sha == before
    proposed = repository.at("refs/pr/1")
    assert proposed
    assert proposed.files["adapter_config.json"] == (a / "adapter_config.json").read_bytes()


def test_a_result_is_squeezed_from_the_hub_to_the_hub_and_loads_in_peft(
    hub: Hub, tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    import torch
    from huggingface_hub import snapshot_download
    from peft import LoraConfig, PeftModel, get_peft_model
    from torch import nn

    def base() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 24))

    model = get_peft_model(base(), LoraConfig(r=12, target_modules=["0"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "made")
    card = b"---\nlicense: mit\n---\n"
    hub.create("user/repo", {**files(tmp_path / "made"), "README.md": card})
    done = pushed("squeeze", "user/repo@main", "--rank", "8", "--push", "me/repo-r8")
    assert done.out == "repo-r8\n"
    assert f"pushed  {hub.address}/me/repo-r8" in done.err
    snapshot = snapshot_download("me/repo-r8")
    text = (Path(snapshot) / "README.md").read_bytes()
    assert front(text)["license"] == "mit"
    assert b'PeftModel.from_pretrained(base_model, "me/repo-r8")' in text
    sha = hub.repositories["user/repo"].head.sha
    assert f"loramerge squeeze user/repo@{sha} --rank 8\n".encode() in text
    assert f"/user/repo/blob/{sha}/adapter_model.safetensors)".encode() in text
    loaded = PeftModel.from_pretrained(base(), snapshot)
    x = torch.randn(3, 24)
    ours, theirs = (m.base_model.model[0].get_delta_weight("default") for m in (loaded, model))
    u, s, v = torch.linalg.svd(theirs.double())
    best = u[:, :8] * s[:8] @ v[:8]
    # float32 factors and an exact SVD: rounding alone.
    assert torch.linalg.norm(ours - best) < 1e-5 * torch.linalg.norm(best)
    assert torch.isfinite(loaded(x)).all()
    pushed("pull", "me/repo-r8", "-o", "back")
    assert "bit for bit" in pushed("reproduce", "back", "-o", "again").err
    assert files(Path("again")) == files(Path("repo-r8"))


def test_what_is_pulled_is_what_was_pushed(hub: Hub, a: Path) -> None:
    pushed("squeeze", "a", "-r", "2", "--push", "me/small")
    shutil.move("a-r2", "kept")
    pushed("pull", "me/small")
    for path in Path("kept").iterdir():
        if path.name != "README.md":
            assert (Path("small") / path.name).read_bytes() == path.read_bytes()


def test_a_single_file_is_pushed_with_what_describes_it(
    hub: Hub, here: Path, rng: np.random.Generator
) -> None:
    pair = factors(rng, 4)["layers.0.q_proj"]
    write_kohya(Path("k.safetensors"), {"lora_unet_a": (*pair, 8.0)})
    pushed("squeeze", "k.safetensors", "-r", "2", "--push", "me/k")
    stored = hub.repositories["me/k"].head.files
    assert {"k-r2.safetensors", "README.md", "loramerge.json"} < set(stored)
    assert front(stored["README.md"])["library_name"] == "diffusers"
    assert b'pipeline.load_lora_weights("me/k")' in stored["README.md"]


@pytest.mark.parametrize(("terms", "expected"), [("mit", "mit"), ("apache-2.0", None)])
def test_a_licence_is_stated_only_where_the_sources_agree(
    terms: str, expected: str | None, hub: Hub, tmp_path: Path, here: Path, rng: np.random.Generator
) -> None:
    for name, licence in (("a", "mit"), ("b", terms)):
        made = files(write_peft(tmp_path / name, factors(rng, 4)))
        made["README.md"] = f"---\nlicense: {licence}\n---\n".encode()
        hub.create(f"me/{name}", made)
    done = pushed("cat", "me/a", "me/b", "-o", "ab")
    card = Path("ab/README.md").read_bytes()
    assert front(card).get("license") == expected
    note = "no licence is stated: those of the sources are apache-2.0, mit"
    assert (note in card.decode()) is (note in done.err) is (expected is None)


@pytest.mark.parametrize(
    ("words", "env", "code", "said"),
    [
        ("push a me/a", {}, 1, "You are not logged in to the Hub."),
        ("push a me/a", {"HF_TOKEN": "hf_no"}, 1, "The Hub does not know your token."),
        ("push a you/a", ENV, 1, "Your token does not allow this with you/a."),
        ("push a a", ENV, 2, "a is no name of a repository"),
        ("push a me/a@main", ENV, 2, "me/a@main is no name of a repository"),
        ("push none me/a", ENV, 1, "none does not exist"),
        ("push you/a me/a", ENV, 1, "you/a is not here, and only what is here can be sent"),
        ("squeeze a -r 2 --push me/a", {}, 1, "You are not logged in to the Hub."),
        ("squeeze a a -r 2 --out-dir x --push me/a", ENV, 2, "several results"),
        ("squeeze a -r 2 --out-dir x --push me/a", ENV, 2, "--push sends one result"),
    ],
)
def test_what_cannot_be_pushed_is_known_before_anything_is_computed(
    words: str, env: dict[str, str], code: int, said: str, hub: Hub, a: Path
) -> None:
    done = typed(*words.split(), env=env)
    assert (done.code, done.out, len(done.lines)) == (code, "", 2), done.err
    assert said in done.lines[0]
    assert [path.name for path in Path().iterdir()] == ["a"]
    assert hub.repositories == {}


@pytest.mark.parametrize("line", ["push a me/a", "squeeze a -r 2 --push me/a"])
def test_nothing_is_sent_offline(
    line: str, hub: Hub, a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert typed(*line.split(), env=ENV).lines == [
        "error: Nothing can be sent while HF_HUB_OFFLINE is set.",
        "hint: type: unset HF_HUB_OFFLINE",
    ]
    assert not Path("a-r2").exists()
