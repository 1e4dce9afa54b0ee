"""Where and how numbers are computed: device, dtypes, threads. Decided here and nowhere else."""

import importlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias, cast

from msgspec import Struct

from loramerge._lazy import np, threadpoolctl, torch
from loramerge.adapter import Array, LowRank
from loramerge.errors import UsageError

__all__ = [
    "FLOOR",
    "SAVE_DTYPES",
    "Compute",
    "DType",
    "accelerator",
    "encode",
    "finite",
    "flaw",
    "holds_numbers",
    "out_of_memory",
    "own_process",
    "resolve",
    "save_dtype",
    "single_threaded_blas",
]

DType: TypeAlias = Literal["float32", "float64"]
SAVE_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
# What rounding both factors to a dtype costs: ||B'A' - BA|| / ||BA|| of normally distributed
# factors, median over ranks 1 to 64 and shapes 256 to 1024 (spread below 4 %).
FLOOR = {"F32": 3.6e-8, "F16": 2.9e-4, "BF16": 2.3e-3}
# Largest finite float16; what lies above becomes infinite.
FLOAT16_MAX = 65504.0
# Infinity as a whole number of the same size: NaN is above, and both have a sign before them.
INFINITY = {
    "F64": ("int64", 0x7FF << 52),
    "F32": ("int32", 0x7F800000),
    "F16": ("int16", 0x7C00),
    "BF16": ("int16", 0x7F80),
    "F8_E5M2": ("int8", 0x7C),
    "F8_E4M3": ("int8", 0x7F),
}
# A GPU pays where delta weights are formed, from this many entries on: importing torch costs what
# sixteen cores need for these. Thin methods are at home on the CPU.
GPU_ENTRIES = 10**9

# Modules at once: on a GPU what fills it, on the CPU what spares the interpreter's time without
# leaving the cache.
GPU_BATCH, CPU_BATCH, CPU_ENTRIES = 64, 8, 2**20

# Objects between two looks for cycles: what one command makes is mostly kept to its end.
FEW_OBJECTS = 50_000

# glibc's numbers for when its malloc gives memory back to the kernel, and when it asks it directly.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 1 << 30  # bytes


