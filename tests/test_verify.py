"""The verify command: numbers, hashes, differences, and what it prints of the programs."""

import json
from pathlib import Path

import numpy as np
import pytest

from loramerge.cli.verify import PROGRAMS, VLLM_MAX_RANK
from loramerge.consumers import CONSUMERS, DEFAULT_MAX_RANK
from tests.build import write_peft
from tests.plain import pair, plain
from tests.typed import typed


def test_a_changed_tensor_is_found_by_its_hash(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert typed("cat", plain(tmp_path / "a"), "-o", out).code == 0
    assert typed("verify", out).code == 0
    file = out / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = typed("verify", out)
    assert done.code == 3
    assert "not those of loramerge.json" in done.out


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("score.weight", {"modules_to_save": ["score"]}),
        ("layers.0.q_proj.lora_magnitude_vector", {"use_dora": True}),
    ],
)
def test_a_number_that_is_none_is_found_beside_the_factors(
    key: str, config: dict[str, object], tmp_path: Path
) -> None:
    extras = {f"base_model.model.{key}": np.full(4, np.nan, np.float32)}
    done = typed(
        "verify", write_peft(tmp_path / "a", {"layers.0.q_proj": pair()}, extras=extras, **config)
    )
    assert done.code == 3
    assert f"base_model.model.{key} hold NaN or Inf" in done.err


def test_a_number_that_is_none_is_found(tmp_path: Path) -> None:
    A, B = pair()
    A[0, 0] = np.nan
    done = typed("verify", write_peft(tmp_path / "a", {"lin": (A, B)}, r=2, lora_alpha=2))
    assert done.code == 3
    assert "not finite in lin" in done.out


def test_against_its_source_a_conversion_is_the_same_and_another_adapter_is_not(
    tmp_path: Path,
) -> None:
    source = plain(tmp_path / "a")
    assert typed("cat", source, "-o", tmp_path / "b").code == 0
    assert typed("verify", tmp_path / "b", "--against", source).code == 0
    other = plain(tmp_path / "c")
    done = typed("verify", tmp_path / "b", "--against", other)
    assert done.code == 3
    assert "it differs from" in done.err


def test_every_program_is_in_the_json(tmp_path: Path) -> None:
    done = typed("verify", plain(tmp_path / "a"), "--json")
    facts = json.loads(done.out)
    assert set(facts["consumers"]) == set(CONSUMERS)
    assert facts["modules"] == 2
    assert facts["tensors"] == 4


def test_help_names_every_program_and_vllms_own_rank() -> None:
    assert tuple(CONSUMERS) == PROGRAMS
    assert VLLM_MAX_RANK == DEFAULT_MAX_RANK


def test_an_unknown_program_is_refused_with_the_nearest(tmp_path: Path) -> None:
    done = typed("verify", plain(tmp_path / "a"), "--for", "vlm")
    assert done.code == 2
    assert "did you mean 'vllm'?" in done.err


def test_numbers_that_are_none_are_told_before_any_difference(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    write_peft(tmp_path / "sound", {"x": (rng.random((2, 4)), rng.random((4, 2)))})
    write_peft(tmp_path / "broken", {"x": (np.full((2, 4), np.nan), rng.random((4, 2)))})
    done = typed("verify", tmp_path / "broken", "--against", tmp_path / "sound")
    assert done.code == 3
    assert "not finite in x" in done.out
