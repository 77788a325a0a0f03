"""Modules and programs around the six files: `python -m extras.NAME` runs a program."""

import sys


def say_nothing_of_ctrl_c(kind, error, trace):
    """Print the traceback of an error, unless it is a KeyboardInterrupt."""
    if kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


if sys.argv[:1] == ["-m"]:  # a program is about to start
    sys.excepthook = say_nothing_of_ctrl_c
