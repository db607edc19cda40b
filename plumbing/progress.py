"""A training loop that can be interrupted: schedule, batches that can be counted again, a log.

The state is saved every minute and at an interrupt. Batches and schedule are functions of the step
alone, so the same command goes on exactly where it stopped. Nothing here knows what is trained.
"""

import csv
import math
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from plumbing.cli import UserError
from plumbing.files import as_other_version, load_checkpoint, save_checkpoint

# The columns of the log that are printed; the CSV has all of them.
ON_SCREEN = ("loss", "valid_bits_per_byte", "loss_sup", "share_found", "gradient_ratio")
ON_SCREEN += ("tau_estimate",)
LOG_LINES = 30  # of each training
LINE_SECONDS = 2  # between two lines on the screen, so that a short training has few
FORECAST_SECONDS = 5  # after which a training says how long it will take
SAVE_SECONDS = 60  # how much work a crash can cost; an interrupt costs none
KIND, EDITION = "training in progress", 2  # settings had other names in the first edition
STATE = ("step", "seconds", "rows", "best", "best_step", "score")


def check_same(path: Path, old: dict, new: dict) -> None:
    """Refuse to go on with a file that was made with other settings: UserError, naming one."""
    for name in new:
        if old.get(name) != new[name]:
            raise UserError(
                f"{path} was trained with {name} {old.get(name)}, now it is {new[name]}: "
                f"use the old value, another --out_dir, or remove the file"
            )


class Progress:
    """The steps of one training, its log, its best weights, and its state on disk.

    `parts` are the modules and optimizers that make up the state. It is saved to NAME.progress.pt,
    which goes away when the training is complete.
    """

    def __init__(self, folder: Path, name: str, steps: int, settings: dict, parts: dict):
        """Raises UserError where the state on disk was made with other settings."""
        self.path, self.log_path = folder / f"{name}.progress.pt", folder / f"{name}.csv"
        self.name, self.steps, self.settings, self.parts = name, steps, settings, parts
        self.step, self.seconds, self.rows, self.interrupted = 0, 0.0, [], False
        self.best, self.best_step, self.score = None, None, -math.inf
        if self.path.is_file():
            self.load()
        self.start_step = self.step
        self.begun = self.saved = time.monotonic()
        self.shown, self.foretold = -math.inf, False

    def load(self) -> None:
        saved = load_checkpoint(self.path, KIND)
        if saved.get("edition") != EDITION:
            raise UserError(
                f"{self.path} is unfinished training of the first edition: "
                f"finish it at commit 70beb28, or remove it"
            )
        with as_other_version(self.path):
            check_same(self.path, saved["settings"], self.settings)
            for key, part in self.parts.items():
                part.load_state_dict(saved["parts"][key])
            for key in STATE:
                setattr(self, key, saved[key])
        print(f"{self.name}: going on at step {self.step} of {self.steps}")

    def elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.begun

    def save(self) -> None:
        parts = {key: part.state_dict() for key, part in self.parts.items()}
        state = {key: getattr(self, key) for key in STATE} | {"seconds": self.elapsed()}
        about = {"kind": KIND, "edition": EDITION, "settings": self.settings, "parts": parts}
        save_checkpoint(self.path, about | state)
        self.saved = time.monotonic()

    def __iter__(self):
        """Step numbers, from where training stands to the end.

        An interrupt is honoured between two steps, never inside one, so that the saved state is
        that of an undisturbed run. Raises KeyboardInterrupt then.
        """

        def stop(number: int, frame) -> None:
            if self.interrupted:  # asked twice: now, at the cost of the last minute
                raise KeyboardInterrupt
            self.interrupted = True

        signals = (signal.SIGINT, signal.SIGTERM)
        previous = [signal.signal(s, stop) for s in signals]
        try:
            while self.step < self.steps:
                yield self.step
                self.step += 1
                self.foretell()
                if self.interrupted:
                    self.save()
                    self.raise_if_interrupted()
                if time.monotonic() - self.saved > SAVE_SECONDS or self.step == self.steps:
                    self.save()  # at the end too: the evaluation that follows can be interrupted
        finally:
            for number, handler in zip(signals, previous):
                signal.signal(number, handler)

    def foretell(self) -> None:
        """Say once, early in a long training, how long it will take."""
        seconds = time.monotonic() - self.begun
        if seconds > FORECAST_SECONDS and not self.foretold and self.step > self.start_step + 1:
            self.foretold = True
            left = seconds / (self.step - self.start_step) * (self.steps - self.step) / 60
            if left > 0.5 and self.shown < 0:
                print(f"{self.name}: about {left:.0f} min", flush=True)

    def raise_if_interrupted(self) -> None:
        """Raise if an interrupt is pending. Also called inside long steps, after a `save`."""
        if self.interrupted:
            raise KeyboardInterrupt(
                f"{self.name} stands at step {self.step} of {self.steps}; "
                f"the same command goes on from there"
            )

    def keep_if_best(self, score: float, module: nn.Module, step: int | None = None) -> None:
        """Keep a copy of the module's weights if `score` is the highest so far.

        `step`: how many steps these weights have been through; default: all up to now.
        """
        if score > self.score:
            self.score, self.best_step = score, self.step + 1 if step is None else step
            self.best = {k: v.detach().cpu().clone() for k, v in module.state_dict().items()}

    def log(self, tokens_per_step: int, **values) -> None:
        """Print one line, and rewrite the CSV (a row a log line; empty where not measured)."""
        done, seconds = self.step + 1 - self.start_step, time.monotonic() - self.begun
        left = seconds / done * (self.steps - self.step - 1) / 60
        shown = "  ".join(f"{key} {values[key]:.4g}" for key in ON_SCREEN if key in values)
        if seconds - self.shown > LINE_SECONDS or self.step + 1 == self.steps:
            self.shown = seconds
            print(
                f"{self.name:12} {self.step + 1:5d}/{self.steps}  {shown}  "
                f"{done * tokens_per_step / seconds:,.0f} tokens/s  {left:.1f} min left",
                flush=True,
            )
        here = {"step": self.step + 1, "tokens": (self.step + 1) * tokens_per_step}
        self.rows.append(here | {"seconds": round(self.elapsed(), 1)} | values)
        columns = list(dict.fromkeys(key for row in self.rows for key in row))
        with open(self.log_path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: warm-up over 2 %, then constant, then to 0 over 40 %."""
    warm, cool = max(1, steps // 50), max(1, int(0.4 * steps))
    return min(1.0, (step + 1) / warm, (steps - step) / cool)


def dose(joint_from: int, steps: int) -> dict:
    """How much D had to say: the head's joint steps, their share of the sum of learning rates."""
    rates = [schedule(step, steps) for step in range(steps)]
    return {"steps": steps - joint_from, "share": sum(rates[joint_from:]) / sum(rates)}


def batch_indices(count: int, per_step: int, step: int, seed: int) -> Tensor:
    """The windows that make up a step: every window once an epoch, in an order of the seed's.

    A function of the step alone, so that resuming needs no state, and no other random numbers (a
    discriminator's, say) can change which batches a head sees.
    """
    first = step * per_step
    picks = []
    for epoch in range(first // count, (first + per_step - 1) // count + 1):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(count, generator=generator)
        picks.append(order[max(0, first - epoch * count) : first + per_step - epoch * count])
    return torch.cat(picks)


def is_due(step: int, steps: int, times: int) -> bool:
    """Whether this is one of about `times` evenly spaced steps; the last one always is."""
    return (step + 1) % max(1, steps // times) == 0 or step + 1 == steps
