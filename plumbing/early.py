"""The first import of each script: Ctrl-C is one line while torch is imported, which takes seconds.

Python drops an error within a callback, such as those of its import system, and with it a Ctrl-C
that falls there. So it is noted, and `cli.run`, which takes over after the imports, hears of it.
Who imports this project as a library keeps tracebacks of his own code.
"""

import signal
import sys
from functools import partial

heard = False  # whether Ctrl-C came while this process imported


def interrupt(number, frame) -> None:
    global heard
    heard = True
    raise KeyboardInterrupt


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


def unraisablehook(usual, dropped) -> None:
    """In place of Python's own, which prints a traceback of what it drops."""
    if not issubclass(dropped.exc_type, KeyboardInterrupt):
        usual(dropped)


sys.excepthook = partial(excepthook, sys.excepthook)
sys.unraisablehook = partial(unraisablehook, sys.unraisablehook)
try:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
except ValueError:  # in another thread than the main one: not a script of ours
    pass
