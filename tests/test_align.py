"""Which modules belong together: every mismatch named, all at once, before a tensor is read."""

from pathlib import Path

import numpy as np
import pytest

from loramerge.adapter import Adapter
from loramerge.align import align
from loramerge.errors import IncompatibleError, UsageError
from loramerge.io._open import open_adapter
from tests.build import Pair, write_kohya, write_peft

Q, V, K = "layers.0.q_proj", "layers.0.v_proj", "layers.1.q_proj"


def pair(out: int = 4, width: int = 6, rank: int = 2) -> Pair:
    return np.ones((rank, width), np.float32), np.ones((out, rank), np.float32)


def conv(*kernel: int) -> Pair:
    return np.ones((2, 3, *kernel), np.float32), np.ones((4, 2, *(1 for _ in kernel)), np.float32)


def adapter(path: Path, **modules: Pair) -> Adapter:
    """An adapter whose module names have underscores for dots."""
    named = {name.replace("__", "."): factors for name, factors in modules.items()}
    return open_adapter(str(write_peft(path, named)))


def three(tmp_path: Path) -> list[Adapter]:
    """a has Q and V, b has V and K, c has Q, V and K."""
    sets = {"a": (Q, V), "b": (V, K), "c": (Q, V, K)}
    return [
        open_adapter(str(write_peft(tmp_path / name, {module: pair() for module in modules})))
        for name, modules in sets.items()
    ]


def test_modules_come_in_the_order_of_the_adapters(tmp_path: Path) -> None:
    found = align(three(tmp_path), "zero")
    assert [module.name for module in found.modules] == [Q, V, K]


def test_missing_modules_count_as_zero_and_are_named(tmp_path: Path) -> None:
    adapters = three(tmp_path)
    found = align(adapters, "zero")
    assert [[member is not None for member in module.members] for module in found.modules] == [
        [True, False, True],
        [True, True, True],
        [False, True, True],
    ]
    assert (found.partial, found.skipped) == ((Q, K), ())


def test_missing_modules_are_left_out_on_demand_and_named(tmp_path: Path) -> None:
    found = align(three(tmp_path), "skip")
    assert [module.name for module in found.modules] == [V]
    assert (found.partial, found.skipped) == ((), (Q, K))


def test_missing_modules_are_an_error_on_demand_that_says_where(tmp_path: Path) -> None:
    adapters = three(tmp_path)
    b, a = adapters[1].reference, adapters[0].reference
    with pytest.raises(IncompatibleError) as refused:
        align(adapters, "error")
    assert refused.value.message == (
        f"2 modules are missing in some adapters: {Q} (not in {b}), {K} (not in {a})."
    )
    assert "--missing zero" in str(refused.value.hint)


