"""What every registered method keeps to. The suite grows by itself with every file that is one."""

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

import loramerge
from loramerge.adapter import LowRank, Updates
from loramerge.linalg.spectrum import Spectrum
from loramerge.options import Options, describe
from loramerge.registry import Method, methods
from tests.backends import BACKENDS, Backend, lend_kernels_to_strict
from tests.updates import dense, gaussian

M, N, BATCH, RANK = 40, 30, 3, 4
SPECTRUM = np.array([8.0, 5.0, 3.0, 2.0, 1.2, 0.7])
# What a clustering must find in `related` updates: a direction each, and as many again for the
# adapter of negative weight, whose terms (a, -b) are at right angles to (a, b).
GROUPS = len(SPECTRUM) + RANK

# A law holds for every method and choice of options but these, for the reason given.
NOT_GAUGE_INVARIANT = {
    ("cluster", "gauge=balanced"): "rank-1 terms as trained, by definition",
    ("cluster", "gauge=raw"): "rank-1 terms as stored, by definition",
}
ORDER_MATTERS = {"ema": "the last checkpoint is the latest"}


@dataclass(frozen=True)
class Variant:
    """A method with one of its options set to one of its choices."""

    method: Method
    options: Options
    label: str

    def __str__(self) -> str:
        return f"{self.method.name} {self.label}".strip()


def variants() -> Iterator[Variant]:
    """Every method with its defaults, and with each choice of each option."""
    for method in methods().values():
        yield Variant(method, filled(method, method.options()), "")
        for name, choice in choices(method):
            options = completed(method, {name: choice})
            yield Variant(method, filled(method, options), f"{name}={choice}")


def choices(method: Method) -> Iterator[tuple[str, str]]:
    """Every option and choice that is not the default."""
    for option in describe(method.options):
        for choice in (*option.choices, *option.words):
            if choice != option.default:
                yield option.name, choice


def completed(method: Method, values: dict[str, object]) -> Options:
    """Options with these values, and with one more choice where they do not stand alone."""
    for more in ({}, *({name: choice} for name, choice in choices(method))):
        with suppress(ValueError):
            return method.options(**{**more, **values})
    raise AssertionError(f"{method.name} cannot be set to {values} with one more choice")


def filled(method: Method, options: Options) -> Options:
    """The option that fixes the rank is never left open by the engine."""
    name = method.rank_option
    if name is None or getattr(options, name) is not None:
        return options
    return msgspec.structs.replace(options, **{name: GROUPS})


VARIANTS = sorted(variants(), key=str)
each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=str)
each_merge = pytest.mark.parametrize(
    "variant", [v for v in VARIANTS if v.method.takes == "many"], ids=str
)
each_method = pytest.mark.parametrize("name", methods())


def related(
    rng: np.random.Generator, ranks: Sequence[int], scalings: Sequence[float]
) -> tuple[LowRank, ...]:
    """Updates along the same directions with the same well separated spectrum, but for 1 %.

    Clusterings, signs and subspaces are then unambiguous, so that only a broken law breaks a law.
    As stored, both factors are of one length; B is then multiplied by the scaling.
    """
    U = np.linalg.qr(rng.standard_normal((BATCH, M, len(SPECTRUM))))[0]
    V = np.linalg.qr(rng.standard_normal((BATCH, N, len(SPECTRUM))))[0]
    found = []
    for rank, scaling in zip(ranks, scalings, strict=True):
        root = np.sqrt(SPECTRUM[:rank] * (1 + 0.01 * rng.uniform(-1, 1, rank)) / scaling)
        noise = gaussian(rng, M, N, rank, 1e-6, BATCH)
        A = root[:, None] * V[..., :rank].swapaxes(-1, -2) + noise.A
        B = scaling * (U[..., :rank] * root + noise.B)
        found.append(LowRank(A.astype(np.float32), B.astype(np.float32)))
    return tuple(found)


@pytest.fixture
def updates(rng: np.random.Generator) -> Updates:
    return three_related(rng)


