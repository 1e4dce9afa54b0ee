"""MLX: mlx-lm, whose loader wraps layers as its config says before it reads a tensor."""

from loramerge.adapter import Adapter
from loramerge.consumers._verdict import Verdict, another_layout
from loramerge.errors import listed

__all__ = ["mlx"]

FILE = "adapters.safetensors"
ONE_SCALE = "one multiplier, one rank"
SAY_SCALE = "add it to lora_parameters in adapter_config.json: what B @ A is multiplied by"
TO_MLX = "loramerge convert {0} --to mlx"


def mlx(adapter: Adapter, max_rank: int) -> Verdict:
    """One multiplier and one rank for all modules, and no word of its config may be missing."""
    if adapter.layout != "mlx":
        return another_layout(adapter, "mlx")
    if adapter.variants:
        first = adapter.variants[0]
        return Verdict("refused", f"{first.name} needs its base", first.hint)
    if "scale" not in adapter.config.get("lora_parameters", {}):
        return Verdict("refused", "its config does not say scale", SAY_SCALE)
    if (name := adapter.source.path.name) != FILE:
        return Verdict("refused", f"it looks for {FILE}, not {name}", TO_MLX)
    reason = _misfit(adapter)
    return Verdict("refused", reason, TO_MLX) if reason else Verdict("right", ONE_SCALE)


def _misfit(adapter: Adapter) -> str:
    """Why the tensors do not go into the layers that the config has wrapped; empty if they do."""
    ranks = {module.rank for module in adapter.modules.values()}
    if len(ranks) > 1:
        return "it wraps all layers with one rank"
    stated = adapter.config["lora_parameters"]
    missing = [word for word in ("rank", "dropout") if word not in stated]
    missing += [word for word in ("num_layers",) if word not in adapter.config]
    if missing:
        return f"its config does not say {listed(missing)}"
    if stated["rank"] not in ranks:
        return f"its config says rank {stated['rank']}, its tensors are of rank {max(ranks)}"
    if (keys := stated.get("keys")) is None:
        return ""
    ends = tuple(f".{key}" for key in keys)
    unnamed = [name for name in adapter.modules if not f".{name}".endswith(ends)]
    return f"keys of its config leave out {listed(unnamed, 2)}" if unnamed else ""
