"""The game: both losses of one batch, the head's and the discriminator's, and one step of either.

    D     one step on L_D                              the head held fixed
    head  one step on L_G = L_sup + lambda * L_adv     D held fixed

L_D and L_adv are in discriminator.py, L_sup in draft_head.py, each for one draft position; here they
are summed over the positions, whose weights fall. When which step is made, for how long, and what
is kept in the end, is in train.py. In shapes, N is the number of rows: the places of a batch where
one draft position is to be learnt. S is the number of tokens that the head can guess.
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
    """The mean of a loss over N rows, computed together with its gradient, a few rows at a time.

    The logits of 3,072 tokens over a vocabulary of 8,192 are 100 MB, and a loss makes a dozen
    tensors of that size from them. Here `forward` cuts the rows into pieces, takes each piece's loss
    and gradient, and lets its tensors go; all that is left for `backward` is to scale the gradient.
    Pieces of 8 MB need a tenth of the memory and halve the time of EAGLE's losses on two cores.
    (Fused losses for GPUs do the same: Liger Kernel, 2410.10989; Cut Your Losses, 2411.09009.)
    """

    @staticmethod
    def forward(ctx, loss: Callable, size: int, count: int, *inputs: Tensor) -> Tensor:
        """loss(*inputs) -> (), a mean over rows. Only `inputs` get a gradient.

        The first `count` of them are rows (N, ..), N > 0, and are cut into pieces of `size`; the
        others are given to each piece whole.
        """
        needs = ctx.needs_input_grad[3:]
        grads = [
            torch.zeros_like(x, dtype=torch.promote_types(x.dtype, torch.float32)) if n else None
            for x, n in zip(inputs, needs)
        ]
        total, rows = 0.0, len(inputs[0])
        for start in range(0, rows, size):
            here = slice(start, start + size)
            piece = [x[here] if i < count else x for i, x in enumerate(inputs)]
            piece = [x.detach().requires_grad_(n) for x, n in zip(piece, needs)]
            with torch.enable_grad():
                # Weighted so that the means of the pieces add up to the mean of all.
                value = loss(*piece) * (len(piece[0]) / rows)
            total = total + value.detach()
            if not any(needs):
                continue
            found = iter(torch.autograd.grad(value, [x for x, n in zip(piece, needs) if n]))
            for i, grad in enumerate(grads):
                if grad is not None:  # each row has a place of its own; what is whole adds up
                    (grad[here] if i < count else grad).add_(next(found))
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale: Tensor):
        return None, None, None, *(g if g is None else g * scale for g in ctx.saved_tensors)


class Game:
    """Both losses of one batch: the head's and the discriminator's."""

    def __init__(self, target, head, discriminator: Discriminator | None, dtype=None):
        """`discriminator=None`: L_adv takes the best one instead, D* = p / (p + q).

        `dtype`: of the products with the LM head, that of autocast; None: as the weights are.
        """
        self.head, self.discriminator = head, discriminator
        self.lm_head = head.vocabulary.rows(target.lm_head.weight.detach()).to(dtype)  # (S, width)
        logits = 2**21 if self.lm_head.device.type == "cpu" else 2**27  # 8 MB of float32, or 512
        self.piece = max(32, logits // len(self.lm_head))  # rows that are computed at once

    def positions(self, guess: Guess, batch: Batch):
        """For each draft position yields its index, its weight, (state, before, after, token), and
        the map to logits.

        At the i-th position, i = 1..P, index i - 1, a row is a place t whose token x_{t+1+i} is to
        be learnt (`Batch.rows`): state (N, width) is the head's guess of h_{t+i}, or what Medusa
        has for it; before (N, width) is h_t, that the draft began from; after (N, width) is the
        target's own h_{t+i}; token (N,) is x_{t+1+i} by its place in the head's vocabulary.
        """
        for i, (state, to_logits) in enumerate(zip(guess.states, guess.maps), start=1):
            before = batch.rows(batch.hidden[:, :-i], i)
            after = batch.rows(batch.hidden[:, i:], i)
            token = self.head.vocabulary.places(batch.rows(batch.tokens[:, i + 1 :], i))
            rows = state, before, after, token
            yield i - 1, self.head.position_weights[i - 1], rows, to_logits.to(self.lm_head.dtype)

    @torch.no_grad()
    def law(self, after: Tensor) -> Tensor:
        """p (N, S): what the target's states give over the tokens that the head can guess."""
        return F.linear(after, self.lm_head).float().softmax(-1)

    @torch.no_grad()
    def judgement(self, index: int, before: Tensor, after: Tensor, p: Tensor, q: Tensor) -> Tensor:
        """The discriminator's logits (N, S), no gradient passes through them."""
        if self.discriminator is None:
            return exact_logits(p, q)
        return self.discriminator(before, after, index).float()

    def by_rows(self, loss: Callable, rows: tuple, to_logits: Tensor) -> Tensor:
        """The mean of loss(*rows, to_logits) over the rows, in pieces."""
        return ByRows.apply(loss, self.piece, len(rows), *rows, to_logits)

    def head_loss(self, guess: Guess, batch: Batch, supervised=1.0, adversarial=0.0) -> Tensor:
        """supervised * L_sup + adversarial * L_adv, each the weighted sum over draft positions."""
        total = 0.0
        for index, weight, rows, to_logits in self.positions(guess, batch):
            loss = partial(self.head_loss_at, index, supervised, adversarial)
            total = total + weight * self.by_rows(loss, rows, to_logits)
        return total

    def head_loss_at(self, index, supervised, adversarial, state, before, after, token, to_logits):
        """supervised * L_sup + adversarial * L_adv of one draft position, for some of its rows."""
        logits = F.linear(state, to_logits).float()  # (N, S)
        p = self.law(after) if self.head.learns_law or adversarial else None
        label = p if self.head.learns_law else token
        loss = supervised * self.head.supervised_loss(logits, label, state, after)
        if adversarial:
            q = logits.softmax(-1)  # what the discriminator teaches comes through q alone
            judged = self.judgement(index, before, after, p, q)
            loss = loss + adversarial * adversarial_loss(judged, q)
        return loss

    def discriminator_loss(self, guess: Guess, batch: Batch) -> Tensor:
        """L_D, the weighted sum over draft positions; no gradient for the head."""
        total = 0.0
        for index, weight, rows, to_logits in self.positions(guess.detach(), batch):
            state, before, after, _ = rows
            # Out here, for the sake of its gradient; `score`, in the pieces, has no weights.
            context = self.discriminator.context(before, after, index)  # (N, width + 1)
            rows = context, state, after
            total = total + weight * self.by_rows(self.discriminator_loss_at, rows, to_logits)
        return total

    def discriminator_loss_at(self, context, state, after, to_logits):
        """L_D of one draft position, for some of its rows."""
        q = F.linear(state, to_logits).float().softmax(-1)  # (N, S)
        return discriminator_loss(self.discriminator.score(context).float(), self.law(after), q)

    @torch.no_grad()
    def health(self, guess: Guess, batch: Batch) -> dict[str, float]:
        """The discriminator's figures (see its file), the mean over draft positions, each by about
        a thousand rows from the whole batch."""
        each = []
        for index, _, rows, to_logits in self.positions(guess, batch):
            state, before, after, _ = (values[:: -(-len(values) // 1024)] for values in rows)
            p, q = self.law(after), F.linear(state, to_logits).float().softmax(-1)
            each.append(health(self.judgement(index, before, after, p, q), p, q))
        return {key: sum(one[key] for one in each) / len(each) for key in each[0]}


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
        self.head.prepare(self.target, self.known(train.batch(sample)))

    def ready(self) -> None:
        """After `start`, or once a head that goes on training has its weights."""
        self.game = Game(self.target, self.head, self.discriminator, self.autocast.dtype)
        if self.discriminator is not None:
            self.discriminator.judge_by(self.game.lm_head)
        self.head.train()

    def known(self, batch: Batch) -> Batch:
        """The batch without what the head has no token for: there is no right guess there."""
        return batch._replace(learn=batch.learn & (self.head.vocabulary.places(batch.tokens) >= 0))

    def discriminator_step(self, batch: Batch, guess: Guess) -> None:
        """One step of the discriminator on this guess."""
        self.d_optimizer.zero_grad()
        with self.autocast():
            loss = self.game.discriminator_loss(guess, batch)
        loss.backward()
        self.d_optimizer.step()

    def teaches(self, batch: Batch, own_steps: int) -> bool:
        """Whether every draft position has a row: it has, where the last one has."""
        positions = self.head.max_draft or own_steps
        return batch.learn[:, 1 + positions :].any().item()

    def discriminator_alone(self, batch: Batch) -> None:
        """One step of the discriminator, before the head plays."""
        if not self.teaches(batch, self.config.own_steps):
            return
        with torch.no_grad(), self.autocast():
            guess = self.head(batch, self.config.own_steps)
        self.discriminator_step(batch, guess)

    def step(self, batch: Batch, joint: bool, own_steps: int, rate=1.0, log=False) -> dict:
        """One step of the head; in the joint part one of D before it. Figures if `log`.

        `batch` is one of `known`. `joint`: whether L_adv is played yet. `own_steps`: draft positions
        that EAGLE learns from by now. `rate`: of the head's peak learning rate; D's is constant.
        """
        if not self.teaches(batch, own_steps):
            return {}
        with self.autocast():
            guess = self.head(batch, own_steps)
        if joint and self.discriminator is not None:
            self.discriminator_step(batch, guess)
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
