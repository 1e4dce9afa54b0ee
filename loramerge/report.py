"""What a run did, measured on the file as written: data first, then JSON and Markdown."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from loramerge.adapter import public_base
from loramerge.beside import flawed
from loramerge.errors import listed
from loramerge.plan import Plan

__all__ = ["SCHEMA_VERSION", "ModuleReport", "Report", "whole_energy", "whole_error"]

SCHEMA_VERSION = 1
# Above this condition a method that sets updates apart has nothing left to set apart: two updates
# are then within some 5 % of each other.
COPIES = 1e3
# A squared norm below this share of what it is measured against is that of rounding.
NOTHING = 1e-12


class ModuleReport(Struct, frozen=True):
    """One module: ranks, and squared norms of the exact weighted sum, the result, and their gap.

    `condition` is that of the problem the method solved, where it reports one.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int
    stored_rank: int
    target: float
    result: float
    inner: float
    error: float
    condition: float | None = None

    @property
    def relative_error(self) -> float:
        """||result - sum|| / ||sum||; infinite where the sum is zero and the result is not."""
        return _relative(self.error, self.target)

    @property
    def energy(self) -> float:
        """The share of the sum's squared norm along the result; of a truncation, what it keeps."""
        if self.target == 0 or self.result == 0:
            return 1.0 if self.target == self.result else 0.0
        return min(self.inner**2 / (self.target * self.result), 1.0)


def whole_error(modules: Sequence[ModuleReport]) -> float:
    """The relative error over all modules of an adapter."""
    return _relative(sum(m.error for m in modules), sum(m.target for m in modules))


def whole_energy(modules: Sequence[ModuleReport]) -> float:
    """The retained energy over all modules of an adapter."""
    target = sum(module.target for module in modules)
    if target == 0:
        return min(module.energy for module in modules)
    return sum(m.energy * m.target for m in modules) / target


