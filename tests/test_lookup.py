"""Copies: found where they are, judged as named tokens, and a head that was not asked misses nothing.

Nothing that a copy holds can change the text, as long as it is judged by `match`. So the law is
enumerated over whole cycles of copies and drawn chains, and with a copy that is judged as if the
head had drawn it. What no text would show is compared with a slow search, and with a head that
reads everything at once.
"""

import itertools
import random
from functools import cache

import pytest
import torch
from toys import (
    FALSE_ALARM,
    LETTERS,
    Recorder,
    ScriptedHead,
    ScriptedTarget,
    chi_square_p_value,
    draft_chain,
    known_text,
    law_of_text,
    random_prompts,
    random_tables,
    rest_of,
    tiny_head,
    tiny_target,
    verdicts,
    with_sizes,
)

from drafts import LONGEST, Chain, CopyFirst, GrowingTree, Known, Lookup, fixed_tree, plan_draft
from plumbing.cli import UserError
from plumbing.show import trace_lines
from sampling import Sampler, acceptance_probability, residual
from speculate import SpeculateConfig, choose_draft, generate, match

CPU = torch.device("cpu")
TREE = fixed_tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)), CPU)
PARTNERS = {"chain": Chain(4), "fixed tree": TREE, "growing tree": GrowingTree(12, 4, 3, CPU)}


def text_of(tokens: list[int]) -> Known:
    return known_text(None, torch.tensor([tokens]), torch.zeros(1, len(tokens) - 1, 1))


def copied(tokens: list[int], match: int, length: int, depth: int = 100) -> list[int]:
    draft = Lookup(match, length).draft(text_of(tokens), min(depth, length), Sampler(CPU))
    assert draft.tokens[0] == tokens[-1] and draft.q is None
    assert draft.shape.parents.tolist() == [0, *range(len(draft.tokens) - 1)]
    return draft.tokens[1:].tolist()


# ------------------------------------------------------------------------------------- the search


@pytest.mark.parametrize(
    "tokens, match, found",
    [
        ([1, 2, 3, 4, 5], 1, []),
        ([1, 2, 3, 1], 2, []),  # one token matches, two have to
        ([7, 5, 6, 7], 1, [5, 6, 7, 5]),  # at the very beginning, then on with its own
        ([1, 2, 9, 8, 7, 6, 1, 2], 2, [9, 8, 7, 6]),
        ([1, 2, 9, 1, 2, 8, 1, 2], 2, [8, 1, 2, 8]),  # the latest place
        ([3, 1, 2, 9, 9, 9, 4, 1, 2, 8, 3, 1, 2], 1, [9, 9, 9, 4]),  # the longest match
        ([5, 5], 1, [5, 5, 5, 5]),  # the shortest text; it overlaps its own end
        ([1, 2, 1, 2, 1, 2], 2, [1, 2, 1, 2]),
    ],
    ids=str,
)
def test_what_followed_the_longest_and_latest_match_is_copied(tokens, match, found):
    assert copied(tokens, match, 4) == found
    assert copied(tokens, match, 4, depth=2) == found[:2]