class Compute(Struct, frozen=True):
    """A resolved choice: device name, dtype of the factors, worker threads on the CPU."""

    device: str = "cpu"
    dtype: DType = "float32"
    threads: int = 1

    @property
    def on_cpu(self) -> bool:
        """Whether NumPy computes."""
        return self.device == "cpu"

    def batch(self, entries: int) -> int:
        """How many modules of equal shape are computed at once, where each has so many entries."""
        return min(max(CPU_ENTRIES // entries, 1), CPU_BATCH) if self.on_cpu else GPU_BATCH

    def load(self, arrays: list[Array]) -> Array:
        """Arrays of equal shape as one batch on the device, in the compute dtype."""
        cast_to = [array.astype(self.dtype, copy=False) for array in arrays]
        stacked = cast_to[0][None] if len(arrays) == 1 else np.stack(cast_to)
        return stacked if self.on_cpu else cast(Array, torch.from_numpy(stacked).to(self.device))

    def unload(self, batch: Array) -> Array:
        """A batch back as a numpy array."""
        return batch if self.on_cpu else cast("torch.Tensor", batch).cpu().numpy()

    def machine(self) -> str:
        """The kind of machine, as far as it decides how sums are rounded.

        The processor and the kernels that numpy's BLAS has chosen for it, or the name of the GPU.
        """
        if not self.on_cpu:
            return str(torch.cuda.get_device_name(self.device))
        libraries = threadpoolctl.threadpool_info()
        blas = [
            lib for lib in libraries if lib["user_api"] == "blas" and "numpy" in lib["filepath"]
        ]
        kernels = [f"{lib['internal_api']} {lib.get('architecture', '')}".strip() for lib in blas]
        return " ".join([platform.machine(), *kernels])

    def versions(self) -> dict[str, str]:
        """What computed, by distribution: numpy, or torch beside it."""
        found = {"numpy": np.__version__}
        return found if self.on_cpu else {**found, "torch": torch.__version__}


def resolve(device: str, dtype: DType, formed: int = 0) -> Compute:
    """Turn `--device auto|cpu|cuda[:N]` into a device that is there.

    `formed` is how many entries of delta weights the job forms: `auto` takes a GPU only for one
    large enough to pay for it. Raises UsageError for a device that is not there.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    threads = len(affinity(0)) if affinity else os.cpu_count() or 1
    if device == "auto":
        device = (
            "cuda"
            if formed >= GPU_ENTRIES and _may_have_cuda() and torch.cuda.is_available()
            else "cpu"
        )
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: torch finds no CUDA device.", "leave --device out")
    if device != "cpu":  # torch loads its solvers at first use, which no two threads may be
        torch.linalg.cholesky(torch.eye(1, device=device))
    return Compute(device, dtype, threads)


def _may_have_cuda() -> bool:
    """Whether a driver is there at all, asked without the second it takes to import torch."""
    return Path("/dev/nvidiactl").exists() or Path("/proc/driver/nvidia").exists()


def accelerator() -> str | None:
    """The name of the GPU torch would compute on, if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return None


def own_process() -> None:
    """Settings for a process that is ours alone, before numpy is imported.

    OpenBLAS starts no team of threads. glibc keeps what is freed: every module needs arrays of the
    same few sizes, and fresh pages from the kernel cost as much as the arithmetic on them. Python
    looks for cycles among its objects rarely, and not at all on the way out.
    """
    import atexit
    import ctypes
    import gc

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    gc.set_threshold(FEW_OBJECTS)
    atexit.register(gc.freeze)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc
    for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        mallopt(parameter, KEPT)


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """One BLAS thread per worker: results do not depend on the machine, and teams do not spin."""
    importlib.import_module("numpy")  # loads the BLAS library, so that the limit finds it
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        yield


def out_of_memory(error: Exception) -> bool:
    """Whether a failure says that the device is full."""
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError")


def finite(update: LowRank) -> bool:
    """Whether every entry of a CPU update is a number: the sum of squares is, only if each is."""
    with np.errstate(all="ignore"):
        if np.isfinite(np.vdot(update.A, update.A) + np.vdot(update.B, update.B)):
            return True
    return bool(np.isfinite(update.A).all() and np.isfinite(update.B).all())


def flaw(update: LowRank) -> str:
    """What an update that is not finite holds."""
    return "NaN" if bool(np.isnan(update.A).any() or np.isnan(update.B).any()) else "Inf"


def holds_numbers(data: bytes | memoryview, dtype: str) -> bool:
    """Whether no stored float is NaN or Inf, by the bits: in a fifth of the time of their hash."""
    if dtype not in INFINITY:
        return True
    signed, infinity = INFINITY[dtype]
    bits = np.frombuffer(data, signed)
    negative = -np.iinfo(signed).min  # what a sign adds where it is read as a digit
    return bool(
        bits.max(initial=0) < infinity
        and bits.view(f"u{signed}").max(initial=0) < negative + infinity
    )


def save_dtype(wanted: str, found: set[str]) -> str:
    """The stored dtype of a result: the one asked for, the inputs' common one, or F32."""
    if wanted != "auto":
        return SAVE_DTYPES[wanted]
    only = next(iter(found)) if len(found) == 1 else "F32"
    return only if only in ("F16", "BF16") else "F32"


def encode(x: Array, dtype: str) -> Array:
    """A float array as it is stored: bfloat16 as uint16, and all to nearest even."""
    if dtype in ("F32", "F64"):
        return np.ascontiguousarray(x, np.float32 if dtype == "F32" else np.float64)
    if dtype == "F16":
        with np.errstate(over="ignore"):  # becomes infinite, and is named where it is measured
            return np.ascontiguousarray(x, np.float16)
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = bits >> 16  # in place from here on: temporaries of this size cost page faults
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)
