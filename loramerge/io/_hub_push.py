"""Files to a repository on the Hub: one commit, or a pull request."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from loramerge._lazy import hub_errors, hub_utils, huggingface_hub
from loramerge.errors import HubError, UsageError
from loramerge.io._hub_client import client, headers, page, patiently
from loramerge.io._hub_errors import answered, explained
from loramerge.io._reference import HubReference, hub_reference

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["Pushed", "check_push", "upload"]

LATER = "type it again later: nothing was sent"


class Pushed(Struct, frozen=True):
    """Where files went, whether anything there was not yet as they are, and what was `left` out."""

    url: str
    changed: bool
    left: tuple[str, ...] = ()


def check_push(repository: str) -> None:
    """Raise UsageError for what names no repository, HubError where nobody is logged in."""
    if hub_reference(repository) != HubReference(repository):
        raise UsageError(
            f"{repository} is no name of a repository on the Hub.", "for example: user/repo"
        )
    with explained(repository, repository):
        try:
            with answered(LATER):
                patiently(_whoami)
        except hub_errors.OfflineModeIsEnabled:
            raise HubError(
                "Nothing can be sent while HF_HUB_OFFLINE is set.", "type: unset HF_HUB_OFFLINE"
            ) from None


def _whoami() -> None:
    """Ask the Hub whose token it is; the client's own question has no end where nobody answers."""
    response = hub_utils.get_session().get(
        f"{client().endpoint}/api/whoami-v2",
        headers=headers(),
        timeout=huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT,
    )
    hub_utils.hf_raise_for_status(response)


def upload(
    repository: str,
    files: Mapping[str, Path | bytes],
    *,
    private: bool,
    create_pr: bool,
    message: str,
) -> Pushed:
    """Make the repository where there is none, and the files part of it, in one commit.

    Files that are there already cost nothing; where all are, there is no commit. Raises HubError.
    """

    def commit() -> "CommitInfo":
        return client().create_commit(
            repository,
            [
                huggingface_hub.CommitOperationAdd(
                    name, content if isinstance(content, bytes) else str(content)
                )
                for name, content in files.items()
            ],
            commit_message=message,
            create_pr=create_pr,
        )

    with explained(repository, repository):
        patiently(lambda: client().create_repo(repository, private=private or None, exist_ok=True))
        before = patiently(lambda: client().model_info(repository).sha)
        made = patiently(commit)
        return Pushed(made.pr_url or page(repository), made.oid != before)
