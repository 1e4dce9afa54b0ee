"""Forms of LyCORIS: Tucker cores, Hadamard and Kronecker products, as factors of the same update.

Where the factors of a product would have as many ranks as the update has rows or columns, the
update is formed and stands beside an identity.
"""

import math
from collections.abc import Mapping

from loramerge._lazy import np
from loramerge.adapter import Array, Form, LowRank, Module, TensorInfo, TensorSource
from loramerge.errors import AdapterError, listed
from loramerge.io._grammar import INCOMPLETE
from loramerge.io._source import FLOATS, QUANTISED

__all__ = ["full", "hadamard", "kronecker", "tucker"]

# Dimensions of what has a kernel: of one to three dimensions.
CORES = (3, 4, 5)

Tensors = Mapping[str, TensorInfo]
Roles = Mapping[str, str]


def tucker(name: str, roles: Roles, tensors: Tensors) -> tuple[Module, float]:
    """LoCon with a core: dW = up mid down, up [out, r, 1, 1], mid [r, s, *k], down [s, in, 1, 1].

    Returns the module and the rank that divides alpha, as all here do.
    """
    up, down = (_shape(name, roles, tensors, role, (2, *CORES)) for role in "BA")
    mid = _shape(name, roles, tensors, "mid", CORES)
    fits = up[1] == mid[0] and mid[1] == down[0] and {*up[2:], *down[2:]} <= {1}
    _check(name, fits, up, mid, down)
    return _module(name, roles, tensors, (up[0], down[1], *mid[2:]), mid[0], _tucker), down[0]


def _tucker(source: TensorSource, module: Module) -> LowRank:
    up, mid, down = (source.array(module.keys[role]) for role in ("B", "mid", "A"))
    out, r = up.shape[:2]
    A = np.einsum("rskx,si->rikx", mid.reshape(*mid.shape[:3], -1), down.reshape(down.shape[:2]))
    return LowRank(A=A.reshape(r, module.in_features), B=up.reshape(out, r))


def hadamard(name: str, roles: Roles, tensors: Tensors) -> tuple[Module, float]:
    """LoHa: dW = (w1_a w1_b) * (w2_a w2_b), entry by entry; each with a Tucker core t or none.

    w_a [out, r], w_b [r, in]; with a core t [r, r, *k]: w_a [r, out], w_b [r, in].
    """
    a, b, other, last = (_shape(name, roles, tensors, r) for r in ("w1_a", "w1_b", "w2_a", "w2_b"))
    if "t1" in roles or "t2" in roles:
        core, second = (_shape(name, roles, tensors, role, CORES) for role in ("t1", "t2"))
        fits = core[:2] == (a[0], b[0]) and second[:2] == (other[0], last[0])
        fits = fits and (a[1], b[1], core[2:]) == (other[1], last[1], second[2:])
        _check(name, fits, a, core, b, other, second, last)
        shape: tuple[int, ...] = (a[1], b[1], *core[2:])
        rank = a[0] * other[0]
    else:
        fits = (a[1], other[1], a[0], b[1]) == (b[0], last[0], other[0], last[1])
        _check(name, fits, a, b, other, last)
        shape, rank = (a[0], b[1]), a[1] * other[1]
    return _module(name, roles, tensors, shape, rank, _hadamard), b[0]


def _hadamard(source: TensorSource, module: Module) -> LowRank:
    first, second = (_pair(source, module.keys, f"w{i}", f"t{i}") for i in (1, 2))
    if not first.rank * second.rank < min(module.shape):
        return _beside_identity((first.B @ first.A) * (second.B @ second.A))
    # Khatri-Rao: row by row of B, column by column of A, every product of two terms.
    B = (first.B[:, :, None] * second.B[:, None, :]).reshape(module.out_features, -1)
    A = (first.A[:, None, :] * second.A[None, :, :]).reshape(-1, module.in_features)
    return LowRank(A=A, B=B)


def _pair(source: TensorSource, keys: Roles, stem: str, core: str) -> LowRank:
    """w_a w_b, or w_a t w_b, flattened over the kernel."""
    a, b = (source.array(keys[f"{stem}_{end}"]) for end in "ab")
    if core not in keys:
        return LowRank(A=b.reshape(b.shape[0], -1), B=a)
    t = source.array(keys[core])
    A = np.einsum("ijx,jq->iqx", t.reshape(*t.shape[:2], -1), b)
    return LowRank(A=A.reshape(t.shape[0], -1), B=a.T)


def kronecker(name: str, roles: Roles, tensors: Tensors) -> tuple[Module, float]:
    """LoKr: dW = w1 (x) w2, each full or w_a w_b, the second with a Tucker core or none.

    alpha counts only where a factor is split; where both are full the scale is 1 (rank 0 here).
    """
    sides = [_side(name, roles, tensors, i) for i in (1, 2)]
    (m1, n1, _), (m2, n2, kernel) = sides
    split = next((tensors[roles[b]].shape[0] for b in ("w1_b", "w2_b") if b in roles), 0)
    inner = [_inner(roles, tensors, i, sides[i - 1]) for i in (1, 2)]
    shape = (m1 * m2, n1 * n2, *kernel)
    return _module(name, roles, tensors, shape, inner[0] * inner[1], _kronecker), split


