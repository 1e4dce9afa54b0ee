"""What several tests share: a seeded generator, and three small adapters to merge."""

import os
import signal
from pathlib import Path

# Tests share the cores with each other: teams of threads would spin against one another. Set
# before the first library that reads it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from tests.build import Pair, write_peft

# What a shell starts in the background is deaf to interrupts, and so would be what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

# Module name -> (out, in): one square, one wide, one tall.
SHAPES = {"layers.0.q_proj": (24, 24), "layers.0.up_proj": (40, 24), "layers.1.down_proj": (24, 40)}


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator with a fixed seed, new for every test."""
    return np.random.default_rng(20240916)


def factors(rng: np.random.Generator, rank: int) -> dict[str, Pair]:
    """Gaussian A [rank, in] and B [out, rank] for every module of SHAPES."""
    return {
        name: (
            rng.standard_normal((rank, n)).astype(np.float32),
            rng.standard_normal((m, rank)).astype(np.float32),
        )
        for name, (m, n) in SHAPES.items()
    }


@pytest.fixture
def three(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    """Three PEFT directories a, b, c over SHAPES, of ranks 4, 4, 6 and alpha twice the rank."""
    return [
        write_peft(tmp_path / name, factors(rng, rank), lora_alpha=2 * rank)
        for name, rank in (("a", 4), ("b", 4), ("c", 6))
    ]
