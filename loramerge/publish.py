"""From a plan to what stands on disk: where, under which name, with which files beside it."""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from loramerge.adapter import Adapter, source_name
from loramerge.card import card
from loramerge.engine import Computed, run
from loramerge.errors import HubError, OutputError, UsageError
from loramerge.events import Listener, silent
from loramerge.io._hub import fetch
from loramerge.io._open import layout
from loramerge.io._write import check_free, staged
from loramerge.plan import Plan
from loramerge.report import Report
from loramerge.settings import RULES

__all__ = [
    "check_apart",
    "companions",
    "default_name",
    "destination",
    "free_place",
    "publish",
    "stem",
]

PROVENANCE = "loramerge.json"
# Where a recipe may be saved.
BESIDE = "save the recipe beside what is written"


def destination(plan: Plan, out: str | None, force: bool) -> Path:
    """Where the result goes; checked before anything is computed.

    Raises OutputError where something stands there already, or where it would replace an input.
    """
    return free_place(plan.adapters, out or default_name(plan), force)


def free_place(adapters: Sequence[Adapter], out: str, force: bool) -> Path:
    """A path at which nothing stands, or what may be replaced, and which is no input.

    Raises OutputError where it is not.
    """
    final = Path(out).expanduser()
    for adapter in adapters:
        if adapter.origin is not None:
            continue  # nothing here that could be replaced
        source = adapter.source.path
        holder = source.parent.resolve()
        taken = holder if Path(adapter.reference).expanduser().is_dir() else holder / source.name
        if final.resolve() in (source.resolve(), taken, *taken.parents):
            raise OutputError(
                f"{out} would replace the input {adapter.reference}.", "choose another place"
            )
    check_free(final, force)
    return final


def check_apart(finals: Sequence[Path], hint: str) -> None:
    """Raise UsageError where a result would be written in the place of another, or into it."""
    known: dict[Path, Path] = {}
    for final in finals:
        if known.setdefault(final.resolve(), final) is not final:
            raise UsageError(f"several results would be written to {final}.", hint)
    for place, final in known.items():
        for above in place.parents:
            if above in known:
                raise UsageError(f"{final} lies in {known[above]}, which is another result.", hint)


def default_name(plan: Plan) -> str:
    """A deterministic name in the current directory: inputs, method, and what bounds the rank."""
    recipe = plan.recipe
    stems = [stem(adapter) for adapter in plan.adapters]
    name = "+".join(stems)
    if len(stems) > 3:
        name = f"{recipe.method.name}-{len(stems)}-{_fingerprint(plan.adapters)}"
    elif recipe.method.surgery or (
        recipe.method.takes == "many" and recipe.method.rank_option is None
    ):
        name = f"{name}-{recipe.method.name}"
    if plan.adapters[0].derived[:1] == ("extract",):
        name = f"{name}-lora"  # after the tuned model, which it is not
    return name + _bound(plan) + ("" if plan.layout.directory else ".safetensors")


def stem(adapter: Adapter) -> str:
    """The name of an input, without directories: what results are named after."""
    if adapter.origin is not None:
        return adapter.origin.stem
    path = Path(adapter.reference).expanduser().resolve()
    if path.name == layout(adapter.layout).weights:
        path = path.parent
    return path.name.removesuffix(".safetensors")


def _bound(plan: Plan) -> str:
    settings, option = plan.recipe.settings, plan.recipe.method.rank_option
    if settings.energy is not None:
        return f"-e{settings.energy:g}"
    if settings.max_error is not None:
        return f"-err{settings.max_error:g}"
    if settings.size is not None:
        return f"-{settings.size}"
    for rule in RULES:
        if (value := getattr(settings, rule)) is not None:
            return f"-{rule.removeprefix('sv_')}{value:g}"
    if plan.recipe.method.chooses_rank and settings.rank is None:
        return f"-{plan.recipe.method.name}"
    if settings.rank == "full":
        return "-full"
    if option is not None and settings.rank is None:
        return f"-{option}{getattr(plan.options, option)}"
    return f"-r{max(plan.ranks.values())}"


def _fingerprint(adapters: Sequence[Adapter]) -> str:
    """Eight digits over references and headers, in order."""
    facts = [
        [source_name(a), {k: [t.dtype, t.shape] for k, t in a.source.tensors.items()}]
        for a in adapters
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def publish(
    plan: Plan,
    final: Path,
    force: bool,
    listen: Listener = silent,
    computed: Computed | None = None,
) -> Report:
    """Compute a plan into `final`: all of it, or nothing. Adapters on the Hub are fetched first."""
    fetch(plan.adapters, listen)
    with staged(final, force) as directory:
        return compute_into(plan, directory, final.name, listen, computed)


def compute_into(
    plan: Plan, directory: Path, name: str, listen: Listener, computed: Computed | None = None
) -> Report:
    """Compute a plan into an empty directory, with the files that belong beside the weights."""
    single = name.endswith(".safetensors")
    weights = directory / (name if single else plan.layout.weights)
    report = run(plan, weights, listen, computed)
    _check_sources(report)
    if not single:
        for companion, content in companions(report).items():
            (directory / companion).write_bytes(content)
        copy_tokenizer(plan.tokenizer, directory)
    return report


def _check_sources(report: Report) -> None:
    """Raise HubError where what was read is not the file that the Hub has."""
    for adapter, digest in zip(report.plan.adapters, report.sources_sha256, strict=True):
        if adapter.origin and adapter.origin.sha256 not in (None, digest):
            raise HubError(
                f"{adapter.reference}: the downloaded file is not the one on the Hub.",
                "remove it from the Hub's cache (hf cache rm) and type it again",
            )


def copy_tokenizer(files: Mapping[str, Path], directory: Path) -> None:
    """Put the files of a tokenizer beside the weights, as they are."""
    for name, path in files.items():
        shutil.copyfile(path, directory / name)


def companions(report: Report) -> dict[str, bytes]:
    """The files that belong beside the weights: config, record, card."""
    facts = report.as_json()
    record = json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    written = {PROVENANCE: record + "\n", "README.md": card(report)}
    texts = {name: text.encode("utf-8", "replace") for name, text in written.items()}
    return {**report.companions, **texts}
