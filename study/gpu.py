"""What a GPU brings: every step of it in one command for each of two parts, cheap steps first.

A GPU is often lent for minutes. So each step is a command of its own, as a reader would type it:

    small        the tests that touch a device; then the target that comes with the code beside its
                 EAGLE heads of one and two layers, chains of 4 and the fastest trees, greedy and at
                 temperature 1, in float32 and in bfloat16, first eager and then recorded as CUDA
                 graphs (targets/graphs.py): the first recording is of a few tokens
    pretrained   a larger target (SmolLM2): text of its own, heads of one and of two layers, and
                 bench.py on its test turns, eager and recorded

How a step ended, its seconds and its last lines lie in gpu-PART.json as soon as it ends. A failed
step stops no other, and a second call goes on with those that have not succeeded. One that is still
at work when --minutes are over is interrupted: training goes on where it was.

`python -m study.gpu --part small`; bench.py's own results lie where it writes them: for `small` in
out/trained-cpu/bench/, for `pretrained` in the run's folder.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from plumbing.cli import option, parse, run
from plumbing.files import write_json
from plumbing.machine import choose_device, describe_device, origin

LAST = 4000  # characters of what a step printed last
GRACE = 20  # seconds that an interrupted step has for what it keeps
TESTS = ["-m", "pytest", "-q", "tests/test_device.py", "tests/test_graphs.py"]


@dataclass(frozen=True)
class GpuConfig:
    part: str = option("small", "small or pretrained, see above", choices=["small", "pretrained"])
    target: str = option("smollm2", "of pretrained: as train.py --target takes it")
    minutes: float = option(9.0, "after which the step at work is interrupted", above=0)
    written_tokens: int = option(4_000_000, "of text that the pretrained target writes", above=0)
    head_tokens: int = option(20_000_000, "that each of its heads learns from", above=0)
    num_prompts: int = option(16, "test prompts that bench.py decodes", least=1)
    max_new_tokens: int = option(128, "tokens of each", least=1)
    out_dir: str = option("out/gpu", "folder of the results, and of the pretrained run")
    device: str = option("cuda", "auto, cpu or cuda; the CPU to rehearse")


def steps_of(config: GpuConfig) -> dict[str, list[str]]:
    """{name: what follows `python`}, in order."""
    device, folder = ["--device", config.device], ["--out_dir", config.out_dir]
    size = ["--num_prompts", str(config.num_prompts)]
    size += ["--max_new_tokens", str(config.max_new_tokens)]
    recorded = ["--compile"] if config.device != "cpu" else []  # which has no graphs

    def bench(dtype: str, temperature: int, is_recorded: bool, *more: str) -> tuple[str, list]:
        words = "gpu", config.part, dtype, "sampled" if temperature else "greedy"
        name = "-".join([*words, "recorded"] if is_recorded else words)
        command = ["bench.py", "--name", name, "--dtype", dtype, "--sizes", "4", "auto", *size]
        command += ["--temperature", str(temperature), *more, *device]
        return name, command + recorded * is_recorded

    modes = [("float32", 0), ("bfloat16", 0), ("bfloat16", 1)]
    if config.part == "small":
        it = ["--out_dir", "trained/cpu"]
        first = ["speculate.py", *it, "--prompt", "def main(", "--max_new_tokens", "32", *device]
        steps = {"tests": TESTS, "eager": first, "recorded": first + recorded}
        more = [*it, "--heads", "eagle", "eagle-koala"]
        return steps | dict(
            bench(dtype, temperature, is_recorded, *more)
            for dtype, temperature in modes
            for is_recorded in (False, True)
        )
    text = ["--written_tokens", str(config.written_tokens)]
    text += ["--head_tokens", str(config.head_tokens)]
    train = ["train.py", "--target", config.target, *folder, *text, *device, "--head"]
    steps = {name: [*train, name] for name in ("eagle", "eagle-k2")}
    return steps | dict(
        bench(dtype, temperature, is_recorded, *folder)
        for dtype, temperature in modes[1:]
        for is_recorded in (True, False)
    )


def run_step(command: list[str], seconds: float) -> dict:
    """Run `python` with these words, for so many seconds at most."""
    begin = time.monotonic()
    together = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8")
    # A process group of its own: an interrupt is for the step alone.
    step = subprocess.Popen([sys.executable, *command], start_new_session=True, **together)
    try:
        printed, _ = step.communicate(timeout=seconds)
        ended = "done" if step.returncode == 0 else f"exit status {step.returncode}"
    except subprocess.TimeoutExpired:
        printed, ended = stop(step), "interrupted"
    except KeyboardInterrupt:
        stop(step)
        raise
    taken = time.monotonic() - begin
    return {"command": command, "ended": ended, "seconds": taken, "printed": printed[-LAST:]}


def stop(step: subprocess.Popen) -> str:
    """Interrupt a step, as Ctrl-C would, and if that does not help, kill it; what it printed."""
    for number in (signal.SIGINT, signal.SIGKILL):
        os.killpg(step.pid, number)
        try:
            return step.communicate(timeout=GRACE)[0]
        except subprocess.TimeoutExpired:
            pass
    return ""


def main() -> None:
    config = parse(GpuConfig, about=__doc__)
    device, begin = choose_device(config.device), time.monotonic()
    path = Path(config.out_dir) / f"gpu-{config.part}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    result = {"config": asdict(config), "device": describe_device(device), "steps": {}}
    if path.is_file():
        result["steps"] = json.loads(path.read_text("utf-8"))["steps"]
    steps = steps_of(config)
    for name, command in steps.items():
        before = result["steps"].get(name)
        if before and before["ended"] == "done" and before["command"] == command:
            print(f"{name}: done already", flush=True)
            continue
        if (left := 60 * config.minutes - (time.monotonic() - begin)) <= 0:
            print(f"{name}: no time left", flush=True)
            continue
        print(f"{name}: python {shlex.join(command)}", flush=True)
        found = result["steps"][name] = run_step(command, left)
        write_json(path, origin() | result)
        if found["ended"] != "done":
            print(found["printed"], flush=True)
        print(f"{name}: {found['ended']} after {found['seconds']:.0f} s", flush=True)
    ended = [result["steps"].get(name, {}).get("ended") for name in steps]
    print(f"{ended.count('done')} of {len(ended)} steps done; written: {path}")


if __name__ == "__main__":
    run(main)
