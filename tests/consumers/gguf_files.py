"""The tiny llama and its adapters as GGUF files, and what llama.cpp makes of them."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PretrainedConfig

from tests.consumers.llama import CONFIG, HEADS, KEYS, LAYERS, THETA, TOKENS, WEIGHTS, WORDS
from tests.typed import ROOT

gguf = pytest.importorskip("gguf", reason="needs gguf: make consumers")
xllamacpp = pytest.importorskip("xllamacpp", reason="needs xllamacpp: make consumers")
SOURCE = ROOT / ".consumers" / "llama-cpp-python"
CONVERTER = SOURCE / "vendor" / "llama.cpp" / "convert_lora_to_gguf.py"


def write_base(path: Path) -> Path:
    """The model with its weights in float32."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_rope_dimension_count(CONFIG.hidden_size // HEADS)
    writer.add_rope_freq_base(THETA)
    write_words(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for key, weight in WEIGHTS.items():
        heads = {"q_proj": HEADS, "k_proj": KEYS}.get(key.split(".")[-2])
        stored = weight if heads is None else paired(weight, heads)
        writer.add_tensor(names.get_name(key, try_suffixes=(".weight",)), stored)
    return write(writer)


def write_words(writer: Any) -> None:
    """A vocabulary of words without meaning, three of them special."""
    writer.add_vocab_size(WORDS)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"t{n}" for n in range(WORDS - 3))])
    writer.add_token_scores([0.0] * WORDS)
    writer.add_token_types([2, 3, 3, *[1] * (WORDS - 3)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def write(writer: Any) -> Path:
    """The file, once everything of it is known."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(writer.path)


def paired(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp turns them: those that turn together lie side by side."""
    halves = weight.reshape(heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def convert(adapter: Path, out: Path, config: PretrainedConfig = CONFIG) -> Path:
    """The adapter in GGUF, made by llama.cpp's own converter; it must succeed."""
    base = out.parent / "base"
    config.save_pretrained(base)
    words = [sys.executable, CONVERTER, "--base", base, "--outtype", "f32", "--outfile", out]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*words, adapter], check=True, capture_output=True, env=environment)
    return out


def last_log_probabilities(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Of every word after TOKENS, computed by llama.cpp with its cache in float32."""
    params = xllamacpp.CommonParams()
    params.model.path = str(base)
    params.n_ctx = CONFIG.max_position_embeddings
    params.n_gpu_layers = 0
    params.warmup = False
    params.verbosity = -1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    asked = {"prompt": TOKENS, "n_predict": 1, "n_probs": WORDS, "temperature": 0.0}
    answer = xllamacpp.Server(params).handle_completions({**asked, "samplers": []})
    return _read(json.loads(answer) if isinstance(answer, str | bytes) else answer)


def _read(answer: dict[str, Any]) -> np.ndarray:
    found = np.full(WORDS, np.nan)
    for one in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
        found[one["id"]] = one["logprob"]
    return found


def versions() -> str:
    """Which llama.cpp computes, and with which llama-cpp-python its converter came."""
    about = (SOURCE / "PKG-INFO").read_text("utf-8").splitlines()
    with_it = next(line for line in about if line.startswith("Version: "))
    return f"xllamacpp {version('xllamacpp')}, converter of llama-cpp-python {with_it[9:]}"
