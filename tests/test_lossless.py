"""Speculative decoding must not change what the target writes: not one token, not its law.

That is the whole promise, and it can be broken far from the acceptance rule: a cache rolled back by
one place too few, a stop token overlooked inside a draft, a head fed with the states of a rejected
draft. Greedy text is therefore compared token by token (in float64, where rounding cannot flip a
choice), sampled text by chi-square against the law computed from the target, and scripted models
force each way a cycle can end. That the head is fed rightly changes no token, only how many are
accepted, so it is compared with a head that reads the finished text at once.
"""

import math
import re
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from toys import (
    BYTES,
    FALSE_ALARM,
    LETTERS,
    Liar,
    Recorder,
    ScriptedHead,
    ScriptedTarget,
    chi_square_p_value,
    draft_chain,
    law_of_text,
    random_prompts,
    reference_text,
    spelt,
    tiny_head,
    tiny_target,
)

from drafts import Chain, Draft, GrowingTree, chain_shape, fixed_tree
from plumbing.cli import UserError
from plumbing.show import Printer, harmless, trace_lines
from sampling import Vocabulary
from speculate import Cycle, generate

PROMPT_LENGTHS = (1, 2, 7, 22, 23)  # of a context of 24
GAMMAS = (1, 2, 4, 8)
KINDS = ("medusa", "eagle")


@pytest.fixture(scope="module")
def target():
    return tiny_target(seed=2)


@pytest.fixture(scope="module")
def prompts(target):
    return random_prompts(target, PROMPT_LENGTHS)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=[1, 2, 3])
def layers(request):
    return request.param


@pytest.fixture(scope="module")
def trained(target):
    """trained(kind, layers): a head trained for a moment, once for all tests."""
    return cache(lambda kind, layers: tiny_head(kind, layers, target, steps=60))


@pytest.fixture(scope="module", params=["untrained", "trained"])
def head(request, kind, layers, target, trained):
    return trained(kind, layers) if request.param == "trained" else tiny_head(kind, layers, target)


# ------------------------------------------------------------------------ greedy, token by token


def test_plain_decoding_is_the_reference_loop(target, prompts):
    for prompt in prompts:
        expected = reference_text(target, prompt, target.config.context - len(prompt))
        assert generate(target, prompt, 100).tokens == expected
        assert generate(target, prompt, 3).tokens == expected[:3]


@pytest.mark.parametrize("gamma", GAMMAS)
def test_greedy_text_is_the_targets_own(target, head, gamma, prompts):
    """To the end of the window, which only the last cycles with shorter drafts can reach."""
    drafted = accepted = 0

    def count(cycle):
        nonlocal drafted, accepted
        drafted += len(cycle.draft.tokens) - 1
        accepted += cycle.accepted

    for prompt in prompts:
        expected = generate(target, prompt, 100).tokens
        result = generate(target, prompt, 100, head=head, gamma=gamma, on_cycle=count)
        assert result.tokens == expected
        assert len(prompt) + len(result.tokens) == target.config.context
        assert sum(result.produced) == len(result.tokens) - 1
    if head.trained:
        assert 0 < accepted < drafted  # else the grid would have shown nothing


def test_greedy_text_with_stop_tokens_is_the_targets_own(target, head, prompts):
    """Every token of the text is the stop token once: it is met in every place a cycle has."""
    places = set()

    def note(cycle):
        if stop_token in cycle.tokens:
            places.add("accepted" if cycle.accepted == len(cycle.tokens) else "the target's own")

    for prompt in prompts[:3]:
        whole = generate(target, prompt, 100).tokens
        for stop_token in set(whole):
            expected = whole[: whole.index(stop_token) + 1]
            assert generate(target, prompt, 100, stop_token=stop_token).tokens == expected
            result = generate(
                target, prompt, 100, head=head, gamma=4, stop_token=stop_token, on_cycle=note
            )
            assert result.tokens == expected
            assert sum(result.produced) == len(expected) - 1
    if head.trained:
        assert places == {"accepted", "the target's own"}


def test_a_limit_cuts_the_same_text(target, head, prompts):
    whole = generate(target, prompts[1], 100).tokens
    for limit in range(1, 12):
        result = generate(target, prompts[1], limit, head=head, gamma=4)
        assert result.tokens == whole[:limit]


