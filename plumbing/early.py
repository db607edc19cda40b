"""The first import of each script: Ctrl-C is heard while torch is imported, which takes seconds.

There is nothing to lose yet, so the process leaves at once. Raised as usual, an interrupt would be
a traceback of imports, or dropped by Python within a callback, or end in an abort within C++.
Later `cli.run` sees to it. Who imports this project as a library keeps his own signals.
"""

import os
import signal
import sys


def leave(number, frame) -> None:
    try:
        os.write(2, b"\ninterrupted\n")
    finally:  # nobody may be listening
        os._exit(130)


def of_a_script() -> bool:
    """Whether a script imports this file, or study/, of which a module is run by `python -m`."""
    frame = sys._getframe(1)
    while frame.f_globals["__name__"].startswith((__name__, "importlib.", "_frozen_importlib")):
        frame = frame.f_back
    name = frame.f_globals["__name__"]
    return name == "__main__" or (name == "study" and sys.argv[0] == "-m")


if of_a_script():
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, leave)
