"""--size, --energy, --max-error and --allocate, measured on the files they lead to."""

from pathlib import Path

import numpy as np
import pytest

import loramerge
from loramerge.linalg.ranks import Allocation
from tests.build import Pair, read_deltas, write_peft

GREEDY: tuple[Allocation, ...] = ("relative", "sigma", "energy")
DIMS = {f"layers.{i}.proj": (24 + 8 * (i % 3), 16 + 8 * (i % 4)) for i in range(20)}


@pytest.fixture
def adapter(tmp_path: Path, rng: np.random.Generator) -> Path:
    """Twenty modules of rank 8 with decaying spectra of unequal length, alpha 16."""
    modules: dict[str, Pair] = {}
    for i, (name, (m, n)) in enumerate(DIMS.items()):
        decay = np.exp(-0.1 * (i % 7) * np.arange(8)) * 2.0 ** (i % 5)
        A = rng.standard_normal((8, n)) * decay[:, None]
        modules[name] = A, rng.standard_normal((m, 8))
    return write_peft(tmp_path / "adapter", modules, lora_alpha=16)


@pytest.mark.parametrize("allocation", ["uniform", *GREEDY])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("share", [0.4, 0.6, 0.95])
def test_a_file_is_never_larger_than_size(
    adapter: Path, tmp_path: Path, allocation: Allocation, dtype: str, share: float
) -> None:
    before = (adapter / "adapter_model.safetensors").read_bytes()
    bound = int(len(before) * share) // (1 if dtype == "float32" else 2)
    result, _ = loramerge.squeeze(
        adapter, size=str(bound), allocate=allocation, save_dtype=dtype, svd="exact"
    )
    after = (result.save(tmp_path / "out") / "adapter_model.safetensors").stat().st_size
    assert after <= bound
    # What may be left over: the header entries of modules that go, and one rank of all modules.
    header = int.from_bytes(before[:8], "little")
    assert after >= bound - header - 4 * sum(map(sum, DIMS.values()))


def test_energy_allocation_loses_least_of_the_adapter(adapter: Path, tmp_path: Path) -> None:
    original = read_deltas(adapter)
    errors = {}
    for allocation in ("uniform", *GREEDY):
        result, report = loramerge.squeeze(adapter, rank=4, allocate=allocation)
        smaller = read_deltas(result.save(tmp_path / allocation))
        gap = sum(np.sum((original[n] - smaller.get(n, np.zeros(1))) ** 2) for n in original)
        total = sum(np.sum(x**2) for x in original.values())
        errors[allocation] = np.sqrt(gap / total)
        # float32 files: the printed error is that of the files
        assert report.relative_error == pytest.approx(errors[allocation], rel=1e-4)
    assert min(errors, key=errors.__getitem__) == "energy"
    assert errors["energy"] < errors["uniform"]


def test_max_error_on_files_holds_in_each_module(adapter: Path, tmp_path: Path) -> None:
    result, _ = loramerge.squeeze(adapter, max_error=0.2)
    original, smaller = read_deltas(adapter), read_deltas(result.save(tmp_path / "out"))
    for name, delta in original.items():
        assert np.linalg.norm(smaller[name] - delta) <= 0.2 * np.linalg.norm(delta)


def test_an_error_bound_leaves_room_for_the_rounding_of_the_stored_dtype(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    # Rank 4 is cut at 0.0029, and bfloat16 adds about 0.0023: 0.0037 together, above the bound.
    # Rank 5 is cut at 0.00011.
    spectrum = np.array([1, 0.9, 0.8, 0.7, 0.005, 0.0002])
    U, V = (np.linalg.qr(rng.standard_normal((64, 6)))[0] for _ in range(2))
    adapter = write_peft(tmp_path / "adapter", {"lin": (V.T, U * spectrum)}, lora_alpha=6)
    _, report = loramerge.squeeze(adapter, max_error=0.003, save_dtype="bfloat16")
    assert report.rank == (5, 5)
    assert report.relative_error <= 0.003