def test_greedy_text_does_not_depend_on_the_seed(target, prompts):
    """Greedy decoding draws numbers too; they must not matter."""
    head = tiny_head("eagle", 1, target)
    texts = [generate(target, prompts[1], 20, head=head, seed=seed).tokens for seed in range(5)]
    assert all(text == texts[0] for text in texts)


# --------------------------------------------------------- heads that know a part of the vocabulary

PLANS = {
    "chain": Chain(4),
    "fixed tree": fixed_tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)), torch.device("cpu")),
    "growing tree": GrowingTree(12, 4, 3, torch.device("cpu")),
}


@pytest.fixture(scope="module")
def favourite(target, prompts) -> int:
    """The token that the target writes most often."""
    texts = [token for prompt in prompts for token in generate(target, prompt, 100).tokens]
    return max(set(texts), key=texts.count)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_greedy_text_has_the_tokens_that_the_head_does_not_know(
    target, kind, plan, prompts, favourite, without_favourite
):
    head, drafted, accepted = without_favourite(kind), set(), 0

    def note(cycle):
        nonlocal accepted
        drafted.update(cycle.draft.tokens[1:].tolist())
        accepted += cycle.accepted

    written = []
    for prompt in prompts:
        whole = generate(target, prompt, 100).tokens
        for stop in (None, favourite):
            expected = whole[: whole.index(stop) + 1] if stop in whole else whole
            request = dict(head=head, plan=plan, stop_token=stop, on_cycle=note)
            assert generate(target, prompt, 100, **request).tokens == expected
        written += whole
    assert favourite in written and accepted > 0
    assert drafted and drafted <= set(head.vocabulary.tokens.tolist())


@pytest.fixture(scope="module")
def without_favourite(target, favourite):
    """without_favourite(kind): a trained head of seven tokens, the target's favourite not there."""
    knows = tuple(token for token in range(target.config.vocab_size) if token != favourite)[::2]
    return cache(lambda kind: tiny_head(kind, 1, target, steps=60, knows=knows))


# ----------------------------------------------------------------------------- what the head is fed


# The path accepted in a tree lies scattered among its nodes: its states are not the first ones.
TREES = [dict(plan=PLANS["fixed tree"]), dict(plan=PLANS["growing tree"])]


def told(size) -> str:
    """The name of a size in a test's: alike in every process."""
    plan = size.get("plan") if isinstance(size, dict) else size
    return type(plan).__name__ if plan else f"chain of {size['gamma']}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("size", [dict(gamma=1), dict(gamma=3), dict(gamma=8), *TREES], ids=told)
def test_a_head_reads_the_text_and_the_states_before_each_token(
    target, kind, size, temperature, prompts, trained
):
    """The same tokens and states that a single pass over the finished text would give it."""
    recorder, out_of_place = Recorder(trained(kind, 2)), 0

    def note(cycle):
        nonlocal out_of_place
        out_of_place += cycle.path != list(range(len(cycle.path)))

    for prompt in prompts[:3]:
        recorder.tokens, recorder.hidden = [], []
        request = size | dict(temperature=temperature, seed=3, on_cycle=note)
        text = prompt + generate(target, prompt, 100, head=recorder, **request).tokens
        read = len(recorder.tokens)
        depth = size["plan"].depth if "plan" in size else size["gamma"]
        assert read >= len(text) - 3 - depth  # the last cycles' text is never read
        assert recorder.tokens == text[1 : read + 1]
        hidden = target(torch.tensor([text]))[0, :read]
        torch.testing.assert_close(torch.stack(recorder.hidden), hidden, rtol=0, atol=1e-10)
    if "plan" in size:  # else states in the order of the tree would have passed for the path's
        assert out_of_place > 0


