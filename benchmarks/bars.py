"""The rows of the quality table: what is merged how, and what it must score.

Bars hold for the test split at 512 sequences a task, on the adapters under fixtures/testbed. Those
with a tolerance were measured with independent reference implementations of each method; a change
of ours may not move them either way. The standard error of one number is at most .008.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from programs import SUITES

FULL, PAPER, AUTO = "full", "paper", "auto"
DIRECTORIES = {"hard": "adapters", "easy": "adapters_easy"}
SINGLES = ("sh3_rev", "sort_inter")


@dataclass(frozen=True)
class Bar:
    """An expected exact match: within a tolerance, or at least."""

    expected: float
    tolerance: float | None = None

    def holds(self, found: float) -> bool:
        """Whether a measured exact match meets it."""
        if self.tolerance is None:
            return found >= self.expected
        return abs(found - self.expected) <= self.tolerance

    def __str__(self) -> str:
        if self.tolerance is None:
            return f">= {self.expected:.3f}"
        return f"{self.expected:.3f} +- {self.tolerance:.3f}"


@dataclass(frozen=True)
class Part:
    """Adapters that become one model (none: the base), and the tasks it is judged on."""

    adapters: tuple[str, ...]
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the table: the mean over its parts and over seeds 0, 1, ...

    `values` are those of the Python call; without a method the adapters are judged as they are.
    """

    suite: str
    parts: tuple[Part, ...]
    method: str = ""
    values: Mapping[str, object] = field(default_factory=dict)
    says: str = ""
    seeds: int = 1
    bar: Bar | None = None

    @property
    def name(self) -> str:
        """The command without its adapters, or what it says."""
        flags = [
            f"-{key} {value}" if len(key) == 1 else f"--{key.strip('_')} {value}"
            for key, value in self.values.items()
        ]
        return self.says or " ".join([self.method, *flags])


Wanted = Mapping[tuple[object, str], Bar]


def merges(
    method: str,
    bars: Wanted | None = None,
    *,
    ranks: Sequence[object] = (FULL, 16),
    scales: Sequence[str] = (PAPER, AUTO),
    seeds: int = 1,
    **values: object,
) -> list[Row]:
    """Both suites' eight adapters merged at each rank and scale.

    Bars and more than one seed are for the hard suite; a rank of None leaves it to the method.
    """
    return [
        Row(
            suite=suite,
            parts=(Part(tuple(f"{directory}/{task}" for task in SUITES[suite]), SUITES[suite]),),
            method=method,
            values={**values, **({} if rank is None else {"rank": rank}), "scale": scale},
            seeds=seeds if suite == "hard" else 1,
            bar=(bars or {}).get((rank, scale)) if suite == "hard" else None,
        )
        for suite, directory in DIRECTORIES.items()
        for rank in ranks
        for scale in scales
    ]


def references() -> list[Row]:
    """What merges lie between: the base alone, and each task's own adapter."""
    return [
        row
        for suite, directory in DIRECTORIES.items()
        for row in (
            Row(suite, (Part((), SUITES[suite]),), says="base"),
            Row(
                suite,
                tuple(Part((f"{directory}/{task}",), (task,)) for task in SUITES[suite]),
                says="each task's own adapter",
            ),
        )
    ]


def single(directory: str) -> tuple[Part, ...]:
    """Two tasks' adapters of compress/, each judged on its own task."""
    return tuple(Part((f"compress/{directory.format(task)}",), (task,)) for task in SINGLES)


JOINT = (Part(("compress/joint8_r32",), SUITES["hard"]),)

