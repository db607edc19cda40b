"""From minutes to amounts: how much a target is to write, and how long each head is to train.

`--minutes` is what a user knows; tokens and steps follow from how fast this machine is. They are
measured once and kept in budget.json, so that the same command, given again, goes on with the same
amounts. Heads of one kind get the same number of tokens, else comparing them would mean nothing:
the time is shared out between the kinds, and a head of two layers just takes longer.

With `--more` a round follows when the last one is complete: as many minutes again, in which the
target writes more and the heads go on learning, from the old text and the new.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from cli import UserError, write_json
from recipe import TrainConfig

WRITING, TRAINING = 0.35, 0.55  # shares of the time; the rest is for loading, measuring, tables
KINDS = {"medusa": 0.2, "eagle": 0.8}  # shares of the training time


class Seconds(NamedTuple):
    """What training a head costs: of each step, and once."""

    step: float
    once: float


class Budget:
    """The rounds of a run, in budget.json: the minutes of each, and the tokens of each kind."""

    def __init__(self, config: TrainConfig, complete: Callable[[int], bool]):
        """`complete(n)`: whether all heads in question have been through n rounds."""
        self.config, self.path = config, config.folder / "budget.json"
        self.rounds = []
        if config.minutes is None:
            return
        if self.path.is_file():
            try:
                self.rounds = json.loads(self.path.read_text())["rounds"]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self.path} is damaged: remove it and the heads") from error
        if not self.rounds or config.more and complete(len(self.rounds)):
            self.rounds.append({"minutes": config.minutes, "tokens": {}})
            self.save()

    def save(self) -> None:
        write_json(self.path, {"rounds": self.rounds})

    @property
    def round(self) -> int:
        """The number of the last round, from 1."""
        return max(1, len(self.rounds))

    def enough(self, tokens: int, seconds: float) -> bool:
        """Whether the target has written enough, so many tokens in so much time."""
        if self.config.minutes is None:
            return tokens >= self.config.written_tokens
        shared_out = self.rounds[-1]["tokens"]
        if any(self.config.of_head(kind).head_data == "self" for kind in shared_out):
            return True  # heads have begun to learn from what there is
        return seconds >= 60 * WRITING * sum(r["minutes"] for r in self.rounds)

    def share_out(self, names: list[str], measure: Callable[[str], Seconds]) -> None:
        """Decide how many tokens the heads of each kind learn from, unless it is decided."""
        if self.config.minutes is None:
            return
        tokens = self.rounds[-1]["tokens"]
        for kind, share in KINDS.items():
            members = [name for name in names if name.startswith(kind)]
            if kind in tokens or not members:
                continue
            costs = [measure(name) for name in members]
            left = 60 * self.rounds[-1]["minutes"] * TRAINING * share - sum(c.once for c in costs)
            steps = max(10, int(left / sum(c.step for c in costs)))
            tokens[kind] = steps * self.config.of_head(kind).head_tokens_per_step
            print(f"{' and '.join(members)}: {steps} steps, {tokens[kind]:,} tokens each")
            self.save()

    def head_tokens(self, name: str) -> int:
        """How many tokens the head of this name trains on in this round."""
        if self.config.minutes is None:
            return self.config.head_tokens
        return self.rounds[-1]["tokens"][name.split("-")[0]]


def step_seconds(training, train, evaluate: Callable) -> Seconds:
    """What a `HeadTraining` costs here, by a few steps of each sort; it is of no use after.

    `evaluate(head)` is what is done now and then beside the steps.
    """
    config = training.config
    training.start(train)
    index = torch.arange(config.head_windows_per_step) % len(train.windows)
    batch = training.lesson(train.batch(index))

    def timed(job, *arguments, repeats: int = 4) -> float:
        samples = []
        for _ in range(repeats):
            begin = time.perf_counter()
            job(*arguments)
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples[1:] or samples)

    early = timed(training.step, batch, False, 1, 0.0)
    late = timed(training.step, batch, training.weight > 0, config.own_steps, 0.0)
    step, once = config.own_from * early + (1 - config.own_from) * late, 0.0
    if training.discriminator is not None:
        once += config.discriminator_steps * timed(training.discriminator_alone, batch)
    training.head.eval()
    return Seconds(step, once + timed(evaluate, training.head, repeats=1))
