"""How fast whole processes are, in pairs with a floor, the plain sum or PEFT: `make bench`.

python benchmarks/speed.py [--quick] [--only W1-arithmetic,W3] [--json out.json] [--strict]

Each row runs our command and its counterpart in turn (A B A B ...), each in a process of its own,
after one warm-up run, with its defaults: sources hashed, output synced and read back. Machines are
noisy, so what counts is the median of the ratios within pairs. The honest floor of a row is
`openssl dgst -sha256` of its inputs, `cp` of one of them and `sync` of the copy.

A row without a floor or a peer is judged by its seconds, which are good on a quiet machine only.
"""

import argparse
import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

from processes import Command, Place, machine

HERE = Path(__file__).resolve().parent
SCHEMA_VERSION = 1
REPEATS = 5
LAYERS = 32


@dataclass(frozen=True)
class Budget:
    """What a row must reach now, and where it should go. `speedup` is a least value."""

    figure: Literal["seconds", "ratio", "memory_gb", "speedup"]
    limit: float
    goal: float


@dataclass(frozen=True)
class Row:
    """One of our commands on one workload, and what it is run against."""

    name: str
    arguments: str
    workload: str | None = None
    adapters: int = 0
    against: Literal["floor", "sum", "linear", "cat", "svd"] | None = None
    budgets: tuple[Budget, ...] = ()
    layers: int | None = None
    slow: bool = False


MEMORY = Budget("memory_gb", 0.5, 0.25)
FLOOR = (Budget("ratio", 4, 2), MEMORY)
LIGHT = (Budget("seconds", 0.25, 0.12),)
PEFT = (Budget("speedup", 6, 10),)
LARGER = Budget("memory_gb", 1, 0.5)
# Every method that promises a time beside that of the sum, by its cost class.
COSTS = {
    "one-shot": ("decorrelate fair iso karcher robust slerp star stock tsv wudi", 3),
    "iterative": ("cluster consensus ctm dare della magnitude sce ties", 6),
}


def promised(name: str, most: float) -> Row:
    """A method and the sum of the same adapters, in pairs."""
    rank = "-k" if name == "cluster" else "-r"
    budgets = Budget("ratio", most, most / 2), LARGER
    count = 2 if name == "slerp" else 4
    return Row(f"sum-{name}", f"{name} {rank} 16", "llama8b", count, "sum", budgets)


ROWS: tuple[Row, ...] = (
    Row("W1-arithmetic", "arithmetic -r 16", "llama8b", 4, "floor", FLOOR),
    Row("W1-arithmetic-2", "arithmetic -r 16", "llama8b", 2, "floor", FLOOR),
    Row("W1-arithmetic-8", "arithmetic -r 16", "llama8b", 8, "floor", (MEMORY,)),
    Row("W1-cluster", "cluster -k 16", "llama8b", 4, "floor", (Budget("seconds", 3.5, 2), MEMORY)),
    Row("W1-squeeze", "squeeze -r 8", "llama8b", 1, "floor", FLOOR),
    *(promised(name, most) for names, most in COSTS.values() for name in names.split()),
    Row("W2-squeeze", "squeeze -r 16", "sdxl", 1, "floor", (MEMORY,)),
    Row("W3", "arithmetic -r 8", "small", 2, None, (Budget("seconds", 0.35, 0.2),)),
    Row("help", "--help", budgets=LIGHT),
    Row("methods", "methods", budgets=LIGHT),
    Row("inspect", "inspect", "llama8b", 1, None, LIGHT),
    Row("peft-linear", "arithmetic -r 16", "llama8b", 4, "linear", PEFT),
    Row("peft-cat", "arithmetic -r 16", "llama8b", 4, "cat", PEFT),
    Row(
        *("peft-svd", "arithmetic -r 16", "llama8b", 4, "svd", (Budget("speedup", 500, 500),)),
        layers=1,
        slow=True,
    ),
)