@pytest.mark.parametrize("least", range(1, LONGEST + 1))
def test_the_index_finds_what_a_search_through_the_whole_text_finds(least):
    """Also when the text grows by several tokens, and when nobody has asked for a while."""
    rng, found = random.Random(least), 0
    for _ in range(30):
        text = [rng.randrange(3) for _ in range(rng.randrange(1, 5))]
        known = text_of(text)
        for _ in range(30):
            new = [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
            text += new
            known.add(new, torch.tensor(new), torch.zeros(1, len(new), 1))
            if rng.random() < 0.5:
                continue
            ends = [
                end
                for n in range(LONGEST, least - 1, -1)
                for end in range(len(text) - 1, n - 1, -1)
                if text[end - n : end] == text[-n:]
            ]
            assert known.stood_before(least) == (ends[0] if ends else None)
            found += bool(ends)
    assert found > 50


def test_each_token_is_entered_once():
    """A search costs as much at the end of a long text as at its beginning."""
    known = text_of([1, 2, 3])
    entered = []
    known.after = type(
        "Noted", (dict,), {"__setitem__": lambda self, *pair: entered.append(pair)}
    )()
    for i in range(50):
        known.add([i], torch.tensor([i]), torch.zeros(1, 1, 1))
        known.stood_before(1)
        known.stood_before(1)
    assert len(entered) == len(set(entered)) <= LONGEST * len(known.tokens)


# ------------------------------------------------------------------------- greedy, token by token


@pytest.fixture(scope="module")
def target():
    return tiny_target(seed=2)


@pytest.fixture(scope="module")
def prompts(target):
    return random_prompts(target, (1, 2, 7, 22, 23))


@pytest.fixture(scope="module")
def trained(target):
    """trained(kind, knows): a head trained for a moment, once for all tests."""
    return cache(lambda kind, knows=(): tiny_head(kind, 1, target, steps=60, knows=knows))


def assert_greedy_text_is_the_targets_own(target, prompts, head, plan):
    """To the window's end and to every stop token; the tokens copied and those accepted of them."""
    counts = {"copied": 0, "accepted": 0, "drafted": 0}

    def note(cycle):
        counts[cycle.draft.source] += len(cycle.draft.tokens) - 1
        if cycle.draft.source == "copied":
            counts["accepted"] += cycle.accepted

    for prompt in prompts:
        whole = generate(target, prompt, 100).tokens
        assert len(prompt) + len(whole) == target.config.context
        for stop in (None, *sorted(set(whole))):
            expected = whole[: whole.index(stop) + 1] if stop in whole else whole
            request = dict(head=head, plan=plan, stop_token=stop, on_cycle=note)
            result = generate(target, prompt, 100, **request)
            assert result.tokens == expected
            assert sum(result.produced) == len(expected) - 1
    return counts


@pytest.mark.parametrize("match", [1, 2, 4])
def test_greedy_text_by_copies_alone_is_the_targets_own(target, prompts, match):
    counts = assert_greedy_text_is_the_targets_own(target, prompts, None, Lookup(match, 5))
    assert counts["drafted"] == 0 < counts["accepted"] < counts["copied"]


SCRIPT = [3, 1, 4, 5, 9, 3, 1, 4, 5, 9, 2, 6]


@pytest.mark.parametrize("stop, accepted", [(4, 1), (5, 2), (9, 3), (2, 3)])
def test_a_stop_token_ends_the_text_within_a_copy_and_after_it(stop, accepted):
    """The prompt has it too, where it ends nothing."""
    cycles, prompt = [], SCRIPT[:6]
    request = dict(plan=Lookup(2, 3), stop_token=stop, on_cycle=cycles.append)
    result = generate(ScriptedTarget(SCRIPT), prompt, 6, **request)
    assert result.tokens == SCRIPT[6 : SCRIPT.index(stop, 6) + 1]
    assert [cycle.accepted for cycle in cycles] == [0, accepted]
    assert result.uncut_cycles == (stop == 2)


@pytest.mark.parametrize("knows", [(), (0, 2, 3, 5, 7, 8, 11)], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize("partner", PARTNERS)
def test_greedy_text_by_copies_beside_a_head_is_the_targets_own(
    target, prompts, trained, kind, partner, knows
):
    plan = CopyFirst(Lookup(2, 6), PARTNERS[partner])
    counts = assert_greedy_text_is_the_targets_own(target, prompts, trained(kind, knows), plan)
    assert counts["accepted"] > 0 and counts["drafted"] > 0


def test_generate_copies_without_any_head(target, prompts):
    plain, cycles = generate(target, prompts[1], 100), []
    result = generate(target, prompts[1], 100, lookup=1, on_cycle=cycles.append)
    assert result.tokens == plain.tokens and len(result.produced) < len(plain.produced)
    assert {cycle.draft.source for cycle in cycles[1:-1]} == {"copied"}
    for lookup in (-1, LONGEST + 1):
        with pytest.raises(UserError, match="lookup"):
            generate(target, prompts[1], 4, lookup=lookup)
    with pytest.raises(UserError, match="gamma"):
        generate(target, prompts[1], 4, lookup=1, gamma=0)


# -------------------------------------------------------------------- a head that has been waiting


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize("partner", PARTNERS)
def test_a_head_drafts_after_a_backlog_as_one_that_reads_the_text_at_once(
    target, prompts, trained, kind, partner
):
    class Checked(Recorder):
        backlogs = []

        def absorb(self, state, tokens, hidden):
            self.backlogs.append(tokens.shape[1])
            super().absorb(state, tokens, hidden)
            fresh = self.head.start(target.config.context)
            self.head.absorb(fresh, torch.tensor([self.tokens]), torch.stack(self.hidden)[None])
            n = min(4, target.config.context - len(self.tokens) - 1)
            (tokens, logits), (others, expected) = (
                draft_chain(self.head, s, n) for s in (state, fresh)
            )
            assert torch.equal(tokens, others)
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)

    plan, most = CopyFirst(Lookup(1, 3), PARTNERS[partner]), 0
    for prompt in prompts[:3]:
        head = Checked(trained(kind))
        text = prompt + generate(target, prompt, 100, head=head, plan=plan).tokens
        assert head.tokens == text[1 : len(head.tokens) + 1]
        most = max(most, *head.backlogs[1:], 0)
    assert most > 4 + 1  # of more than one cycle


def test_a_head_that_is_not_needed_reads_nothing(target, prompts, trained):
    head, reads, cycles = Recorder(trained("eagle")), [], []
    head.absorb = lambda state, tokens, hidden: (
        reads.append(len(cycles)),
        Recorder.absorb(head, state, tokens, hidden),
    )
    plan = CopyFirst(Lookup(1, 4), Chain(3))
    generate(target, prompts[2], 100, head=head, plan=plan, on_cycle=cycles.append)
    drafted = [i for i, cycle in enumerate(cycles) if i and cycle.draft.source == "drafted"]
    assert reads == [i for i in drafted if len(cycles[i].draft.tokens) > 1]
    assert 0 < len(reads) < len(cycles) - 2


# ----------------------------------------------------------------------------- the law, enumerated

VOCAB, WRITTEN = 4, 3
PROMPT = [0, 1, 2, 3, 0, 1]


def as_named(p, tokens, shape):
    """All that can come of copied `tokens` by `match`: (accepted, {next token: probability})."""
    for choice in itertools.product(range(VOCAB), repeat=len(p)):
        probability = torch.stack([row[x] for row, x in zip(p, choice)]).prod()
        if probability > 0:
            node, following = match(tokens, shape, torch.tensor(choice))
            yield node.item(), {following.item(): probability}


def as_drawn(q):
    """By a wrong rule: each copied token is judged as if the head had drawn it from its q."""

    def outcomes(p, tokens, shape):
        reach = 1.0
        for i, x in enumerate(tokens[1:].tolist()):
            accepted = acceptance_probability(p[i][x], q[i][x].double())
            yield i, dict(enumerate(reach * (1 - accepted) * residual(p[i], q[i].double())))
            reach = reach * accepted
        yield len(tokens) - 1, dict(enumerate(reach * p[-1]))

    return outcomes


def law_by_cycles(p, q, plan, judge=as_named) -> torch.Tensor:
    """The law of the first tokens, the first by prefill, the others by as many cycles as it takes.

    p, q: tables of target and head. Where `plan` copies nothing a chain is drawn from q.
    """
    law = torch.zeros([VOCAB] * WRITTEN, dtype=torch.float64)

    def go_on(text: tuple, probability) -> None:
        if len(text) == WRITTEN:
            law[text] += probability
            return
        depth, begun = min(plan.depth, WRITTEN - len(text) - 1), len(text)
        draft = plan.draft(text_of([*PROMPT, *text]), depth, None) if depth else None
        if draft is not None and len(draft.tokens) > 1:
            words = draft.tokens[1:].tolist()
            rows = [p[begun + i][(*text, *words[:i])].double() for i in range(len(words) + 1)]
            for accepted, following in judge(rows, draft.tokens, draft.shape):
                for x, chance in following.items():
                    go_on((*text, *words[:accepted], x), probability * chance)
            return
        tables = [table[text] for table in p[begun : begun + depth + 1]]
        for words, accepted, following in verdicts(tables, [t[text] for t in q[begun:][:depth]]):
            for x, chance in enumerate(following):
                if chance > 0:
                    go_on((*text, *words[:accepted], x), probability * chance)

    for x, chance in enumerate(p[0].double()):
        go_on((x,), chance)
    return law


@pytest.mark.parametrize(
    "sampling", [dict(temperature=1.0), dict(temperature=0.7, top_k=3)], ids=str
)
@pytest.mark.parametrize("match", [1, 2, 3])
def test_text_of_copies_and_drawn_chains_has_exactly_the_targets_law(match, sampling):
    p, q = (random_tables(seed, WRITTEN, VOCAB, **sampling) for seed in (1, 2))
    assert (law_by_cycles(p, q, Lookup(match, 3)) - rest_of(p)).abs().max() < 1e-6


def test_a_copy_that_is_judged_as_drawn_from_q_is_seen():
    p, q = (random_tables(seed, WRITTEN, VOCAB, temperature=1.0) for seed in (1, 2))
    rows = [q[1][0], q[2][0, 0]]
    law = law_by_cycles(p, q, Lookup(1, 3), as_drawn(rows))
    assert (law - rest_of(p)).abs().sum() / 2 > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("wrong", [False, True])
def test_sampled_text_with_copies_has_the_targets_law(wrong, monkeypatch):
    """In the decoder itself; `wrong`: a copy is accepted whatever the target says."""
    target = tiny_target(seed=7, vocab=5, context=12, layers=1, width=8, spread=0.6)
    head, prompt = tiny_head("eagle", 1, target), [0, 1, 2, 0, 1]
    if wrong:

        def agreeable(tokens, shape, choice):
            return torch.tensor(len(tokens) - 1), choice[-1]

        monkeypatch.setattr("speculate.match", agreeable)
    law, copies = law_of_text(target, prompt, 4, temperature=1.0), 0
    counts = torch.zeros(len(law), dtype=torch.long)

    def note(cycle):
        nonlocal copies
        copies += cycle.draft.source == "copied" and len(cycle.draft.tokens) > 1

    plan = CopyFirst(Lookup(1, 2), Chain(2))
    for seed in range(2000):
        request = dict(head=head, plan=plan, temperature=1.0, seed=seed, on_cycle=note)
        cell = 0
        for token in generate(target, prompt, 4, **request).tokens:
            cell = cell * 5 + token
        counts[cell] += 1
    assert copies > 500
    assert (chi_square_p_value(counts, law) < FALSE_ALARM) == wrong


# ------------------------------------------------------------------------------ where it is used


@pytest.mark.parametrize(
    "asked, match",
    [
        (dict(), 3),
        (dict(temperature=1.0), 0),
        (dict(lookup=0), 0),
        (dict(lookup=2, temperature=1.0), 2),
        (dict(gamma=2, nodes=4), 3),
    ],
    ids=str,
)
def test_copies_are_made_where_validation_texts_say_so_or_the_user(target, asked, match):
    measured = with_sizes(tiny_head("eagle", 1, target))
    for head, expected in ((measured, match), (tiny_head("eagle", 1, target), asked.get("lookup"))):
        used, plan, words = choose_draft(SpeculateConfig(**asked), target, head, 0)
        assert used is head
        if expected:
            assert plan.lookup.match == expected and str(words).startswith("a copy of 8 where ")
        else:
            assert isinstance(plan, (Chain, GrowingTree))


@pytest.mark.parametrize("dear, answer", [(False, Chain), (True, Lookup)])
def test_a_conversation_drafts_what_is_fastest_here(target, dear, answer, monkeypatch):
    """On cores where a pass over a draft takes twice as long a head was used at a loss."""
    head, asked = with_sizes(tiny_head("eagle", 1, target)), []

    def costs(target, head, sizes, temperature):
        asked.append(temperature)
        passes = {n: 1.0 for n in (1, 2, 4, 8, 9)}
        return passes, {(g, t): 9.0 * g * dear for g in range(1, 9) for t in (False, True)}

    monkeypatch.setattr("costs.size_costs", costs)
    used, plan, words = choose_draft(SpeculateConfig(chat=True), target, head, 0)
    assert asked == [0.0] and words.endswith(", by measurement")
    plan = plan.plan if isinstance(plan, CopyFirst) else plan
    assert isinstance(plan, answer) and (used is None) == dear
    request = dict(chat=True, gamma=2)
    used, plan, words = choose_draft(SpeculateConfig(**request), target, head, 0)
    assert asked == [0.0] and str(words).endswith("else a chain of 2") and used is head


# ------------------------------------------------------------------------------- how it is told


def test_the_trace_tells_where_a_draft_came_from_and_shows_no_q_of_a_copy():
    script = [3, 1, 4, 3, 1, 4, 5, 9, 3, 1, 4, 2]
    cycles = []
    target, head = ScriptedTarget(script), ScriptedHead(script)
    plan = CopyFirst(Lookup(2, 3), Chain(2))
    generate(target, script[:4], 8, head=head, plan=plan, on_cycle=cycles.append)
    first, *copied, last = trace_lines(1, cycles[1], LETTERS)
    assert first.startswith("cycle 1: copied 3, accepted 1, wrote 2; ")
    assert all("p 1.0" in line and " q " not in line for line in [copied[0], last])
    assert not any(" q " in line for line in copied)
    first, *drafted, last = trace_lines(2, cycles[2], LETTERS)
    assert first.startswith("cycle 2: drafted 2, accepted 2, wrote 3; ")
    assert all(" q 1.0" in line for line in drafted)
    assert "copied 1 (no room for more)" in trace_lines(3, cycles[3], LETTERS)[0]

    cycles.clear()
    generate(target, script[:4], 8, plan=Lookup(3, 3), on_cycle=cycles.append)
    assert "nothing to copy, wrote 1" in trace_lines(1, cycles[1], LETTERS)[0]


def test_a_plan_says_what_it_is(target, trained):
    head = trained("eagle")
    assert str(plan_draft(head, 3, 0, target)) == "a chain of 3"
    assert str(plan_draft(head, 3, 9, target)) == "a tree of 9 tokens, at most 3 deep"
    both = str(plan_draft(head, None, 0, target, lookup=2))
    assert both == "a copy of 8 where 2 tokens match, else a chain of 4"
