"""What the tensors of a PyTorch pickle are, told from its first bytes: nothing of it is run.

torch.save puts `data.pkl` first into its zip, which names the dtype and shape of every tensor, and
the numbers behind it. Of the names in it only those of `_Outline.find_class` mean anything, and
none of them does more than to note what a tensor is.
"""

import io
import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct

from loramerge.io._header import DTYPE_BYTES

__all__ = ["Outlined", "outlines"]

# The local header of a part of a zip, before its name and an extra field: signature, five halves of
# which the third is the kind of compression, three words, the lengths of both.
LOCAL = struct.Struct("<4s5H3I2H")
SIGNATURE, STORED = b"PK\x03\x04", 0
FIRST = b"/data.pkl"
DTYPES = {
    **{"DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16"},
    **{"BFloat16Storage": "BF16", "LongStorage": "I64", "IntStorage": "I32"},
    **{"ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8", "BoolStorage": "BOOL"},
}


class Outlined(Struct, frozen=True):
    """What a tensor is, without its numbers."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


class _Storage(str):
    """The dtype of what is stored; a class without a namespace, so that nothing is put there."""

    __slots__ = ()


# In Python, whose memo is a dictionary: that of the C class grows to any index a file names.
class _Outline(pickle._Unpickler):
    """Notes what tensors are."""

    def find_class(self, module: str, name: str) -> Callable[..., object] | _Storage:
        """What stands for a name of torch. Raises UnpicklingError for any other."""
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _parameter
        if module == "torch" and name in DTYPES:
            return _Storage(DTYPES[name])
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> object:
        """The dtype of numbers that are stored elsewhere in the zip."""
        return pid[1]


def _tensor(storage: object, offset: object, shape: object, *rest: object) -> Outlined:
    if not isinstance(storage, _Storage) or not isinstance(shape, tuple):
        raise pickle.UnpicklingError("no tensor")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise pickle.UnpicklingError("no shape")
    return Outlined(str(storage), shape)


def _parameter(data: object, *rest: object) -> object:
    return data


def outlines(head: bytes, size: int) -> Mapping[str, Outlined] | None:
    """Every tensor of a file of `size` bytes that begins so, by name and in its order.

    None where the beginning does not tell: reading the whole file will say why.
    """
    if len(head) < LOCAL.size:
        return None
    signature, _, _, kind, *_, name, extra = LOCAL.unpack_from(head)
    start = LOCAL.size + name + extra
    called = head[LOCAL.size : LOCAL.size + name]
    if (signature, kind) != (SIGNATURE, STORED) or not called.endswith(FIRST):
        return None
    try:
        found = _Outline(io.BytesIO(head[start:])).load()
    except Exception:  # whatever a file that is none may raise
        return None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        return None
    kept = {key: value for key, value in found.items() if isinstance(value, Outlined)}
    told = len(kept) == len(found) and all(one.nbytes <= size for one in kept.values())
    return kept if told else None
