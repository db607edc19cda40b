"""The acceptance rule is what makes speculative decoding exact.

If a drafted token is accepted with min(1, p/q), and a rejected one replaced by a draw from
norm(max(0, p - q)), the text has the target's law whatever q is. A slip here (a wrong residual, a q
that is not the one drafted from) still writes fluent text, and no look at samples would show it. So
the law of a whole cycle is enumerated here, and `verify` is held against it by chi-square; each
test is also shown a rule that is slightly wrong, and has to reject it.

The chi-square tests are seeded. At the level used, a fresh seed fails a correct rule with
probability 1e-9.
"""

import pytest
import torch
from toys import FALSE_ALARM, chi_square_p_value, random_tables, rest_of, verdicts

from sampling import LAST_BELOW_1, acceptance_probability, distribution, residual, sample
from speculate import verify
from targets.written import BLOCK, sample_many

SAMPLING = {
    "plain": dict(temperature=1.0),
    "hot": dict(temperature=1.7),
    "cold": dict(temperature=0.4),
    "top_k": dict(temperature=1.0, top_k=2),
    "top_p": dict(temperature=1.0, top_p=0.8),
    "all": dict(temperature=0.7, top_k=3, top_p=0.9),
    "greedy": dict(temperature=0.0),
}


def worst_difference(gamma: int, sampling: dict, **wrong) -> float:
    """Between the law of gamma + 1 tokens by the rule and by the target alone.

    A cycle that writes fewer is completed with the target's own law.
    """
    p = random_tables(1, gamma + 1, **sampling)
    q = random_tables(2, gamma, **sampling)
    law = torch.zeros([4] * (gamma + 1), dtype=torch.float64)
    for draft, accepted, following in verdicts(p, q, **wrong):
        for token, probability in enumerate(following):
            written = (*draft[:accepted], token)
            law[written] += probability * rest_of(p, written)
    return (law - rest_of(p)).abs().max().item()


# ---------------------------------------------------------------------------------- the exact law


@pytest.mark.parametrize("gamma", [1, 2, 3])
@pytest.mark.parametrize("name", SAMPLING)
def test_a_cycle_writes_exactly_the_targets_law(gamma, name):
    assert worst_difference(gamma, SAMPLING[name]) < 1e-6


def accept_squared(p_x, q_x):
    return acceptance_probability(p_x, q_x) ** 2


def accept_always(p_x, q_x):
    return torch.ones_like(p_x)


def no_residual(p, q):
    return p


