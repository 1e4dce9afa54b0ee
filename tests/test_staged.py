"""All of an output or nothing of it: whatever fails, is killed, or stands in the way."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loramerge.errors import OutputError
from loramerge.io import _write
from loramerge.io._open import open_adapter
from loramerge.io._write import staged
from tests.build import write_peft
from tests.typed import interrupt, tree, typed

SINGLE, FOLDER = "out.safetensors", "out"
both = pytest.mark.parametrize("name", [SINGLE, FOLDER])


def put(final: Path, text: str, force: bool = False) -> None:
    """Write an output whose one file holds a text."""
    with staged(final, force) as folder:
        name = final.name if final.suffix == ".safetensors" else "adapter_model.safetensors"
        (folder / name).write_text(text)


def fail(final: Path, error: BaseException, force: bool = False) -> None:
    """Fail with half an output written."""
    with staged(final, force) as folder:
        (folder / "half").write_text("half")
        raise error


def content(final: Path) -> str:
    return (final if final.is_file() else final / "adapter_model.safetensors").read_text()


@both
def test_an_output_appears_whole_and_alone(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, "new")
    assert content(tmp_path / name) == "new"
    assert [path.name for path in tmp_path.iterdir()] == [name]


@both
def test_a_failure_in_the_block_leaves_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "new" / "deep" / name, ZeroDivisionError())
    assert tree(tmp_path) == []


@both
def test_a_failure_with_force_leaves_what_was_there(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, "old")
    before = tree(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fail(tmp_path / name, KeyboardInterrupt(), force=True)
    assert tree(tmp_path) == before
    assert content(tmp_path / name) == "old"


@both
def test_force_replaces_and_leaves_no_trace_of_the_old(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, "old")
    if name == FOLDER:
        (tmp_path / name / "more.txt").write_text("old")
    put(tmp_path / name, "new", force=True)
    assert content(tmp_path / name) == "new"
    assert not any("more" in path or "tmp" in path for path in tree(tmp_path))


def test_force_replaces_a_directory_where_the_system_cannot_exchange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_write, "_exchange", lambda made, final: False)
    put(tmp_path / FOLDER, "old")
    put(tmp_path / FOLDER, "new", force=True)
    assert content(tmp_path / FOLDER) == "new"
    assert [path.name for path in tmp_path.iterdir()] == [FOLDER]


def test_a_failed_replacement_puts_the_old_directory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / FOLDER, "old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".tmp"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(_write, "_exchange", lambda made, final: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="cannot be written: Input/output error"):
        put(tmp_path / FOLDER, "new", force=True)
    assert content(tmp_path / FOLDER) == "old"


@both
def test_what_exists_is_not_touched_without_force(name: str, tmp_path: Path) -> None:
    put(tmp_path / name, "old")
    with pytest.raises(OutputError, match="exists") as refused:
        put(tmp_path / name, "new")
    assert "--force" in str(refused.value.hint)
    assert content(tmp_path / name) == "old"


@both
def test_what_appears_during_the_run_is_not_touched_without_force(
    name: str, tmp_path: Path
) -> None:
    def overtaken() -> None:
        with staged(tmp_path / name, False) as folder:
            (folder / name).write_text("mine")
            put(tmp_path / name, "theirs")

    with pytest.raises(OutputError, match="exists"):
        overtaken()
    assert content(tmp_path / name) == "theirs"


@pytest.mark.parametrize("force", [False, True])
def test_a_file_is_not_replaced_by_a_directory_nor_the_reverse(force: bool, tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file")
    (tmp_path / SINGLE).mkdir()
    for name in (FOLDER, SINGLE):
        with pytest.raises(OutputError):
            put(tmp_path / name, "new", force)
    assert (tmp_path / FOLDER).read_text() == "a file"
    assert (tmp_path / SINGLE).is_dir()


def test_force_does_not_replace_a_directory_that_holds_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "home" / "thesis").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds no adapter"):
        put(tmp_path / "home", "new", force=True)
    assert tree(tmp_path) == ["home", "home/thesis"]


def test_force_replaces_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    put(tmp_path / FOLDER, "new", force=True)
    assert content(tmp_path / FOLDER) == "new"


@pytest.mark.parametrize("where", [".", "..", "../out"])
def test_force_never_replaces_the_current_directory(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / FOLDER, "old")
    monkeypatch.chdir(tmp_path / FOLDER)
    with pytest.raises(OutputError, match="is the current directory or above it"):
        put(Path(where), "new", force=True)
    assert content(tmp_path / FOLDER) == "old"


def test_force_replaces_a_link_and_never_what_it_points_to(tmp_path: Path) -> None:
    put(tmp_path / "real", "old")
    put(tmp_path / "real.safetensors", "old")
    for name, target in ((FOLDER, "real"), (SINGLE, "real.safetensors")):
        (tmp_path / name).symlink_to(tmp_path / target)
        put(tmp_path / name, "new", force=True)
        assert content(tmp_path / target) == "old"
        assert content(tmp_path / name) == "new"
        assert not (tmp_path / name).is_symlink()


@both
def test_a_dangling_link_is_not_replaced_without_force(name: str, tmp_path: Path) -> None:
    (tmp_path / name).symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists"):
        put(tmp_path / name, "new")


@both
def test_a_place_where_nothing_can_be_made_is_said_in_the_systems_words(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(OutputError, match="cannot be written: Not a directory") as refused:
        put(tmp_path / "file" / name, "new")
    assert refused.value.hint == "choose another place"


@both
@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.EACCES, "choose another place"),
        (errno.EROFS, "choose another place"),
        (errno.ENOSPC, "free some space, or choose another disk"),
        (errno.EDQUOT, "free some space, or choose another disk"),
    ],
)
def test_a_read_only_or_full_disk_is_an_output_error_that_leaves_nothing(
    number: int, hint: str, name: str, tmp_path: Path
) -> None:
    with pytest.raises(OutputError) as refused:
        fail(tmp_path / name, OSError(number, os.strerror(number)))
    assert refused.value.message == f"{tmp_path / name} cannot be written: {os.strerror(number)}."
    assert refused.value.hint == hint
    assert tree(tmp_path) == []


def test_a_parent_that_may_not_be_written_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refusing)  # root may write anywhere, and may run this
    with pytest.raises(OutputError, match="cannot be written: Permission denied"):
        put(tmp_path / FOLDER, "new")


def large(path: Path) -> Path:
    """An adapter of 3 MB, enough to stop in the middle of."""
    rng = np.random.default_rng(1)
    pair = rng.standard_normal((64, 768), np.float32), rng.standard_normal((768, 64), np.float32)
    return write_peft(path, {f"layers.{n}.lin": pair for n in range(8)})


def test_a_file_that_may_not_grow_is_an_output_error_that_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        done = typed("squeeze", "a", "-r", "32", "-o", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = "error: out cannot be written: File too large."
    assert (done.code, done.lines) == (1, [error, "hint: choose another place"])
    assert tree(tmp_path) == before


KILLED = """
import os, signal, sys
pwrite, count = os.pwrite, 0
def killing(descriptor, data, position):
    global count
    count += 1
    if count > 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return pwrite(descriptor, data, position)