@pytest.mark.parametrize("size", [dict(gamma=2), dict(gamma=4), *TREES], ids=told)
def test_a_head_drafts_as_one_that_reads_the_certain_text_at_once(
    target, kind, size, prompts, trained
):
    """And it does so again when asked again: a draft leaves nothing behind."""

    class Checked(Recorder):
        def absorb(self, state, tokens, hidden):
            super().absorb(state, tokens, hidden)
            fresh = self.head.start(target.config.context)
            self.head.absorb(fresh, torch.tensor([self.tokens]), torch.stack(self.hidden)[None])
            n = min(4, target.config.context - len(self.tokens) - 1)
            first, again, other = (draft_chain(self.head, s, n) for s in (state, state, fresh))
            for tokens, logits in (again, other):
                assert torch.equal(tokens, first[0])
                torch.testing.assert_close(logits, first[1], rtol=0, atol=1e-10)

    for prompt in prompts[:3]:
        generate(target, prompt, 100, head=Checked(trained(kind, 2)), **size)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("size", [dict(gamma=2), dict(gamma=4), *TREES], ids=told)
def test_eagles_state_is_that_of_the_certain_text_alone(target, layers, size, prompts, trained):
    """Cycles of drafting and rejecting leave no trace in its cache or its last guess."""

    class Checked(Recorder):
        checks = partial = 0

        def absorb(self, state, tokens, hidden):
            self.partial += 1 < tokens.shape[1] <= size.get("gamma", 4) and state.length > 0
            super().absorb(state, tokens, hidden)
            fresh = self.head.start(target.config.context)
            whole = torch.tensor([self.tokens]), torch.stack(self.hidden)[None]
            self.head.absorb(fresh, *whole)
            n = fresh.length
            assert n == state.length == len(self.tokens)
            pairs = [(state.feature, fresh.feature)]
            for name in ("keys", "values"):
                caches = getattr(state.cache, name), getattr(fresh.cache, name)
                pairs.append([cache[..., :n, :] for cache in caches])
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
            self.checks += 1

    checks = partial = 0
    for prompt in prompts[:3]:
        head = Checked(trained("eagle", layers))
        generate(target, prompt, 100, head=head, **size)
        checks, partial = checks + head.checks, partial + head.partial
    assert checks > 10 and partial > 0  # some drafts were accepted in part


# --------------------------------------------------------------------- scripted: every way to end

SCRIPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]  # the prompt is its first two tokens


def scripted(wrong=(), **request):
    """The generation from SCRIPT[:2] and its cycles; the head errs at the positions `wrong`."""
    cycles = []
    request = {"max_new_tokens": 100, "gamma": 4} | request
    result = generate(
        ScriptedTarget(SCRIPT),
        SCRIPT[:2],
        head=ScriptedHead(SCRIPT, wrong),
        on_cycle=cycles.append,
        **request,
    )
    return result, cycles


@pytest.mark.parametrize("accepted", [0, 1, 2, 3, 4])
def test_a_mismatch_at_each_place_of_a_draft(accepted):
    # Position 2 is prefill's; the first cycle drafts positions 3, 4, 5 and 6.
    result, cycles = scripted(wrong=[3 + accepted])
    assert result.tokens == SCRIPT[2:]
    first = cycles[1]
    assert first.accepted == accepted
    assert first.tokens == SCRIPT[3 : 3 + accepted + 1]


def test_a_perfect_head_writes_gamma_plus_one_tokens_a_cycle():
    result, _ = scripted(max_new_tokens=11)
    assert result.tokens == SCRIPT[2:13]
    assert result.produced == [5, 5]
    assert result.acceptance_length == 5


def test_a_head_always_wrong_writes_one_token_a_cycle():
    result, _ = scripted(wrong=range(16))
    assert result.tokens == SCRIPT[2:]
    assert set(result.produced) == {1}
    assert result.acceptance_length == 1


def test_the_last_token_before_the_limit_is_not_drafted():
    """13 tokens: one by prefill, five by either of two whole cycles, one is left."""
    result, cycles = scripted(max_new_tokens=12)
    assert result.tokens == SCRIPT[2:14]
    assert [len(cycle.draft.tokens) - 1 for cycle in cycles] == [0, 4, 4, 0]
    assert result.produced == [5, 5, 1]
    assert result.uncut_cycles == 2  # the short one says nothing about the head
    assert result.acceptance_length == 5


def test_one_token_takes_no_cycle():
    result, cycles = scripted(max_new_tokens=1)
    assert result.tokens == SCRIPT[2:3]
    assert len(cycles) == 1 and result.produced == []
    assert math.isnan(result.acceptance_length) and math.isnan(result.tokens_per_second)


