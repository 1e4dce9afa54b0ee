"""The verify command: is an adapter sound, and who will load it right?"""

import hashlib
import json
import re
import shlex
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import click

from loramerge.cli.command import Command, Flag, Words
from loramerge.cli.flags import ADAPTER, INPUTS, SHOWN
from loramerge.cli.terminal import Row, print_rows
from loramerge.errors import GateError, UsageError, listed
from loramerge.options import did_you_mean

if TYPE_CHECKING:
    from loramerge.adapter import Adapter
    from loramerge.consumers import Verdict

__all__ = ["COMMANDS"]

# The programs of loramerge.consumers, named here so that help starts without it.
PROGRAMS = (
    "peft",
    "peft-hotswap",
    "transformers",
    "vllm",
    "sglang",
    "llama.cpp",
    "ollama",
    "mlx",
    "diffusers",
)
VLLM_MAX_RANK = 16
CONVERSION = re.compile(r"loramerge convert \{0\} --to (\w+)")
# A difference up to this many roundings of the stored dtype is rounding.
SLACK = 4


def verify(
    adapter: str,
    consumers: str | None,
    max_rank: int,
    against: str | None,
    alpha: tuple[float, ...],
    from_: tuple[str, ...],
    json: bool,
    quiet: bool,
) -> None:
    """Check an adapter: every number, its hashes, and what each program would make of it.

    A program is right, has the wrong scale (it loads the adapter without a word, and computes
    something else), or refuses it; beside it stands the reason, and the command that mends it. The
    rules are those of the programs' loaders; nothing is loaded. --for names programs that must be
    right, --against an adapter with which the delta weights must agree: exit code 3 if not.
    """
    from loramerge.cli.inputs import named_adapters, opened
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json
    from loramerge.consumers import CONSUMERS
    from loramerge.io._hub import fetch

    asked = _asked(consumers)
    both = [adapter] if against is None else [adapter, against]
    one, *other = opened(named_adapters(both, (), alpha, from_))
    with progress(quiet or json) as listen:
        fetch([one, *other], listen)
    broken = _unsound(one)
    failed = [f"{listed(broken, 3)} hold NaN or Inf"] if broken else []
    hashes = _hashes(one)
    if hashes is False:
        failed.append("its tensors are not those that loramerge.json was written for")
    judged = {name: CONSUMERS[name](one, max_rank) for name in asked or CONSUMERS}
    verdicts = {name: _typable(verdict, one) for name, verdict in judged.items()}
    failed += [f"{name}: {v.state}" for name, v in verdicts.items() if asked and v.state != "right"]
    gap = None
    if other and not broken:
        gap, allowed = _gap(one, *other)
        if gap > allowed:
            failed.append(f"it differs from {against} by {gap:.3g}")
    count = len(one.modules)
    if json:
        rows = {
            name: {
                "state": v.state,
                "reason": v.reason,
                "remedy": v.remedy.format(shlex.quote(adapter)),
            }
            for name, v in verdicts.items()
        }
        facts = {"modules": count, "tensors": len(one.source.tensors), "not_finite": broken}
        echo_json({**facts, "hashes": hashes, "consumers": rows, "against": gap})
    else:
        print_rows(_rows(one, adapter, broken, hashes, verdicts, gap), err=False)
    if failed:
        raise GateError(f"{'; '.join(failed)}.", "see above for what to type")


def _asked(consumers: str | None) -> list[str]:
    names = [name.strip() for name in consumers.split(",")] if consumers else []
    for name in names:
        if name not in PROGRAMS:
            close = did_you_mean(name, PROGRAMS)
            raise UsageError(
                f"verify: --for knows no '{name}'.",
                f"did you mean '{close}'?" if close else f"one of: {', '.join(PROGRAMS)}",
            )
    return names


def _typable(verdict: "Verdict", adapter: "Adapter") -> "Verdict":
    """The verdict without its remedy where that is a conversion that would be refused."""
    from msgspec.structs import replace

    from loramerge.conversion import plan_conversion
    from loramerge.errors import IncompatibleError

    found = CONVERSION.match(verdict.remedy)
    if found is None:
        return verdict
    try:
        with TemporaryDirectory() as place:
            plan_conversion(adapter, found[1], f"{place}/x", extras="drop")
    except IncompatibleError:
        return replace(verdict, remedy="")
    return verdict