def three_related(rng: np.random.Generator) -> Updates:
    """Three batches of related updates, unequal in rank, weight (one negative) and scaling."""
    scalings = (2.0, 1.0, 0.5)
    return Updates(
        factors=related(rng, (RANK, len(SPECTRUM), RANK), scalings),
        weights=(1.0, 0.8, -0.6),
        scalings=scalings,
        rank=RANK,
        seed=3,
        keys=tuple(tuple(range(10 * t, 10 * t + BATCH)) for t in range(3)),
    )


def taken(variant: Variant) -> int:
    """How many of the three updates a merge takes."""
    return variant.method.inputs or 3


def given(variant: Variant, updates: Updates, places: Sequence[int] = ()) -> Updates:
    """The updates at these places, or as many as it takes; a compressor gets one, as it is."""
    places = places or range(taken(variant))
    if variant.method.takes == "one":
        places, updates = (1,), replace(updates, weights=(1.0, 1.0, 1.0))
    rows = ("factors", "weights", "scalings", "keys")
    return replace(
        updates, **{row: tuple(getattr(updates, row)[place] for place in places) for row in rows}
    )


def on(backend: Backend, updates: Updates) -> Updates:
    return replace(updates, factors=tuple(backend.update(u) for u in updates.factors))


def low_rank(result: LowRank | Spectrum) -> LowRank:
    """A result as factors, with every rank it has."""
    return result.truncated(result.s.shape[-1]) if isinstance(result, Spectrum) else result


def delta(variant: Variant, updates: Updates, backend: str = "numpy") -> np.ndarray:
    """The delta weights that a method makes of updates. [BATCH, M, N]"""
    used = BACKENDS[backend]
    return dense(used.back(low_rank(variant.method.rule(on(used, updates), variant.options))))


def apart(x: np.ndarray, y: np.ndarray) -> float:
    """The largest relative distance of two batches of delta weights."""
    gaps = np.linalg.norm(x - y, axis=(-2, -1)) / np.linalg.norm(y, axis=(-2, -1))
    return float(gaps.max())


@each_variant
def test_a_method_never_modifies_an_input(variant: Variant, updates: Updates) -> None:
    own = given(variant, updates)
    for update in own.factors:
        update.A.flags.writeable = update.B.flags.writeable = False
    before = [(u.A.tobytes(), u.B.tobytes()) for u in own.factors]
    variant.method.rule(own, variant.options)
    assert [(u.A.tobytes(), u.B.tobytes()) for u in own.factors] == before


@each_variant
def test_a_method_gives_the_same_bytes_again(variant: Variant, updates: Updates) -> None:
    own = given(variant, updates)
    first, second = (low_rank(variant.method.rule(own, variant.options)) for _ in range(2))
    assert first.A.tobytes() == second.A.tobytes()
    assert first.B.tobytes() == second.B.tobytes()


@each_variant
def test_a_result_has_the_shape_of_its_inputs_and_finite_floats(
    variant: Variant, updates: Updates
) -> None:
    own = given(variant, updates)
    result = low_rank(variant.method.rule(own, variant.options))
    assert result.A.shape == (BATCH, result.rank, N)
    assert result.B.shape == (BATCH, M, result.rank)
    assert result.rank <= min(M, N)
    for x in (result.A, result.B):
        assert x.dtype in (np.float32, np.float64)
        assert np.isfinite(x).all()


@each_variant
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_a_batch_gives_what_its_modules_give_one_by_one(
    variant: Variant, updates: Updates, backend: str
) -> None:
    own = given(variant, updates)
    together = delta(variant, own, backend)
    for item in range(BATCH):
        keys = tuple((row[item],) for row in own.keys)
        factors = tuple(LowRank(u.A[item : item + 1], u.B[item : item + 1]) for u in own.factors)
        alone = delta(variant, replace(own, factors=factors, keys=keys), backend)
        # float32 factors are multiplied in another order
        assert apart(together[item : item + 1], alone) <= 1e-6


@each_merge
def test_the_order_of_adapters_decides_nothing(variant: Variant, updates: Updates) -> None:
    straight = delta(variant, given(variant, updates))
    first, *others = range(taken(variant))
    for places in ((*others, first), (*reversed(others), first)):
        gap = apart(delta(variant, given(variant, updates, places)), straight)
        if variant.method.name in ORDER_MATTERS:
            assert gap > 1e-2  # or it need not be excepted
        else:
            assert gap <= 1e-5


