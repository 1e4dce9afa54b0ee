"""llama.cpp: its own converter, then the outputs of the model it computes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.consumers.deviations import compare
from tests.consumers.forms import FORMS, Made
from tests.consumers.gguf_files import (
    CONVERTER,
    convert,
    last_log_probabilities,
    versions,
    write_base,
)
from tests.consumers.llama import logits
from tests.consumers.traps import TRAPS
from tests.consumers.verdicts import judge

pytestmark = [
    pytest.mark.consumers,
    pytest.mark.skipif(
        not CONVERTER.is_file(), reason="needs llama.cpp's converter: make consumers unpacks it"
    ),
]
# The base alone is off by 1e-6: float32 rounds by 6e-8, some ten times in a row. The cache of keys
# and values, float16 by default, is float32 here.
FLOAT32 = 5e-6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("gguf") / "base.gguf")


def last(found: np.ndarray) -> np.ndarray:
    """Log-probabilities of the last token's logits."""
    one = found[-1] - found[-1].max()
    return one - np.log(np.exp(one).sum())


@pytest.mark.parametrize("form", FORMS)
def test_it_loads_every_form(
    form: str, base: Path, forms: Mapping[str, Made], tmp_path: Path
) -> None:
    one = forms[form]
    found = last_log_probabilities(base, convert(one.path, tmp_path / "a.gguf"))
    wanted = last(logits(one.deltas))
    compare("llama.cpp", versions(), form, found, wanted, last(logits()), FLOAT32)


@pytest.mark.parametrize("trap", TRAPS)
def test_verify_says_what_it_does(trap: str, base: Path, tmp_path: Path) -> None:
    one = TRAPS[trap](tmp_path / "a")
    wanted, without = last(logits(one.deltas)), last(logits())

    def load(path: Path) -> np.ndarray:
        return last_log_probabilities(base, convert(path, tmp_path / f"{path.name}.gguf"))

    judge("llama.cpp", one.path, load, wanted, without, FLOAT32)
