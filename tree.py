"""A draft is a tree of tokens: several guesses at each place, all verified in the same pass.

The root is the last certain token; every path down from it is one way the text may go on. A chain
is the tree with one child at each node. The target reads all nodes at once, in one row, and each
node sees the certain text and its own ancestors only: positions and an attention mask say so
(SpecInfer, arXiv 2305.09781). A second guess costs a node in that pass, and is worth it where a
pass over 16 tokens costs hardly more than one over 5. Two ways to choose the nodes:

- `FixedTree`: the same shape in every cycle, each node named by the guesses on its path, so that
  (0, 2) is the third guess after the first. `best_tree` takes those most often right on validation
  text (Medusa, 2401.10774). Greedily the guesses are the head's likeliest tokens; above temperature
  0 they are *sampled*, one after the other and without putting back, and the rule for them is
  `speculate.verify_tree`.
- `GrowingTree`: the nodes which the head itself thinks likeliest, by the product of its
  probabilities along the path, found by a beam and then ranked again (EAGLE-2, 2406.16858); for
  greedy decoding these are sharpened first (`sampling.Sampler.guesses`). Which nodes are in it
  depends on the tokens, so they are no samples of q, and treating them as such would change the
  law of the text. They are a *deterministic* proposal: see `speculate.match`.
"""

import heapq
from functools import cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from cli import UserError

MAX_NODES = 256  # of a tree: a pass over more is no longer cheap anywhere
WIDTH = 4  # nodes that a growing tree expands at each depth, and children of each
Branch = tuple[int, ...]


class Shape(NamedTuple):
    """Who follows whom. Node 0 is the root; a node comes after its parent."""

    parents: Tensor  # (N + 1,): the root is its own
    depth: Tensor  # (N + 1,)
    ancestors: Tensor  # (N + 1, N + 1) bool: row i marks node i and all that lead to it
    children: Tensor | None = None  # (N + 1, R): the r-th child of each node, 0 where there is none


class Draft(NamedTuple):
    """A tree with its tokens."""

    tokens: Tensor  # (N + 1,)
    shape: Shape
    q: Tensor | None = None  # (N + 1, V): the head's law after each node, 0 at leaves; fixed trees
    confidence: Tensor | None = None  # (N + 1,): how sure it is of each node; growing trees


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
    whole_path = (shape.ancestors[:, 1:] <= agrees[1:]).all(1)  # what leads there, agrees
    return (whole_path * shape.depth).argmax(0)


# --------------------------------------------------------------------------------- fixed trees


def chain(length: int) -> tuple[Branch, ...]:
    return tuple((0,) * i for i in range(1, length + 1))


