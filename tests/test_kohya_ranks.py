"""The rules of kohya's resize_lora: the fewest ranks that meet them, and theirs with --compat."""

from pathlib import Path

import numpy as np
import pytest

import loramerge as lm
from loramerge.errors import UsageError
from loramerge.linalg.ranks import Criterion, choose
from loramerge.recipe import Named, make_recipe
from loramerge.registry import methods
from tests.build import read_deltas, write_peft
from tests.typed import TESTBED, typed

SPECTRA = {
    "geometric": 0.8 ** np.arange(16.0),
    "power": np.arange(1, 17.0) ** -1.5,
    "flat": np.ones(8),
    "cliff": np.array([9, 7, 5, 3, 1e-3, 1e-4]),
    "zero": np.zeros(4),
    "tiny": np.full(4, 1e-7),
}
PARAMETERS = {
    "sv_ratio": (1.5, 4.0, 20.0),
    "sv_cumulative": (0.3, 0.7, 0.95),
    "sv_fro": (0.5, 0.9, 0.99),
}
# What rank_resize of kohya-ss/sd-scripts 48d368f gave for these spectra and parameters: the new
# rank for --new_rank 64, then for 5.
THEIRS = {
    ("geometric", "sv_ratio"): ([3, 8, 15], [3, 5, 5]),
    ("geometric", "sv_cumulative"): ([3, 7, 13], [3, 5, 5]),
    ("geometric", "sv_fro"): ([2, 5, 10], [2, 5, 5]),
    ("power", "sv_ratio"): ([2, 3, 8], [2, 3, 5]),
    ("power", "sv_cumulative"): ([2, 4, 12], [2, 4, 5]),
    ("power", "sv_fro"): ([2, 2, 5], [2, 2, 5]),
    ("flat", "sv_ratio"): ([8, 8, 8], [5, 5, 5]),
    ("flat", "sv_cumulative"): ([4, 7, 8], [4, 5, 5]),
    ("flat", "sv_fro"): ([3, 8, 8], [3, 5, 5]),
    ("cliff", "sv_ratio"): ([3, 5, 5], [3, 5, 5]),
    ("cliff", "sv_cumulative"): ([2, 4, 5], [2, 4, 5]),
    ("cliff", "sv_fro"): ([2, 4, 5], [2, 4, 5]),
    ("zero", "sv_ratio"): ([1, 1, 1], [1, 1, 1]),
    ("zero", "sv_cumulative"): ([1, 1, 1], [1, 1, 1]),
    ("zero", "sv_fro"): ([1, 1, 1], [1, 1, 1]),
    ("tiny", "sv_ratio"): ([1, 1, 1], [1, 1, 1]),
    ("tiny", "sv_cumulative"): ([1, 1, 1], [1, 1, 1]),
    ("tiny", "sv_fro"): ([1, 1, 1], [1, 1, 1]),
}
# The same for a trained adapter of 28 modules, by its resize_lora_model: modules by name.
TRAINED = [
    ("sv_ratio", 4.0, 16, "4333544647663533283532226423"),
    ("sv_ratio", 10.0, 8, "7687878888888878486878548868"),
    ("sv_cumulative", 0.6, 16, "4444544556554545364545335545"),
    ("sv_fro", 0.9, 16, "3233433535453423262432224323"),
    ("sv_fro", 0.99, 16, "9998a89dadbb8b9a7d8b8a65cb7a"),
]
each_rule = pytest.mark.parametrize("rule", PARAMETERS)
each_case = pytest.mark.parametrize(
    ("rule", "parameter"), [(rule, x) for rule, row in PARAMETERS.items() for x in row]
)
each_seed = pytest.mark.parametrize("seed", range(5))


def published(s: np.ndarray, rule: str, parameter: float, new_rank: int) -> int:
    """The rank that resize_lora chooses: its three rules, an index too far by one, its limits."""
    if s[0] <= 1e-6:
        return 1
    if rule == "sv_ratio":
        index = sum(value > s[0] / parameter for value in s)
    else:
        weights, target = (s, parameter) if rule == "sv_cumulative" else (s**2, parameter**2)
        shares = np.cumsum(weights) / weights.sum()
        index = sum(share < target for share in shares) + 1
    return min(max(1, min(index, len(s) - 1)) + 1, new_rank)


