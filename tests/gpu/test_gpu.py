"""What a CUDA device computes against what NumPy computes, on inputs made here."""

import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

import loramerge
from loramerge import solve
from loramerge.adapter import LowRank
from loramerge.compute import GPU_ENTRIES, resolve
from loramerge.linalg import _numpy, _torch
from loramerge.linalg.factors import compare, concat, norm
from loramerge.linalg.kmeans import kmeans
from loramerge.linalg.spectrum import decompose
from tests.build import Pair, read_deltas, write_peft
from tests.entries import apart
from tests.updates import CASES, Case, dense, weighted_sum
from tests.variants import Variant, delta, each_variant, given, three_related

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
EVERY = 10**6


def gram(points: np.ndarray) -> np.ndarray:
    return points @ points.swapaxes(-1, -2)


def cuda(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(x)).cuda()


def on_cuda(update: LowRank) -> LowRank:
    return LowRank(cuda(update.A), cuda(update.B))


def back(update: LowRank) -> LowRank:
    return LowRank(update.A.cpu().numpy(), update.B.cpu().numpy())


# Kernels.


def test_cholesky_factors_what_is_positive_definite_and_says_what_is_not(
    rng: np.random.Generator,
) -> None:
    X = rng.standard_normal((3, 20, 6))
    G = X.swapaxes(-1, -2) @ X
    G[1] -= 30 * np.eye(6)
    L, ok = (x.cpu().numpy() for x in _torch.cholesky(cuda(G)))
    assert ok.tolist() == [True, False, True]
    np.testing.assert_allclose(L[[0, 2]] @ L[[0, 2]].swapaxes(-1, -2), G[[0, 2]], rtol=1e-12)
    assert not L[1].any()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_gaussian_matrix_has_the_bits_of_the_cpu(dtype: type) -> None:
    found = _torch.gaussian(cuda(np.zeros(1, dtype)), 5, 4, 3)
    assert found.device.type == "cuda"
    assert np.array_equal(found.cpu().numpy(), _numpy.gaussian(np.zeros(1, dtype), 5, 4, 3))


@pytest.mark.parametrize("k", [1, 6, 16])
def test_kmeans_has_the_inertia_of_the_cpu_to_1e_3(rng: np.random.Generator, k: int) -> None:
    points = rng.standard_normal((20, 48, 24))
    points[3, 10:] = 0
    points[4] = points[4, :1]
    here = kmeans(gram(points), k, 0, 10)[1]
    there = kmeans(cuda(gram(points)), k, 0, 10)[1].cpu().numpy()
    np.testing.assert_allclose(there, here, rtol=1e-3, atol=1e-9)


def test_kmeans_is_within_1_percent_of_scikit_learn(rng: np.random.Generator) -> None:
    # Sixty problems: one alone scatters by 1 %.
    points = rng.standard_normal((60, 48, 24)) * np.exp(rng.standard_normal((60, 48, 1)))
    theirs = [KMeans(12, n_init=10, random_state=0).fit(x).inertia_ for x in points]
    ours = kmeans(cuda(gram(points)), 12, 0, 10)[1].cpu().numpy()
    assert np.mean(ours / theirs) == pytest.approx(1, abs=0.01)


# The thin core.


@each_case
def test_sums_and_their_components_are_as_accurate_as_on_the_cpu(case: Case) -> None:
    total = weighted_sum(*case)[0]
    U, S, Vh = np.linalg.svd(total, full_matrices=False)
    kept = int(np.sum(S / S.max(initial=1e-300) > 1e-9))
    U, S, Vh = U[:, :kept], S[:kept], Vh[:kept]
    updates, weights = case
    found = back(decompose(concat([on_cuda(u) for u in updates], weights)).truncated(EVERY))
    assert np.linalg.norm(dense(found)[0] - total) <= 1e-5 * np.linalg.norm(total)
    edges = [0, *(np.flatnonzero(S[:-1] > 10 * S[1:]) + 1), kept]
    for start, stop in pairwise(edges):
        own = (U[:, start:stop] * S[start:stop]) @ Vh[start:stop]
        part = dense(LowRank(found.A[0, start:stop], found.B[0, :, start:stop]))
        assert np.linalg.norm(part - own) <= 1e-3 * np.linalg.norm(own)


@each_case
def test_norms_and_errors_are_as_accurate_as_on_the_cpu(case: Case) -> None:
    target = concat(*case)
    result = decompose(target).truncated(3)
    result = LowRank(result.A.astype(np.float32), result.B.astype(np.float32))
    length = np.linalg.norm(dense(target))
    terms = sum(abs(w) * float(np.linalg.norm(dense(u))) for u, w in zip(*case, strict=True))
    tolerance = 1e-5 if terms <= 50 * length else 1e-2  # as on the CPU, where terms cancel
    assert float(norm(on_cuda(target))[0]) == pytest.approx(length, rel=tolerance)
    error = float(compare(on_cuda(target), on_cuda(result)).error[0]) ** 0.5
    true = np.linalg.norm(dense(target) - dense(result))
    assert error == pytest.approx(true, rel=1e-2, abs=1e-12 * terms)


# The methods.


@each_variant
def test_every_method_gives_the_delta_weights_of_numpy(
    variant: Variant, rng: np.random.Generator
) -> None:
    own = given(variant, three_related(rng))
    # float32 factors are multiplied in another order
    assert apart(delta(variant, own, "cuda"), delta(variant, own)) <= 1e-6


# The engine.