WRONG = {
    "the residual is p": dict(rest=no_residual),
    "accept with min(1, p/q) squared": dict(accept=accept_squared),
    "accept always": dict(accept=accept_always),
    "q of another temperature": dict(q_in_rule=random_tables(2, 2, temperature=2.0)),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_comparison_sees_a_wrong_rule(name):
    assert worst_difference(2, SAMPLING["plain"], **WRONG[name]) > 1e-2


# ------------------------------------------------------------------------------- verify's verdicts


def verify_p_value(sampling: dict, q_for_verify=None, draws: int = 100_000) -> float:
    """Chi-square of (draft, accepted, next token) by batched `verify`, gamma 2."""
    p, q = random_tables(1, 3, **sampling), random_tables(2, 2, **sampling)
    law = torch.zeros(4, 4, 3, 4, dtype=torch.float64)
    for draft, accepted, following in verdicts(p, q):
        law[(*draft, accepted)] += following

    generator = torch.Generator().manual_seed(0)
    u = torch.rand(draws, 5, generator=generator, dtype=torch.float64)
    first = sample(q[0].expand(draws, 4), u[:, 3])
    second = sample(q[1][first], u[:, 4])
    draft = torch.stack([first, second], 1)
    rows_p = torch.stack([p[0].expand(draws, 4), p[1][first], p[2][first, second]], 1)
    told = q_for_verify or q
    rows_q = torch.stack([told[0].expand(draws, 4), told[1][first]], 1)
    accepted, following = verify(rows_p, rows_q, draft, u[:, :3])

    cell = ((first * 4 + second) * 3 + accepted) * 4 + following
    return chi_square_p_value(cell.bincount(minlength=law.numel()), law.flatten())


@pytest.mark.parametrize("name", SAMPLING)
def test_verify_draws_from_the_enumerated_law(name):
    p_value = verify_p_value(SAMPLING[name])
    assert p_value > FALSE_ALARM, (
        "the law is another: is each uniform used once, and the last last?"
    )


def test_verify_with_another_q_than_was_drafted_from_is_seen():
    other = random_tables(2, 2, temperature=1.2)
    assert verify_p_value(SAMPLING["plain"], q_for_verify=other) < FALSE_ALARM


def test_verify_accepts_everything_where_p_is_q():
    p = distribution(random_logits(1000, 4, 50), temperature=1.0)
    draft = sample(p[:, :3], torch.rand(1000, 3))
    u = torch.full((1000, 4), LAST_BELOW_1, dtype=torch.float64)
    accepted, _ = verify(p, p[:, :3], draft, u)
    assert (accepted == 3).all()


def test_verify_without_a_draft_is_sampling_from_p():
    p = random_tables(3, 2, temperature=1.0)[1]  # four rows
    u = torch.tensor([0.0, 0.3, 0.6, LAST_BELOW_1], dtype=torch.float64)
    nothing = torch.zeros(4, 0, dtype=torch.long)
    accepted, following = verify(p[:, None], p[:, None][:, :0], nothing, u[:, None])
    assert accepted.tolist() == [0, 0, 0, 0]
    assert torch.equal(following, sample(p, u))


def test_verify_stops_at_the_first_rejection():
    p, q = torch.eye(4)[[0, 1, 2, 3]], torch.eye(4)[[0, 3, 2]]  # they differ at the second place
    accepted, following = verify(p, q, torch.tensor([0, 3, 2]), torch.zeros(4).double())
    assert (accepted.item(), following.item()) == (1, 1)


def test_verify_never_accepts_what_the_target_cannot_say():
    p, q = torch.tensor([[0.0, 1.0], [0.5, 0.5]]), torch.tensor([[0.5, 0.5]])
    accepted, following = verify(p, q, torch.tensor([0]), torch.zeros(2).double())
    assert (accepted.item(), following.item()) == (0, 1)


def test_the_residual_is_a_law_even_where_nothing_is_left():
    p = random_tables(1, 2, temperature=1.0)[1]
    q = torch.cat([p[:2], random_tables(2, 2, temperature=1.0)[1][2:]])
    rest = residual(p, q)
    assert torch.equal(rest[:2], p[:2])
    torch.testing.assert_close(rest.sum(-1), torch.ones(4))
    assert (rest[2:][q[2:] >= p[2:]] == 0).all()


# ----------------------------------------------------------------------- distributions and samples


def random_logits(*shape) -> torch.Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_distributions_are_float32_and_sum_to_one(name, dtype):
    p = distribution(random_logits(3, 5, 50).to(dtype), **SAMPLING[name])
    assert p.dtype == torch.float32 and (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(3, 5))


def test_temperature_zero_is_the_first_choice():
    logits = random_logits(20, 50)
    p = distribution(logits, temperature=0.0, top_k=3, top_p=0.5)
    assert torch.equal(p.argmax(-1), logits.argmax(-1))
    assert torch.equal(p, torch.eye(50)[logits.argmax(-1)])


def test_temperature_divides_the_logits():
    logits = random_logits(20, 50)
    torch.testing.assert_close(distribution(logits, 0.7), (logits / 0.7).softmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-20, 1e-40, 5e-324])
def test_a_tiny_temperature_is_nearly_greedy(temperature):
    logits = 1000 * random_logits(20, 50)
    p = distribution(logits, temperature)
    assert torch.equal(p, distribution(logits, 0.0))


