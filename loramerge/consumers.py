"""What the programs that load adapters make of one: right, wrong scale, or refused, and why.

Each rule is read off a program's own loader, or seen running; none of them is run here. A wrong
scale is the dangerous one: the adapter loads without a word, and does something else.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, TypeAlias

from msgspec import Struct

from loramerge.adapter import Adapter
from loramerge.errors import listed
from loramerge.io._peft_config import tails
from loramerge.io._peft_keys import PREFIX

__all__ = ["CONSUMERS", "DEFAULT_MAX_RANK", "Verdict"]

State: TypeAlias = Literal["right", "wrong scale", "refused"]
# The largest rank a server of vLLM takes unless it is started with another --max-lora-rank.
DEFAULT_MAX_RANK = 16
# Scales that differ by less are the same number in another float.
SAME = 1e-6
PIPELINES = ("comfy", "diffusers", "kohya", "xlabs")
MAKE_PLAIN = "loramerge cat {0} -o portable"


class Verdict(Struct, frozen=True):
    """What a program makes of an adapter, the reason, and what to type where it is not right."""

    state: State
    reason: str
    remedy: str = ""


Rule: TypeAlias = Callable[[Adapter, int], Verdict]


def _peft(adapter: Adapter, max_rank: int) -> Verdict:
    """PEFT and transformers: rank_pattern, alpha_pattern and rsLoRA are honoured."""
    return _is_peft(adapter) or Verdict("right", "alpha / rank per module, as its config says")


def _vllm(adapter: Adapter, max_rank: int) -> Verdict:
    """One alpha / r from the config; patterns are ignored."""
    found = _is_peft(adapter) or _is_plain(adapter) or _fits(adapter, max_rank, "vLLM")
    labelled = [key for key in _factor_keys(adapter) if not _plain_key(key)]
    if found is None and labelled:
        return Verdict("refused", f"{labelled[0]} is no key it parses", MAKE_PLAIN)
    rsLoRA = bool(adapter.config.get("use_rslora"))
    return found or _one_scale(adapter, root=rsLoRA)


def _sglang(adapter: Adapter, max_rank: int) -> Verdict:
    """Alpha / r from the config, always: rsLoRA and patterns are not read."""
    found = _is_peft(adapter) or _is_plain(adapter) or _fits(adapter, max_rank, "SGLang")
    return found or _one_scale(adapter, root=False)


def _llama_cpp(adapter: Adapter, max_rank: int) -> Verdict:
    """The converter keeps lora_alpha and divides by each tensor's own rank."""
    found = _is_peft(adapter) or _is_plain(adapter)
    if found is not None:
        return found
    alpha = adapter.config.get("lora_alpha", 8)
    return _compared(
        adapter, {n: alpha / m.rank for n, m in adapter.modules.items()}, "alpha / rank"
    )


def _diffusers(adapter: Adapter, max_rank: int) -> Verdict:
    """One alpha for all modules of a kohya file; DoRA is left out with a warning."""
    if adapter.layout not in PIPELINES:
        return Verdict(
            "refused",
            f"the {adapter.layout} layout names no part of a pipeline",
            "loramerge convert {0} --to diffusers",
        )
    if adapter.variants:
        return Verdict(
            "refused", f"{adapter.variants[0].name} is left out", adapter.variants[0].hint
        )
    alphas = {round(m.rank * m.scaling, 6) for m in adapter.modules.values()}
    if adapter.layout == "kohya" and len(alphas) > 1:
        few = listed([f"{alpha:g}" for alpha in sorted(alphas)], 4)
        return Verdict("wrong scale", f"it takes one alpha for all; here are {few}", MAKE_PLAIN)
    return Verdict("right", "one alpha for all modules")


def _mlx(adapter: Adapter, max_rank: int) -> Verdict:
    """One multiplier and one rank for all modules."""
    if adapter.layout != "mlx":
        return Verdict("refused", f"the {adapter.layout} layout", "loramerge convert {0} --to mlx")
    if adapter.variants:
        return Verdict(
            "refused", f"{adapter.variants[0].name} needs its base", adapter.variants[0].hint
        )
    if len({module.rank for module in adapter.modules.values()}) > 1:
        return Verdict("refused", "it wraps all layers with one rank", MAKE_PLAIN)
    return Verdict("right", "one multiplier, one rank")


