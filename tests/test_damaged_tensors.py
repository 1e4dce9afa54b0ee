"""Every fixture with one tensor gone, or of another shape: read as something, or refused."""

from collections.abc import Iterator
from pathlib import Path
from shutil import copytree

import numpy as np
from safetensors.numpy import save_file

from loramerge.errors import LoramergeError
from loramerge.io._open import open_adapter
from loramerge.io._source import Source, open_source
from tests.test_layout_contract import every_fixture, weights

Tensors = dict[str, np.ndarray]


def stored(source: Source) -> Tensors:
    """The tensors of a file as numbers of the same shapes, floats in float32."""
    floats = ("F64", "F32", "F16", "BF16")
    return {
        key: source.array(key)
        if info.dtype in floats
        else np.frombuffer(source.read(key), np.uint8).reshape(*info.shape, -1)[..., 0]
        for key, info in source.tensors.items()
    }


def damaged(tensors: Tensors) -> Iterator[Tensors]:
    """The tensors with one of them gone, then flat, deeper, transposed and twice as long."""
    for key, values in tensors.items():
        yield {other: tensors[other] for other in tensors if other != key}
        for changed in (
            values.reshape(-1),
            values[None],
            values[..., None, None],
            values.T,
            np.concatenate([np.atleast_1d(values)] * 2),
            np.concatenate([np.atleast_1d(values)] * 2, axis=-1),
        ):
            yield {**tensors, key: np.ascontiguousarray(changed)}


@every_fixture
def test_a_damaged_file_is_refused_in_a_sentence_or_can_be_read_to_the_end(
    name: str, path: Path, tmp_path: Path
) -> None:
    place = tmp_path / path.name
    if path.is_dir():
        copytree(path, place)
    metadata = dict(open_source(weights(path)).metadata)
    seen = set()
    for tensors in damaged(stored(open_source(weights(path)))):
        if not tensors:
            continue
        save_file(tensors, weights(place) if path.is_dir() else place, metadata)
        try:
            adapter = open_adapter(str(place))
            for module in adapter.modules.values():
                factors = adapter.read(module.name)
                assert factors.A.shape == (module.rank, module.in_features)
                assert factors.B.shape == (module.out_features, module.rank)
        except LoramergeError as error:
            seen.add(str(error))
    assert seen
