"""Project: a loss that is the rate of acceptance. `pytest tests/exercises/check_lk_loss.py`

    lk_loss(logits, p) -> ()

logits (N, V): the head's; p (N, V): the target's distribution. The mean over rows of

    w KL(p || q) + (1 - w) (1 - alpha),    w = exp(-3 alpha), a number that is held fixed

A head that is far off learns nothing from alpha, so KL leads until alpha is large: the hybrid one
of LK losses, arXiv 2602.23881.
"""

import math

import pytest
import torch
from written import written


def two(size: float):
    generator = torch.Generator().manual_seed(1)
    logits, other = size * torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), other.softmax(-1)


def by_hand(p: list, q: list) -> tuple[float, float]:
    """KL(p || q) and alpha of one row."""
    return sum(a * math.log(a / b) for a, b in zip(p, q)), sum(map(min, zip(p, q)))


def its_value_is_that_of_the_formula(lk_loss):
    for size in (0.3, 1.0, 3.0):
        logits, p = two(size)
        rows = [by_hand(*row) for row in zip(p.tolist(), logits.softmax(-1).tolist())]
        expected = [math.exp(-3 * a) * kl + (1 - math.exp(-3 * a)) * (1 - a) for kl, a in rows]
        assert lk_loss(logits, p).item() == pytest.approx(sum(expected) / 3)


def the_weight_is_held_fixed(lk_loss):
    """Its gradient, against differences of the loss whose weights are numbers."""
    logits, p = two(1.0)
    (ours,) = torch.autograd.grad(lk_loss(logits, p), logits)
    alphas = [by_hand(*row)[1] for row in zip(p.tolist(), logits.softmax(-1).tolist())]

    def value(z) -> float:
        total = 0.0
        for (kl, a), alpha in zip(map(by_hand, p.tolist(), z.softmax(-1).tolist()), alphas):
            total += math.exp(-3 * alpha) * kl + (1 - math.exp(-3 * alpha)) * (1 - a)
        return total / 3

    z, step = logits.detach(), 1e-6
    for row in range(3):
        for column in range(6):
            up, down = z.clone(), z.clone()
            up[row, column] += step
            down[row, column] -= step
            slope = (value(up) - value(down)) / (2 * step)
            assert ours[row, column].item() == pytest.approx(slope, abs=1e-6)


def nothing_is_lost_where_q_is_p(lk_loss):
    _, p = two(1.0)
    assert lk_loss(p.log(), p).item() == pytest.approx(0, abs=1e-9)


CHECKS = its_value_is_that_of_the_formula, the_weight_is_held_fixed, nothing_is_lost_where_q_is_p


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_lk_loss(check):
    check(written("lk_loss"))