def test_a_stop_token_inside_an_accepted_run_ends_the_text_there():
    result, cycles = scripted(stop_token=5)  # at position 4, the second of the first draft
    assert result.tokens == SCRIPT[2:5]
    assert cycles[-1].tokens == SCRIPT[3:5]
    assert cycles[-1].accepted == 2
    assert result.uncut_cycles == 0


def test_a_stop_token_as_the_last_accepted_one_ends_the_text_there():
    result, cycles = scripted(stop_token=2)  # at position 6, the last of the first draft
    assert result.tokens == SCRIPT[2:7]
    assert cycles[-1].accepted == 4 == len(cycles[-1].tokens)


def test_a_stop_token_as_the_targets_own_ends_the_text():
    result, cycles = scripted(stop_token=6)  # at position 7, after a draft accepted whole
    assert result.tokens == SCRIPT[2:8]
    assert cycles[-1].accepted == 4 and len(cycles[-1].tokens) == 5
    assert result.uncut_cycles == 1


def test_a_stop_token_in_place_of_a_rejected_one_ends_the_text():
    result, _ = scripted(stop_token=5, wrong=[4])
    assert result.tokens == SCRIPT[2:5]
    assert result.produced == [2] and result.uncut_cycles == 1


def test_a_stop_token_that_is_drafted_and_rejected_ends_nothing():
    # The wrong guess at position 4 is 6, and the text's own 6 stands at position 7.
    result, _ = scripted(stop_token=6, wrong=[4])
    assert result.tokens == SCRIPT[2:8]


def test_a_stop_token_by_prefill_ends_the_text_at_once():
    result, cycles = scripted(stop_token=4)
    assert result.tokens == [4] and len(cycles) == 1


def test_a_stop_token_in_the_prompt_ends_nothing():
    assert scripted(stop_token=3)[0].tokens == SCRIPT[2:10]


# ------------------------------------------------------------------------------------- sampled text

WRITTEN = 4  # tokens per sample: 1 by prefill, then 3 by a cycle that drafts 2, or by several
CUT = dict(temperature=0.8, top_k=4, top_p=0.9)


@pytest.fixture(scope="module")
def sampled_target():
    return tiny_target(seed=7, vocab=5, context=8, layers=1, width=8, spread=0.6)


@pytest.fixture(scope="module")
def sampled_head(kind, sampled_target):
    return tiny_head(kind, 1, sampled_target, num_heads=2)


def sampled(target, head, samples: int, plan=None, **sampling) -> tuple[float, float]:
    """(p-value of the text against the target's exact law, share of the drafts accepted)."""
    vocab, drafted, accepted = target.config.vocab_size, 0, 0
    law = law_of_text(target, [0, 1], WRITTEN, **sampling)
    counts = torch.zeros(len(law), dtype=torch.long)

    def note(cycle):
        nonlocal drafted, accepted
        drafted += len(cycle.draft.tokens) - 1
        accepted += cycle.accepted

    for seed in range(samples):
        result = generate(
            target,
            [0, 1],
            WRITTEN,
            head=head,
            gamma=2,
            seed=seed,
            on_cycle=note,
            plan=plan,
            **sampling,
        )
        cell = 0
        for token in result.tokens:
            cell = cell * vocab + token
        counts[cell] += 1
    return chi_square_p_value(counts, law), accepted / max(1, drafted)


@pytest.mark.slow
def test_sampled_text_without_a_head_has_the_targets_law(sampled_target):
    p_value, _ = sampled(sampled_target, None, 3000, temperature=1.0)
    assert p_value > FALSE_ALARM


@pytest.mark.slow
def test_sampled_text_has_the_targets_law(sampled_target, sampled_head):
    p_value, accepted = sampled(sampled_target, sampled_head, 20_000, temperature=1.0)
    assert 0.2 < accepted < 0.8
    assert p_value > FALSE_ALARM


@pytest.mark.slow
def test_sampled_text_has_the_law_that_top_k_and_top_p_leave(sampled_target, sampled_head):
    p_value, accepted = sampled(sampled_target, sampled_head, 1500, **CUT)
    assert 0.2 < accepted < 0.8
    assert p_value > FALSE_ALARM


