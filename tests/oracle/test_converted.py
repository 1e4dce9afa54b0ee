"""PEFT as a judge of what was converted: its delta weights, its forward pass, its hot swap."""

from pathlib import Path

import pytest
import torch
from peft.utils.hotswap import hotswap_adapter

from tests.oracle.tiny import SHAPES, Layers, adapter, deltas, dense, gaussian, loaded, run, worst

# float32 storage costs 1e-7 and PEFT multiplies in float32, which costs as much again.
FLOAT32 = 1e-6
LINEAR = {name: shape for name, shape in SHAPES.items() if not shape[2] and name != "tokens"}


@pytest.mark.parametrize("alpha", [8.0, 3.5])
def test_every_kind_of_layer_converted_to_peft_is_the_dense_update(
    tmp_path: Path, alpha: float
) -> None:
    factors = gaussian(SHAPES, 4, 1, {"lin": 5, "conv": 2, "tokens": 1})
    run("convert", adapter(tmp_path / "a", factors, alpha), "--to", "peft", "-o", tmp_path / "b")
    assert worst(deltas(loaded(tmp_path / "b", Layers())), dense(factors, alpha)) < FLOAT32


@pytest.mark.parametrize("ranks", [{}, {"lin": 5, "block.proj": 2}])
def test_by_way_of_mlx_it_is_the_dense_update(tmp_path: Path, ranks: dict[str, int]) -> None:
    factors = gaussian(LINEAR, 4, 2, ranks)
    run("convert", adapter(tmp_path / "a", factors, 7.0), "--to", "mlx", "-o", tmp_path / "m")
    run("convert", tmp_path / "m", "--to", "peft", "-o", tmp_path / "b")
    assert worst(deltas(loaded(tmp_path / "b", Layers())), dense(factors, 7.0)) < FLOAT32


def test_a_converted_adapter_is_hot_swapped_and_the_forward_pass_follows(tmp_path: Path) -> None:
    first, second = gaussian(LINEAR, 4, 3), gaussian(LINEAR, 4, 4)
    for name, factors in (("a", first), ("b", second)):
        source = adapter(tmp_path / name, factors, 6.0)
        run("convert", source, "--to", "peft", "-o", tmp_path / f"{name}-peft")
    torch.manual_seed(0)
    model = loaded(tmp_path / "a-peft", Layers())
    hotswap_adapter(model, str(tmp_path / "b-peft"), adapter_name="default")
    layer = model.base_model.model.block.lin
    x = torch.randn(5, 14)
    with torch.no_grad():
        added = (layer(x) - layer.base_layer(x)).double()
    wanted = x.double() @ torch.from_numpy(dense(second, 6.0)["block.lin"]).T
    assert float((added - wanted).norm() / wanted.norm()) < 10 * FLOAT32  # of a difference
