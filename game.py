"""The game: the losses of a head on one batch, the discriminator's side of them, and one step.

    D     one step on L_D                              the head held fixed
    head  one step on L_G = L_sup + lambda * L_adv     D held fixed

When which of these is played, for how long, and what is kept in the end, is in train.py.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from discriminator import Discriminator, adversarial_loss, discriminator_loss, exact_logits, health
from draft_head import Batch, Guess, HeadConfig, build_head
from features import spread
from recipe import TrainConfig


class ByRows(torch.autograd.Function):
    """The mean of a loss over N rows, reckoned with its gradient for some rows at a time.

    The logits of 3,072 tokens over a vocabulary of 8,192 are 100 MB, and a loss makes a dozen
    tensors of that size from them. Pieces of 8 MB take a tenth of the memory, and on two cores half
    the time of EAGLE's losses. (Fused losses for GPUs do the same: Liger Kernel, 2410.10989; Cut
    Your Losses, 2411.09009.)
    """

    @staticmethod
    def forward(ctx, loss: Callable, at_once: int, count: int, *inputs: Tensor) -> Tensor:
        """loss(*inputs) is a mean over rows. The first `count` inputs are rows (N, ..), N > 0, to be
        cut into pieces of `at_once`; the others are given to each piece whole."""
        needs = ctx.needs_input_grad[3:]
        grads = [
            torch.zeros_like(x, dtype=torch.float32) if n else None for x, n in zip(inputs, needs)
        ]
        total, size = 0.0, len(inputs[0])
        for start in range(0, size, at_once):
            here = slice(start, start + at_once)
            piece = [x[here] if i < count else x for i, x in enumerate(inputs)]
            piece = [x.detach().requires_grad_(n) for x, n in zip(piece, needs)]
            with torch.enable_grad():
                value = loss(*piece) * (len(piece[0]) / size)
            total = total + value.detach()
            if not any(needs):
                continue
            found = iter(torch.autograd.grad(value, [x for x, n in zip(piece, needs) if n]))
            for i, grad in enumerate(grads):
                if grad is not None:
                    (grad[here] if i < count else grad).add_(next(found))
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        return None, None, None, *(g if g is None else g * scale for g in ctx.saved_tensors)


class Game:
    """The losses of a head on one batch, and the discriminator's side of them."""

    def __init__(self, target, head, discriminator: Discriminator | None, dtype=None):
        """`discriminator=None`: where an adversary is called for, the closed form p / (p + q).

        `dtype`: of the large products, that of autocast; None: as the weights are.
        """
        self.head, self.discriminator = head, discriminator
        self.lm_head = head.vocabulary.rows(target.lm_head.weight.detach()).to(dtype)  # (S, D)
        few = 2**21 if self.lm_head.device.type == "cpu" else 2**27  # logits: 8 MB, or 512
        self.at_once = max(32, few // len(self.lm_head))

    def positions(self, guess: Guess, batch: Batch):
        """Of each draft position i = 1..P: i - 1, its weight, and what its losses are made of.

        These are N rows each: the guessed state, the states `before`, that it was guessed from, and
        `after`, i places on, that p comes from, and the place of the text's own token; and the map
        from guessed states to logits.
        """
        for i, (state, to_logits) in enumerate(zip(guess.states, guess.maps), start=1):
            before = batch.rows(batch.hidden[:, :-i], i)  # (N, D)
            after = batch.rows(batch.hidden[:, i:], i)  # (N, D)
            tokens = self.head.vocabulary.places(batch.rows(batch.tokens[:, i + 1 :], i))  # (N,)
            rows = state, before, after, tokens
            yield i - 1, self.head.position_weights[i - 1], rows, to_logits.to(self.lm_head.dtype)

    @torch.no_grad()
    def law(self, after: Tensor) -> Tensor:
        """p (N, S) of the target's states (N, D), over what the head knows."""
        return F.linear(after, self.lm_head).float().softmax(-1)

    @torch.no_grad()
    def judgement(self, position: int, before: Tensor, after: Tensor, p: Tensor, q: Tensor):
        """D's logits (N, S), held fixed."""
        if self.discriminator is None:
            return exact_logits(p, q)
        return self.discriminator(before, after, position).float()

    def by_rows(self, loss: Callable, rows: tuple, to_logits: Tensor) -> Tensor:
        return ByRows.apply(loss, self.at_once, len(rows), *rows, to_logits)

    def head_loss(self, guess: Guess, batch: Batch, supervised=1.0, adversarial=0.0) -> Tensor:
        """supervised * L_sup + adversarial * L_adv, each the weighted sum over draft positions."""
        total = 0.0
        for position, weight, rows, to_logits in self.positions(guess, batch):
            loss = partial(self.head_loss_of, position, supervised, adversarial)
            total = total + weight * self.by_rows(loss, rows, to_logits)
        return total

    def head_loss_of(
        self, position, supervised, adversarial, state, before, after, tokens, to_logits
    ):
        """The same at one draft position, for some of its rows."""
        logits = F.linear(state, to_logits).float()
        p = self.law(after) if self.head.learns_law or adversarial else None
        label = p if self.head.learns_law else tokens
        loss = supervised * self.head.supervised_loss(logits, label, state, after)
        if adversarial:
            q = logits.softmax(-1)
            judged = self.judgement(position, before, after, p, q)
            loss = loss + adversarial * adversarial_loss(judged, q)
        return loss

    def discriminator_loss(self, guess: Guess, batch: Batch) -> Tensor:
        """L_D, the weighted sum over draft positions, the head held fixed."""
        total = 0.0
        for position, weight, rows, to_logits in self.positions(guess.detach(), batch):
            state, before, after, _ = rows
            context = self.discriminator.context(before, after, position)  # (N, D + 1)
            rows = context, state, after
            total = total + weight * self.by_rows(self.discriminator_loss_of, rows, to_logits)
        return total

    def discriminator_loss_of(self, context, state, after, to_logits):
        """The same at one draft position, for some of its rows."""
        q = F.linear(state, to_logits).float().softmax(-1)
        return discriminator_loss(self.discriminator.score(context).float(), self.law(after), q)

    @torch.no_grad()
    def health(self, guess: Guess, batch: Batch) -> dict[str, float]:
        """D's figures, the mean over draft positions, each of about a thousand rows at most."""
        each = []
        for position, _, rows, to_logits in self.positions(guess, batch):
            state, before, after, _ = (values[:: -(-len(values) // 1024)] for values in rows)
            p, q = self.law(after), F.linear(state, to_logits).float().softmax(-1)
            each.append(health(self.judgement(position, before, after, p, q), p, q))
        return {key: sum(one[key] for one in each) / len(each) for key in each[0]}


def gradient_ratio(head, supervised: Tensor, adversarial: Tensor, weight: float) -> float:
    """||lambda grad L_adv|| / ||grad L_sup|| over the head's parameters; keeps both graphs."""
    parameters = [p for p in head.parameters() if p.requires_grad]

    def norm(loss: Tensor) -> float:
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))

    return weight * norm(adversarial) / max(norm(supervised), 1e-12)


class HeadTraining:
    """A head, its discriminator if it has one, and what one step does to either."""

    def __init__(self, config: TrainConfig, name: str, target, autocast):
        self.config, self.name, self.target, self.autocast = config, name, target, autocast
        layers, self.weight = config.layers_and_weight(name)
        torch.manual_seed(config.seed)
        shape = HeadConfig(name.split("-")[0], layers, draft_vocab=config.head_vocab(target))
        self.head = build_head(shape, target)
        discriminator = None
        if self.weight > 0 and config.discriminator == "learnt":
            positions = self.head.max_draft or config.own_steps
            rows = self.head.vocabulary.rows(target.lm_head.weight)
            discriminator = Discriminator(rows, positions).to(rows.device)
            self.d_optimizer = torch.optim.Adam(
                discriminator.parameters(), lr=config.discriminator_lr, betas=(0.5, 0.9)
            )
        self.discriminator = discriminator
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(), lr=config.head_lr, betas=(0.9, 0.95), fused=True
        )

    def parts(self) -> dict:
        """Of the state of training."""
        parts = {"head": self.head, "optimizer": self.optimizer}
        if self.discriminator is not None:
            parts |= {"discriminator": self.discriminator, "d_optimizer": self.d_optimizer}
        return parts

    def start(self, train) -> None:
        """Before the first step: which tokens the head can guess, and its start in closed form."""
        self.head.vocabulary.choose(train.counts().to(self.target.embed.weight.device))
        self.ready()
        sample = spread(torch.arange(len(train.windows)), 32 * 512 // self.config.head_window)
        self.head.prepare(self.target, self.known(train.batch(sample)))

    def ready(self) -> None:
        """Once the head's vocabulary is settled."""
        self.game = Game(self.target, self.head, self.discriminator, self.autocast.dtype)
        if self.discriminator is not None:
            self.discriminator.judge_by(self.game.lm_head)
        self.head.train()

    def known(self, batch: Batch) -> Batch:
        """The batch without what the head has no token for: there is no right guess there."""
        return batch._replace(learn=batch.learn & (self.head.vocabulary.places(batch.tokens) >= 0))

    def discriminator_step(self, batch: Batch, guess: Guess) -> None:
        self.d_optimizer.zero_grad()
        with self.autocast():
            loss = self.game.discriminator_loss(guess, batch)
        loss.backward()
        self.d_optimizer.step()

    def teaches(self, batch: Batch, own_steps: int) -> bool:
        """Whether there is a token to learn at every draft position: else a mean is no number."""
        positions = self.head.max_draft or own_steps
        return batch.learn[:, 1 + positions :].any().item()

    def discriminator_alone(self, batch: Batch) -> None:
        if not self.teaches(batch, self.config.own_steps):
            return
        with torch.no_grad(), self.autocast():
            guess = self.head(batch, self.config.own_steps)
        self.discriminator_step(batch, guess)

    def step(self, batch: Batch, joint: bool, own_steps: int, rate=1.0, log=False) -> dict:
        """One step of the head, and in the joint part one of D before it. Figures if `log`.

        `own_steps`: draft positions that EAGLE learns from. `rate`: of the peak learning rate.
        """
        if not self.teaches(batch, own_steps):
            return {}
        with self.autocast():
            guess = self.head(batch, own_steps)
        if joint and self.discriminator is not None:
            self.discriminator_step(batch, guess)
        values, weight = {}, self.weight if joint else 0.0
        with self.autocast():
            if log:  # each loss on its own
                loss = self.game.head_loss(guess, batch)
                values["loss_sup"] = loss.item()
            if log and joint:
                adversarial = self.game.head_loss(guess, batch, 0.0, 1.0)
                values["loss_adv"] = adversarial.item()
                values["gradient_ratio"] = gradient_ratio(self.head, loss, adversarial, weight)
                values |= self.game.health(guess, batch)
                loss = loss + weight * adversarial
            if not log:
                loss = self.game.head_loss(guess, batch, 1.0, weight)
        self.optimizer.param_groups[0]["lr"] = self.config.head_lr * rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        return values
