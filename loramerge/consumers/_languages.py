"""Programs that load adapters of language models in PEFT's layout."""

import math
import re

from loramerge.adapter import Adapter, public_base
from loramerge.consumers._verdict import (
    BAKE,
    MAKE_PLAIN,
    PER_MODULE,
    Verdict,
    another_layout,
    compared,
    left_out,
)
from loramerge.errors import listed
from loramerge.io._peft_config import tails
from loramerge.io._peft_keys import PREFIX

__all__ = ["llama_cpp", "ollama", "peft", "peft_hotswap", "sglang", "transformers", "vllm"]

TO_PEFT = "loramerge convert {0} --to peft"
TO_GGUF = "python convert_lora_to_gguf.py {0}"
# Models that a GGUF calls gemma2 or llama, by their names: gemma-2b is of the first gemma.
GEMMA2 = re.compile(r"gemma-?2(?!\d*b)", re.IGNORECASE)
LLAMA = re.compile(r"llama|mi[sx]tral", re.IGNORECASE)
# Their layers, and those of them whose rows a GGUF of llama has in another order.
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROTATED = LAYERS[:2]
# Types of PEFT's with a layout of their own, and those of them whose modules share tensors.
OWN, SHARED = ("adalora", "loha_lokr", "vblora", "vera"), ("vblora", "vera")
# What servers want to find in a config.
REQUIRED = ("r", "lora_alpha", "target_modules")
# What SGLang stacks into one layer, and what must then be there too.
STACKED = {
    "q_proj": ("v_proj",),
    "k_proj": ("q_proj", "v_proj"),
    "v_proj": ("q_proj",),
    "up_proj": ("gate_proj",),
}


def peft(adapter: Adapter, max_rank: int) -> Verdict:
    """rank_pattern, alpha_pattern, rsLoRA and DoRA are honoured; keys need PEFT's prefix."""
    if adapter.layout in OWN and _in_directory(adapter):
        return Verdict("right", "a type of adapter of its own")
    found = _is_peft(adapter) or _prefixed(adapter) or _targeted(adapter)
    return found or Verdict("right", PER_MODULE)


def transformers(adapter: Adapter, max_rank: int) -> Verdict:
    """As PEFT, with or without its prefix; the magnitudes of DoRA it knows by another name."""
    if adapter.layout in OWN and _in_directory(adapter):
        if adapter.layout in SHARED:
            reason = "its modules share tensors, which only a model of PEFT's own holds"
            return Verdict("refused", reason, TO_PEFT)
        return peft(adapter, max_rank)
    found = _is_peft(adapter) or _targeted(adapter)
    if found is None and adapter.config.get("use_dora"):
        return Verdict("wrong scale", "it does not load DoRA's magnitudes", BAKE)
    return found or Verdict("right", PER_MODULE)


def peft_hotswap(adapter: Adapter, max_rank: int) -> Verdict:
    """PEFT's hotswap: what it checks must be as in the adapter in place, here one of ours.

    Its rank_pattern is looked up by keys of tensors, which end otherwise than modules: never found.
    """
    found = _is_peft(adapter) or _prefixed(adapter) or _is_plain(adapter)
    if found is not None:
        return found
    checked = ("use_rslora", "alpha_pattern", "use_dora", "lora_dropout")
    if differ := [field for field in checked if adapter.config.get(field)]:
        reason = f"{differ[0]} must be the same in the adapter it takes the place of"
        return Verdict("refused", reason, MAKE_PLAIN)
    return _one_scale(adapter, root=False)


def vllm(adapter: Adapter, max_rank: int) -> Verdict:
    """One alpha / r from the config; patterns are ignored, and target_modules, for the keys."""
    found = _is_peft(adapter) or _says(adapter, *REQUIRED) or _is_plain(adapter)
    found = found or _fits(adapter, max_rank, "vLLM")
    labelled = [key for key in _factor_keys(adapter) if not _plain_key(key)]
    if found is None and labelled:
        return Verdict("refused", f"{labelled[0]} is no key it parses", MAKE_PLAIN)
    rsLoRA = bool(adapter.config.get("use_rslora"))
    return found or _one_scale(adapter, root=rsLoRA)


