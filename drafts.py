"""Where a draft comes from and how far it goes: chains, fixed trees, trees that grow.

A draft is a tree of tokens. Its root is the last certain token; every path down from the root is
one way the text may go on. A chain is the tree with one child at each node. The target reads all
nodes at once, in one row. Each node sees the certain text and its own ancestors only: positions and
an attention mask say so (SpecInfer, arXiv 2305.09781). A second guess at a place costs a node in
that pass. It pays where a pass over 16 tokens costs hardly more than one over 5.

A **plan** makes the drafts. All plans have one interface:

    plan.depth                                        the most tokens in a row that it drafts
    plan.nodes                                        the most tokens that it drafts in all
    plan.slots                                        room needed in the caches of target and head
    plan.draft(head, state, root, depth, sampler)     a Draft below `root` (1,), to this depth

- `Chain`: one token after the other. Greedily each is the head's likeliest token; above temperature
  0 each is *drawn* from the head's q, and `speculate.verify` judges it.
- `FixedTree`: the same shape in every cycle. A node is named by the ranks of the guesses on its
  path: (0, 2) is the third guess after the first. `best_tree` takes the nodes that were most often
  right on validation text (Medusa, 2401.10774).
- `GrowingTree`: the nodes that the head thinks likeliest, by the product of its probabilities along
  the path, found by a beam and ranked again (EAGLE-2, 2406.16858).

The tokens of a tree are *named*, not drawn, at any temperature: `speculate.match` judges them. To
treat the likeliest nodes as samples of q would change the distribution of the text.

The last part, `walk`, drafts along a given text, many windows at once: that is how often a head's
guesses are right, measured without decoding. Read next: model.py.
"""

import heapq
import math
from functools import cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from plumbing.cli import UserError
from sampling import acceptance, argmax

MAX_NODES = 256  # of a tree: a pass over more is no longer cheap anywhere
WIDTH = 4  # nodes that a growing tree expands at each depth, and children of each
DRAFT_POSITIONS = 4  # how far into a draft the held-out acceptance is measured
RANKS = 16  # how many of a head's guesses at each position are counted
Branch = tuple[int, ...]


class Shape(NamedTuple):
    """Who follows whom. Node 0 is the root; a node comes after its parent."""

    parents: Tensor  # (N + 1,): the root is its own
    depth: Tensor  # (N + 1,)
    ancestors: Tensor  # (N + 1, N + 1) bool: row i marks node i and all that lead to it


class Draft(NamedTuple):
    """A tree with its tokens."""

    tokens: Tensor  # (N + 1,)
    shape: Shape
    q: Tensor | None = None  # (N, V): the distribution of each node of a drawn chain; else None
    # For on-lookers: the head's rows of logits (M, S), and the row that each node was chosen from.
    logits: tuple[Tensor, ...] = ()
    rows: Tensor | None = None  # (N,)

    def positions_and_mask(self, start: int) -> tuple:
        """For the target's pass after `start` tokens; nothing where only the root is read."""
        if len(self.tokens) == 1:
            return ()
        return start + self.shape.depth, self.shape.ancestors

    def path_to(self, node: Tensor, following: Tensor) -> tuple[list[int], list[int]]:
        """The path from the root to `node` (), and its tokens after the root, then `following` ().

        Here numbers leave the device, once a cycle.
        """
        size = len(self.tokens)
        parts = [self.tokens, self.shape.parents, node[None], following[None]]
        numbers = torch.cat(parts).tolist()
        tokens, parents, path = numbers[:size], numbers[size : 2 * size], numbers[2 * size : -1]
        while path[-1] != 0:
            path.append(parents[path[-1]])
        path.reverse()
        return path, [tokens[i] for i in path[1:]] + numbers[-1:]


def ancestors(parents: Tensor, depth: int) -> Tensor:
    """(N + 1, N + 1) bool from the parents (N + 1,) of a tree no deeper than `depth`.

    Each round doubles how far a node sees upwards, whatever the number of nodes.
    """
    seen = torch.eye(len(parents), dtype=torch.bool, device=parents.device)
    while depth > 0:
        seen = seen | seen[parents]
        parents, depth = parents[parents], depth // 2
    return seen


def deepest(agrees: Tensor, shape: Shape) -> Tensor:
    """The last node () of the one path from the root on which all nodes agree, (N + 1,) bool.

    The root is not asked, and of siblings one agrees at most. (If none does: argmax gives the first
    of equals, node 0.)
    """
    # For booleans a <= b is "a implies b": every ancestor of the node agrees.
    whole_path = (shape.ancestors[:, 1:] <= agrees[1:]).all(1)
    return (whole_path * shape.depth).argmax(0)


# -------------------------------------------------------------------------------------- chains