@dataclass(frozen=True)
class Bench:
    """Where files go, and how often and how large everything runs."""

    place: Place
    layers: int
    repeats: int

    def inputs(self, row: Row, needed: int) -> list[Path]:
        """The adapters of a row; made at first need, for all rows at once, and kept."""
        if row.workload is None:
            return []
        layers = row.layers or self.layers
        script = HERE / "workloads.py"
        version = hashlib.sha256(script.read_bytes()).hexdigest()[:8]
        directory = self.place.path / f"{row.workload}-{layers}"
        marker = directory / "made"
        made = marker.read_text().split() if marker.is_file() else [""]
        if made[0] != version or int(made[1]) < needed:
            arguments = [row.workload, str(directory), "--adapters", str(needed)]
            self.place.run([sys.executable, str(script), *arguments, "--layers", str(layers)])
            marker.write_text(f"{version} {needed}")
        found = [directory / f"a{at}" for at in range(row.adapters)]
        return [p if p.is_dir() else p.with_suffix(".safetensors") for p in found]


def ours(row: Row, inputs: Sequence[Path], out: Path) -> list[Command]:
    command, *options = row.arguments.split()
    writes = ["-q", "-o", str(out)] if options else []
    loramerge = [sys.executable, "-m", "loramerge"]
    return [[*loramerge, command, *map(str, inputs), *options, *writes]]


def floor(inputs: Sequence[Path], out: Path) -> list[Command]:
    files = [str(p / "adapter_model.safetensors" if p.is_dir() else p) for p in inputs]
    hashed = ["openssl", "dgst", "-sha256", *files]
    if shutil.which("openssl") is None:
        code = "import hashlib, sys\nfor p in sys.argv[1:]:\n with open(p, 'rb') as f:\n"
        hashed = [sys.executable, "-c", code + "  hashlib.file_digest(f, 'sha256')", *files]
    return [hashed, ["cp", files[0], str(out)], ["sync", str(out)]]


def counterpart(row: Row, inputs: Sequence[Path], out: Path) -> list[Command]:
    if row.against is None:
        return []
    if row.against == "floor":
        return floor(inputs, out)
    if row.against == "sum":
        return ours(replace(row, arguments="arithmetic -r 16"), inputs, out)
    script = str(HERE / "peft_peer.py")
    return [[sys.executable, script, row.against, str(out), *map(str, inputs)]]


def measure(bench: Bench, row: Row, needed: int) -> dict[str, Any]:
    """Run one row: a warm-up of both sides, then pairs; figures and judged budgets."""
    inputs, out = bench.inputs(row, needed), bench.place.path / "out" / "made"
    sides = [ours(row, inputs, out), counterpart(row, inputs, out)]
    repeats = 1 if row.slow else bench.repeats
    if not row.slow:
        [bench.place.run(*side) for side in sides if side]
    pairs = [[bench.place.run(*side) for side in sides if side] for _ in range(repeats)]
    first = [pair[0] for pair in pairs]
    figures = {
        "seconds": median(sample.wall for sample in first),
        "cpu_seconds": median(sample.cpu for sample in first),
        "memory_gb": max(sample.peak for sample in first) / 1e9,
    }
    notes = []
    if row.against:
        figures["against_seconds"] = median(pair[1].wall for pair in pairs)
        figures["ratio"] = median(pair[0].wall / pair[1].wall for pair in pairs)
        figures["speedup"] = median(pair[1].wall / pair[0].wall for pair in pairs)
    if row.against == "svd":
        merge = json.loads(pairs[0][1].printed)["merge_seconds"]
        whole = (pairs[0][1].wall + merge * (LAYERS - 1)) / 60
        notes.append(f"all {LAYERS} layers: {whole:.0f} min by PEFT, extrapolated from this one")
    return {
        "name": row.name,
        "command": f"loramerge {row.arguments}",
        "workload": row.workload,
        "adapters": row.adapters,
        "layers": row.layers or bench.layers,
        "against": row.against,
        "repeats": repeats,
        "figures": figures,
        "budgets": [judge(budget, figures) for budget in row.budgets],
        "samples": [[(s.wall, s.cpu, s.peak) for s in pair] for pair in pairs],
        "notes": notes,
    }


def judge(budget: Budget, figures: dict[str, float]) -> dict[str, Any]:
    value = figures[budget.figure]
    reached = (lambda bound: value >= bound) if budget.figure == "speedup" else value.__le__
    return {
        **asdict(budget),
        "value": value,
        "met": bool(reached(budget.limit)),
        "goal_met": bool(reached(budget.goal)),
    }


