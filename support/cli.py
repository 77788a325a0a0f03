"""What the command lines of the programs share: types, words, and whether to stop."""

import argparse
import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from images import catch_signals


def number(kind, low, high=math.inf):
    """Return an argparse type for an int or a float that is at least `low` and below `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            limit = f" and below {high}" if high < math.inf else " and finite" * (kind is float)
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{limit}")
        return value

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


class Once(argparse.Action):
    """Store the value of a flag, which must not be given twice."""

    def __call__(self, parser, namespace, value, option):
        if getattr(namespace, self.dest, None) is not None:
            parser.error(f"{option} is given twice")
        setattr(namespace, self.dest, value)


def command(*words):
    """Return the words as a command line that the user's shell understands."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def drawing(flag, path, classes, is_demo):
    """Return a hint: the command that draws, in 10 steps except for the demo, guided with classes.

    flag: --onnx or --checkpoint, of which `path` is the value.
    """
    words = [str(Path(sys.argv[0]).with_name("sample.py")), flag, path.as_posix()]
    words += ["--steps", "10"] * (not is_demo) + ["--guidance", "1"] * bool(classes)
    return f"next:\n  python {command(*words)}"


class StopRequest:
    """Whether the program was told to stop by a signal: `made` is False until then.

    The program then finishes what it is doing, and saves it.
    """

    def __init__(self):
        self.made = False
        catch_signals(self.receive)

    def receive(self, number, _):
        """Note a signal, as its handler."""
        is_first = os.environ.get("RANK", "0") == "0"  # among torchrun's processes
        if number == signal.SIGINT and not self.made and is_first:
            with contextlib.suppress(OSError):  # Ctrl-C ends a pipe, too
                os.write(2, b"\nfinishing the step, to save it\n")  # print may be interrupted
        self.made = True
