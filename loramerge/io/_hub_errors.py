"""What the Hub, its client and the network refuse, as one sentence and the next thing to type."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TYPE_CHECKING

from loramerge._lazy import hub_errors, hub_utils
from loramerge.errors import HubError, LoramergeError, UsageError
from loramerge.io._hub_client import client, page, refusal, stated_wait

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["answered", "explained"]

# Packages whose exceptions mean that the other end was not reached, and of these exceptions the
# ones that mean that it was, and broke off.
TRANSPORT = frozenset(("httpx", "httpx2"))
BROKEN = frozenset(("ReadError", "ReadTimeout", "RemoteProtocolError", "WriteError"))
FULL = frozenset((errno.ENOSPC, errno.EDQUOT))
LOGIN = "log in first: hf auth login"
AGAIN = "type it again: files that arrived whole are kept"
SETTINGS = "check HF_ENDPOINT and the proxy of your network"
CACHED = "type it again with HF_HUB_OFFLINE=1 to use what was downloaded before"


@contextmanager
def explained(what: str, repository: str) -> Iterator[None]:
    """Turn what goes wrong inside with a repository into HubError; `what` is how it was named."""
    try:
        yield
    except LoramergeError:
        raise
    except Exception as error:
        found = _explained(error, what, repository)
        if found is None:
            raise
        raise found from error


@contextmanager
def answered(hint: str = f"wait, or {CACHED}") -> Iterator[None]:
    """Turn a question to the Hub that nothing answers in time into HubError."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "ReadTimeout" or not _is_transport(error):
            raise
        raise HubError(f"{client().endpoint} does not answer.", hint) from error


def _explained(error: Exception, what: str, repository: str) -> LoramergeError | None:
    """The sentence for an exception; None for one that is a defect of ours."""
    if refused := refusal(error):
        return _refused(refused, what, repository)
    match error:
        case hub_errors.HFValidationError():
            return UsageError(f"{what} is no name of a repository.", "for example: user/repo")
        case hub_errors.OfflineModeIsEnabled() | hub_errors.LocalEntryNotFoundError():
            return _unreached(error, what)
        case hub_errors.FileMetadataError() | JSONDecodeError():
            return HubError(f"{client().endpoint} does not answer as the Hub does.", SETTINGS)
        case hub_errors.XetDownloadError():
            return HubError(f"{what}: the transfer broke off.", AGAIN)
        case RuntimeError() if isinstance(error.__cause__, Exception):
            return _explained(error.__cause__, what, repository)
        case RuntimeError() if _is_of_client(error):  # of its library for chunks, xet
            return HubError(f"{what}: the transfer broke off.", AGAIN)
        case ValueError() if _is_of_client(error):
            return HubError(f"{client().endpoint} does not answer as the Hub does.", SETTINGS)
        case OSError() if error.errno in FULL:
            return HubError(
                f"{what} cannot be downloaded: the disk with the Hub's cache is full.",
                "free some space, or set HF_HOME to a directory on another disk",
            )
        case OSError() if error.strerror and not isinstance(error, ConnectionError):
            return HubError(
                f"{what} cannot be kept in {error.filename or 'the cache'}: {error.strerror}.",
                "set HF_HOME to a directory that can be written",
            )
        case OSError():  # cut off, or the client found another size than the Hub had stated
            return HubError(f"{what}: the transfer broke off.", AGAIN)
    if type(error).__name__ in BROKEN and _is_transport(error):
        return HubError(f"{what}: the transfer broke off.", AGAIN)
    return _unreached(error, what) if _is_transport(error) else None


def _is_of_client(error: BaseException) -> bool:
    """Whether the client of the Hub itself raised it, over what it was answered."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    return str(name).partition(".")[0] == "huggingface_hub"


def _is_transport(error: BaseException | None) -> bool:
    return type(error).__module__.partition(".")[0] in TRANSPORT


def _unreached(error: Exception, what: str) -> HubError:
    """Nobody answered: for want of a network, or because nobody was to be asked."""
    if _is_transport(error) or _is_transport(error.__cause__):
        hint = f"check the network, or {CACHED}"
        return HubError(f"{client().endpoint} cannot be reached.", hint)
    return HubError(
        f"{what} is not among what was downloaded before, and HF_HUB_OFFLINE is set.",
        f"unset HF_HUB_OFFLINE, or where there is a network type: loramerge pull {what}",
    )


def _refused(error: "HfHubHTTPError", what: str, repository: str) -> HubError:
    """The Hub answered, but not with what was asked for. Subclasses come before their parents."""
    known = hub_utils.get_token() is not None
    address, status = page(repository), error.response.status_code
    match error:
        case hub_errors.GatedRepoError():
            accept = f"accept its terms at {address}"
            hint = f"{accept}, then type it again" if known else f"{accept}, and {LOGIN}"
            return HubError(f"{what} is gated: its owners let in only those who asked.", hint)
        case hub_errors.DisabledRepoError():
            return HubError(f"{what} is disabled on the Hub.", f"see why: {address}")
        case hub_errors.RepositoryNotFoundError():
            hint = "see whether your token may read it: hf auth whoami" if known else LOGIN
            return HubError(
                f"{what} is neither a path here nor a repository on the Hub that you may see.",
                f"check how it is spelt; if it is private, {hint}",
            )
        case hub_errors.RevisionNotFoundError():
            return HubError(f"{what}: there is no such revision.", _revisions(repository))
        case hub_errors.RemoteEntryNotFoundError():
            return HubError(f"{what}: there is no such file.", f"see: {address}/tree/main")
    if status == 401 and not known:
        return HubError("You are not logged in to the Hub.", LOGIN)
    if status == 401:
        return HubError("The Hub does not know your token.", "log in again: hf auth login")
    if status == 403:
        return HubError(
            f"Your token does not allow this with {repository}.",
            "make one that does at https://huggingface.co/settings/tokens, then: hf auth login",
        )
    if status == 429:
        seconds = stated_wait(error)
        wait = "later" if seconds is None else f"in {seconds:.0f} seconds"
        more = "" if known else "; who is logged in may ask more often: hf auth login"
        return HubError("The Hub takes no more requests from you now.", f"type it {wait}{more}")
    return HubError(f"The Hub answers {status} for {what}.", "type it again later")


def _revisions(repository: str) -> str:
    """The branches and tags there are, if the Hub tells."""
    try:
        found = client().list_repo_refs(repository)
    except Exception:  # only the hint would have been better
        return f"see: {page(repository)}/commits/main"
    names = [ref.name for ref in (*found.branches, *found.tags)]
    return f"there are: {', '.join(names[:8])}"
