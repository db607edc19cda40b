"""The first import of each script: Ctrl-C is one line while torch is imported, which takes seconds.

Later `cli.run` sees to it.
"""

import sys
from functools import partial


def excepthook(usual, kind, error, trace) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        usual(kind, error, trace)


sys.excepthook = partial(excepthook, sys.excepthook)
