"""torchtune's checkpoints against Hugging Face's: names, and rows as they are rotated."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loramerge
from loramerge.adapter import Adapter
from loramerge.derive import check_base
from loramerge.errors import IncompatibleError, UsageError
from loramerge.io._checkpoint import open_checkpoint
from loramerge.io._names import renamed
from loramerge.io._open import open_adapter
from tests.build import save, write_peft
from tests.test_fused import delta
from tests.typed import typed

HEADS, KEYS, SIZE, WIDTH = 4, 2, 6, 10
ROWS = {"q_proj": HEADS * SIZE, "k_proj": KEYS * SIZE, "v_proj": KEYS * SIZE, "output_proj": WIDTH}
draw = np.random.default_rng(23)


def native(path: Path, *, rank: int = 3) -> Adapter:
    """A checkpoint as torchtune names it, with alpha 6."""
    shapes = {f"layers.2.attn.{leaf}": (rows, WIDTH) for leaf, rows in ROWS.items()}
    shapes |= {f"layers.2.mlp.w{number}": (8, WIDTH) for number in (1, 2, 3)}
    shapes["output"] = (20, WIDTH)
    tensors = {}
    for name, (m, n) in shapes.items():
        tensors[f"{name}.lora_a.weight"] = draw.standard_normal((rank, n))
        tensors[f"{name}.lora_b.weight"] = draw.standard_normal((m, rank))
    save(path, tensors, "float32")
    return open_adapter(str(path), 6.0)


def test_names_are_those_of_hugging_face(tmp_path: Path) -> None:
    there = renamed(native(tmp_path / "a.safetensors"), "model", (HEADS, KEYS))
    layer = "model.layers.2"
    assert sorted(there.modules) == [
        "lm_head",
        *(f"{layer}.mlp.{leaf}_proj" for leaf in ("down", "gate", "up")),
        *(f"{layer}.self_attn.{leaf}_proj" for leaf in "koqv"),
    ]


def rotated(x: np.ndarray, position: int, neighbours: bool) -> np.ndarray:
    """Rotary embeddings of one head: by pairs of neighbours, or of the two halves."""
    angles = position * 10000.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))
    first, second = (x[0::2], x[1::2]) if neighbours else (x[: SIZE // 2], x[SIZE // 2 :])
    turned = [
        first * np.cos(angles) - second * np.sin(angles),
        first * np.sin(angles) + second * np.cos(angles),
    ]
    return np.stack(turned, axis=-1).reshape(-1) if neighbours else np.concatenate(turned)


def scores(queries: np.ndarray, keys: np.ndarray, neighbours: bool) -> list[float]:
    """What each head's query at position 5 has with its key at position 2."""
    found = []
    for head in range(HEADS):
        q = queries[head * SIZE : (head + 1) * SIZE]
        group = head // (HEADS // KEYS)
        k = keys[group * SIZE : (group + 1) * SIZE]
        found.append(rotated(q, 5, neighbours) @ rotated(k, 2, neighbours))
    return found


def test_attention_scores_are_the_same_under_each_ones_rotary_embedding(tmp_path: Path) -> None:
    here = native(tmp_path / "a.safetensors")
    there = renamed(here, "model", (HEADS, KEYS))
    x, y = draw.standard_normal((2, WIDTH))
    ours = scores(
        delta(here, "layers.2.attn.q_proj") @ x, delta(here, "layers.2.attn.k_proj") @ y, True
    )
    theirs = scores(
        delta(there, "model.layers.2.self_attn.q_proj") @ x,
        delta(there, "model.layers.2.self_attn.k_proj") @ y,
        False,
    )
    # float64 throughout.
    np.testing.assert_allclose(theirs, ours, rtol=1e-10)
    unturned = scores(delta(here, "layers.2.attn.q_proj") @ x, y[: KEYS * SIZE], False)
    assert not np.allclose(unturned, ours)


