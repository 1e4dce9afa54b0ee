"""What a PEFT adapter can be besides plain LoRA: named, and refused with a reason or kept."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftType, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from peft.utils.warning import PeftWarning

from loramerge.adapter import Adapter
from loramerge.errors import AdapterError, IncompatibleError
from loramerge.io._open import open_adapter
from loramerge.io._peft_kinds import FIELDS, KNOWN
from loramerge.plan import make_plan
from loramerge.recipe import Named, make_recipe
from tests.build import PREFIX, write_peft

A, B = np.ones((2, 6), np.float32), np.ones((4, 2), np.float32)
PLAIN = {"layers.0.q_proj": (A, B), "layers.1.q_proj": (A, B)}
Q = f"{PREFIX}layers.0.q_proj"


def opened(path: Path) -> Adapter:
    return open_adapter(str(path))


def refused(path: Path) -> IncompatibleError:
    """Why squeeze, the command that carries most, does not take an adapter."""
    recipe = make_recipe("squeeze", [Named(str(path))], {"rank": 1})
    with pytest.raises(IncompatibleError) as error:
        make_plan(recipe, [opened(path)])
    return error.value


OTHER_TYPES = [kind.value for kind in PeftType if kind.value != "LORA"]


@pytest.mark.parametrize("kind", [*OTHER_TYPES, "TOMORROW"])
def test_every_other_type_of_peft_is_refused_by_its_name_with_a_hint(
    kind: str, tmp_path: Path
) -> None:
    path = write_peft(tmp_path / "a", PLAIN, peft_type=kind)
    with pytest.raises(AdapterError, match=f"is a PEFT adapter of type {kind}: ") as error:
        opened(path)
    assert error.value.hint


@pytest.mark.parametrize("kind", ["PREFIX_TUNING", "P_TUNING", "CPT"])
def test_prompts_are_told_from_weights(kind: str, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, peft_type=kind)
    with pytest.raises(AdapterError, match="learns prompts and changes no weight"):
        opened(path)


@pytest.mark.parametrize("kind", ["VERA", "LOHA", "LOKR", "VBLORA"])
def test_what_peft_can_convert_gets_the_line_that_converts_it(kind: str, tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, peft_type=kind)
    with pytest.raises(AdapterError) as error:
        opened(path)
    assert "peft.save_as_lora" in str(error.value.hint)


# Field set in a config, as PEFT writes it -> the name it must be refused by.
VARIANTS: dict[str, tuple[Any, str]] = {
    "use_dora": (True, "DoRA"),
    "lora_bias": (True, "lora_bias"),
    "use_qalora": (True, "QALoRA"),
    "use_bdlora": ({"nblocks": 2, "target_modules_bd_a": ["q_proj"]}, "BD-LoRA"),
    "arrow_config": ({"top_k": 2}, "Arrow"),
    "kasa_config": ({"beta": 0.1}, "KaSA"),
    "velora_config": ({"num_groups": 2}, "VeLoRA"),
    "monteclora_config": ({"num_samples": 4}, "MonteCLoRA"),
    "alora_invocation_tokens": ([1, 2], "aLoRA"),
    "layer_replication": ([[0, 4], [2, 5]], "layer replication"),
}


@pytest.mark.parametrize("field", VARIANTS)
def test_every_variant_of_lora_is_refused_by_its_name_with_reason_and_hint(
    field: str, tmp_path: Path
) -> None:
    value, name = VARIANTS[field]
    error = refused(write_peft(tmp_path / "a", PLAIN, **{field: value}))
    assert f"is {name}: {FIELDS[field].reason}." in error.message
    assert error.hint


def test_every_variant_has_its_test() -> None:
    assert set(VARIANTS) == set(FIELDS)


@pytest.mark.parametrize("field", VARIANTS)
def test_a_variant_that_is_not_set_is_none(field: str, tmp_path: Path) -> None:
    unset: Any
    for unset in (None, False, [], {}):
        assert not opened(write_peft(tmp_path / "a", PLAIN, **{field: unset})).variants


@pytest.mark.parametrize(
    "init",
    ["pissa", "pissa_niter_16", "PiSSA", "olora", "OLoRA", "corda", "lora_ga", "LoftQ"],
)
def test_an_init_that_changes_the_base_model_is_refused(init: str, tmp_path: Path) -> None:
    error = refused(write_peft(tmp_path / "a", PLAIN, init_lora_weights=init))
    assert f"is {init} initialisation" in error.message or f"is {init}:" in error.message
    assert error.hint


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_an_init_that_leaves_the_base_model_alone_is_plain_lora(
    init: bool | str, tmp_path: Path
) -> None:
    adapter = opened(write_peft(tmp_path / "a", PLAIN, init_lora_weights=init))
    assert not adapter.variants
    assert not adapter.assumed


class Tiny(torch.nn.Module):
    """Something to adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 8)
        self.lin = torch.nn.Linear(8, 6)
        self.score = torch.nn.Linear(6, 3)


