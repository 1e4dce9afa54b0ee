"""Which place on the Hub a text names, told from the text alone.

user/repo, user/repo@revision, user/repo:folder/file.safetensors, hf:// and web addresses. The
grammar of the last two is that of huggingface_hub.parse_hf_uri, which only its newest versions
have, and which refuses the first three.
"""

import os
import re
from urllib.parse import unquote, urlsplit

from msgspec import Struct
from msgspec.structs import replace

from loramerge.errors import UsageError

__all__ = ["HubReference", "hub_reference"]

SCHEME = "hf://"
HOSTS = frozenset(("huggingface.co", "hf.co"))
# What the Hub stores besides models, as addresses begin.
OTHERS = frozenset(("buckets", "datasets", "kernels", "spaces"))
# Pages that show a file or a folder; the next segment is the revision.
VIEWS = frozenset(("blame", "blob", "raw", "resolve", "tree"))
NAME = r"[A-Za-z0-9_][\w.-]*"
BARE = re.compile(rf"({NAME}/{NAME})(?:@([^:]+))?(?::(.+))?", re.ASCII)
# The two kinds of revisions with a slash that is not written %2F.
LOCATION = re.compile(
    rf"({NAME}/{NAME})(?:@(refs/(?:convert/[\w.-]+|pr/\d+)|[^/]+))?(?:/(.*))?", re.ASCII
)
FORMS = "for example: user/repo, user/repo@main, user/repo:folder, hf://user/repo@main/folder"


class HubReference(Struct, frozen=True):
    """A repository, the revision asked for, and a file or folder inside: "" is its root."""

    repository: str
    revision: str | None = None
    path: str = ""

    def __str__(self) -> str:
        """The shortest form to type."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repository}{revision}" + (f":{self.path}" if self.path else "")

    def at(self, path: str) -> "HubReference":
        """Another place in the same repository."""
        return replace(self, path=path)


def hub_reference(text: str) -> HubReference | None:
    """The place on the Hub a text names, None for one that can only be a path.

    Raises UsageError for an address that is none of a model repository.
    """
    if text.startswith(SCHEME):
        return _located(text, text.removeprefix(SCHEME))
    if "://" in text or text.partition("/")[0].lower() in HOSTS:
        return _located(text, _of_page(text))
    found = BARE.fullmatch(text)
    if found is None or (text.endswith(".safetensors") and not found[3]):
        return None
    return HubReference(found[1], found[2], (found[3] or "").strip("/"))


def _located(text: str, location: str) -> HubReference:
    """The place of the body of an hf:// address: [models/]user/repo[@revision][/path]."""
    kind = location.partition("/")[0]
    if kind in OTHERS:
        raise UsageError(
            f"{text} is in the Hub's {kind}; adapters are in model repositories.", FORMS
        )
    found = LOCATION.fullmatch(location.removeprefix("models/").strip("/"))
    if found is None or "//" in location:
        raise UsageError(f"{text} is no address of a repository on the Hub.", FORMS)
    revision = unquote(found[2]) if found[2] else None
    return HubReference(found[1], revision, found[3] or "")


def _of_page(text: str) -> str:
    """The body that an hf:// address of the same place would have."""
    page = urlsplit(text if "://" in text else f"https://{text}")
    home = urlsplit(os.environ.get("HF_ENDPOINT", ""))
    path = page.path
    if page.hostname == home.hostname:
        path = path.removeprefix(home.path.rstrip("/"))
    elif page.hostname not in HOSTS:
        raise UsageError(f"{text} is no address on the Hub.", FORMS)
    # A slash inside a segment, as in the name of a branch, stays written as %2F.
    parts = [unquote(part).replace("/", "%2F") for part in path.split("/") if part]
    start = 1 if parts[:1] == ["models"] or OTHERS.intersection(parts[:1]) else 0
    repository, view, rest = parts[: start + 2], parts[start + 2 :], parts[start + 3 :]
    if view and view[0] not in VIEWS:
        raise UsageError(f"{text} is neither a repository nor a file or folder of one.", FORMS)
    return "/".join(repository) + ("@" if rest else "") + "/".join(rest)
