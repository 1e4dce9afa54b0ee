"""Reading PEFT's layout: which scale counts, of patterns, headers, configs and what is typed."""

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from peft.utils.other import get_pattern_key

from loramerge.adapter import Adapter
from loramerge.errors import AdapterError, UsageError
from loramerge.io._open import open_adapter
from loramerge.io._peft_config import scale_of
from tests.build import write_peft

A, B = np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
PLAIN = {"layers.0.q_proj": (A, B), "layers.1.q_proj": (A, B)}


def scalings(adapter: Adapter) -> dict[str, float]:
    return {name: module.scaling for name, module in adapter.modules.items()}


def opened(path: Path, alpha: float | None = None) -> Adapter:
    return open_adapter(str(path), alpha)


PATHS = [
    "lin",
    "lin2",
    "x.lin",
    "xlin",
    "block.lin",
    "a.block.lin",
    "layers.0.q_proj",
    "layers.10.q_proj",
    "layers.1.q_proj",
    "decoder.layers.1.q_proj",
    "layers.0.self_attn.q_proj",
    "layersX0.q_proj",
    "odd[0].c++",
    "a(b",
]
KEYS = [
    "lin",
    "^lin",
    "^lin2",
    ".*lin",
    "x.lin",
    "x\\.lin",
    "n",
    "q_proj",
    "layers.0.q_proj",
    r"layers\.\d+\.q_proj",
    r"^layers\.(0|1)\.q_proj",
    r"layers\.1.*",
    ".*",
    "(q|k)_proj",
    "layers.1",
    "lin|layers.1.q_proj",
    "lin)|(q_proj",
    "",
    "^$",
    "(?:self_attn\\.)?q_proj",
    "q_proj$",
    "odd.*",
    "Q_PROJ",
    "[kqv]_proj",
]


@pytest.mark.parametrize("seed", range(40))
def test_patterns_mean_what_pefts_own_function_makes_of_them(seed: int) -> None:
    draw = random.Random(seed)
    keys = draw.sample(KEYS, draw.randint(1, 6))
    pattern = {key: 3 + place for place, key in enumerate(keys)}
    ours = scale_of({"lora_alpha": 2, "r": 1, "alpha_pattern": pattern}, None)
    for path in PATHS:
        theirs = pattern.get(get_pattern_key(pattern.keys(), path), 2)
        assert ours.of(path, 1) == theirs, (path, pattern)


def test_a_key_that_is_the_path_itself_counts_where_no_pattern_matches() -> None:
    # As a regular expression `a[0]` matches `a0` only; PEFT then looks the path up literally.
    pattern = {"odd[0].lin": 6}
    assert get_pattern_key(pattern.keys(), "odd[0].lin") == "odd[0].lin"
    assert scale_of({"lora_alpha": 2, "alpha_pattern": pattern}, None).of("odd[0].lin", 1) == 6


def test_rank_and_alpha_patterns_are_looked_up_independently() -> None:
    scale = scale_of(
        {"r": 8, "lora_alpha": 16, "rank_pattern": {"q": 4}, "alpha_pattern": {".*": 2}}, None
    )
    assert scale.of("x.q", 4) == 0.5
    assert not scale.contradicts("x.q", 4)
    assert scale.contradicts("x.v", 4)


@pytest.mark.parametrize(
    "pattern", ["(a|a)*b", "(.*a){20}", "(a+)+", "a*b*c*d*e*", "x" * 1025, "(x*)*", "(a{1,}){2,}"]
)
def test_a_pattern_that_could_take_for_ever_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match="could take for ever"):
        scale_of({"rank_pattern": {pattern: 4}}, None)


@pytest.mark.parametrize(
    ("config", "scaling"),
    [
        ({"lora_alpha": 8}, 4.0),
        ({"lora_alpha": 8, "use_rslora": True}, 8 / math.sqrt(2)),
        ({"lora_alpha": 0.5}, 0.25),
        ({"lora_alpha": 0}, 0.0),
        ({"lora_alpha": -2}, -1.0),
        ({"lora_alpha": 8, "lora_dropout": 0.5, "inference_mode": False}, 4.0),
    ],
)
def test_the_scale_is_alpha_over_rank_or_over_its_root(
    config: Mapping[str, Any], scaling: float, tmp_path: Path
) -> None:
    adapter = opened(write_peft(tmp_path / "a", PLAIN, **config))
    assert set(scalings(adapter).values()) == {scaling}
    assert not adapter.assumed


def test_a_config_without_alpha_means_pefts_default(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN)
    facts = json.loads((path / "adapter_config.json").read_text())
    del facts["lora_alpha"], facts["r"]
    (path / "adapter_config.json").write_text(json.dumps(facts))
    adapter = opened(path)
    assert set(scalings(adapter).values()) == {8 / 2}
    assert "lora_alpha 8, PEFT's default" in adapter.assumed[0]
    assert "another rank" in adapter.assumed[1]  # the default r is 8, too
    assert set(scalings(opened(path, alpha=6)).values()) == {3.0}


