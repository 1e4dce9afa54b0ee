"""Adapters of pruned models for the whole model, against LoRAM's own steps written out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import loramerge
from loramerge.errors import AdapterError, IncompatibleError
from loramerge.io._open import open_adapter
from tests.build import Pair, write_peft
from tests.test_fused import delta
from tests.typed import typed

# 4 heads of queries share 2 of keys, 3 rows each; one of keys is removed, with its two of queries.
HIDDEN, SIZE, UNITS = 10, 3, 8
LAYER = "model.layers.1"
NO_UNITS = [1, 4, 5]
NO_KEYS = [0, 1, 2]
NO_QUERIES = list(range(6))
draw = np.random.default_rng(31)


def pair(rows: int, columns: int, rank: int = 2) -> Pair:
    return (
        draw.standard_normal((rank, columns)).astype("f4"),
        draw.standard_normal((rows, rank)).astype("f4"),
    )


SMALL = {
    "mlp.gate_proj": (UNITS - 3, HIDDEN),
    "mlp.up_proj": (UNITS - 3, HIDDEN),
    "mlp.down_proj": (HIDDEN, UNITS - 3),
    "self_attn.q_proj": (6, HIDDEN),
    "self_attn.k_proj": (3, HIDDEN),
    "self_attn.v_proj": (3, HIDDEN),
    "self_attn.o_proj": (HIDDEN, 6),
}


def trained(path: Path, *leaves: str) -> Path:
    modules = {f"{LAYER}.{leaf}": pair(*SMALL[leaf]) for leaf in leaves or SMALL}
    modules["model.layers.0.mlp.gate_proj"] = pair(UNITS, HIDDEN)
    return write_peft(path, modules, lora_alpha=4)


def index(path: Path, **places: list[int]) -> Path:
    """Index files as LoRAM's scripts leave them."""
    path.mkdir()
    names = {"mlp": f"{LAYER}.mlp.gate_proj.pt", "keys": f"{LAYER}.self_attn.k_proj.pt"}
    for kind, removed in places.items():
        torch.save({"pruned_idx": torch.tensor(removed)}, path / names[kind])
    return path


def scattered(small: np.ndarray, removed: list[int], axis: int) -> np.ndarray:
    """zeroA of LoRAM: zeros of the whole size, the trained rows or columns where they were."""
    size = small.shape[axis] + len(removed)
    saved = [place for place in range(size) if place not in removed]
    shape = [size, small.shape[1]] if axis == 0 else [small.shape[0], size]
    whole = np.zeros(shape)
    whole[(saved,) if axis == 0 else (slice(None), saved)] = small
    return whole


def test_rows_and_columns_stand_where_they_were_and_zeros_where_nothing_was(
    tmp_path: Path,
) -> None:
    before = open_adapter(str(trained(tmp_path / "a")))
    folder = index(tmp_path / "index", mlp=NO_UNITS, keys=NO_KEYS)
    done = loramerge.convert(before, "peft", tmp_path / "b", pruned=[folder], allow_pickle=True)
    after = open_adapter(str(done.path))
    removed = {
        "mlp.gate_proj": (NO_UNITS, 0),
        "mlp.up_proj": (NO_UNITS, 0),
        "mlp.down_proj": (NO_UNITS, 1),
        "self_attn.q_proj": (NO_QUERIES, 0),
        "self_attn.k_proj": (NO_KEYS, 0),
        "self_attn.v_proj": (NO_KEYS, 0),
        "self_attn.o_proj": (NO_QUERIES, 1),
    }
    assert not done.rounded
    for leaf, (places, axis) in removed.items():
        name = f"{LAYER}.{leaf}"
        expected = scattered(delta(before, name), places, axis)
        np.testing.assert_array_equal(delta(after, name), expected)
    other = "model.layers.0.mlp.gate_proj"
    np.testing.assert_array_equal(delta(after, other), delta(before, other))


def test_the_number_of_heads_is_asked_for_where_shapes_do_not_say_it(tmp_path: Path) -> None:
    path = trained(tmp_path / "a", "self_attn.q_proj")
    folder = index(tmp_path / "index", keys=NO_KEYS)
    given = {"pruned": [folder], "allow_pickle": True}
    with pytest.raises(IncompatibleError, match="adapts neither keys nor values") as refused:
        loramerge.convert(path, "peft", tmp_path / "b", **given)
    assert "--heads" in str(refused.value.hint)
    done = loramerge.convert(path, "peft", tmp_path / "b", heads=(4, 2), **given)
    assert open_adapter(str(done.path)).modules[f"{LAYER}.self_attn.q_proj"].shape == (12, HIDDEN)


def test_an_index_of_other_modules_or_rows_is_refused(tmp_path: Path) -> None:
    path = trained(tmp_path / "a")
    for number, (places, sentence) in enumerate(
        [([20], "do not fit"), ([1, 1], "do not fit"), ([1, -1], "do not fit")]
    ):
        folder = index(tmp_path / str(number), mlp=places)
        with pytest.raises(IncompatibleError, match=sentence):
            loramerge.convert(path, "peft", tmp_path / "b", pruned=[folder], allow_pickle=True)
    other = write_peft(tmp_path / "c", {"model.layers.9.mlp.up_proj": pair(5, 6)})
    with pytest.raises(IncompatibleError, match="none of the modules that the pruning speaks of"):
        loramerge.convert(other, "peft", tmp_path / "b", pruned=[folder], allow_pickle=True)


