"""The table of arguments and flags that commands share; what only one takes stands with it."""

import click

from loramerge.cli.command import LAYOUT, PICKLES, Flag, Words, flag
from loramerge.options import describe
from loramerge.registry import layout_names
from loramerge.settings import INPUT, MERGE, OUTPUT, Settings

__all__ = [
    "ADAPTER",
    "ADAPTERS",
    "ALLOW_PICKLE",
    "ALPHA",
    "ANY_ADAPTERS",
    "COMPUTE_DTYPE",
    "CREATE_PR",
    "DEVICE",
    "DRY_RUN",
    "FORCE",
    "FROM",
    "INPUTS",
    "JSON",
    "MESSAGE",
    "OUT",
    "OUT_DIR",
    "PRIVATE",
    "PUSH",
    "QUIET",
    "REPORT",
    "SAVE_DTYPE",
    "SAVE_RECIPE",
    "SENDING",
    "SHOWN",
    "WEIGHT",
    "path",
]

_DECLARED = {option.name: option for option in describe(Settings)}


def path(name: str) -> click.Argument:
    """One path or reference."""
    return click.Argument([name], type=click.Path(), metavar=name.upper())


def _adapters(required: bool) -> click.Argument:
    return click.Argument(
        ["adapters"], nargs=-1, required=required, type=click.Path(), metavar="ADAPTER..."
    )


ADAPTER = path("adapter")
ADAPTERS = _adapters(required=True)
# None at all is found in the current directory, or refused with an example by the recipe.
ANY_ADAPTERS = _adapters(required=False)
WEIGHT = Flag(
    "weight",
    "-w",
    "--weight",
    group=MERGE,
    type=float,
    multiple=True,
    metavar="X",
    help="Weight of each adapter, in their order; may be negative.  [default: 1 each]",
)
ALPHA = Flag(
    "alpha",
    "--alpha",
    group=INPUT,
    type=float,
    multiple=True,
    metavar="X",
    help="lora_alpha, for bare files that do not say it: once for all adapters, or once for each.",
)
FROM = Flag(
    "from_",
    "--from",
    group=INPUT,
    type=Words(lambda: ("auto", *layout_names())),
    multiple=True,
    metavar=f"{LAYOUT}|auto",
    help="Layout to read: once for all adapters, or once for each.  [default: told from the keys]",
)


def _allow(context: click.Context, param: click.Parameter, wanted: bool) -> None:
    """Keep the permission with the command line: whatever is opened for it may be a pickle."""
    context.meta[PICKLES] = wanted


ALLOW_PICKLE = Flag(
    "--allow-pickle",
    group=INPUT,
    is_flag=True,
    expose_value=False,
    callback=_allow,
    help="Read PyTorch pickles (.bin, .pt) too: the tensors in them; nothing is run.",
)
# How adapters are read.
INPUTS = (ALPHA, FROM, ALLOW_PICKLE)
OUT = Flag(
    "out",
    "-o",
    "--out",
    group=OUTPUT,
    type=click.Path(),
    metavar="PATH",
    help="Output directory, or one file where it ends in .safetensors.  "
    "[default: a name made of the inputs, here]",
)
OUT_DIR = Flag(
    "out_dir",
    "--out-dir",
    group=OUTPUT,
    type=click.Path(),
    metavar="DIR",
    help="Directory for several results.",
)
PUSH = Flag(
    "push",
    "--push",
    group=OUTPUT,
    metavar="USER/REPO",
    help="Send the result to the Hub too, with its card; the repository is made if need be.",
)
PRIVATE = Flag(
    "private",
    "--private",
    group=OUTPUT,
    is_flag=True,
    help="With --push: make a new repository private.",
)
CREATE_PR = Flag(
    "create_pr",
    "--create-pr",
    group=OUTPUT,
    is_flag=True,
    help="With --push: open a pull request instead.",
)
MESSAGE = Flag(
    "message",
    "-m",
    "--message",
    group=OUTPUT,
    metavar="TEXT",
    help="With --push: title of the commit.",
)
SAVE_RECIPE = Flag(
    "save_recipe",
    "--save-recipe",
    group=OUTPUT,
    type=click.Path(),
    metavar="FILE",
    help="Write this command line as a recipe for `loramerge run`.",
)
REPORT = Flag(
    "report",
    "--report",
    group=OUTPUT,
    type=click.Path(),
    metavar="FILE.html",
    help="Write the report as one page of HTML too, with a picture of the errors.",
)
FORCE = Flag("force", "-f", "--force", group=OUTPUT, is_flag=True, help="Replace existing outputs.")
DRY_RUN = Flag(
    "dry_run",
    "--dry-run",
    group=OUTPUT,
    is_flag=True,
    help="Show the plan; read headers only, write nothing.",
)
JSON = Flag("json", "--json", group=OUTPUT, is_flag=True, help="Print the result as JSON.")
QUIET = Flag(
    "quiet",
    "-q",
    "--quiet",
    group=OUTPUT,
    is_flag=True,
    help="Print only the result, such as where it was written.",
)
SAVE_DTYPE = flag(_DECLARED["save_dtype"])
COMPUTE_DTYPE = flag(_DECLARED["compute_dtype"])
DEVICE = flag(_DECLARED["device"])
# How a result gets to the Hub.
SENDING = (PUSH, PRIVATE, CREATE_PR, MESSAGE)
# How a result is shown.
SHOWN = (JSON, QUIET)
