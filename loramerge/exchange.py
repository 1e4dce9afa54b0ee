"""Adapters to and from the Hub as they are: a directory of files, nothing computed."""

import shutil
from pathlib import Path

from loramerge.errors import UsageError
from loramerge.events import Listener, Started, silent
from loramerge.io._files import CARD, CONFIG, SUFFIX
from loramerge.io._hub import look_up
from loramerge.io._hub_errors import explained
from loramerge.io._hub_listing import weights_among
from loramerge.io._reference import hub_reference
from loramerge.io._source import open_source
from loramerge.io._write import check_free, staged
from loramerge.origin import Origin

__all__ = ["pull"]

PROVENANCE = "loramerge.json"
# What travels with the weights: all that says what they are, and on which terms.
WITH = (CONFIG, CARD, PROVENANCE, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")


def pull(reference: str, out: str | None, force: bool, listen: Listener = silent) -> Path:
    """Bring an adapter from the Hub: its weights and the files beside them that describe it.

    One without an adapter_config.json becomes a single file, unless `out` names a directory.
    Raises UsageError for what names no place on the Hub, HubError, AdapterError, OutputError.
    """
    place = hub_reference(reference)
    if place is None:
        raise UsageError(
            f"{reference} is no reference to the Hub.", "for example: loramerge pull user/repo"
        )
    with explained(reference, place.repository):
        repository = look_up(place)
        path = weights_among(repository.files, place)
        folder = path[: path.rfind("/") + 1]
        beside = [name for name in WITH if folder + name in repository.files]
        alone = CONFIG not in beside
        name = Origin(repository.name, repository.commit, path).stem
        final = Path(out or name + (SUFFIX if alone else "")).expanduser()
        if final.suffix == SUFFIX and not alone:
            raise UsageError(
                f"{reference} is more than one file: its {CONFIG} says how it is scaled.",
                f"name a directory: -o {final.stem}",
            )
        check_free(final, force)
        files = {name: repository.download(folder + name, silent) for name in beside}
        listen(Started("downloading", repository.files[path].size or 0))
        weights = repository.download(path, listen)
        open_source(weights).close()
    with staged(final, force) as directory:
        if final.suffix == SUFFIX:
            files = {final.name: weights}
        else:
            files[weights.name] = weights
        for name, file in files.items():
            shutil.copyfile(file, directory / name)
    return final
