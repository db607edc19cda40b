"""One head in training: the head, its discriminator, their optimizers, and one step of each.

The losses are in game.py, for a judge of runs in window.py; when which step is made, for how long,
and what is kept in the end, is in train.py.
"""

import math

import torch
from torch import Tensor, nn

from cli import UserError
from discriminator import Discriminator
from draft_head import Batch, Guess, HeadConfig, build_head
from features import spread
from game import Game
from recipe import TrainConfig
from window import WindowDiscriminator, WindowGame

# --discriminator -> the game, and who judges in it.
JUDGES = {
    "learnt": (Game, Discriminator),
    "exact": (Game, None),
    "window": (WindowGame, WindowDiscriminator),
}


def gradient_ratio(head, supervised: Tensor, adversarial: Tensor, weight: float) -> float:
    """||lambda grad L_adv|| / ||grad L_sup|| over the head's parameters; keeps both graphs."""
    parameters = [w for w in head.parameters() if w.requires_grad]

    def norm(loss: Tensor) -> float:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))

    return weight * norm(adversarial) / max(norm(supervised), 1e-12)


class HeadTraining:
    """A head and its discriminator, if it has one, with their optimizers and their steps."""

    def __init__(self, config: TrainConfig, name: str, target, autocast):
        self.config, self.name, self.target, self.autocast = config, name, target, autocast
        layers, self.weight = config.layers_and_weight(name)
        torch.manual_seed(config.seed)
        kind, vocab = name.split("-")[0], config.head_vocab(target)
        shape = HeadConfig(kind, layers, draft_vocab=vocab, mlp_width=config.head_mlp_width)
        self.head = build_head(shape, target)
        play = config.discriminator if self.weight > 0 else "exact"  # which has nothing to train
        self.game_of, judge_of = JUDGES[play]
        if play == "window" and not self.head.autoregressive:
            raise UserError(f"--discriminator window needs a head with guesses of its own: {name}")
        self.discriminator = None
        if judge_of is not None:
            rows = self.head.vocabulary.rows(target.lm_head.weight)
            self.discriminator = judge_of(rows, self.positions(config.own_steps)).to(rows.device)
            self.d_optimizer = torch.optim.Adam(
                self.discriminator.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.9)
            )
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.head_lr, betas=(0.9, 0.95), fused=True
        )

    def positions(self, own_steps: int) -> int:
        """P, the draft positions that are learnt from a batch."""
        return self.head.max_draft or own_steps

    def parts(self) -> dict:
        """What the state of training consists of, for a checkpoint."""
        parts = {"head": self.head, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts |= {"discriminator": self.discriminator, "d_optimizer": self.d_optimizer}
        return parts

    def start(self, train) -> None:
        """Before the first step: which tokens the head can guess, and its start in closed form."""
        self.head.vocabulary.choose(train.counts().to(self.target.embed.weight.device))
        self.ready()
        count = 2**14 // self.config.head_window  # windows; tokens enough for a thousand unknowns
        sample = spread(torch.arange(len(train.windows)), count)
        self.head.prepare(self.target, self.lesson(train.batch(sample)))

    def ready(self) -> None:
        """After `start`, or once a head that goes on training has its weights."""
        how = self.autocast.dtype, self.config.supervised == "lk", self.config.feature_weight
        self.game = self.game_of(self.target, self.head, self.discriminator, *how)
        if self.discriminator is not None:
            self.discriminator.judge_by(self.game.lm_head)
        self.head.train()

    def lesson(self, batch: Batch) -> Batch:
        """The batch with what the head is to learn of it marked.

        Who learns p learns from every token: p teaches the target's language also where someone
        else speaks. Who learns tokens takes the target's own. And what the head has no token for,
        it cannot learn.
        """
        learn = batch.learn
        if self.game.label_is_law:
            learn = torch.ones_like(learn)
        return batch._replace(learn=learn & (self.head.vocabulary.places(batch.tokens) >= 0))

    def discriminator_step(self, batch: Batch, guess: Guess, rate: float = 1.0) -> None:
        """One step of the discriminator on this guess, at this share of its learning rate."""
        self.d_optimizer.param_groups[0]["lr"] = self.config.discriminator_lr * rate
        self.d_optimizer.zero_grad()
        with self.autocast():
            loss = self.game.discriminator_loss(guess, batch)
        loss.backward()
        self.d_optimizer.step()

    def teaches(self, batch: Batch, own_steps: int) -> bool:
        """Whether there is a run of tokens to be learnt, as many as there are draft positions: then
        each position has a row, and a judge of runs has a run."""
        runs = batch.learn[:, 2:].unfold(1, self.positions(own_steps), 1)  # (B, T - P, P)
        return runs.all(-1).any().item()

    def discriminator_alone(self, batch: Batch) -> None:
        """One step of the discriminator, before the head plays."""
        if not self.teaches(batch, self.config.own_steps):
            return
        with torch.no_grad(), self.autocast():
            guess = self.head(batch, self.config.own_steps)
        self.discriminator_step(batch, guess)

    def step(self, batch: Batch, joint: bool, own_steps: int, rate=1.0, log=False) -> dict:
        """One step of the head; in the joint part one of D before it. Figures if `log`.

        `batch` is a `lesson`. `joint`: whether L_adv is played yet. `own_steps`: draft positions
        that EAGLE learns from by now. `rate`: of both peak learning rates; beside a head that hardly
        moves any more, a D that still leaps forgets what it knew (LOG.md).
        """
        if not self.teaches(batch, own_steps):
            return {}
        with self.autocast():
            guess = self.head(batch, own_steps)
        if joint and self.discriminator is not None:
            self.discriminator_step(batch, guess, rate)
        values, weight = {}, self.weight if joint else 0.0
        with self.autocast():
            if log:  # the same gradient in two parts, to tell one from the other
                loss = self.game.head_loss(guess, batch)
                values["loss_sup"] = loss.item()
                if joint:
                    adversarial = self.game.head_loss(guess, batch, 0.0, 1.0)
                    values["loss_adv"] = adversarial.item()
                    values["gradient_ratio"] = gradient_ratio(self.head, loss, adversarial, weight)
                    values |= self.game.health(guess, batch)
                    loss = loss + weight * adversarial
            else:
                loss = self.game.head_loss(guess, batch, 1.0, weight)
        self.optimizer.param_groups[0]["lr"] = self.config.head_lr * rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        return values
