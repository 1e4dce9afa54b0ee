"""The Hub of tests/hub, for servers that mirror it."""

from tests.hub.conftest import adapter, hub

__all__ = ["adapter", "hub"]