@cache
def chain_shape(length: int, device: torch.device) -> Shape:
    nodes = torch.arange(length + 1, device=device)
    return Shape((nodes - 1).clamp(min=0), nodes, nodes[:, None] >= nodes)


def root_only(root: Tensor) -> Draft:
    """A draft of nothing after `root` (1,)."""
    return Draft(root, chain_shape(0, root.device))


class Chain:
    """`length` tokens, one after the other."""

    def __init__(self, length: int):
        self.depth = self.nodes = self.slots = length

    def draft(self, head, state, root: Tensor, depth: int, sampler) -> Draft:
        """See the file's docstring. The certain text has been absorbed."""
        tokens, laws, logits = [root], [], [head.expand(state)[0]]  # logits: (1, S) each
        for i in range(depth):
            index, q = sampler.draw(logits[-1])  # (1,), (1, S) or None
            tokens.append(head.vocabulary.tokens_at(index))
            laws += [head.vocabulary.spread(q)] if q is not None else []
            if i + 1 < depth:
                logits.append(head.expand(state, tokens[-1][None])[0])
        shape = chain_shape(depth, root.device)
        q = torch.cat(laws) if laws else None  # (N, V)
        return Draft(torch.cat(tokens), shape, q, tuple(logits), shape.parents[1:])


# --------------------------------------------------------------------------------- fixed trees


def chain_paths(length: int) -> tuple[Branch, ...]:
    return tuple((0,) * i for i in range(1, length + 1))


def best_tree(rates: list[list[float]], nodes: int, depth: int) -> tuple[Branch, ...]:
    """The `nodes` paths of at most `depth` ranks that are likeliest right (Medusa, section 2.3.3).

    `rates[i][r]`: how often the r-th guess at draft position i is right; the last row serves all
    positions beyond. A path's chance is taken as their product. A node is never likelier than its
    parent, so the best are found one after the other.
    """
    # A guess can only join after the better-ranked one beside it: ranks are made non-increasing.
    rates = [[min(row[: r + 1]) for r in range(len(row))] for row in rates]

    def rate(path: Branch) -> float:
        row = rates[min(len(path), len(rates)) - 1]
        return row[path[-1]] if path[-1] < len(row) else 0.0

    order, chosen = count(), []
    waiting = [(-rate((0,)), next(order), (0,))]  # likeliest first; ties: first come
    while waiting and len(chosen) < nodes:
        minus_chance, _, path = heapq.heappop(waiting)
        chosen.append(path)
        sibling, child = (*path[:-1], path[-1] + 1), (*path, 0)
        if rate(path) > 0 and rate(sibling) > 0:
            chance = minus_chance / rate(path) * rate(sibling)
            heapq.heappush(waiting, (chance, next(order), sibling))
        if len(path) < depth:
            heapq.heappush(waiting, (minus_chance * rate(child), next(order), child))
    return tuple(chosen)


def expected_length(rates: list[list[float]], paths: tuple[Branch, ...]) -> float:
    """The acceptance length tau that a tree should have: 1 + the chance of each of its nodes."""
    total = 1.0
    for path in paths:
        chance = 1.0
        for i, rank in enumerate(path):
            row = rates[min(i, len(rates) - 1)]
            chance *= row[rank] if rank < len(row) else 0.0
        total += chance
    return total


class Level(NamedTuple):
    """From the k nodes that a fixed tree expands at one depth to its n nodes at the next."""

    k: int
    guesses: int  # the most children of one of the k
    above: Tensor  # (n,): which of the k each node follows
    rank: Tensor  # (n,): which guess it is
    expanded: Tensor  # (m,): which of the n are expanded next
    parents: Tensor | None  # (m,): which of the k these follow; None: k is 1


