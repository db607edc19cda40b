"""A tree is verified as if each of its paths were the text, and accepted by its own rule.

Two things can go wrong unseen. A node may see a cousin, or stand at the wrong position: the target
then judges a text that nobody wrote. And the tokens of a tree may be judged as if they had been
drawn from q: they were named. Either slip still writes fluent text, so the law is enumerated here,
and the well-known mistakes have to be seen by the same comparison.
"""

import itertools
import random
from functools import cache

import pytest
import torch
from toys import (
    FALSE_ALARM,
    chi_square_p_value,
    known_text,
    law_of_text,
    random_prompts,
    random_tables,
    rest_of,
    tiny_head,
    tiny_target,
    whole_vocabulary,
)

from costs import chain_paths, expected_length
from drafts import (
    Chain,
    FixedTree,
    GrowingTree,
    ancestors,
    best_tree,
    chain_shape,
    deepest,
    plan_draft,
)
from plumbing.cli import UserError
from sampling import GREEDY_TEMPERATURE, Sampler, acceptance_probability, residual
from speculate import generate, match

CPU = torch.device("cpu")
KINDS = ("medusa", "eagle")


def full(width: int, depth: int) -> list[tuple]:
    levels = [itertools.product(range(width), repeat=d) for d in range(1, depth + 1)]
    return [path for level in levels for path in level]


def random_tree(seed: int, nodes: int, depth: int = 8, width: int = 12) -> list[tuple]:
    """Each new node goes below a random one, after the children that are there."""
    rng, children = random.Random(seed), {(): 0}
    while len(children) <= nodes:
        parent = rng.choice(list(children))
        if len(parent) < depth and children[parent] < width:
            path = (*parent, children[parent])
            children[parent] += 1
            children[path] = 0
    return list(children)[1:]


SHAPES = {
    "one node": chain_paths(1),
    "chain": chain_paths(5),
    "star": [(r,) for r in range(12)],
    "broom": [*chain_paths(3), *[(0, 0, 0, r) for r in range(6)]],
    "binary": full(2, 5),  # 62 nodes
    "ternary": full(3, 3),
    **{f"random {n}": random_tree(n, n) for n in (2, 3, 5, 8, 13, 21, 34, 64)},
}


@pytest.fixture(scope="module")
def target():
    return tiny_target(seed=2)


@pytest.fixture(scope="module")
def trained(target):
    """trained(kind, layers): a head trained for a moment, once for all tests."""
    return cache(lambda kind, layers=2: tiny_head(kind, layers, target, steps=60))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=SHAPES)
def paths(request):
    return tuple(SHAPES[request.param])