def sglang(adapter: Adapter, max_rank: int) -> Verdict:
    """Alpha / r from the config, always, and every rank is r: rsLoRA and patterns are not read."""
    found = _is_peft(adapter) or _says(adapter, *REQUIRED) or _is_plain(adapter)
    found = found or _listed(adapter) or _stacked(adapter)
    if found is None and (odd := [n for n, m in adapter.modules.items() if m.rank != _r(adapter)]):
        reason = f"the rank of {listed(odd, 2)} is not r of its config, {_r(adapter)}"
        return Verdict("refused", reason, MAKE_PLAIN)
    return found or _fits(adapter, max_rank, "SGLang") or _one_scale(adapter, root=False)


def llama_cpp(adapter: Adapter, max_rank: int) -> Verdict:
    """The converter keeps lora_alpha and divides by each tensor's own rank."""
    found = _is_peft(adapter) or _says(adapter, "lora_alpha") or _is_plain(adapter)
    if found is None and adapter.config.get("fan_in_fan_out"):
        square = all(m.in_features == m.out_features for m in adapter.modules.values())
        reason = "its converter transposes factors of Conv1D as if they were weights"
        return Verdict("wrong scale" if square else "refused", reason)
    return found or _alpha_per_rank(adapter)


def ollama(adapter: Adapter, max_rank: int) -> Verdict:
    """As llama.cpp, which computes; but lora_alpha must be whole, and A wide and B high.

    It knows llama and gemma2, by convert_llama_adapter.go and convert_gemma2_adapter.go. A GGUF has
    the rows of llama's q_proj and k_proj in another order than Hugging Face; llama.cpp's converter
    follows it in B, Ollama's moves the numbers of A. Read in its source, not seen running.
    """
    found = _is_peft(adapter) or _is_plain(adapter)
    if found is not None:
        return found
    leaves = {name: name.rpartition(".")[2] for name in adapter.modules}
    if strange := [name for name, leaf in leaves.items() if leaf not in LAYERS]:
        return Verdict("refused", f"it has no name for {listed(strange, 2)}", TO_GGUF)
    base = adapter.base_model or ""
    gemma2 = GEMMA2.search(base)
    if public_base(adapter) and not (gemma2 or LLAMA.search(base)):
        reason = f"it knows llama and gemma2 alone, and {base} is called neither"
        return Verdict("refused", reason, TO_GGUF)
    alpha = _alpha(adapter)
    if alpha != int(alpha):
        return Verdict("refused", f"lora_alpha is {alpha:g}, no whole number", MAKE_PLAIN)
    for name, module in adapter.modules.items():
        if module.rank > (side := min(module.in_features, module.out_features)):
            reason = f"{name} has a rank above {side}: it takes its factors for transposed ones"
            return Verdict("refused", reason, f"loramerge squeeze {{0}} --rank {side}")
    turned = [name for name, leaf in leaves.items() if leaf in ROTATED]
    if turned and not gemma2:
        reason = f"for llama it reorders A of {listed(turned, 2)}, and not the rows of B"
        return Verdict("wrong scale", reason, TO_GGUF)
    return _alpha_per_rank(adapter)


def _is_peft(adapter: Adapter) -> Verdict | None:
    """A verdict where the adapter is no directory of PEFT's with a LoRA in it."""
    if adapter.layout != "peft":
        return another_layout(adapter, "peft")
    if _in_directory(adapter):
        return None
    reason = "no adapter_config.json beside adapter_model.safetensors"
    return Verdict("refused", reason, MAKE_PLAIN)


def _in_directory(adapter: Adapter) -> bool:
    path = adapter.source.path
    config = path.parent / "adapter_config.json"
    return path.name == "adapter_model.safetensors" and config.is_file()


def _says(adapter: Adapter, *words: str) -> Verdict | None:
    missing = [word for word in words if word not in adapter.config]
    if not missing:
        return None
    return Verdict("refused", f"its config does not say {listed(missing)}", MAKE_PLAIN)