os.pwrite = killing
sys.argv = ["loramerge", *sys.argv[1:]]
from loramerge.cli import main
main()
"""


@both
@pytest.mark.parametrize("force", [False, True])
def test_a_killed_run_leaves_nothing_at_the_output_and_the_next_one_succeeds(
    force: bool, name: str, tmp_path: Path
) -> None:
    large(tmp_path / "a")
    if force:
        put(tmp_path / name, "old")
    words = ["squeeze", "a", "-r", "32", "-o", name, *(["--force"] if force else [])]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, *words], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    if force:
        assert content(tmp_path / name) == "old"
    else:
        assert not (tmp_path / name).exists()
    done = subprocess.run(
        [sys.executable, "-m", "loramerge", *words], cwd=tmp_path, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(open_adapter(str(tmp_path / name)).modules) == 8


def test_an_interrupted_run_leaves_nothing_at_all(tmp_path: Path) -> None:
    large(tmp_path / "a")
    slow = KILLED.replace(
        "os.kill(os.getpid(), signal.SIGKILL)", "open('slow', 'w'); __import__('time').sleep(2)"
    )
    words = ["squeeze", "a", "-r", "32", "-o", "out"]
    run = subprocess.Popen([sys.executable, "-c", slow, *words], cwd=tmp_path)
    while not (tmp_path / "slow").exists():
        assert run.poll() is None
        time.sleep(0.02)
    interrupt(run)
    assert run.returncode == 130
    (tmp_path / "slow").unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
