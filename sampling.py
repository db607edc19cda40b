"""From logits to a distribution, from a distribution to a token, and the residual of a rejection.

Temperature, top-k and top-p change the distribution that a text is sampled from. Speculative
decoding applies them to the target's p and the draft's q alike, *before* comparing the two, and it
compares the very tensors it samples from. (To sample from one q and to compare with another is a
common fault: the text then has the wrong distribution, and tau looks too good. transformers issue
47932.)

The last part is the **draft vocabulary** (FR-Spec, 2502.14856). Beside a large vocabulary the map
from a hidden state to logits is the costliest part of drafting: SmolLM2 has 28 M weights there,
and 3.5 M in a layer. But a few tokens make up most of a text. A head that knows the S most frequent
ones has logits (.., S), and q is 0 for all others. The rules need no exception: the text is still
exactly the target's. The price: the other tokens are never guessed, see `Vocabulary.coverage`.

Read next: drafts.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.cli import UserError

SMALLEST = 1e-30  # floor of temperature and top_p: smaller ones are 0 in float32
LAST_BELOW_1 = math.nextafter(1.0, 0.0)  # the largest uniform number there is
# The least temperature by which a growing tree ranks its nodes. Greedily the target takes its
# likeliest token, however close the second: first guesses are right more often than q says. Of 1,
# 0.7, 0.5 and 0.3 the lowest grew the best trees on validation text.
GREEDY_TEMPERATURE = 0.3
LEAST = -1e4  # log-probability of a node; of one whose q is not a number


def argmax(logits: Tensor) -> Tensor:
    """The likeliest token (...): one function for all, so that ties break alike everywhere."""
    # torch's argmax takes five times as long on a CPU in bfloat16: 1.4 ms over 17 x 49,152 logits.
    return logits.max(dim=-1).indices


def distribution(logits: Tensor, temperature=0.0, top_k=None, top_p=None) -> Tensor:
    """Logits (..., V) -> the distribution to sample from (..., V), float32.

    Used for p and q alike: this very tensor is sampled from and compared by the rule. Temperature 0
    gives a one-hot row. `top_k` keeps the k likeliest tokens (and those tied with the last of
    them), `top_p` the fewest that together reach that probability.
    """
    if temperature == 0:
        one_hot = torch.zeros(logits.shape, device=logits.device)
        return one_hot.scatter_(-1, argmax(logits)[..., None], 1.0)
    logits = logits.float()
    # The top becomes 0, so that nothing overflows; below SMALLEST, float32 would make it 0 / 0.
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, SMALLEST)
    if top_k is not None and 0 < top_k < logits.shape[-1]:
        last_kept = logits.topk(top_k).values[..., -1:]
        logits = logits.masked_fill(logits < last_kept, -math.inf)
    p = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        ordered, order = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        ordered = ordered.masked_fill(before >= max(top_p, SMALLEST), 0.0)
        p = torch.zeros_like(p).scatter_(-1, order, ordered)
        p = p / p.sum(-1, keepdim=True)
    return p


def probabilities(states: Tensor, to_logits: Tensor) -> Tensor:
    """States (N, D) and a map to logits (S, D) -> their distributions at temperature 1 (N, S)."""
    return F.linear(states, to_logits).float().softmax(-1)


def sample(p: Tensor, u: Tensor) -> Tensor:
    """A token (...) from p (..., V) by its cumulative sum and a uniform u (...) in [0, 1)."""
    cumulative = p.cumsum(-1, dtype=torch.float64)
    threshold = u[..., None].double() * cumulative[..., -1:]  # < the sum: never past the end
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


def acceptance_probability(p_x: Tensor, q_x: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) of drafted tokens; a token drawn from q has q(x) > 0."""
    return (p_x / q_x).clamp(max=1.0)


