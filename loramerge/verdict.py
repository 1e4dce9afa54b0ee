"""Whether a result made again is the one there was: bit for bit, or how far from it."""

import hashlib

import msgspec
from msgspec import Struct

from loramerge._lazy import np
from loramerge.adapter import Adapter, TensorSource
from loramerge.difference import difference
from loramerge.errors import GateError, LoramergeError
from loramerge.record import tensors_sha256
from loramerge.retrace import Made, Remade

__all__ = ["Measured", "Verdict", "digest_of", "judge"]

# What another machine or version may change: units in the last place, or a share of a delta weight.
ULPS = 1
RELATIVE = 1e-6
# How the stored dtypes are seen as whole numbers in the order of their values.
BITS = {"BF16": "int16", "F16": "int16", "F32": "int32", "F64": "int64"}


class Measured(msgspec.Struct, frozen=True):
    """What loramerge.json adds to the record in the header."""

    tensors_sha256: str
    device: str
    machine: str
    versions: dict[str, str]


class Verdict(Struct, frozen=True):
    """How near the result made again is to the one there was.

    `ulps` is the largest distance of two entries in units of the last place, None where tensors
    differ in more than values; `relative` the largest relative error of a delta weight. Both are 0
    where every bit is the same.
    """

    made: Made
    ulps: int | None
    relative: float
    where: str

    @property
    def same(self) -> bool:
        """Whether every bit is the same."""
        return self.ulps == 0

    @property
    def text(self) -> str:
        """In words."""
        if self.same:
            return f"the same tensors, bit for bit ({self.made.tensors_sha256[:16]})"
        if self.ulps is not None and self.ulps <= ULPS:
            return f"within {self.ulps} unit in the last place of each number; {self.where}"
        return f"within {self.relative:.2g} of every delta weight; {self.where}"


def digest_of(source: TensorSource) -> str:
    """The hash over all tensors of a file."""
    digests = {key: hashlib.sha256(source.read(key)).hexdigest() for key in source.tensors}
    return tensors_sha256(source.tensors, digests)


def judge(
    output: str,
    there: Adapter,
    digest: str,
    measured: Measured | None,
    again: Remade,
) -> Verdict:
    """Compare the file `there` was, of this digest, with the one made `again`.

    Raises GateError where they differ by more than the machines and versions explain.
    """
    made = again.made
    if made.tensors_sha256 == digest:
        return Verdict(made, 0, 0.0, "")
    here = Measured(made.tensors_sha256, made.device, made.machine, dict(made.versions))
    alike = measured is not None and _kind(measured) == _kind(here)
    ulps, relative = _ulps(there.source, again.adapter.source), _relative(there, again.adapter)
    where = f"made on {_kind(measured) if measured else 'an unknown machine'}, here {_kind(here)}"
    near = ulps is not None and ulps <= ULPS
    if alike or not (near or relative <= RELATIVE):
        apart = "other tensors" if ulps is None else f"{ulps} units in the last place"
        raise GateError(
            f"{output} comes out different: {apart}, {relative:.2g} of a delta weight; {where}.",
            "the same versions on the same kind of machine give the same bits",
        )
    return Verdict(made, ulps, relative, where)


def _kind(measured: Measured) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in sorted(measured.versions.items()))
    return f"{measured.machine} ({measured.device}) with {versions}"


def _ulps(a: TensorSource, b: TensorSource) -> int | None:
    """The largest distance of two entries in units of the last place."""
    if a.tensors.keys() != b.tensors.keys():
        return None
    largest = 0
    for key, info in a.tensors.items():
        other = b.tensors[key]
        if (info.dtype, info.shape) != (other.dtype, other.shape):
            return None
        if info.dtype in BITS:
            x, y = (_ordered(source.read(key), BITS[info.dtype]) for source in (a, b))
            largest = max(largest, int(np.max(np.abs(x - y), initial=0)))
        elif a.read(key) != b.read(key):
            return None
    return largest


def _ordered(data: bytes, dtype: str) -> "np.typing.NDArray[np.int64]":
    """Stored floats as whole numbers, neighbours one apart, both zeros 0."""
    bits = np.frombuffer(data, dtype).astype(np.int64)
    return np.where(bits < 0, np.iinfo(dtype).min - bits, bits)


def _relative(there: Adapter, again: Adapter) -> float:
    try:
        return max(module.relative for module in difference(there, again).modules)
    except LoramergeError:
        return float("inf")