def _ollama(adapter: Adapter, max_rank: int) -> Verdict:
    """lora_alpha must be a whole number; llama and gemma2 alone are known."""
    found = _is_peft(adapter) or _is_plain(adapter)
    if found is not None:
        return found
    alpha = adapter.config.get("lora_alpha", 8)
    if alpha != int(alpha):
        return Verdict("refused", f"lora_alpha is {alpha:g}, no whole number", MAKE_PLAIN)
    found = _one_scale(adapter, root=False)
    if found.state != "right":
        return found
    return Verdict("right", f"{found.reason}; for bases of llama and gemma2, which it knows")


# A program by the name it is asked for.
CONSUMERS: Mapping[str, Rule] = {
    "peft": _peft,
    "transformers": _peft,
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
    "ollama": _ollama,
    "mlx": _mlx,
    "diffusers": _diffusers,
}


def _is_peft(adapter: Adapter) -> Verdict | None:
    """A verdict where PEFT itself would not load the adapter as it is."""
    if adapter.layout != "peft":
        return Verdict("refused", f"the {adapter.layout} layout", "loramerge convert {0} --to peft")
    directory = adapter.source.path.parent
    if (
        adapter.source.path.name != "adapter_model.safetensors"
        or not (directory / "adapter_config.json").is_file()
    ):
        return Verdict(
            "refused", "no adapter_config.json beside adapter_model.safetensors", MAKE_PLAIN
        )
    bare = [key for key in _factor_keys(adapter) if not key.startswith(PREFIX)]
    if bare:
        return Verdict(
            "refused", f"{len(bare)} keys lack {PREFIX}: none of them would be loaded", MAKE_PLAIN
        )
    targets = adapter.config.get("target_modules")
    if isinstance(targets, list):
        left = [n for n, m in adapter.modules.items() if m.kind != "parameter"]
        left = [name for name in left if not any(tail in targets for tail in tails(name))]
        if left:
            return Verdict(
                "refused", f"target_modules does not name {listed(left, 2)}: not loaded", MAKE_PLAIN
            )
    return None


def _is_plain(adapter: Adapter) -> Verdict | None:
    """A verdict where the adapter is more than plain LoRA of linear layers."""
    if adapter.variants:
        first = adapter.variants[0]
        return Verdict("refused", f"{first.name} is not supported", first.hint)
    if adapter.extras:
        held = listed([extra.key for extra in adapter.extras], 2)
        return Verdict(
            "refused", f"it holds {held} beside its LoRA", "loramerge convert {0} --extras drop"
        )
    odd = [name for name, m in adapter.modules.items() if m.kind in ("conv", "parameter")]
    if odd:
        return Verdict("refused", f"{listed(odd, 2)}: only linear layers are supported", "")
    return None


def _fits(adapter: Adapter, max_rank: int, server: str) -> Verdict | None:
    rank = max(adapter.max_rank, int(adapter.config.get("r", 0)))
    if rank <= max_rank:
        return None
    return Verdict(
        "refused",
        f"rank {rank} is above the {max_rank} that {server} was started with",
        f"loramerge squeeze {{0}} --rank {max_rank}",
    )


def _one_scale(adapter: Adapter, root: bool) -> Verdict:
    """Whether alpha / r of the config, or alpha / sqrt(r), is every module's scale."""
    r, alpha = adapter.config.get("r", 8), adapter.config.get("lora_alpha", 8)
    factor = alpha / (math.sqrt(r) if root else r)
    formula = "alpha / sqrt(r)" if root else "alpha / r"
    return _compared(adapter, dict.fromkeys(adapter.modules, factor), f"{formula} of the config")


def _compared(adapter: Adapter, used: Mapping[str, float], formula: str) -> Verdict:
    wrong = [
        name
        for name, module in adapter.modules.items()
        if not math.isclose(module.scaling, used[name], rel_tol=SAME)
    ]
    if not wrong:
        return Verdict("right", f"{formula} is the scale of all {len(used)} modules")
    worst = max(wrong, key=lambda name: abs(math.log(_ratio(used[name], adapter, name))))
    ratio = _ratio(used[worst], adapter, worst)
    return Verdict(
        "wrong scale",
        f"{formula} makes {len(wrong)} of {len(used)} modules wrong, {worst} by {ratio:.3g} times",
        MAKE_PLAIN,
    )


def _ratio(used: float, adapter: Adapter, name: str) -> float:
    own = adapter.modules[name].scaling
    return abs(used / own) if own and used else math.inf


def _factor_keys(adapter: Adapter) -> list[str]:
    return [m.keys[part] for m in adapter.modules.values() for part in ("A", "B") if part in m.keys]


def _plain_key(key: str) -> bool:
    ends = (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B")
    return key.endswith(ends)
