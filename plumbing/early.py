"""The first import of each script: Ctrl-C is one line while torch is imported, which takes seconds.

Later `cli.run` sees to it. Who imports this project as a library keeps tracebacks of his own code.
"""

import sys
from functools import partial


def excepthook(usual, kind, error, trace) -> None:
    """In place of Python's own, which is `usual`."""
    importing = False
    while trace is not None:
        importing |= trace.tb_frame.f_code.co_filename.startswith("<frozen importlib")
        trace = trace.tb_next
    if importing and issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        usual(kind, error, error.__traceback__)


sys.excepthook = partial(excepthook, sys.excepthook)
