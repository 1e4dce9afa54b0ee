"""verify: numbers, hashes, and who loads an adapter right, rule by rule."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from loramerge.cli.verify import PROGRAMS, VLLM_MAX_RANK
from loramerge.consumers import CONSUMERS, DEFAULT_MAX_RANK
from loramerge.io._open import open_adapter
from tests.build import write_peft
from tests.typed import typed

FIXTURES = Path(__file__).parents[1] / "fixtures"
EVERY = set(CONSUMERS)
SERVERS = {"vllm", "sglang", "llama.cpp", "ollama"}
RNG = np.random.default_rng(0)


def pair(rank: int = 2) -> tuple[np.ndarray, np.ndarray]:
    return (
        RNG.standard_normal((rank, 6)).astype(np.float32),
        RNG.standard_normal((4, rank)).astype(np.float32),
    )


def states(path: Path, max_rank: int = DEFAULT_MAX_RANK) -> dict[str, str]:
    adapter = open_adapter(str(path))
    return {name: rule(adapter, max_rank).state for name, rule in CONSUMERS.items()}


def only(found: dict[str, str], state: str) -> set[str]:
    return {name for name, one in found.items() if one == state}


def plain(path: Path, **config: object) -> Path:
    modules = {"layers.0.q_proj": pair(), "layers.0.v_proj": pair()}
    return write_peft(
        path, modules, **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **config}
    )


def test_a_plain_adapter_is_right_wherever_pefts_layout_is_read(tmp_path: Path) -> None:
    found = states(plain(tmp_path / "a"))
    assert only(found, "right") == EVERY - {"mlx", "diffusers"}


def test_what_we_write_is_right_everywhere_pefts_layout_is_read(tmp_path: Path) -> None:
    config = {"use_rslora": True, "alpha_pattern": {"v_proj": 7}}
    source = plain(tmp_path / "a", **config)
    assert typed("cat", source, "-o", tmp_path / "out").code == 0
    assert only(states(tmp_path / "out"), "right") == EVERY - {"mlx", "diffusers"}


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


def test_a_rank_pattern_is_wrong_in_servers_and_right_in_llama_cpp(tmp_path: Path) -> None:
    path = write_peft(
        tmp_path / "a",
        {"q_proj": pair(2), "v_proj": pair(4)},
        r=2,
        lora_alpha=2,
        rank_pattern={"v_proj": 4},
        target_modules=["q_proj", "v_proj"],
    )
    found = states(path)
    # lora_alpha / 4 is PEFT's scale and llama.cpp's; lora_alpha / r of the config is the servers'.
    assert only(found, "wrong scale") == SERVERS - {"llama.cpp"}


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
    ("change", "why"),
    [
        ({"use_dora": True}, "DoRA is not supported"),
        ({"lora_alpha": 2.5}, "lora_alpha is 2.5, no whole number"),
    ],
)
def test_ollama_refuses_what_it_cannot_read(
    change: dict[str, object], why: str, tmp_path: Path
) -> None:
    done = typed("verify", plain(tmp_path / "a", **change), "--for", "ollama")
    assert done.code == 3
    assert why in done.out


def test_a_head_is_refused_by_servers(tmp_path: Path) -> None:
    extras = {"base_model.model.score.weight": np.ones((3, 6), np.float32)}
    path = plain(tmp_path / "a", extras=extras, modules_to_save=["score"])
    assert only(states(path), "refused") >= SERVERS


def test_targets_that_leave_a_module_out_are_refused_by_peft(tmp_path: Path) -> None:
    found = states(plain(tmp_path / "a", target_modules=["q_proj"]))
    assert found["peft"] == "refused"


def test_keys_without_pefts_prefix_are_refused_by_peft(tmp_path: Path) -> None:
    path = plain(tmp_path / "a")
    file = path / "adapter_model.safetensors"
    save_file({k.removeprefix("base_model.model."): v for k, v in load_file(file).items()}, file)
    assert states(path)["peft"] == "refused"


def test_kohya_files_are_for_pipelines_and_one_alpha(tmp_path: Path) -> None:
    assert only(states(FIXTURES / "kohya" / "linear.safetensors"), "right") == {"diffusers"}
    found = states(FIXTURES / "kohya" / "ranks.safetensors")
    assert only(found, "wrong scale") == {"diffusers"}


def test_mlx_adapters_are_for_mlx() -> None:
    assert only(states(FIXTURES / "mlx" / "linear"), "right") == {"mlx"}


def test_a_changed_tensor_is_found_by_its_hash(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert typed("cat", plain(tmp_path / "a"), "-o", out).code == 0
    assert typed("verify", out).code == 0
    file = out / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = typed("verify", out)
    assert done.code == 3
    assert "not those of loramerge.json" in done.out


def test_a_number_that_is_none_is_found(tmp_path: Path) -> None:
    A, B = pair()
    A[0, 0] = np.nan
    done = typed("verify", write_peft(tmp_path / "a", {"lin": (A, B)}, r=2, lora_alpha=2))
    assert done.code == 3
    assert "not finite in lin" in done.out


def test_against_its_source_a_conversion_is_the_same_and_another_adapter_is_not(
    tmp_path: Path,
) -> None:
    source = plain(tmp_path / "a")
    assert typed("cat", source, "-o", tmp_path / "b").code == 0
    assert typed("verify", tmp_path / "b", "--against", source).code == 0
    other = plain(tmp_path / "c")
    done = typed("verify", tmp_path / "b", "--against", other)
    assert done.code == 3
    assert "it differs from" in done.err


def test_every_program_is_in_the_json(tmp_path: Path) -> None:
    done = typed("verify", plain(tmp_path / "a"), "--json")
    facts = json.loads(done.out)
    assert set(facts["consumers"]) == EVERY
    assert facts["modules"] == 2
    assert facts["tensors"] == 4


def test_help_names_every_program_and_vllms_own_rank() -> None:
    assert tuple(CONSUMERS) == PROGRAMS
    assert VLLM_MAX_RANK == DEFAULT_MAX_RANK


def test_an_unknown_program_is_refused_with_the_nearest(tmp_path: Path) -> None:
    done = typed("verify", plain(tmp_path / "a"), "--for", "vlm")
    assert done.code == 2
    assert "did you mean 'vllm'?" in done.err
