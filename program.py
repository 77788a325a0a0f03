"""What the programs share: files to write, output and signals.

It imports no other file of the project; sample.py, which can be copied alone, does without it.
"""

import contextlib
import io
import os
import secrets
import signal
import sys
import threading
from pathlib import Path


def check_writable(path, *inputs):
    """Exit with one line if no file can be written at `path`, or if it is one of the inputs."""
    folder = next(folder for folder in Path(path).absolute().parents if os.path.lexists(folder))
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        sys.exit(f"{path} can't be written: {folder} is not a folder, or is write-protected")
    if os.path.isdir(path) or (os.path.exists(path) and not os.access(path, os.W_OK)):
        sys.exit(f"{path} can't be written: it is a folder, or is write-protected")
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        sys.exit(f"{path} can't be written: the program reads it")


@contextlib.contextmanager
def writing(path):
    """Exit with one line if the block can't write the file `path`, as on a full disk."""
    try:
        yield
    except OSError as error:
        sys.exit(f"{path} can't be written: {error}")


@contextlib.contextmanager
def replacing(path):
    """Yield a new binary file, which takes the place of the file `path` at the end of the block.

    It makes the folder, too. If the block fails, `path` stays as it was. Exits with one line if the
    disk is full.
    """
    name = Path(path).name.lstrip(".")
    temporary = Path(path).with_name(f".{name}.{secrets.token_hex(8)}.tmp")
    try:
        with writing(path):
            temporary.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # otherwise, a power cut may leave an empty file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Output:
    """Standard output or error, which drops what can't be written, as after the end of a pipe."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def end_by_signal(number):
    """End this process by a signal, so that a shell loop ends, too."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)


def guard_output():
    """Let print survive the end of a pipe and any encoding, and Ctrl-C leave no traceback."""
    hook = sys.excepthook

    def show(kind, *error):  # after every `finally`
        if issubclass(kind, KeyboardInterrupt):
            end_by_signal(signal.SIGINT)
        hook(kind, *error)

    sys.excepthook = show
    for name in "stdout", "stderr":
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # neither closed nor Jupyter's
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
            setattr(sys, name, Output(stream))


@contextlib.contextmanager
def stop_requests():
    """Yield a list, which gets the number of each signal that asks the program to stop.

    The signals are Ctrl-C, SIGTERM, SIGHUP (the terminal was closed) and SIGPIPE (the reader of a
    pipe has ended). A second Ctrl-C ends the program at once. A signal that is ignored, as SIGHUP
    under nohup, stays so. The former handlers return at the end of the block.
    """
    received, before = [], {}

    def receive(number, _):
        received.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            with contextlib.suppress(OSError):  # print can't be called in the middle of a print
                os.write(2, b"\nstopping after this step; Ctrl-C again ends without saving\n")

    is_main = threading.current_thread() is threading.main_thread()  # only it gets signals
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGPIPE") if is_main else ():
        number = getattr(signal, name, None)  # Windows lacks two of them
        # SIGPIPE is always received, because Python itself ignores it.
        if number and (name == "SIGPIPE" or signal.getsignal(number) != signal.SIG_IGN):
            before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
