"""Make a result again from its own record, and judge whether it is the same."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from loramerge.adapter import Adapter
from loramerge.compute import resolve
from loramerge.errors import AdapterError, GateError, LoramergeError, UsageError
from loramerge.events import Listener, silent
from loramerge.exchange import pull
from loramerge.io._checkpoint import open_checkpoint
from loramerge.io._hub import fetch
from loramerge.io._open import on_hub, open_adapter
from loramerge.io._write import write_text
from loramerge.io._yaml import write_yaml
from loramerge.lineage import lineage
from loramerge.publish import BESIDE, PROVENANCE, check_apart, free_place
from loramerge.record import made
from loramerge.result import place
from loramerge.retrace import retrace
from loramerge.verdict import Measured, Verdict, digest_of, judge

__all__ = ["reproduce"]


def reproduce(
    output: str,
    places: Sequence[Path] = (),
    out: str | None = None,
    force: bool = False,
    device: str | None = None,
    listen: Listener = silent,
    allow_pickle: bool = False,
    save_recipe: Path | None = None,
) -> Verdict:
    """Make `output` again from the sources it names, and compare; `out` is where to keep it.

    `save_recipe` is where to write down how, as a recipe, before anything is computed. Sources are
    looked for by name and by sha256 beside the output, here and in `places`, or on the Hub at the
    recorded revision; the output itself may be on the Hub. Raises AdapterError without a record,
    IncompatibleError where sources have changed or are not there, GateError where the result
    differs by more than it may: at all on the same kind of machine with the same versions, else by
    1 unit in the last place of the stored dtype and by 1e-6 of a delta weight.
    """
    with tempfile.TemporaryDirectory(prefix="loramerge-") as directory:
        temporary = Path(directory)
        local = output
        if on_hub(output):
            local = str(pull(output, temporary / "there", listen=listen))
        there = _opened(local, output)
        record, lost = made(there)
        if record is None:
            raise AdapterError(
                f"{output} does not say how it was made: "
                f"{lost or 'there is no record in its header'}.",
                "only files that loramerge has written can be made again",
            )
        measured = _measured(there, local)
        digest = digest_of(there.source)
        if measured is not None and measured.tensors_sha256 != digest:
            raise GateError(
                f"{output} holds other tensors than its {PROVENANCE} tells of.",
                "it was changed after it was made: get it again from where it came",
            )
        here = [] if local != output else [Path(output).expanduser().resolve().parent]
        way = retrace(record, output, [*here, Path.cwd(), *places], allow_pickle)
        adapters = list(way.adapters())
        final = free_place([*adapters, there], out, force) if out is not None else None
        if save_recipe is not None:
            check_apart([*([final] if final else []), save_recipe], BESIDE)
            write_text(save_recipe, write_yaml(lineage(way)), force)
        fetch(adapters, listen)
        again = way.walk(temporary / "again", _device(device, measured), listen)
        if final is not None:
            place(again.files, final, force)
        return judge(output, there, digest, measured, again)


def _opened(local: str, output: str) -> Adapter:
    """The adapter; of a model that was baked it is said that there is no way back."""
    try:
        return open_adapter(local)
    except AdapterError:
        try:
            open_checkpoint(local)
        except LoramergeError:
            pass
        else:
            raise AdapterError(
                f"{output} holds the weights of a model, which keep no record of how they were "
                "made.",
                "bake it again, and compare the files: loramerge bake ADAPTER --base MODEL",
            ) from None
        raise


def _measured(there: Adapter, local: str) -> Measured | None:
    """What stands beside the weights of a directory; None for a single file."""
    path = there.source.path.parent / PROVENANCE
    if not Path(local).expanduser().is_dir() or not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Measured)
    except msgspec.MsgspecError as error:
        raise AdapterError(f"{path} is no record of a result: {error}.", "get it again") from None


def _device(asked: str | None, measured: Measured | None) -> str:
    """The device asked for, or the recorded one where there is such a device."""
    if asked is not None or measured is None:
        return asked or "auto"
    try:
        return resolve(measured.device, "float32").device
    except UsageError:
        return "cpu"
