"""Adapters published by others, merged within the sets that share a base, and their quirks."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import loramerge
from loramerge.difference import difference
from loramerge.io._open import open_adapter
from tests.test_fused import delta
from tests.test_real_adapters import OTHERS, READ
from tests.typed import SHARED, typed

pytestmark = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs the real adapters of ../shared/adapters"
)
# What shares a base -> modules, tensors in the result, all tensors.
SETS = {
    ("gpt2-legal", "gpt2-medical", "gpt2-sports"): (36, 216, 216),
    ("samvit-r2", "samvit-r4", "samvit-r6", "samvit-r8", "samvit-r16"): (24, 240, 240),
    ("samvit-r8", "samvit-r4-zeroB"): (24, 96, 96),
    ("mlx-qwen05b-it100", "mlx-qwen05b-it200"): (8, 32, 32),
    (
        "cloneofsimo-disney-r1-ti",
        "cloneofsimo-disney-inpaint-mixed-dtype",
        "cloneofsimo-analog-r4-fp16",
    ): (192, 1154, 1156),
    ("gptneo-movies",): (24, 48, 48),
    ("privacyfilter-zh-mts",): (32, 66, 66),
}


def test_every_adapter_is_in_a_set() -> None:
    assert {name for names in SETS for name in names} == {p.name for p in SHARED.glob("*/")}


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_a_set_is_merged_to_its_exact_sum_and_covered(
    names: tuple[str, ...], tmp_path: Path
) -> None:
    paths = [SHARED / name for name in names]
    done = typed("cat", *paths, "--extras", "first", "-o", tmp_path / "out")
    assert done.code == 0, done.err
    modules, tensors, every = SETS[names]
    assert f"{modules} of {modules} merged, {tensors} of {every} tensors" in done.err
    error = re.search(r"relative error +(\S+)", done.err)
    assert error
    assert float(error[1]) < 1e-7  # float32 factors, concatenated


@pytest.mark.parametrize("names", [names for names in SETS if len(names) > 1], ids="+".join)
@pytest.mark.parametrize("method", ["cluster", "decorrelate", "ties", "tsv"])
def test_other_methods_take_every_set(method: str, names: tuple[str, ...], tmp_path: Path) -> None:
    given = [str(SHARED / name) for name in names]
    result, _ = loramerge.run(method, given, extras="first", rank=4, device="cpu")
    assert len(result.adapter.modules) == SETS[names][0]


@pytest.mark.parametrize("file", [*READ, *OTHERS])
def test_in_their_own_layout_every_factor_stays_to_the_bit(file: str, tmp_path: Path) -> None:
    before = open_adapter(str(SHARED / file))
    suffix = "" if before.layout in ("peft", "mlx") else ".safetensors"
    done = loramerge.convert(before, before.layout, tmp_path / f"again{suffix}")
    after = open_adapter(str(done.path))
    assert set(after.modules) == set(before.modules)
    for name, module in before.modules.items():
        assert after.modules[name].scaling == module.scaling
        for part in "AB":
            assert before.source.read(module.keys[part]) == after.source.read(
                after.modules[name].keys[part]
            )


@pytest.mark.parametrize(
    ("one", "two", "cosine"),
    [("legal", "medical", 0.202), ("legal", "sports", 0.201), ("medical", "sports", 0.714)],
)
def test_cosines_of_the_gpt2_adapters_are_those_of_the_catalogue(
    one: str, two: str, cosine: float
) -> None:
    adapters = [open_adapter(str(SHARED / f"gpt2-{name}")) for name in (one, two)]
    found = difference(*adapters).whole.cosine
    assert found == pytest.approx(cosine, abs=5e-4)  # three digits are given


def test_an_untrained_adapter_adds_nothing() -> None:
    trained, zero = (str(SHARED / name) for name in ("samvit-r8", "samvit-r4-zeroB"))
    result, report = loramerge.arithmetic([trained, zero])
    assert report.rank == (8, 8)
    before = open_adapter(trained)
    for name in before.modules:
        # The same factors through one SVD in float32.
        np.testing.assert_allclose(
            delta(result.adapter, name), delta(before, name), rtol=0, atol=1e-6
        )


def test_a_checkpoint_of_mlx_and_its_copy_are_one_adapter() -> None:
    folder = SHARED / "mlx-qwen05b-it200"
    one, two = (
        open_adapter(str(folder / n))
        for n in ("adapters.safetensors", "0000200_adapters.safetensors")
    )
    assert difference(one, two).whole.relative == 0


def test_only_the_last_layers_of_mlx_are_adapted_and_the_result_says_so(tmp_path: Path) -> None:
    paths, out = [SHARED / f"mlx-qwen05b-it{steps}" for steps in (100, 200)], tmp_path / "out"
    assert typed("cat", *paths, "-o", out).code == 0
    theirs, ours = (
        json.loads((path / "adapter_config.json").read_text()) for path in (paths[0], out)
    )
    assert ours["num_layers"] == theirs["num_layers"]
    layers = {name.split(".")[2] for name in open_adapter(str(out)).modules}
    assert layers == {"20", "21", "22", "23"}
    assert "/Users/" not in json.dumps(ours)


def test_a_second_copy_of_the_weights_is_not_read_twice(tmp_path: Path) -> None:
    folder = shutil.copytree(SHARED / "gptneo-movies", tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    shutil.copyfile(weights, folder / "Copy of adapter_model.safetensors")
    assert open_adapter(str(folder)).source.path == weights


def test_a_file_whose_length_is_no_multiple_of_eight_is_whole() -> None:
    adapter = open_adapter(str(SHARED / "privacyfilter-zh-mts"))
    assert adapter.source.size % 8
    assert len(adapter.source.tensors) == 66
    assert {extra.key for extra in adapter.extras} == {
        "base_model.model.score.bias",
        "base_model.model.score.weight",
    }  # its config names a classifier too, which it does not hold


def test_halves_beside_single_precision_are_each_read_as_stored() -> None:
    file = SHARED / "cloneofsimo-disney-inpaint-mixed-dtype" / "lora_disney_inpainting.safetensors"
    adapter, stored = open_adapter(str(file)), load_file(file)
    assert adapter.dtypes == ("F16",)
    assert {extra.info.dtype for extra in adapter.extras} == {"F32"}
    update = adapter.read("unet:10")
    np.testing.assert_array_equal(update.A, stored["unet:10:down"].astype("f4"))
