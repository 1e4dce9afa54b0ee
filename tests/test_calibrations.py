"""--calibrate: Pico and SVC against their formulas on dense matrices, and the laws of both."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

import loramerge
from loramerge.adapter import LowRank, Updates
from loramerge.algorithms.arithmetic import ArithmeticOptions, arithmetic
from loramerge.algorithms.tsv import TsvOptions, tsv
from loramerge.linalg.calibrations import FAINT, PAPERS, CalibrationName, calibrated, prepared
from loramerge.linalg.spectrum import Spectrum
from loramerge.registry import methods
from tests.backends import BACKENDS
from tests.build import read_deltas, write_peft
from tests.conftest import factors
from tests.entries import apart, delta, low_rank, updates, weighted
from tests.typed import typed

Matrix = np.ndarray
RULES = {
    "arithmetic": (arithmetic, ArithmeticOptions(), False),
    "tsv": (tsv, TsvOptions(), True),
}
WEIGHTS = (1.0, 0.5, -0.8)
each_calibration = pytest.mark.parametrize("name", ["pico", "svc"])
each_rule = pytest.mark.parametrize("rule", RULES)


def merged(name: CalibrationName, rule: str, given: Updates, backend: str = "numpy") -> Matrix:
    """The delta weights of a calibrated merge."""
    used = BACKENDS[backend]
    given = replace(given, factors=tuple(used.update(factor) for factor in given.factors))
    function, options, orthogonal = RULES[rule]
    result = function(prepared(name, given), options)
    return delta(used.back(low_rank(calibrated(name, given, result, orthogonal))))


def pico(deltas: list[Matrix]) -> Matrix:
    """Pico around the plain sum (arXiv:2604.16826), on a B that has orthonormal A beside it."""
    U, s, _ = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    energy = s**2 / np.sum(s**2)
    less = U @ np.diag(1 / (1 + (len(deltas) - 1) * energy) - 1) @ U.T
    total = sum(dW + less @ dW for dW in deltas)
    mean = np.mean([np.linalg.norm(dW) for dW in deltas])
    return total * mean / np.linalg.norm(total)


def svc(merge: Matrix, deltas: list[Matrix], least: float) -> Matrix:
    """SVC (arXiv:2602.05536), one direction of the merge after another."""
    U, s, Vh = np.linalg.svd(merge, full_matrices=False)
    found = np.zeros_like(merge)
    for u, sigma, v in zip(U.T, s, Vh, strict=True):
        if sigma < 1e-9 * s[0]:
            continue
        eta = []
        for dW in deltas:
            p, part = u @ merge, u @ dW
            eta.append(max(p @ part / max(part @ part, (FAINT * sigma) ** 2), least))
        found += sigma / np.mean(eta) * np.outer(u, v)
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_pico_is_its_formula(rng: np.random.Generator, weights: tuple[float, ...]) -> None:
    given = updates(rng, weights=weights)
    found = merged("pico", "arithmetic", given)
    for item in range(2):
        assert apart(found[item], pico(weighted(given, item))) < 1e-8


@each_rule
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), WEIGHTS])
def test_svc_is_its_formula(
    rng: np.random.Generator, rule: str, weights: tuple[float, ...]
) -> None:
    given = updates(rng, weights=weights)
    function, options, orthogonal = RULES[rule]
    before, found = delta(function(given, options)), merged("svc", rule, given)
    for item in range(2):
        expected = svc(before[item], weighted(given, item), 1.0 if orthogonal else 1 / 3)
        assert apart(found[item], expected) < 1e-8


@each_calibration
@each_rule
def test_one_adapter_alone_comes_back(rng: np.random.Generator, name: str, rule: str) -> None:
    given = updates(rng, ranks=(4,), weights=(-0.7,))
    for item in range(2):
        assert apart(merged(name, rule, given)[item], weighted(given, item)[0]) < 1e-8


def test_svc_gives_back_the_adapter_that_was_added_up_many_times(rng: np.random.Generator) -> None:
    one = updates(rng, ranks=(5,))
    copies = updates(np.random.default_rng(20240916), ranks=(5,) * 4)
    copies = replace(copies, factors=one.factors * 4)
    assert apart(merged("svc", "arithmetic", copies), merged("svc", "arithmetic", one)) < 1e-8


def test_what_an_update_hardly_has_along_a_direction_says_nothing_of_it() -> None:
    """Published, the quotient of two numbers that are rounding decides the result."""
    given = updates(np.random.default_rng(0), 4, 5, (2, 2), batch=1)
    one, other = np.diag([3.0, 2.0, 1e-9, 1e-9]), np.diag([1e-9, 1e-9, 1.5, 1.0])
    factors = tuple(LowRank(np.eye(4, 5)[None], dW[None]) for dW in (one, other))
    found = merged("svc", "arithmetic", replace(given, factors=factors))
    # Each direction is one update's alone: eta = (1 + 1 / 2) / 2.
    assert apart(found, (one + other) @ np.eye(4, 5) / 0.75) < 1e-6


def test_pico_leaves_the_directions_of_updates_that_share_all_equally() -> None:
    """Where every direction holds as much, all are held back alike: nothing is left to turn."""
    eye = np.eye(6)[None]
    given = updates(np.random.default_rng(0), 6, 6, (6, 6), batch=1)
    given = replace(given, factors=(LowRank(eye, eye), LowRank(2 * eye, eye)))
    assert apart(merged("pico", "arithmetic", given), 1.5 * eye) < 1e-12


def regauged(update: LowRank, rng: np.random.Generator) -> LowRank:
    G = rng.standard_normal((update.rank, update.rank)) + 3 * np.eye(update.rank)
    return LowRank(np.linalg.inv(G) @ update.A, update.B @ G)


@each_calibration
@each_rule
def test_how_a_file_factors_its_update_decides_nothing(
    rng: np.random.Generator, name: str, rule: str
) -> None:
    given = updates(rng, weights=WEIGHTS)
    changed = replace(given, factors=tuple(regauged(factor, rng) for factor in given.factors))
    assert apart(merged(name, rule, changed), merged(name, rule, given)) < 1e-8


@each_calibration
@each_rule
def test_the_order_of_adapters_decides_nothing(
    rng: np.random.Generator, name: str, rule: str
) -> None:
    given = updates(rng, weights=WEIGHTS)
    turned = replace(given, factors=given.factors[::-1], weights=given.weights[::-1])
    assert apart(merged(name, rule, turned), merged(name, rule, given)) < 1e-8


@each_calibration
@each_rule
def test_weights_all_doubled_and_turned_round_do_so_to_the_result(
    rng: np.random.Generator, name: str, rule: str
) -> None:
    given = updates(rng, weights=WEIGHTS)
    turned = replace(given, weights=tuple(-2 * weight for weight in WEIGHTS))
    assert apart(merged(name, rule, turned), -2 * merged(name, rule, given)) < 1e-8


@each_calibration
@each_rule
def test_a_small_change_of_the_input_is_a_small_change_of_the_result(
    rng: np.random.Generator, name: str, rule: str
) -> None:
    given = updates(rng)
    noise = updates(rng)
    moved = tuple(
        LowRank(one.A + 1e-4 * other.A, one.B + 1e-4 * other.B)
        for one, other in zip(given.factors, noise.factors, strict=True)
    )
    change = apart(merged(name, rule, replace(given, factors=moved)), merged(name, rule, given))
    assert change < 1e-2


@each_calibration
@each_rule
@pytest.mark.parametrize("backend", ["torch"])
def test_torch_gives_the_delta_weights_of_numpy(
    rng: np.random.Generator, name: str, rule: str, backend: str
) -> None:
    given = updates(rng, weights=WEIGHTS)
    assert apart(merged(name, rule, given, backend), merged(name, rule, given)) < 1e-8


@each_calibration
@each_rule
def test_updates_that_are_zero_stay_zero(rng: np.random.Generator, name: str, rule: str) -> None:
    given = updates(rng)
    zero = replace(given, factors=tuple(LowRank(f.A, 0 * f.B) for f in given.factors))
    assert not merged(name, rule, zero).any()


def test_svc_keeps_singular_values_in_falling_order(rng: np.random.Generator) -> None:
    given = updates(rng, weights=(1.0, 1.0, 1.0))
    copies = replace(given, factors=(given.factors[0], *given.factors[:2]))
    found = calibrated("svc", copies, arithmetic(copies, ArithmeticOptions()))
    assert isinstance(found, Spectrum)
    assert (np.diff(found.s) <= 0).all()


# From here on through files.


def written(out: Path, method: str, inputs: list[Path], **values: object) -> dict[str, Matrix]:
    """The delta weights of a merge to rank 4, as written."""
    return read_deltas(loramerge.run(method, inputs, rank=4, **values)[0].save(out))


@pytest.fixture
def alike(tmp_path: Path, rng: np.random.Generator) -> list[Path]:
    """Three adapters of which any two have much in common: `stock` leaves nothing of others."""
    first, *others = (factors(rng, 4) for _ in range(3))
    found = [write_peft(tmp_path / "0", first, lora_alpha=4)]
    for place, other in enumerate(others, 1):
        near = {
            module: (A + other[module][0] / 2, B + other[module][1] / 2)
            for module, (A, B) in first.items()
        }
        found.append(write_peft(tmp_path / str(place), near, lora_alpha=4))
    return found


REFUSED = {("iso", "svc"), ("decorrelate", "pico")}
PAIRS = [
    (method.name, name)
    for method in methods().values()
    for name in PAPERS
    if method.merges and (method.name, name) not in REFUSED
]


@pytest.mark.parametrize(("method", "name"), PAIRS)
def test_every_merge_that_is_not_refused_is_calibrated(
    alike: list[Path], tmp_path: Path, name: str, method: str
) -> None:
    inputs = alike[: methods()[method].inputs]
    plain = written(tmp_path / "plain", method, inputs)
    found = written(tmp_path / "calibrated", method, inputs, calibrate=name)
    assert max(apart(found[module], plain[module]) for module in plain) > 1e-2  # it does something


def test_pico_counts_thresholds_of_the_whole_model_on_what_it_held_back(
    three: list[Path], tmp_path: Path
) -> None:
    """With one module, a threshold of the whole model is that of the module."""
    tensor, model = (
        written(
            tmp_path / scope,
            "ties",
            three,
            calibrate="pico",
            include=["*.q_proj"],
            trim_scope=scope,
        )
        for scope in ("tensor", "model")
    )
    for module, dW in tensor.items():
        assert apart(model[module], dW) < 1e-3  # thresholds are compared in float32


def test_the_report_names_the_calibration_and_its_paper(three: list[Path]) -> None:
    done = typed("arithmetic", *three[:2], "--calibrate", "svc", "--dry-run")
    assert "arXiv:2212.04089; calibrated by svc, arXiv:2602.05536" in done.err + done.out


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ({"calibrate": "pico"}, "auto"),
        ({"calibrate": "pico", "scale": "paper"}, "paper"),
        ({"calibrate": "svc"}, "paper"),
    ],
)
def test_pico_is_brought_to_the_length_of_auto_unless_another_is_asked_for(
    three: list[Path], values: dict[str, object], scale: str
) -> None:
    report = loramerge.run("tsv", three, rank=4, **values)[1]
    assert report.plan.recipe.scale == scale


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("iso a b --calibrate svc", "its singular values are equal"),
        ("tsv a b --smooth average --calibrate svc", "its singular values are equal"),
        ("ties a b --space dense --calibrate svc", "only the leading part is known"),
        ("decorrelate a b --calibrate pico", "siblings, which pico would not hold back"),
        ("project a b --calibrate pico", "it cuts and joins adapters"),
        ("cluster a b --sweep-k 2,3 --calibrate svc", "it takes no --calibrate"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_one_sentence(
    three: list[Path], monkeypatch: pytest.MonkeyPatch, words: str, said: str
) -> None:
    monkeypatch.chdir(three[0].parent)
    done = typed(*words.split())
    assert done.code == 2
    assert said in done.lines[0]
