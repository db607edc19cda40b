"""From logits to a distribution, from a distribution to a token, and what a rejection leaves.

Temperature, top-k and top-p change the distribution that a text is sampled from. Speculative
decoding applies them to target and draft alike, *before* comparing the two, and compares the very
tensors it samples from. (To sample from one q and compare with another is a common fault: the
text's law is then wrong, and the acceptance too good. transformers issue 47932.)
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cli import UserError

SMALLEST = 1e-30  # floor of temperature and top_p: smaller ones are 0 in float32
BLOCK = 256  # tokens, see `sample_many`
LAST_BELOW_1 = math.nextafter(1.0, 0.0)
# Greedily the target takes its likeliest token, however close the second: guesses are surer to be
# right than the head's q says. Of 1, 0.7, 0.5 and 0.3 the lowest grew the best trees on validation.
GREEDY_TEMPERATURE = 0.3


def argmax(logits: Tensor) -> Tensor:
    """The likeliest token (...): one function for all, so that ties break alike everywhere."""
    # Torch's argmax takes five times as long on a CPU in bfloat16: 1.4 ms over 17 x 49,152 logits.
    return logits.max(dim=-1).indices


def distribution(logits: Tensor, temperature=0.0, top_k=None, top_p=None) -> Tensor:
    """Logits (..., V) -> the distribution to sample from (..., V), float32.

    Used for p and q alike: it is this very tensor that is sampled from and that the rule compares.
    Temperature 0 gives a one-hot row. `top_k` keeps the k likeliest tokens (and those tied with
    the last of them), `top_p` the fewest that together reach that probability.
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


def sample(p: Tensor, u: Tensor) -> Tensor:
    """A token (...) from p (..., V) by its cumulative sum and a uniform u (...) in [0, 1)."""
    cumulative = p.cumsum(-1, dtype=torch.float64)
    threshold = u[..., None].double() * cumulative[..., -1:]  # < the sum: never past the end
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


def sample_many(p: Tensor, u: Tensor) -> Tensor:
    """`sample` for many rows of a large vocabulary: first a block of tokens, then one of these.

    To add up a block is several times faster than to write down each sum on the way. u: float64,
    since it decides twice.
    """
    blocks = F.pad(p, (0, -p.shape[-1] % BLOCK)) if p.shape[-1] % BLOCK else p
    blocks = blocks.unflatten(-1, (-1, BLOCK))  # (..., V / BLOCK, BLOCK)
    sums = blocks.sum(-1, dtype=torch.float64)
    block = sample(sums, u)[..., None]  # (..., 1)
    # Where u came to lie within the block, as a share of it: a uniform number again.
    inside = u[..., None] * sums.sum(-1, keepdim=True) - (sums.cumsum(-1) - sums).gather(-1, block)
    share = (inside / sums.gather(-1, block)).clamp(0.0, LAST_BELOW_1)[..., 0]
    rows = block[..., None].expand(*block.shape, BLOCK)
    return block[..., 0] * BLOCK + sample(blocks.gather(-2, rows)[..., 0, :], share)


def draw(q: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different tokens (..., count), drawn from q (..., V) without putting back.

    The first has the law q, the second that of q without the first, and so on: all tokens race,
    each arriving after an exponential time of rate q, and the first `count` win. Where q has fewer
    tokens than that, the last ones drawn have q = 0.
    """
    times = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    return (q / times.exponential_(generator=generator)).topk(count).indices


def acceptance_probability(p_x: Tensor, q_x: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) of drafted tokens; what was drawn from q has q(x) > 0."""
    return (p_x / q_x).clamp(max=1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) (..., V), what is left of p after a rejection.

    Where p = q nothing is ever rejected; p stands in there for 0 / 0.
    """
    excess = (p - q).clamp(min=0.0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, p)


def without(q: Tensor, x: Tensor) -> Tensor:
    """norm(q without x), q (..., V), x (..., 1); all 0 where nothing else is left."""
    rest = q.scatter(-1, x, 0.0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, 0.0)


class Sampler:
    """The sampling rule of one text, and its random numbers."""

    def __init__(self, device, temperature=0.0, top_k=None, top_p=None, seed=None, explain=False):
        """`explain`: also give what greedy decoding has no need of, to be shown.

        Raises UserError for values out of range.
        """
        if not (math.isfinite(temperature) and temperature >= 0):
            raise UserError(f"temperature is {temperature}, it must be a finite number from 0 on")
        if top_k is not None and top_k < 0:
            raise UserError(f"top_k is {top_k}, it must be 0 (no limit) or more")
        if top_p is not None and not 0 < top_p <= 1:
            raise UserError(f"top_p is {top_p}, it must be above 0 and at most 1")
        if seed is not None and not 0 <= seed < 2**63:
            raise UserError(f"seed is {seed}, it must lie between 0 and 2^63 - 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.device, self.explain = device, explain
        self.generator = torch.Generator(device)
        self.generator.manual_seed(seed) if seed is not None else self.generator.seed()

    def law(self, logits: Tensor) -> Tensor:
        return distribution(logits, self.temperature, self.top_k, self.top_p)

    def uniforms(self, n: int) -> Tensor:
        return torch.rand(n, generator=self.generator, device=self.device, dtype=torch.float64)

    def children(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor | None]:
        """`count` tokens (k, count) to follow each of k nodes, and the q (k, V) they come from.

        Greedy drafts take the likeliest ones, and there is no q: they are no samples.
        """
        if self.temperature == 0:
            best = argmax(logits)[:, None] if count == 1 else logits.topk(count).indices
            return best, logits.float().softmax(-1) if self.explain else None
        q = self.law(logits)
        return draw(q, count, self.generator), q

    def guesses(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` likeliest tokens (k, count) to follow each of k nodes; how likely, as log q.

        By the head's probabilities at the temperature of the text, which stands in for p.
        """
        logits = logits.float() / max(self.temperature, GREEDY_TEMPERATURE)
        log_q, tokens = logits.log_softmax(-1).topk(count)
        return tokens, log_q

    def shown(self, p: Tensor | None, logits: Tensor) -> Tensor:
        """The target's p for on-lookers: greedy decoding itself needs none."""
        return logits.float().softmax(-1) if p is None else p