def some_text(target, length: int = 9):
    """Tokens (1, T + 1) and the target's states on the first T of them."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(target.config.vocab_size, (1, length + 1), generator=generator)
    return tokens, target(tokens[:, :-1])


# ------------------------------------------------------------------------------------ tree shapes


def test_a_fixed_tree_is_laid_out_level_by_level(paths):
    tree = FixedTree(paths, CPU)
    every = [(), *tree.paths]
    assert sorted(tree.paths) == sorted(paths) and tree.nodes == len(paths)
    for i, path in enumerate(every):
        assert every[tree.shape.parents[i]] == path[:-1] and tree.shape.depth[i] == len(path)
        seen = {every[j] for j in tree.shape.ancestors[i].nonzero()[:, 0].tolist()}
        assert seen == {path[:d] for d in range(len(path) + 1)}


@pytest.mark.parametrize("paths", [[(1,)], [(0, 0)], [(0,), (0, 1)]], ids=str)
def test_a_tree_with_a_gap_is_refused(paths):
    with pytest.raises(ValueError, match="needs node"):
        FixedTree(paths, CPU)


def test_the_deepest_node_is_on_a_path_that_agrees_all_the_way():
    shape = FixedTree([(0,), (1,), (0, 0), (1, 0), (1, 0, 0)], CPU).shape
    for agreeing, node in [([], 0), ([1], 1), ([2], 2), ([4, 5], 0), ([1, 4, 5], 1), ([2, 4], 4)]:
        agrees = torch.zeros(6, dtype=torch.bool).index_fill(0, torch.tensor(agreeing).long(), True)
        assert deepest(agrees, shape) == node


def test_the_best_tree_is_the_best_of_all():
    rates = [[0.5, 0.3, 0.1], [0.6, 0.2, 0.1]]
    for nodes in range(1, 6):
        found = best_tree(rates, nodes, 3)
        FixedTree(found, CPU)  # without gaps
        assert len(set(found)) == nodes
        others = [random_tree(seed, nodes, depth=3, width=3) for seed in range(300)]
        best = max(expected_length(rates, other) for other in others)
        assert expected_length(rates, found) == pytest.approx(best, abs=1e-12)


def test_the_best_tree_of_a_head_without_second_guesses_is_a_chain():
    assert best_tree([[0.9, 0.0], [0.8, 0.0]], 10, 4) == chain_paths(4)
    assert best_tree([[1.0, 0.0]], 3, 8) == chain_paths(3)


def test_ranks_out_of_order_leave_no_gap():
    FixedTree(best_tree([[0.2, 0.1, 0.4, 0.3]], 8, 3), CPU)


def test_a_chain_has_the_length_that_its_rates_multiply_to():
    assert expected_length([[0.5], [0.4]], chain_paths(3)) == pytest.approx(1 + 0.5 + 0.2 + 0.08)


# ----------------------------------------------------------- one pass over a tree, and what is kept


def test_each_node_is_read_as_the_end_of_its_own_path(target, paths):
    tree, (tokens, _) = FixedTree(paths, CPU), some_text(target)
    generator = torch.Generator().manual_seed(5)
    nodes = torch.randint(target.config.vocab_size, (1, tree.nodes + 1), generator=generator)
    cache_ = target.new_cache(24 + tree.nodes)
    target(tokens, cache_)
    start, shape = cache_.length, tree.shape
    states = target(nodes, cache_, start + shape.depth, shape.ancestors)[0]
    for i, row in enumerate(shape.ancestors):
        alone = target(torch.cat([tokens, nodes[:, row]], 1))[0, -1]
        torch.testing.assert_close(states[i], alone, rtol=0, atol=1e-10)


def test_keeping_a_path_is_having_read_that_path_only(target, paths):
    tree, (tokens, _) = FixedTree(paths, CPU), some_text(target)
    nodes = torch.arange(tree.nodes + 1)[None] % target.config.vocab_size
    following = torch.tensor([[1, 2]])
    for row in tree.shape.ancestors[:: max(1, tree.nodes // 5)]:
        cache_ = target.new_cache(24 + tree.nodes)
        target(tokens, cache_)
        start = cache_.length
        target(nodes, cache_, start + tree.shape.depth, tree.shape.ancestors)
        path = row.nonzero()[:, 0]
        cache_.keep(start, path, in_place=path.tolist() == list(range(len(path))))
        assert cache_.length == start + row.sum()
        whole = torch.cat([tokens, nodes[:, row], following], 1)
        torch.testing.assert_close(target(following, cache_), target(whole)[:, -2:])


def test_a_head_expands_each_node_as_the_end_of_a_chain(target, kind, paths, trained):
    head, (tokens, hidden) = trained(kind), some_text(target)

    def absorbed():
        state = head.start(24 + len(paths))
        head.absorb(state, tokens[:, 1:], hidden)
        return state

    tree = FixedTree(paths, CPU)
    known = known_text(head, tokens, hidden, 24 + len(paths))
    draft = tree.draft(known, tree.depth, Sampler(CPU))
    chosen_from = torch.cat(draft.logits)[draft.rows]  # (N, S): the row that each node comes from
    for i, row in enumerate(tree.shape.ancestors):
        path, state = draft.tokens[row][1:], absorbed()
        logits = head.expand(state)
        for token in path:
            logits = head.expand(state, token[None, None])
            if head.max_draft and state.depth == head.max_draft - 1:
                break
        children = (tree.shape.parents[1:] == i).nonzero()[:, 0]  # their numbers, less 1
        if len(children):
            expected = logits[0, 0].expand(len(children), -1)
            torch.testing.assert_close(chosen_from[children], expected, rtol=0, atol=1e-6)
            named = draft.tokens[1 + children].tolist()
            assert named == logits[0, 0].topk(len(children)).indices.tolist()


def test_a_tree_cut_short_is_the_upper_part_of_it(target, kind, trained):
    known = known_text(trained(kind), *some_text(target))
    tree, greedy = FixedTree(full(2, 4), CPU), Sampler(CPU)
    whole = tree.draft(known, 4, greedy)
    for depth, nodes in [(1, 3), (2, 7), (3, 15)]:
        part = tree.draft(known, depth, greedy)
        assert part.tokens.tolist() == whole.tokens[:nodes].tolist()
        assert part.shape.depth.max() == depth


# ---------------------------------------------------------------------------------- growing trees


def path_probabilities(head, state, depth: int, vocab: int, temperature) -> dict[tuple, float]:
    """The head's probability of every continuation of up to `depth` tokens."""
    found = {(): 1.0}
    for path in [()] + [
        p for d in range(1, depth) for p in itertools.product(range(vocab), repeat=d)
    ]:
        logits = head.expand(state)
        for token in path:
            logits = head.expand(state, torch.tensor([[token]]))
        for token, q in enumerate((logits[0, 0] / temperature).softmax(-1).tolist()):
            found[(*path, token)] = found[path] * q
    return found


