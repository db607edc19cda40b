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

Beside a draft vocabulary x runs over its S tokens, p and q are the distributions over these.

**The best D.** For each x the loss -p log D - q log(1 - D) is convex in D, with the derivative
-p / D + q / (1 - D). It is 0 at D* = p / (p + q). With m = (p + q) / 2 that is p / (2 m), so

    L_D* = - sum p log(p / (2 m)) - sum q log(q / (2 m)) = 2 ln 2 - KL(p || m) - KL(q || m)
         = 2 ln 2 - 2 JS(p, q)

**How often it is right.** Shown a token that came from p or from q, with chance 1/2 each, the best
guess is the larger of p(x) and q(x). It is right with probability sum max(p, q) / 2 =
sum (p + q - min(p, q)) / 2 = 1 - alpha / 2, where alpha = sum min(p, q) is the chance that a token
drawn from q is accepted.

**Its lesson.** With D* held fixed, dL_adv / dq(x) = -log D*(x) = log(m / p) + ln 2. And since
dm / dq = 1/2, the derivative of 2 KL(m || p) = 2 sum m log(m / p) is log(m / p) + 1. The two differ
by a constant, and a constant does nothing, since the changes of q sum to 0.

So at D = D* the gradient of L_adv is that of 2 KL(m || p). D* itself needs no training
(`exact_logits`): it is the control that a learnt D has to beat before it deserves any credit.

**Why it adds nothing where p is in the loss.** Put q = p (1 + d), with sum p d = 0. Then -log D* =
log(1 + q / p) = ln 2 + d / 2 + O(d^2), and by the logits z of the head dL_adv / dz = q times that,
less its mean: (q - p) / 2 + O(d^2). That is half of dCE(p, q) / dz = q - p. Near p the game is a
larger weight on a loss that is there already. What it can replace is p: study/README.md, labels.

**Why this form.** EAGLE's q is softmax(W h') and p is softmax(W h+). So the logits of D*,
log p - log q, are <W[x], h+ - h'> + const: linear in W[x], as those of the D below are. Shown h+ it
has to know what the head guesses; shown h+ - h' it comes much closer (RESULTS.md, labels).

**Its health.** A loss near 2 ln 2 = 1.386 may mean that D is dead, or that p and q are close.
`share_found` tells: (2 ln 2 - L_D) / (2 JS) is 0 for a D that knows nothing, 1 for the best, and
negative for a D that is misled. `cosine` compares two directions of the head's logits: that in
which L_adv sends them, and that in which alpha rises most. Near 0 the game hardly helps, however
clever D is. `cosine_of_p` is its yardstick: that of CE(p, q), which sends them along p - q.

Read next: train.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sampling import acceptance, probabilities


class Discriminator(nn.Module):
    """D(c, x) = sigmoid(<W[x], g(c)> + b(c)), with W the target's frozen LM head.

    The context c is h_t, from which the head guessed, the target's own state h+ = h_{t+i} at the
    guessed place, and the draft position i. The head cannot see h+, and D is never needed for
    decoding. Two other forms are tried: a *blind* D is shown the head's own guess h' in place of
    h+, and the text's token in place of p: it knows no more than the head does. D by *difference*
    is shown h+ - h' in place of h+, in which the logits of D* are linear. g and b come from one
    small network: a product with W then scores the whole vocabulary. In shapes D is the width of a
    state.
    """

    def __init__(self, lm_head: Tensor, num_positions: int, hidden: int = 512):
        """`lm_head` (V, D): frozen. `num_positions`: draft positions, each judged on its own."""
        super().__init__()
        width = lm_head.shape[1]
        self.set_lm_head(lm_head)
        self.read = nn.Linear(2 * width, hidden)
        self.position = nn.Embedding(num_positions, hidden)
        self.judge = nn.Linear(hidden, width + 1)
        nn.init.zeros_(self.judge.weight)  # D starts at 1/2 for every token
        nn.init.zeros_(self.judge.bias)

    def set_lm_head(self, lm_head: Tensor) -> None:
        """Judge the tokens that the draft head can guess, by their rows of the LM head (S, D)."""
        self._frozen = (lm_head.detach(),)  # in a tuple: neither a parameter nor saved with D

    def context(self, h_from: Tensor, h_to: Tensor, position: int) -> Tensor:
        """g and b (.., D + 1) of a context: its h_t, `h_from` (.., D), its h+ or the head's guess
        of it, `h_to` (.., D), and the draft `position`, from 0.
        """
        where = self.position.weight[position]
        return self.judge(F.silu(self.read(torch.cat([h_from, h_to], dim=-1)) + where))

    def score(self, context: Tensor) -> Tensor:
        """g and b (.., D + 1) -> the logits of D for every token (.., S)."""
        g, b = context.split([context.shape[-1] - 1, 1], dim=-1)
        return F.linear(g, self._frozen[0]) + b


