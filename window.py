"""A discriminator of runs: what the judge of tokens cannot see.

The judge in discriminator.py is shown one place at a time, and there p and q say it all: the best
judge is p / (p + q), and no learnt one can teach a head more. What p and q at a place do not say is
how a head fares on its own guesses, several in a row, as it drafts. This judge sees such a run
whole (Professor Forcing, arXiv 1610.09038):

    real   the target's states h_{t+1} .. h_{t+P}
    fake   the head's guesses of them, each made from its guess before (`--own_steps P`)

with h_t, that both begin from, and with the logits that each state gives to the tokens which the
target finds likeliest there: to err among these costs acceptance, to err elsewhere does not.

Where two runs begin from the same state, only a comparison of the two means something, hence pairs
(relativistic, 1807.00734):

    L_D   = softplus(-(D(real) - D(fake))) + (|grad D|^2 at real + |grad D|^2 at fake) / 2
    L_adv = softplus(-(D(fake) - D(real))),  D held fixed

The squares (R1 and R2 of 2501.05441) are by what D is shown. A run of features and its double are easy
to tell apart; without the squares D soon does so with a cliff between the two, and a cliff's
gradient points nowhere. At D = 0, which knows nothing, L_D is ln 2.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from draft_head import Batch, Guess
from game import Game

TOP = 16  # tokens at each place whose logits D is shown
RUNS = 512  # of a batch, that are judged


class WindowDiscriminator(nn.Module):
    """D(run) in logits: one small network over all of the run at once."""

    def __init__(self, lm_head: Tensor, num_positions: int, hidden: int = 512):
        """`lm_head` (S, D): frozen. `num_positions`: P, of each run."""
        super().__init__()
        width = lm_head.shape[1]
        self.judge_by(lm_head)
        self.begin = nn.Linear(width, hidden)
        self.read = nn.Linear(num_positions * (width + TOP), hidden)
        self.judge = nn.Sequential(
            nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1, bias=False)
        )
        nn.init.zeros_(self.judge[-1].weight)  # D starts at 0 for every run

    def judge_by(self, lm_head: Tensor) -> None:
        """As `Discriminator.judge_by`."""
        self._frozen = (lm_head.detach(),)

    def likeliest(self, true: Tensor) -> Tensor:
        """Of the target's states (N, P, D) the rows of the LM head (N, P, TOP, D) for the tokens
        likeliest there."""
        lm_head = self._frozen[0].to(true.dtype)
        tokens = F.linear(true, lm_head).topk(min(TOP, len(lm_head))).indices
        return F.pad(lm_head[tokens], (0, 0, 0, TOP - tokens.shape[-1]))

    def shown(self, run: Tensor, rows: Tensor) -> Tensor:
        """What D is shown of a run (N, P, D): its states by direction, their logits by difference.

        Neither the size of a state nor what all logits have in common changes q's ranking: D could
        tell fake from real by them, and would teach the head nothing. -> (N, P, D + TOP)
        """
        logits = (rows @ run[..., None])[..., 0]  # (N, P, TOP)
        logits = logits - logits.mean(-1, keepdim=True)
        return torch.cat([F.layer_norm(run, run.shape[-1:]), logits], dim=-1)

    def forward(self, before: Tensor, shown: Tensor) -> Tensor:
        """h_t (N, D) and what `shown` gave -> D (N,)."""
        return self.judge(self.begin(before) + self.read(shown.flatten(1)))[:, 0]


class WindowGame(Game):
    """The same steps, played for runs. In float32: D is small, and its gradient's gradient asked."""

    def runs(self, guess: Guess, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """h_t (N, D), the target's run (N, P, D) and the head's, of up to RUNS places whose P
        tokens are all to be learnt."""
        positions, length = len(guess.states), batch.hidden.shape[1]
        starts = length - positions
        learnt = [batch.learn[:, i + 1 :] for i in range(1, positions + 1)]
        use = torch.stack([place[:, :starts] for place in learnt]).all(0).nonzero()  # (N, 2)
        text, t = use[:: max(1, -(-len(use) // RUNS))].T
        real, fake = [], []
        for i, (states, place) in enumerate(zip(guess.states, learnt), start=1):
            number = (place.flatten().cumsum(0) - 1).view_as(place)  # of a place's row in `states`
            real.append(batch.hidden[text, t + i])
            fake.append(states[number[text, t]])
        before = batch.hidden[text, t]
        return before.float(), torch.stack(real, 1).float(), torch.stack(fake, 1).float()

    def verdicts(self, guess: Guess, batch: Batch, learning: bool = False):
        """D(real) - D(fake) (N,). With `learning` also half of both squared gradients (); without,
        D is held fixed."""
        with torch.autocast(self.lm_head.device.type, enabled=False):
            before, real, fake = self.runs(guess, batch)
            with torch.no_grad():
                rows = self.discriminator.likeliest(real)
            seen = [self.discriminator.shown(run, rows) for run in (real, fake)]
            if not learning:
                fixed = {k: w.detach() for k, w in self.discriminator.named_parameters()}
                judge = partial(functional_call, self.discriminator, fixed)
                return judge((before, seen[0])) - judge((before, seen[1]))
            seen = [one.detach().requires_grad_() for one in seen]
            of_real, of_fake = (self.discriminator(before, one) for one in seen)
            grads = torch.autograd.grad((of_real + of_fake).sum(), seen, create_graph=True)
            squares = sum(grad.square().sum((1, 2)).mean() for grad in grads)
            return of_real - of_fake, squares / 2

    def head_loss(self, guess: Guess, batch: Batch, supervised=1.0, adversarial=0.0) -> Tensor:
        loss = super().head_loss(guess, batch, supervised) if supervised else 0.0
        if adversarial:
            loss = loss + adversarial * F.softplus(self.verdicts(guess, batch)).mean()
        return loss

    def discriminator_loss(self, guess: Guess, batch: Batch) -> Tensor:
        ahead, squares = self.verdicts(guess.detach(), batch, learning=True)
        return F.softplus(-ahead).mean() + squares

    @torch.no_grad()
    def health(self, guess: Guess, batch: Batch) -> dict[str, float]:
        """`d_accuracy`: in how many pairs D holds the target's run for the target's."""
        ahead = self.verdicts(guess, batch)
        right = (ahead > 0).double() + (ahead == 0).double() / 2
        return {"d_loss": F.softplus(-ahead).mean().item(), "d_accuracy": right.mean().item()}
