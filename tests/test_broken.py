"""Bad files, as typed: one sentence, a hint, exit 1, and nothing left behind."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loramerge.registry import layout_names
from tests.typed import tree, typed

FIXTURES = Path(__file__).parents[1] / "fixtures"
BROKEN = FIXTURES / "broken"
MADE = ("broken", "golden.json", *layout_names())
# Everything small must stay small: it is read by people and cloned by everybody.
MAX_BYTES = 300_000

A = r"layers\.0\.q_proj\.lora_A\.weight"
B = r"layers\.0\.q_proj\.lora_B\.weight"
SENSELESS = rf"describes tensor '.*{A}' in a way that makes no sense: "
SENTENCES = {
    "alpha_is_nan": r"lora_alpha is nan, not a number",
    "alpha_is_text": r"lora_alpha is '16', not a number",
    "comfy_pair_and_difference.safetensors": r"self_attn\.q have a pair and a whole difference",
    "comfy_reshaped.safetensors": r"looks like comfy, but .*img_in\.reshape_weight",
    "config_is_a_list": r"adapter_config\.json is not a JSON object",
    "config_is_not_json": r"adapter_config\.json is not JSON",
    "config_without_type": r"has no peft_type",
    "control_characters.safetensors": r"unusable tensor name: '\\x1b\[31mred\\nhint: run me\\x00'",
    "diffusers_alpha_is_text.safetensors": r"_adapter_metadata: lora_alpha is '4', not a number",
    "diffusers_bias.safetensors": r"is lora_bias: lora_B carries a bias",
    "diffusers_dora.safetensors": r"is DoRA: its magnitudes act on the sum",
    "diffusers_in_two_spellings.safetensors": r"holds unet\.mid_block\..*\.attn1\.to_q twice: ",
    "diffusers_scale_twice.safetensors": r"states its scale twice, in alpha tensors and in lora_",
    "dora": r"is DoRA: its magnitudes act on the sum",
    "dtype_is_a_list.safetensors": SENSELESS + "its dtype is no text",
    "duplicate_keys.safetensors": rf"names these keys twice: .*{A}\.",
    "empty.safetensors": r"is empty",
    "entry_is_a_number.safetensors": SENSELESS + "it is no object",
    "facts_are_no_json.safetensors": r"lora_adapter_metadata in its header is not a JSON object",
    "float8.safetensors": rf"{A} is stored as F8_E4M3; low-rank factors must be",
    "full_model.safetensors": r"is no LoRA .* it holds model\.embed_tokens\.weight",
    "gguf.safetensors": r"is a GGUF file",
    "header_is_a_list.safetensors": r"has a header that begins with '\['",
    "header_is_nested.safetensors": r"JSON of a depth|no object",  # Python decides how deep is deep
    "header_is_not_json.safetensors": r"its header is not JSON",
    "header_is_not_utf8.safetensors": r"its header is not UTF-8",
    "holes.safetensors": r"its tensors leave holes between them",
    "huge_dimension.safetensors": SENSELESS + "it has a dimension of 1,099,511,627,776",
    "infinite.safetensors": r"layers\.0\.q_proj.* holds Inf",
    "integers.safetensors": rf"{A} is stored as I8",
    "json.safetensors": r"is a JSON text",
    "kohya_alpha_nan.safetensors": r"lora_unet_a\.alpha is nan",
    "kohya_alpha_of_two.safetensors": r"lora_unet_a\.alpha is F32 \[2\], not one number",
    "kohya_only_alpha.safetensors": r"belong to no pair: lora_unet_b\.alpha",
    "kohya_only_down.safetensors": r"lacks its other half: lora_unet_a\.lora_down\.weight",
    "lfs_pointer.safetensors": r"is a Git LFS pointer",
    "live_state_dict.safetensors": r"state dict of a live PEFT model: .*modules_to_save",
    "long_name.safetensors": r"unusable tensor name: 'x{80}'",
    "many_dimensions.safetensors": SENSELESS + "it has 9 dimensions",
    "metadata_is_a_list.safetensors": r"metadata that is no object",
    "metadata_is_half_a_pair.safetensors": r"metadata with half a character",
    "metadata_is_not_text.safetensors": r"metadata that is not text",
    "metadata_only.safetensors": r"holds no tensors, but metadata",
    "mlx.safetensors": r"1 tensor lacks its other half: q_proj\.lora_a",
    "nan.safetensors": r"layers\.0\.q_proj.* holds NaN",
    "negative_offset.safetensors": SENSELESS + "its data_offsets has a number below zero",
    "negative_shape.safetensors": SENSELESS + "its shape has a number below zero",
    "no_adapter": r"holds no adapter",
    "no_offsets.safetensors": SENSELESS + "it has no data_offsets",
    "no_tensors.safetensors": r"holds no tensors\.",
    "onetrainer_only_alpha.safetensors": r"belong to no pair: transformer\..*qkv\.0\.alpha",
    "only_a.safetensors": rf"1 tensor lacks its other half: .*{A}",
    "only_a_pickle": r"adapter_model\.bin is a pickle \(\.bin\)",
    "only_b.safetensors": rf"1 tensor lacks its other half: .*{B}",
    "other_peft_type": r"is a PEFT adapter of type IA3",
    "overlapping.safetensors": r"its tensors overlap",
    "pattern_is_a_list": r"alpha_pattern is not an object",
    "pattern_is_invalid": r"rank_pattern has an invalid pattern 'q_proj\('",
    "pattern_is_no_number": r"alpha_pattern\['q_proj'\] is not a number",
    "pattern_takes_for_ever": r"could take for ever to match: '\(a\|a\)\*b'",
    "pickle.bin": r"is a pickle \(\.bin\), which can run code",
    "pickle.safetensors": r"is a pickle, which can run code",
    "same_tensor_twice.safetensors": r"are the same tensor of one module",
    "several_files": r"holds 2 safetensors files: .*one\.safetensors, .*two\.safetensors",
    "shape_is_text.safetensors": SENSELESS + "its shape is no list of whole numbers",
    "shapes_do_not_multiply.safetensors": rf"{A} \[2, 6\] and .*{B} \[6, 3\] do not multiply",
    "short.safetensors": r"is not a safetensors file: it has 3 bytes",
    "sora_every_gate_closed.safetensors": r"every gate of every module is closed",
    "sora_gates_of_another_rank.safetensors": r"q\.lora\.gate holds 3 gates for rank 2",
    "sora_only_gate.safetensors": r"belong to no pair: v\.lora\.gate",
    "text.safetensors": r"is not a safetensors file: it begins with 'These are",
    "trailing_bytes.safetensors": r"has 2 bytes after its last tensor",
    "truncated_data.safetensors": r"is truncated: 40 of 272 bytes are missing",
    "truncated_header.safetensors": r"is truncated inside its header: 532 bytes of it are missing",
    "two_adapters.safetensors": r"holds 2 adapters in one file: a, b",
    "unexplained.safetensors": r"keys are not explained: optimizer\.step",
    "ungathered_empty.safetensors": rf"holds 2 empty tensors \(.*{A}, .*{B}\), as DeepSpeed ZeRO-3",
    "ungathered_flat.safetensors": rf"{A} has the shape \[12\]: .* DeepSpeed ZeRO-3",
    "unknown_dtype.safetensors": rf"stores '.*{A}' as F4, a dtype loramerge does not know",
    "unknown_lora.safetensors": r"keys are not explained: base_model\.model\.lin\.lora_C",
    "web_page.safetensors": r"is a web page \(HTML\)",
    "wrapped_twice.safetensors": rf"holds layers\.0\.q_proj twice: .*{A}, module\..*{A}",
    "wrong_size.safetensors": rf"'.*{A}' has 40 bytes, not \[2, 6\] F32",
    "xlabs_only_down.safetensors": r"lacks its other half: double_blocks\..*qkv_lora1\.down",
    "zip.safetensors": r"is a PyTorch pickle",
}


def test_there_is_a_sentence_for_every_broken_file() -> None:
    assert sorted(path.name for path in BROKEN.iterdir()) == sorted(SENTENCES)


@pytest.mark.parametrize("name", SENTENCES)
def test_a_broken_file_gets_one_sentence_and_a_hint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = typed("squeeze", BROKEN / name, "--rank", "1", "-o", "out/small")
    assert (done.code, done.out) == (1, "")
    error, hint = done.lines  # two lines, and no more
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    assert error.endswith(".")
    assert name in error
    assert re.search(SENTENCES[name], error)
    assert tree(tmp_path) == []


def test_no_two_of_them_get_the_same_sentence() -> None:
    said: dict[str, list[str]] = {}
    for name in SENTENCES:
        error = typed("squeeze", BROKEN / name, "--rank", "1", "-o", "/nowhere/at/all").lines[0]
        said.setdefault(error.replace(name, "..."), []).append(name)
    # One thing in two layouts.
    assert [names for names in said.values() if len(names) > 1] == [
        ["diffusers_dora.safetensors", "dora"]
    ]


@pytest.mark.parametrize("name", SENTENCES)
def test_a_merge_names_the_broken_file_of_two(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = typed("arithmetic", FIXTURES / "peft" / "unscaled", BROKEN / name)
    assert done.code == 1
    assert [line.partition(":")[0] for line in done.lines] == ["error", "hint"]
    assert name in done.lines[0]
    assert tree(tmp_path) == []


def small(folder: Path) -> dict[str, bytes]:
    """Every generated file by its path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for name in MADE
        for path in ([folder / name] if (folder / name).is_file() else (folder / name).rglob("*"))
        if path.is_file()
    }


def test_fixtures_are_made_again_to_the_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FIXTURES / "make.py", tmp_path], check=True)
    assert small(tmp_path) == small(FIXTURES)


def test_fixtures_stay_small() -> None:
    assert sum(map(len, small(FIXTURES).values())) < MAX_BYTES