def meets(s: np.ndarray, rank: int, rule: str, parameter: float) -> bool:
    """Whether the first singular values meet a rule."""
    if rule == "sv_ratio":
        return bool((s[rank:] <= s[0] / parameter).all())
    power = 1 if rule == "sv_cumulative" else 2
    norm, whole = (np.sum(x**power) ** (1 / power) for x in (s[:rank], s))
    # A share that is met but for the rounding of its sum is met.
    return bool(norm >= (parameter - 1e-12) * whole)


def count(
    s: np.ndarray, rule: str, parameter: float, kohya: bool = False, dims: int | None = None
) -> int:
    """The rank we choose for one module with these singular values."""
    shape = (dims or len(s), dims or len(s))
    criterion = Criterion(**{rule: parameter}, kohya=kohya)
    return choose({"m": s}, {"m": shape}, criterion, None, lambda _: 0, uniform=False)["m"]


def spectrum(seed: int, length: int = 12) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).exponential(size=length))[::-1]


@each_case
@each_seed
def test_a_rule_keeps_the_fewest_ranks_that_meet_it(rule: str, parameter: float, seed: int) -> None:
    s = spectrum(seed)
    fewest = next(k for k in range(len(s) + 1) if meets(s, k, rule, parameter))
    assert count(s, rule, parameter) == fewest


@each_seed
def test_sv_fro_is_the_root_of_an_energy_and_of_what_an_error_leaves(seed: int) -> None:
    s = spectrum(seed)
    for share in (0.5, 0.9, 0.99, 1.0):
        assert count(s, "sv_fro", share) == count(s, "energy", share**2)
        error = (1 - share**2) ** 0.5
        # 1e-9: the two bounds differ by rounding, and no count may hang on it
        assert error == 0 or count(s, "sv_fro", share) == count(s, "max_error", error + 1e-9)


@each_rule
@pytest.mark.parametrize("s", [np.zeros(4), np.zeros(0)])
def test_an_update_that_is_zero_asks_for_nothing(rule: str, s: np.ndarray) -> None:
    assert count(s, rule, 1.0 if rule != "sv_ratio" else 2.0, dims=4) == 0


@pytest.mark.parametrize("rule", ["sv_cumulative", "sv_fro"])
def test_all_of_a_norm_is_every_singular_value_that_is_not_zero(rule: str) -> None:
    assert count(np.array([1, 1e-3, 1e-9, 1e-15, 0]), rule, 1.0) == 3


@pytest.mark.parametrize(("case", "expected"), THEIRS.items(), ids=str)
def test_the_published_rule_gives_what_their_code_gave(
    case: tuple[str, str], expected: tuple[list[int], list[int]]
) -> None:
    name, rule = case
    for new_rank, ranks in zip((64, 5), expected, strict=True):
        found = [published(SPECTRA[name], rule, x, new_rank) for x in PARAMETERS[rule]]
        assert found == ranks


@pytest.mark.parametrize("name", SPECTRA)
@each_case
def test_compat_gives_their_ranks(name: str, rule: str, parameter: float) -> None:
    s = SPECTRA[name]
    assert count(s, rule, parameter, kohya=True) == published(s, rule, parameter, 64)


@each_case
@each_seed
@pytest.mark.parametrize("zeros", [0, 1, 20])
def test_compat_gives_their_ranks_of_updates_with_fewer_ranks_than_dimensions(
    rule: str, parameter: float, seed: int, zeros: int
) -> None:
    s = spectrum(seed)
    theirs = published(np.append(s, np.zeros(zeros)), rule, parameter, 64)
    assert count(s, rule, parameter, kohya=True, dims=len(s) + zeros) == theirs


@pytest.mark.parametrize(("rule", "parameter", "new_rank", "digits"), TRAINED)
def test_a_trained_adapter_gets_the_ranks_their_program_gave_it(
    rule: str, parameter: float, new_rank: int, digits: str
) -> None:
    values = {rule: parameter, "rank": new_rank}
    _, theirs = lm.squeeze(TESTBED / "sh3_rev", compat="kohya", **values)
    by_name = sorted((m.name, m.stored_rank, m.rank) for m in theirs.modules)
    assert [stored for _, stored, _ in by_name] == [int(digit, 16) for digit in digits]
    _, ours = lm.squeeze(TESTBED / "sh3_rev", **values)
    spare = {m.name: 1 for m in ours.modules if m.rank < new_rank}
    assert by_name == sorted(
        (m.name, m.rank + spare.get(m.name, 0), m.rank + spare.get(m.name, 0)) for m in ours.modules
    )