@pytest.mark.parametrize("temperature, ranked_at", [(0, GREEDY_TEMPERATURE), (1, 1), (1.7, 1.7)])
@pytest.mark.parametrize("nodes", [1, 2, 5])  # no more than the beam is wide: it can miss none
def test_a_growing_tree_holds_the_likeliest_continuations(kind, nodes, temperature, ranked_at):
    target = tiny_target(seed=4, vocab=5)
    known = known_text(tiny_head(kind, 1, target), *some_text(target))
    probability = path_probabilities(*known.read(), 3, 5, ranked_at)
    best = sorted(probability, key=probability.get, reverse=True)[: nodes + 1]
    sampler = Sampler(CPU, temperature)
    draft = GrowingTree(nodes, 3, 5, CPU).draft(known, 3, sampler)
    paths = [tuple(draft.tokens[row][1:].tolist()) for row in draft.shape.ancestors]
    assert sorted(paths) == sorted(best)
    assert draft.shape.depth.tolist() == [len(path) for path in paths]
    for i, path in enumerate(paths):
        shown = probability[path] / probability[path[:-1]] if path else 1.0
        if path:  # on-lookers find the rows that the nodes were chosen from
            row = torch.cat(draft.logits)[draft.rows[i - 1]] / ranked_at
            assert row.softmax(-1)[path[-1]].item() == pytest.approx(shown, abs=1e-6)


class Certain:
    """A head so sure of itself that a child is as likely as its parent: ties at probability 1."""

    vocabulary = whole_vocabulary(7)

    def start(self, max_length):
        return None

    def absorb(self, state, tokens, hidden):
        pass

    def expand(self, state, tokens=None, parents=None):
        return 1000.0 * torch.eye(7)[None, 3:4]


def test_no_node_of_a_growing_tree_is_kept_without_its_parent():
    for nodes in range(1, 30):
        known = known_text(Certain(), torch.tensor([[1, 0]]), torch.zeros(1, 1, 1))
        draft = GrowingTree(nodes, 5, 4, CPU).draft(known, 5, Sampler(CPU))
        parents = draft.shape.parents
        assert len(draft.tokens) == nodes + 1 and (parents[1:] < torch.arange(1, nodes + 1)).all()
        assert torch.equal(draft.shape.depth[1:], draft.shape.depth[parents[1:]] + 1)
        assert torch.equal(draft.shape.ancestors, ancestors(parents, 5))


# ------------------------------------------------------------------------ greedy, token by token

PROMPT_LENGTHS = (1, 7, 22)  # of a context of 24


@pytest.fixture(scope="module")
def prompts(target):
    return random_prompts(target, PROMPT_LENGTHS)


def assert_greedy_text_is_the_targets_own(target, prompts, head, plan) -> int:
    """Up to the window's end and up to every token as the stop. Returns how much was accepted."""
    accepted = 0

    def count(cycle):
        nonlocal accepted
        accepted += cycle.accepted

    for prompt in prompts:
        whole = generate(target, prompt, 100).tokens
        for stop in [None, *set(whole[::3])]:
            expected = whole if stop is None else whole[: whole.index(stop) + 1]
            request = dict(head=head, plan=plan, stop_token=stop, on_cycle=count)
            result = generate(target, prompt, 100, **request)
            assert result.tokens == expected
            assert sum(result.produced) == len(expected) - 1
    return accepted


def test_greedy_text_by_a_tree_of_any_shape_is_the_targets_own(
    target, prompts, kind, paths, trained
):
    plan = FixedTree(paths, CPU)
    assert assert_greedy_text_is_the_targets_own(target, prompts, trained(kind), plan) > 0


@pytest.mark.parametrize("nodes, depth, width", [(1, 1, 1), (4, 2, 3), (12, 4, 6), (64, 6, 8)])
def test_greedy_text_by_a_growing_tree_is_the_targets_own(
    target, prompts, kind, nodes, depth, width, trained
):
    plan = GrowingTree(nodes, depth, width, CPU)
    assert assert_greedy_text_is_the_targets_own(target, prompts, trained(kind), plan) > 0