@pytest.fixture(scope="module")
def partial_head(kind, sampled_target):
    """A head that knows three of the five tokens, and not the likeliest one after [0, 1]."""
    likeliest = generate(sampled_target, [0, 1], 1).tokens[0]
    knows = tuple(token for token in range(5) if token != likeliest)[:3]
    return tiny_head(kind, 1, sampled_target, num_heads=2, knows=knows)


PARTIAL_PLANS = {
    "chain": Chain(2),
    "fixed tree": fixed_tree(((0,), (1,), (0, 0), (0, 1)), torch.device("cpu")),
    "growing tree": GrowingTree(4, 2, 3, torch.device("cpu")),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan, sampling",
    [
        ("chain", dict(temperature=1.0)),
        ("chain", CUT),
        ("fixed tree", dict(temperature=1.0)),
        ("growing tree", CUT),
    ],
    ids=str,
)
def test_sampled_text_has_the_targets_law_with_tokens_that_the_head_does_not_know(
    sampled_target, partial_head, plan, sampling
):
    plan = PARTIAL_PLANS[plan]
    p_value, accepted = sampled(sampled_target, partial_head, 1000, plan=plan, **sampling)
    assert 0.05 < accepted < 0.8
    assert p_value > FALSE_ALARM


def test_a_q_of_the_wrong_tokens_is_seen(sampled_target, partial_head, monkeypatch):
    """It would be, were places among the logits taken for the tokens themselves."""

    def misplaced(self, q):
        return F.pad(q, (0, self.whole - q.shape[-1]))

    monkeypatch.setattr(Vocabulary, "spread", misplaced)
    plan = PARTIAL_PLANS["chain"]
    p_value, _ = sampled(sampled_target, partial_head, 1000, plan=plan, temperature=1.0)
    assert p_value < FALSE_ALARM


def test_a_draft_that_misreports_its_q_is_seen(sampled_target, sampled_head):
    liar = Liar(Chain(2))
    p_value, _ = sampled(sampled_target, sampled_head, 1500, plan=liar, temperature=1.0)
    assert p_value < FALSE_ALARM


def test_the_seed_decides_the_text(target, prompts):
    head = tiny_head("eagle", 1, target)

    def text(seed):
        return generate(target, prompts[0], 100, head=head, temperature=1.0, seed=seed).tokens

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(None) != text(None)  # 23 tokens alike by chance: never


def test_sampling_leaves_torchs_own_generator_alone(target, prompts):
    before = torch.get_rng_state()
    generate(target, prompts[0], 5, temperature=1.0, seed=1)
    assert torch.equal(before, torch.get_rng_state())


# ------------------------------------------------------------------------------ what it reports


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_cycles_tell_what_was_written(target, kind, temperature, prompts, trained):
    cycles = []
    head = trained(kind, 1)
    request = dict(gamma=3, temperature=temperature, seed=0, on_cycle=cycles.append)
    result = generate(target, prompts[1], 100, head=head, **request)
    assert [t for cycle in cycles for t in cycle.tokens] == result.tokens
    assert [len(cycle.tokens) for cycle in cycles[1:]] == result.produced
    for cycle in cycles:
        n, vocab, draft = len(cycle.draft.tokens) - 1, target.config.vocab_size, cycle.draft
        assert (draft.q is None) == (temperature == 0 or n == 0)
        assert draft.q is None or draft.q.shape == (n, vocab)
        assert len(cycle.p) == len(cycle.q) == n and cycle.path[0] == 0
        assert len(cycle.u) == (n if temperature else 0)
        assert len(cycle.tokens) == cycle.accepted + 1 == len(cycle.path)
        assert cycle.tokens[:-1] == draft.tokens[cycle.path[1:]].tolist()
        assert all(q > 0 for q in cycle.q) and all(0 <= p <= 1 for p in cycle.p)
        assert all(cycle.p[node - 1] > 0 for node in cycle.path[1:])


