"""Every registered method with each choice of its options, and updates to try them on."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.options import Options, describe
from loramerge.registry import Method, methods
from tests.backends import BACKENDS, Backend
from tests.entries import low_rank
from tests.updates import dense, gaussian

M, N, BATCH, RANK = 40, 30, 3, 4
SPECTRUM = np.array([8.0, 5.0, 3.0, 2.0, 1.2, 0.7])
# What a clustering must find in `related` updates: a direction each, and as many again for the
# adapter of negative weight, whose terms (a, -b) are at right angles to (a, b).
GROUPS = len(SPECTRUM) + RANK


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
        names=tuple(f"layers.{item}" for item in range(BATCH)),
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


def surveyed(variant: Variant, updates: Updates) -> Updates:
    """The updates with what the method's census finds, the batch being the whole adapter."""
    census, known = variant.method.census, None
    for _ in range(census.passes(variant.options) if census else 0):
        updates = replace(updates, known=known)
        known = census.settle(census.count(updates, variant.options), variant.options, known)
    return replace(updates, known=known)


def delta(variant: Variant, updates: Updates, backend: str = "numpy") -> np.ndarray:
    """The delta weights that a method makes of updates. [BATCH, M, N]"""
    used = BACKENDS[backend]
    given = on(used, updates)
    given = given if given.known is not None else surveyed(variant, given)
    return dense(used.back(low_rank(variant.method.rule(given, variant.options))))