def test_only_queries_and_keys_change_their_rows(tmp_path: Path) -> None:
    here = native(tmp_path / "a.safetensors")
    there = renamed(here, "model", (HEADS, KEYS))
    pairs = {"attn.v_proj": "self_attn.v_proj", "attn.output_proj": "self_attn.o_proj"}
    for ours, theirs in pairs.items():
        before, after = here.read(f"layers.2.{ours}"), there.read(f"model.layers.2.{theirs}")
        np.testing.assert_array_equal(after.B, before.B)
    q = here.read("layers.2.attn.q_proj").B, there.read("model.layers.2.self_attn.q_proj").B
    # One head of six rows: 0 2 4 1 3 5, as torchtune's view(heads, 3, 2).transpose(1, 2) has it.
    np.testing.assert_array_equal(q[1][:SIZE], q[0][[0, 2, 4, 1, 3, 5]])


def test_there_and_back_is_the_same_to_the_bit(tmp_path: Path) -> None:
    here = native(tmp_path / "a.safetensors")
    done = loramerge.convert(here, "peft", tmp_path / "there", heads=(HEADS, KEYS))
    assert open_adapter(str(done.path)).modules["lm_head"].scaling == 2.0
    back = loramerge.convert(
        str(done.path), "torchtune", tmp_path / "back.safetensors", heads=(HEADS, KEYS)
    )
    again = open_adapter(str(back.path))
    assert set(again.modules) == set(here.modules)
    for name in here.modules:
        np.testing.assert_array_equal(again.read(name).A, here.read(name).A)
        np.testing.assert_array_equal(again.read(name).B, here.read(name).B)


def test_without_heads_queries_are_refused_and_the_flag_is_named(tmp_path: Path) -> None:
    here = native(tmp_path / "a.safetensors")
    with pytest.raises(IncompatibleError, match=r"attn\.k_proj stand in another order") as refused:
        renamed(here, "model")
    assert "--heads" in str(refused.value.hint)
    with pytest.raises(IncompatibleError, match="5 do not fit its 12 rows"):
        renamed(here, "model", (5, 5))


def test_without_queries_and_keys_no_heads_are_needed(tmp_path: Path) -> None:
    tensors = {"layers.0.mlp.w1.lora_a.weight": np.ones((2, 6))}
    tensors["layers.0.mlp.w1.lora_b.weight"] = np.ones((4, 2))
    save(tmp_path / "a.safetensors", tensors, "float32")
    here = open_adapter(str(tmp_path / "a.safetensors"))
    assert list(renamed(here, "model").modules) == ["model.layers.0.mlp.gate_proj"]


def test_names_that_torchtune_does_not_have_are_listed(tmp_path: Path) -> None:
    pair = np.ones((2, 6)), np.ones((4, 2))
    path = write_peft(tmp_path / "a", {"model.layers.0.mlp.up_proj": pair, "score": pair})
    with pytest.raises(IncompatibleError, match=r"1 of 2 modules have no name .*: score\."):
        renamed(open_adapter(str(path)), "torchtune")


def test_convert_says_so_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    native(Path("a.safetensors"))
    words = ("convert", "a.safetensors", "--to", "peft", "--alpha", "6")
    assert "--heads 32,8" in typed(*words).err
    done = typed(*words, "--heads", f"{HEADS},{KEYS}")
    assert (done.code, done.out) == (0, "a-peft\n")
    again = typed("reproduce", "a-peft")
    assert again.code == 0, again.err


def epoch(folder: Path, model_type: str = "llama", **config: object) -> str:
    """What torchtune leaves in epoch_0: a pickle, PEFT's config, and that of the model."""
    folder.mkdir()
    native(folder / "native.safetensors")
    tensors = load_file(folder / "native.safetensors")
    (folder / "native.safetensors").unlink()
    torch.save({k: torch.tensor(x) for k, x in tensors.items()}, folder / "adapter_model.pt")
    facts = {"r": 3, "lora_alpha": 12, "peft_type": "LORA", "target_modules": ["q_proj"], **config}
    (folder / "adapter_config.json").write_text(json.dumps(facts))
    model = {"model_type": model_type, "num_attention_heads": HEADS, "num_key_value_heads": KEYS}
    (folder / "config.json").write_text(json.dumps(model))
    return str(folder / "adapter_model.pt")


