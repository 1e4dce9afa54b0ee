"""The one client of the Hub, patient with a Hub that is busy.

HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are the client's own variables.
"""

import functools
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from loramerge._lazy import hub_errors, hub_utils, huggingface_hub
from loramerge._version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

__all__ = ["client", "headers", "limit_silence", "page", "patiently", "refusal", "stated_wait"]

Result = TypeVar("Result")
# Seconds before each further attempt at a Hub that is busy, where it does not say how many.
PAUSES = (1.0, 2.0, 4.0)
# More seconds than this nobody waits for without being told.
LONGEST = 30.0
# Seconds without a word after which a push is given up; gateways give up a busy Hub before.
SILENCE = 120.0
BUSY = frozenset((429, 500, 502, 503, 504))


@functools.cache
def client() -> "HfApi":
    """The client, made once."""
    return huggingface_hub.HfApi(library_name="loramerge", library_version=__version__)


def limit_silence() -> None:
    """Let no request of this process wait for ever; only for one that is ours alone.

    What makes a repository or a commit takes no limit of its own: the client's session has it.
    """
    hub_utils.get_session().timeout = (None, SILENCE, None, None)


def headers() -> dict[str, str]:
    """What the client sends with each request: the token, if there is one, and who asks."""
    return hub_utils.build_hf_headers(library_name="loramerge", library_version=__version__)


def page(repository: str) -> str:
    """The address of a repository, to open in a browser."""
    return f"{client().endpoint}/{repository}"


def patiently(call: Callable[[], Result]) -> Result:
    """The result of a request, asked for again while the Hub says that it is busy."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            found = refusal(error)
            if found is None or found.response.status_code not in BUSY:
                raise
            wait = stated_wait(found)
            if wait is not None and wait > LONGEST:
                raise
            time.sleep(pause if wait is None else wait)
    return call()


def refusal(error: BaseException) -> "HfHubHTTPError | None":
    """The answer of the Hub behind an exception; None where none came."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, hub_errors.HfHubHTTPError):
        seen = seen.__cause__
    return seen


def stated_wait(refused: "HfHubHTTPError") -> float | None:
    """The seconds after which the Hub wants to be asked again, where it says so."""
    found = refused.response.headers
    stated = found.get("retry-after", "")
    if not stated.isdigit() and (limit := re.search(r"\br=0;t=(\d+)", found.get("ratelimit", ""))):
        stated = limit[1]
    return float(stated) if stated.isdigit() else None
