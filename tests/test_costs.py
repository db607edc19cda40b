"""The cost model chooses the size of drafts and explains speedups: a slip in it misleads both."""

import pytest
import torch
from toys import tiny_head, tiny_target, with_sizes

from costs import (
    ROUNDS,
    Size,
    best_size,
    expected_tau,
    fastest,
    isolated_costs,
    reckon,
    size_costs,
    taus_of,
    usual_lookup,
)
from drafts import fixed_tree, plan_draft
from plumbing.cli import UserError
from targets.loading import choose_dtype

CPU = torch.device("cpu")


class Recorded:
    """A head of which only its validation record is of interest."""

    max_draft, autoregressive = None, True

    def __init__(self, ranks, mass=None, alpha=(0.5, 0.4)):
        record = {"ranks": ranks, "mass": mass or ranks}
        record |= {f"alpha_{i + 1}": value for i, value in enumerate(alpha)}
        self.training_record = {"valid": record}


def known(taus: dict) -> dict:
    """As `taus_of` has them, of sizes (gamma, nodes) without copies."""
    return {(*size, 0): (tau, 0.0) for size, tau in taus.items()}


SIZES = {(g, 0): 1 + 0.5 * g for g in (1, 2, 4, 8)} | {(4, n): 3.2 for n in (8, 16, 31)}


def costs(per_token: float, per_step: float) -> tuple[dict, dict]:
    """A target whose pass costs 1 + `per_token` for each token beyond the first, and drafting."""
    passes = {n: 1 + per_token * (n - 1) for n in (1, 2, 4, 8, 16, 32)}
    return passes, {(g, tree): per_step * g for g in (1, 2, 4, 8) for tree in (False, True)}


def test_a_perfect_head_is_worth_the_longest_chain():
    best = fastest(
        known({(g, 0): 1.0 + g for g in (1, 2, 4, 8)} | {(4, 8): 5.0}), *costs(0.01, 0.1)
    )
    assert (best.gamma, best.nodes, best.tau) == (8, 0, 9.0)
    assert best.speedup == pytest.approx(9 / (1 + 0.08 + 0.8))


def test_a_useless_head_is_worth_the_least_draft():
    assert fastest(known(dict.fromkeys(SIZES, 1.0)), *costs(0.01, 0.1))[:2] == (1, 0)


def test_second_guesses_make_a_tree_worth_it_if_tokens_are_cheap():
    taus = known({(1, 0): 1.5, (2, 0): 1.8, (4, 0): 1.9, (4, 8): 2.3, (4, 31): 2.5})
    assert fastest(taus, *costs(0.001, 0.01))[:2] == (4, 31)
    assert fastest(taus, *costs(0.2, 0.01)).nodes == 0


def test_costs_between_the_measured_passes_are_interpolated():
    size = fastest(known({(2, 0): 2.0}), *costs(0.1, 0.3))  # a pass over 3 tokens: 1 + 2 * 0.1
    assert (size.c_verify, size.c_draft) == (pytest.approx(1.2), pytest.approx(0.6))


def test_a_pass_over_more_tokens_is_never_taken_for_cheaper():
    """It was measured so once, by noise, and a tree chosen that was 6 % slower than the chain."""
    _, drafts = costs(0.1, 0.1)
    size = fastest(known({(4, 0): 2.0}), {1: 1.0, 2: 1.3, 4: 1.4, 8: 0.9}, drafts)
    assert size.c_verify == pytest.approx(1.4)