def _prefixed(adapter: Adapter) -> Verdict | None:
    bare = [key for key in _factor_keys(adapter) if not key.startswith(PREFIX)]
    if not bare:
        return None
    reason = f"{len(bare)} keys lack {PREFIX}: none of them would be loaded"
    return Verdict("refused", reason, MAKE_PLAIN)


def _targeted(adapter: Adapter) -> Verdict | None:
    """A verdict where target_modules leaves out a module, which is then not loaded."""
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list):
        return None
    named = [n for n, m in adapter.modules.items() if m.kind != "parameter"]
    missed = [name for name in named if not any(tail in targets for tail in tails(name))]
    return left_out(missed, adapter, "target_modules does not name {}: not loaded", MAKE_PLAIN)


def _listed(adapter: Adapter) -> Verdict | None:
    """A verdict where no target has the last word of a module's name, which alone counts."""
    targets = adapter.config.get("target_modules") or []
    if targets in ("all", "all-linear"):
        return None
    if isinstance(targets, str):
        return Verdict("refused", "target_modules is a pattern, which it does not read", MAKE_PLAIN)
    leaves = {target.rpartition(".")[2] for target in targets}
    if missed := [name for name in adapter.modules if name.rpartition(".")[2] not in leaves]:
        reason = f"target_modules does not name {listed(missed, 2)}"
        return Verdict("refused", reason, MAKE_PLAIN)
    return None


def _stacked(adapter: Adapter) -> Verdict | None:
    """A verdict where a layer is stacked with one that is not there."""
    for name in adapter.modules:
        leaf = name.rpartition(".")[2]
        for other in STACKED.get(leaf, ()):
            if name.removesuffix(leaf) + other not in adapter.modules:
                return Verdict("refused", f"it stacks {name} with {other}, which is missing")
    return None


def _is_plain(adapter: Adapter) -> Verdict | None:
    """A verdict where the adapter is more than plain LoRA of linear layers."""
    if adapter.variants:
        first = adapter.variants[0]
        return Verdict("refused", f"{first.name} is not supported", first.hint)
    if adapter.extras:
        held = listed([extra.key for extra in adapter.extras], 2)
        return Verdict(
            "refused",
            f"it holds {held} beside its LoRA",
            "loramerge convert {0} --to peft --extras drop",
        )
    odd = [name for name, m in adapter.modules.items() if m.kind in ("conv", "parameter")]
    if odd:
        return Verdict("refused", f"{listed(odd, 2)}: only linear layers are supported", "")
    return None


def _fits(adapter: Adapter, max_rank: int, server: str) -> Verdict | None:
    rank = max(adapter.max_rank, _r(adapter))
    if rank <= max_rank:
        return None
    return Verdict(
        "refused",
        f"rank {rank} is above the {max_rank} that {server} was started with",
        f"loramerge squeeze {{0}} --rank {max_rank}",
    )


def _one_scale(adapter: Adapter, root: bool) -> Verdict:
    """Whether alpha / r of the config, or alpha / sqrt(r), is every module's scale."""
    factor = _alpha(adapter) / (math.sqrt(_r(adapter)) if root else _r(adapter))
    formula = "alpha / sqrt(r)" if root else "alpha / r"
    return compared(adapter, dict.fromkeys(adapter.modules, factor), f"{formula} of the config")


def _alpha_per_rank(adapter: Adapter) -> Verdict:
    """Whether the one alpha by the rank of its own tensors is every module's scale."""
    used = {name: _alpha(adapter) / module.rank for name, module in adapter.modules.items()}
    return compared(adapter, used, "alpha / rank")


def _r(adapter: Adapter) -> int:
    return int(adapter.config.get("r", 8))


def _alpha(adapter: Adapter) -> float:
    return float(adapter.config.get("lora_alpha", 8))


def _factor_keys(adapter: Adapter) -> list[str]:
    return [m.keys[part] for m in adapter.modules.values() for part in ("A", "B") if part in m.keys]


def _plain_key(key: str) -> bool:
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    return key.endswith(ends)
