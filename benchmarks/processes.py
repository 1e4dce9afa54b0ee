"""Processes of their own, measured: seconds, processor time, peak memory, and on what machine.

Whoever imports this should not import numpy or torch: Linux counts a parent's memory into the peak
of its children.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

Command: TypeAlias = list[str]
# Variables that would change our defaults.
DROPPED = ("PYTHON", "LORAMERGE_", "OMP_", "OPENBLAS_", "MKL_")


@dataclass(frozen=True)
class Sample:
    """One run: seconds by the clock and of processor, peak memory in bytes, what was printed."""

    wall: float
    cpu: float
    peak: int
    printed: str = ""


@dataclass(frozen=True)
class Place:
    """A directory where commands run, with an empty `out` in it for each run."""

    path: Path

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, cleaned; bytecode is cached, as for an installed package."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(DROPPED)}
        return {**kept, "PYTHONPYCACHEPREFIX": str(self.path / "bytecode")}

    def run(self, *commands: Command) -> Sample:
        """Run commands one after the other as one sample. Raises RuntimeError if one fails."""
        shutil.rmtree(self.path / "out", ignore_errors=True)
        (self.path / "out").mkdir()
        cpu, peak, printed = 0.0, 0, ""
        environment = self.environment
        began = time.perf_counter()
        for command in commands:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, env=environment, cwd=self.path, text=True
            )
            assert process.stdout is not None
            printed += process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            process.stdout.close()
            if process.returncode:
                raise RuntimeError(f"exit code {process.returncode}: {' '.join(command)}")
            cpu += usage.ru_utime + usage.ru_stime
            peak = max(peak, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
        return Sample(time.perf_counter() - began, cpu, peak, printed)


def machine(place: Place) -> Mapping[str, Any]:
    """What figures are taken on."""
    code = "import json, numpy as n; c = n.show_config('dicts')['Build Dependencies']['blas']"
    code += "; print(json.dumps([n.__version__, c['name'] + ' ' + c['version']]))"
    numpy, blas = json.loads(place.run([sys.executable, "-c", code]).printed)
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "system": platform.platform(),
        "python": platform.python_version(),
        "numpy": numpy,
        "blas": blas,
        "load_before": os.getloadavg()[0],
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