def test_what_torchtune_saves_beside_says_alpha_and_heads(tmp_path: Path) -> None:
    here = open_adapter(epoch(tmp_path / "a"), allow_pickle=True)
    assert not here.scale_assumed
    assert {module.scaling for module in here.modules.values()} == {4.0}
    there, said = renamed(here, "model"), renamed(here, "model", (HEADS, KEYS))
    assert there.assumed == ()
    for leaf in ("q_proj", "k_proj"):
        name = f"model.layers.2.self_attn.{leaf}"
        np.testing.assert_array_equal(there.read(name).B, said.read(name).B)


def test_a_config_of_another_rank_or_an_alpha_that_contradicts_is_not_taken(tmp_path: Path) -> None:
    here = open_adapter(epoch(tmp_path / "a", r=4), allow_pickle=True)
    assert here.scale_assumed
    with pytest.raises(UsageError, match="--alpha 6 contradicts"):
        open_adapter(epoch(tmp_path / "b"), 6.0, allow_pickle=True)


@pytest.mark.parametrize("model", ["qwen2", "qwen3", "phi3"])
def test_models_that_torchtune_rotates_by_halves_keep_their_rows(
    model: str, tmp_path: Path
) -> None:
    here = open_adapter(epoch(tmp_path / "a", model), allow_pickle=True)
    there = renamed(here, "model", (HEADS, KEYS))
    for leaf in ("q_proj", "k_proj"):
        before, after = f"layers.2.attn.{leaf}", f"model.layers.2.self_attn.{leaf}"
        np.testing.assert_array_equal(there.read(after).B, here.read(before).B)
    named = epoch(tmp_path / "b", "", base_model_name_or_path="Qwen/Qwen2.5-0.5B")
    back = renamed(renamed(open_adapter(named, allow_pickle=True), "model"), "torchtune")
    assert not back.assumed


def test_it_is_said_where_nothing_tells_whose_rows_they_are(tmp_path: Path) -> None:
    there = renamed(native(tmp_path / "a.safetensors"), "model", (HEADS, KEYS))
    assert "nothing says that its base is a Qwen or a Phi" in there.assumed[-1]
    done = loramerge.convert(
        str(tmp_path / "a.safetensors"), "peft", tmp_path / "b", heads=(HEADS, KEYS)
    )
    assert any("nothing says that its base is a Qwen" in note for note in done.notes)


def test_a_config_of_the_model_that_is_none_says_nothing(tmp_path: Path) -> None:
    path = epoch(tmp_path / "a")
    heads = [json.dumps({"num_attention_heads": said}) for said in ("many", 0, -4)]
    for text in ("[1]", "{", *heads):
        (tmp_path / "a" / "config.json").write_text(text)
        with pytest.raises(IncompatibleError, match="nothing says it"):
            renamed(open_adapter(path, allow_pickle=True), "model")
    (tmp_path / "a" / "config.json").unlink()
    os.mkfifo(tmp_path / "a" / "config.json")
    assert not open_adapter(path, allow_pickle=True).config.get("num_attention_heads")


def test_baking_asks_for_names_of_the_model_first(tmp_path: Path) -> None:
    here = native(tmp_path / "a.safetensors")
    save_file({"layers.2.mlp.w1.weight": np.zeros((8, WIDTH), "f4")}, tmp_path / "m.safetensors")
    with pytest.raises(IncompatibleError, match="order of rows of torchtune") as refused:
        check_base(here, open_checkpoint(str(tmp_path / "m.safetensors")))
    assert "--to peft" in str(refused.value.hint)


def test_the_base_is_known_again_so_that_rows_come_back(tmp_path: Path) -> None:
    base = "Qwen/Qwen2.5-0.5B"
    pair = draw.standard_normal((2, 6)), draw.standard_normal((4, 2))
    name = "model.layers.0.self_attn.q_proj"
    one = write_peft(tmp_path / "a", {name: pair}, base_model_name_or_path=base)
    there = loramerge.convert(str(one), "torchtune", tmp_path / "b.safetensors")
    back = loramerge.convert(str(there.path), "peft", tmp_path / "c")
    assert back.notes == ()
    assert open_adapter(str(back.path)).base_model == base
    np.testing.assert_array_equal(
        delta(open_adapter(str(back.path)), name), delta(open_adapter(str(one)), name)
    )
