"""The discriminator: a judge that tells the target's choice of a token from the draft head's.

KOALA (arXiv 2408.08146) adds adversarial learning to a draft head's supervised training: head and
discriminator D play the game of Goodfellow et al. (1406.2661). Its abstract is all that was
public to us, so this discriminator is **our own design**.

D(c, x) in (0, 1) is the probability that token x, at context c, was chosen by the target rather
than by the head. With p the target's distribution at c and q the head's,

    L_D   = - sum_x p(x) log D(c, x) - sum_x q(x) log(1 - D(c, x))      minimised by D
    L_adv = - sum_x q(x) log D(c, x),  D held fixed                     minimised by the head

Both distributions are known over the whole vocabulary, so each expectation is an exact sum: no
sampled tokens, no policy gradient, no Gumbel trick. The gradient reaches the head through q.

**What the best D is.** For each x the minimum of L_D is at D* = p / (p + q), where
L_D* = 2 ln 2 - 2 JS(p, q), and D guesses right with probability 1 - alpha / 2, where
alpha = sum_x min(p, q) is the rate at which a sampled draft is accepted. So a loss near 2 ln 2 =
1.386 does not mean that D is dead: p and q may be close. `share_found` tells the two apart:
(2 ln 2 - L_D) / (2 JS), which is 0 for a D that knows nothing and 1 for the best. And `cosine` is
that of the angle between the way L_adv sends the head's logits and the way that raises alpha: where
it is near 0, the game cannot help, however clever D is.

**What it teaches.** At D = D* the gradient of L_adv is that of 2 KL(m || p), m = (p + q) / 2. The
game thus has a closed form, `exact_logits`: one line, and the control that a learnt D has to beat
before it deserves any credit. Read next: train.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Discriminator(nn.Module):
    """D(c, x) = sigmoid(<W[x], g(c)> + b(c)), with W the target's frozen LM head.

    The context c is the state that the head guessed from and, training only, the state h+ that the
    target had when it chose: what the head could not see. g and b are one small network, so that
    one product with W scores the whole vocabulary. D is never needed for decoding.
    """

    def __init__(self, lm_head: Tensor, num_positions: int, hidden: int = 512):
        """`lm_head` (V, D): frozen. `num_positions`: draft positions, each judged on its own."""
        super().__init__()
        width = lm_head.shape[1]
        self.judge_by(lm_head)
        self.read = nn.Linear(2 * width, hidden)
        self.position = nn.Embedding(num_positions, hidden)
        self.judge = nn.Linear(hidden, width + 1)
        nn.init.zeros_(self.judge.weight)  # D starts at 1/2 for every token
        nn.init.zeros_(self.judge.bias)

    def judge_by(self, lm_head: Tensor) -> None:
        """Take these rows of the LM head, of the tokens that the draft head can guess (S, D)."""
        self._frozen = (lm_head.detach(),)  # in a tuple: neither a parameter nor saved with D

    def context(self, before: Tensor, after: Tensor, position: int) -> Tensor:
        """States (.., D): `before`, the head's input h_t, and `after`, the target's own h+.

        Returns g and b (.., D + 1).
        """
        where = self.position.weight[position]
        return self.judge(F.silu(self.read(torch.cat([before, after], dim=-1)) + where))

    def score(self, context: Tensor) -> Tensor:
        """What `context` gave -> the logits of D for every token (.., S)."""
        g, b = context.split([context.shape[-1] - 1, 1], dim=-1)
        return F.linear(g, self._frozen[0]) + b

    def forward(self, before: Tensor, after: Tensor, position: int) -> Tensor:
        return self.score(self.context(before, after, position))


def exact_logits(p: Tensor, q: Tensor) -> Tensor:
    """The best possible D, as logits: D* = p / (p + q), so logit D* = log p - log q."""
    tiny = torch.finfo(p.dtype).tiny
    return (p.clamp_min(tiny).log() - q.clamp_min(tiny).log()).detach()


def discriminator_loss(logits: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """L_D, in nats, the mean over contexts. logits, p, q (..., V); p and q are held fixed."""
    real = (p.detach() * F.logsigmoid(logits)).sum(-1)
    fake = (q.detach() * F.logsigmoid(-logits)).sum(-1)  # 1 - sigmoid(s) = sigmoid(-s)
    return -(real + fake).mean()


def adversarial_loss(logits: Tensor, q: Tensor) -> Tensor:
    """L_adv, in nats, the mean over contexts: D is held fixed, the gradient flows through q."""
    return -(q * F.logsigmoid(logits.detach())).sum(-1).mean()


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """alpha = sum_x min(p, q) (...): the chance that a token sampled from q is accepted."""
    return torch.minimum(p, q).sum(-1)


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """JS(p, q) in nats (...), from 0 (equal) to ln 2 (nothing in common)."""
    m = (p + q) / 2
    halves = torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)
    return torch.where(m > 0, halves, 0.0).sum(-1) / 2


def centred(score: Tensor, q: Tensor) -> Tensor:
    """score (.., S) less its mean under q: times q, the gradient of that mean by q's logits."""
    return score - (q * score).sum(-1, keepdim=True)


def health(logits: Tensor, p: Tensor, q: Tensor) -> dict[str, float]:
    """How D is doing on a batch: see the file's docstring for what to expect of each."""
    loss = discriminator_loss(logits, p, q).item()
    js = jensen_shannon(p, q).mean().item()
    right = (p * (logits > 0)).sum(-1) + (q * (logits <= 0)).sum(-1)  # of one real, one fake token
    wanted = q * centred((q < p).to(q.dtype), q)  # d alpha / d z of the head's logits z
    taught = q * centred(F.logsigmoid(logits), q)  # - d L_adv / d z
    return {
        "cosine": F.cosine_similarity(taught, wanted, dim=-1).mean().item(),
        "d_loss": loss,
        "share_found": (2 * math.log(2) - loss) / (2 * js) if js > 0 else 0.0,
        "d_accuracy": right.mean().item() / 2,
        "d_accuracy_bound": 1 - acceptance(p, q).mean().item() / 2,
    }
