"""Who loads an adapter right, rule by rule; tests/consumers compares them with the programs."""

import json
import shlex
from pathlib import Path
from shutil import copyfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramerge.consumers import CONSUMERS, DEFAULT_MAX_RANK
from loramerge.io._open import open_adapter
from loramerge.registry import layout_names
from tests.build import write_kohya, write_peft
from tests.plain import pair, plain
from tests.typed import typed

FIXTURES = Path(__file__).parents[1] / "fixtures"
EVERY = set(CONSUMERS)
CONFIG = "adapter_config.json"
SERVERS = {"vllm", "sglang", "llama.cpp", "ollama"}


def states(path: Path, max_rank: int = DEFAULT_MAX_RANK) -> dict[str, str]:
    adapter = open_adapter(str(path))
    return {name: rule(adapter, max_rank).state for name, rule in CONSUMERS.items()}


def only(found: dict[str, str], state: str) -> set[str]:
    return {name for name, one in found.items() if one == state}


def test_a_plain_adapter_is_right_wherever_pefts_layout_is_read(tmp_path: Path) -> None:
    found = states(plain(tmp_path / "a"))
    assert only(found, "right") == EVERY - {"mlx", "diffusers", "ollama"}


def test_what_we_write_is_right_everywhere_pefts_layout_is_read(tmp_path: Path) -> None:
    config = {"use_rslora": True, "alpha_pattern": {"v_proj": 7}}
    source = plain(tmp_path / "a", **config)
    assert typed("cat", source, "-o", tmp_path / "out").code == 0
    assert only(states(tmp_path / "out"), "right") == EVERY - {"mlx", "diffusers", "ollama"}


# What a config says -> the programs that load it without a word and scale it wrong.
WRONG = {
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 8}}, SERVERS),
    "use_rslora": ({"use_rslora": True}, SERVERS - {"vllm"}),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_scale_that_a_program_ignores_is_wrong_there_and_right_in_peft(
    case: str, tmp_path: Path
) -> None:
    config, wrong = WRONG[case]
    found = states(plain(tmp_path / "a", **config))
    assert only(found, "wrong scale") == wrong
    assert found["peft"] == "right"


def test_a_rank_pattern_is_right_where_the_rank_of_tensors_counts(tmp_path: Path) -> None:
    path = write_peft(
        tmp_path / "a",
        {"q_proj": pair(2), "v_proj": pair(4)},
        r=2,
        lora_alpha=2,
        rank_pattern={"v_proj": 4},
        target_modules=["q_proj", "v_proj"],
    )
    found = states(path)
    # lora_alpha / 4 is the scale; lora_alpha / r of the config is the others'.
    assert only(found, "right") == {"peft", "transformers", "llama.cpp"}
    assert only(found, "wrong scale") == {"peft-hotswap", "vllm", "ollama"}
    assert "rank of v_proj is not r" in typed("verify", path, "--for", "sglang").out


def test_a_rank_above_the_servers_is_refused_there_with_the_command_that_mends_it(
    tmp_path: Path,
) -> None:
    path = plain(tmp_path / "a")
    found = states(path, max_rank=1)
    assert only(found, "refused") == {"vllm", "sglang", "mlx", "diffusers"}
    done = typed("verify", path, "--for", "vllm", "--max-rank", "1")
    assert done.code == 3
    assert f"loramerge squeeze {path} --rank 1" in done.out


@pytest.mark.parametrize(
    ("modules", "config", "why"),
    [
        (["q_proj", "k_proj"], {}, "it stacks k_proj with v_proj, which is missing"),
        (["up_proj"], {}, "it stacks up_proj with gate_proj, which is missing"),
        (["o_proj"], {"target_modules": ".*"}, "target_modules is a pattern"),
        (["o_proj"], {"target_modules": ["down_proj"]}, "target_modules does not name o_proj"),
        (["o_proj"], {"target_modules": "all-linear"}, ""),
        (["q_proj", "v_proj", "o_proj"], {"target_modules": ["x.q_proj", "v_proj", "o_proj"]}, ""),
    ],
)
def test_sglang_wants_layers_it_can_stack_and_lists_of_targets(
    modules: list[str], config: dict[str, object], why: str, tmp_path: Path
) -> None:
    path = write_peft(tmp_path / "a", {name: pair() for name in modules}, **config)
    done = typed("verify", path, "--for", "sglang")
    assert (done.code, why in done.out) == (3 if why else 0, True), done.out


