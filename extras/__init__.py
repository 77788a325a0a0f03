"""Modules and programs around the six files: `python -m extras.NAME` runs a program."""
