"""Adapters that leave out factors they share with others: LoRA-XS cores, frozen A or B, VeRA."""

from pathlib import Path

import numpy as np
import pytest

import loramerge
from loramerge.errors import AdapterError, UsageError
from tests.build import PREFIX, Pair, save, write_peft
from tests.test_fused import delta
from tests.typed import typed

NAMES = ("layers.0.q_proj", "layers.1.q_proj")
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}
draw = np.random.default_rng(41)


def frozen() -> dict[str, Pair]:
    return {name: (draw.standard_normal((3, 8)), draw.standard_normal((7, 3))) for name in NAMES}


def cores(path: Path, names: tuple[str, ...] = NAMES) -> dict[str, np.ndarray]:
    """What Fed-SB sends around: the r x r cores alone."""
    found = {name: draw.standard_normal((3, 3)).astype("f4") for name in names}
    tensors = {f"{PREFIX}{n}_lora_latent_mapping.weight": core for n, core in found.items()}
    save(path, tensors, "float32")
    return found


def test_cores_are_read_with_the_factors_between_which_they_stand(tmp_path: Path) -> None:
    factors = frozen()
    write_peft(tmp_path / "shared", factors, lora_alpha=6)
    found = cores(tmp_path / "a.safetensors")
    adapter = loramerge.load(tmp_path / "a.safetensors", shared=tmp_path / "shared")
    assert adapter.layout == "loraxs"
    for name, (A, B) in factors.items():
        expected = 2.0 * B.astype("f4") @ found[name].astype(float) @ A.astype("f4")
        # B R in float32, as the factors are stored.
        np.testing.assert_allclose(delta(adapter, name), expected, rtol=1e-5, atol=1e-5)


def test_the_sum_of_adapters_with_shared_factors_is_that_of_their_cores(tmp_path: Path) -> None:
    factors = frozen()
    write_peft(tmp_path / "shared", factors, lora_alpha=6)
    parts = [cores(tmp_path / f"{place}.safetensors") for place in range(3)]
    adapters = [
        loramerge.load(tmp_path / f"{place}.safetensors", shared=tmp_path / "shared")
        for place in range(3)
    ]
    result, report = loramerge.arithmetic(adapters, weights=[1, 0.5, -2])
    for name, (A, B) in factors.items():
        core = parts[0][name] + 0.5 * parts[1][name].astype(float) - 2.0 * parts[2][name]
        assert result.adapter.modules[name].rank == 3
        expected = 2 * B.astype("f4") @ core @ A.astype("f4")
        np.testing.assert_allclose(delta(result.adapter, name), expected, rtol=1e-4, atol=1e-4)
    # Three times the rank of one, of which a third is there: what is cut away is rounding.
    assert report.relative_error < 1e-6


def test_only_modules_that_the_file_itself_adapts_are_read(tmp_path: Path) -> None:
    factors = frozen()
    head = {f"{PREFIX}score.weight": np.ones((2, 7), np.float32)}
    write_peft(tmp_path / "shared", factors, extras=head)
    one = {f"{PREFIX}{NAMES[0]}.lora_B.weight": draw.standard_normal((7, 3))}
    save(tmp_path / "b.safetensors", one, "float32")
    adapter = loramerge.load(tmp_path / "b.safetensors", shared=tmp_path / "shared")
    assert (list(adapter.modules), adapter.extras) == ([NAMES[0]], ())
    assert len(adapter.source.tensors) == 2


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_factor_that_several_adapters_share_may_be_elsewhere(letter: str, tmp_path: Path) -> None:
    factors = frozen()
    write_peft(tmp_path / "shared", factors, lora_alpha=6)
    own = {
        f"{PREFIX}{name}.lora_{letter}.weight": draw.standard_normal(
            factors[name]["AB".index(letter)].shape
        ).astype("f4")
        for name in NAMES
    }
    save(tmp_path / "a.safetensors", own, "float32")
    with pytest.raises(AdapterError, match="lack their other half"):
        loramerge.load(tmp_path / "a.safetensors")
    adapter = loramerge.load(tmp_path / "a.safetensors", shared=tmp_path / "shared")
    for name, (A, B) in factors.items():
        mine = own[f"{PREFIX}{name}.lora_{letter}.weight"].astype(float)
        pair = (B.astype("f4"), mine) if letter == "A" else (mine, A.astype("f4"))
        np.testing.assert_allclose(
            delta(adapter, name), adapter.modules[name].scaling * pair[0] @ pair[1], rtol=1e-6
        )


def test_projections_of_vera_may_be_elsewhere(tmp_path: Path) -> None:
    matrices = {"base_model.vera_A": draw.standard_normal((3, 8))}
    matrices["base_model.vera_B"] = draw.standard_normal((7, 3))
    save(tmp_path / "shared.safetensors", matrices, "float32")
    vectors = {f"{PREFIX}{NAMES[0]}.vera_lambda_d": draw.standard_normal(3)}
    vectors[f"{PREFIX}{NAMES[0]}.vera_lambda_b"] = draw.standard_normal(7)
    save(tmp_path / "a.safetensors", vectors, "float32")
    with pytest.raises(AdapterError, match="does not hold vera_A and vera_B") as refused:
        loramerge.load(tmp_path / "a.safetensors")
    assert "--shared" in str(refused.value.hint)
    adapter = loramerge.load(tmp_path / "a.safetensors", shared=tmp_path / "shared.safetensors")
    d, b = (vectors[f"{PREFIX}{NAMES[0]}.vera_lambda_{x}"].astype("f4") for x in "db")
    A, B = (matrices[f"base_model.vera_{x}"].astype("f4") for x in "AB")
    expected = np.diag(b.astype(float)) @ B @ np.diag(d.astype(float)) @ A
    np.testing.assert_allclose(delta(adapter, NAMES[0]), expected, rtol=1e-5, atol=1e-6)


def test_shared_factors_that_are_not_needed_are_refused(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", frozen())
    with pytest.raises(UsageError, match=r"holds no tensor that .* lacks"):
        loramerge.load(path, shared=path)


def test_convert_takes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_peft(Path("shared"), frozen(), lora_alpha=6)
    cores(Path("a.safetensors"))
    done = typed("convert", "a.safetensors", "--to", "peft", "--shared", "shared", "-o", "b")
    assert done.code == 0, done.err
    assert "2 of 2 modules, 6 of 6 tensors" in done.err
    again = typed("reproduce", "b")
    assert again.code == 1
    assert "convert a.safetensors --shared shared --to peft" in again.err
