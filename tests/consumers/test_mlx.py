"""MLX: mlx-lm's own loader and model, with what we wrote in its layout."""

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.consumers.deviations import compare
from tests.consumers.forms import FORMS, Made, run
from tests.consumers.llama import (
    CONFIG,
    HEADS,
    INNER,
    KEYS,
    LAYERS,
    SHAPES,
    THETA,
    TOKENS,
    WEIGHTS,
    WIDTH,
    WORDS,
    logits,
)
from tests.consumers.traps import TRAPS
from tests.consumers.verdicts import judge

mx = pytest.importorskip("mlx.core", reason="needs mlx: make consumers")
architecture = pytest.importorskip("mlx_lm.models.llama", reason="needs mlx-lm: make consumers")
tuner = pytest.importorskip("mlx_lm.tuner.utils", reason="needs mlx-lm: make consumers")
pytestmark = pytest.mark.consumers
VERSIONS = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
# The base alone is off by 1e-6: float32 rounds by 6e-8, some ten times in a row.
FLOAT32 = 5e-6


def outputs(adapter: Path) -> np.ndarray:
    """Logits of the tiny llama in MLX, in float32."""
    facts = architecture.ModelArgs(
        model_type="llama",
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        intermediate_size=INNER,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        head_dim=WIDTH // HEADS,
        rms_norm_eps=CONFIG.rms_norm_eps,
        vocab_size=WORDS,
        rope_theta=THETA,
        tie_word_embeddings=False,
    )
    model = architecture.Model(facts)
    model.load_weights([(key, mx.array(x)) for key, x in WEIGHTS.items()])
    return np.array(tuner.load_adapters(model, str(adapter))(mx.array([TOKENS])))[0]


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_every_form(form: str, forms: Mapping[str, Made], tmp_path: Path) -> None:
    one = forms[form]
    run("convert", one.path, "--to", "mlx", "-o", tmp_path / "mlx")
    found = outputs(tmp_path / "mlx")
    compare("MLX", VERSIONS, form, found, logits(one.deltas), logits(), FLOAT32)


def test_an_adapter_of_the_first_layer_alone_is_loaded(tmp_path: Path) -> None:
    """mlx-lm counts its layers from the last."""
    trained = TRAPS["one scale"](tmp_path / "a")
    run("select", trained.path, "--include", "model.layers.0.*", "-o", tmp_path / "first")
    run("convert", tmp_path / "first", "--to", "mlx", "-o", tmp_path / "mlx")
    deltas = {name: delta for name, delta in trained.deltas.items() if ".0." in name}
    found = outputs(tmp_path / "mlx")
    compare("MLX", VERSIONS, "first layer alone", found, logits(deltas), logits(), FLOAT32)


def in_mlx(path: Path, ranks: tuple[int, int] = (4, 4), **parameters: object) -> Made:
    """An adapter of q_proj as mlx-lm writes it, of one rank in each layer."""
    rng = np.random.default_rng(2)
    tensors, deltas = {}, {}
    for layer, rank in enumerate(ranks):
        name = f"model.layers.{layer}.self_attn.q_proj"
        out, into = SHAPES["self_attn.q_proj"]
        a = (rng.standard_normal((into, rank)) / np.sqrt(into)).astype("f4")
        b = (0.2 * rng.standard_normal((rank, out))).astype("f4")
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        deltas[name] = 3.0 * (a.astype("f8") @ b.astype("f8")).T
    path.mkdir()
    save_file(tensors, path / "adapters.safetensors")
    facts = {"rank": ranks[0], "scale": 3.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]}
    kept = {key: value for key, value in {**facts, **parameters}.items() if value is not None}
    config = {"fine_tune_type": "lora", "num_layers": LAYERS, "lora_parameters": kept}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return Made(path, deltas)


OWN: dict[str, Callable[[Path], Made]] = {
    "its own": in_mlx,
    "two ranks": lambda path: in_mlx(path, (4, 2)),
    "alpha instead of scale": lambda path: in_mlx(path, scale=None, alpha=12),
    "another rank": lambda path: in_mlx(path, rank=8),
    "a target that is not named": lambda path: in_mlx(path, keys=["self_attn.v_proj"]),
    "no dropout": lambda path: in_mlx(path, dropout=None),
    "PEFT's layout": TRAPS["one scale"],
}


@pytest.mark.parametrize("trap", OWN)
def test_verify_says_what_it_does(trap: str, tmp_path: Path) -> None:
    one = OWN[trap](tmp_path / "a")
    judge("mlx", one.path, outputs, logits(one.deltas), logits(), FLOAT32)