def test_a_tree_accepts_at_least_what_its_chain_does(target, prompts, kind, trained):
    """Greedily each cycle writes as much as the chain that lies in the tree, or more."""
    taus = []
    for plan in (Chain(4), FixedTree(full(3, 4), CPU)):
        results = [generate(target, p, 100, head=trained(kind), plan=plan) for p in prompts[:2]]
        taus.append(sum(len(r.tokens) for r in results) / sum(len(r.produced) for r in results))
    assert taus[1] > taus[0]


# ------------------------------------------------------------- named tokens are no samples

VOCAB = 4
SAMPLING = {
    "plain": dict(temperature=1.0),
    "hot": dict(temperature=1.7),
    "top_k": dict(temperature=1.0, top_k=2),
    "greedy": dict(temperature=0.0),
}


def without(q, x):
    """norm(q without x), q (..., V), x (..., 1); all 0 where nothing else is left."""
    rest = q.scatter(-1, x, 0.0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, 0.0)


def tables(name: str, depth: int = 3):
    return random_tables(1, depth, VOCAB, **SAMPLING[name]), random_tables(
        2, depth, VOCAB, **SAMPLING[name]
    )


def one_token_law(p, candidates, rule) -> torch.Tensor:
    """The law of one token: `candidates` are (probability, tokens), each list judged by `rule`."""
    law = torch.zeros(VOCAB, dtype=torch.float64)
    for probability, tokens in candidates:
        law += probability * rule(p, tokens)
    return law


def as_samples(q):
    """Siblings judged as draws from q."""

    def rule(p, tokens):
        law, reach, q_now = torch.zeros_like(p), 1.0, q
        for token in tokens:
            accepted = acceptance_probability(p[token], q_now[token])
            law[token] += reach * accepted
            reach = reach * (1 - accepted)
            p, q_now = residual(p, q_now), without(q_now, torch.tensor([token]))
        return law + reach * p

    return rule


def as_named(p, tokens):
    """Siblings judged as a deterministic proposal: each with a one-hot q of its own."""
    law, reach = torch.zeros_like(p), 1.0
    for token in tokens:
        one_hot = torch.eye(VOCAB, dtype=p.dtype)[token]
        law[token] += reach * acceptance_probability(p[token], one_hot[token])
        reach = reach * (1 - acceptance_probability(p[token], one_hot[token]))
        p = residual(p, one_hot)
    return law + reach * p


def test_a_reranked_tree_must_not_be_treated_as_sampled():
    """Of two children drawn from q the likelier is kept: what is kept is no draw from q."""
    p, q = (table[0].double() for table in tables("plain"))
    kept = []
    for first, second in itertools.permutations(range(VOCAB), 2):
        drawn = q[first] * without(q, torch.tensor([first]))[second]
        kept.append((drawn, [first if q[first] > q[second] else second]))
    assert (one_token_law(p, kept, as_samples(q)) - p).abs().sum() / 2 > 0.01
    torch.testing.assert_close(one_token_law(p, kept, as_named), p)


# --------------------------------------------------------------- the exact law of named tokens

# Two-level trees with the token that each node names; siblings differ, cousins need not.
NAMED = {
    "chain": {(0,): 2, (0, 0): 1},
    "siblings": {(0,): 3, (1,): 0, (2,): 1},
    "two and two": {(0,): 1, (1,): 2, (0, 0): 0, (0, 1): 1, (1, 0): 1},
    "deep second": {(0,): 0, (1,): 3, (1, 0): 3, (1, 1): 2, (1, 2): 0},
}


def law_by_match(p, named: dict) -> torch.Tensor:
    """The law of three tokens by `match`, all draws of the target's own token at each node gone
    through; what a cycle does not write is completed with the target's own law."""
    tree = FixedTree(tuple(named), CPU)
    texts = [tuple(named[path[:d]] for d in range(1, len(path) + 1)) for path in [(), *tree.paths]]
    tokens = torch.tensor([0, *(text[-1] for text in texts[1:])])
    rows = [p[len(text)][text].double() for text in texts]  # the target's p after each node
    law = torch.zeros([VOCAB] * 3, dtype=torch.float64)
    for choice in itertools.product(range(VOCAB), repeat=len(rows)):
        probability = torch.stack([row[x] for row, x in zip(rows, choice)]).prod()
        if probability > 0:
            node, following = match(tokens, tree.shape, torch.tensor(choice))
            written = (*texts[node], following.item())
            law[written] += probability * rest_of(p, written)
    return law


