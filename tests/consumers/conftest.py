"""What the programs are given, and the table of what was measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.consumers.deviations import LEDGER, table
from tests.hub.conftest import adapter, hub

if TYPE_CHECKING:
    from tests.consumers.forms import Made

__all__ = ["adapter", "hub"]


@pytest.fixture(scope="session")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, "Made"]:
    """Every form of what we make of the tiny llama's adapters."""
    from tests.consumers.forms import FORMS, form, sources

    directory = tmp_path_factory.mktemp("llama")
    given = sources(directory)
    return {name: form(name, given, directory / f"form{n}") for n, name in enumerate(FORMS)}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave these modules alone where none of their tests is asked for: they load every program."""
    leave = collection_path.name.startswith("test_") and config.option.markexpr == "not consumers"
    return True if leave else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The programs warn of each other's ways; what loads an adapter wrong is a UserWarning."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            for category in ("DeprecationWarning", "FutureWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"ignore::{category}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The worst deviation of every program, in units of the adapter's effect."""
    if LEDGER:
        terminalreporter.section("where our files were loaded")
        for line in table():
            terminalreporter.write_line(line)
