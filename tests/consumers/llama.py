"""A llama of two layers with random weights: in float64 here, in float32 in transformers."""

from collections.abc import Mapping

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEYS, WIDTH, INNER, WORDS, LAYERS = 4, 2, 64, 96, 128, 2
HEAD = WIDTH // HEADS
CONFIG = LlamaConfig(
    vocab_size=WORDS,
    hidden_size=WIDTH,
    intermediate_size=INNER,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=KEYS,
    max_position_embeddings=64,
    architectures=["LlamaForCausalLM"],
)
THETA = 10000.0
TOKENS = [3, 99, 14, 27, 5, 64, 101, 8]
# Module -> (out, in), without its layer.
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEYS * HEAD, WIDTH),
    "self_attn.v_proj": (KEYS * HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (INNER, WIDTH),
    "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}


def weights() -> dict[str, np.ndarray]:
    """Weights of ordinary size, so that every layer is seen in the output; float32."""
    rng = np.random.default_rng(5)

    def normal(out: int, into: int) -> np.ndarray:
        return (rng.standard_normal((out, into)) / np.sqrt(into)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32)

    found = {"model.embed_tokens.weight": normal(WORDS, WIDTH), "model.norm.weight": norm()}
    found["lm_head.weight"] = normal(WORDS, WIDTH)
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}."
        found |= {f"{stem}{name}.weight": normal(*shape) for name, shape in SHAPES.items()}
        found |= {f"{stem}{n}_layernorm.weight": norm() for n in ("input", "post_attention")}
    return found


WEIGHTS = weights()


def model() -> LlamaForCausalLM:
    """The model of transformers, in float32."""
    made = LlamaForCausalLM(CONFIG).eval()
    made.load_state_dict({key: torch.from_numpy(x) for key, x in WEIGHTS.items()})
    return made


def logits(deltas: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
    """Logits [tokens, words] of weights plus delta weights, everything in float64."""
    w = {key: x.astype(np.float64) for key, x in WEIGHTS.items()}
    for name, delta in (deltas or {}).items():
        w[f"{name}.weight"] = w[f"{name}.weight"] + delta
    x = w["model.embed_tokens.weight"][TOKENS]
    for layer in range(LAYERS):
        part = {k.removeprefix(f"model.layers.{layer}."): v for k, v in w.items()}
        x = x + _attention(_normed(x, part["input_layernorm.weight"]), part)
        y = _normed(x, part["post_attention_layernorm.weight"])
        gate = y @ part["mlp.gate_proj.weight"].T
        inner = gate / (1 + np.exp(-gate)) * (y @ part["mlp.up_proj.weight"].T)
        x = x + inner @ part["mlp.down_proj.weight"].T
    return _normed(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def _normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG.rms_norm_eps) * weight


def _attention(x: np.ndarray, part: Mapping[str, np.ndarray]) -> np.ndarray:
    def heads(name: str) -> np.ndarray:
        y = x @ part[f"self_attn.{name}_proj.weight"].T
        y = y.reshape(len(x), -1, HEAD).swapaxes(0, 1)
        return y.repeat(HEADS // len(y), axis=0)

    query, key, value = _turned(heads("q")), _turned(heads("k")), heads("v")
    scores = query @ key.swapaxes(1, 2) / np.sqrt(HEAD)
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = shares / shares.sum(-1, keepdims=True) @ value
    return mixed.swapaxes(0, 1).reshape(len(x), WIDTH) @ part["self_attn.o_proj.weight"].T


def _turned(x: np.ndarray) -> np.ndarray:
    """Rotary position embedding of [head, token, HEAD]; halves are turned against each other."""
    frequencies = THETA ** (-np.arange(0, HEAD, 2) / HEAD)
    angle = np.arange(x.shape[1])[:, None] * frequencies
    one, two = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