def test_indexes_that_contradict_each_other_or_the_heads_are_refused(tmp_path: Path) -> None:
    path = trained(tmp_path / "a")
    one = index(tmp_path / "one", mlp=NO_UNITS, keys=NO_KEYS)
    two = index(tmp_path / "two", mlp=[1, 4, 6])
    given = {"allow_pickle": True}
    with pytest.raises(AdapterError, match=r"another index of \S+gate_proj differ"):
        loramerge.convert(path, "peft", tmp_path / "b", pruned=[one, two], **given)
    again = index(tmp_path / "again", mlp=NO_UNITS[::-1])
    loramerge.convert(path, "peft", tmp_path / "b", pruned=[one, again], **given)
    torch.save({"pruned_idx": torch.tensor([0])}, one / f"{LAYER}.mlp.up_proj.pt")
    with pytest.raises(IncompatibleError, match=r"Two indexes .* differ for \S+up_proj"):
        loramerge.convert(path, "peft", tmp_path / "c", pruned=[one], **given)
    heads = index(tmp_path / "heads", keys=[0, 2, 4])
    with pytest.raises(IncompatibleError, match="are no whole heads"):
        loramerge.convert(path, "peft", tmp_path / "c", pruned=[heads], **given)
    keys = index(tmp_path / "keys", keys=NO_KEYS)
    with pytest.raises(IncompatibleError, match="6 rows of queries for 3 of keys, not 1"):
        loramerge.convert(path, "peft", tmp_path / "c", pruned=[keys], heads=(4, 4), **given)


def test_a_bias_in_the_size_of_the_pruned_model_is_not_carried(tmp_path: Path) -> None:
    key = f"base_model.model.{LAYER}.self_attn.{{}}_proj.base_layer.bias"
    extras = {key.format(leaf): np.zeros(size, "f4") for leaf, size in (("k", 3), ("v", 6))}
    path = write_peft(
        tmp_path / "a",
        {f"{LAYER}.self_attn.k_proj": pair(3, HIDDEN), f"{LAYER}.mlp.up_proj": pair(8, HIDDEN)},
        bias="lora_only",
        extras=extras,
    )
    given = {"pruned": [index(tmp_path / "index", keys=NO_KEYS)], "allow_pickle": True}
    with pytest.raises(IncompatibleError, match="size that pruning left") as refused:
        loramerge.convert(path, "peft", tmp_path / "b", **given)
    assert "--extras drop" in str(refused.value.hint)
    loramerge.convert(path, "peft", tmp_path / "b", extras="drop", **given)


def test_the_report_says_what_is_back_and_what_looks_like_another_pruning(tmp_path: Path) -> None:
    leaves = {"mlp.gate_proj": pair(5, HIDDEN), "mlp.down_proj": pair(HIDDEN, 5)}
    modules = {f"{LAYER}.{leaf}": factors for leaf, factors in leaves.items()}
    modules |= {"model.layers.0.mlp.gate_proj": pair(UNITS, HIDDEN)}
    # Numbers that are no layer's.
    modules |= {"vision.fc1": pair(3, 4), "vision.fc2": pair(4, 3)}
    path = write_peft(tmp_path / "a", modules)
    right = index(tmp_path / "right", mlp=NO_UNITS)
    done = loramerge.convert(path, "peft", tmp_path / "b", pruned=[right], allow_pickle=True)
    assert done.notes == ("what pruning removed is back, as zeros, in 2 of 5 modules",)
    wrong = index(tmp_path / "wrong", mlp=[0])
    done = loramerge.convert(path, "peft", tmp_path / "c", pruned=[wrong], allow_pickle=True)
    assert done.notes[1].endswith("model.layers.*.mlp.gate_proj (6 x 10, 8 x 10)")


def test_what_is_no_index_has_its_own_sentence(tmp_path: Path) -> None:
    path = trained(tmp_path / "a")
    with pytest.raises(AdapterError, match="is no directory of index files"):
        loramerge.convert(path, "peft", tmp_path / "b", pruned=[tmp_path / "nothing"])
    halves = index(tmp_path / "halves")
    torch.save({"pruned_idx": torch.tensor([0.5])}, halves / f"{LAYER}.mlp.gate_proj.pt")
    with pytest.raises(AdapterError, match="stored as F32; places are whole numbers"):
        loramerge.convert(path, "peft", tmp_path / "b", pruned=[halves], allow_pickle=True)
    strange = index(tmp_path / "strange")
    torch.save({"pruned_idx": torch.tensor([0])}, strange / f"{LAYER}.mlp.fc1.pt")
    with pytest.raises(IncompatibleError, match=r"speaks of \S+fc1, which is none of down_proj"):
        loramerge.convert(path, "peft", tmp_path / "b", pruned=[strange], allow_pickle=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="holds no index of pruned rows"):
        loramerge.convert(path, "peft", tmp_path / "b", pruned=[tmp_path / "empty"])
    (tmp_path / "other").mkdir()
    save_file({"kept": np.arange(3)}, tmp_path / "other" / f"{LAYER}.mlp.gate_proj.safetensors")
    with pytest.raises(AdapterError, match="holds no tensor pruned_idx"):
        loramerge.convert(path, "peft", tmp_path / "b", pruned=[tmp_path / "other"])


def test_the_command_asks_for_permission_to_read_pickles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained(Path("a"))
    index(Path("index"), mlp=NO_UNITS)
    words = ("convert", "a", "--to", "peft", "--pruned", "index", "-o", "b")
    assert "--allow-pickle" in typed(*words).err
    assert typed(*words, "--allow-pickle").code == 0