def test_copies_cost_what_their_cycles_cost():
    """Half of the cycles copy: no draft, and a pass over 9 tokens; without a head the rest is plain."""
    passes, drafts = costs(0.1, 0.3)
    taus = {
        (4, 0, 0): (2.0, 0.0),
        (4, 0, 3): (3.0, 0.5),
        (0, 0, 3): (2.5, 0.25),
        (0, 0, 0): (1.0, 0.0),
    }
    beside, alone = (reckon(size, taus[size], passes, drafts) for size in ((4, 0, 3), (0, 0, 3)))
    assert (beside.c_verify, beside.c_draft) == (pytest.approx(1.6), pytest.approx(0.6))
    assert (alone.c_verify, alone.c_draft) == (pytest.approx(1.2), 0.0)
    assert reckon((0, 0, 3), (2.5, 0.25), passes, drafts, 3).c_verify == pytest.approx(1.075)
    assert reckon((0, 0, 0), (1.0, 0.0), passes, drafts).speedup == 1.0
    assert fastest(taus, passes, drafts) == alone
    assert str(alone).startswith(
        "a copy of 8 where 3 tokens match, else nothing (expected: tau 2.50"
    )
    assert str(beside).startswith("a copy of 8 where 3 tokens match, else a chain of 4 (expected")


def test_the_taus_are_those_of_the_nearer_temperature():
    head = with_sizes(tiny_head("eagle", 1, tiny_target()))
    assert taus_of(head, 0.0)[4, 0, 0] == taus_of(head, 0.3)[4, 0, 0] == (2.6, 0.0)
    assert taus_of(head, 0.7)[4, 0, 0] == taus_of(head, 2.0)[4, 0, 0] == (1 + 2.6 / 4, 0.0)
    assert taus_of(head, 0.0)[3, 8, 3] == (2.5, 0.5)
    assert [usual_lookup(head, temperature) for temperature in (0.0, 0.3, 0.5, 1.0)] == [3, 3, 0, 0]
    assert usual_lookup(tiny_head("eagle", 1, tiny_target()), 0.0) == 0


CHAINS, TREES = {(g, 0) for g in range(1, 9)}, {(2, 4), (3, 8)}


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize(
    "gamma, nodes, lookup, possible",
    [
        ("auto", 0, 0, CHAINS),
        (3, "auto", 0, {(1, 0), (2, 0), (3, 0), (2, 4), (3, 8)}),
        ("auto", "auto", 0, CHAINS | TREES),
        ("auto", "auto", 3, CHAINS | TREES),
        ("auto", "auto", "auto", CHAINS | TREES | {(0, 0)}),
        ("auto", 8, 0, {(3, 8)}),
        ("auto", 8, "auto", {(3, 8)}),
        (2, 0, "auto", {(2, 0)}),
        ("auto", "auto", 2, CHAINS | TREES),
    ],
    ids=str,
)
def test_a_size_is_chosen_among_those_that_were_measured(
    kind, gamma, nodes, lookup, possible, monkeypatch
):
    monkeypatch.setattr("costs.SECONDS", 0.0)
    target = tiny_target()
    head = with_sizes(tiny_head(kind, 1, target))
    head.training_record = {"valid": {"ranks": [[0.5, 0.3, 0.1]] * 4}}
    size = best_size(target, head, gamma, nodes, lookup=lookup)
    assert size[:2] in possible
    assert size.lookup in ((0, 3) if lookup == "auto" else (lookup,))
    unmeasured = lookup == 2  # tau is then that of the head alone
    assert size.tau == taus_of(head, 0)[(*size[:2], 0 if unmeasured else size.lookup)][0]
    plan_draft(head if size.gamma else None, size.gamma or None, size.nodes, target, size.lookup)
    assert size.c_verify > 0 and f"{size.speedup:.2f}x" in str(size)
    assert (size.c_draft > 0) == (size.gamma > 0)


def test_where_a_head_costs_more_than_it_brings_it_drafts_nothing(monkeypatch):
    target = tiny_target()
    head = with_sizes(tiny_head("eagle", 1, target))

    def dear(target, head, sizes, temperature):
        passes, _ = costs(0.0, 0.0)
        return passes, {(g, tree): 9.0 * g for g in range(1, 9) for tree in (False, True)}

    monkeypatch.setattr("costs.size_costs", dear)
    assert best_size(target, head, "auto", "auto", lookup="auto")[:3] == (0, 0, 3)
    assert best_size(target, head, "auto", "auto", lookup=0)[:3] == (1, 0, 0)
    head.sizes["greedy"][-1][3] = 0.9
    size = best_size(target, head, "auto", "auto", lookup="auto")
    assert size[:3] == (0, 0, 0) and str(size).startswith("nothing (expected: tau 1.00")


