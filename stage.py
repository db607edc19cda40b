"""What any training run needs: a schedule, batches that can be counted again, a log, resuming.

A `Stage` is one thing being trained. Its state is saved every minute and when it is interrupted,
and since batches and schedule are functions of the step alone, the same command goes on exactly
where it stopped. What is trained is none of its business; that is in train.py.
"""

import csv
import ctypes
import math
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from cli import UserError
from model import load_checkpoint, save_checkpoint

# What of a log line is shown; the CSV has all of it.
ON_SCREEN = ("loss", "valid_bits_per_byte", "loss_sup", "share_found", "gradient_ratio")
ON_SCREEN += ("tau_estimate",)
LOG_LINES = 30  # of each stage
SAVE_SECONDS = 60  # how much work a crash can cost; an interrupt costs none


class Autocast:
    """`with autocast(): ...` computes in `dtype` what can be, where that is not float32 anyway."""

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self.device, self.dtype = device, dtype

    def __call__(self):
        low = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if low else nullcontext()


def check_same(path: Path, old: dict, new: dict) -> None:
    """Refuse to go on with what was trained in another way: UserError, naming the difference."""
    for name in new:
        if old.get(name) != new[name]:
            raise UserError(
                f"{path} was trained with {name} {old.get(name)}, now it is {new[name]}: "
                f"use the old value, another --out_dir, or remove the file"
            )


class Stage:
    """What training the target and training a head share: the schedule, the log, and resuming.

    `parts` are the modules and optimisers that make up the state. It is saved every minute and
    when interrupted, to NAME.progress.pt, which goes away when the stage is complete. `earlier`:
    log lines of training that this one goes on from.
    """

    def __init__(
        self, folder: Path, name: str, steps: int, settings: dict, parts: dict, earlier=()
    ):
        self.path, self.log_path = folder / f"{name}.progress.pt", folder / f"{name}.csv"
        self.name, self.steps, self.settings, self.parts = name, steps, settings, parts
        self.step, self.seconds, self.rows, self.interrupted = 0, 0.0, list(earlier), False
        self.before = earlier[-1] if earlier else {"step": 0, "tokens": 0, "seconds": 0.0}
        self.best, self.best_step, self.score = None, None, -math.inf
        if self.path.is_file():
            saved = load_checkpoint(self.path, "training in progress")
            check_same(self.path, saved["settings"], settings)
            for key, part in parts.items():
                part.load_state_dict(saved["parts"][key])
            self.step, self.seconds, self.rows = saved["step"], saved["seconds"], saved["rows"]
            self.best, self.best_step = saved["best"], saved["best_step"]
            self.score = saved["score"]
            print(f"{name}: going on at step {self.step} of {steps}")
        self.start_step = self.step
        self.begun = self.saved = time.monotonic()

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.begun

    def save(self) -> None:
        checkpoint = {
            "kind": "training in progress",
            "settings": self.settings,
            "parts": {key: part.state_dict() for key, part in self.parts.items()},
            "step": self.step,
            "seconds": self.elapsed(),
            "rows": self.rows,
            "best": self.best,
            "best_step": self.best_step,
            "score": self.score,
        }
        save_checkpoint(self.path, checkpoint)
        self.saved = time.monotonic()

    def __iter__(self):
        """Step numbers, from where training stands to the end.

        An interrupt is honoured between two steps, never inside one, so that what is saved is
        what an undisturbed run would have had there. Raises KeyboardInterrupt then.
        """

        def stop(number: int, frame) -> None:
            if self.interrupted:  # asked twice: now, at the cost of what the last minute taught
                raise KeyboardInterrupt
            self.interrupted = True

        signals = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(s, stop) for s in signals]
        try:
            while self.step < self.steps:
                yield self.step
                self.step += 1
                if self.interrupted:
                    self.save()
                    self.heed()
                if time.monotonic() - self.saved > SAVE_SECONDS or self.step == self.steps:
                    self.save()  # at the end too: what follows can still be interrupted
        finally:
            for number, handler in zip(signals, previous):
                signal.signal(number, handler)

    def heed(self) -> None:
        """Stop if that is wanted. For parts of a long step too, before which the state was saved."""
        if self.interrupted:
            raise KeyboardInterrupt(
                f"{self.name} stands at step {self.step} of {self.steps}; "
                f"the same command goes on from there"
            )

    def keep_if_best(self, score: float, module: nn.Module, step: int | None = None) -> None:
        """`step`: how many this module has been through, where that is not all up to now."""
        if score > self.score:
            self.score, self.best_step = score, self.step + 1 if step is None else step
            self.best = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}

    def log(self, tokens_per_step: int, **values) -> None:
        """Print one line, and rewrite the CSV (a row a log line; empty where not measured)."""
        done = self.step + 1 - self.start_step
        left = (time.monotonic() - self.begun) / done * (self.steps - self.step - 1)
        speed = done * tokens_per_step / (time.monotonic() - self.begun)
        shown = "  ".join(f"{key} {values[key]:.4g}" for key in ON_SCREEN if key in values)
        print(
            f"{self.name:12} {self.step + 1:5d}/{self.steps}  {shown}  "
            f"{speed:,.0f} tokens/s  {left / 60:.1f} min left",
            flush=True,
        )
        here = {"step": self.step + 1, "tokens": (self.step + 1) * tokens_per_step}
        here["seconds"] = round(self.elapsed(), 1)
        place = {key: self.before[key] + value for key, value in here.items()}
        self.rows.append(place | values)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with open(self.log_path, "w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up over 2 %, then constant, then to 0 over 40 %."""
    warm, cool = max(1, steps // 50), max(1, int(0.4 * steps))
    return min(1.0, (step + 1) / warm, (steps - step) / cool)


def batch_indices(count: int, per_step: int, step: int, seed: int) -> Tensor:
    """Which windows make up a step: every window once an epoch, in an order of the seed's.

    A function of the step alone, so that resuming needs no state, and whatever else draws random
    numbers (a discriminator, say) cannot change which batches a head sees.
    """
    first = step * per_step
    picks = []
    for epoch in range(first // count, (first + per_step - 1) // count + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        picks.append(order[max(0, first - epoch * count) : first + per_step - epoch * count])
    return torch.cat(picks)


def glibc():
    """The C library, where it is glibc: on Linux."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Ask glibc to keep freed memory: a step frees and takes the same gigabyte again.

    Handed back to the system and cleared by it each time, it cost 10 % of the training time on two
    cores. Elsewhere than on Linux there is nothing to do.
    """
    if libc := glibc():
        # M_MMAP_THRESHOLD: take large blocks from the heap as well, but not the largest: of ever
        # new sizes they leave gaps in it, until 24 GB are full. Old versions refuse more than 32 MB.
        libc.mallopt(-3, 34 << 20) or libc.mallopt(-3, 32 << 20)
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: and never shrink it


def hand_back_gaps() -> None:
    """Give back what lies unused between blocks in use: where each batch has as many rows as it has
    tokens to learn, no block has the size of the last one, and gaps grow to gigabytes."""
    if libc := glibc():
        libc.malloc_trim(0)


def is_due(step: int, steps: int, times: int) -> bool:
    """Whether this is one of about `times` evenly spaced steps; the last one always is."""
    return (step + 1) % max(1, steps // times) == 0 or step + 1 == steps