@pytest.mark.parametrize("program", ["vllm", "sglang", "llama.cpp"])
def test_a_config_must_say_alpha(program: str, tmp_path: Path) -> None:
    path = plain(tmp_path / "a")
    file = path / "adapter_config.json"
    facts = json.loads(file.read_text())
    del facts["lora_alpha"]
    file.write_text(json.dumps(facts))
    assert "does not say lora_alpha" in typed("verify", path, "--for", program).out


def test_llama_cpp_turns_factors_of_gpt2_which_is_only_seen_where_a_layer_is_not_square(
    tmp_path: Path,
) -> None:
    assert states(plain(tmp_path / "a", fan_in_fan_out=True))["llama.cpp"] == "refused"
    square = {"c_proj": (np.ones((2, 6), np.float32), np.ones((6, 2), np.float32))}
    path = write_peft(tmp_path / "b", square, fan_in_fan_out=True)
    assert states(path)["llama.cpp"] == "wrong scale"


def test_a_head_is_refused_by_servers(tmp_path: Path) -> None:
    extras = {"base_model.model.score.weight": np.ones((3, 6), np.float32)}
    path = plain(tmp_path / "a", extras=extras, modules_to_save=["score"])
    assert only(states(path), "refused") >= SERVERS


def test_targets_that_leave_a_module_out_are_seen_where_they_count(tmp_path: Path) -> None:
    found = states(plain(tmp_path / "a", target_modules=["q_proj"]))
    assert only(found, "wrong scale") == {"peft", "transformers", "ollama"}
    assert only(found, "refused") == {"sglang", "mlx", "diffusers"}


def test_targets_that_leave_everything_out_are_refused(tmp_path: Path) -> None:
    found = states(plain(tmp_path / "a", target_modules=["o_proj"]))
    assert only(found, "refused") >= {"peft", "transformers", "sglang"}


