"""Modules and programs around the six files: `python -m extras.NAME` runs a program."""

import sys

if sys.argv[:1] == ["-m"]:  # a program is about to start: Ctrl-C ends it without a traceback
    sys.excepthook = lambda kind, *e: kind is KeyboardInterrupt or sys.__excepthook__(kind, *e)
