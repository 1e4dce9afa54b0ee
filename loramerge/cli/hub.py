"""Commands that carry adapters to and from the Hub."""

import click

from loramerge.cli.command import Command
from loramerge.cli.flags import ADAPTER, CREATE_PR, FORCE, JSON, MESSAGE, OUT, PRIVATE, QUIET, SHOWN
from loramerge.errors import listed
from loramerge.events import Started

__all__ = ["COMMANDS"]


def pull(reference: str, out: str | None, force: bool, json: bool, quiet: bool) -> None:
    """Download an adapter from the Hub: its weights, what describes them, and its tokenizer.

    REFERENCE is user/repo, user/repo@revision, user/repo:folder/file.safetensors, hf://... or the
    address of a page. The path it was written to is printed on stdout.
    """
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json, echo_path
    from loramerge.exchange import pull as brought

    with progress(quiet or json) as listen:
        final = brought(reference, out, force=force, listen=listen)
    if json:
        echo_json({"output": str(final)})
    else:
        echo_path(final)


def push(
    adapter: str,
    repository: str,
    private: bool,
    create_pr: bool,
    message: str | None,
    json: bool,
    quiet: bool,
) -> None:
    """Send an adapter to the Hub: its weights, config, record, card, terms and tokenizer.

    What else lies beside it is left out, and named. The repository is made where there is none;
    what is there already is not sent again. Without a README.md a card is made of what the files
    say. The address is printed on stdout.
    """
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json
    from loramerge.exchange import push as sent
    from loramerge.io._hub_client import limit_silence

    limit_silence()
    with progress(quiet or json) as listen:
        listen(Started("sending to the Hub", 0))
        found = sent(adapter, repository, private=private, create_pr=create_pr, message=message)
    if found.left and not quiet:
        click.echo(f"left out: {listed(list(found.left), 6)}", err=True)
    if not (found.changed or quiet):
        click.echo("nothing was sent: everything is there already", err=True)
    if json:
        echo_json({"url": found.url, "changed": found.changed, "left": list(found.left)})
    else:
        click.echo(found.url)


COMMANDS: dict[str, click.Command] = {
    "pull": Command(
        "pull",
        callback=pull,
        params=[
            click.Argument(["reference"], metavar="REFERENCE"),
            OUT.saying("Where to write it.  [default: the name of the repository, here]"),
            FORCE,
            *SHOWN,
        ],
        help=pull.__doc__,
        short_help="Download an adapter from the Hub.",
        example="loramerge pull user/repo",
    ),
    "push": Command(
        "push",
        callback=push,
        params=[
            ADAPTER,
            click.Argument(["repository"], metavar="USER/REPO"),
            PRIVATE.saying("Make a new repository private."),
            CREATE_PR.saying("Open a pull request instead."),
            MESSAGE.saying("Title of the commit."),
            JSON,
            QUIET.saying("Print only the address."),
        ],
        help=push.__doc__,
        short_help="Send an adapter to the Hub, with a card.",
        example="loramerge push my-adapter user/repo",
    ),
}
