"""torchtune's names of language models, and its order of rows, against Hugging Face's."""

import re

from msgspec import Struct
from msgspec.structs import replace

from loramerge._lazy import np
from loramerge.adapter import Adapter, LowRank, Module, TensorSource
from loramerge.errors import IncompatibleError, listed
from loramerge.io._names._projections import Heads

__all__ = ["OF_MODEL", "across_torchtune"]

LAYER = re.compile(r"(?:model\.)?layers\.(?P<number>\d+)\.(?P<path>.+)")
PATHS = {
    **{f"attn.{x}_proj": f"self_attn.{x}_proj" for x in "qkv"},
    "attn.output_proj": "self_attn.o_proj",
    **{"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj", "mlp.w3": "mlp.up_proj"},
    "output": "lm_head",
}
BACK = {theirs: ours for ours, theirs in PATHS.items()}
# Whose rows rotary embeddings turn, and which of the two numbers of heads it has.
TURNED = {"q_proj": 0, "k_proj": 1}
HEADS = ("num_attention_heads", "num_key_value_heads")
# What config.json of a model says of the order of rows.
OF_MODEL = ("model_type", *HEADS)
NOTHING_SAID = (
    "rows of q_proj and k_proj change places, as for Llama, Mistral and Gemma: nothing says that "
    "its base is a Qwen or a Phi, whose rows do not"
)
# Models that torchtune rotates as Hugging Face does, by type or name, and those it does not.
ALIKE = re.compile(r"qwen|\bphi-?[34]", re.IGNORECASE)
UNLIKE = re.compile(r"llama|mistral|gemma", re.IGNORECASE)


def across_torchtune(adapter: Adapter, naming: str, heads: Heads | None) -> Adapter:
    """The adapter with the names and the order of rows of Hugging Face (`model`) or torchtune.

    torchtune rotates neighbouring rows of a head, Hugging Face those of its two halves, so that
    rows of q_proj and k_proj change places (as in torchtune's tune_to_peft_adapter_weights), but
    for Qwen and Phi, whose models it rotates by halves too. Raises IncompatibleError where `heads`
    are needed and missing, or do not fit; for unknown names.
    """
    known = f"{adapter.config.get('model_type', '')} {adapter.base_model or ''}"
    heads = heads or _stated(adapter)
    back = naming == "torchtune"
    paths, stem = (BACK, "layers") if back else (PATHS, "model.layers")
    modules: dict[str, Module] = {}
    unknown: list[str] = []
    for name, module in adapter.modules.items():
        match = LAYER.fullmatch(name)
        path = paths.get(match["path"] if match else name)
        if path is None:
            unknown.append(name)
            continue
        turns = _leaf(path) in TURNED and not ALIKE.search(known)
        found = _turned(adapter, module, heads, back) if turns else module
        target = f"{stem}.{match['number']}.{path}" if match else path
        modules[target] = replace(found, name=target)
    if unknown:
        raise IncompatibleError(
            f"{adapter.reference}: {len(unknown)} of {len(adapter.modules)} modules have no name "
            f"that torchtune and Hugging Face share: {listed(unknown, 4)}.",
            "leave them out: loramerge select ... --exclude",
        )
    turned = any(isinstance(module.form, Turned) for module in modules.values())
    notes = (NOTHING_SAID,) if turned and not UNLIKE.search(known) else ()
    return replace(adapter, naming=naming, modules=modules, assumed=(*adapter.assumed, *notes))


def _stated(adapter: Adapter) -> Heads | None:
    """How many heads config.json says that there are, beside torchtune's checkpoints."""
    queries, keys = (adapter.config.get(name) for name in HEADS)
    keys = queries if keys is None else keys
    counts = [n for n in (queries, keys) if isinstance(n, int) and n > 0]
    return (counts[0], counts[1]) if len(counts) == 2 else None


def _leaf(path: str) -> str:
    return path.rpartition(".")[2]


class Turned(Struct, frozen=True):
    """Rows of B in another order: of each head, pairs of neighbours as two halves, or back."""

    whole: Module
    heads: int
    back: bool

    def __call__(self, source: TensorSource, module: Module) -> LowRank:
        update = self.whole.form(source, self.whole)
        rows = np.arange(len(update.B)).reshape(self.heads, *((2, -1) if self.back else (-1, 2)))
        return LowRank(update.A, update.B[rows.swapaxes(1, 2).reshape(-1)])


def _turned(adapter: Adapter, module: Module, heads: Heads | None, back: bool) -> Module:
    """The module with its rows in the other order."""
    count = heads[TURNED[_leaf(module.name)]] if heads else 0
    if not count or module.out_features % (2 * count):
        said = f"{count} do not fit its {module.out_features} rows" if count else "nothing says it"
        raise IncompatibleError(
            f"{adapter.reference}: the rows of {module.name} stand in another order there, by the "
            f"number of heads, and {said}.",
            "say how many heads queries and keys have: loramerge convert ... --heads 32,8",
        )
    return replace(module, form=Turned(module, count, back))