def saved(tmp_path: Path, **config: Any) -> Path:
    """A directory that PEFT itself wrote."""
    model = get_peft_model(Tiny(), LoraConfig(r=2, target_modules=["lin"], **config))
    with warnings.catch_warnings():
        # PEFT 0.21 takes the bias of lora_bias for a factor that lost its second dimension.
        warnings.simplefilter("ignore", PeftWarning)
        model.save_pretrained(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"kasa_config": KasaConfig()}, "KaSA"),
        ({"velora_config": VeloraConfig(num_groups=2)}, "VeLoRA"),
        ({"monteclora_config": MontecloraConfig()}, "MonteCLoRA"),
    ],
)
def test_keys_alone_give_a_variant_away(config: dict[str, Any], name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, **config)
    assert [variant.name for variant in opened(path).variants] == [name]
    (path / "adapter_config.json").unlink()
    assert [variant.name for variant in opened(path).variants] == [name]


def test_dora_magnitudes_under_an_adapter_name_are_dora(tmp_path: Path) -> None:
    extras = {f"{Q}.lora_magnitude_vector.default.weight": np.ones(4, np.float32)}
    path = write_peft(tmp_path / "a.safetensors", PLAIN, extras=extras)
    assert "is DoRA" in refused(path).message


@pytest.mark.parametrize(
    ("config", "extras"),
    [
        (
            {"modules_to_save": ["score"]},
            {"score.weight": "saved module", "score.bias": "bias"},
        ),
        ({"bias": "lora_only"}, {"lin.base_layer.bias": "bias"}),
        ({"bias": "all"}, {"lin.base_layer.bias": "bias", "score.bias": "bias"}),
        (
            {"trainable_token_indices": {"embed": [1, 2]}},
            {"embed.token_adapter.trainable_tokens_delta": "token rows"},
        ),
    ],
)
def test_what_peft_saves_beside_the_factors_is_named_by_its_role(
    config: dict[str, Any], extras: dict[str, str], tmp_path: Path
) -> None:
    adapter = opened(saved(tmp_path, **config))
    assert {extra.key: extra.role for extra in adapter.extras} == {
        PREFIX + key: role for key, role in extras.items()
    }
    assert list(adapter.modules) == ["lin"]
    assert not adapter.variants


def test_resized_embeddings_are_saved_modules(tmp_path: Path) -> None:
    extras = {f"{PREFIX}model.embed_tokens.weight": np.ones((10, 6), np.float32)}
    adapter = opened(write_peft(tmp_path / "a", PLAIN, extras=extras))
    assert [extra.role for extra in adapter.extras] == ["saved module"]


def test_a_plain_adapter_as_peft_saves_it_needs_no_word(tmp_path: Path) -> None:
    adapter = opened(saved(tmp_path))
    assert (adapter.variants, adapter.extras, adapter.assumed) == ((), (), ())


def test_every_field_of_this_peft_is_known() -> None:
    assert set(LoraConfig().to_dict()) <= KNOWN


def test_fields_nobody_knows_are_named_where_they_are_set(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, unset=None, zeal=[1], off=False, **{"é\n": 1})
    assert opened(path).assumed == ("config fields unknown to loramerge are left out: zeal, é\\n",)


def test_nothing_of_a_config_is_run_or_fetched(tmp_path: Path) -> None:
    path = write_peft(
        tmp_path / "a",
        PLAIN,
        auto_mapping={"base_model_class": "Model", "parent_library": "antigravity"},
        base_model_name_or_path="/nowhere/at/all",
    )
    assert not opened(path).assumed
    assert "antigravity" not in sys.modules


def test_a_type_with_control_characters_is_printed_escaped(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN, peft_type="\x1b[31mRED\n")
    with pytest.raises(AdapterError, match=r"of type \\x1b\[31mRED\\n:"):
        opened(path)


def test_peft_type_none_in_a_config_says_it_is_not_pefts(tmp_path: Path) -> None:
    path = write_peft(tmp_path / "a", PLAIN)
    text = json.loads((path / "adapter_config.json").read_text()) | {"peft_type": None}
    (path / "adapter_config.json").write_text(json.dumps(text))
    with pytest.raises(AdapterError, match="has no peft_type"):
        opened(path)


def test_what_is_more_than_one_kind_is_not_sent_from_one_command_to_the_other(
    tmp_path: Path,
) -> None:
    error = refused(write_peft(tmp_path / "a", PLAIN, use_dora=True, init_lora_weights="pissa"))
    assert "DoRA" in error.message
    assert "pissa initialisation" in error.message
    assert error.hint == "merge it into its base model in PEFT: model.merge_and_unload()"
