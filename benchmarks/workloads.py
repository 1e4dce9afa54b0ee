"""Seeded adapters of the sizes people have, for benchmarks: no torch, no download.

python benchmarks/workloads.py llama8b DIRECTORY --adapters 4 [--layers 32]

llama8b (W1): PEFT, 32 layers of 7 modules, rank 16, alpha 32, bfloat16: 84 MB each.
sdxl (W2): kohya, 722 linear and 34 convolution modules, rank 32, alpha 16, float16: 191 MB each.
small (W3): PEFT, 12 modules of DistilBERT, rank 8, alpha 16, float32: 0.6 MB each.

Singular values fall like trained ones, s_i ~ exp(-i / 0.6 r) / (i + 1), and half of the energy of
the singular directions is common to all adapters of a workload. Factors are mixed by a random
rotation, since trained factors are not aligned with singular vectors.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loramerge.compute import encode, single_threaded_blas
from loramerge.io._layout import Stored, Written
from loramerge.io._write import TensorWriter, start_file

Matrix = npt.NDArray[np.float32]

# The share of the energy of the singular directions that all adapters have in common.
COMMON = 0.5


@dataclass(frozen=True)
class Layer:
    """One adapted layer: B @ A is out_features x in_features * kernel^2."""

    name: str
    in_features: int
    out_features: int
    kernel: int = 1


@dataclass(frozen=True)
class Workload:
    """Which layers, at which rank and alpha, how they are stored, and how one file is written."""

    layers: Callable[[int], list[Layer]]
    rank: int
    alpha: int
    dtype: str
    peft: bool


def llama8b(layers: int) -> list[Layer]:
    hidden, grouped, inner = 4096, 1024, 14336
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden, grouped),
        "self_attn.v_proj": (hidden, grouped),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return [
        Layer(f"base_model.model.model.layers.{at}.{name}", *shape)
        for at in range(layers)
        for name, shape in shapes.items()
    ]


def small(layers: int) -> list[Layer]:
    stem = "base_model.model.distilbert.transformer.layer"
    return [
        Layer(f"{stem}.{at}.attention.{name}", 768, 768)
        for at in range(min(layers, 6))
        for name in ("q_lin", "v_lin")
    ]


def sdxl(layers: int) -> list[Layer]:
    """Fewer than 32 `layers` keep that share of the modules, evenly spread."""
    found = []
    for block, width, depth in (
        *((f"input_blocks_{at}_1", 640, 2) for at in (4, 5)),
        *((f"input_blocks_{at}_1", 1280, 10) for at in (7, 8)),
        ("middle_block_1", 1280, 10),
        *((f"output_blocks_{at}_1", 1280, 10) for at in (0, 1, 2)),
        *((f"output_blocks_{at}_1", 640, 2) for at in (3, 4, 5)),
    ):
        found += list(_transformer(f"lora_unet_{block}", width, depth))
    for block, into, out in (
        *(("input_blocks_1_0", 320, 320), ("input_blocks_2_0", 320, 320)),
        *(("input_blocks_4_0", 320, 640), ("input_blocks_5_0", 640, 640)),
        *(("input_blocks_7_0", 640, 1280), ("input_blocks_8_0", 1280, 1280)),
        *(("middle_block_0", 1280, 1280), ("middle_block_2", 1280, 1280)),
        *(("output_blocks_0_0", 2560, 1280), ("output_blocks_1_0", 2560, 1280)),
        *(("output_blocks_2_0", 1920, 1280), ("output_blocks_3_0", 1920, 640)),
        *(("output_blocks_4_0", 1280, 640), ("output_blocks_5_0", 960, 640)),
        *(("output_blocks_6_0", 960, 320), ("output_blocks_7_0", 640, 320)),
        ("output_blocks_8_0", 640, 320),
    ):
        found.append(Layer(f"lora_unet_{block}_in_layers_2", into, out, kernel=3))
        found.append(Layer(f"lora_unet_{block}_out_layers_3", out, out, kernel=3))
    return found[:: 32 // layers]


def _transformer(stem: str, width: int, depth: int) -> Iterator[Layer]:
    context = 2048
    yield Layer(f"{stem}_proj_in", width, width)
    yield Layer(f"{stem}_proj_out", width, width)
    for at in range(depth):
        block = f"{stem}_transformer_blocks_{at}"
        for attention, into in (("attn1", width), ("attn2", context)):
            yield Layer(f"{block}_{attention}_to_q", width, width)
            yield Layer(f"{block}_{attention}_to_k", into, width)
            yield Layer(f"{block}_{attention}_to_v", into, width)
            yield Layer(f"{block}_{attention}_to_out_0", width, width)
        yield Layer(f"{block}_ff_net_0_proj", width, 8 * width)
        yield Layer(f"{block}_ff_net_2", 4 * width, width)


WORKLOADS = {
    "llama8b": Workload(llama8b, rank=16, alpha=32, dtype="BF16", peft=True),
    "sdxl": Workload(sdxl, rank=32, alpha=16, dtype="F16", peft=False),
    "small": Workload(small, rank=8, alpha=16, dtype="F32", peft=True),
}


def factors(layer: Layer, rank: int, place: int, adapters: int) -> Iterator[tuple[Matrix, Matrix]]:
    """A [r, n] and B [m, r] of one layer in each adapter; the same numbers in every run."""
    sizes = (layer.in_features * layer.kernel**2, layer.out_features)
    draw = np.random.default_rng([place])
    common = [draw.standard_normal((size, rank), dtype=np.float32) for size in sizes]
    index = np.arange(rank, dtype=np.float32)
    root = np.sqrt(np.exp(-index / (0.6 * rank)) / (index + 1))
    for adapter in range(adapters):
        draw = np.random.default_rng([place, adapter])
        rotation = np.linalg.qr(draw.standard_normal((rank, rank)))[0].astype(np.float32)
        mix = root[:, None] * rotation
        sides = []
        for size, shared in zip(sizes, common, strict=True):
            own = draw.standard_normal((size, rank), dtype=np.float32)
            length = 1 / math.sqrt(size)
            sides.append(shared @ (mix * math.sqrt(COMMON) * length))
            sides[-1] += own @ (mix * math.sqrt(1 - COMMON) * length)
        yield sides[0].T, sides[1]


def make(name: str, directory: Path, adapters: int, layers: int = 32) -> list[Path]:
    """Write adapters 0, 1, ... of a workload: PEFT directories, or single kohya files."""
    workload = WORKLOADS[name]
    rank, chosen = workload.rank, workload.layers(layers)
    paths = [
        directory / f"a{at}{'' if workload.peft else '.safetensors'}" for at in range(adapters)
    ]
    writers = [_started(path, workload, layers) for path in paths]
    alpha = encode(np.array(workload.alpha, np.float32), workload.dtype).tobytes()

    def fill(place: int) -> None:
        keys = [stored.key for stored in _stored(chosen[place], workload)]
        sides = factors(chosen[place], rank, place, adapters)
        for writer, (A, B) in zip(writers, sides, strict=True):
            parts = [encode(A, workload.dtype).tobytes(), encode(B, workload.dtype).tobytes()]
            for key, data in zip(keys, [*parts, alpha], strict=False):
                writer.write(key, data)

    with single_threaded_blas(), ThreadPoolExecutor() as pool:
        list(pool.map(fill, range(len(chosen))))
    for writer in writers:
        os.close(writer.descriptor)
    return paths


def _started(path: Path, workload: Workload, layers: int) -> TensorWriter:
    """An open weights file with its header, and the config beside it."""
    file = path / "adapter_model.safetensors" if workload.peft else path
    file.parent.mkdir(parents=True, exist_ok=True)
    if workload.peft:
        config = json.dumps(_config(workload, layers), indent=1)
        (path / "adapter_config.json").write_text(config, encoding="utf-8")
    tensors = tuple(one for layer in workload.layers(layers) for one in _stored(layer, workload))
    metadata = {"format": "pt"} if workload.peft else {"ss_network_dim": str(workload.rank)}
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    return start_file(descriptor, Written(tensors, metadata))


def _stored(layer: Layer, workload: Workload) -> list[Stored]:
    A: tuple[int, ...] = (workload.rank, layer.in_features)
    B: tuple[int, ...] = (layer.out_features, workload.rank)
    if layer.kernel > 1:
        A, B = (*A, layer.kernel, layer.kernel), (*B, 1, 1)
    if workload.peft:
        return [
            Stored(f"{layer.name}.lora_A.weight", workload.dtype, A),
            Stored(f"{layer.name}.lora_B.weight", workload.dtype, B),
        ]
    return [
        Stored(f"{layer.name}.lora_down.weight", workload.dtype, A),
        Stored(f"{layer.name}.lora_up.weight", workload.dtype, B),
        Stored(f"{layer.name}.alpha", workload.dtype, ()),
    ]


def _config(workload: Workload, layers: int) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "synthetic",
        "r": workload.rank,
        "lora_alpha": workload.alpha,
        "target_modules": sorted({one.name.rpartition(".")[2] for one in workload.layers(layers)}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the adapters of a benchmark workload.")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--layers", type=int, default=32, choices=(1, 2, 4, 8, 16, 32))
    given = parser.parse_args()
    for path in make(given.workload, given.directory, given.adapters, given.layers):
        print(path)


if __name__ == "__main__":
    main()
