"""What modules do and which read one input, and what decorrelate makes of it through files."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge as lm
from loramerge.adapter import LowRank, Role
from loramerge.algorithms.decorrelate import DecorrelateOptions
from loramerge.siblings import readers, role
from tests.build import write_peft
from tests.entries import apart
from tests.test_decorrelate import M, N, merged, updates_of, written_out
from tests.updates import dense, gaussian

FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "testbed" / "adapters"


@pytest.mark.parametrize(
    ("wanted", "names"),
    {
        "query": ("layers.0.self_attn.q_proj",),
        "output": (
            "layers.0.self_attn.o_proj",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0",
            "encoder.layer.0.attention.output.dense",
            "encoder.block.0.layer.0.SelfAttention.o",
            "h.0.attn.c_proj",
        ),
        "value": ("layers.0.self_attn.v_proj", "blocks.0.attn.qkv", "h.0.attn.c_attn"),
        "down": (
            "layers.0.mlp.down_proj",
            "layers.0.feed_forward.w2",
            "encoder.layer.0.output.dense",
            "encoder.block.0.layer.1.DenseReluDense.wo",
            "h.0.mlp.c_proj",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2",
        ),
        "other": (
            "layers.0.mlp.gate_proj",
            "layers.0.feed_forward.w1",
            "encoder.layer.0.intermediate.dense",
            "h.0.mlp.c_fc",
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj",
            "down_blocks.0.attentions.0.proj_in",
            "0",
        ),
    }.items(),
)
def test_what_a_module_does_is_told_by_name(wanted: str, names: tuple[str, ...]) -> None:
    assert {role(name) for name in names} == {wanted}


def test_what_reads_one_input_is_told_by_name() -> None:
    names = [f"layers.0.self_attn.{one}_proj" for one in "qkvo"] + ["layers.1.self_attn.k_proj"]
    assert readers(names[1], names.__contains__) == tuple(names[:3])
    assert readers(names[3], names.__contains__) == (names[3],)
    assert readers(names[4], names.__contains__) == (names[4],)
    gates = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert readers(gates[1], gates.__contains__) == ("mlp.gate_proj", "mlp.up_proj")
    crossed = [f"attn2.to_{one}" for one in "qkv"]
    assert readers(crossed[0], crossed.__contains__) == (crossed[0],)
    assert readers(crossed[1], crossed.__contains__) == (crossed[1], crossed[2])


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 2), (1, 2), (0, 1, 2)])
def test_adapters_need_not_adapt_the_same_modules(
    tmp_path: Path, rng: np.random.Generator, order: tuple[int, ...]
) -> None:
    adapters, paths = [], []
    for place, which in enumerate(("vqk", "vq", "vk")):
        found = {one: gaussian(rng, M, N, 4) for one in which}
        pairs = {f"layers.0.self_attn.{k}_proj": (u.A[0], u.B[0]) for k, u in found.items()}
        paths.append(str(write_peft(tmp_path / str(place), pairs, lora_alpha=4)))
        adapters.append(found)
    some = [adapters[place] for place in order]
    nothing = LowRank(np.zeros((1, 0, N), np.float32), np.zeros((1, M, 0), np.float32))
    beside = tuple(tuple(each.get(one, nothing) for one in "qk") for each in some)
    updates = updates_of([each["v"] for each in some], siblings=beside)
    named = [paths[place] for place in order]
    result, _ = lm.run("decorrelate", named, rank="full", scale="paper", save_dtype="float32")
    delta = dense(result.adapter.read("layers.0.self_attn.v_proj"))[None]
    assert apart(delta, written_out(updates, 0.2, 0.5, "value")[None]) < 1e-5  # float32 factors


@pytest.mark.parametrize(
    ("order", "does"),
    [("qkv", "query"), ("vqk", "value")],  # of one shape, and told apart by role alone
)
def test_the_engine_hands_over_the_siblings(order: str, does: Role) -> None:
    paths = [str(FIXTURE / task) for task in ("sh3_rev", "sort_inter")]
    result, _ = lm.run("decorrelate", paths, rank="full", scale="paper")
    name = "model.layers.0.self_attn.{}_proj"
    read = [[lm.load(path).read(name.format(one)) for one in order] for path in paths]
    own, *beside = zip(*([LowRank(u.A[None], u.B[None]) for u in row] for row in read), strict=True)
    updates = updates_of(list(own), siblings=tuple(zip(*beside, strict=True)))
    found = dense(result.adapter.read(name.format(order[0])))[None]
    options = DecorrelateOptions(role=does)
    assert apart(found, merged(updates, options)) < 1e-3  # written in float16
    alone = merged(replace(updates, siblings=()), options)
    assert apart(alone, merged(updates, options)) > 1e-2  # or it would not show