def test_ranks_and_cap_follow_from_the_members(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", lin=pair(4, 6, 2))
    b = adapter(tmp_path / "b", lin=pair(4, 6, 3))
    module = align([a, b], "zero").modules[0]
    assert module.ranks == (2, 3)
    assert module.cap == 4  # 2 + 3, but no more than the smaller side


def test_all_modules_that_differ_in_shape_are_listed_at_once(tmp_path: Path) -> None:
    wide = {f"layers__{n}__lin": pair(4, 8) for n in range(40)}
    slim = {name: pair(4, 6) for name in wide}
    a, b = adapter(tmp_path / "a", **wide), adapter(tmp_path / "b", **slim)
    with pytest.raises(IncompatibleError, match="40 modules differ in shape") as refused:
        align([a, b], "zero")
    for n in range(40):
        expected = f"layers.{n}.lin linear 4x8 in {a.reference}, linear 4x6 in {b.reference}"
        assert expected in refused.value.message
    assert refused.value.hint == (
        "these adapters seem to be for different base models: "
        f"loramerge inspect {a.reference} {b.reference}"
    )


def test_one_module_that_differs_is_one(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", lin=pair(4, 8), same=pair())
    b = adapter(tmp_path / "b", lin=pair(4, 6), same=pair())
    with pytest.raises(IncompatibleError, match=r"^1 module differs in shape: lin linear 4x8 in "):
        align([a, b], "zero")


def test_equal_counts_of_another_kernel_do_not_fit(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", conv=conv(3, 1))
    b = adapter(tmp_path / "b", conv=conv(1, 3))
    with pytest.raises(IncompatibleError, match=r"conv 4x9 kernel 3x1 in .*, conv 4x9 kernel 1x3"):
        align([a, b], "zero")


def test_a_linear_module_and_a_pointwise_convolution_do_not_fit(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", proj=pair(4, 3))
    b = adapter(tmp_path / "b", proj=conv(1, 1))
    with pytest.raises(IncompatibleError, match=r"linear 4x3 in .*, conv 4x3 kernel 1x1 in "):
        align([a, b], "zero")


def test_a_linear_module_and_an_embedding_do_not_fit(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", embed=pair())
    path = write_peft(tmp_path / "b", {"embed": pair()}, embeddings=["embed"])
    with pytest.raises(IncompatibleError, match=r"linear 4x6 in .*, embedding 4x6 in "):
        align([a, open_adapter(str(path))], "zero")


def test_adapters_without_a_common_module_are_refused_with_one_name_of_each(tmp_path: Path) -> None:
    a, b = adapter(tmp_path / "a", x=pair()), adapter(tmp_path / "b", y=pair())
    with pytest.raises(
        IncompatibleError, match=r"no module in common: one has 'x', .* 'y'"
    ) as error:
        align([a, b], "zero")
    assert (
        error.value.hint == f"see what each adapts: loramerge inspect {a.reference} {b.reference}"
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("language_model.model.", "model.language_model."),
        ("", "model."),
        ("transformer.", ""),
    ],
)
def test_names_that_differ_only_in_a_prefix_are_told_so(old: str, new: str, tmp_path: Path) -> None:
    modules = {f"layers.{n}.self_attn.{leaf}_proj": pair() for n in range(3) for leaf in "qv"}
    a, b = (
        open_adapter(str(write_peft(tmp_path / name, {start + m: f for m, f in modules.items()})))
        for name, start in (("a", old), ("b", new))
    )
    with pytest.raises(IncompatibleError, match=f"only the prefixes '{old}' and '{new}' differ"):
        align([a, b], "zero")


def test_other_layers_are_not_another_prefix(tmp_path: Path) -> None:
    a, b = (
        adapter(tmp_path / "a", layers__0__q=pair()),
        adapter(tmp_path / "b", layers__1__q=pair()),
    )
    with pytest.raises(IncompatibleError) as refused:
        align([a, b], "zero")
    assert "prefix" not in refused.value.message


def test_nothing_in_every_adapter_is_refused_where_missing_ones_are_skipped(tmp_path: Path) -> None:
    sets = {"a": (Q, V), "b": (Q, K), "c": (V, K)}
    adapters = [
        open_adapter(str(write_peft(tmp_path / name, {module: pair() for module in modules})))
        for name, modules in sets.items()
    ]
    with pytest.raises(IncompatibleError, match="No module is in every adapter"):
        align(adapters, "skip")


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        (("*q_proj",), (), [Q, K]),
        ((), ("*q_proj",), [V]),
        (("layers.0.*",), ("*v_proj",), [Q]),
        ((V, K), (), [V, K]),
        (("layers.[01].q_proj",), (), [Q, K]),
    ],
)
def test_globs_choose_modules_and_name_those_left_out(
    include: tuple[str, ...], exclude: tuple[str, ...], kept: list[str], tmp_path: Path
) -> None:
    found = align(three(tmp_path)[2:], "zero", include, exclude)
    assert [module.name for module in found.modules] == kept
    assert set(found.excluded) == {Q, V, K} - set(kept)


def test_shapes_of_modules_left_out_do_not_matter(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", lin=pair(), head=pair(10))
    b = adapter(tmp_path / "b", lin=pair(), head=pair(12))
    assert [m.name for m in align([a, b], "zero", exclude=("head",)).modules] == ["lin"]


@pytest.mark.parametrize(
    ("glob", "hint"),
    [
        ("*q_prj", "did you mean '*.q_proj'?"),
        ("q_proj", "did you mean '*.q_proj'?"),
        ("layers.0.q_prjo", "did you mean 'layers.0.q_proj'?"),
        ("*.Q_PROJ", f"a module is called '{Q}'"),
        ("zzz", f"a module is called '{Q}'"),
    ],
)
@pytest.mark.parametrize("flag", ["--include", "--exclude"])
def test_a_glob_that_matches_nothing_is_a_usage_error_with_a_suggestion(
    glob: str, hint: str, flag: str, tmp_path: Path
) -> None:
    globs = {flag.removeprefix("--"): (glob,)}
    with pytest.raises(UsageError) as refused:
        align(three(tmp_path)[:1], "zero", **globs)
    assert refused.value.message == f"{flag} '{glob}' matches no module."
    assert refused.value.hint == hint


def test_globs_that_leave_nothing_are_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave no module") as refused:
        align(three(tmp_path), "zero", ("*q_proj",), ("layers.*",))
    assert refused.value.hint


def test_kohya_files_are_aligned_by_their_own_names(tmp_path: Path) -> None:
    files = [
        write_kohya(tmp_path / f"{name}.safetensors", {"lora_unet_a": (*pair(), 1.0)})
        for name in "ab"
    ]
    found = align([open_adapter(str(file)) for file in files], "error")
    assert [module.name for module in found.modules] == ["lora_unet_a"]
