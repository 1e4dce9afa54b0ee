"""What every method keeps to that works on singular vectors. It grows by itself, like the other."""

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import LowRank, Updates
from loramerge.linalg.spectrum import Spectrum
from loramerge.report import COPIES
from tests.entries import apart
from tests.updates import gaussian, near
from tests.variants import BATCH, VARIANTS, Variant, delta

THIN = [v for v in VARIANTS if v.method.place == "thin" and v.method.takes == "many"]
each_thin = pytest.mark.parametrize("variant", THIN, ids=str)

# A law holds for every method and choice of options but these, for the reason given.
NOT_THE_SAME_FROM_COPIES = {
    ("iso", ""): "of a sum",
    ("iso", "directions=task"): "of a sum",
    ("ctm", "rule=sum"): "a sum",
    ("ctm", "sparsify=dare"): "another mask for each",
    ("ctm", "sparsify=della"): "another mask for each",
}
NOT_THE_ADAPTER_ALONE = {
    ("tsv", "smooth=average"): "a smooth spectrum is another",
    ("tsv", "smooth=linear"): "a smooth spectrum is another",
    ("iso", ""): "a flat spectrum is another",
    ("iso", "directions=task"): "a flat spectrum is another",
    ("star", ""): "cut to its strongest directions",
    ("wudi", ""): "shortened by the ridge",
    ("ctm", ""): "cut to the rank of the output, and trimmed",
    ("ctm", "rule=sum"): "cut to the rank of the output, and trimmed",
    ("ctm", "sparsify=none"): "cut to the rank of the output",
    ("ctm", "sparsify=dare"): "cut to the rank of the output, and trimmed",
    ("ctm", "sparsify=della"): "cut to the rank of the output, and trimmed",
    ("ctm", "sparsify=breadcrumbs"): "cut to the rank of the output, and trimmed",
}
LEAPS = (
    {
        (
            "iso",
            "directions=task",
            relation,
        ): "it counts directions by the numerical rank of the sum"
        for relation in ("shared A", "shared B", "two checkpoints")
    }
    | {
        ("ctm", f"sparsify={how}", relation): "random masks lie on axes that turn with the input"
        for how in ("dare", "della")
        for relation in ("copies", "copies of unequal weight", "near copies", "two checkpoints")
    }
    | {
        (
            "ctm",
            "sparsify=dare",
            "one much smaller",
        ): "random masks lie on axes that turn, by 1.1e-2",
        (
            "ctm",
            "sparsify=none",
            "two checkpoints",
        ): "a mean over more entries as one changes sides",
    }
)

# Those that divide by, invert or make orthogonal what the updates are, and say how well that went.
CONDITIONED = [
    v for v in VARIANTS if v.method.name in ("tsv", "iso", "wudi", "decorrelate", "fair")
]
each_conditioned = pytest.mark.parametrize("variant", CONDITIONED, ids=str)


def alike(*given: LowRank, weights: tuple[float, ...] | None = None) -> Updates:
    keys = tuple(tuple(range(BATCH)) for _ in given)
    count = len(given)
    return Updates(given, weights or (1.0,) * count, (1.0,) * count, rank=4, keys=keys)


@each_thin
def test_copies_of_one_adapter_give_what_it_gives_alone(
    variant: Variant, rng: np.random.Generator
) -> None:
    one = gaussian(rng, 40, 30, 5, batch=BATCH)
    gap = apart(delta(variant, alike(one, one, one, one)), delta(variant, alike(one)))
    if (variant.method.name, variant.label) in NOT_THE_SAME_FROM_COPIES:
        assert gap > 1e-2  # or it need not be excepted
    else:
        assert gap < 1e-5  # float32 factors


@each_thin
def test_one_adapter_alone_comes_back(variant: Variant, rng: np.random.Generator) -> None:
    one = gaussian(rng, 40, 30, 5, batch=BATCH)
    gap = apart(delta(variant, alike(one)), one.B.astype(float) @ one.A.astype(float))
    if (variant.method.name, variant.label) in NOT_THE_ADAPTER_ALONE:
        assert gap > 1e-2
    else:
        assert gap < 1e-5  # float32 factors


