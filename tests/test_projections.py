"""qkv_proj and gate_up_proj against their parts, experts as modules and as parameters."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge
from loramerge.adapter import Adapter
from loramerge.errors import IncompatibleError
from loramerge.io._names import in_form
from loramerge.io._open import open_adapter
from tests.build import Pair, write_peft
from tests.test_fused import delta
from tests.typed import typed

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
# 3 heads of queries and 1 of keys, 4 rows each; 8 hidden units.
ROWS = {"q_proj": 12, "k_proj": 4, "v_proj": 4}
UNITS, WIDTH = 8, 12
draw = np.random.default_rng(11)


def pair(rows: int, rank: int = 2, columns: int = WIDTH) -> Pair:
    return (
        draw.standard_normal((rank, columns)).astype("f4"),
        draw.standard_normal((rows, rank)).astype("f4"),
    )


def split(path: Path, *leaves: str, **config: object) -> Adapter:
    """Projections by themselves: of the attention, or of the MLP."""
    modules = {
        f"{ATTENTION if leaf in ROWS else MLP}.{leaf}": pair(ROWS.get(leaf, UNITS), 2 + place)
        for place, leaf in enumerate(leaves)
    }
    return open_adapter(str(write_peft(path, modules, r=2, lora_alpha=4, **config)))


def fused(path: Path, rank: int = 3) -> Adapter:
    modules = {
        f"{ATTENTION}.qkv_proj": pair(sum(ROWS.values()), rank),
        f"{MLP}.gate_up_proj": pair(2 * UNITS, rank),
        f"{MLP}.down_proj": pair(WIDTH, rank, UNITS),
    }
    return open_adapter(str(write_peft(path, modules, lora_alpha=2 * rank)))


def test_a_fused_layer_is_its_parts_one_below_the_other(tmp_path: Path) -> None:
    whole = fused(tmp_path / "a")
    apart = in_form(whole, "split", (3, 1))
    assert {name.rpartition(".")[2] for name in apart.modules} == {
        *("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj")
    }
    for name, leaves in {
        f"{ATTENTION}.qkv_proj": ["q_proj", "k_proj", "v_proj"],
        f"{MLP}.gate_up_proj": ["gate_proj", "up_proj"],
    }.items():
        parent = name.rpartition(".")[0]
        below = np.concatenate([delta(apart, f"{parent}.{leaf}") for leaf in leaves])
        np.testing.assert_array_equal(below, delta(whole, name))
    assert {module.rank for module in apart.modules.values()} == {3}


def test_there_and_back_it_is_the_same_to_the_bit(tmp_path: Path) -> None:
    whole = fused(tmp_path / "a")
    again = in_form(in_form(whole, "split", (3, 1)), "fused")
    assert list(again.modules) == list(whole.modules)
    for name in whole.modules:
        np.testing.assert_array_equal(again.read(name).A, whole.read(name).A)
        np.testing.assert_array_equal(again.read(name).B, whole.read(name).B)


def test_parts_with_factors_of_their_own_are_stacked_and_come_back(tmp_path: Path) -> None:
    apart = split(tmp_path / "a", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    whole = in_form(apart, "fused")
    assert {name: m.rank for name, m in whole.modules.items()} == {
        f"{ATTENTION}.qkv_proj": 2 + 3 + 4,
        f"{MLP}.gate_up_proj": 5 + 6,
    }
    again = in_form(whole, "split", (3, 1))
    for name, module in apart.modules.items():
        assert again.modules[name].rank == module.rank
        # Ranks give each part a scale of its own, folded into B once.
        np.testing.assert_allclose(delta(again, name), delta(apart, name), rtol=1e-6, atol=1e-6)


def test_only_the_number_of_heads_says_which_rows_are_queries(tmp_path: Path) -> None:
    whole = fused(tmp_path / "a")
    with pytest.raises(IncompatibleError, match=r"which rows of .*qkv_proj are q_proj, k_proj"):
        in_form(whole, "split")
    with pytest.raises(IncompatibleError, match="7 and 1 heads do not"):
        in_form(whole, "split", (7, 1))


def test_a_part_that_is_not_adapted_is_zero(tmp_path: Path) -> None:
    apart = split(tmp_path / "a", "q_proj", "v_proj", "up_proj")
    whole = in_form(apart, "fused")
    rows = delta(whole, f"{ATTENTION}.qkv_proj")
    assert rows.shape == (20, WIDTH)
    assert not rows[12:16].any()
    assert not delta(whole, f"{MLP}.gate_up_proj")[:UNITS].any()
    alone = split(tmp_path / "b", "q_proj")
    with pytest.raises(IncompatibleError, match="must be told, and nothing does"):
        in_form(alone, "fused")
    assert in_form(alone, "fused", (3, 1)).modules[f"{ATTENTION}.qkv_proj"].out_features == 20


def test_a_layer_adapted_whole_and_in_part_is_refused(tmp_path: Path) -> None:
    modules = {f"{ATTENTION}.qkv_proj": pair(20), f"{ATTENTION}.q_proj": pair(12)}
    both = open_adapter(str(write_peft(tmp_path / "a", modules)))
    with pytest.raises(IncompatibleError, match=r"q_proj twice: by itself, and in .*qkv_proj"):
        in_form(both, "fused", (3, 1))


@pytest.mark.parametrize("first", ["fused", "split"])
def test_a_merge_is_in_the_form_of_the_first_and_exact(first: str, tmp_path: Path) -> None:
    one = fused(tmp_path / "a")
    two = split(tmp_path / "b", "q_proj", "v_proj", "gate_proj", "up_proj")
    pair = [one, two] if first == "fused" else [two, one]
    result, _ = loramerge.arithmetic(pair, rank="full")
    merged = result.adapter
    if first == "split":
        merged = in_form(merged, "fused")
    else:
        assert list(merged.modules) == list(one.modules)
    other = in_form(two, "fused")
    for name in one.modules:
        sum_ = delta(one, name) + (delta(other, name) if name in other.modules else 0)
        # Factors are rounded to float32 once.
        np.testing.assert_allclose(delta(merged, name), sum_, rtol=1e-5, atol=1e-5)


def test_the_form_of_an_earlier_adapter_counts_whichever_it_is(tmp_path: Path) -> None:
    down = {f"{MLP}.down_proj": pair(WIDTH, 2, UNITS)}
    queries = {f"{ATTENTION}.q_proj": pair(12), f"{ATTENTION}.k_proj": pair(4)}
    write_peft(tmp_path / "c", down)
    write_peft(tmp_path / "b", {**down, **queries})
    fused(tmp_path / "a")
    result, _ = loramerge.arithmetic([tmp_path / name for name in "cba"])
    names = {name.rpartition(".")[2] for name in result.adapter.modules}
    assert {"q_proj", "k_proj", "v_proj"} <= names
    assert "qkv_proj" not in names


EXPERTS = "model.layers.0.mlp.experts"


def modules_of_experts(path: Path) -> Adapter:
    modules = {
        f"{EXPERTS}.{number}.{leaf}": pair(rows, 2, columns)
        for number in range(3)
        for leaf, rows, columns in (
            *(("gate_proj", UNITS, WIDTH), ("up_proj", UNITS, WIDTH)),
            ("down_proj", WIDTH, UNITS),
        )
    }
    return open_adapter(str(write_peft(path, modules, lora_alpha=2)))


def test_experts_become_parameters_that_peft_reads_and_modules_again(tmp_path: Path) -> None:
    before = modules_of_experts(tmp_path / "a")
    gates = [n for n in before.modules if n.endswith(("gate_proj", "up_proj"))]
    # down_proj has rank 2, gate and up together 4: one rank for both is PEFT's rule.
    down = [f"{EXPERTS}.{number}.down_proj" for number in range(3)]
    for kept in (gates, down):
        adapter = loramerge.select([before], include=kept)[0].adapter
        done = loramerge.convert(
            adapter, to="peft", out=tmp_path / f"p{len(kept)}", projections="fused"
        )
        there = open_adapter(str(done.path))
        assert {module.kind for module in there.modules.values()} == {"parameter"}
        assert there.config["target_parameters"]
        back = in_form(there, "split")
        assert set(back.modules) == set(kept)
        for name in kept:
            np.testing.assert_allclose(delta(back, name), delta(before, name), rtol=1e-6, atol=1e-6)


def test_gates_that_alternate_with_what_they_open_stay_as_they_are(tmp_path: Path) -> None:
    adapter = in_form(modules_of_experts(tmp_path / "a"), "fused")
    theirs = replace(adapter, base_model="openai/gpt-oss-20b")
    with pytest.raises(IncompatibleError, match="row by row in turn"):
        in_form(theirs, "split")


@pytest.mark.parametrize("base", ["Salesforce/codegen-350M-mono", "MiniMaxAI/MiniMax-Text-01-hf"])
def test_heads_that_hold_their_parts_in_turn_stay_as_they_are(base: str, tmp_path: Path) -> None:
    theirs = replace(fused(tmp_path / "a"), base_model=base)
    with pytest.raises(IncompatibleError, match="queries, keys and values head by head in turn"):
        in_form(theirs, "split", (3, 1))


@pytest.mark.parametrize("form", ["split", "fused", "experts"])
def test_other_fused_layers_are_left_alone_and_that_is_said(form: str, tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value"
    source = write_peft(tmp_path / "a", {name: pair(36)})
    done = typed("convert", source, "--to", "peft", "--projections", form, "-o", tmp_path / "b")
    assert done.code == 0, done.err
    assert f"--projections {form} changes nothing here: query_key_value, Wqkv" in done.err
    assert list(open_adapter(str(tmp_path / "b")).modules) == [name]


def test_of_a_form_that_most_models_have_nothing_is_said(tmp_path: Path) -> None:
    fused(tmp_path / "a")
    words = ("--to", "peft", "--heads", "3,1", "--projections", "split", "-o", tmp_path / "b")
    done = typed("convert", tmp_path / "a", *words)
    assert done.code == 0
    assert "Phi-3" not in done.err
    assert "changes nothing" not in done.err


def test_convert_takes_form_and_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fused(Path("a"))
    words = ("convert", "a", "--to", "peft", "--projections", "split")
    assert "--heads 32,8" in typed(*words, "-o", "b").err
    done = typed(*words, "--heads", "3,1", "-o", "b")
    assert done.code == 0, done.err
    assert "3 modules are 6 in peft" in done.err
    assert "q_proj" in str(list(open_adapter("b").modules))
    assert typed(*words, "--heads", "3,2", "-o", "c").code == 2
    assert typed(*words, "--heads", "many", "-o", "c").code == 2


@pytest.mark.parametrize("first", ["modules", "parameters"])
@pytest.mark.parametrize("leaves", [("gate", "up"), ("down",)], ids="+".join)
def test_experts_in_both_forms_are_merged_in_that_of_the_first(
    first: str, leaves: tuple[str, ...], tmp_path: Path
) -> None:
    names = [f"{EXPERTS}.{number}.{leaf}_proj" for number in range(3) for leaf in leaves]
    one, two = (
        loramerge.select([modules_of_experts(tmp_path / name)], include=names)[0].adapter
        for name in "ab"
    )
    done = loramerge.convert(two, "peft", tmp_path / "p", projections="fused")
    parameters = open_adapter(str(done.path))
    given = [one, parameters] if first == "modules" else [parameters, one]
    merged = loramerge.arithmetic(given, rank="full")[0].adapter
    kind = "linear" if first == "modules" else "parameter"
    assert {module.kind for module in merged.modules.values()} == {kind}
    apart = in_form(merged, "split")
    assert set(apart.modules) == set(names)
    for name in names:
        # Factors are rounded to float32 once.
        expected = delta(one, name) + delta(two, name)
        np.testing.assert_allclose(delta(apart, name), expected, rtol=1e-5, atol=1e-5)