@pytest.mark.parametrize("plan", [Chain(3), *(tree["plan"] for tree in TREES)], ids=told)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("knows", [(), (0, 2, 3, 5, 7, 8, 11)])
def test_the_figures_of_a_cycle_are_those_of_target_and_head(
    target, kind, plan, temperature, knows, prompts
):
    """p(x) and q(x) of every node, from passes over its own path alone: else a trace would lie."""
    head, cycles = tiny_head(kind, 2, target, knows=knows), []
    request = dict(head=head, plan=plan, temperature=temperature, seed=1, on_cycle=cycles.append)
    text = [*prompts[1], *generate(target, prompts[1], 12, **request).tokens]
    read = len(prompts[1])
    for cycle in cycles:
        draft, certain = cycle.draft, torch.tensor([text[: read + len(cycle.tokens)]])[:, :read]
        for node in range(1, len(draft.tokens)):
            path = draft.tokens[draft.shape.ancestors[node]][1:]  # down to the node itself
            before = torch.cat([certain[0], path[:-1]])
            p = target.lm_head(target(before[None])[0, -1]) / (temperature or 1)
            state = head.start(64)
            head.absorb(state, certain[:, 1:], target(certain[:, :-1]))
            q = head.expand(state)
            for token in path[:-1]:
                q = head.expand(state, token[None, None])
            q = q[0, 0] / (temperature or 1)
            index = head.vocabulary.indices_of(path[-1])
            assert cycle.p[node - 1] == pytest.approx(p.softmax(-1)[path[-1]].item(), rel=1e-4)
            assert cycle.q[node - 1] == pytest.approx(q.softmax(-1)[index].item(), rel=1e-4)
        read += len(cycle.tokens)


def test_times_add_up(target, prompts):
    result = generate(target, prompts[1], 100, head=tiny_head("eagle", 1, target))
    parts = result.draft_seconds, result.verify_seconds, result.other_seconds
    assert result.prefill_seconds > 0 and min(parts) > 0
    assert sum(parts) == pytest.approx(result.seconds)
    assert result.tokens_per_second == pytest.approx((len(result.tokens) - 1) / result.seconds)


@pytest.mark.parametrize(
    "request_",
    [
        dict(prompt_tokens=[]),
        dict(prompt_tokens=[1] * 24),
        dict(prompt_tokens=[1] * 25),
        dict(prompt_tokens=[0, 13]),
        dict(prompt_tokens=[0, -1]),
        dict(max_new_tokens=0),
        dict(max_new_tokens=-1),
        dict(gamma=0),
        dict(gamma=9),  # Medusa has 8 heads here
        dict(temperature=math.nan),
        dict(temperature=math.inf),
        dict(temperature=-1.0),
        dict(top_k=-1),
        dict(top_p=0.0),
        dict(top_p=1.5),
        dict(top_p=math.nan),
        dict(seed=-1),
        dict(seed=2**64),
    ],
    ids=str,
)
def test_an_impossible_request_is_refused_in_one_line(target, request_):
    head = tiny_head("medusa", 1, target)
    fine = dict(prompt_tokens=[1, 2], max_new_tokens=3, head=head, gamma=4)
    generate(target, **fine)
    with pytest.raises(UserError) as caught:
        generate(target, **(fine | request_))
    assert str(caught.value) and "\n" not in str(caught.value)


def test_eagle_may_draft_beyond_the_window(target, prompts):
    head = tiny_head("eagle", 1, target)
    result = generate(target, prompts[1], 100, head=head, gamma=1000)
    assert result.tokens == generate(target, prompts[1], 100).tokens


# --------------------------------------------------------------------------------- how it is shown


def test_harmless_text_cannot_command_a_terminal():
    shown = harmless("a\x1b[2J\r\x07\x9b\u202e\ufeff\x00b\n\tß 漢")
    assert shown == "a\\x1b[2J\\r\\x07\\x9b\\u202e\\ufeff\\x00b\n\tß 漢"


def test_the_printer_shows_characters_only_once_they_are_whole(capsys):
    text = "naïve – 漢字 🐨."
    printer, seen = Printer(BYTES, stops={256}), ""
    for n, byte in enumerate(text.encode(), 1):
        printer.write(byte, accepted=n % 2 == 0)
        written = capsys.readouterr().out
        assert "\ufffd" not in written and written in text
        seen += written
    assert seen == text
    printer.finish()
    assert capsys.readouterr().out == "\n"