def test_the_rank_of_the_tensors_counts_where_the_config_states_another(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path / "a", PLAIN, r=16, lora_alpha=16))
    assert set(scalings(adapter).values()) == {16 / 2}
    assert adapter.assumed == (
        "the config states another rank than the tensors of layers.0.q_proj, layers.1.q_proj; "
        "the tensors' rank is used",
    )


def facts(**values: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(values)}


def beside(path: Path, **values: Any) -> None:
    """Put an adapter_config.json beside a bare file."""
    text = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **values}
    (path.parent / "adapter_config.json").write_text(json.dumps(text))


def test_a_bare_file_believes_its_header_first(tmp_path: Path) -> None:
    file = write_peft(tmp_path / "a.safetensors", PLAIN, metadata=facts(r=2, lora_alpha=6))
    beside(file, lora_alpha=20)
    adapter = opened(file)
    assert set(scalings(adapter).values()) == {3.0}
    assert not adapter.scale_assumed


def test_a_header_may_say_rslora_and_patterns(tmp_path: Path) -> None:
    said = facts(r=2, lora_alpha=6, use_rslora=True, alpha_pattern={"layers.1.q_proj": 2})
    adapter = opened(write_peft(tmp_path / "a.safetensors", PLAIN, metadata=said))
    root = math.sqrt(2)
    assert scalings(adapter) == {"layers.0.q_proj": 6 / root, "layers.1.q_proj": 2 / root}


def test_a_bare_file_believes_a_config_beside_it_that_explains_it(tmp_path: Path) -> None:
    file = write_peft(tmp_path / "a.safetensors", PLAIN)
    beside(file, lora_alpha=20)
    adapter = opened(file)
    assert set(scalings(adapter).values()) == {10.0}
    assert not adapter.scale_assumed
    assert not adapter.assumed


@pytest.mark.parametrize(
    "other",
    [
        {"r": 4},
        {"target_modules": ["v_proj"]},
        {"target_modules": ["proj"]},
        {"target_modules": [1, None]},
        {"rank_pattern": {"layers.1.q_proj": 4}},
        {"peft_type": "IA3"},
    ],
)
def test_a_config_beside_a_bare_file_that_explains_another_is_not_believed(
    other: dict[str, Any], tmp_path: Path
) -> None:
    file = write_peft(tmp_path / "a.safetensors", PLAIN)
    beside(file, lora_alpha=20, **other)
    adapter = opened(file)
    assert set(scalings(adapter).values()) == {1.0}
    assert adapter.scale_assumed
    assert adapter.assumed[0] == "the adapter_config.json beside it is about another file"


def test_the_file_of_a_peft_directory_is_the_directory(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, r=4, lora_alpha=20)
    assert scalings(opened(path / "adapter_model.safetensors")) == scalings(opened(path))


def test_a_directory_believes_its_config_and_says_where_its_header_differs(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, lora_alpha=20, metadata=facts(r=2, lora_alpha=6))
    adapter = opened(path)
    assert set(scalings(adapter).values()) == {10.0}
    assert adapter.assumed == ("its header says another lora_alpha; adapter_config.json counts",)


def test_alpha_as_typed_counts_where_the_file_is_silent(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path / "a.safetensors", PLAIN), alpha=32)
    assert set(scalings(adapter).values()) == {16.0}
    assert not adapter.scale_assumed
    assert not adapter.assumed


def test_without_any_word_on_it_the_scale_is_assumed_and_said(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path / "a.safetensors", PLAIN))
    assert set(scalings(adapter).values()) == {1.0}
    assert adapter.scale_assumed
    assert adapter.assumed == (
        "scale 1 and fan_in_fan_out false: the file says neither (--alpha N sets the scale)",
    )


def test_a_header_that_does_not_say_alpha_is_silent(tmp_path: Path) -> None:
    adapter = opened(write_peft(tmp_path / "a.safetensors", PLAIN, metadata=facts(r=2)))
    assert adapter.scale_assumed


@pytest.mark.parametrize("said", [{}, facts(r=2, lora_alpha=6)])
def test_alpha_as_typed_must_not_contradict_the_file(said: dict[str, str], tmp_path: Path) -> None:
    name = "a.safetensors" if said else "a"
    path = write_peft(tmp_path / name, PLAIN, lora_alpha=6, metadata=said)
    assert set(scalings(opened(path, alpha=6)).values()) == {3.0}
    with pytest.raises(UsageError, match=r"--alpha 8 contradicts .* which says 6"):
        opened(path, alpha=8)
