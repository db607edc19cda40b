"""Project: a judge of several guesses in a row. `pytest tests/exercises/check_run_judge.py`

    run_judge(width) -> a torch.nn.Module
    its forward(h_from (B, D), states (B, P, D)) -> logits (B, P)

states: the head's guesses at P draft positions in a row, or the target's own states there. The
logit at a position may use that of the position and those before it, and says whether the run is
the target's. A judge of single guesses cannot see that two do not belong together.
"""

import pytest
import torch
import torch.nn.functional as F
from written import written

WIDTH, PLACES = 6, 3


def runs(count: int, generator):
    """Real runs, whose states follow each other, and false ones, alike state by state."""
    start = torch.randn(count, 1, WIDTH, generator=generator)
    small = 0.1 * torch.randn(count, PLACES, WIDTH, generator=generator)
    real = start + small
    strangers = torch.randn(count, PLACES, WIDTH, generator=generator)
    return torch.zeros(count, WIDTH), real, strangers * (1 + 0.01) ** 0.5


def each_place_sees_itself_and_those_before(run_judge):
    torch.manual_seed(0)
    judge = run_judge(WIDTH)
    for parameter in judge.parameters():  # one that starts at 1/2 everywhere sees nothing yet
        torch.nn.init.normal_(parameter, std=0.5)
    states = torch.randn(2, PLACES, WIDTH, requires_grad=True)
    logits = judge(torch.randn(2, WIDTH), states)
    assert logits.shape == (2, PLACES)
    for place in range(PLACES):
        (seen,) = torch.autograd.grad(logits[0, place], states, retain_graph=True)
        assert (seen[0].abs().sum(-1) > 0).tolist() == [other <= place for other in range(PLACES)]
        assert not seen[1].any()  # the other text's


def it_tells_runs_apart_that_are_alike_place_by_place(run_judge):
    """After 400 steps of its own loss: right in nine of ten, from the second place on."""
    torch.manual_seed(0)
    judge, generator = run_judge(WIDTH), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(judge.parameters(), lr=5e-3)
    for _ in range(400):
        before, real, false = runs(64, generator)
        losses = F.softplus(-judge(before, real)), F.softplus(judge(before, false))
        optimizer.zero_grad()
        sum(loss.mean() for loss in losses).backward()
        optimizer.step()
    before, real, false = runs(500, generator)
    right = (
        (judge(before, real) > 0).float().mean(0) + (judge(before, false) < 0).float().mean(0)
    ) / 2
    assert 0.4 < right[0] < 0.6  # one state alone says nothing
    assert right[1:].min() > 0.9, right


CHECKS = (each_place_sees_itself_and_those_before,)
CHECKS += (it_tells_runs_apart_that_are_alike_place_by_place,)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_run_judge(check):
    check(written("run_judge"))