def _unsound(adapter: "Adapter") -> list[str]:
    """Modules, and tensors beside them, with a number that is none."""
    from loramerge.compute import finite, holds_numbers

    modules = [name for name in adapter.modules if not finite(adapter.read(name))]
    beside = [extra.key for extra in adapter.extras]
    beside += [
        key
        for module in adapter.modules.values()
        for role, key in module.keys.items()
        if role in ("magnitude", "dora_scale")
    ]
    source = adapter.source
    dtypes = {key: source.tensors[key].dtype for key in beside}
    return modules + [key for key in beside if not holds_numbers(source.read(key), dtypes[key])]


def _hashes(adapter: "Adapter") -> bool | None:
    """Whether the tensors are those the record beside them was written for; None without one."""
    from loramerge.record import tensors_sha256

    path = adapter.source.path.parent / "loramerge.json"
    if not path.is_file():
        return None
    try:
        stated = json.loads(path.read_text("utf-8")).get("tensors_sha256")
    except (ValueError, AttributeError):
        return False
    tensors = adapter.source.tensors
    digests = {key: hashlib.sha256(adapter.source.read(key)).hexdigest() for key in tensors}
    return bool(stated == tensors_sha256(tensors, digests))


def _gap(one: "Adapter", other: "Adapter") -> tuple[float, float]:
    """The relative difference of two adapters, and what rounding explains."""
    from loramerge.compute import FLOOR
    from loramerge.difference import difference

    dtypes = {dtype for adapter in (one, other) for dtype in adapter.dtypes}
    allowed = SLACK * max(FLOOR.get(dtype, FLOOR["F32"]) for dtype in dtypes)
    return difference(one, other).whole.relative, allowed


def _rows(
    adapter: "Adapter",
    typed: str,
    broken: list[str],
    hashes: bool | None,
    verdicts: dict[str, "Verdict"],
    gap: float | None,
) -> list[Row]:
    tensors = {key for module in adapter.modules.values() for key in module.keys.values()}
    known = len(tensors | {extra.key for extra in adapter.extras})
    total = len(adapter.source.tensors)
    rows = [
        Row("adapter", f"{typed}, {adapter.layout} layout"),
        Row("coverage", f"{len(adapter.modules)} modules, {known} of {total} tensors"),
        Row("numbers", f"not finite in {listed(broken, 3)}" if broken else "all finite"),
    ]
    if hashes is not None:
        said = "as loramerge.json says" if hashes else "not those of loramerge.json"
        rows.append(Row("hashes", said, fg=None if hashes else "red"))
    if gap is not None:
        rows.append(Row("difference", f"{gap:.3g} relative"))
    colours = {"right": "green", "wrong scale": "red", "refused": "yellow"}
    for name, verdict in verdicts.items():
        text = f"{verdict.state}: {verdict.reason}"
        if verdict.remedy:
            text += f"; {verdict.remedy.format(shlex.quote(typed))}"
        rows.append(Row(name, text, fg=colours[verdict.state]))
    return rows


COMMANDS: dict[str, click.Command] = {
    "verify": Command(
        "verify",
        callback=verify,
        params=[
            ADAPTER,
            Flag(
                "consumers",
                "--for",
                type=Words(lambda: PROGRAMS),
                metavar="NAMES",
                help=f"Programs that must load it right, with commas: {', '.join(PROGRAMS)}.",
            ),
            Flag(
                "max_rank",
                "--max-rank",
                type=click.IntRange(min=1),
                default=VLLM_MAX_RANK,
                metavar="N",
                help="The largest rank the server takes.  [default: 16, vLLM's own]",
            ),
            Flag(
                "against",
                "--against",
                type=click.Path(),
                metavar="ADAPTER",
                help="An adapter whose delta weights must be the same, within rounding.",
            ),
            *INPUTS,
            *SHOWN,
        ],
        help=verify.__doc__,
        short_help="Check an adapter: its numbers, hashes, and who will load it right.",
        example="loramerge verify my-adapter --max-rank 16",
    )
}