def test_their_one_rank_too_many_may_be_one_of_zeros(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    a = write_peft(
        tmp_path / "a", {"lin": (rng.standard_normal((2, 9)), rng.standard_normal((7, 2)))}
    )
    result, report = lm.squeeze(a, sv_fro=1.0, compat="kohya")
    assert [(m.rank, m.stored_rank) for m in report.modules] == [(2, 3)]
    stored = read_deltas(result.save(tmp_path / "out"))["lin"]
    # float32 factors
    np.testing.assert_allclose(stored, read_deltas(a)["lin"], rtol=0, atol=1e-5)


# A rule chooses ranks afterwards: not for methods that must know the rank beforehand.
FREE = [name for name, method in methods().items() if method.options().needs_rank is None]


@pytest.mark.parametrize("method", FREE)
@each_rule
def test_every_method_keeps_of_its_result_what_a_rule_asks_for(
    method: str, rule: str, three: list[Path], tmp_path: Path
) -> None:
    many = methods()[method].takes == "many"
    paths = three[: methods()[method].inputs] if many else three[:1]
    scale = {"scale": "paper"} if many else {}
    parameter = PARAMETERS[rule][1]
    whole, _ = lm.run(method, paths, rank="full", **scale)
    deltas = read_deltas(whole.save(tmp_path / "whole"))
    _, report = lm.run(method, paths, **{rule: parameter}, **scale)
    for module in report.modules:
        s = np.linalg.svd(deltas[module.name], compute_uv=False)
        assert meets(s, module.rank, rule, parameter)
        assert module.rank == 0 or not meets(s, module.rank - 1, rule, parameter)


def test_a_rank_beside_a_rule_is_the_most_and_no_part_of_the_sum(three: list[Path]) -> None:
    _, free = lm.squeeze(three[2], sv_cumulative=0.7)
    _, capped = lm.squeeze(three[2], sv_cumulative=0.7, rank=3)
    assert any(m.rank > 3 for m in free.modules)
    assert [m.rank for m in capped.modules] == [min(m.rank, 3) for m in free.modules]


def test_the_largest_input_rank_may_be_the_most(three: list[Path]) -> None:
    _, report = lm.arithmetic(three, sv_fro=1.0, rank="max")
    assert report.rank == (6, 6)


def test_one_stored_rank_is_the_largest_any_module_needs(three: list[Path]) -> None:
    _, each = lm.squeeze(three[2], sv_fro=0.8)
    _, one = lm.squeeze(three[2], sv_fro=0.8, layout="uniform")
    assert {m.stored_rank for m in one.modules} == {max(m.rank for m in each.modules)}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--sv-fro 0.9", "a-fro0.9"),
        ("--sv-ratio 10 -r 3", "a-ratio10"),
        ("--sv-cumulative 0.75", "a-cumulative0.75"),
    ],
)
def test_the_default_name_says_the_rule(
    words: str, name: str, three: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(three[0].parent)
    done = typed("squeeze", "a", *words.split(), "-q")
    assert done.out == f"{name}\n"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"sv_fro": 0.9, "sv_ratio": 2.0}, "takes only one of --sv-ratio and --sv-fro"),
        ({"sv_fro": 0.9, "energy": 0.9}, "takes only one of --energy and --sv-fro"),
        ({"sv_fro": 0.9, "energy": 0.9, "rank": 2}, "takes only one of --energy and --sv-fro"),
        ({"sv_fro": 0.9, "allocate": "energy"}, "--allocate needs --rank N"),
        ({"sv_fro": 0.9, "allocate": "energy", "rank": 4}, "--allocate needs --rank N"),
        ({"rank": 4, "compat": "kohya"}, "--compat kohya needs --sv-ratio, --sv-cumulative or"),
        ({"sv_ratio": 1.0}, "--sv-ratio is 1.0; it must be a number > 1"),
        ({"sv_fro": 0.9, "svd": "randomized"}, "--svd randomized needs a rank"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        make_recipe("squeeze", [Named("a")], values)
    assert said in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize(
    ("word", "close"), [("--dynamic_method", "--sv-fro"), ("--new_rank", "--rank")]
)
def test_the_names_of_their_options_lead_to_ours(word: str, close: str) -> None:
    assert f"did you mean '{close}'?" in typed("squeeze", "a", word, "x").err
