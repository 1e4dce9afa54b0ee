"""Bad commands: exit 1 or 2, one clear sentence and a hint, never a traceback, nothing written."""

from pathlib import Path

import numpy as np
import pytest

from loramerge.options import Option
from loramerge.recipe import options_of
from loramerge.registry import methods
from tests.build import write_peft
from tests.typed import Typed, tree, typed


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, three: list[Path]) -> Path:
    """A current directory with the adapters a, b (rank 4) and c (rank 6)."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(*words: str | Path, code: int = 2) -> Typed:
    """Run a bad command and check what all refusals have in common."""
    before = tree(Path())
    done = typed(*words)
    assert (done.code, done.out) == (code, ""), done.err
    assert "defect" not in done.err
    assert "Traceback" not in done.err
    assert done.lines[0].startswith("error: ")
    assert done.lines[0].endswith((".", "?"))
    assert len(done.lines) == 2, done.err
    assert done.lines[1].startswith("hint: ")
    assert tree(Path()) == before
    return done


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        # k and rank out of range
        ("cluster a b -k 0", "-k is 0; it must be a whole number >= 1", "cluster --help"),
        ("cluster a b -k -3", "-k is -3", "cluster --help"),
        ("cluster a b -k 1.5", "-k is 1.5", "cluster --help"),
        ("cluster a b -k many", "-k is 'many'", "cluster --help"),
        ("squeeze a -r 0", "--rank is 0; it must be a whole number >= 1, max or full", "--help"),
        ("squeeze a --rank fulll", "--rank is 'fulll'", "did you mean 'full'?"),
        ("arithmetic a b --rank -1", "--rank is -1", "--help"),
        ("squeeze a --energy 1.5", "--energy is 1.5; it must be a number > 0 and <= 1", "--help"),
        ("squeeze a --energy 0", "--energy is 0", "--help"),
        ("squeeze a --max-error -0.1", "--max-error is -0.1", "--help"),
        ("squeeze a --size huge", "--size is 'huge'; it must be bytes such as 20MB", "--size 20MB"),
        ("squeeze a --size 0", "--size is '0'", "--size 20MB"),
        ("squeeze a --size 10", "below the", "ask for at least --size "),
        # which bound
        ("squeeze a", "needs to know how small", "loramerge squeeze my-adapter --rank 8"),
        ("squeeze a -r 2 --energy 0.9", "takes only one of --rank and --energy", "leave out"),
        ("arithmetic a b --allocate sigma", "--allocate needs --rank N", "for example: --rank 8"),
        ("cat a b --rank 3", "cat is arithmetic --rank full; it takes no --rank", "arithmetic"),
        ("cat a b --energy 0.5", "it takes no --energy", "use: loramerge arithmetic"),
        ("squeeze a --svd randomized --energy 0.9", "--svd randomized needs a rank", "--rank 8"),
        # numbers that are none
        ("cluster a b --lambda nan", "--lambda is nan; it must be a number", "--help"),
        ("cluster a b --scale inf", "--scale is inf", "--help"),
        ("cluster a b -w 1 -w nan", "--weight is nan; it must be a finite number", "-w -0.5"),
        ("cluster a b -w 1 -w x", "'x' is not a valid float", "cluster --help"),
        ("squeeze a -r 2 --alpha 0", "--alpha is 0; it must be a number > 0", "--alpha 16"),
        ("squeeze a -r 2 --seed -1", "--seed is -1", "--help"),
        # counts that do not fit
        ("cluster a b -w 1", "1 weight for 2 adapters", "one -w for each"),
        ("cluster a b -w 1 -w 1 -w 1", "3 weights for 2 adapters", "one -w for each"),
        ("cluster a b c --alpha 1 --alpha 2", "2 --alpha for 3 adapters", "one --alpha for all"),
        ("cluster a b c --from peft --from mlx", "2 --from for 3 adapters", "one --from for all"),
        ("squeeze a b -r 2", "takes one adapter, or several with --out-dir", "a b -r 2 --out-dir"),
        ("squeeze a 8", "8 is none: numbers have options", "squeeze my-adapter --rank 8"),
        ("scale a 0.5 -o x", "0.5 is none: numbers have options", "--factor 0.5"),
        ("squeeze a -r 2 -o x --out-dir y", "only one of --out and --out-dir", "leave one out"),
        ("squeeze a ./a -r 2 --out-dir y", "several results would be written to", "one by one"),
        ("cluster", "cluster needs adapters", "loramerge cluster a.safetensors b.safetensors"),
        ("inspect", "Missing argument 'ADAPTER...'", "loramerge inspect my-adapter"),
        # unknown words
        ("clustre a b", "There is no command 'clustre'", "did you mean 'cluster'?"),
        ("lego a b", "There is no command 'lego'", "did you mean 'cluster'?"),
        ("xyzzy", "There is no command 'xyzzy'", "see: loramerge --help"),
        ("--verison", "loramerge has no option '--verison'", "did you mean '--version'?"),
        ("cluster a b --rnak 3", "cluster has no option '--rnak'", "did you mean '--rank'?"),
        ("cluster a b --k 3", "cluster has no option '--k'", "did you mean '-k'?"),
        ("cluster a b --xyzzy", "no option '--xyzzy'", "loramerge cluster --help"),
        ("cluster a b -r", "Option '-r' requires an argument", "loramerge cluster --help"),
        ("cluster a b --gauge sdv", "it must be svd, balanced or raw", "did you mean 'svd'?"),
        ("cluster a b --device gpu", "--device is 'gpu'; it must be auto, cpu, cuda", "--help"),
        ("cluster a b --to kohja", "There is no layout 'kohja'", "kohya"),
        ("bake a --base no --save-dtype float16", "--save-dtype is for an adapter", "--rank N"),
        ("bake a --base no -o x.safetensors", "a model's directory, not one file", "a directory"),
        # module patterns
        (
            "cluster a b --include q_prj",
            "--include 'q_prj' matches no module",
            "did you mean '*.q_proj'?",
        ),
        (
            "cluster a b --exclude layers.0.q_prj",
            "--exclude 'layers.0.q_prj' matches no module",
            "did you mean 'layers.0.q_proj'?",
        ),
        ("cluster a b --exclude *", "leave no module", "leave one of them out"),
    ],
)
def test_a_bad_command_is_refused_with_one_sentence_and_a_hint(
    words: str, said: str, hint: str
) -> None:
    done = refused(*words.split())
    assert said in done.lines[0]
    assert hint in done.lines[1]


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ("cluster a nope -k 2", "nope does not exist", "ls ."),
        ("squeeze ./nope.safetensors -r 2", "./nope.safetensors does not exist", "ls ."),
        ("inspect nope", "nope does not exist", "ls ."),
        ("squeeze empty -r 2", "empty holds no adapter", "adapter_config.json"),
        ("squeeze a -r 2 -o b", "b exists", "use --force"),
        ("squeeze a -r 2 -o a --force", "a would replace the input a", "choose another place"),
        ("squeeze a -r 2 -o file/out", "file/out cannot be written", "another place"),
        (
            "squeeze a -r 2 -o photos -f",
            "holds no adapter; it will not be replaced",
            "another place",
        ),
        ("squeeze a -r 2 -o file -f", "file is a file; it will not be replaced", "another place"),
    ],
)
def test_files_that_do_not_fit_end_with_1(words: str, said: str, hint: str, here: Path) -> None:
    (here / "empty").mkdir()
    (here / "file").write_text("mine")
    (here / "photos").mkdir()
    (here / "photos" / "cat.jpg").write_text("mine too")
    done = refused(*words.split(), code=1)
    assert said in done.lines[0]
    assert hint in done.lines[1]


def test_every_missing_file_is_named_at_once() -> None:
    done = refused("cluster", "nope", "a", "nada", code=1)
    assert done.lines[0] == "error: nope does not exist. nada does not exist."


def test_a_bad_option_is_found_before_a_missing_file() -> None:
    assert "--gauge" in refused("cluster", "nope", "nada", "--gauge", "x").lines[0]


def test_shapes_that_differ_are_refused_and_all_listed(
    here: Path, rng: np.random.Generator
) -> None:
    def pair(m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.standard_normal((2, n)), rng.standard_normal((m, 2))

    write_peft(here / "x", {"one": pair(8, 8), "two": pair(6, 8), "three": pair(4, 4)})
    write_peft(here / "y", {"one": pair(8, 9), "two": pair(5, 8), "three": pair(4, 4)})
    done = refused("cluster", "x", "y", code=1)
    assert done.lines[0] == (
        "error: 2 modules differ in shape: one linear 8x8 in x, linear 8x9 in y; "
        "two linear 6x8 in x, linear 5x8 in y."
    )


def test_control_characters_of_a_file_name_do_not_reach_the_terminal(here: Path) -> None:
    done = typed("inspect", "no\x1b[31m\x07\rpe")
    assert done.code == 1
    assert not {"\x1b", "\x07", "\r"} & set(done.err)


def bad_values(option: Option) -> list[str]:
    """Values just outside of every declared bound, and of the wrong kind."""
    if option.choices:
        return ["", "nonsense", option.choices[0].upper()]
    if option.type not in (int, float):
        return []
    step = 1 if option.type is int else 0.001
    outside = {"ge": -step, "gt": 0, "le": step, "lt": 0}
    values = [str(bound + outside[key]) for key, bound in option.bounds.items()]
    values += ["", "nonsense", "nan", "inf", "0x10", "1e999", "--force"]
    return values + (["1.5"] if option.type is int else [])


EVERY = [
    pytest.param(name, option, value, id=f"{name} {option.flag} {value!r}")
    for name, method in methods().items()
    for option in options_of(method)
    for value in bad_values(option)
]


@pytest.mark.parametrize(("name", "option", "value"), EVERY)
def test_no_option_takes_a_value_outside_its_declaration(
    name: str, option: Option, value: str
) -> None:
    many = methods()[name].takes == "many"
    bound = [] if many or option.name == "rank" else ["--rank", "2"]
    words = [option.flag, value] if len(option.flag) == 2 else [f"{option.flag}={value}"]
    done = refused(name, "a", *(["b"] if many else []), *bound, *words)
    assert option.flag in done.lines[0]


@pytest.mark.parametrize("text", ["", "text", "*", "\u202e", "a" * 5000, "-1", "="])
@pytest.mark.parametrize(
    "name", ["size", "to", "device", "include", "out", "alpha", "weight", "from", "report"]
)
def test_text_options_survive_any_text(name: str, text: str, here: Path) -> None:
    done = typed("cluster", "a", "b", f"--{name}={text}", "--dry-run")
    assert done.code in (0, 1, 2)
    assert "defect" not in done.err
    assert done.code == 0 or done.lines[0].startswith("error: ")


@pytest.mark.parametrize(
    "text", ["", ":", "a", "ties:", "ties:=", "ties::", ",,", "ties:density=", "ties:\u202e=1", "="]
)
def test_rows_of_compare_survive_any_text(text: str, here: Path) -> None:
    refused("compare", "a", "b", f"--methods={text}")


def test_a_name_with_a_line_break_cannot_fake_a_hint(here: Path) -> None:
    done = refused("inspect", "x\nhint: rm -rf home", code=1)
    assert [line.split(":")[0] for line in done.err.splitlines()] == ["error", "hint"]