def test_the_printer_shows_all_but_the_token_that_ends_a_text(capsys):
    """Whatever it spells: in a chat it is the end of a turn, and no part of what was said."""
    _, cycles = scripted(stop_token=5)
    printer = Printer(LETTERS, stops={5})
    for cycle in cycles:
        printer.show(cycle)
    assert capsys.readouterr().out == "eb"  # 4 by prefill, 1, and the 5 that ends the text


def test_the_printer_ends_in_the_middle_of_a_character(capsys):
    printer = Printer(BYTES, stops={256})
    for byte in "🐨".encode()[:2]:
        printer.write(byte, accepted=False)
    printer.finish()
    assert capsys.readouterr().out == "\ufffd\n"


def test_the_printer_escapes_control_characters(capsys):
    printer = Printer(BYTES, stops={256})
    for byte in b"a\x1b[2J\n":
        printer.write(byte, accepted=False)
    assert capsys.readouterr().out == "a\\x1b[2J\n"


def verdicts(lines: list[str]) -> list[str]:
    return [re.search(r"(accept|REJECT|dropped)", line)[0] for line in lines]


def test_the_trace_gives_each_verdict():
    _, cycles = scripted(wrong=[5])
    assert trace_lines(0, cycles[0], LETTERS)[0].endswith("'e' from the target's p  (p 1.000)")
    first, *drafted, last = trace_lines(1, cycles[1], LETTERS)
    assert first.startswith("cycle 1: drafted 4, accepted 2, wrote 3; draft ")
    assert verdicts(drafted) == ["accept", "accept", "REJECT", "dropped"]
    assert last == "  + 'j' the target's own choice  (p 1.000)"
    assert "nothing was drafted after" in trace_lines(2, cycles[2], LETTERS)[-1]


def test_the_trace_of_a_tree_shows_every_branch():
    plan = fixed_tree(((0,), (1,), (0, 0), (1, 0)), torch.device("cpu"))
    _, cycles = scripted(wrong=[3], plan=plan)
    _, *drafted, last = trace_lines(1, cycles[1], LETTERS)
    assert verdicts(drafted) == ["REJECT", "dropped", "accept", "accept"]
    assert [line.index("'") for line in drafted] == [2, 4, 2, 4]


def test_the_trace_shows_the_p_q_and_u_that_a_drawn_token_was_judged_by():
    draft = Draft(torch.tensor([0, 1, 2, 3]), chain_shape(3, torch.device("cpu")))
    seconds = dict.fromkeys(("draft", "verify", "other"), 0)
    figures = [0.5, 0.1, 0.0], [0.9, 0.4, 1.0], [0.3, 0.6, 0.9], (0.7, 0.2)
    cycle = Cycle([1, 0], draft, [0, 1], *figures, False, seconds)
    _, *drafted, last = trace_lines(1, cycle, LETTERS)
    assert verdicts(drafted) == ["accept", "REJECT", "dropped"]
    assert re.search(r"p 0\.500  q 0\.900  p/q 0\.556 u 0\.300  accept: u < p / q", drafted[0])
    assert re.search(r"p 0\.100  q 0\.400  p/q 0\.25  u 0\.600  REJECT: u >= p / q", drafted[1])
    assert last == "  + 'a' from the residual, where p exceeds q  (p 0.700  q 0.200)"


def test_the_trace_of_a_cycle_that_a_stop_token_ends():
    """What was drafted after the stop token was accepted: it must not be shown as rejected."""
    _, cycles = scripted(stop_token=5)
    _, *drafted, last = trace_lines(1, cycles[-1], LETTERS)
    assert verdicts(drafted) == ["accept", "accept", "dropped", "dropped"]
    assert last == "  + 'f' ends the text"


@pytest.mark.parametrize(
    "word",
    [
        pytest.param(b"x" * 200, id="long"),
        pytest.param("漢".encode() * 9, id="wide"),
        pytest.param(b"\n" + b" " * 40, id="indent"),
        pytest.param(b"\n" * 20, id="newlines"),
        pytest.param(b"\xff" * 30, id="bytes"),
        pytest.param("\u200b".encode() * 20, id="escapes"),
    ],
)
def test_a_trace_line_has_at_most_100_columns_and_no_control_characters(word):
    for cycle in scripted(wrong=[4, 5, 9])[1]:
        for line in trace_lines(12345, cycle, spelt([word] * 10)):
            assert line.isprintable()
            assert len(line) <= 100
