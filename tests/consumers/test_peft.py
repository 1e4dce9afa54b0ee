"""PEFT and transformers: loaded, switched and swapped in, the outputs are what they must be."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    LoHaConfig,
    LoKrConfig,
    PeftConfig,
    PeftModel,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

from tests.consumers.deviations import compare
from tests.consumers.forms import FORMS, Made
from tests.consumers.llama import TOKENS, logits, model
from tests.consumers.traps import TRAPS
from tests.consumers.verdicts import judge

pytestmark = pytest.mark.consumers
PEFT = f"peft {peft.__version__}"
TRANSFORMERS = f"transformers {transformers.__version__}"
# The base alone is off by 6e-7: float32 rounds by 6e-8, some ten times in a row.
FLOAT32 = 5e-6
UNIFORM = [name for name in FORMS if not name.endswith("pattern") and name != "converted"]
every_form = pytest.mark.parametrize("form", FORMS)
uniform_forms = pytest.mark.parametrize("form", UNIFORM)


def outputs(loaded: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return loaded.eval()(torch.tensor([TOKENS])).logits[0].numpy()


def in_peft(path: Path) -> torch.nn.Module:
    return PeftModel.from_pretrained(model(), str(path))


def in_transformers(path: Path) -> torch.nn.Module:
    loaded = model()
    loaded.load_adapter(str(path))
    return loaded


def swapped(path: Path, first: Path) -> torch.nn.Module:
    """An adapter in the place of one that was loaded before."""
    loaded = PeftModel.from_pretrained(model(), str(first))
    hotswap_adapter(loaded, str(path), adapter_name="default")
    return loaded


def check(program: str, versions: str, what: str, loaded: torch.nn.Module, one: Made) -> None:
    compare(program, versions, what, outputs(loaded), logits(one.deltas), logits(), allowed=FLOAT32)


@every_form
def test_peft_loads_every_form(form: str, forms: Mapping[str, Made]) -> None:
    check("PEFT", PEFT, form, in_peft(forms[form].path), forms[form])


@every_form
def test_transformers_loads_every_form(form: str, forms: Mapping[str, Made]) -> None:
    loaded = in_transformers(forms[form].path)
    check("transformers", f"{TRANSFORMERS}, {PEFT}", form, loaded, forms[form])


def test_peft_switches_between_forms_of_different_ranks(forms: Mapping[str, Made]) -> None:
    loaded = in_peft(next(iter(forms.values())).path)
    for number, one in enumerate(forms.values()):
        loaded.load_adapter(str(one.path), adapter_name=str(number))
    for number, one in enumerate(forms.values()):
        loaded.set_adapter(str(number))
        check("PEFT", PEFT, "switched with set_adapter", loaded, one)


@uniform_forms
@pytest.mark.parametrize("padded", [False, True])
def test_peft_swaps_uniform_forms_of_any_rank_in(
    form: str, padded: bool, forms: Mapping[str, Made]
) -> None:
    loaded = in_peft(forms["merge, uniform"].path)
    if padded:
        prepare_model_for_compiled_hotswap(loaded, target_rank=16)
    hotswap_adapter(loaded, str(forms[form].path), adapter_name="default")
    what = "hotswap, padded to rank 16" if padded else "hotswap"
    check("PEFT", PEFT, what, loaded, forms[form])


@pytest.mark.parametrize("program", ["peft", "transformers", "peft-hotswap"])
@pytest.mark.parametrize("trap", TRAPS)
@pytest.mark.filterwarnings("ignore:.*missing adapter keys:UserWarning")
def test_verify_says_what_they_do(
    program: str, trap: str, tmp_path: Path, forms: Mapping[str, Made]
) -> None:
    one = TRAPS[trap](tmp_path / "a")
    loads: Mapping[str, Callable[[Path], torch.nn.Module]] = {
        "peft": in_peft,
        "transformers": in_transformers,
        "peft-hotswap": lambda path: swapped(path, forms["merge, uniform"].path),
    }
    wanted, without = logits(one.deltas), logits()
    judge(program, one.path, lambda path: outputs(loads[program](path)), wanted, without, FLOAT32)


TARGETS = ["q_proj", "o_proj"]
TYPES: dict[str, PeftConfig] = {
    "adalora": AdaLoraConfig(
        target_modules=TARGETS, init_r=4, target_r=4, total_step=9, tinit=1, tfinal=1
    ),
    "loha": LoHaConfig(target_modules=TARGETS, r=3, alpha=6),
    "lokr": LoKrConfig(target_modules=TARGETS, r=3, alpha=6),
    "vblora": VBLoRAConfig(target_modules=TARGETS, num_vectors=10, vector_length=4, topk=3),
    "vera": VeraConfig(target_modules=["q_proj", "v_proj"], r=4),
}


@pytest.mark.parametrize("program", ["peft", "transformers"])
@pytest.mark.parametrize("kind", TYPES)
def test_verify_says_what_they_do_with_other_types(program: str, kind: str, tmp_path: Path) -> None:
    source = get_peft_model(model(), TYPES[kind])
    draw = torch.Generator().manual_seed(4)
    for parameter in source.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3, generator=draw)
    source.save_pretrained(str(tmp_path / "a"))
    load = in_peft if program == "peft" else in_transformers
    wanted = outputs(source).astype("f8")
    judge(program, tmp_path / "a", lambda p: outputs(load(p)), wanted, logits(), FLOAT32)
