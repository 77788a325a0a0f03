"""The folder of a run, in which one process trains: the checkpoint, log.csv, previews, a lock.

with Folder(Path("run")) as folder:
    state = folder.open()  # its checkpoint, or None
    folder.begin()         # no other process can train in it until the end of the block
    folder.keep()          # without this, a new run would leave no trace
    folder.save(run)       # a Run of run.py
"""

import contextlib
import sys
from pathlib import Path

import filelock

from images import DECODED
from program import check_writable, replacing, writing
from run import begin_anew, preview, read_checkpoint, write_checkpoint

LOG = "step,loss,grad_norm,lr\n"  # the first line of log.csv
LOCK = ".lock"


class Trial:
    """What a run makes before it begins: it is removed if the run is refused.

    path: the folder of the run.
    """

    def __init__(self, path):
        self.path = path
        self.before = self.traces()

    def traces(self):
        """Return which of the paths exist that a run makes before it begins."""
        paths = [*self.path.glob(DECODED), self.path / LOCK, self.path, *self.path.parents]
        return [path for path in paths if path.exists()]

    def undo(self):
        """Remove what is new."""
        for path in self.traces():
            if path not in self.before:
                with contextlib.suppress(OSError):  # another machine may use the folder, too
                    path.rmdir() if path.is_dir() else path.unlink()

    def keep(self):
        """Remove the decoded images that new ones replace."""
        images = {*self.path.glob(DECODED)}
        if images - {*self.before}:
            for path in images & {*self.before}:
                path.unlink(missing_ok=True)


class Folder:
    """The folder of a run: open, begin and keep it, and then save and log in it."""

    def __init__(self, path):
        self.path, self.checkpoint, self.log_file = path, path / "checkpoint.pt", path / "log.csv"
        self.lock_file = path / LOCK
        self.lock, self.held = filelock.FileLock(self.lock_file), None
        self.trial = None  # until the run begins

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.trial:
            self.trial.undo()
        self.lock.release(force=True)

    def open(self, data=None, init=None):
        """Return the checkpoint in the folder; or else one at step 0 from the run `init`, or None.

        It writes nothing. Exits if another process holds the folder, if its log.csv is not a log,
        or if it is the folder `data` of the images or a parent of it.
        """
        if data and Path(data).resolve().is_relative_to(self.path.resolve()):
            sys.exit(f"train.py: --out {self.path} must not be or contain the folder of the images")
        check_writable(self.checkpoint)
        if self.lock_file.exists():
            self.hold()
        self.read_log()
        if self.checkpoint.exists():
            if init is not None:
                print(f"{self.path} already holds a run, which continues; --init is ignored")
            return read_checkpoint(self.path)
        if init is None:
            return None
        print(f"a new run begins with the averaged weights of {init}")
        return begin_anew(read_checkpoint(init))

    def make(self):
        """Make the folder. If the run is refused before `keep`, __exit__ removes what is new."""
        self.trial = Trial(self.path)
        self.path.mkdir(parents=True, exist_ok=True)

    def begin(self):
        """Make the folder, hold it, and remove what a killed process did not finish."""
        self.make()
        self.hold()
        for path in self.path.glob(f".*.{16 * '[0-9a-f]'}.tmp"):
            path.unlink()

    def hold(self):
        """Acquire the lock, which a killed process loses. Exits if another process has it."""
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            self.trial = None  # the new files are the other process's
            sys.exit(f"train.py: another process is training in {self.path}; wait, or use "
                     "another --out")  # fmt: skip
        self.held = self.lock_file.stat().st_ino

    def keep(self):
        """Keep what `make` and the decoding have made, because the run begins."""
        if self.trial:
            self.trial.keep()
        self.trial = None

    def still_hold(self):
        """Exit if the folder was moved or removed, or if another process has begun a run in it."""
        if not self.lock_file.exists() or self.lock_file.stat().st_ino != self.held:
            sys.exit(f"train.py: {self.path} or its .lock was moved or replaced; the last steps "
                     "aren't saved")  # fmt: skip

    def save(self, run):
        """Replace the checkpoint. Exits if the disk is full."""
        write_checkpoint(run.state(), self.checkpoint)

    def read_log(self):
        """Return the rows of log.csv, if there is one. Exits if it is not a log."""
        text = self.log_file.read_text(errors="replace") if self.log_file.exists() else ""
        head, *rows = text.splitlines(keepends=True) or [LOG]
        if head != LOG:
            sys.exit(f"train.py: {self.log_file} is not a log of train.py; rename or remove it")
        return rows

    def begin_log(self, step):
        """Begin log.csv, or cut it back to the rows of the first `step` steps."""

        def is_earlier(row):  # a killed process leaves rows of later steps, and half a row
            number = row.partition(",")[0]
            return row.endswith("\n") and number.isdecimal() and int(number) <= step

        rows = filter(is_earlier, self.read_log())
        with replacing(self.log_file) as file:
            file.write((LOG + "".join(rows)).encode())

    def log(self, rows):
        """Append rows (step, loss, norm, rate). Exits if the disk is full."""
        with writing(self.log_file), open(self.log_file, "a") as file:
            file.writelines("{},{:.6g},{:.6g},{:.6g}\n".format(*row) for row in rows)

    def save_preview(self, run):
        """Save samples of the averaged network."""
        image = preview(run.ema, run.shape, run.names, run.settings)
        with replacing(self.path / f"preview-{run.step:07d}.png") as file:
            image.save(file, "PNG")
