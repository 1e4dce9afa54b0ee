"""Adapters to and from the Hub as they are: a directory of files, nothing computed."""

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from msgspec.structs import replace

from loramerge.adapter import is_local
from loramerge.card import PLACE, plain_card
from loramerge.errors import AdapterError, UsageError
from loramerge.events import Listener, Started, silent
from loramerge.io._disk import find_on_disk
from loramerge.io._files import CARD, CONFIG, PICKLES, SUFFIX, TOKENIZER, WEIGHTS, parsed
from loramerge.io._hub import look_up
from loramerge.io._hub_errors import explained
from loramerge.io._hub_listing import weights_among
from loramerge.io._hub_push import Pushed, check_push, upload
from loramerge.io._open import on_hub, open_adapter
from loramerge.io._reference import hub_reference
from loramerge.io._source import open_source
from loramerge.io._write import check_free, staged
from loramerge.origin import Origin
from loramerge.result import Result

__all__ = ["pull", "push"]

PROVENANCE = "loramerge.json"
# Fields of a config, PEFT's or MLX's, and of a tokenizer's, that may name a directory of this
# machine: of no use elsewhere, and nobody's business.
PLACES: Mapping[str, tuple[str, ...]] = {
    CONFIG: (
        *("base_model_name_or_path", "model", "data"),
        *("adapter_path", "resume_adapter_file", "config"),
    ),
    "tokenizer_config.json": (
        *("name_or_path", "tokenizer_file", "vocab_file", "merges_file"),
        "special_tokens_map_file",
    ),
}
# What travels with the weights: all that says what they are, and on which terms, and the tokens
# they were trained on.
WITH = (
    *(CONFIG, CARD, PROVENANCE, *TOKENIZER),
    *("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md"),
)


def pull(
    reference: str,
    directory: str | Path | None = None,
    *,
    force: bool = False,
    listen: Listener = silent,
) -> Path:
    """Bring an adapter from the Hub: its weights, what describes them, and its tokenizer.

    Without a `directory` it gets the name of the repository, here. One without an
    adapter_config.json becomes a single file, unless a directory is named. Returns where it is.
    Raises UsageError for what names no place on the Hub, HubError, AdapterError, OutputError.
    """
    asked = hub_reference(reference)
    if asked is None:
        raise UsageError(
            f"{reference} is no reference to the Hub.", "for example: loramerge pull user/repo"
        )
    listen(Started("asking the Hub", 0))
    with explained(reference, asked.repository):
        repository = look_up(asked)
        path = weights_among(repository.files, asked, allow_pickle=True)
        if path.endswith(PICKLES):
            raise AdapterError(
                f"{asked.at(path)} is a pickle; a safetensors file is all that is pulled.",
                f"make one of it: loramerge convert {asked} --to peft --allow-pickle",
            )
        folder = path[: path.rfind("/") + 1]
        beside = [name for name in WITH if folder + name in repository.files]
        alone = CONFIG not in beside
        name = Origin(repository.name, repository.commit, path).stem
        final = Path(directory or name + (SUFFIX if alone else "")).expanduser()
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
    with staged(final, force) as place:
        if final.suffix == SUFFIX:
            files = {final.name: weights}
        else:
            files[weights.name] = weights
        for name, file in files.items():
            shutil.copyfile(file, place / name)
    return final


def push(
    adapter: str | Path | Result,
    repository: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    message: str | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Pushed:
    """Send an adapter to the Hub: its weights, and what describes them, with a card in any case.

    A result need not be saved. A repository that is not there is made, `private` if so asked;
    `create_pr` opens a pull request instead of changing main; `message` is the title of the commit.
    Of a single file, what describes it may be given as `beside`. Returns the address, whether
    anything there was not yet as it is here, and what lies in the directory and was not sent.
    Raises AdapterError for what is no adapter, UsageError for a name no repository has, HubError.
    """
    path = str(adapter.files if isinstance(adapter, Result) else adapter)
    if on_hub(path):
        raise AdapterError(
            f"{path} is not here, and only what is here can be sent.",
            f"bring it first: loramerge pull {path}",
        )
    find_on_disk(path)
    check_push(repository)
    opened, directory = open_adapter(path), Path(path).expanduser()
    weights = opened.source.path
    if weights.name == WEIGHTS:
        directory = weights.parent  # without its config it would lose its scale
    name = WEIGHTS if beside and CONFIG in beside else weights.name
    files: dict[str, Path | bytes] = {name: weights, **(beside or {})}
    left: list[str] = []
    if directory.is_dir():
        files |= {name: directory / name for name in WITH if (directory / name).is_file()}
        held = sorted(one for one in directory.iterdir() if not one.name.startswith("."))
        left = [f"{one.name}{'/' * one.is_dir()}" for one in held if one.name not in files]
    places: list[str] = []
    for name, keys in PLACES.items():
        if name in files:
            files[name], found = _elsewhere(name, _content(files[name]), keys)
            places += found
    card = _content(files[CARD]) if CARD in files else plain_card(opened).encode()
    files[CARD] = _published(card.decode(errors="replace"), repository, places).encode()
    sent = upload(
        repository,
        files,
        private=private,
        create_pr=create_pr,
        message=message or "Upload a LoRA adapter with loramerge",
    )
    return replace(sent, left=tuple(left))


def _elsewhere(name: str, text: bytes, keys: Sequence[str]) -> tuple[bytes, list[str]]:
    """A file of JSON without the directories of this machine that it names, and these."""
    config = parsed(name, text, len(text))
    named = {key: value for key in keys if isinstance(value := config.get(key), str)}
    local = {key: value for key, value in named.items() if is_local(value)}
    if not local:
        return text, []
    told = {**config, **dict.fromkeys(local)}
    # Places such as . and / name nothing, and stand in any text.
    places = [place for place in local.values() if re.search(r"\w", place)]
    return (json.dumps(told, indent=2) + "\n").encode(), places


def _content(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _published(card: str, repository: str, places: Sequence[str]) -> str:
    """A card that names the repository to load from, and no directories of this machine."""
    front, rule, text = card.partition("\n---\n") if card.startswith("---\n") else ("", "", card)
    for place in places:
        # A line of the front matter says nothing without it; in a text its last part does.
        front = "\n".join(line for line in front.split("\n") if place not in line)
        text = text.replace(place, re.split(r"[/\\]", place)[-1])
    return (front + rule + text).replace(PLACE, repository)