def acceptance(p: Tensor, q: Tensor) -> Tensor:
    """alpha = sum_x min(p, q) (...): the chance that a token sampled from q is accepted."""
    return torch.minimum(p, q).sum(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) (..., V): the target's token comes from it after a rejection.

    Where p = q nothing is rejected, and p stands in for 0 / 0.
    """
    excess = (p - q).clamp(min=0.0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, p)


def falling(log_q: Tensor) -> Tensor:
    """log q of nodes of a tree (...), finite and below 0 whatever q is, in float64.

    So a node's sum lies strictly below its parent's, and none is kept without its parent.
    """
    return log_q.double().nan_to_num(nan=LEAST).clamp(LEAST, -1e-9)


class Sampler:
    """The sampling settings of one text, and its random numbers."""

    def __init__(self, device, temperature=0.0, top_k=None, top_p=None, seed=None):
        """Raises UserError for values out of range."""
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature is {temperature}, it must be a finite number, at least 0")
        if top_k is not None and top_k < 0:
            raise UserError(f"top_k is {top_k}, it must be 0 (no limit) or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}, it must be above 0 and at most 1")
        if seed is not None and not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}, it must lie between 0 and 2^63 - 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.device, self.generator = device, torch.Generator(device)
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()

    def distribution(self, logits: Tensor) -> Tensor:
        return distribution(logits, self.temperature, self.top_k, self.top_p)

    def uniforms(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator, device=self.device, dtype=torch.float64)

    def draw(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """One token for each of k rows of logits, by its index there (k,), and its q (k, S).

        Greedily it is the likeliest token, and there is no q: it is named, not drawn.
        """
        if self.temperature == 0:
            return argmax(logits), None
        q = self.guess(logits)
        return sample(q, self.uniforms(len(q))), q

    def guess(self, logits: Tensor) -> Tensor:
        """q (..., S) of a head's logits (..., S): a distribution, as the rule needs it, even where
        the head overflows and its logits are NaN; then a useless one.
        """
        return self.distribution(logits.float().nan_to_num(nan=torch.finfo(torch.float32).min))

    def likeliest(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` likeliest tokens after each of k nodes, by index, and log q, (k, count) both.

        They are named. q ranks the nodes of a tree and judges nothing, so that top-k and top-p may
        be left out, and a low temperature may be raised to GREEDY_TEMPERATURE.
        """
        logits = logits.float() / max(self.temperature, GREEDY_TEMPERATURE)
        log_q, indices = logits.log_softmax(-1).topk(count)
        return indices, log_q


class Vocabulary(nn.Module):
    """The tokens that a head can guess. A token's index is its place among the head's logits."""

    def __init__(self, size: int, target):
        """`size` tokens, set by `choose` or loaded with the weights; 0: all of the target's."""
        super().__init__()
        self.whole = target.config.vocab_size
        self.register_buffer("tokens", torch.arange(size) if size else None)  # (S,)

    def choose(self, counts: Tensor) -> None:
        """Take the most frequent tokens by `counts` (V,)."""
        if self.tokens is not None:
            order = counts.argsort(descending=True, stable=True)[: len(self.tokens)]
            self.tokens.copy_(order.sort().values)

    def coverage(self, counts: Tensor) -> float:
        """The share of a text, whose tokens have these counts (V,), that a head can guess."""
        return (self.rows(counts).sum() / counts.sum()).item()

    def rows(self, weight: Tensor) -> Tensor:
        """The rows of an LM head (V, D) for these tokens (S, D)."""
        return weight if self.tokens is None else weight[self.tokens]

    def tokens_at(self, indices: Tensor) -> Tensor:
        """Indices among the logits -> tokens."""
        return indices if self.tokens is None else self.tokens[indices]

    def indices_of(self, tokens: Tensor) -> Tensor:
        """Tokens -> indices among the logits; -1 for a token that the head cannot guess."""
        if self.tokens is None:
            return tokens
        indices = self.tokens.new_full((self.whole,), -1)
        indices[self.tokens] = torch.arange(len(self.tokens), device=indices.device)
        return indices[tokens]

    def spread(self, q: Tensor) -> Tensor:
        """q (k, S) -> q (k, V), 0 for a token that the head cannot guess."""
        if self.tokens is None:
            return q
        return q.new_zeros(len(q), self.whole).index_copy_(1, self.tokens, q)
