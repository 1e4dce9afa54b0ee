"""Conversion between layouts: there and back bit for bit, or the same delta weights, or refused."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import loramerge
from loramerge.adapter import Adapter
from loramerge.conversion import Conversion, plan_conversion
from loramerge.converted import Converted, convert
from loramerge.errors import IncompatibleError, OutputError, UsageError
from loramerge.io._open import layouts, open_adapter
from tests.build import write_kohya, write_peft
from tests.test_layout_contract import CASES, FIXTURES, delta
from tests.typed import typed

WRITTEN = [found.name for found in layouts() if not found.writes]
# float32 has rounded B * scale once on each way.
FOLDED = 1e-6
rng = np.random.default_rng(5)


def pair(r: int, n: int = 6, m: int = 5) -> tuple[np.ndarray, np.ndarray]:
    return rng.standard_normal((r, n)), rng.standard_normal((m, r))


def planned(adapter: Adapter, to: str, folder: Path) -> Conversion:
    elsewhere = adapter.extras and adapter.layout != to
    return plan_conversion(adapter, to, str(folder), extras="drop" if elsewhere else "error")


def converted(adapter: Adapter, to: str, folder: Path) -> tuple[Converted, Adapter]:
    suffix = "" if folder.suffix else ("" if to in ("peft", "mlx", "diffusers") else ".safetensors")
    done = convert(planned(adapter, to, folder.with_name(folder.name + suffix)))
    return done, open_adapter(str(done.plan.final))


def there_and_back() -> list[tuple[Path, str]]:
    return [(path, to) for (_, path), to in itertools.product(CASES, WRITTEN)]


@pytest.mark.parametrize(
    ("path", "to"),
    there_and_back(),
    ids=[f"{p.parent.name}-{p.stem}-{to}" for p, to in there_and_back()],
)
def test_there_and_back_is_the_same_adapter(path: Path, to: str, tmp_path: Path) -> None:
    before = open_adapter(str(path))
    home = before.layout if before.layout in WRITTEN else "peft"
    try:
        first, there = converted(before, to, tmp_path / "there")
        second, after = converted(there, home, tmp_path / "back")
    except IncompatibleError:
        if before.layout == to:
            raise
        return
    assert not first.rounded
    assert not second.rounded
    assert first.plan.carried | {e.key for e in before.extras} == set(before.source.tensors)
    names = set(after.modules)
    if home == before.layout and len(there.modules) == len(before.modules):
        assert names == set(before.modules) or before.naming in ("kohya", "diffusers")
    for name in names & set(before.modules):
        old, new = before.modules[name], after.modules[name]
        np.testing.assert_allclose(
            delta(after, name), delta(before, name), rtol=FOLDED, atol=FOLDED
        )
        if old.scaling == new.scaling and old.rank == new.rank and not old.gates:
            one, two = old.form(before.source, old), new.form(after.source, new)
            np.testing.assert_array_equal(one.A, two.A)
            np.testing.assert_array_equal(one.B, two.B)
    assert names & set(before.modules)


# An alpha for each module is written as none: servers ignore PEFT's alpha_pattern.
OWN = [
    path
    for _, path in CASES
    if open_adapter(str(path)).layout in WRITTEN and path.name != "patterns"
]


@pytest.mark.parametrize("path", OWN, ids=[f"{p.parent.name}-{p.stem}" for p in OWN])
def test_in_its_own_layout_every_bit_of_a_b_and_scale_stays(path: Path, tmp_path: Path) -> None:
    before = open_adapter(str(path))
    done, after = converted(before, before.layout, tmp_path / "again")
    assert (done.plan.folded, done.rounded) == ((), ())
    assert set(after.modules) == set(before.modules)
    for name, old in before.modules.items():
        new = after.modules[name]
        assert (new.scaling, new.dtype, new.kind) == (old.scaling, old.dtype, old.kind)
        one, two = old.form(before.source, old), new.form(after.source, new)
        np.testing.assert_array_equal(one.A, two.A)
        np.testing.assert_array_equal(one.B, two.B)


def test_most_pairs_of_layouts_convert(tmp_path: Path) -> None:
    done = 0
    for place, (path, to) in enumerate(there_and_back()):
        try:
            planned(open_adapter(str(path)), to, tmp_path / str(place))
        except IncompatibleError:
            continue
        done += 1
    assert done > 60


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_scale_the_layout_can_say_keeps_every_bit(dtype: str, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", {"x.q": pair(3), "x.v": pair(3)}, lora_alpha=7, dtype=dtype)
    before = open_adapter(str(path))
    _, there = converted(before, "mlx", tmp_path / "there")
    _, after = converted(there, "peft", tmp_path / "back")
    for name, old in before.modules.items():
        new = after.modules[name]
        assert (new.scaling, new.dtype) == (old.scaling, old.dtype)
        for part in "AB":
            assert before.source.read(old.keys[part]) == after.source.read(new.keys[part])


def test_an_alpha_for_each_module_is_folded_where_there_is_one_for_all(tmp_path: Path) -> None:
    names = [f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_{x}" for x in "qk"]
    path = tmp_path / "k.safetensors"
    write_kohya(path, {names[0]: (*pair(4), 2.0), names[1]: (*pair(4), 3.0)})
    before = open_adapter(str(path))
    done, after = converted(before, "peft", tmp_path / "there")
    assert len(done.plan.folded) == 2
    assert any("folded into B" in note for note in done.notes)
    for name, there in zip(before.modules, after.modules, strict=True):
        np.testing.assert_allclose(delta(after, there), delta(before, name), rtol=1e-6, atol=1e-6)


def test_folding_a_power_of_two_keeps_the_dtype_and_any_other_widens_it(tmp_path: Path) -> None:
    for alpha, stored in ((8.0, "BF16"), (12.0, "F32")):
        path = write_peft(
            tmp_path / f"{alpha:g}", {"x.q": pair(4)}, lora_alpha=alpha, dtype="bfloat16"
        )
        done, after = converted(open_adapter(str(path)), "mlx", tmp_path / f"{alpha}.safetensors")
        assert (after.dtypes, len(done.plan.folded)) == ((stored,), 1)


def test_what_the_layout_has_no_place_for_is_refused_by_name(tmp_path: Path) -> None:
    head = {"base_model.model.head.weight": np.ones((2, 5), np.float32)}
    adapter = open_adapter(str(write_peft(tmp_path / "a", {"x.q": pair(2)}, extras=head)))
    with pytest.raises(IncompatibleError, match=r"head\.weight: saved module"):
        plan_conversion(adapter, "mlx", str(tmp_path / "b"))
    done = convert(plan_conversion(adapter, "mlx", str(tmp_path / "b"), extras="drop"))
    assert any("head.weight" in note for note in done.notes)
    assert done.coverage == "1 of 1 modules, 2 of 3 tensors"


def test_a_layout_that_is_only_read_names_the_one_to_write(tmp_path: Path) -> None:
    adapter = open_adapter(str(write_peft(tmp_path / "a", {"x.q": pair(2)})))
    with pytest.raises(UsageError) as caught:
        plan_conversion(adapter, "vera", None)
    assert "peft" in str(caught.value.hint)


def test_numbers_that_are_none_leave_nothing_behind(tmp_path: Path) -> None:
    A, B = pair(2)
    path = write_peft(tmp_path / "a", {"x.q": (A * np.nan, B)})
    plan = plan_conversion(open_adapter(str(path)), "mlx", str(tmp_path / "b"))
    with pytest.raises(IncompatibleError, match="holds NaN"):
        convert(plan)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_an_output_that_exists_is_not_replaced(tmp_path: Path) -> None:
    adapter = open_adapter(str(write_peft(tmp_path / "a", {"x.q": pair(2)})))
    with pytest.raises(OutputError, match="exists"):
        plan_conversion(adapter, "mlx", str(write_peft(tmp_path / "b", {"x.q": pair(2)})))
    with pytest.raises(OutputError, match="would replace the input"):
        plan_conversion(adapter, "peft", str(tmp_path / "a"), force=True)


def test_the_command_prints_coverage_and_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_peft(Path("a"), {"x.q": pair(2), "x.v": pair(2)}, lora_alpha=4)
    done = typed("convert", "a", "--to", "mlx")
    assert (done.code, done.out) == (0, "a-mlx\n")
    assert "coverage  2 of 2 modules, 4 of 4 tensors" in done.err
    assert (
        json.loads(Path("a-mlx/adapter_config.json").read_text())["lora_parameters"]["scale"] == 2
    )
    facts = json.loads(typed("convert", "a-mlx", "--to", "peft", "--json").out)
    assert (facts["modules_read"], facts["folded"]) == (2, [])
    assert facts["sources"][0]["made"]["recipe"]["method"] == "convert"


def test_the_layout_that_is_named_counts_and_must_explain_every_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_peft(Path("a"), {"x.q": pair(2)})
    assert typed("convert", "a", "--to", "mlx", "--from", "peft", "-q").out == "a-mlx\n"
    done = typed("convert", "a", "--to", "mlx", "--from", "kohya")
    assert (done.code, done.out) == (1, "")
    assert "not in the kohya layout, which does not explain base_model.model.x.q" in done.err
    assert "not in the kohya layout" in typed("inspect", "a", "--from", "kohya").err
    assert typed("inspect", "a", "--from", "peft").code == 0
    with pytest.raises(UsageError, match="no layout 'koya'"):
        loramerge.load("a", layout="koya")
    path = write_kohya(Path("k.safetensors"), {"lora_unet_x": (*pair(2), 1.0)})
    assert loramerge.load(path).layout == "kohya"
    assert loramerge.load(path, layout="lycoris").layout == "lycoris"


def test_what_a_layout_cannot_say_of_a_module_is_refused_and_nothing_is_left(
    tmp_path: Path,
) -> None:
    path = write_peft(tmp_path / "a", {"x.q": pair(2), "embed": pair(2)}, embeddings=("embed",))
    plan = plan_conversion(open_adapter(str(path)), "mlx", str(tmp_path / "b"))
    with pytest.raises(IncompatibleError, match="mlx cannot say what 1 of 2 modules are: embed"):
        convert(plan)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_refusal_advises_what_convert_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_kohya(Path("k.safetensors"), {"lora_unet_x": (*pair(2), 1.0)})
    done = typed("convert", "k.safetensors", "--to", "mlx")
    assert (done.code, done.lines[1]) == (1, "hint: layouts that keep its names: kohya")
    merge = typed("cat", "k.safetensors", "--to", "mlx")
    assert merge.lines[0] == done.lines[0]
    assert merge.lines[1].startswith("hint: leave --to out")
    done = typed("convert", FIXTURES / "peft" / "convolutions", "--to", "mlx")
    assert done.code == 1
    assert done.lines[1].endswith("take modules out first: loramerge select --exclude GLOB")
