"""What tests of image pipelines share: random factors of layers, and models with delta weights."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence

import diffusers
import numpy as np
import peft
import torch
from torch import nn

VERSIONS = f"diffusers {diffusers.__version__}, peft {peft.__version__}"
# The base alone is off by 1e-6: float32 rounds by 6e-8, a few dozen times in a row.
FLOAT32 = 5e-6
# Module -> (down [r, in, ...], up [out, r, ...], alpha), as kohya stores it.
Modules = dict[str, tuple[np.ndarray, np.ndarray, "float | np.ndarray | None"]]
Deltas = dict[str, np.ndarray]


def drawn(
    layers: Mapping[str, Sequence[int]],
    rank: Callable[[int], int],
    alpha: Callable[[int], float | None],
    seed: int,
) -> Modules:
    """Random factors of layers [out, in, ...]; rank and alpha by the number of the layer."""
    rng = np.random.default_rng(seed)
    found: Modules = {}
    for number, (name, (out, *into)) in enumerate(layers.items()):
        r = rank(number)
        down = rng.standard_normal((r, *into)) / np.sqrt(np.prod(into))
        up = 0.3 * rng.standard_normal((out, r, *(1 for _ in into[1:])))
        found[name] = down.astype("f4"), up.astype("f4"), alpha(number)
    return found


def dense(modules: Modules) -> Deltas:
    """alpha / r * up @ down of every module in float64, [out, in * kernel]; alpha 0 means r."""
    found = {}
    for name, (down, up, alpha) in modules.items():
        r = len(down)
        flat = up.reshape(-1, r).astype("f8") @ down.reshape(r, -1).astype("f8")
        found[name] = float(alpha) / r * flat if alpha else flat
    return found


def shapes(
    model: nn.Module, kinds: tuple[type[nn.Module], ...], ends: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """Layers of some kinds, by the ends of their names."""
    return {
        name: tuple(layer.weight.shape)
        for name, layer in model.named_modules()
        if isinstance(layer, kinds) and name.endswith(tuple(ends))
    }


def added(model: nn.Module, deltas: Deltas) -> nn.Module:
    """The model in float64 with delta weights added to its own."""
    wide = copy.deepcopy(model).double()
    for name, delta in deltas.items():
        weight = wide.get_submodule(name).weight.data
        weight += torch.from_numpy(delta).reshape(weight.shape)
    return wide


def split(deltas: Deltas, model: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Deltas:
    """Delta weights by diffusers' names: the rows of a fused layer, one part after the other."""
    found = {}
    for name, delta in deltas.items():
        parts = names[name]
        heights = [model.get_submodule(part).weight.shape[0] for part in parts]
        found |= dict(zip(parts, np.split(delta, np.cumsum(heights)[:-1]), strict=True))
    return found


def layers(model: nn.Module, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[int, ...]]:
    """(out, in) of every layer of kohya's."""
    return {
        name: (
            sum(model.get_submodule(part).weight.shape[0] for part in parts),
            model.get_submodule(parts[0]).weight.shape[1],
        )
        for name, parts in names.items()
    }