def law_by_fresh_draws(p, named: dict, text: tuple = (), path: tuple = ()) -> torch.Tensor:
    """The same by a wrong rule: each sibling is compared with a draw of its own from p."""
    if len(text) == 3:
        return torch.ones((), dtype=torch.float64)
    row, reach = p[len(text)][text].double(), 1.0
    law = torch.zeros([VOCAB] * (3 - len(text)), dtype=torch.float64)
    for child in sorted(other for other in named if other[:-1] == path and other):
        x = named[child]
        law[x] += reach * row[x] * law_by_fresh_draws(p, named, (*text, x), child)
        reach = reach * (1 - row[x])
    for x in range(VOCAB):
        law[x] += reach * row[x] * rest_of(p, (*text, x))
    return law


@pytest.mark.parametrize("name", SAMPLING)
@pytest.mark.parametrize("shape", NAMED)
def test_a_tree_of_named_tokens_writes_exactly_the_targets_law(shape, name):
    p = random_tables(1, 3, VOCAB, **SAMPLING[name])
    assert (law_by_match(p, NAMED[shape]) - rest_of(p)).abs().max() < 1e-6


@pytest.mark.parametrize("shape", [name for name in NAMED if name != "chain"])
def test_a_fresh_draw_for_each_sibling_is_seen(shape):
    """It looks like the rule, and names a second sibling too seldom."""
    p = random_tables(1, 3, VOCAB, **SAMPLING["plain"])
    assert (law_by_fresh_draws(p, NAMED[shape]) - rest_of(p)).abs().sum() / 2 > 0.01


@pytest.mark.parametrize("children", [[], [2], [0, 3], [3, 1, 0], [0, 1, 2, 3]], ids=str)
def test_matching_one_sample_is_judging_siblings_with_one_hot_q(children):
    """`match` draws one token and looks for it; the rule goes through the siblings. One law."""
    p = tables("plain")[0][0].double()
    torch.testing.assert_close(as_named(p, children), p)
    paths = tuple((r,) for r in range(len(children)))
    shape = FixedTree(paths, CPU).shape if paths else chain_shape(0, CPU)
    tokens = torch.tensor([0, *children])
    for choice in range(VOCAB):
        node, following = match(tokens, shape, torch.full((len(tokens),), choice))
        if not children:
            assert (node, following) == (0, choice)
        elif choice in children:  # it is written as a draft, and after it comes that node's choice
            assert tokens[node] == choice and node > 0
        else:
            assert (node, following) == (0, choice)


# --------------------------------------------------------------------- verify_tree as it decodes


# ------------------------------------------------------------------------------------ sampled text

WRITTEN = 4


@pytest.mark.slow
@pytest.mark.parametrize("growing", [False, True], ids=["fixed", "growing"])
@pytest.mark.parametrize(
    "sampling", [dict(temperature=1.0), dict(temperature=0.8, top_k=3)], ids=str
)
def test_sampled_text_by_a_tree_has_the_targets_law(kind, growing, sampling):
    target = tiny_target(seed=7, vocab=5, context=8, layers=1, width=8, spread=0.6)
    head = tiny_head(kind, 1, target, num_heads=2)
    plan = GrowingTree(4, 2, 3, CPU) if growing else FixedTree([(0,), (1,), (0, 0), (0, 1)], CPU)
    law, accepted = law_of_text(target, [0, 1], WRITTEN, **sampling), 0
    counts = torch.zeros(len(law), dtype=torch.long)

    def note(cycle):
        nonlocal accepted
        accepted += cycle.accepted

    for seed in range(2500):
        request = dict(head=head, plan=plan, seed=seed, on_cycle=note, **sampling)
        cell = 0
        for token in generate(target, [0, 1], WRITTEN, **request).tokens:
            cell = cell * 5 + token
        counts[cell] += 1
    assert accepted > 2000
    assert chi_square_p_value(counts, law) > FALSE_ALARM


# ---------------------------------------------------------------------------------- plans by size


def test_a_medusa_tree_is_made_of_its_validation_record(target, trained):
    head = trained("medusa")
    with pytest.raises(UserError, match="no record"):
        plan_draft(head, 3, 5, target)
    head.training_record = {"valid": {"ranks": [[0.5, 0.4, 0.1]] * 4}}
    plan = plan_draft(head, 3, 5, target)
    assert plan.paths == ((0,), (1,), (0, 0), (0, 1), (1, 0)) and plan.depth == 2
    del head.training_record


@pytest.mark.parametrize("nodes", [-1, 10**6])
def test_a_tree_of_an_impossible_size_is_refused(target, trained, nodes):
    with pytest.raises(UserError, match="nodes is"):
        plan_draft(trained("eagle"), 4, nodes, target)