def test_tau_is_reckoned_from_what_decoding_will_do():
    head = Recorded([[0.8, 0.1], [0.6, 0.1]], mass=[[0.3, 0.2], [0.3, 0.2]], alpha=(0.5, 0.4))
    assert expected_tau(head, 3, 0, 0.0) == pytest.approx(1 + 0.8 + 0.48 + 0.288)
    assert expected_tau(head, 3, 0, 1.0) == pytest.approx(1 + 0.5 + 0.2 + 0.08)
    assert expected_tau(head, 1, 2, 0.0) == pytest.approx(1 + 0.8 + 0.1)
    assert expected_tau(head, 1, 2, 1.0) == pytest.approx(1 + 0.3 + 0.2)


def test_a_sampled_tree_is_reckoned_by_mass_in_the_shape_that_will_be_drafted():
    """A fixed tree is that of the best ranks at any temperature; a growing one finds its own."""
    head = Recorded([[0.8, 0.1], [0.6, 0.1]], mass=[[0.3, 0.2], [0.3, 0.2]], alpha=(0.5, 0.4))
    assert expected_tau(head, 2, 2, 1.0) == pytest.approx(1 + 0.3 + 0.2)
    head.autoregressive = False
    assert expected_tau(head, 2, 2, 0.0) == pytest.approx(1 + 0.8 + 0.48)
    assert expected_tau(head, 2, 2, 1.0) == pytest.approx(1 + 0.3 + 0.09)
    assert expected_tau(head, 3, 0, 1.0) == pytest.approx(1 + 0.5 + 0.2 + 0.08)


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize(
    "gamma, nodes",
    [("auto", 0), (3, "auto"), ("auto", "auto"), ("auto", 4), ("auto", 100)],
    ids=str,
)
def test_a_size_is_chosen_that_can_be_drafted(kind, gamma, nodes, monkeypatch):
    monkeypatch.setattr("costs.SECONDS", 0.0)
    target = tiny_target()
    head = tiny_head(kind, 1, target)
    head.training_record = Recorded([[0.5, 0.3, 0.1]] * 4).training_record
    size = best_size(target, head, gamma, nodes)
    plan_draft(head, size.gamma, size.nodes, target)
    assert gamma == "auto" or size.gamma <= gamma
    assert nodes in ("auto", size.nodes)
    assert size.c_verify > 0 and size.c_draft > 0 and f"{size.speedup:.2f}x" in str(size)


@pytest.mark.parametrize("gamma, nodes", [(0, "auto"), ("auto", -1), ("auto", 500)], ids=str)
def test_what_cannot_be_drafted_is_not_measured_either(gamma, nodes):
    target = tiny_target()
    with pytest.raises(UserError):
        best_size(target, tiny_head("eagle", 1, target), gamma, nodes)


@pytest.mark.parametrize("context", [8, 12, 24])
def test_the_smallest_windows_are_measured_too(context, monkeypatch):
    monkeypatch.setattr("costs.SECONDS", 0.0)
    target = tiny_target(context=context)
    head = tiny_head("eagle", 1, target)
    head.training_record = Recorded([[0.5, 0.3, 0.1]] * 4).training_record
    choose_dtype("auto", target, CPU)
    for gamma, nodes in [("auto", "auto"), (300, "auto"), (300, 0)]:
        size = best_size(target, head, gamma, nodes)
        assert 1 <= size.gamma < context


def test_without_a_record_nothing_can_be_chosen(monkeypatch):
    monkeypatch.setattr("costs.SECONDS", 0.0)
    target = tiny_target()
    with pytest.raises(UserError, match="no record"):
        best_size(target, tiny_head("eagle", 1, target), "auto", 0)


