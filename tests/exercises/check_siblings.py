"""Project: siblings that were drawn from q. `pytest tests/exercises/check_siblings.py`

    siblings(p, q, drawn) -> (accepted, rest)

p, q (V,): the target's and the draft's distributions at one place. drawn: tokens for this place,
drawn from q one after the other without putting back. accepted (k,): the chance that the text goes
on with the i-th of them, by its being accepted after all before it were not. rest (V,): the chances
of the tokens that follow where none of them is.
"""

from itertools import permutations

import pytest
import torch
from written import written

from sampling import acceptance, acceptance_probability, residual


def pairs():
    """Distributions of five tokens, some of which one side or the other never takes."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        p, q = torch.rand(2, 5, generator=generator, dtype=torch.float64).pow(3)
        yield p / p.sum(), q / q.sum()
    p = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0], dtype=torch.float64)
    q = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    yield from ((p, q), (q, p), (p, p))


def ways(q, count: int):
    """Every outcome of `count` draws without putting back, and its chance."""
    for drawn in permutations(torch.nonzero(q).flatten().tolist(), count):
        chance, left = 1.0, 1.0
        for token in drawn:
            chance, left = chance * q[token].item() / left, left - q[token].item()
        yield list(drawn), chance


def the_text_has_the_targets_law(siblings):
    """Over all draws, added up: token for token p."""
    for count in (1, 2, 3):
        for p, q in pairs():
            law = torch.zeros_like(p)
            for drawn, chance in ways(q, count):
                accepted, rest = siblings(p, q, drawn)
                law += chance * rest.index_add(0, torch.tensor(drawn), accepted)
            torch.testing.assert_close(law, p)


def one_is_judged_as_in_a_chain(siblings):
    for p, q in pairs():
        for drawn, _ in ways(q, 1):
            accepted, rest = siblings(p, q, drawn)
            keep = acceptance_probability(p[drawn], q[drawn])
            torch.testing.assert_close(accepted, keep)
            torch.testing.assert_close(rest, (1 - keep) * residual(p, q))


def two_are_accepted_more_often_than_one(siblings):
    """Else the tree would be for nothing: on average by more than a tenth here."""
    gains = []
    for p, q in list(pairs())[:6]:
        two = sum(chance * siblings(p, q, drawn)[0].sum() for drawn, chance in ways(q, 2))
        assert two >= acceptance(p, q) - 1e-12
        gains.append((two - acceptance(p, q)).item())
    assert sum(gains) / len(gains) > 0.1


CHECKS = the_text_has_the_targets_law, one_is_judged_as_in_a_chain
CHECKS += (two_are_accepted_more_often_than_one,)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_siblings(check):
    check(written("siblings"))