class FixedTree:
    """A tree of one shape for all cycles, laid out once: decoding only fills in the tokens.

    (Near the end of a text its upper part is laid out as well, once for each depth.)
    """

    def __init__(self, paths: tuple[Branch, ...], device: torch.device):
        """Raises ValueError if a path lacks its parent, or a better-ranked sibling."""
        self.paths = tuple(sorted(set(paths), key=lambda path: (len(path), path)))
        self.slots = self.nodes = len(self.paths)
        self.depth = max(map(len, self.paths))
        every = [(), *self.paths]
        for path in self.paths:
            needed = (*path[:-1], path[-1] - 1) if path[-1] > 0 else path[:-1]
            if needed not in every:
                raise ValueError(f"a tree with node {path} needs node {needed}")
        number = {path: i for i, path in enumerate(every)}
        inner = [path for path in every if (*path, 0) in number]  # they have children

        def tensor(values) -> Tensor:
            return torch.tensor(list(values), dtype=torch.long, device=device)

        parents = tensor(number[path[:-1]] for path in every)
        depth = tensor(len(path) for path in every)
        self.shape = Shape(parents, depth, ancestors(parents, self.depth))
        self.rows = tensor(inner.index(path[:-1]) for path in self.paths)
        self.levels = []
        for d in range(1, self.depth + 1):
            above = [path for path in inner if len(path) == d - 1]
            nodes = [path for path in self.paths if len(path) == d]
            expanded = [path for path in nodes if path in inner]
            follows = tensor(above.index(path[:-1]) for path in nodes)
            places = tensor(nodes.index(path) for path in expanded)
            ranks = tensor(path[-1] for path in nodes)
            parents = follows[places] if len(above) > 1 else None
            guesses = 1 + max(path[-1] for path in nodes)
            self.levels.append(Level(len(above), guesses, follows, ranks, places, parents))

    def draft(self, head, state, root: Tensor, depth: int, sampler) -> Draft:
        """See the file's docstring. The certain text has been absorbed."""
        if depth < self.depth:
            upper = tuple(path for path in self.paths if len(path) <= depth)
            return fixed_tree(upper, root.device).draft(head, state, root, depth, sampler)
        tokens, logits, above, parents = [root], [], None, None
        for level in self.levels:
            rows = head.expand(state, above, parents)[0]  # (k, S)
            # Medusa guesses alike whatever came before: its one row serves all k nodes.
            best = rows.topk(level.guesses).indices.expand(level.k, -1)
            tokens.append(head.vocabulary.tokens_at(best)[level.above, level.rank])
            logits.append(rows.expand(level.k, -1))
            above, parents = tokens[-1][level.expanded][None], level.parents
        return Draft(torch.cat(tokens), self.shape, None, tuple(logits), self.rows)


@cache
def fixed_tree(paths: tuple[Branch, ...], device: torch.device) -> FixedTree:
    return FixedTree(paths, device)


# ------------------------------------------------------------------------------- growing trees