def test_every_job_is_measured_and_leaves_its_cache_as_it_was():
    target = tiny_target()
    head = tiny_head("eagle", 1, target)
    plans = {
        "short": fixed_tree(((0,),), torch.device("cpu")),
        "tree": plan_draft(head, 3, 6, target),
    }
    methods = {name: (head, plan) for name, plan in plans.items()}
    measured = isolated_costs(target, methods, 12, turns=2)
    assert set(measured) == {"step", "passes", "backlog", "short", "tree"} and measured["step"] > 0
    assert [n for n, _ in measured["passes"]] == [1, 2, 4, 7]
    assert all(measured[name][phase] > 0 for name in plans for phase in ("draft", "verify"))
    passes, drafts = size_costs(target, head, [(1, 0, 0), (2, 0, 0), (2, 10, 0)])
    assert list(passes) == [1, 2, 4, 8, 11]
    assert set(drafts) == {(1, False), (2, False), (2, True)}
    passes, drafts = size_costs(target, head, [(0, 0, 0), (0, 0, 3)])  # copies of 8
    assert list(passes) == [1, 2, 4, 8, 9] and not drafts


def test_drafts_between_the_measured_depths_are_interpolated(monkeypatch):
    """More rounds of fewer drafts: a choice made from two rounds took trees that did not pay."""
    measured = []

    def drafting(bench, head, plan):
        return lambda: plan.depth

    def timed(bench, draft):
        measured.append(draft())
        return measured[-1] ** 2

    monkeypatch.setattr("costs.Bench.drafting", drafting)
    monkeypatch.setattr("costs.Bench.timed", timed)
    monkeypatch.setattr("costs.Bench.read", lambda bench, count: 1.0)
    monkeypatch.setattr("costs.SECONDS", 0.0)
    target = tiny_target()
    sizes = [(g, 0, 0) for g in range(1, 8)] + [(3, 9, 0), (5, 9, 0), (0, 0, 3)]
    _, drafts = size_costs(target, tiny_head("eagle", 1, target), sizes)
    assert sorted(set(measured)) == [1, 2, 3, 4, 5, 7] and measured.count(7) == ROUNDS
    chains = {1: 1, 2: 4, 3: 10, 4: 16, 5: 27, 6: 38, 7: 49}
    assert drafts == {(g, False): pytest.approx(s) for g, s in chains.items()} | {
        (3, True): 9,
        (5, True): 25,
    }


def test_a_plain_step_is_measured_after_a_plain_step(monkeypatch):
    """As in plain decoding: after anything else it takes longer, and drafts would look cheap."""
    read = [0]

    def cold_or_warm(bench, count: int) -> float:
        read.append(count)
        return 1.0 if read[-2] == count else 9.0

    monkeypatch.setattr("costs.Bench.read", cold_or_warm)
    target = tiny_target()
    passes, _ = size_costs(target, tiny_head("eagle", 1, target), [(2, 0, 0)])
    assert passes == {1: 1.0, 2: 9.0, 3: 9.0}


def test_a_size_says_what_it_is():
    assert str(Size(4, 0, 0, 3.0, 1.2, 0.3)).startswith("a chain of 4 (expected: tau 3.00")
    assert str(Size(4, 9, 0, 3.0, 1.2, 0.3)).startswith("a tree of 9 tokens, at most 4 deep (")


def test_the_dtype_is_the_one_measured_faster(monkeypatch):
    target = tiny_target().float()
    assert choose_dtype("float64", target, CPU)[0] == torch.float64
    for ratio, chosen in [(2.0, torch.float32), (0.8, torch.float32), (0.7, torch.bfloat16)]:

        def timed(bench, function, *arguments, ratio=ratio):
            function(*arguments)
            return ratio if bench.target.embed.weight.dtype == torch.bfloat16 else 1.0

        monkeypatch.setattr("costs.Bench.timed", timed)
        dtype, why = choose_dtype("auto", target, CPU)
        assert dtype == chosen and f"{ratio:.2f} times as long" in why
        assert ("not below 0.75" in why) == (ratio == 0.8)
        assert target.embed.weight.dtype == torch.float32  # measuring leaves it as it was
