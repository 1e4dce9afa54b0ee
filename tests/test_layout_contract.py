"""What every layout must hold to. A new layout is tested by its file and its fixtures alone."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from loramerge.adapter import Adapter
from loramerge.compute import encode, save_dtype
from loramerge.io._layout import Draft, Stored
from loramerge.io._open import layout, layouts, open_adapter
from loramerge.io._source import open_source
from loramerge.io._write import start_file
from loramerge.registry import layout_names

FIXTURES = Path(__file__).parents[1] / "fixtures"
GOLDEN = json.loads((FIXTURES / "golden.json").read_text())
CASES = [
    (name, path)
    for name in layout_names()
    for path in sorted((FIXTURES / name).iterdir() if (FIXTURES / name).is_dir() else ())
]
every_fixture = pytest.mark.parametrize(
    ("name", "path"), CASES, ids=[f"{name}-{path.stem}" for name, path in CASES]
)
# Layouts that are only read write their results in another.
WRITTEN = [(name, path) for name, path in CASES if not layout(name).writes]
every_written_fixture = pytest.mark.parametrize(
    ("name", "path"), WRITTEN, ids=[f"{name}-{path.stem}" for name, path in WRITTEN]
)


def weights(path: Path) -> Path:
    return next(path.glob("*.safetensors")) if path.is_dir() else path


def unscaled(adapter: Adapter, name: str) -> np.ndarray:
    """B @ A of one module in float64, from the factors as its layout reads them."""
    module = adapter.modules[name]
    stored = module.form(adapter.source, module)
    gates = np.asarray(module.gates or (1.0,) * stored.rank)
    return stored.B.astype(np.float64) * gates @ stored.A.astype(np.float64)


def delta(adapter: Adapter, name: str) -> np.ndarray:
    """The delta weight of one module in float64, by the file's own scaling."""
    return adapter.modules[name].scaling * unscaled(adapter, name)


def part(adapter: Adapter, name: str, stored: Stored, scalings: dict[str, float]) -> np.ndarray:
    """One factor of a module, as a tensor of the new file holds it."""
    module = adapter.modules[name]
    values = getattr(module.form(adapter.source, module), stored.part)
    if stored.part == "B":
        values = values * (module.scaling / scalings[name])
    return encode(values, stored.dtype)


def written_scaling(adapter: Adapter, rank: int) -> float:
    """alpha / rank as a result of this layout has it: the largest rank is alpha, or its own."""
    return 1.0 if layout(adapter.layout).unscaled else adapter.max_rank / rank


def written_again(adapter: Adapter, folder: Path) -> Adapter:
    """The adapter written by its own layout with each module's own rank, and read back."""
    found = layout(adapter.layout)
    modules = tuple(
        replace(m, scaling=written_scaling(adapter, m.rank), dtype=save_dtype("auto", {m.dtype}))
        for m in adapter.modules.values()
    )
    draft = Draft(modules, (adapter,), adapter.extras, len({m.rank for m in modules}) == 1)
    written = found.write(draft)
    folder.mkdir()
    file = folder / ("adapter_model.safetensors" if found.directory else "x.safetensors")
    for name, content in written.companions.items():
        (folder / name).write_bytes(content)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT)
    writer = start_file(descriptor, written)
    scalings = {m.name: m.scaling for m in modules}
    for stored in written.tensors:
        data: bytes | memoryview = stored.content()
        if stored.part is not None:
            parts = [part(adapter, name, stored, scalings) for name in stored.modules]
            data = np.ascontiguousarray(stored.join(parts)).tobytes()
        writer.write(stored.key, data)
    os.close(descriptor)
    return open_adapter(str(folder if found.directory else file))


def test_every_layout_has_fixtures() -> None:
    assert {name for name, _ in CASES} == set(layout_names())


@pytest.mark.parametrize("name", layout_names())
def test_a_layout_declares_what_help_and_docs_show(name: str) -> None:
    found = layout(name)
    assert found.name == name
    assert found.summary.endswith(".")


@every_fixture
def test_a_fixture_is_explained_by_its_own_layout_and_by_no_other(name: str, path: Path) -> None:
    keys = open_source(weights(path)).tensors
    explaining = [
        found.name
        for found in layouts()
        if all(map(found.explains, keys)) and (not found.marked or any(map(found.marks, keys)))
    ]
    assert explaining == [name]
    assert open_adapter(str(path)).layout == name