class GrowingTree:
    """The tree of the `nodes` tokens that the head deems likeliest, at most `depth` deep.

    At each depth the `width` best nodes are expanded, each to its `width` best children (EAGLE-2,
    section 4.1); of all that were seen the best are kept (4.2). In greedy decoding the head's
    probabilities are sharpened first (`sampling.GREEDY_TEMPERATURE`).
    """

    def __init__(self, nodes: int, depth: int, width: int, device):
        self.nodes, self.depth, self.width = nodes, depth, width
        self.slots = max(nodes, width * (depth - 1))  # what the target reads, what the head expands
        sizes = [width] + [width * width] * (depth - 1)
        each = [torch.full((size,), i + 1) for i, size in enumerate(sizes)]
        self.depths = torch.cat([torch.zeros(1, dtype=torch.long), *each]).to(device)

    def draft(self, head, state, root: Tensor, depth: int, sampler) -> Draft:
        """See the file's docstring. The certain text has been absorbed."""
        reach = torch.zeros(1, dtype=torch.float64, device=root.device)  # log-probability (k,)
        above = torch.zeros(1, dtype=torch.long, device=root.device)  # the k nodes' numbers
        tokens, parents, scores, seen = [root], [above], [reach], 1
        logits = [head.expand(state)[0]]  # (k, S) each
        for i in range(depth):
            best, log_q = sampler.likeliest(logits[-1], self.width)
            found = head.vocabulary.tokens_at(best).flatten()  # (k * width,)
            # Strictly below its parent, even at probability 1: no node is kept without its parent.
            score = (reach[:, None] + log_q.double().clamp(max=-1e-9)).flatten()
            tokens.append(found)
            parents.append(above.repeat_interleave(self.width))
            scores.append(score)
            if i + 1 < depth:
                reach, best = score.topk(self.width)
                above = best + seen
                rows = head.expand(state, found[best][None], best // self.width)[0]
                logits.append(rows.expand(len(best), -1))  # as in FixedTree
            seen += len(score)
        scores, tokens, parents = torch.cat(scores), torch.cat(tokens), torch.cat(parents)
        kept = scores.topk(min(self.nodes + 1, len(scores))).indices.sort().values  # root included
        parents = torch.searchsorted(kept, parents[kept])  # their new numbers
        shape = Shape(parents, self.depths[kept], ancestors(parents, depth))
        return Draft(tokens[kept], shape, None, tuple(logits), (kept[1:] - 1) // self.width)


def plan_draft(head, gamma: int, nodes: int, target) -> Chain | FixedTree | GrowingTree:
    """A plan for `head`: a chain of `gamma`, or a tree of `nodes` at most `gamma` deep.

    Raises UserError for a draft that the head cannot make.
    """
    device = target.embed.weight.device
    if gamma < 1:
        raise UserError(f"gamma is {gamma}, at least 1 token has to be drafted")
    if head.max_draft is not None and gamma > head.max_draft:
        raise UserError(f"gamma is {gamma}, but this head drafts at most {head.max_draft} tokens")
    if not 0 <= nodes <= MAX_NODES:
        raise UserError(f"nodes is {nodes}, it must lie between 0 (a chain) and {MAX_NODES}")
    if nodes == 0:
        return Chain(min(gamma, target.config.context))
    if head.autoregressive:
        width = min(nodes, WIDTH, target.config.vocab_size)
        return GrowingTree(nodes, min(gamma, nodes, target.config.context), width, device)
    return fixed_tree(best_tree(rank_rates(head), nodes, gamma), device)


def rank_rates(head, name: str = "ranks") -> list[list[float]]:
    """How good a head's r-th guess at each draft position was when it was last validated.

    `ranks`: how often it is the target's first choice; `mass`: the target's mean p of it.
    Raises UserError where the head came without.
    """
    try:
        return head.training_record["valid"][name]
    except (AttributeError, KeyError) as error:
        raise UserError(
            "this head has no record of how often its guesses are right, which is what trees and "
            "sizes are chosen by: train it anew with train.py, or draft a chain of a fixed length"
        ) from error


# ---------------------------------------------------------------------- drafting along a text


def walk(head, tokens: Tensor, hidden: Tensor, positions: int, stride: int):
    """Draft along texts, tokens (B, T + 1) and the target's states hidden (B, T, D) on them.

    A draft begins every `stride` places, and its path is the text itself. Yields (start, i,
    logits): the head's logits (B, S) at draft position i = 0, 1, .. of the draft after `start`
    states. The target's own are those of hidden[:, start + i]. It calls the decoder's own `absorb`
    and `expand`.
    """
    length = hidden.shape[1]
    state, read = head.start(length + positions, batch=len(tokens)), 0
    for start in range(min(stride, length - positions), length - positions + 1, stride):
        head.absorb(state, tokens[:, read + 1 : start + 1], hidden[:, read:start])
        read = start
        for i in range(positions):
            here = start + i
            logits = head.expand(state, tokens[:, here, None]) if i else head.expand(state)
            yield start, i, logits[:, 0]


@torch.no_grad()
def measure_acceptance(target, head, batch, stride: int = 16, by_rank=False) -> dict:
    """How well a head drafts along given text, at each draft position i = 1, 2, ..

    agree_i: share of drafts where head and target have the same first choice, whatever was right
    before; alpha_i: mean of sum_x min(p, q). tau_estimate = 1 + sum_i prod_{j <= i} agree_j, the
    greedy acceptance length if positions were independent. `by_rank` adds two lists (P, RANKS), by
    which trees are chosen: `ranks`, how often the head's r-th guess is the target's first choice,
    and `mass`, the mean p of that guess; and the number of `drafts`. Only drafts whose tokens are
    all to be learnt count. Raises UserError where there is none.
    """
    tokens, hidden, learn = batch
    positions = min(DRAFT_POSITIONS, head.max_draft or DRAFT_POSITIONS)
    drafts, alpha = 0, torch.zeros(positions, dtype=torch.float64)
    ranks = torch.zeros(positions, min(RANKS, target.config.vocab_size), dtype=torch.float64)
    mass = torch.zeros_like(ranks)
    for start, i, logits in walk(head, tokens, hidden, positions, stride):
        use = learn[:, start + 1 : start + positions + 1].all(1)  # (B,)
        drafts += use.sum().item() if i == 0 else 0
        p = target.lm_head(hidden[use, start + i]).float().softmax(-1)  # (B', V)
        q = logits[use].float().softmax(-1)  # (B', S)
        guesses = head.vocabulary.tokens_at(q.topk(ranks.shape[1]).indices)  # (B', RANKS)
        ranks[i] += (guesses == argmax(p)[:, None]).sum(0).cpu()
        mass[i] += p.gather(-1, guesses).sum(0).cpu()
        alpha[i] += acceptance(head.vocabulary.rows(p.T).T, q).sum().item()
    if drafts == 0:
        raise UserError("the held-out text has nothing to learn in it: write or give more")
    ranks, mass, alpha = ranks / drafts, mass / drafts, alpha / drafts
    agree = ranks[:, 0]
    result = {f"agree_{i + 1}": value.item() for i, value in enumerate(agree)}
    result |= {f"alpha_{i + 1}": value.item() for i, value in enumerate(alpha)}
    # Of a head that diverged the first choice is some token all the same: alpha alone tells.
    diverged = alpha.isnan().any()
    result["tau_estimate"] = math.nan if diverged else 1 + agree.cumprod(0).sum().item()
    rates = {"ranks": ranks.tolist(), "mass": mass.tolist(), "drafts": drafts}
    return result | (rates if by_rank else {})