def pairs(rng: np.random.Generator) -> dict[str, Updates]:
    """Updates that stand in every relation to each other that a method may trip over."""
    one, other = (gaussian(rng, 40, 30, 5, batch=BATCH) for _ in range(2))
    return {
        "unrelated": alike(one, other),
        "copies": alike(one, one, one),
        "copies of unequal weight": alike(one, one, one, weights=(1.0, 0.4, 0.7)),
        "near copies": alike(one, near(rng, one, 1e-3), near(rng, one, 1e-3)),
        "two checkpoints": alike(one, near(rng, one, 0.05)),
        "shared A": alike(one, LowRank(one.A, other.B)),
        "shared B": alike(one, LowRank(other.A, one.B)),
        "one much smaller": alike(one, LowRank(other.A, other.B * np.float32(1e-3))),
        "negative weight": alike(one, other, weights=(1.0, -0.7)),
        "more ranks than fit": alike(*(gaussian(rng, 12, 9, 5, batch=BATCH) for _ in range(3))),
    }


def changed(rng: np.random.Generator, update: LowRank) -> LowRank:
    """The update with both factors changed by as much as changes it by 1e-3 of its norm."""
    parts = []
    for x in (update.A, update.B):
        noise = rng.standard_normal(x.shape) * np.sqrt(np.mean(x.astype(float) ** 2))
        parts.append((x + 1e-3 / np.sqrt(2) * noise).astype(np.float32))
    return LowRank(*parts)


@each_thin
@pytest.mark.parametrize("relation", pairs(np.random.default_rng(0)))
def test_a_small_change_of_the_input_is_a_small_change_of_the_result(
    variant: Variant, relation: str, rng: np.random.Generator
) -> None:
    given = pairs(rng)[relation]
    before = delta(variant, given)
    changes = []
    for _ in range(3):
        moved = tuple(changed(rng, factor) for factor in given.factors)
        changes.append(apart(delta(variant, replace(given, factors=moved)), before))
    if (variant.method.name, variant.label, relation) in LEAPS:
        assert max(changes) > 1e-2  # or it need not be excepted
    else:
        assert max(changes) < 1e-2


def conditions(variant: Variant, given: Updates) -> np.ndarray:
    """The condition of each item of the batch."""
    found = variant.method.rule(given, variant.options)
    assert isinstance(found, Spectrum)
    assert found.condition is not None
    return found.condition


@each_conditioned
def test_equal_strength_at_right_angles_has_condition_one(
    variant: Variant, rng: np.random.Generator
) -> None:
    U, V = (np.linalg.qr(rng.standard_normal((BATCH, side, 10)))[0] for side in (40, 30))
    given = alike(*(LowRank(V[..., at].mT, U[..., at]) for at in (slice(0, 5), slice(5, 10))))
    assert conditions(variant, given) == pytest.approx(1, abs=1e-9)


@each_conditioned
def test_the_condition_belongs_to_the_updates_and_not_to_their_order_or_factors(
    variant: Variant, rng: np.random.Generator
) -> None:
    one, other = gaussian(rng, 40, 30, 5, batch=BATCH), gaussian(rng, 40, 30, 4, batch=BATCH)
    found = conditions(variant, alike(one, other))
    assert found.shape == (BATCH,)
    assert (found > 1).all()
    G = np.linalg.qr(rng.standard_normal((5, 5)))[0].astype(np.float32)
    turned = LowRank(G.T @ one.A, one.B @ G)
    # Rounding of float32 factors, in a number made of squares.
    assert conditions(variant, alike(other, turned)) == pytest.approx(found, rel=1e-4)


@each_thin
def test_other_spectral_methods_report_no_condition(
    variant: Variant, rng: np.random.Generator
) -> None:
    found = variant.method.rule(alike(gaussian(rng, 40, 30, 5, batch=BATCH)), variant.options)
    assert isinstance(found, Spectrum)
    assert (found.condition is not None) == (variant in CONDITIONED)


@pytest.mark.parametrize("variant", [v for v in THIN if v.method.orthogonal(v.options)], ids=str)
def test_near_copies_have_a_condition_that_is_reported(
    variant: Variant, rng: np.random.Generator
) -> None:
    one, other = (gaussian(rng, 40, 30, 5, batch=BATCH) for _ in range(2))
    assert (conditions(variant, alike(one, other)) < COPIES).all()
    assert (conditions(variant, alike(one, near(rng, one, 1e-2))) > COPIES).all()
