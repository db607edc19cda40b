"""What the scripts share: their command lines, the device and its clock, and how they fail.

A frozen dataclass is a script's configuration, its command line, its help text and the record of
it in a checkpoint, all at once: `option` gives a field its default and its help, `parse` fills the
dataclass from the command line, and its own `__post_init__` refuses what cannot work.

Whatever the user can mend is a `UserError`: `run` shows it as one line and exits with status 2.
"""

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import time
import typing
from contextlib import contextmanager
from pathlib import Path

import torch


class UserError(ValueError):
    """Something the user can mend; its text says what is wrong and what to do."""


def option(default, help: str, **details):
    """A dataclass field that is also a flag. `details` go to argparse: choices, nargs, ..."""
    return dataclasses.field(default=default, metadata={"help": help, **details})


def number_or_auto(text: str) -> int | str:
    """The type of an option that may be left to measurement."""
    return text if text == "auto" else int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message} (see --help)")


def parse(config_class, argv: list[str] | None = None, presets: dict | None = None):
    """An instance of `config_class` from the command line.

    With `presets`, a dictionary of name -> {field: default}, `--preset NAME` changes the defaults
    before the other flags are read, so that `--preset NAME --help` shows the values in force.
    """
    parser = Parser(
        description=sys.modules[config_class.__module__].__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        details = dict(field.metadata)
        kind = types[field.name]
        if kind is bool:
            details["action"] = argparse.BooleanOptionalAction
        else:  # `int | None` is read as int
            kinds = [k for k in typing.get_args(kind) if k is not type(None)] or [kind]
            inner = typing.get_args(kinds[0])[0] if "nargs" in details else kinds[0]
            details.setdefault("type", inner)
        parser.add_argument(f"--{field.name}", default=field.default, **details)
    if presets:
        first = Parser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=None)
        first.add_argument("--target", default=None)
        given = first.parse_known_args(argv)[0]
        name = given.preset or ("pretrained" if given.target else default_preset())
        if name not in presets:
            raise UserError(f"unknown preset {name!r}: choose from {', '.join(presets)}")
        parser.set_defaults(preset=name, **presets[name])
    return config_class(**vars(parser.parse_args(argv)))


def default_preset() -> str:
    return "gpu" if torch.cuda.is_available() else "cpu"


def choose_device(name: str) -> torch.device:
    """`auto`: CUDA where there is one, else the CPU. Asked for and absent: UserError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"unknown device {name!r}: auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine shows torch no CUDA GPU; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA GPUs")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: only cpu and cuda are supported")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # so that it is this one whose work is waited for and timed
    return device


def bfloat16_cost(device: torch.device) -> float:
    """The time of a matrix product in bfloat16, in units of float32's: measured on CPUs.

    From a third, where there are instructions for matrices of it, over twice, where there are some
    for vectors, to many times, where there are none.
    """
    if device.type == "cuda":
        return 0.5 if torch.cuda.is_bf16_supported(including_emulation=False) else math.inf
    best = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(512, 512, dtype=dtype)
        best[dtype] = math.inf
        for _ in range(5):
            start = time.perf_counter()
            a @ a
            best[dtype] = min(best[dtype], time.perf_counter() - start)
    return best[torch.bfloat16] / best[torch.float32]


def compile_layers(target) -> None:
    """Have torch compile the layers of a target; where that fails, say so and go on without."""
    torch._dynamo.config.recompile_limit = 64  # one for each way to call a layer: with a mask, ...
    tokens = torch.zeros(1, 4, dtype=torch.long, device=target.embed.weight.device)
    nodes = torch.eye(4, dtype=torch.bool, device=tokens.device)
    for block in target.blocks:
        block.compile(dynamic=True)
    try:
        with torch.inference_mode():  # as decoding calls it: a prompt, a token, a tree
            cache = target.new_cache(16)
            target(tokens, cache)
            target(tokens[:, :1], cache)
            target(tokens, cache, tokens[0] + 5, nodes)
    except Exception as error:  # no compiler, an unsupported Python: many reasons, one remedy
        torch.compiler.set_stance("force_eager")
        reason = " ".join(str(error).split())[:100]
        print(f"--compile does not work here ({reason}): going on without")


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)"


class Stopwatch:
    """Seconds per phase. On CUDA, where calls return before the work is done, by its events."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.laps = [("start", self.now())]

    def now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, phase: str) -> None:
        self.laps.append((phase, self.now()))

    def seconds(self, last: int | None = None) -> dict[str, float]:
        """Of each phase in all, or in the `last` laps only."""
        if self.cuda:
            torch.cuda.synchronize()
        total = dict.fromkeys(("prefill", "draft", "verify", "other", "callback"), 0.0)
        laps = self.laps if last is None else self.laps[-last - 1 :]
        for (_, begin), (phase, end) in zip(laps, laps[1:]):
            total[phase] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
        return total


@contextmanager
def written_whole(path: Path):
    """`with written_whole(path) as file: ...` writes bytes to `path`, all of them or none.

    They are written beside their place and moved there when complete: neither a full disk nor an
    interrupt can leave half a file, or take away the previous one. Raises UserError if they cannot
    be written.
    """
    scratch = path.with_name(path.name + ".part")
    try:
        with open(scratch, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UserError(
            f"cannot write {path} (is the disk full?): {error}; nothing was changed there"
        ) from error
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    with written_whole(path) as file:
        file.write(json.dumps(value).encode() + b"\n")


def run(main) -> None:
    """Run a script's main(): its exit status is 0, 2 for bad input, 130 if interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a polite kill is an interrupt
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(fail(error))
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{': ' + str(interrupt) if str(interrupt) else ''}", file=sys.stderr)
        sys.exit(130)
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". ")[0]
        sys.exit(fail(f"{reason}: try --device cpu, or less at once (train.py: --batch_tokens)"))
    except BrokenPipeError:  # the reader of our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(fail(error))


def fail(error: Exception | str) -> int:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