@every_fixture
def test_what_a_layout_owns_is_explained_by_no_other(name: str, path: Path) -> None:
    keys = open_source(weights(path)).tensors
    for found in layouts():
        assert not all(map(found.owns, keys)) or found.name == name


def test_what_peft_owns_no_other_marks_or_explains() -> None:
    for module in ("layers.0.q_proj", "unet.down_blocks.0.to_q", "w_a_0", "lora_unet_x", "0.attn"):
        for part in ("lora_A", "lora_B", "lora_A.default"):
            key = f"base_model.model.{module}.{part}.weight"
            assert layout("peft").owns(key)
            assert not [found.name for found in layouts() if found.marks(key)]
            alike = {found.name for found in layouts() if found.explains(key) and not found.marked}
            assert alike == {"peft"}


@every_fixture
def test_a_fixture_reads_as_the_numbers_it_was_made_from(name: str, path: Path) -> None:
    adapter, golden = open_adapter(str(path)), GOLDEN[f"{name}/{path.name}"]
    assert set(adapter.modules) == set(golden)
    for module, facts in golden.items():
        found = adapter.modules[module]
        assert list(found.shape) == facts["shape"]
        assert list(found.kernel) == facts["kernel"]
        assert found.rank == facts["rank"]
        assert found.scaling == facts["scaling"]
        plain = unscaled(adapter, module)
        # Exact: the factors are multiples of 1/8, and so few are added up.
        assert plain[0].tolist() == facts["first_row"]
        assert math.isclose(plain.sum(), facts["sum"], abs_tol=1e-12)
        assert math.isclose((plain**2).sum(), facts["square"], rel_tol=1e-12)


@every_fixture
def test_the_scaling_is_folded_exactly_once(name: str, path: Path) -> None:
    adapter = open_adapter(str(path))
    for module in adapter.modules:
        update = adapter.read(module)
        product = update.B.astype(np.float64) @ update.A.astype(np.float64)
        # float32 rounds B * scaling; the products are exact.
        np.testing.assert_allclose(product, delta(adapter, module), rtol=1e-6, atol=1e-7)


@every_written_fixture
def test_what_is_written_reads_back_as_the_same_modules(
    name: str, path: Path, tmp_path: Path
) -> None:
    adapter = open_adapter(str(path))
    again = written_again(adapter, tmp_path / "again")
    assert again.layout == name
    assert set(again.modules) == set(adapter.modules)
    for module, before in adapter.modules.items():
        after = again.modules[module]
        assert (after.kind, after.shape, after.kernel) == (before.kind, before.shape, before.kernel)
        assert (after.rank, after.scaling) == (before.rank, written_scaling(adapter, before.rank))
        # One rounding of B to the stored dtype, at worst bfloat16's 8 bits.
        np.testing.assert_allclose(
            delta(again, module), delta(adapter, module), rtol=2**-8, atol=2**-7
        )
    assert not again.assumed
    assert not again.scale_assumed


@every_written_fixture
def test_where_nothing_is_scaled_tensors_are_written_bit_for_bit(
    name: str, path: Path, tmp_path: Path
) -> None:
    adapter = open_adapter(str(path))
    again = written_again(adapter, tmp_path / "again")
    for module, before in adapter.modules.items():
        after = again.modules[module]
        for part in ("A", "B"):
            same = before.scaling == after.scaling or part == "A"
            if same and part in before.keys and before.dtype in ("F32", "F16", "BF16"):
                stored = adapter.source.read(before.keys[part])
                assert again.source.read(after.keys[part]) == stored


@every_written_fixture
def test_what_stands_beside_the_factors_is_written_bit_for_bit(
    name: str, path: Path, tmp_path: Path
) -> None:
    adapter = open_adapter(str(path))
    again = written_again(adapter, tmp_path / "again")
    before = {extra.key: (extra.role, adapter.source.read(extra.key)) for extra in adapter.extras}
    after = {extra.key: (extra.role, again.source.read(extra.key)) for extra in again.extras}
    assert after == before


@every_written_fixture
def test_the_same_draft_is_the_same_bytes(name: str, path: Path, tmp_path: Path) -> None:
    adapter = open_adapter(str(path))
    one, two = (written_again(adapter, tmp_path / folder).source.path for folder in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_some_fixture_has_extras_and_some_is_not_scaled() -> None:
    adapters = [open_adapter(str(path)) for _, path in CASES]
    assert any(adapter.extras for adapter in adapters)
    assert any({m.scaling for m in adapter.modules.values()} == {1.0} for adapter in adapters)
