"""The command line: the only folder that knows click and rich."""

import os
import sys
import warnings
from importlib import import_module
from typing import NoReturn

import click

from loramerge._version import __version__
from loramerge.errors import UsageError
from loramerge.options import did_you_mean

__all__ = ["cli", "main", "written"]

# The files that hold the commands written by hand, each in a table COMMANDS.
WRITTEN = {
    "Surgery": ("surgery",),
    "Look": ("look", "verify", "compare"),
    "Change form": ("convert", "baking"),
    "Hub": ("hub",),
    "Recipes": ("recipes",),
}
# What other tools call it.
ELSEWHERE = {
    "add": "arithmetic",
    "compress": "squeeze",
    "concat": "cat",
    "info": "inspect",
    "lego": "cluster",
    "linear": "arithmetic",
    "merge": "arithmetic",
    "preview": "compare",
    "resize": "squeeze",
    "show": "inspect",
    "sum": "arithmetic",
    "svd": "squeeze",
}


class Commands(click.Group):
    """Commands made when asked for: one per registered method and preset, and the written ones."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Every command, in the order help shows them."""
        return [name for names in _groups().values() for name in names]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """One command, or None."""
        from loramerge.cli.methods import command
        from loramerge.registry import method_names

        if name in method_names():
            return command(name)
        for found in written().values():
            if name in found:
                return found[name]
        return command(name) if name in self.list_commands(ctx) else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of a command line. Raises UsageError with the closest name for none."""
        name = args[0]
        if name.startswith("-") or ctx.resilient_parsing or self.get_command(ctx, name):
            return super().resolve_command(ctx, args)
        known = self.list_commands(ctx)
        close = ELSEWHERE.get(name) or did_you_mean(name, known)
        raise UsageError(
            f"There is no command '{name}'.",
            f"did you mean '{close}'?" if close in known else "see: loramerge --help",
        )

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Help with the commands grouped by what they do."""
        for title, summaries in _groups().items():
            with formatter.section(title):
                formatter.write_dl(list(summaries.items()))

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands to start with, and how a shell learns to complete words."""
        with formatter.section("Examples"):
            formatter.write("  loramerge cluster a.safetensors b.safetensors -k 16\n")
            formatter.write("  loramerge squeeze my-adapter --rank 8\n")
        with formatter.section("Completion (bash, zsh, fish)"):
            for name in ("bash", "zsh"):
                formatter.write(f'  eval "$(_LORAMERGE_COMPLETE={name}_source loramerge)"\n')
            formatter.write("  _LORAMERGE_COMPLETE=fish_source loramerge | source\n")


def _groups() -> dict[str, dict[str, str]]:
    """Every command with its summary, by what it does; no command is made for it."""
    from loramerge.registry import methods

    merge: dict[str, str] = {}
    compress: dict[str, str] = {}
    surgery: dict[str, str] = {}
    for method in methods().values():
        found = surgery if method.surgery else merge if method.takes == "many" else compress
        found[method.name] = method.summary
        found.update({preset.name: preset.summary for preset in method.presets})
    groups = {
        "Merge (many adapters to one)": merge,
        "Compress (one adapter)": compress,
        "Surgery": surgery,
    }
    for title, commands in written().items():
        found = groups.setdefault(title, {})
        found.update({name: one.short_help or one.help or "" for name, one in commands.items()})
    return groups


def written() -> dict[str, dict[str, click.Command]]:
    """The commands written by hand, by the heading that help lists them under."""
    found: dict[str, dict[str, click.Command]] = {}
    for title, modules in WRITTEN.items():
        tables = [import_module(f"loramerge.cli.{module}").COMMANDS for module in modules]
        found[title] = {name: one for table in tables for name, one in table.items()}
    return found


@click.command(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="loramerge")
def cli() -> None:
    """Merge, compress and inspect LoRA adapters, without the base model.

    Each command has its own --help. Every option can also be set in the environment:
    LORAMERGE_<COMMAND>_<OPTION>, such as LORAMERGE_SQUEEZE_RANK=8.
    """


def main() -> NoReturn:
    """Run a command line and leave with its exit code; known failures never show a traceback."""
    # The client of the Hub leaves the terminal to us.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", module="huggingface_hub")
    try:
        sys.exit(cli.main(prog_name="loramerge", standalone_mode=False) or 0)
    except Exception as error:
        if os.environ.get("LORAMERGE_DEBUG"):
            raise
        from loramerge.cli.errors import explain

        sys.exit(explain(error))
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped\n")
        sys.exit(130)
