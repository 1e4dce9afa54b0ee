"""Commands that carry adapters to and from the Hub."""

import click

from loramerge.cli.flags import Command, Flag

__all__ = ["COMMANDS"]


def pull(reference: str, out: str | None, force: bool, json: bool, quiet: bool) -> None:
    """Download an adapter from the Hub: its weights and the files that describe it.

    REFERENCE is user/repo, user/repo@revision, user/repo:folder/file.safetensors, hf://... or the
    address of a page. The path it was written to is printed on stdout.
    """
    from loramerge.cli.progress import progress
    from loramerge.cli.ui import echo_json, echo_path
    from loramerge.exchange import pull as brought

    with progress(quiet or json) as listen:
        final = brought(reference, out, force, listen)
    if json:
        echo_json({"output": str(final)})
    else:
        echo_path(final)


JSON = Flag(["json", "--json"], is_flag=True, help="Print JSON.")
COMMANDS: dict[str, click.Command] = {
    "pull": Command(
        "pull",
        callback=pull,
        params=[
            click.Argument(["reference"], metavar="REFERENCE"),
            Flag(
                ["out", "-o", "--out"],
                type=click.Path(),
                metavar="PATH",
                help="Where to write it.  [default: the name of the repository, here]",
            ),
            Flag(["force", "-f", "--force"], is_flag=True, help="Replace an existing output."),
            JSON,
            Flag(["quiet", "-q", "--quiet"], is_flag=True, help="Print only the output path."),
        ],
        help=pull.__doc__,
        short_help="Download an adapter from the Hub.",
        example="loramerge pull user/repo",
    ),
}