def adapters(
    path: Path, rng: np.random.Generator, ranks: Sequence[int], noise: float
) -> list[Path]:
    """Adapters over 70 modules of two shapes, alike up to `noise`: more than one batch."""
    shapes = {f"layers.{i}.q": (48, 48) if i % 3 else (64, 40) for i in range(70)}
    most = max(ranks)
    shared: dict[str, Pair] = {}
    for name, (m, n) in shapes.items():
        U = np.linalg.qr(rng.standard_normal((m, most)))[0]
        V = np.linalg.qr(rng.standard_normal((n, most)))[0]
        root = np.sqrt(np.geomspace(8, 1, most))
        shared[name] = root[:, None] * V.T, U * root
    return [
        write_peft(
            path / f"a{place}",
            {
                name: tuple(
                    part + noise * rng.standard_normal(part.shape) for part in (A[:r], B[:, :r])
                )
                for name, (A, B) in shared.items()
            },
            lora_alpha=2 * r,
        )
        for place, r in enumerate(ranks)
    ]


def largest_gap(method: str, inputs: list[Path], out: Path, **values: object) -> float:
    """The largest relative distance of any module between `--device cuda` and `--device cpu`."""
    results = {}
    for device in ("cpu", "cuda"):
        result, report = loramerge.run(method, inputs, device=device, **values)
        assert report.device == device
        results[device] = read_deltas(result.save(out / device))
    assert results["cuda"].keys() == results["cpu"].keys()
    assert len(results["cpu"]) == 70
    return max(
        float(np.linalg.norm(results["cuda"][name] - delta) / np.linalg.norm(delta))
        for name, delta in results["cpu"].items()
    )


@pytest.mark.parametrize(
    "values",
    [
        {"rank": "full"},
        {"rank": 5},
        {"rank": 5, "weights": [1.0, -0.5, 2.0]},
        {"rank": 5, "scale": "auto"},
        {"energy": 0.9},
        {"rank": 5, "compute_dtype": "float64"},
    ],
    ids=str,
)
def test_arithmetic_gives_the_delta_weights_of_the_cpu(
    tmp_path: Path, rng: np.random.Generator, values: dict[str, object]
) -> None:
    inputs = adapters(tmp_path, rng, (4, 6, 8), noise=0.3)
    # float32 factors are multiplied in another order
    assert largest_gap("arithmetic", inputs, tmp_path, **values) <= 1e-6


@pytest.mark.parametrize(
    "values",
    [{"rank": 3}, {"energy": 0.8}, {"rank": 3, "allocate": "relative"}, {"svd": "randomized"}],
    ids=str,
)
def test_squeeze_gives_the_delta_weights_of_the_cpu(
    tmp_path: Path, rng: np.random.Generator, values: dict[str, object]
) -> None:
    inputs = adapters(tmp_path, rng, (8,), noise=0.3)
    given = {"rank": 3, **values} if "energy" not in values else values
    assert largest_gap("squeeze", inputs, tmp_path, **given) <= 1e-6


@pytest.mark.parametrize("gauge", ["svd", "balanced", "raw"])
@pytest.mark.parametrize("reweight", ["linf", "l2", "none"])
@pytest.mark.parametrize("scale", ["auto", "paper"])
def test_cluster_gives_the_delta_weights_of_the_cpu_where_clusters_are_clear(
    tmp_path: Path, rng: np.random.Generator, gauge: str, reweight: str, scale: str
) -> None:
    inputs = adapters(tmp_path, rng, (8, 8, 8), noise=0.003)
    values = {"k": 8, "gauge": gauge, "reweight": reweight, "scale": scale}
    assert largest_gap("cluster", inputs, tmp_path, **values) <= 1e-6


def test_a_batch_too_large_for_the_device_is_halved_and_gives_the_same(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = adapters(tmp_path, rng, (4, 6), noise=0.3)
    sizes = []
    compute = solve._solve

    def limited(plan, device, known, batch):
        if device.device == "cuda":
            sizes.append(len(batch))
        if device.device == "cuda" and len(batch) > 10:
            torch.empty(2**50, dtype=torch.uint8, device="cuda")  # a true out-of-memory error
        return compute(plan, device, known, batch)

    monkeypatch.setattr(solve, "_solve", limited)
    assert largest_gap("arithmetic", inputs, tmp_path, rank=4) <= 1e-6
    assert max(sizes) > 10 >= min(sizes)


def test_auto_takes_the_device_for_large_jobs_and_the_cpu_for_small_ones() -> None:
    assert resolve("auto", "float32", GPU_ENTRIES).device == "cuda"
    assert resolve("auto", "float32", GPU_ENTRIES - 1).device == "cpu"


def test_a_device_can_be_named_by_its_number(tmp_path: Path, rng: np.random.Generator) -> None:
    inputs = adapters(tmp_path, rng, (4,), noise=0.3)
    _, report = loramerge.run("squeeze", inputs, rank=2, device="cuda:0")
    assert report.device == "cuda:0"


def test_a_fresh_process_may_begin_with_several_batches_at_once(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    # Torch loads its solvers at first use, and fails where two threads are the first.
    pairs = {
        f"layers.{i}.proj": (rng.standard_normal((4, 40 + i)), rng.standard_normal((30 + i, 4)))
        for i in range(40)
    }
    inputs = [str(write_peft(tmp_path / name, pairs)) for name in "ab"]
    words = [*inputs, "-r", "4", "--device", "cuda", "-o", str(tmp_path / "out")]
    subprocess.run([sys.executable, "-m", "loramerge", "arithmetic", *words], check=True)