def _side(name: str, roles: Roles, tensors: Tensors, i: int) -> tuple[int, int, tuple[int, ...]]:
    """Rows, columns and kernel of one factor of a Kronecker product."""
    if f"w{i}" in roles:
        sizes = (2,) if i == 1 else (2, *CORES)
        rows, columns, *kernel = _shape(name, roles, tensors, f"w{i}", sizes)
        return rows, columns, tuple(kernel)
    a, b = (_shape(name, roles, tensors, f"w{i}_{end}") for end in "ab")
    if i == 2 and "t2" in roles:
        t = _shape(name, roles, tensors, "t2", CORES)
        _check(name, t[:2] == (a[0], b[0]), a, t, b)
        return a[1], b[1], t[2:]
    _check(name, a[1] == b[0], a, b)
    return a[0], b[1], ()


def _inner(roles: Roles, tensors: Tensors, i: int, side: tuple[int, int, tuple[int, ...]]) -> int:
    """The rank of one factor as it is read."""
    rows, columns, kernel = side
    if f"w{i}" in roles:
        return min(rows, columns * math.prod(kernel))
    return tensors[roles[f"w{i}_a"]].shape[0 if i == 2 and "t2" in roles else 1]


def _kronecker(source: TensorSource, module: Module) -> LowRank:
    first, second = (_factor(source, module.keys, i) for i in (1, 2))
    if not first.rank * second.rank < min(module.shape):
        return _beside_identity(np.kron(first.B @ first.A, second.B @ second.A))
    return LowRank(A=np.kron(first.A, second.A), B=np.kron(first.B, second.B))


def _factor(source: TensorSource, keys: Roles, i: int) -> LowRank:
    if f"w{i}" in keys:
        w = source.array(keys[f"w{i}"])
        return _beside_identity(w.reshape(w.shape[0], -1))
    return _pair(source, keys, f"w{i}", "t2" if i == 2 else "")


def full(name: str, roles: Roles, tensors: Tensors) -> tuple[Module, float]:
    """A whole difference of weights, `.diff`: of every rank, and never scaled."""
    shape = _shape(name, roles, tensors, "diff", (2, *CORES))
    return _module(name, roles, tensors, shape, min(shape[0], math.prod(shape[1:])), _full), 0


def _full(source: TensorSource, module: Module) -> LowRank:
    return _beside_identity(source.array(module.keys["diff"]).reshape(module.shape))


def _beside_identity(W: Array) -> LowRank:
    """A matrix as factors: itself, and an identity on its shorter side."""
    rows, columns = W.shape
    if rows <= columns:
        return LowRank(A=W, B=np.eye(rows, dtype=W.dtype))
    return LowRank(A=np.eye(columns, dtype=W.dtype), B=W)


def _shape(
    name: str, roles: Roles, tensors: Tensors, role: str, sizes: tuple[int, ...] = (2,)
) -> tuple[int, ...]:
    """The shape of the tensor of a role, which must have one of these numbers of dimensions."""
    if role not in roles:
        raise AdapterError(
            f"{name} has {listed(sorted(roles.values()), 4)}, but no {role}.", INCOMPLETE
        )
    shape = tensors[roles[role]].shape
    if len(shape) not in sizes:
        wanted = f"{sizes[0]} to {sizes[-1]}" if len(sizes) > 1 else f"{sizes[0]}"
        raise AdapterError(
            f"{roles[role]} is {list(shape)}, where {wanted} dimensions are expected.", INCOMPLETE
        )
    return shape


def _check(name: str, fits: bool, *shapes: tuple[int, ...]) -> None:
    if not fits:
        found = " and ".join(str(list(shape)) for shape in shapes)
        raise AdapterError(f"{name}: {found} do not multiply.", INCOMPLETE)


def _module(
    name: str,
    roles: Roles,
    tensors: Tensors,
    shape: tuple[int, ...],
    rank: int,
    form: Form,
) -> Module:
    """A module [out, in, *kernel] of these tensors, with scaling 1."""
    keys = {role: key for role, key in roles.items() if role != "alpha"}
    for key in keys.values():
        if tensors[key].dtype not in FLOATS:
            raise AdapterError(f"{key} is stored as {tensors[key].dtype}.", QUANTISED)
    out, channels, *kernel = shape
    width = channels * math.prod(kernel)
    dtypes = {tensors[key].dtype for key in keys.values()}
    return Module(
        name=name,
        kind="conv" if kernel else "linear",
        out_features=out,
        in_features=width,
        rank=min(rank, out, width),
        scaling=1.0,
        dtype=dtypes.pop() if len(dtypes) == 1 else "F32",
        keys=keys,
        kernel=tuple(kernel),
        form=form,
    )
