"""What no single test can show, tried many times: minutes, not seconds, and by hand.

    python -m tests.endurance tokens 1000000   greedy tokens in float64, over random cases
    python -m tests.endurance kills 20         runs killed ten times each, against one in peace
    python -m tests.endurance pairs 50         two commands at once on one folder

`tokens`: random prompts, heads, plans, sizes and stop tokens; every text has to be the target's
own, checked by one pass over the whole of it. `kills`: the tests' tiny recipe, saved every 0.3 s,
its texts written in many batches, killed at random moments by SIGKILL, SIGTERM or SIGINT; the
weights of all checkpoints have to be those of the run that nobody killed, bit for bit. `pairs`: one
of the two has to be refused in a line, and the other to end as if it had been alone.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))  # of toys and conftest

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KILLS = 10  # of each run
CHILD = """
import sys
sys.path[:0] = ["tests", "."]
import plumbing.early
import conftest, plumbing.progress, targets.written, train
from plumbing.cli import run
plumbing.progress.SAVE_SECONDS, targets.written.ON_CPU = 0.3, 20
run(train.main)
"""


# ------------------------------------------------------------------------------------- tokens


def random_plan(rng: random.Random, kind: str):
    from drafts import Chain, CopyFirst, GrowingTree, Lookup, fixed_tree

    device = torch.device("cpu")
    which = rng.choice(["chain", "fixed", "growing", "copies", "copies first"])
    if which == "copies first":
        return CopyFirst(Lookup(rng.randint(1, 4), rng.randint(1, 9)), Chain(rng.randint(1, 8)))
    if which == "copies":
        return Lookup(rng.randint(1, 4), rng.randint(1, 9))
    if which == "chain":
        return Chain(rng.randint(1, 8))
    if which == "growing" and kind == "eagle":
        return GrowingTree(rng.randint(1, 20), rng.randint(1, 6), rng.randint(1, 4), device)
    paths = {()}
    for _ in range(rng.randint(1, 12)):
        parent = rng.choice(sorted(path for path in paths if len(path) < 5))
        paths.add((*parent, sum(path[:-1] == parent for path in paths if path)))
    return fixed_tree(tuple(sorted(paths - {()})), device)


def tokens(count: int) -> bool:
    """Each text's tokens are the first choices along it; it ends where it has to."""
    from toys import tiny_head, tiny_target

    from sampling import argmax
    from speculate import generate

    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rng, settings = random.Random(0), []
    for seed, context in enumerate((24, 24, 48, 96)):
        target = tiny_target(seed, vocab=rng.randint(8, 60), context=context)
        heads = [tiny_head(k, n, target, 40) for k in ("medusa", "eagle") for n in (1, 2)]
        settings.append((target, heads))
    done, texts, written, cycles, wrong = 0, 0, 0, 0, 0
    while done < count:
        target, heads = rng.choice(settings)
        vocab, context = target.config.vocab_size, target.config.context
        prompt = rng.choices(range(vocab), k=rng.randint(1, context // 2))
        head = rng.choice(heads)
        stops = set(rng.choices(range(vocab), k=rng.choice([0, 0, 1, 3])))
        limit = rng.randint(1, context)
        plan = random_plan(rng, head.config.kind)
        out = generate(target, prompt, limit, head=head, plan=plan, stop_token=stops)
        new = torch.tensor(out.tokens)
        with torch.no_grad():
            states = target(torch.tensor([[*prompt, *out.tokens[:-1]]]))[:, len(prompt) - 1 :]
            right = argmax(target.lm_head(states))[0].equal(new)
        room = min(limit, context - len(prompt))
        ended = out.tokens[-1] in stops or len(out.tokens) == room
        early = any(token in stops for token in out.tokens[:-1])
        if not right or not ended or early:
            wrong += 1
            print(f"DIFFERS: {plan}, prompt {prompt}, limit {limit}, stops {stops}", flush=True)
        done, texts = done + len(new), texts + 1
        written += sum(out.produced[: out.uncut_cycles])
        cycles += out.uncut_cycles
    tau = written / max(1, cycles)
    print(f"{done:,} tokens in {texts:,} texts, tau {tau:.2f}: {wrong} texts differ")
    return wrong == 0


# -------------------------------------------------------------------------------------- kills


def flags(folder: Path, out: Path) -> list[str]:
    from conftest import TINY

    return [*TINY.split(), "--data", str(folder), "--out_dir", str(out)]


def started(argv: list[str]) -> subprocess.Popen:
    words = [sys.executable, "-u", "-c", CHILD, *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(words, cwd=ROOT, env=environment, **pipes)


def weights(out: Path) -> dict:
    """{file: {name: tensor}} of a finished run."""
    files = sorted(path for path in out.glob("*.pt") if "progress" not in path.name)
    found = {path.name: torch.load(path, weights_only=True)["weights"] for path in files}
    return found


def same(ours: dict, theirs: dict) -> bool:
    if ours.keys() != theirs.keys() or len(ours) != 5:
        return False
    return all(
        ours[file].keys() == theirs[file].keys()
        and all(ours[file][name].equal(theirs[file][name]) for name in ours[file])
        for file in ours
    )


def text_of(folder: Path) -> Path:
    from conftest import sentences

    folder.mkdir()
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(sentences(number, 2000))
    return folder


def finished(argv: list[str]) -> subprocess.Popen:
    process = started(argv)
    process.communicate()
    return process


def kills(runs: int) -> bool:
    """A line a run says which signals came, and how long each command took to end."""
    wrong, rng = 0, random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        text, peace = text_of(Path(scratch) / "text"), Path(scratch) / "peace"
        begin = time.monotonic()
        assert finished(flags(text, peace)).returncode == 0
        whole, wanted, given = time.monotonic() - begin, weights(peace), 0
        for run in range(runs):
            out, seen = Path(scratch) / str(run), []
            while len(seen) < KILLS:
                process = started(flags(text, out))
                if rng.random() < 0.9:
                    process.stdout.readline()  # the imports are done; else it dies in them
                time.sleep(rng.random() * whole / 6)
                number = rng.choice(SIGNALS)
                process.send_signal(number)
                sent = time.monotonic()
                _, err = process.communicate()
                late = time.monotonic() - sent
                status = process.returncode
                if status == 0 and late < 5:
                    break  # it was done already, and has not gone on in spite of the signal
                if status not in (130, -number):  # 0: a signal that was not heard
                    wrong += 1
                    print(f"run {run}: {number.name}, status {status}: {err[-500:]}", flush=True)
                seen.append(f"{number.name} {late:.1f} s")
                polite = number != signal.SIGKILL and status == 130
                if "Traceback" in err or late > 5 or (polite and "interrupted" not in err):
                    wrong += 1
                    print(f"run {run}: {number.name}, {late:.1f} s: {err[-500:]}", flush=True)
            given += len(seen)
            last = finished(flags(text, out))
            alike = last.returncode == 0 and same(weights(out), wanted)
            wrong += not alike
            verdict = "the same weights" if alike else "OTHER WEIGHTS"
            print(
                f"run {run + 1}/{runs}: {len(seen)} kills ({', '.join(seen)}): {verdict}",
                flush=True,
            )
    print(f"{given} kills in {runs} runs: {wrong} of them wrong")
    return wrong == 0


def pairs(count: int) -> bool:
    """Two commands at once: one is refused with status 2 and one line, unless the other is done."""
    wrong, refused = 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        text, peace = text_of(Path(scratch) / "text"), Path(scratch) / "peace"
        assert finished(flags(text, peace)).returncode == 0
        wanted = weights(peace)
        for number in range(count):
            both = [started(flags(text, Path(scratch) / str(number))) for _ in range(2)]
            ends = [process.communicate()[1] for process in both]
            statuses = sorted(process.returncode for process in both)
            told = [err for err in ends if "is being written by process" in err]
            refused += len(told)
            well = statuses in ([0, 0], [0, 2]) and len(told) == statuses.count(2)
            well &= all(err.count("\n") <= 1 for err in ends)
            if not well or not same(weights(Path(scratch) / str(number)), wanted):
                wrong += 1
                print(f"pair {number}: {statuses} {ends}", flush=True)
    print(f"{count} pairs, {refused} commands refused: {wrong} wrong")
    return wrong == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["tokens", "kills", "pairs"])
    parser.add_argument("count", type=int)
    asked, begin = parser.parse_args(), time.monotonic()
    well = {"tokens": tokens, "kills": kills, "pairs": pairs}[asked.what](asked.count)
    print(f"{(time.monotonic() - begin) / 60:.1f} min")
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main()