ROWS: list[Row] = [
    *references(),
    *merges("arithmetic"),
    *merges(
        "arithmetic",
        {(FULL, PAPER): Bar(0.341, 0.01), (16, PAPER): Bar(0.279, 0.01)},
        scales=[PAPER],
        lambda_=0.4,
    ),
    *merges(
        "ties",
        {(FULL, PAPER): Bar(0.235, 0.02), (16, PAPER): Bar(0.194, 0.02)},
        scales=[PAPER, AUTO, "norm", "ls"],
        space="dense",
        density=0.2,
    ),
    *merges("ties", {(FULL, PAPER): Bar(0.247, 0.02)}, space="knots", density=0.2),
    *merges("ties", {(FULL, PAPER): Bar(0.180, 0.02)}, space="core", density=0.2),
    *merges("magnitude", scales=[PAPER], lambda_=0.4, density=0.5, space="dense"),
    *merges("magnitude", scales=[AUTO], density=0.5, space="dense"),
    *merges("dare", scales=[PAPER], seeds=3, lambda_=0.4, density=0.2, space="dense"),
    *merges("dare", scales=[AUTO], seeds=3, density=0.2, space="dense"),
    *merges("magnitude", ranks=[16], scales=[AUTO]),
    *merges("dare", ranks=[16], scales=[AUTO]),
    *merges("della", ranks=[16], scales=[AUTO]),
    *merges("breadcrumbs", ranks=[16], scales=[AUTO]),
    *merges("ties", ranks=[16], scales=[AUTO], trim_scope="model"),
    *merges("sce", ranks=[16], scales=[AUTO]),
    *merges("consensus", ranks=[16], scales=[AUTO]),
    *merges("karcher", ranks=[16]),
    *merges("stock", ranks=[16]),
    *merges(
        "tsv",
        {
            (FULL, PAPER): Bar(0.639, 0.01),
            (32, PAPER): Bar(0.640, 0.01),
            (16, PAPER): Bar(0.607, 0.01),
        },
        ranks=[FULL, 32, 16],
    ),
    *merges("arithmetic", calibrate="pico"),
    *merges("arithmetic", calibrate="svc"),
    *merges("tsv", calibrate="pico"),
    *merges("tsv", calibrate="svc"),
    *merges("iso"),
    *merges("star"),
    *merges("wudi"),
    *merges("ctm", ranks=[16]),
    *merges("ctm", ranks=[16], scales=[AUTO], rule="sum", sparsify="none"),
    *merges("ctm", ranks=[16], scales=[AUTO], seeds=3, sparsify="dare", density=0.5),
    *merges("ctm", ranks=[16], scales=[AUTO], seeds=3, sparsify="della", density=0.5),
    *merges("ctm", ranks=[16], scales=[AUTO], sparsify="breadcrumbs"),
    *merges("decorrelate", {(16, PAPER): Bar(0.69)}),
    *merges(
        "cluster",
        {(None, PAPER): Bar(0.35, 0.04)},
        ranks=[None],
        scales=[PAPER, AUTO],
        seeds=5,
        k=16,
        gauge="svd",
    ),
    *merges("cluster", ranks=[None], scales=["norm", "ls"], k=16, gauge="svd"),
    # The bar was measured with 3 restarts of k-means and l2 reweighting.
    *merges(
        "cluster",
        {(None, AUTO): Bar(0.39, 0.04)},
        ranks=[None],
        seeds=5,
        k=16,
        gauge="balanced",
        restarts=3,
        reweight="l2",
    ),
    *merges("cluster", ranks=[None], k=16, gauge="balanced"),
    *merges("cluster", ranks=[None], k=16, gauge="raw"),
    *merges("cluster", ranks=[None], k=32, gauge="svd"),
    Row("one", single("{}_r32"), says="trained at rank 32"),
    Row("one", single("{}_r32"), "squeeze", {"rank": 4}, bar=Bar(0.99)),
    Row("one", single("{}_r4_direct"), says="trained at rank 4"),
    Row("one", single("{}_r32"), "squeeze", {"rank": 2}),
    Row("one", single("{}_r2_direct"), says="trained at rank 2"),
    Row("one", single("{}_r32"), "squeeze", {"rank": 1}),
    Row("one", single("{}_r1_direct"), says="trained at rank 1"),
    Row("joint", JOINT, says="trained at rank 32"),
    Row("joint", JOINT, "squeeze", {"rank": 8}),
    Row("joint", JOINT, "squeeze", {"rank": 4}, bar=Bar(0.94)),
    Row("joint", JOINT, "squeeze", {"rank": 4, "allocate": "relative"}),
    Row("joint", JOINT, "squeeze", {"rank": 2}),
]
