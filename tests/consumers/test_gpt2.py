"""GPT-2, whose layers are Conv1D with weights [in, out]: PEFT, transformers and llama.cpp."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from tests.build import Pair, write_peft
from tests.consumers.deviations import compare
from tests.consumers.forms import run
from tests.consumers.gguf_files import (
    CONVERTER,
    convert,
    gguf,
    last_log_probabilities,
    write,
    write_words,
)
from tests.consumers.llama import TOKENS, WORDS
from tests.consumers.pipelines import FLOAT32, Deltas, added
from tests.consumers.test_llama_cpp import last
from tests.consumers.test_peft import PEFT, TRANSFORMERS
from tests.consumers.verdicts import judge
from tests.oracle.tiny import truncated, weighted

pytestmark = pytest.mark.consumers
WIDTH, LAYERS = 64, 2
# llama.cpp looks its GELU up in a table of float16.
GELU = 1e-3
CONFIG = GPT2Config(
    n_embd=WIDTH,
    n_layer=LAYERS,
    n_head=4,
    n_positions=64,
    vocab_size=WORDS,
    bos_token_id=1,
    eos_token_id=2,
    activation_function="gelu_new",
    architectures=["GPT2LMHeadModel"],
)
# Module -> (out, in).
SHAPES = {
    "attn.c_attn": (3 * WIDTH, WIDTH),
    "attn.c_proj": (WIDTH, WIDTH),
    "mlp.c_fc": (4 * WIDTH, WIDTH),
    "mlp.c_proj": (WIDTH, 4 * WIDTH),
}


def model() -> GPT2LMHeadModel:
    torch.manual_seed(6)
    made = GPT2LMHeadModel(CONFIG).eval()
    for name, weight in made.named_parameters():
        if weight.dim() == 2 and ".h." in name:
            nn.init.normal_(weight, std=weight.shape[0] ** -0.5)
    return made


MODEL = model()


def outputs(loaded: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return loaded.eval()(torch.tensor([TOKENS])).logits[0].double().numpy()


def expected(deltas: Deltas) -> np.ndarray:
    """Logits in float64 of weights plus delta weights [out, in], turned as the weights are."""
    return outputs(added(MODEL, {name: x.T.copy() for name, x in deltas.items()}))


def trained(path: Path, rank: int, names: tuple[str, ...] = tuple(SHAPES)) -> tuple[Path, Deltas]:
    rng = np.random.default_rng(rank)
    factors: dict[str, Pair] = {}
    for layer in range(LAYERS):
        for name in names:
            out, into = SHAPES[name]
            A = rng.standard_normal((rank, into)) / np.sqrt(into)
            B = 0.2 * rng.standard_normal((out, rank))
            factors[f"transformer.h.{layer}.{name}"] = A.astype("f4"), B.astype("f4")
    deltas = {name: 2.0 * (B.astype("f8") @ A.astype("f8")) for name, (A, B) in factors.items()}
    config = {"target_modules": sorted(names), "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    return write_peft(path, factors, lora_alpha=2 * rank, **config), deltas


def in_peft(path: Path) -> nn.Module:
    return PeftModel.from_pretrained(model(), str(path))


def in_transformers(path: Path) -> nn.Module:
    loaded = model()
    loaded.load_adapter(str(path))
    return loaded


LOADS: Mapping[str, tuple[Callable[[Path], nn.Module], str]] = {
    "PEFT": (in_peft, PEFT),
    "transformers": (in_transformers, f"{TRANSFORMERS}, {PEFT}"),
}


@pytest.mark.parametrize("program", LOADS)
def test_a_merge_and_a_squeezed_adapter_are_loaded(program: str, tmp_path: Path) -> None:
    (a, one), (b, two) = trained(tmp_path / "a", 4), trained(tmp_path / "b", 3)
    load, versions = LOADS[program]
    run("cat", a, b, "-w", "0.7", "-w", "-0.5", "-o", tmp_path / "merge")
    run("squeeze", a, "--rank", "2", "-o", tmp_path / "squeezed")
    wanted = {
        "merge": weighted([one, two], [0.7, -0.5]),
        "squeezed": {name: truncated(delta, 2) for name, delta in one.items()},
    }
    for what, deltas in wanted.items():
        found, full = outputs(load(tmp_path / what)), expected(deltas)
        compare(program, versions, f"GPT-2: {what}", found, full, expected({}), FLOAT32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in GGUF."""
    writer = gguf.GGUFWriter(str(tmp_path_factory.mktemp("gguf") / "base.gguf"), "gpt2")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONFIG.n_positions)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(4 * WIDTH)
    writer.add_head_count(CONFIG.n_head)
    writer.add_layer_norm_eps(CONFIG.layer_norm_epsilon)
    write_words(writer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, LAYERS)
    for key, tensor in MODEL.state_dict().items():
        weight = tensor.numpy()
        conv = key.endswith(tuple(f"{name}.weight" for name in SHAPES))
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, np.ascontiguousarray(weight.T) if conv else weight)
    return write(writer)


@pytest.mark.skipif(not CONVERTER.is_file(), reason="needs llama.cpp's converter: make consumers")
@pytest.mark.parametrize("names", [tuple(SHAPES), ("attn.c_proj",)])
def test_verify_says_that_llama_cpp_takes_its_factors_transposed(
    names: tuple[str, ...], base: Path, tmp_path: Path
) -> None:
    path, deltas = trained(tmp_path / "a", 4, names)
    wanted, without = last(expected(deltas)), last(expected({}))
    # The base is computed as in transformers, so that the adapter alone makes a difference.
    assert np.abs(last_log_probabilities(base) - without).max() < GELU

    def load(path: Path) -> np.ndarray:
        return last_log_probabilities(base, convert(path, tmp_path / "a.gguf", CONFIG))

    judge("llama.cpp", path, load, wanted, without, GELU)
