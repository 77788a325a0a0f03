"""Report Ctrl-C and a missing package in one line, also while a program imports the others.

A program imports this module before all others. Every other error keeps its traceback.
"""

import sys

PACKAGES = "torch numpy PIL tqdm matplotlib filelock onnx onnxscript onnxruntime".split()


def report(kind, error, traceback):
    """Report an exception that nothing caught, as sys.excepthook."""
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)  # torch's exporter wraps KeyboardInterrupt
    stops = [error for error in chain if isinstance(error, KeyboardInterrupt)]
    if stops:  # Python then ends as Ctrl-C ends a program, so that a loop of the shell ends, too
        print(str(stops[0]) or "stopped", file=sys.stderr)
    elif kind is ModuleNotFoundError and error.name in PACKAGES:
        print(f"{error.name} is missing: pip install -r requirements.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = report
