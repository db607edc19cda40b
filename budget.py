"""From minutes to amounts: how much a target is to write, and how long each head is to train.

`--minutes` is what a user knows; tokens and steps follow from how fast this machine is. They are
measured once and kept in budget.json, so that the same command, given again, goes on with the same
amounts. Heads of one kind get the same number of tokens, else comparing them would mean nothing:
the time is shared out between the kinds, and a head of two layers just takes longer.

With `--more` a round follows when the last one is complete: as many minutes again, in which the
target writes more and the heads go on learning, from the old text and the new. A head that comes
later goes through all rounds, one after the other, and has then learnt from as many tokens.
"""

import json
import statistics
import time
from collections.abc import Callable
from itertools import product
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
        if tokens and any(self.config.of_head(kind).head_data == "self" for kind in shared_out):
            return True  # heads have begun to learn from what there is
        return seconds >= 60 * WRITING * sum(r["minutes"] for r in self.rounds)

    def share_out(self, names: list[str], measure: Callable[[str], Seconds]) -> None:
        """Decide how many tokens the heads of each kind learn from, in each round where it is not
        decided yet."""
        for kind, share in KINDS.items():
            members = [name for name in names if name.startswith(kind)]
            undecided = [entry for entry in self.rounds if members and kind not in entry["tokens"]]
            costs = [measure(name) for name in members] if undecided else []
            for entry in undecided:
                left = 60 * entry["minutes"] * TRAINING * share - sum(c.once for c in costs)
                steps = max(10, int(left / sum(c.step for c in costs)))
                tokens = steps * self.config.of_head(kind).head_tokens_per_step
                entry["tokens"][kind] = tokens
                print(f"{' and '.join(members)}: {steps} steps, {tokens:,} tokens each")
                self.save()

    def head_tokens(self, name: str, number: int = 1) -> int:
        """How many tokens the head of this name trains on in the round of this number, from 1."""
        if self.config.minutes is None:
            return self.config.head_tokens
        return self.rounds[number - 1]["tokens"][name.split("-")[0]]


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

    step, once = 0.0, 0.0
    join = config.supervised_share if training.weight > 0 else 1.0
    for joint, own in product((False, True), repeat=2):  # the sorts of steps there are
        begin = max(join if joint else 0.0, config.own_from if own else 0.0)
        end = min(1.0 if joint else join, 1.0 if own else config.own_from)
        if end > begin:
            own_steps = config.own_steps if own else 1
            step += (end - begin) * timed(training.step, batch, joint, own_steps, 0.0)
    if training.discriminator is not None:
        once += config.discriminator_steps * timed(training.discriminator_alone, batch)
    training.head.eval()
    return Seconds(step, once + timed(evaluate, training.head, repeats=1))
