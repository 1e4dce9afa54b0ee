"""A computed adapter, held in a temporary directory until it is saved or let go."""

import shutil
import tempfile
import weakref
from pathlib import Path

from msgspec.structs import replace

from loramerge.events import Listener, silent
from loramerge.io._open import open_adapter
from loramerge.io._write import staged
from loramerge.plan import Plan
from loramerge.publish import compute_into, default_name, destination
from loramerge.report import Report

__all__ = ["Result", "compute", "place"]


class Result:
    """A computed adapter, held in a temporary directory until it is saved or let go.

    It can be an input of the next call, by the name its file has by default; `files` is the
    directory.
    """

    def __init__(self, plan: Plan, files: Path) -> None:
        self._plan = plan
        self.files = files
        self._weights = files / plan.layout.weights
        self.adapter = replace(open_adapter(str(self._weights)), reference=default_name(plan))
        weakref.finalize(self, shutil.rmtree, files, ignore_errors=True)

    def __repr__(self) -> str:
        return f"<loramerge.Result {self.adapter.reference}: {len(self.adapter.modules)} modules>"

    def save(self, path: str | Path, force: bool = False) -> Path:
        """Write to a directory, or to one file where the path ends in .safetensors.

        Raises OutputError where something stands there and `force` is not set, or where an input
        would be replaced.
        """
        final = destination(self._plan, str(path), force)
        place(self.files, final, force)
        return final


def place(files: Path, final: Path, force: bool) -> None:
    """Copy a computed directory, or of it the weights alone where one file is asked for."""
    with staged(final, force) as directory:
        found = [files] if files.is_file() else list(files.iterdir())
        if final.suffix == ".safetensors":
            (weights,) = (file for file in found if file.suffix == ".safetensors")
            shutil.copyfile(weights, directory / final.name)
            return
        for file in found:
            name = f"{final.name}.safetensors" if file == files else file.name
            shutil.copyfile(file, directory / name)


def compute(plan: Plan, listen: Listener = silent) -> tuple[Result, Report]:
    """Compute a plan into a temporary directory."""
    files = Path(tempfile.mkdtemp(prefix="loramerge-"))
    try:
        report = compute_into(plan, files, "directory", listen)
        return Result(plan, files), report
    except BaseException:
        shutil.rmtree(files)
        raise