def exact_logits(p: Tensor, q: Tensor) -> Tensor:
    """The best possible D, as logits: D* = p / (p + q), so logit D* = log p - log q."""
    tiny = torch.finfo(p.dtype).tiny
    return (p.clamp_min(tiny).log() - q.clamp_min(tiny).log()).detach()


def discriminator_loss(logits: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """L_D, in nats, the mean over contexts. logits, p, q (..., S); p and q are held fixed."""
    real = (p.detach() * F.logsigmoid(logits)).sum(-1)
    fake = (q.detach() * F.logsigmoid(-logits)).sum(-1)  # 1 - sigmoid(s) = sigmoid(-s)
    return -(real + fake).mean()


def adversarial_loss(logits: Tensor, q: Tensor) -> Tensor:
    """L_adv, in nats, the mean over contexts: D is held fixed, the gradient flows through q."""
    return -(q * F.logsigmoid(logits.detach())).sum(-1).mean()


def jensen_shannon(p: Tensor, q: Tensor) -> Tensor:
    """JS(p, q) in nats (...), from 0 (equal) to ln 2 (nothing in common)."""
    m = (p + q) / 2
    halves = torch.special.xlogy(p, p / m) + torch.special.xlogy(q, q / m)
    return torch.where(m > 0, halves, 0.0).sum(-1) / 2


def centred(score: Tensor, q: Tensor) -> Tensor:
    """score (.., S) less its mean under q. Times q it is that mean's gradient by q's logits."""
    return score - (q * score).sum(-1, keepdim=True)


def gradient_norm(head, loss: Tensor) -> float:
    """||grad loss|| over the head's parameters; keeps the graph."""
    parameters = [w for w in head.parameters() if w.requires_grad]
    grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return math.sqrt(sum(g.square().sum().item() for g in grads if g is not None))


def health(logits: Tensor, p: Tensor, q: Tensor) -> dict[str, float]:
    """The figures of D on a batch; the file's docstring tells what to expect of each."""
    loss = discriminator_loss(logits, p, q).item()
    js = jensen_shannon(p, q).mean().item()
    right = (p * (logits > 0)).sum(-1) + (q * (logits <= 0)).sum(-1)  # of one real, one fake token
    wanted = q * centred((q < p).to(q.dtype), q)  # d alpha / d z of the head's logits z
    taught = q * centred(F.logsigmoid(logits), q)  # - d L_adv / d z
    return {
        "cosine": F.cosine_similarity(taught, wanted, dim=-1).mean().item(),
        "cosine_of_p": F.cosine_similarity(p - q, wanted, dim=-1).mean().item(),
        "d_loss": loss,
        "share_found": (2 * math.log(2) - loss) / (2 * js) if js > 0 else 0.0,
        "d_accuracy": right.mean().item() / 2,
        "d_accuracy_bound": 1 - acceptance(p, q).mean().item() / 2,
    }


# ------------------------------------------------------------------------- figures for the log


def in_parts(training, guess, batch, weight: float) -> tuple[Tensor, dict]:
    """The head's loss (), L_sup and L_adv computed apart, and the figures of both.

    `training`: a train.HeadTraining, `weight`: lambda by now.
    """
    loss = training.head_loss(guess, batch)
    figures = {"loss_sup": loss.item()}
    if weight == 0:
        return loss, figures
    adversarial = training.head_loss(guess, batch, 0.0, 1.0)
    figures["loss_adv"] = adversarial.item()
    sizes = [gradient_norm(training.head, part) for part in (loss, adversarial)]
    figures["gradient_ratio"] = weight * sizes[1] / max(sizes[0], 1e-12)
    return loss + weight * adversarial, figures | health_of(training, guess, batch)


@torch.no_grad()
def health_of(training, guess, batch) -> dict[str, float]:
    """D's figures, the mean over draft positions, each by about a thousand rows of the batch."""
    each = []
    for index, _, rows, to_logits in training.positions(guess, batch):
        state, h_from, h_to, _ = (values[:: -(-len(values) // 1024)] for values in rows)
        p, q = probabilities(h_to, training.lm_head), probabilities(state, to_logits)
        each.append(health(training.judged(index, h_from, h_to, state, p, q), p, q))
    return {key: sum(one[key] for one in each) / len(each) for key in each[0]}
