"""The first import of each script: Ctrl-C is one line while torch is imported, which takes seconds.

Later `cli.run` sees to it. Who imports this project as a library keeps tracebacks of his own code.
"""

import sys
from functools import partial


def excepthook(usual, kind, error, trace) -> None:
    """In place of Python's own, which is `usual`."""
    importing = False
    while trace is not None:
        frame, trace = trace.tb_frame, trace.tb_next
        # The body of another module than the script runs while that is imported.
        importing |= (
            frame.f_code.co_name == "<module>" and frame.f_globals["__name__"] != "__main__"
        )
    if importing and issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        usual(kind, error, error.__traceback__)


sys.excepthook = partial(excepthook, sys.excepthook)
