"""What verify says of adapters for Ollama, whose importer reads safetensors by rules of its own."""

from pathlib import Path

import pytest

from tests.build import write_peft
from tests.plain import pair, plain
from tests.typed import typed

OTHER = "it knows llama and gemma2 alone, and "


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


def test_ollama_takes_factors_for_transposed_where_the_rank_is_large(tmp_path: Path) -> None:
    done = typed("verify", write_peft(tmp_path / "a", {"o_proj": pair(5)}), "--for", "ollama")
    assert "o_proj has a rank above 4" in done.out
    assert f"loramerge squeeze {tmp_path / 'a'} --rank 4" in done.out


@pytest.mark.parametrize(
    ("base", "module", "code"),
    [
        ("meta-llama/Llama-3.2-1B", "q_proj", 3),
        ("meta-llama/Llama-3.2-1B", "v_proj", 0),
        ("google/gemma-2-2b", "q_proj", 0),
        ("mistralai/Mistral-7B-v0.3", "q_proj", 3),
        ("../models/base", "k_proj", 3),
        ("", "k_proj", 3),
    ],
)
def test_ollama_turns_the_wrong_factor_of_queries_and_keys_of_llama(
    base: str, module: str, code: int, tmp_path: Path
) -> None:
    path = write_peft(tmp_path / "a", {module: pair()}, base_model_name_or_path=base)
    done = typed("verify", path, "--for", "ollama")
    assert done.code == code, done.out
    assert (f"reorders A of {module}, and not the rows of B" in done.out) == bool(code)
    assert (f"convert_lora_to_gguf.py {path}" in done.out) == bool(code)


@pytest.mark.parametrize(
    ("base", "module", "why"),
    [
        ("Qwen/Qwen2.5-7B", "q_proj", f"{OTHER}Qwen/Qwen2.5-7B is called neither"),
        ("google/gemma-2b", "q_proj", f"{OTHER}google/gemma-2b is called neither"),
        ("microsoft/phi-2", "v_proj", f"{OTHER}microsoft/phi-2 is called neither"),
        ("", "self_attn.qkv_proj", "it has no name for self_attn.qkv_proj"),
        ("openai-community/gpt2", "h.0.attn.c_attn", "it has no name for h.0.attn.c_attn"),
    ],
)
def test_ollama_refuses_adapters_of_other_models(
    base: str, module: str, why: str, tmp_path: Path
) -> None:
    path = write_peft(tmp_path / "a", {module: pair()}, base_model_name_or_path=base)
    done = typed("verify", path, "--for", "ollama")
    assert done.code == 3
    assert f"refused: {why}" in done.out
    assert "reorders" not in done.out
    assert f"convert_lora_to_gguf.py {path}" in done.out
