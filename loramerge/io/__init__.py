"""Layouts: every file without a leading underscore is one."""
