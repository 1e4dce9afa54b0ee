"""A plain adapter of two modules, and whatever its config is to say."""

from pathlib import Path

import numpy as np

from tests.build import Pair, write_peft

RNG = np.random.default_rng(0)


def pair(rank: int = 2) -> Pair:
    """Random A [rank, 6] and B [4, rank]."""
    return (
        RNG.standard_normal((rank, 6)).astype(np.float32),
        RNG.standard_normal((4, rank)).astype(np.float32),
    )


def plain(path: Path, **config: object) -> Path:
    """A PEFT directory with q_proj and v_proj of a layer."""
    modules = {"layers.0.q_proj": pair(), "layers.0.v_proj": pair()}
    return write_peft(
        path, modules, **{"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **config}
    )
