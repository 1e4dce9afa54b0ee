"""What trainers of diffusion models write into headers: what a result keeps, and its hashes."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

import loramerge as lm
from tests.build import write_kohya
from tests.conftest import factors
from tests.test_provenance import SECRET, header, sha256
from tests.typed import typed

# What trainers write into headers: true of a result, stale, and private.
TRUE = {
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_tag_frequency": '{"10_sks": {"sks dog / cat, 1/2": 3}}',
    "ss_sd_model_hash": "31e35c80",
    "modelspec.trigger_phrase": "sks: a dog",
    "modelspec.author": "https://example.org/me",
}
GONE = {
    "sshs_model_hash": "0" * 64,
    "modelspec.hash_sha256": "0x12",
    "ss_output_name": "mine",
    "ss_network_args": '{"conv_dim": "4"}',
    "unknown_key": "x",
}
LEAKS = {
    "ss_sd_model_name": f"/home/{SECRET}/sd.safetensors",
    "ss_datasets": f'[{{"subsets": [{{"image_dir": "C:\\\\Users\\\\{SECRET}"}}]}}]',
    "ss_vae_name": f"..\\{SECRET}\\vae.pt",
    "ss_training_comment": f"config=~/{SECRET}.toml",
    "modelspec.description": f"see file:///{SECRET}, hf_{'x' * 34}",
}


@pytest.mark.parametrize("words", ["squeeze x.safetensors -r 2", "cat x.safetensors y.safetensors"])
@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_what_trainers_write_is_kept_where_it_is_agreed_on_and_neither_stale_nor_private(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, words: str, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    A, B = factors(rng, 4)["layers.0.q_proj"]
    for name in "xy":
        facts = {**TRUE, **GONE, **LEAKS, "ss_seed": name}
        write_kohya(tmp_path / f"{name}.safetensors", {"lora_unet_q": (A, B, 2)}, metadata=facts)
    done = typed(*words.split(), "-o", out)
    assert done.code == 0, done.err
    file = tmp_path / out if (tmp_path / out).is_file() else next((tmp_path / out).glob("*.saf*"))
    found = header(file)
    assert {key: found[key] for key in TRUE} == TRUE
    assert ("ss_seed" in found) is words.startswith("squeeze")
    assert not found.keys() & (GONE.keys() | LEAKS.keys()) - {"sshs_model_hash"}
    assert SECRET.encode() not in file.read_bytes()
    assert "facts of the header that are not carried: modelspec.description" in done.err


@pytest.mark.parametrize("size", [4, 3000], ids=["small", "above 1 MiB"])
def test_the_hashes_of_a_kohya_result_are_those_kohya_would_give_it(
    tmp_path: Path, rng: np.random.Generator, size: int
) -> None:
    modules = {
        f"lora_unet_{letter}": (rng.standard_normal((9, size)), rng.standard_normal((40, 9)), 4)
        for letter in "abcdefgh"
    }
    stale = {"sshs_model_hash": "0" * 64, "sshs_legacy_hash": "12345678", "ss_v2": "False"}
    write_kohya(tmp_path / "a.safetensors", modules, metadata=stale)
    result, _ = lm.squeeze(tmp_path / "a.safetensors", rank=8)
    file = result.save(tmp_path / "out.safetensors")
    found = header(file)
    assert found["ss_v2"] == "False"
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(file)


def kohya_hashes(file: Path) -> tuple[str, str]:
    """As networks/lora.py and train_util.py of sd-scripts compute them before they save."""
    training = {key: text for key, text in header(file).items() if key.startswith("ss_")}
    content = save(load_file(file), training)
    start = 8 + int.from_bytes(content[:8], "little")
    return sha256(content[start:]), sha256(content[0x100000:0x110000])[:8]
