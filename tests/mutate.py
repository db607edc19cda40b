"""`python -m tests.mutate`: breaks each line of tests/mutations.py in a copy, and runs its tests.

    python -m tests.mutate                 all of them
    python -m tests.mutate --part 1/3      every third, chosen by the commit

A mutation is caught if one of its tests fails. The exit status is 1 if any survives.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutations import MUTATIONS, Mutation

ROOT = Path(__file__).parent.parent
LEFT_OUT = shutil.ignore_patterns(".git", "out", "__pycache__", ".*_cache", "results", "docs")


def caught(mutation: Mutation, folder: Path) -> str | None:
    """The first test that fails with the line broken; None: all passed."""
    path = folder / mutation.file
    text = path.read_text("utf-8")
    path.write_text(text.replace(mutation.line, mutation.wrong), "utf-8")
    try:
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
        command = [*words, *shlex.split(mutation.tests)]
        found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    finally:
        path.write_text(text, "utf-8")
    if found.returncode not in (0, 1):
        raise SystemExit(f"{mutation.file}: its tests cannot run:\n{found.stdout[-2000:]}")
    failed = [line for line in found.stdout.splitlines() if line.startswith("FAILED")]
    return failed[0].split()[1] if failed else "an error" if found.returncode else None


def chosen(part: str | None) -> list[Mutation]:
    """Those of a part, "1/3": which third of them is told by the commit."""
    if part is None:
        return MUTATIONS
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    number, of = map(int, part.split("/"))
    first = (int(commit.stdout.strip()[:8] or "0", 16) + number - 1) % of
    return MUTATIONS[first::of]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", default=None, help="such as 1/3; default: all")
    asked, survived = chosen(parser.parse_args().part), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
        for number, mutation in enumerate(asked, start=1):
            begin, name = time.monotonic(), f"{mutation.file}: {mutation.wrong.strip()[:60]!r}"
            test = caught(mutation, folder)
            survived += [name] if test is None else []
            verdict = "SURVIVED" if test is None else f"caught by {test}"
            seconds = time.monotonic() - begin
            print(f"{number}/{len(asked)} {name} {verdict}, {seconds:.0f} s", flush=True)
    print(f"{len(asked) - len(survived)} of {len(asked)} caught")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
