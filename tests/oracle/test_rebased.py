"""Starts that change the base (PiSSA, OLoRA): our conversion against what PEFT merges."""

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn

from loramerge.errors import IncompatibleError
from loramerge.io._checkpoint import open_checkpoint
from loramerge.io._open import open_adapter
from loramerge.rebase import rebased, recomputed
from tests.build import write_peft
from tests.typed import typed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(16, 12, bias=False), nn.Linear(16, 20, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q(x).sum() + self.v(x).sum()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_update_relative_to_the_true_base_is_that_of_peft(init: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"], init_lora_weights=init)
    base = Model()
    before = {name: weight.clone().numpy() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = init
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(tmp_path / "trained")
    trained, initial = (open_adapter(str(tmp_path / name)) for name in ("trained", "initial"))
    after = model.merge_and_unload().state_dict()
    assert trained.variants  # refused as it is
    ours = rebased(trained, initial)
    assert not ours.variants
    for name, module in ours.modules.items():
        assert module.rank == 6
        update = ours.read(name)
        wanted = after[f"{name}.weight"].numpy() - before[f"{name}.weight"]
        # PEFT takes the start out of the base and adds it again, in float32
        np.testing.assert_allclose(update.B @ update.A, wanted, atol=2e-6)


def test_convert_writes_the_plain_adapter_that_peft_computes_the_same_with(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["q", "v"], init_lora_weights="pissa")
    base = Model()
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "initial")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(tmp_path / "trained")
    refused = typed("cat", tmp_path / "trained", "-o", tmp_path / "no")
    assert refused.code == 1
    assert "--initial" in refused.err
    words = ("--initial", tmp_path / "initial", "--to", "peft", "-o", tmp_path / "plain")
    done = typed("convert", tmp_path / "trained", *words)
    assert done.code == 0, done.err
    after = model.merge_and_unload().state_dict()
    fresh = Model()
    fresh.load_state_dict(before)
    plain = PeftModel.from_pretrained(fresh, tmp_path / "plain").merge_and_unload().state_dict()
    for name, weight in after.items():
        torch.testing.assert_close(plain[name], weight, rtol=0, atol=2e-6)


def test_a_start_of_other_modules_is_refused(tmp_path: Path) -> None:
    for name, targets in (("one", ["q", "v"]), ("two", ["q"])):
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights="pissa")
        get_peft_model(Model(), config).save_pretrained(tmp_path / name)
    one, two = (open_adapter(str(tmp_path / name)) for name in ("one", "two"))
    with pytest.raises(IncompatibleError, match="does not hold the start of v"):
        rebased(one, two)


def trained(init: str, base: Model, folder: Path, **config: object) -> dict[str, np.ndarray]:
    """A trained adapter and its base, as saved; what PEFT makes of W less W."""
    torch.manual_seed(0)
    save_file(base.state_dict(), folder / "model.safetensors")
    before = {name: weight.clone().double() for name, weight in base.state_dict().items()}
    wishes = {"r": 3, "lora_alpha": 5, "target_modules": ["q", "v"], "init_lora_weights": init}
    model = get_peft_model(base, LoraConfig(**(wishes | config)))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) / 10
    model.save_pretrained(folder / "trained")
    after = model.merge_and_unload().state_dict()
    return {name: (after[name].double() - W).numpy() for name, W in before.items()}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_the_base_alone_says_what_pissa_and_olora_started_from(
    init: str, rslora: bool, tmp_path: Path
) -> None:
    wanted = trained(init, Model(), tmp_path, use_rslora=rslora)
    words = ("--base", tmp_path / "model.safetensors", "--to", "peft", "-o", tmp_path / "plain")
    done = typed("convert", tmp_path / "trained", *words)
    assert done.code == 0, done.err
    ours = open_adapter(str(tmp_path / "plain"))
    assert not ours.variants
    for name, module in ours.modules.items():
        assert (module.rank, module.dtype) == (6, "F32")
        update = ours.read(name, wide=True)
        # float32 decompositions of weights of length 3 or so, theirs and ours
        np.testing.assert_allclose(update.B @ update.A, wanted[f"{name}.weight"], atol=5e-6)


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_starts_that_depend_on_chance_or_data_are_not_computed_again(
    init: str, tmp_path: Path
) -> None:
    base = Model()
    save_file(base.state_dict(), tmp_path / "model.safetensors")
    pair = (np.ones((3, 16)), np.ones((12, 3)))
    path = write_peft(tmp_path / "a", {"q": pair}, init_lora_weights=init)
    with pytest.raises(IncompatibleError, match=f"computed again for initialisation {init}"):
        recomputed(open_adapter(str(path)), open_checkpoint(str(tmp_path / "model.safetensors")))


def test_a_start_that_equal_singular_values_leave_open_is_refused(tmp_path: Path) -> None:
    save_file({"q.weight": torch.eye(12, 16)}, tmp_path / "model.safetensors")
    pair = (np.ones((3, 16)), np.ones((12, 3)))
    path = write_peft(tmp_path / "a", {"q": pair}, init_lora_weights="pissa")
    adapter = recomputed(
        open_adapter(str(path)), open_checkpoint(str(tmp_path / "model.safetensors"))
    )
    with pytest.raises(IncompatibleError, match="singular values 3 and 4 of its base weight"):
        adapter.read("q")


