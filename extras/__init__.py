"""Optional modules and programs: `python -m extras.NAME` runs a program."""
