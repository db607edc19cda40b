"""The game: the losses of a head on one batch, the discriminator's side of them, and one step.

    D     one step on L_D                              the head held fixed
    head  one step on L_G = L_sup + lambda * L_adv     D held fixed

When which of these is played, for how long, and what is kept in the end, is in train.py.
"""

import math

import torch
from torch import Tensor, nn

from discriminator import Discriminator, adversarial_loss, discriminator_loss, exact_logits, health
from draft_head import Batch, Guess, HeadConfig, build_head
from features import spread
from recipe import TrainConfig


class Game:
    """The losses of a head on one batch, and the discriminator's side of them."""

    def __init__(self, target, head, discriminator: Discriminator | None):
        """`discriminator=None`: where an adversary is called for, the closed form p / (p + q)."""
        self.head, self.discriminator = head, discriminator
        self.lm_head = head.vocabulary.rows(target.lm_head.weight.detach())  # (S, D)

    def guess(self, batch: Batch, own_steps: int = 1) -> tuple[Guess, list[Tensor]]:
        """The head's guess, and the target's p of each position (N, S), over what the head knows."""
        guess = self.head(batch, own_steps)
        with torch.no_grad():
            logits = nn.functional.linear(batch.rows(batch.hidden[:, 1:], 1), self.lm_head)
            p = logits.float().softmax(-1)  # of every token to be learnt that position 1 guesses
            place = torch.arange(batch.hidden.shape[1] - 1, device=p.device)
            place = batch.rows(place.expand(len(batch.tokens), -1), 1)  # where those tokens stand
            # Position i guesses all of them but those in the first i - 1 places.
            every = [p if i == 0 else p[place >= i] for i in range(len(guess.logits))]
        return guess, every

    def judged(self, guess: Guess, batch: Batch, p: list[Tensor]):
        """For each draft position: its weight, D's logits, p and q, each (N, S).

        The head guessed from the state `i` places before the one that p comes from.
        """
        for i, (logits, p_i) in enumerate(zip(guess.logits, p), start=1):
            q = logits.float().softmax(-1)
            if self.discriminator is None:
                d_logits = exact_logits(p_i, q)
            else:
                before = batch.rows(batch.hidden[:, :-i], i)
                after = batch.rows(batch.hidden[:, i:], i)
                d_logits = self.discriminator(before, after, i - 1).float()
            yield self.head.position_weights[i - 1], d_logits, p_i, q

    def head_losses(self, guess: Guess, batch: Batch, p: list[Tensor], adversarial: bool):
        """(L_sup, L_adv); L_G = L_sup + lambda L_adv. L_adv is None where it is not played."""
        supervised = self.head.supervised_loss(guess, batch, p)
        if not adversarial:
            return supervised, None
        judged = self.judged(guess, batch, p)
        return supervised, sum(w * adversarial_loss(d, q) for w, d, _, q in judged)

    def discriminator_losses(self, guess: Guess, batch: Batch, p: list[Tensor]):
        """L_D of one draft position after the other, each reckoned when it is asked for."""
        for weight, d_logits, p_i, q in self.judged(guess, batch, p):
            yield weight * discriminator_loss(d_logits, p_i, q)

    @torch.no_grad()
    def health(self, guess: Guess, batch: Batch, p: list[Tensor]) -> dict[str, float]:
        """D's figures, the mean over draft positions."""
        each = [health(d, p_i, q) for _, d, p_i, q in self.judged(guess, batch, p)]
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
        self.game = Game(self.target, self.head, self.discriminator)
        if self.discriminator is not None:
            self.discriminator.judge_by(self.game.lm_head)
        self.head.train()

    def known(self, batch: Batch) -> Batch:
        """The batch without what the head has no token for: there is no right guess there."""
        return batch._replace(learn=batch.learn & (self.head.vocabulary.places(batch.tokens) >= 0))

    def discriminator_step(self, batch: Batch, guess: Guess, p: list[Tensor]) -> None:
        self.d_optimizer.zero_grad()
        losses = self.game.discriminator_losses(guess, batch, p)
        for _ in p:  # what a position keeps for its gradient is let go before the next
            with self.autocast():
                loss = next(losses)
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
            guess, p = self.game.guess(batch, self.config.own_steps)
        self.discriminator_step(batch, guess, p)

    def step(self, batch: Batch, joint: bool, own_steps: int, rate=1.0, log=False) -> dict:
        """One step of the head, and in the joint part one of D before it. Figures if `log`.

        `own_steps`: draft positions that EAGLE learns from. `rate`: of the peak learning rate.
        """
        if not self.teaches(batch, own_steps):
            return {}
        with self.autocast():
            guess, p = self.game.guess(batch, own_steps)
        detached = guess._replace(logits=[logits.detach() for logits in guess.logits])
        if joint and self.discriminator is not None:
            self.discriminator_step(batch, detached, p)
        with self.autocast():
            supervised, adversarial = self.game.head_losses(guess, batch, p, joint)
        values = {"loss_sup": supervised.item()} if log else {}
        if log and joint:
            ratio = gradient_ratio(self.head, supervised, adversarial, self.weight)
            values |= {"loss_adv": adversarial.item(), "gradient_ratio": ratio}
            values |= self.game.health(detached, batch, p)
        loss = supervised + self.weight * adversarial if joint else supervised
        self.optimizer.param_groups[0]["lr"] = self.config.head_lr * rate
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self.optimizer.step()
        return values