@pytest.mark.parametrize("k", [1, 2, 7, 49])
def test_top_k_keeps_the_k_likeliest_in_proportion(k):
    logits = random_logits(20, 50)
    p, whole = distribution(logits, 1.0, top_k=k), distribution(logits, 1.0)
    assert ((p > 0).sum(-1) == k).all()
    kept = torch.where(p > 0, whole, 0.0)
    torch.testing.assert_close(p, kept / kept.sum(-1, keepdim=True))
    assert (whole.masked_fill(p > 0, 0).amax(-1) <= whole.masked_fill(p == 0, 1).amin(-1)).all()


@pytest.mark.parametrize("k", [None, 0, 50, 51, 10**9])
def test_top_k_without_effect(k):
    logits = random_logits(20, 50)
    assert torch.equal(distribution(logits, 1.0, top_k=k), distribution(logits, 1.0))


@pytest.mark.parametrize("top_p", [1e-50, 1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p):
    logits = random_logits(20, 50)
    whole = distribution(logits, 1.0)
    for row, kept in zip(whole, distribution(logits, 1.0, top_p=top_p)):
        chosen = row[kept > 0].sort().values
        assert chosen.sum() > top_p - 1e-5  # it reaches it, and not without its least member
        assert chosen[1:].sum() < top_p + 1e-5
        assert len(chosen) == 50 or row[kept == 0].max() <= chosen[0]
        torch.testing.assert_close(kept[kept > 0], row[kept > 0] / chosen.sum())


def test_top_p_takes_the_first_of_ties():
    p = distribution(torch.zeros(2, 4), 1.0, top_p=0.5)
    assert p.tolist() == [[0.5, 0.5, 0.0, 0.0]] * 2


def test_exact_ties_break_alike_at_temperature_zero():
    """One row or many, of any dtype: the first of the equals. Greedy decoding depends on it."""
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 2.0])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for shape in ((5,), (1, 5), (7, 5), (2, 3, 5)):
            p = distribution(logits.to(dtype).expand(shape), temperature=0.0)
            assert torch.equal(p, torch.eye(5)[1].expand(shape))


@pytest.mark.parametrize("u", [0.0, 1e-300, 0.5, LAST_BELOW_1])
def test_sample_never_returns_the_impossible(u):
    p = distribution(random_logits(200, 50), 1.0, top_k=3)
    p = torch.cat([p, torch.eye(50), p / 3, p * 3])  # first, last, and sums that are not quite one
    token = sample(p, torch.full((len(p),), u, dtype=torch.float64))
    assert (p.gather(-1, token[:, None]) > 0).all()


def test_sample_follows_p():
    p = random_tables(4, 1, vocab=20, temperature=1.0)[0]
    u = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts = sample(p.expand(len(u), 20), u).bincount(minlength=20)
    assert chi_square_p_value(counts, p) > FALSE_ALARM
    assert chi_square_p_value(counts, p**0.95) < FALSE_ALARM


@pytest.mark.parametrize("vocab", [5, BLOCK - 1, BLOCK, 3 * BLOCK, 1000])
def test_sample_many_is_sample(vocab):
    """Both cut the same line at u; where a block has no chance, too."""
    p = distribution(random_logits(300, vocab), 1.0, top_k=7)
    for u in (
        torch.rand(300, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        0.0,
    ):
        u = torch.zeros(300, dtype=torch.float64) + u
        assert torch.equal(sample_many(p, u), sample(p, u))
    token = sample_many(p, torch.full((300,), LAST_BELOW_1, dtype=torch.float64))
    assert (p.gather(-1, token[:, None]) > 0).all()


def test_sample_of_a_one_hot_row_needs_no_luck():
    token = sample(torch.eye(6), torch.linspace(0, LAST_BELOW_1, 6, dtype=torch.float64))
    assert token.tolist() == list(range(6))
