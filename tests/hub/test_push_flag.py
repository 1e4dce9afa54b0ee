"""--push, beside whatever computes an adapter: as it is asked for, or refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.conftest import factors
from tests.hub.store import Fault, Hub
from tests.hub.test_push import ENV, pushed
from tests.typed import typed

# Between the client and its own HTTP library.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")
RECIPE = "method: squeeze\nadapters: a\nrank: 2\noutput: out\n"
COMPUTING = (
    "squeeze a -r 2 -o out",
    "run r.yaml",
    "reproduce made -o out",
    "convert a --to mlx -o out",
    "extract base tuned --rank 2 -o out",
    "bake a --base base --rank 2 -o out",
)


@pytest.fixture
def made(a: Path, rng: np.random.Generator) -> None:
    """The squeezed adapter made, the recipe of it, and two versions of a base model."""
    for name in ("base", "tuned"):
        Path(name).mkdir()
        weights = {
            f"{module}.weight": rng.standard_normal((B.shape[0], A.shape[1])).astype("float32")
            for module, (A, B) in factors(rng, 4).items()
        }
        save_file(weights, Path(name, "model.safetensors"))
    Path("r.yaml").write_text(RECIPE)
    assert typed("squeeze", "a", "-r", "2", "-o", "made").code == 0


@pytest.mark.parametrize("line", COMPUTING)
def test_a_result_is_pushed_as_it_is_asked_for(
    line: str, hub: Hub, made: None, adapter: dict[str, bytes]
) -> None:
    done = pushed(*line.split(), "--push", "me/new", "--private", "-m", "first", "--json")
    assert json.loads(done.out)["pushed"] == f"{hub.address}/me/new"
    repository = hub.repositories["me/new"]
    assert (repository.private, repository.head.title) == (True, "first")
    (weights,) = (path.name for path in Path("out").glob("*.safetensors"))
    for name in (weights, "loramerge.json"):
        assert repository.head.files[name] == Path("out", name).read_bytes()
    other = hub.create("me/other", adapter)
    again = pushed(*line.split(), "-f", "--push", "me/other", "--create-pr")
    assert f"pushed  {hub.address}/me/other/discussions/1" in again.err
    assert other.head.files == adapter


@pytest.mark.parametrize("line", COMPUTING)
def test_no_recipe_is_saved_of_what_cannot_be_pushed(line: str, hub: Hub, made: None) -> None:
    done = typed(*line.split(), "--push", "me/a", "--save-recipe", "s.yaml")
    assert (done.code, done.lines[0]) == (1, "error: You are not logged in to the Hub.")
    assert not Path("s.yaml").exists()


def test_of_several_outputs_the_last_is_pushed(hub: Hub, made: None) -> None:
    Path("r.yaml").write_text(
        "steps:\n- {method: select, adapters: a, ranks: 0, output: one}\n"
        "- {method: squeeze, adapters: a, rank: 2}\noutput: two\n"
    )
    pushed("run", "r.yaml", "--push", "me/two")
    stored = hub.repositories["me/two"].head.files["adapter_model.safetensors"]
    assert stored == Path("two/adapter_model.safetensors").read_bytes()


def test_a_model_is_not_pushed_as_an_adapter(hub: Hub, made: None) -> None:
    done = typed("bake", "a", "--base", "base", "--push", "me/model", env=ENV)
    assert (done.code, done.lines[1]) == (2, "hint: leave it out, or add --rank N")


@pytest.mark.parametrize("line", COMPUTING)
@pytest.mark.parametrize("flags", ["--private", "--create-pr", "-m first", "--private -m x"])
def test_how_to_push_is_nothing_without_where_to(
    line: str, flags: str, hub: Hub, made: None
) -> None:
    done = typed(*line.split(), *flags.split(), env=ENV)
    assert done.code == 2
    names = flags.replace("-m", "--message").split()
    named = ", ".join(name for name in names if name.startswith("--"))
    assert done.lines == [
        f"error: {line.split(maxsplit=1)[0]}: {named} is about a push, and there is none.",
        "hint: say where to: --push user/repo",
    ]
    assert not Path("out").exists()


def test_what_was_made_again_is_pushed_only_where_it_is_kept(hub: Hub, made: None) -> None:
    done = typed("reproduce", "made", "--push", "me/new", env=ENV)
    assert done.code == 2
    assert done.lines[1] == "hint: say where to keep it too: -o again"
    assert hub.repositories == {}


def test_a_result_outlives_a_push_that_fails_and_the_error_says_how_to_go_on(
    hub: Hub, made: None
) -> None:
    hub.faults.append(Fault("/commit/", times=9, status=500, method="POST"))
    words = ("squeeze", "a", "-r", "2", "-o", "out", "--push", "me/new", "--private")
    done = typed(*words, env=ENV)
    assert (done.code, done.lines[0]) == (1, "error: The Hub answers 500 for me/new.")
    assert done.lines[1] == (
        "hint: type it again later; the result is in out, to send it: "
        "loramerge push out me/new --private"
    )
    hub.faults.clear()
    pushed(*done.lines[1].partition("loramerge ")[2].split())
    assert hub.repositories["me/new"].head.files["loramerge.json"]
