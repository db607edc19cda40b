"""Break the lines of mutations.py one by one, each in a copy: its tests have to fail.

    python -m tests.mutate                   all of them
    python -m tests.mutate --part 1/3        a third
    python -m tests.mutate --with exercise   those whose reason has this word

The exit status is 1 where a broken line went unnoticed.
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".*", "out", "results", "docs", "__pycache__")  # .git, .venv
JOBS = min(4, os.cpu_count() or 1)  # at once, each in a copy of its own
PATIENCE = 900  # seconds, after which tests hang: that is noticed, too


def first_failure(tests: str, folder: Path) -> str | None:
    """The first of these tests that fails there; None: all pass. SystemExit: they cannot run."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    for speed in ("not slow", "slow"):
        command = [*words, "-m", speed, *shlex.split(tests)]
        try:
            found = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return f"{PATIENCE} seconds"
        # A fixture's error counts, that of a file does not (status 2): any syntax error is one.
        if found.returncode not in (0, 1, 5):
            raise SystemExit(f"{tests}: they cannot run:\n{found.stdout[-2000:]}")
        if failed := re.search(r"^(?:FAILED|ERROR) (\S+::\S+)", found.stdout, re.M):
            return failed[1]
    return None


def caught(mutation: Mutation, folder: Path) -> str | None:
    """The first test that fails with the line broken; None: all passed."""
    path = folder / mutation.file
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutation.line, mutation.wrong), "utf-8")
    try:
        return first_failure(mutation.tests, folder)
    finally:
        path.write_text(text, "utf-8")


def chosen(part: str, word: str) -> list[Mutation]:
    """Those of a part, "1/3", of the rows with this word. SystemExit where there is none."""
    found, asked = re.fullmatch(r"(\d+)/(\d+)", part), []
    if found and 1 <= int(found[1]) <= int(found[2]):
        rows = [mutation for mutation in MUTATIONS if word in mutation.why]
        asked = rows[int(found[1]) - 1 :: int(found[2])]
    if not asked:
        raise SystemExit(f"no line is asked for by --part {part} --with {word!r}")
    return asked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", default="1/1", help="such as 1/3; default: all")
    parser.add_argument("--with", default="", dest="word", help="a word of their reasons")
    arguments = parser.parse_args()
    asked, folders = chosen(arguments.part, arguments.word), SimpleQueue()

    def judged(mutation: Mutation) -> tuple:
        begin, folder = time.monotonic(), folders.get()
        try:
            return mutation, caught(mutation, folder), time.monotonic() - begin
        finally:
            folders.put(folder)

    def whole(tests: str) -> str | None:
        folder = folders.get()
        try:
            return first_failure(tests, folder)
        finally:
            folders.put(folder)

    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(JOBS) as pool:
        for number in range(JOBS):
            folder = Path(scratch) / str(number)
            folders.put(shutil.copytree(ROOT, folder, ignore=LEFT_OUT))
        # In a copy that is whole they pass: else they would catch anything.
        for failed in pool.map(whole, dict.fromkeys(mutation.tests for mutation in asked)):
            if failed:
                raise SystemExit(f"{failed} fails in a copy that is whole")
        survived = 0
        for number, (mutation, test, seconds) in enumerate(pool.map(judged, asked), start=1):
            survived += test is None
            verdict = "SURVIVED" if test is None else f"caught by {test}"
            name = f"{mutation.file}: {mutation.why}"
            print(f"{number}/{len(asked)} {name}: {verdict}, {seconds:.0f} s", flush=True)
    print(f"{len(asked) - survived} of {len(asked)} caught")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
