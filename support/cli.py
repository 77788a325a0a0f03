"""What the command lines of the programs share: types for argparse, words, and signals."""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time

from support.ranks import RANK, WORLD


def number(kind, low, high=math.inf):
    """Return an argparse type for an int or a float that is at least `low` and below `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value < high:
            limit = f" and below {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} must be at least {low}{limit}")
        return value

    parse.__name__ = kind.__name__  # for argparse's messages
    return parse


def command(*words):
    """Return the words as a command line that the user's shell understands."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


class Interrupts:
    """Whether the program was told to stop: by Ctrl-C, SIGTERM or SIGHUP (a closed terminal).

    The program then finishes the step. A second Ctrl-C, 2 seconds later or more, ends it at once.
    """

    def __init__(self):
        self.since = None
        signal.signal(signal.SIGINT, self.stop)
        signal.signal(signal.SIGTERM, self.stop)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self.stop)  # unless nohup started the program

    def stop(self, number, _):
        if self.since is None:
            self.since = time.monotonic()
            if number == signal.SIGINT and RANK == 0:  # print may be interrupted, os.write is not
                os.write(2, b"\nfinishing the step, to save it; a second Ctrl-C ends it at once\n")
        elif number == signal.SIGINT and WORLD == 1 and time.monotonic() - self.since > 2:
            sys.exit("stopped mid-step: what was not saved is lost, but the checkpoint is kept")