def test_only_one_of_initial_and_base_is_taken(tmp_path: Path) -> None:
    trained("pissa", Model(), tmp_path)
    given = ("--initial", tmp_path / "trained", "--base", tmp_path / "model.safetensors")
    done = typed("convert", tmp_path / "trained", "--to", "peft", *given)
    assert done.code == 2
    assert "only one of --initial and --base" in done.err


@pytest.mark.parametrize("init", ["corda", "lora_ga", "pissa_niter_4"])
def test_any_start_is_taken_out_where_it_was_saved(init: str, tmp_path: Path) -> None:
    draw = np.random.default_rng(3)
    first = (draw.standard_normal((3, 16)), draw.standard_normal((12, 3)))
    pairs = [tuple(factor + draw.standard_normal(factor.shape) / 5 for factor in first), first]
    now, start = (
        open_adapter(
            str(write_peft(tmp_path / name, {"q": pair}, lora_alpha=6, init_lora_weights=init))
        )
        for name, pair in zip(("now", "start"), pairs, strict=True)
    )
    plain = rebased(now, start)
    assert not plain.variants
    update = plain.read("q", wide=True)
    (A, B), (A0, B0) = ([x.astype("f4").astype(float) for x in pair] for pair in pairs)
    np.testing.assert_allclose(update.B @ update.A, 2 * (B @ A - B0 @ A0), rtol=1e-12, atol=1e-12)


def written(folder: Path, *, r: int = 3, **config: object) -> Path:
    draw = np.random.default_rng(len(folder.name))
    pair = (draw.standard_normal((r, 16)), draw.standard_normal((12, r)))
    return write_peft(folder, {"q": pair}, **config)


def test_a_start_of_another_kind_or_rank_or_adapter_is_refused(tmp_path: Path) -> None:
    trained = open_adapter(str(written(tmp_path / "a", init_lora_weights="pissa")))
    other = open_adapter(str(written(tmp_path / "bb", init_lora_weights="olora")))
    with pytest.raises(IncompatibleError, match=r"began as pissa, .* as olora"):
        rebased(trained, other)
    other = open_adapter(str(written(tmp_path / "ccc", r=2, init_lora_weights="pissa")))
    with pytest.raises(IncompatibleError, match="does not hold the start of q"):
        rebased(trained, other)
    for name in ("dddd", "zeros"):
        folder = written(tmp_path / name, init_lora_weights="pissa")
        if name == "zeros":
            write_peft(folder, {"q": (np.ones((3, 16)), np.zeros((12, 3)))})
        with pytest.raises(IncompatibleError, match="q has nothing of what it would have started"):
            rebased(trained, open_adapter(str(folder))).read("q")


def test_another_base_is_refused_where_nothing_of_it_is_in_the_adapter(tmp_path: Path) -> None:
    trained("olora", Model(), tmp_path)
    torch.manual_seed(8)
    save_file(Model().state_dict(), tmp_path / "other.safetensors")
    words = ("--to", "peft", "--base", tmp_path / "other.safetensors", "-o", tmp_path / "plain")
    done = typed("convert", tmp_path / "trained", *words)
    assert done.code == 1
    assert f"q has nothing of what it would have started from by {tmp_path.name}" in done.err
    assert "hint: name the base model that this adapter was trained on" in done.err


def test_the_report_says_what_was_taken_off_and_what_is_strange_about_it(tmp_path: Path) -> None:
    adapter = open_adapter(str(written(tmp_path / "a", lora_alpha=6, init_lora_weights=True)))
    start = write_peft(
        tmp_path / "start",
        {name: (np.ones((3, 16)), np.ones((12, 3))) for name in ("q", "v")},
        lora_alpha=3,
    )
    assert rebased(adapter, open_adapter(str(start))).assumed == (
        "what it started from, start, is taken off, which doubles its ranks",
        "its init_lora_weights is true: it may stand against its base as it is",
        "the scale of start is another one for q",
        "start also holds the start of v, which is left out",
    )


def test_an_adapter_whose_base_did_not_change_needs_no_base(tmp_path: Path) -> None:
    save_file(Model().state_dict(), tmp_path / "model.safetensors")
    base = open_checkpoint(str(tmp_path / "model.safetensors"))
    for init in (True, "gaussian", "loftq"):
        adapter = open_adapter(str(written(tmp_path / "a", init_lora_weights=init)))
        with pytest.raises(IncompatibleError, match="--base tells nothing of it") as refused:
            recomputed(adapter, base)
        assert refused.value.hint == "leave --base out"


def test_a_start_of_loftq_does_not_make_it_plain(tmp_path: Path) -> None:
    one = written(tmp_path / "a", init_lora_weights="loftq")
    done = typed("convert", one, "--initial", one, "--to", "peft", "-o", tmp_path / "plain")
    assert done.code == 1
    assert "LoftQ" in done.err


def test_what_is_taken_off_is_taken_off_under_another_name_too(tmp_path: Path) -> None:
    adapter, start = (
        write_peft(
            tmp_path / name,
            {"q_proj": (np.full((1, 4), value), np.ones((6, 1)))},
            init_lora_weights="lora_ga",
        )
        for name, value in (("a", 3.0), ("start", 1.0))
    )
    words = ("--initial", start, "--to", "peft", "--rename", "q_proj=k_proj", "-o", tmp_path / "b")
    done = typed("convert", adapter, *words)
    assert done.code == 0, done.err
    update = open_adapter(str(tmp_path / "b")).read("k_proj")
    np.testing.assert_array_equal(update.B @ update.A, np.full((6, 4), 2.0))
