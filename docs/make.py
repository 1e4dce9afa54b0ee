"""Draws docs from the declarations; --check fails where they are stale."""
