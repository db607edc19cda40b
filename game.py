"""The game: both losses of one batch, the head's and the discriminator's.

    D     one step on L_D                              the head held fixed
    head  one step on L_G = L_sup + lambda * L_adv     D held fixed

L_D and L_adv are in discriminator.py, L_sup in draft_head.py, each for one draft position; here they
are summed over the positions, whose weights fall. (A judge that sees several positions at once is
in window.py.) One step of either is in head_training.py; when which step is made is in train.py.
In shapes, N is the number of rows: the places of a batch where one draft position is to be learnt.
S is the number of tokens that the head can guess.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from discriminator import (
    Discriminator,
    acceptance,
    adversarial_loss,
    discriminator_loss,
    exact_logits,
    health,
)
from draft_head import Batch, Guess


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


def lk_loss(logits: Tensor, p: Tensor) -> Tensor:
    """w KL(p || q) + (1 - w) (1 - alpha), the mean over rows; logits and p (N, S).

    1 - alpha, the rate of rejection, is what one would lower, but a head that is still far off
    learns nothing from it: so w = exp(-3 alpha), each row's own and held fixed, leads from one to
    the other (LK losses, 2602.23881, the hybrid one).
    """
    log_q = logits.log_softmax(-1)
    alpha = acceptance(p, log_q.exp())  # (N,)
    divergence = F.kl_div(log_q, p, reduction="none").sum(-1)
    w = (-3 * alpha.detach()).exp()
    return (w * divergence + (1 - w) * (1 - alpha)).mean()


class Game:
    """Both losses of one batch: the head's and the discriminator's."""

    def __init__(
        self,
        target,
        head,
        discriminator: Discriminator | None,
        dtype=None,
        lk=False,
        feature_weight=1.0,
    ):
        """`discriminator=None`: L_adv takes the best one instead, D* = p / (p + q).

        `dtype`: of the products with the LM head, that of autocast; None: as the weights are.
        `lk`: `lk_loss` in L_sup, in the place of cross entropy. `feature_weight`: of EAGLE's other
        part of L_sup.
        """
        self.head, self.discriminator = head, discriminator
        self.label_is_law = lk or head.learns_law
        self.fit = {"fit": lk_loss if lk else F.cross_entropy, "feature_weight": feature_weight}
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
        p = self.law(after) if self.label_is_law or adversarial else None
        label = p if self.label_is_law else token
        loss = supervised * self.head.supervised_loss(logits, label, state, after, **self.fit)
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
