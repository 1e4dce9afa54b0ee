"""PEFT's own exact merges, `cat` and `svd` of version 0.21 and later, against `arithmetic`."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from peft import PeftModel
from torch import nn

from tests.oracle.tiny import (
    SHAPES,
    TRANSPOSED,
    Deltas,
    Layers,
    Transposed,
    adapter,
    deltas,
    gaussian,
    loaded,
    run,
    worst,
)

# PEFT decomposes dense float32 matrices, which costs it some 1e-6; ours is held to 1e-6 elsewhere.
PEFT_FLOAT32 = 1e-5
WEIGHTS = {"a": 0.5, "b": 2.0, "c": -1.0}
SIGNED = [flag for weight in WEIGHTS.values() for flag in ("-w", str(weight))]
# Layer kind -> the modules of it, the model they stand in.
KINDS: dict[str, tuple[tuple[str, ...], Callable[[], nn.Module]]] = {
    "Linear": (("lin", "block.lin", "block.proj", "tail.lin"), Layers),
    "Conv2d 1x1": (("point",), Layers),
    "Conv2d 3x3": (("conv",), Layers),
    "Embedding": (("tokens",), Layers),
    "Conv1D": (tuple(TRANSPOSED), Transposed),
}


class Inputs(NamedTuple):
    """Adapters on disk, the same ones in PEFT, and the model they are for."""

    paths: list[Path]
    peft: PeftModel
    model: Callable[[], nn.Module]

    def ours(self, out: Path) -> Deltas:
        """What PEFT finds in an output of ours."""
        return deltas(loaded(out, self.model()))


@pytest.fixture(params=KINDS)
def inputs(request: pytest.FixtureRequest, tmp_path: Path) -> Inputs:
    """Three adapters of ranks 4, 2, 6 with alpha != r."""
    names, model = KINDS[request.param]
    shapes = {name: (SHAPES | TRANSPOSED)[name] for name in names}
    conv1d = request.param == "Conv1D"
    paths = [
        adapter(tmp_path / name, gaussian(shapes, rank, seed), alpha, r=rank, fan_in_fan_out=conv1d)
        for seed, (name, rank, alpha) in enumerate((("a", 4, 8), ("b", 2, 3), ("c", 6, 6)))
    ]
    peft = PeftModel.from_pretrained(model(), str(paths[0]), adapter_name="a")
    for path in paths[1:]:
        peft.load_adapter(str(path), path.name)
    return Inputs(paths, peft, model)


def merged_by_peft(model: PeftModel, how: str, rank: int | None = None) -> Deltas:
    model.add_weighted_adapter([*WEIGHTS], [*WEIGHTS.values()], "sum", how, svd_rank=rank)
    return deltas(model, "sum")


def test_arithmetic_of_full_rank_is_pefts_cat(inputs: Inputs, tmp_path: Path) -> None:
    run("arithmetic", *inputs.paths, *SIGNED, "--rank", "full", "-o", tmp_path / "out")
    theirs = merged_by_peft(inputs.peft, "cat")
    assert worst(inputs.ours(tmp_path / "out"), theirs) < PEFT_FLOAT32


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_arithmetic_of_rank_n_is_pefts_svd(inputs: Inputs, tmp_path: Path, rank: int) -> None:
    run("arithmetic", *inputs.paths, *SIGNED, "--rank", str(rank), "-o", tmp_path / "out")
    theirs = merged_by_peft(inputs.peft, "svd", rank)
    assert worst(inputs.ours(tmp_path / "out"), theirs) < PEFT_FLOAT32


def test_arithmetic_without_a_rank_is_pefts_svd_without_one(inputs: Inputs, tmp_path: Path) -> None:
    run("arithmetic", *inputs.paths, *SIGNED, "-o", tmp_path / "out")
    theirs = merged_by_peft(inputs.peft, "svd")
    assert worst(inputs.ours(tmp_path / "out"), theirs) < PEFT_FLOAT32


def test_squeeze_is_pefts_svd_of_one_adapter(inputs: Inputs, tmp_path: Path) -> None:
    run("squeeze", inputs.paths[2], "--rank", "3", "-o", tmp_path / "out")
    # PEFT takes one adapter alone for a case of `linear` and ignores the rank: hence the zero.
    inputs.peft.add_weighted_adapter(["c", "a"], [1.0, 0.0], "small", "svd", svd_rank=3)
    assert worst(inputs.ours(tmp_path / "out"), deltas(inputs.peft, "small")) < PEFT_FLOAT32