@each_merge
def test_weights_all_doubled_and_turned_round_do_so_to_the_result(
    variant: Variant, updates: Updates
) -> None:
    own = given(variant, updates)
    turned = replace(own, weights=tuple(-2 * weight for weight in own.weights))
    # powers of two: what is left is rounding that depends on a sign
    assert apart(delta(variant, turned), -2 * delta(variant, own)) <= 1e-6


@each_merge
def test_a_module_that_an_adapter_lacks_is_an_update_of_zero(
    variant: Variant, updates: Updates
) -> None:
    own = given(variant, updates)
    nothing = LowRank(*(x * np.float32(0) for x in (own.factors[1].A, own.factors[1].B)))
    zero = replace(own, factors=(own.factors[0], nothing, *own.factors[2:]))
    present = tuple(place != 1 for place in range(len(own.factors)))
    places = [place for place, there in enumerate(present) if there]
    lacking = replace(given(variant, own, places), present=present)
    # float32 factors are multiplied in another order
    assert apart(delta(variant, lacking), delta(variant, zero)) <= 1e-5


@each_variant
@pytest.mark.parametrize("condition", [1.0, 100.0])
def test_how_a_file_factors_its_update_decides_nothing(
    variant: Variant, updates: Updates, rng: np.random.Generator, condition: float
) -> None:
    own = given(variant, updates)
    changed = replace(own, factors=tuple(regauged(u, rng, condition) for u in own.factors))
    gap = apart(delta(variant, changed), delta(variant, own))
    if (variant.method.name, variant.label) in NOT_GAUGE_INVARIANT:
        assert gap > 1e-2  # or it need not be excepted
    else:
        assert gap < 1e-4


def regauged(update: LowRank, rng: np.random.Generator, condition: float) -> LowRank:
    """(G^-1 A, B G) for a random G of this condition number."""
    r = update.rank
    left, right = (np.linalg.qr(rng.standard_normal((r, r)))[0] for _ in range(2))
    G = left @ np.diag(np.geomspace(1, condition, r)) @ right
    A, B = np.linalg.inv(G) @ update.A.astype(float), update.B.astype(float) @ G
    return LowRank(A.astype(np.float32), B.astype(np.float32))


@each_variant
@pytest.mark.parametrize("backend", ["torch", "strict"])
def test_other_arrays_give_the_delta_weights_of_numpy(
    variant: Variant, updates: Updates, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lend_kernels_to_strict(monkeypatch)
    own = given(variant, updates)
    # float32 factors are multiplied in another order
    assert apart(delta(variant, own, backend), delta(variant, own)) <= 1e-6


@each_variant
def test_updates_that_are_zero_stay_zero(variant: Variant, updates: Updates) -> None:
    own = given(variant, updates)
    zero = tuple(LowRank(u.A, u.B * np.float32(0)) for u in own.factors)
    result = low_rank(variant.method.rule(replace(own, factors=zero), variant.options))
    assert np.isfinite(result.A).all()
    assert not dense(result).any()


@each_variant
@pytest.mark.parametrize(("m", "n"), [(1, 7), (7, 1), (1, 1), (3, 2)])
def test_modules_smaller_than_the_rank_are_taken(
    variant: Variant, updates: Updates, rng: np.random.Generator, m: int, n: int
) -> None:
    own = given(variant, updates)
    small = tuple(gaussian(rng, m, n, u.rank, batch=BATCH) for u in own.factors)
    result = low_rank(variant.method.rule(replace(own, factors=small), variant.options))
    assert dense(result).shape == (BATCH, m, n)
    assert np.isfinite(dense(result)).all()


@each_method
def test_threads_do_not_change_a_byte_of_the_file(
    name: str, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = three[: methods()[name].inputs] if methods()[name].takes == "many" else three[:1]
    files = []
    for threads in (1, 8):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=threads: set(range(n)))
        result, _ = loramerge.run(name, inputs, rank=3)
        files.append(result.adapter.source.path.read_bytes())
    assert files[0] == files[1]