def best_tree(rates: list[list[float]], nodes: int, depth: int) -> tuple[Branch, ...]:
    """The `nodes` paths of at most `depth` ranks that are likeliest right (Medusa, section 2.3.3).

    `rates[i][r]`: how often the r-th guess at draft position i is right, given that all before it
    were; the last row serves all positions beyond. A path's chance is their product, and a node is
    never likelier than its parent, so that the best are found one after the other.
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
    """From the k nodes that a fixed tree expands at one depth to those at the next.

    An example, (0,) (1,) (2,) (0, 0) (0, 1) (1, 0). From the root, k = 1: draw 3, all are in the
    tree, nodes 0 and 1 of them are expanded. From these, k = 2: draw 2 for each, of the 4 drawn
    the places 0, 1 and 2 are in the tree, and none is expanded.
    """

    count: int  # children to draw for each of the k
    places: Tensor | None  # which of the k * count drawn are in the tree; None: all of them
    expanded: Tensor | None  # which of those in the tree are expanded next; None: all of them
    parents: Tensor | None  # for these, which of the k each one follows; None: k is 1


class FixedTree:
    """A tree of one shape for all cycles, laid out once: decoding only fills in the tokens.

    (Near the end of a text its upper part is laid out as well, once for each depth.)
    """

    def __init__(self, paths: tuple[Branch, ...], device):
        """Raises ValueError if a path lacks its parent, or a better-ranked sibling."""
        self.paths, self.device = (
            tuple(sorted(set(paths), key=lambda path: (len(path), path))),
            device,
        )
        self.slots = self.nodes = len(self.paths)  # room in a cache for what is read of a draft
        self.depth = max(map(len, paths), default=0)
        every, known = [(), *self.paths], {(), *self.paths}
        for path in self.paths:
            needed = (*path[:-1], path[-1] - 1) if path[-1] > 0 else path[:-1]
            if needed not in known:
                raise ValueError(f"a tree with node {path} needs node {needed}")
        rows = [[path for path in every if len(path) == d] for d in range(self.depth + 1)]
        number = {path: i for i, path in enumerate(every)}
        children = [[] for _ in number]
        for path in self.paths:
            children[number[path[:-1]]].append(number[path])
        width = max(map(len, children))
        filled = [row + [0] * (width - len(row)) for row in children]
        parents = self.tensor([number[path[:-1]] for path in every])
        depth = self.tensor([len(path) for path in every])
        self.shape = Shape(parents, depth, ancestors(parents, self.depth), self.tensor(filled))
        inner = [[path for path in row if children[number[path]]] for row in rows]
        self.levels = [self.level(*parts) for parts in zip(inner, rows[1:], inner[1:])]
        # Where each node's q is found among the rows of the expanded ones; the leaves' comes last.
        order = {path: i for i, path in enumerate(path for row in inner for path in row)}
        self.q_rows = self.tensor([order.get(path, len(order)) for path in every])

    def tensor(self, values: list) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)

    def level(self, above: list[Branch], row: list[Branch], inner: list[Branch]) -> Level:
        """From the expanded nodes `above` to their children `row`, of which `inner` have some."""
        number = {path: i for i, path in enumerate(above)}
        draws = 1 + max(path[-1] for path in row)
        places = [number[path[:-1]] * draws + path[-1] for path in row]
        return Level(
            draws,
            None if len(row) == len(above) * draws else self.tensor(places),
            None if inner == row else self.tensor([row.index(path) for path in inner]),
            None if len(above) == 1 else self.tensor([number[path[:-1]] for path in inner]),
        )

    def draft(self, head, state, root: Tensor, depth: int, sampler) -> Draft:
        """The tree below `root` (1,), down to `depth`. What is certain has been absorbed.

        `sampler.children(logits (k, S), count)` -> tokens (k, count) and, where it is of use, the
        law q (k, S) they were drawn from, both by their places in the head's vocabulary.
        """
        if depth < self.depth:
            return cut(self.paths, depth, self.device).draft(head, state, root, depth, sampler)
        tokens, q, k = [root], [], 1
        logits = head.expand(state)[0]  # (1, S)
        for i, level in enumerate(self.levels):
            places, law = sampler.children(logits, level.count)
            drawn = head.vocabulary.names(places)
            # A head that guesses alike whatever came before (Medusa) gives one row for all nodes:
            # they share their children, of which only one node's can come to be accepted.
            drawn = drawn.expand(k, -1).flatten()
            q += [head.vocabulary.spread(law).expand(k, -1)] if law is not None else []
            drawn = drawn if level.places is None else drawn[level.places]
            tokens.append(drawn)
            if i + 1 < len(self.levels):
                above = drawn if level.expanded is None else drawn[level.expanded]
                logits, k = head.expand(state, above[None], level.parents)[0], len(above)
        tokens = torch.cat(tokens)
        if not q:
            return Draft(tokens, self.shape)
        return Draft(tokens, self.shape, torch.cat([*q, torch.zeros_like(q[0][:1])])[self.q_rows])


@cache
def fixed_tree(paths: tuple[Branch, ...], device: torch.device) -> FixedTree:
    return FixedTree(paths, device)


def cut(paths: tuple[Branch, ...], depth: int, device: torch.device) -> FixedTree:
    """The tree without what lies deeper: near the end less can still be written."""
    return fixed_tree(tuple(path for path in paths if len(path) <= depth), device)


# ------------------------------------------------------------------------------- growing trees


class GrowingTree:
    """The tree of the `nodes` tokens that the head deems likeliest, at most `depth` deep.

    At each depth the `width` best nodes are expanded, each to its `width` best children (EAGLE-2,
    section 4.1); of all that were seen the best are kept (4.2).
    """

    def __init__(self, nodes: int, depth: int, width: int, device):
        self.nodes, self.depth, self.width = nodes, depth, width
        self.slots = max(nodes, width * (depth - 1))  # what the target reads, what the head expands
        sizes = [width] + [width * width] * (depth - 1)
        each = [torch.full((size,), i + 1) for i, size in enumerate(sizes)]
        self.depths = torch.cat([torch.zeros(1, dtype=torch.long), *each]).to(device)

    def draft(self, head, state, root: Tensor, depth: int, sampler) -> Draft:
        """The tree below `root` (1,), down to `depth`. What is certain has been absorbed.

        `sampler.guesses(logits (k, S), count)` -> tokens (k, count), by their places in the head's
        vocabulary, and log-probabilities (k, count).
        """
        reach = torch.zeros(1, dtype=torch.float64, device=root.device)  # log-probability (k,)
        above = torch.zeros(1, dtype=torch.long, device=root.device)  # who they are (k,)
        tokens, parents, scores, seen = [root], [above], [reach], 1
        logits = head.expand(state)[0]  # (1, S)
        for i in range(depth):
            places, log_q = sampler.guesses(logits, self.width)
            found = head.vocabulary.names(places)
            # Strictly below its parent, even at probability 1: no node is kept without its parent.
            score = (reach[:, None] + log_q.double().clamp(max=-1e-9)).flatten()  # (k * width,)
            found = found.expand(len(reach), -1).flatten()  # Medusa's one row is for all nodes
            tokens.append(found)
            parents.append(above.repeat_interleave(self.width))
            scores.append(score)
            if i + 1 < depth:
                reach, best = score.topk(self.width)
                above = best + seen
                logits = head.expand(state, found[best][None], best // self.width)[0]
            seen += len(score)
        scores, tokens, parents = torch.cat(scores), torch.cat(tokens), torch.cat(parents)
        kept = scores.topk(min(self.nodes + 1, len(scores))).indices.sort().values  # root included
        parents = torch.searchsorted(kept, parents[kept])  # their new numbers
        shape = Shape(parents, self.depths[kept], ancestors(parents, depth))
        reached = scores[kept]
        return Draft(tokens[kept], shape, None, (reached - reached[parents]).exp())


def plan_draft(head, gamma: int, nodes: int, target) -> FixedTree | GrowingTree:
    """How `head` is to draft: a chain of `gamma`, or a tree of `nodes` at most `gamma` deep.

    Raises UserError for what it cannot draft.
    """
    device = target.embed.weight.device
    if gamma < 1:
        raise UserError(f"gamma is {gamma}, at least 1 token has to be drafted")
    if head.max_draft is not None and gamma > head.max_draft:
        raise UserError(f"gamma is {gamma}, but this head drafts at most {head.max_draft} tokens")
    if not 0 <= nodes <= MAX_NODES:
        raise UserError(f"nodes is {nodes}, it must lie between 0 (a chain) and {MAX_NODES}")
    if nodes == 0:
        return fixed_tree(chain(min(gamma, target.config.context)), device)
    if head.autoregressive:
        width = min(nodes, WIDTH, target.config.vocab_size)
        return GrowingTree(nodes, min(gamma, nodes, target.config.context), width, device)
    return fixed_tree(best_tree(rank_rates(head), nodes, gamma), device)


def rank_rates(head, name: str = "ranks") -> list[list[float]]:
    """What a head's r-th guess at each draft position is worth, from its last validation.

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