def unavailable(row: Row, bench: Bench, named: bool) -> str | None:
    """Why a row is not run, if it is not."""
    peer = row.against in ("linear", "cat", "svd")
    if peer and importlib.util.find_spec("peft") is None:
        return "PEFT is not installed"
    if not named and (row.slow or (peer and bench.layers < LAYERS)):
        return f"{'takes minutes' if row.slow else 'quick'}; run it with --only {row.name}"
    return None


def show(result: dict[str, Any]) -> None:
    if "skipped" in result:
        print(f"{result['name']:<16} not run: {result['skipped']}", flush=True)
        return
    f = result["figures"]
    text = f"{result['name']:<16} {f['seconds']:7.3f} s {f['cpu_seconds']:7.2f} s cpu"
    text += f" {f['memory_gb']:6.3f} GB"
    if result["against"]:
        text += f"   {result['against']:<6} {f['against_seconds']:8.3f} s   x{f['ratio']:<7.3g}"
    print(text)
    for b in result["budgets"]:
        sign = ">=" if b["figure"] == "speedup" else "<="
        state = ("met" if b["met"] else "MISSED") + (", goal met" if b["goal_met"] else "")
        bound = f"{b['figure']} {sign} {b['limit']:g} (goal {b['goal']:g})"
        print(f"{'':<16}   {bound:<32} {b['value']:8.3f}  {state}")
    for note in result["notes"]:
        print(f"{'':<16}   {note}")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whole-process speed, paired; budgets beside it.")
    parser.add_argument("--quick", action="store_true", help="1 of 32 layers, one pair, no PEFT")
    parser.add_argument("--only", default="", help="names of rows, with commas between")
    parser.add_argument("--repeats", type=int, help=f"pairs of each row (default {REPEATS})")
    parser.add_argument("--json", type=Path, help="write results to this file")
    parser.add_argument("--data", type=Path, default=HERE.parent / "build" / "benchmarks")
    parser.add_argument("--strict", action="store_true", help="exit 1 if a budget is missed")
    given = parser.parse_args(arguments)
    chosen = [name for name in given.only.split(",") if name]
    if unknown := set(chosen) - {row.name for row in ROWS}:
        parser.error(f"no row {', '.join(sorted(unknown))}; {', '.join(r.name for r in ROWS)}")
    given.data.mkdir(parents=True, exist_ok=True)
    repeats = given.repeats or (1 if given.quick else REPEATS)
    bench = Bench(Place(given.data.resolve()), 1 if given.quick else LAYERS, repeats)
    about = machine(bench.place)
    introduce(about, given.quick)
    results = run(bench, [row for row in ROWS if not chosen or row.name in chosen], chosen)
    missed = [r["name"] for r in results if any(not b["met"] for b in r.get("budgets", ()))]
    print(f"budgets missed: {', '.join(missed) or 'none'}")
    if given.json:
        report = {"schema_version": SCHEMA_VERSION, "quick": given.quick, "machine": about}
        report |= {"rows": results, "missed": missed}
        given.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 1 if missed and given.strict else 0


def run(bench: Bench, rows: Sequence[Row], named: Sequence[str]) -> list[dict[str, Any]]:
    """All rows, each shown as soon as it is measured."""
    results = []
    for row in rows:
        reason = unavailable(row, bench, row.name in named)
        needed = max(r.adapters for r in rows if r.workload == row.workload)
        if reason:
            results.append({"name": row.name, "skipped": reason})
        else:
            results.append(measure(bench, row, needed))
        show(results[-1])
    return results


def introduce(about: Mapping[str, Any], quick: bool) -> None:
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load_before']:.1f}")
    print(f"python {about['python']}, numpy {about['numpy']}, {about['blas']}")
    if shutil.which("openssl") is None:
        print("openssl is not there: the floor hashes with Python's hashlib")
    if quick:
        print(f"quick: 1 of {LAYERS} layers, one pair; budgets are for the whole workloads")


if __name__ == "__main__":
    sys.exit(main())