def test_keys_without_pefts_prefix_are_refused_by_peft_alone(tmp_path: Path) -> None:
    path = plain(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    save_file({k.removeprefix("base_model.model."): v for k, v in load_file(file).items()}, file)
    assert only(states(path), "refused") == {"peft", "peft-hotswap", "mlx", "diffusers"}


def test_the_magnitudes_of_dora_arrive_in_peft_alone(tmp_path: Path) -> None:
    key = "base_model.model.layers.0.{}.lora_magnitude_vector"
    extras = {key.format(leaf): np.ones(4, np.float32) for leaf in ("q_proj", "v_proj")}
    found = states(plain(tmp_path / "a", extras=extras, use_dora=True))
    assert only(found, "right") == {"peft"}
    assert only(found, "wrong scale") == {"transformers"}


@pytest.mark.parametrize("field", ["use_rslora", "alpha_pattern", "lora_dropout"])
def test_what_a_hotswap_compares_is_refused_where_it_differs(field: str, tmp_path: Path) -> None:
    value = {"use_rslora": True, "alpha_pattern": {"v_proj": 4}, "lora_dropout": 0.1}[field]
    done = typed("verify", plain(tmp_path / "a", **{field: value}), "--for", "peft-hotswap")
    assert f"{field} must be the same" in done.out


def kohya(path: Path, base: str = "sd_v1", **alphas: float | None) -> Path:
    modules = {f"lora_{name}": (*pair(), x) for name, x in alphas.items()}
    return write_kohya(path, modules, metadata={"ss_base_model_version": base})


def test_a_kohya_file_is_right_where_each_part_has_one_alpha(tmp_path: Path) -> None:
    path = kohya(tmp_path / "a.safetensors", unet_mid_a=1, unet_mid_b=1, te_a=2, te2_a=None)
    assert only(states(path), "right") == {"diffusers"}


@pytest.mark.parametrize("other", [2, None])
def test_a_kohya_file_is_scaled_wrong_where_a_part_has_several(
    other: float | None, tmp_path: Path
) -> None:
    path = kohya(tmp_path / "a.safetensors", unet_mid_a=1, unet_mid_b=1, unet_mid_c=other)
    assert only(states(path), "wrong scale") == {"diffusers"}
    done = typed("verify", path, "--for", "diffusers")
    assert "1 of 3 modules wrong, lora_unet_mid_c by 0.5 times" in done.out


def test_alphas_of_zero_mean_nothing_arrives(tmp_path: Path) -> None:
    done = typed("verify", kohya(tmp_path / "a.safetensors", unet_mid_a=0), "--for", "diffusers")
    assert "refused: the most common alpha / rank is 0" in done.out


def test_layers_of_flux_each_have_their_scale_and_those_outside_its_blocks_are_not_loaded(
    tmp_path: Path,
) -> None:
    blocks = {
        "unet_double_blocks_0_img_attn_proj": 1,
        "unet_single_blocks_0_linear2": 2,
        "te1_text_model_encoder_layers_0_mlp_fc1": 3,
    }
    assert states(kohya(tmp_path / "a.safetensors", **blocks))["diffusers"] == "right"
    path = kohya(tmp_path / "b.safetensors", "flux1", **blocks, unet_img_in=1)
    done = typed("verify", path, "--for", "diffusers")
    assert "wrong scale: from a kohya file it loads no lora_unet_img_in" in done.out
    assert f"loramerge convert {path} --to diffusers" in done.out


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scale": None}, "its config does not say scale; add it to lora_parameters"),
        ({"dropout": None}, "its config does not say dropout"),
        ({"rank": 3}, "its config says rank 3, its tensors are of rank 2"),
        ({"keys": ["v_proj"]}, "keys of its config leave out layers.0.q_proj"),
        ({"keys": None}, ""),
    ],
)
def test_mlx_needs_every_word_of_its_config(
    change: dict[str, object], why: str, tmp_path: Path
) -> None:
    A, B = pair()
    facts = {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["q_proj"], **change}
    kept = {word: value for word, value in facts.items() if value is not None}
    config = {"num_layers": 1, "lora_parameters": kept}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {"layers.0.q_proj.lora_a": A.T.copy(), "layers.0.q_proj.lora_b": B.T.copy()}
    save_file(tensors, tmp_path / "adapters.safetensors")
    done = typed("verify", tmp_path, "--for", "mlx")
    assert (done.code, why in done.out) == (3 if why else 0, True), done.out


@pytest.mark.parametrize(
    ("fixture", "right"),
    [
        ("adalora/pruned", {"peft", "transformers"}),
        ("loha_lokr/kronecker", {"peft", "transformers"}),
        ("vblora/topk", {"peft"}),
        ("vera/projected", {"peft"}),
        ("loraxs/core", set()),
    ],
)
def test_types_of_pefts_own_are_for_peft(fixture: str, right: set[str]) -> None:
    assert only(states(FIXTURES / fixture), "right") == right


READABLE = sorted(
    path.relative_to(FIXTURES).as_posix()
    for layout in layout_names()
    for path in (FIXTURES / layout).iterdir()
)


@pytest.mark.parametrize("fixture", READABLE)
def test_what_verify_says_to_type_can_be_typed(
    fixture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = json.loads(typed("verify", FIXTURES / fixture, "--json").out)["consumers"]
    for remedy in {one["remedy"] for one in found.values()}:
        words = shlex.split(remedy)
        if words[:1] == ["loramerge"] and "--base" not in words:
            done = typed(*words[1:])
            # That MLX has another word for embeddings than a model is only seen once written.
            assert done.code == 0 or "cannot say what" in done.err, (remedy, done.err)


def test_mlx_looks_for_one_file(tmp_path: Path) -> None:
    checkpoint = tmp_path / "0000100_adapters.safetensors"
    copyfile(FIXTURES / "mlx" / "linear" / "adapters.safetensors", checkpoint)
    copyfile(FIXTURES / "mlx" / "linear" / CONFIG, tmp_path / CONFIG)
    done = typed("verify", tmp_path, "--for", "mlx")
    assert "it looks for adapters.safetensors, not 0000100_adapters.safetensors" in done.out


def test_mlx_adapters_are_for_mlx() -> None:
    assert only(states(FIXTURES / "mlx" / "linear"), "right") == {"mlx"}