class Report(Struct, frozen=True):
    """Everything a user must know about one result.

    `scale` is the factor on the merge before truncation, `others` what the other policies would
    have been; `tensors_sha256` covers names, dtypes, shapes and bytes in name order. `not_finite`
    are the keys of what is carried beside the modules, and holds NaN or Inf.
    """

    plan: Plan
    modules: tuple[ModuleReport, ...]
    scale: float
    others: Mapping[str, float]
    sources_sha256: tuple[str, ...]
    tensors_sha256: str
    tensors: int
    file_bytes: int
    seconds: float
    device: str
    machine: str
    versions: Mapping[str, str]
    companions: Mapping[str, bytes]
    not_finite: tuple[str, ...]

    @property
    def relative_error(self) -> float:
        """The error of the whole adapter against the exact weighted sum."""
        return whole_error(self.modules)

    @property
    def energy(self) -> float:
        """The retained energy of the whole adapter."""
        return whole_energy(self.modules)

    @property
    def median_error(self) -> float:
        """The median over modules of their relative errors."""
        from statistics import median

        return median(module.relative_error for module in self.modules)

    @property
    def worst(self) -> ModuleReport:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda module: module.relative_error)

    @property
    def rank(self) -> tuple[int, int]:
        """Smallest and largest kept rank."""
        kept = [module.rank for module in self.modules]
        return min(kept), max(kept)

    @property
    def total(self) -> int:
        """Modules of the inputs, those left out included."""
        return len(self.plan.alignment.modules) + len(self.plan.alignment.left_out)

    @property
    def merged(self) -> int:
        """Modules in the file."""
        return len(self.modules) - len(self.empty)

    @property
    def empty(self) -> list[str]:
        """Modules that kept no rank and are not in the file."""
        return [module.name for module in self.modules if module.stored_rank == 0]

    @property
    def zero(self) -> list[str]:
        """Modules whose weighted sum is zero, to the rounding of float64."""
        return [module.name for module in self.modules if module.target == 0]

    @property
    def lost(self) -> list[str]:
        """Modules that are in the file with nothing, or only rounding, left in them."""
        return [
            module.name
            for module in self.modules
            if module.stored_rank > 0 and module.result < NOTHING * module.target
        ]

    @property
    def few(self) -> list[str]:
        """Modules whose result has fewer terms than the plan allowed."""
        return [m.name for m in self.modules if m.rank < self.plan.ranks[m.name]]

    @property
    def condition(self) -> float | None:
        """The largest condition of a module, where the method reports them."""
        return max((m.condition for m in self.modules if m.condition is not None), default=None)

    @property
    def against(self) -> str:
        """What energy and error are measured against."""
        method = self.plan.recipe.method
        if method.removes:
            return "the first adapter"
        return "the exact weighted sum" if method.takes == "many" else "the input"

    @property
    def padded(self) -> int:
        """Modules stored with more ranks than they kept."""
        return sum(module.rank < module.stored_rank for module in self.modules)

    @property
    def notes(self) -> list[str]:
        """What was dropped, padded, assumed, left out."""
        notes = [*self.plan.notes, *flawed(self.not_finite)]
        if self.zero:
            which = "every module" if len(self.zero) == len(self.modules) else listed(self.zero)
            notes.append(f"the weighted sum is zero in {which}")
        if self.lost:
            which = "any module" if len(self.lost) == len(self.modules) else listed(self.lost)
            notes.append(f"nothing is left in {which}")
        if self.empty:
            notes.append(f"{len(self.empty)} modules kept no rank and are not in the file")
        if self.plan.recipe.method.rank_option and self.few:
            notes.append(
                f"{len(self.few)} modules have fewer distinct components than were asked for; all "
                "are kept"
            )
        apart = self.plan.recipe.method.orthogonal(self.plan.options)
        if apart and (near := sum((module.condition or 0.0) > COPIES for module in self.modules)):
            notes.append(
                f"{near} modules are near copies of each other in these adapters (condition up to "
                f"{self.condition:.1e}); to average them: loramerge arithmetic with weights that "
                "add up to 1"
            )
        if self.padded:
            how = "zero-padded to the stored rank (exact)"
            if self.plan.options.trains_on:
                how = "filled up to the stored rank with terms that begin as in PEFT (B is zero)"
            notes.append(f"{how}: {self.padded} of {len(self.modules)} modules")
        return notes

    def as_json(self) -> dict[str, Any]:
        """The report as one JSON object: no timestamps, no paths; null where a number is none."""
        plan, record = self.plan, self.plan.record(self.sources_sha256)
        weights = {module.name: module.weights for module in plan.alignment.modules}
        return {
            "schema_version": SCHEMA_VERSION,
            "recipe": msgspec.to_builtins(record.recipe),
            "layout": plan.layout.name,
            "dtype": plan.dtype,
            "device": self.device,
            "machine": self.machine,
            "versions": dict(self.versions),
            "sources": [
                {
                    **msgspec.to_builtins(source),
                    "weight": named.weight,
                    "base_model": public_base(adapter),
                    "licence": adapter.licence,
                }
                for adapter, named, source in zip(
                    plan.adapters, plan.recipe.adapters, record.sources, strict=True
                )
            ],
            "scale": {"used": plan.recipe.scale, "factor": self.scale, "others": dict(self.others)},
            "scale_assumed": any(adapter.scale_assumed for adapter in plan.adapters),
            "modules_total": self.total,
            "modules_merged": self.merged,
            "rank": list(self.rank),
            "relative_error": _finite(self.relative_error),
            "worst_module": self.worst.name,
            "median_error": _finite(self.median_error),
            "retained_energy": self.energy,
            "condition": self.condition,
            "notes": self.notes,
            "not_finite": list(self.not_finite),
            "modules": [
                {
                    "name": m.name,
                    "weights": list(weights[m.name]),
                    "ranks": list(m.ranks),
                    "rank": m.rank,
                    "relative_error": _finite(m.relative_error),
                    "retained_energy": round(m.energy, 9),
                    "condition": m.condition,
                }
                for m in self.modules
            ],
            "tensors_sha256": self.tensors_sha256,
        }


def _relative(error: float, target: float) -> float:
    """Square root of a quotient of squared norms; infinite where only the target is zero."""
    if target > 0:
        return math.sqrt(max(error, 0.0) / target)
    return math.inf if error > 0 else 0.0


def _finite(value: float) -> float | None:
    """A number JSON can hold."""
    return value if math.isfinite(value) else None
