"""Where a draft comes from and how far it goes: chains, fixed trees, trees that grow, copies.

A draft is a tree of tokens. Its root is the last certain token; every path down from the root is
one way the text may go on. A chain is the tree with one child at each node. The target reads all
nodes at once, in one sequence. Each node sees the certain text and its own ancestors only:
positions and an attention mask say so (SpecInfer, arXiv 2305.09781). A second guess at a place
costs a node in that pass. It pays where a pass over 16 tokens costs hardly more than one over 5.

A **plan** makes the drafts. All plans have one interface:

    plan.depth                                        the most tokens in a row that it drafts
    plan.nodes                                        the most tokens that it drafts in all
    plan.slots                                        room needed in the caches of target and head
    plan.draft(known, depth, sampler)                 a Draft after the text `known`, to this depth

- `Chain`: one token after the other. Greedily each is the head's likeliest token; above temperature
  0 each is *drawn* from the head's q, and `speculate.verify` judges it.
- `FixedTree`: the same shape in every cycle. A node is named by the ranks of the guesses on its
  path: (0, 2) is the third-best token after the best first one. `best_tree` takes the nodes that
  were most often right on validation text (Medusa, 2401.10774).
- `GrowingTree`: the nodes that the head thinks likeliest, by the product of its probabilities along
  the path, found by a beam and ranked again (EAGLE-2, 2406.16858).
- `Lookup`: no head at all. If the last n tokens stood in the text before, it copies what followed
  there (prompt lookup; LLMA, 2304.04487). `CopyFirst` does so beside a head, which drafts where
  nothing matches.

The tokens of a tree or a copy are *named*, not drawn, at any temperature: `speculate.match` judges
them. To treat the likeliest nodes as samples of q would change the distribution of the text.

Read next: model.py.
"""

import heapq
from functools import cache
from itertools import count
from typing import NamedTuple

import torch
from torch import Tensor

from draft_head import rank_rates
from plumbing.cli import UserError
from sampling import falling

MAX_NODES = 256  # of a tree: a pass over more is no longer cheap anywhere
WIDTH = 4  # nodes that a growing tree expands at each depth, and children of each
MATCH = 2  # tokens that have to match, at least, before a copy takes the place of a head's draft
ALONE = 1  # the same where there is no head, and else nothing would be drafted (study/sizes.py)
LONGEST = 4  # tokens that are compared, at most: the longest match is taken
COPIED = 8  # tokens copied at once
GAMMA = 4  # tokens of a head's chain, where nothing else is asked for
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
    source: str = "drafted"  # by a head; or copied
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


# -------------------------------------------------------------------- the text before a draft


class Known:
    """The text that is certain, and how far the head has read it.

    A plan that copies looks into `tokens`; one that needs the head calls `read`.
    """

    def __init__(self, prompt: list[int], head=None, room: int = 0):
        self.tokens = list(prompt)
        self.root: Tensor  # the last token (1,): the target has not read it yet
        self.head, self.state = head, head.start(room) if head is not None else None
        self.unread: list[tuple[Tensor, Tensor]] = []
        self.after: dict[tuple, int] = {}  # a run of tokens -> the place after its latest copy
        self.entered = 0  # tokens of the text that end a run in `after`

    def add(self, new: list[int], tokens: Tensor, hidden: Tensor) -> None:
        """Go on with `new`; the head is to read tokens (T,), each after its hidden (1, T, D)."""
        self.tokens += new
        self.root = tokens[-1:]
        if self.head is not None:
            self.unread.append((tokens, hidden))

    def read(self):
        """(head, its state), after it has absorbed in one pass all that it has missed."""
        if self.head is None:
            raise UserError("this plan needs a trained head")
        if self.unread:
            tokens, hidden = zip(*self.unread)
            self.head.absorb(self.state, torch.cat(tokens)[None], torch.cat(hidden, 1))
            self.unread.clear()
        return self.head, self.state

    def stood_before(self, least: int) -> int | None:
        """The place after the latest copy of the last LONGEST tokens, else of fewer; or None.

        At least `least` of them have to have stood there before. Each token is entered once.
        """
        text = self.tokens
        while self.entered + 1 < len(text):  # a run that ends the text has nothing after it yet
            self.entered += 1
            for n in range(1, min(LONGEST, self.entered) + 1):
                self.after[tuple(text[self.entered - n : self.entered])] = self.entered
        for n in range(min(LONGEST, len(text)), least - 1, -1):
            if place := self.after.get(tuple(text[-n:])):
                return place
        return None


# -------------------------------------------------------------------------------------- chains


@cache
def chain_shape(length: int, device: torch.device) -> Shape:
    nodes = torch.arange(length + 1, device=device)
    return Shape((nodes - 1).clamp(min=0), nodes, nodes[:, None] >= nodes)


def root_only(root: Tensor) -> Draft:
    """A draft of nothing after `root` (1,)."""
    return Draft(root, chain_shape(0, root.device))


def in_words(gamma: int, nodes: int) -> str:
    return f"a tree of {nodes} tokens, at most {gamma} deep" if nodes else f"a chain of {gamma}"


class Plan:
    def __str__(self) -> str:
        return in_words(self.depth, self.nodes if self.nodes > self.depth else 0)


class Chain(Plan):
    """`length` tokens, one after the other."""

    def __init__(self, length: int):
        self.depth = self.nodes = self.slots = length

    def draft(self, known: Known, depth: int, sampler) -> Draft:
        """See the file's docstring."""
        head, state = known.read()
        tokens, laws, logits = [known.root], [], [head.expand(state)[0]]  # logits: (1, S) each
        for i in range(depth):
            index, q = sampler.draw(logits[-1])  # (1,), (1, S) or None
            tokens.append(head.vocabulary.tokens_at(index))
            laws += [head.vocabulary.spread(q)] if q is not None else []
            if i + 1 < depth:
                logits.append(head.expand(state, tokens[-1][None])[0])
        shape = chain_shape(depth, known.root.device)
        q = torch.cat(laws) if laws else None  # (N, V)
        return Draft(torch.cat(tokens), shape, q, "drafted", tuple(logits), shape.parents[1:])


# --------------------------------------------------------------------------------- fixed trees


def best_tree(rates: list[list[float]], nodes: int, depth: int) -> tuple[Branch, ...]:
    """The `nodes` paths of at most `depth` ranks that are likeliest right (Medusa, section 2.3.3).

    `rates[i][r]`: how often the r-th guess at draft position i is right; the last row serves all
    positions beyond. A path's chance is taken as their product. A node is never likelier than its
    parent or the better-ranked guess beside it, so the best are found one after the other; where a
    record says otherwise, a node waits for both all the same.
    """

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


class Level(NamedTuple):
    """From the k nodes that a fixed tree expands at one depth to its n nodes at the next."""

    k: int
    guesses: int  # the most children of one of the k
    above: Tensor  # (n,): which of the k each node follows
    rank: Tensor  # (n,): which guess it is
    expanded: Tensor  # (m,): which of the n are expanded next
    parents: Tensor | None  # (m,): which of the k these follow; None: k is 1


class FixedTree(Plan):
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

    def draft(self, known: Known, depth: int, sampler) -> Draft:
        """See the file's docstring."""
        if depth < self.depth:
            upper = tuple(path for path in self.paths if len(path) <= depth)
            return fixed_tree(upper, known.root.device).draft(known, depth, sampler)
        head, state = known.read()
        tokens, logits, above, parents = [known.root], [], None, None
        for level in self.levels:
            rows = head.expand(state, above, parents)[0]  # (k, S)
            # Medusa guesses alike whatever came before: its one row serves all k nodes.
            best = rows.topk(level.guesses).indices.expand(level.k, -1)
            tokens.append(head.vocabulary.tokens_at(best)[level.above, level.rank])
            logits.append(rows.expand(level.k, -1))
            above, parents = tokens[-1][level.expanded][None], level.parents
        return Draft(torch.cat(tokens), self.shape, None, "drafted", tuple(logits), self.rows)


@cache
def fixed_tree(paths: tuple[Branch, ...], device: torch.device) -> FixedTree:
    return FixedTree(paths, device)


# ------------------------------------------------------------------------------- growing trees


class GrowingTree(Plan):
    """The tree of the `nodes` tokens that the head deems likeliest, at most `depth` deep.

    At each depth the `width` best nodes are expanded, each to its `width` best children (EAGLE-2,
    section 4.1); of all that were seen the best are kept (4.2). In greedy decoding the head's
    probabilities are sharpened first (`sampling.GREEDY_TEMPERATURE`).
    """

    def __init__(self, nodes: int, depth: int, width: int, device):
        self.nodes, self.depth, self.width = nodes, depth, width
        self.slots = max(nodes, width * (depth - 1))  # what the target reads, what the head expands
        sizes = [1, width] + [width * width] * (depth - 1)
        self.depths = torch.arange(depth + 1).repeat_interleave(torch.tensor(sizes)).to(device)

    def children(self, logits: Tensor, state, sampler) -> tuple[Tensor, Tensor]:
        """Of k nodes with logits (k, S): tokens, by index, and the logs of their chances."""
        return sampler.likeliest(logits, self.width)  # (k, width) both

    def goes_on(self, scores: Tensor) -> bool:
        """Whether to expand below the deepest nodes so far, whose logs these are."""
        return True

    def size(self, scores: Tensor) -> int:
        """How many nodes to keep of all that were seen, the root included."""
        return min(self.nodes + 1, len(scores))

    def draft(self, known: Known, depth: int, sampler) -> Draft:
        """See the file's docstring."""
        (head, state), root = known.read(), known.root
        reach = torch.zeros(1, dtype=torch.float64, device=root.device)  # log-probability (k,)
        above = torch.zeros(1, dtype=torch.long, device=root.device)  # the k nodes' numbers
        tokens, parents, scores, seen = [root], [above], [reach], 1
        logits = [head.expand(state)[0]]  # (k, S) each
        for i in range(depth):
            best, log_q = self.children(logits[-1], state, sampler)
            found = head.vocabulary.tokens_at(best).flatten()  # (k * width,)
            score = (reach[:, None] + falling(log_q)).flatten()
            tokens.append(found)
            parents.append(above.repeat_interleave(self.width))
            scores.append(score)
            if i + 1 == depth or not self.goes_on(score):
                break
            reach, best = score.topk(self.width)
            above = best + seen
            rows = head.expand(state, found[best][None], best // self.width)[0]
            logits.append(rows.expand(len(best), -1))  # as in FixedTree
            seen += len(score)
        scores, tokens, parents = torch.cat(scores), torch.cat(tokens), torch.cat(parents)
        kept = scores.topk(self.size(scores)).indices.sort().values
        parents = torch.searchsorted(kept, parents[kept])  # their new numbers
        shape = Shape(parents, self.depths[kept], ancestors(parents, depth))
        rows = (kept[1:] - 1) // self.width
        return Draft(tokens[kept], shape, None, "drafted", tuple(logits), rows)


# -------------------------------------------------------------------------------------- copies


class Lookup:
    """Up to `length` tokens that followed where the last `match` tokens or more stood before.

    A copy that reaches the end of the text goes on with its own tokens: a loop goes on.
    """

    def __init__(self, match: int = MATCH, length: int = COPIED):
        self.match, self.depth = match, length
        self.nodes = self.slots = length

    def __str__(self) -> str:
        return f"a copy of {self.depth} where {self.match} tokens match"

    def draft(self, known: Known, depth: int, sampler) -> Draft:
        """See the file's docstring. Only the root where nothing matches."""
        place = known.stood_before(self.match)
        if place is None:
            return root_only(known.root)._replace(source="copied")
        text = known.tokens[place : place + depth]
        while len(text) < depth:
            text.append(text[place - len(known.tokens) + len(text)])  # past the end, itself
        copied = torch.tensor(text, device=known.root.device)
        shape = chain_shape(len(text), known.root.device)
        return Draft(torch.cat([known.root, copied]), shape, source="copied")


class CopyFirst:
    """A copy where `lookup` finds one, else the draft of `plan`."""

    def __init__(self, lookup: Lookup, plan):
        self.lookup, self.plan = lookup, plan
        self.depth = max(lookup.depth, plan.depth)
        self.nodes = max(lookup.nodes, plan.nodes)
        self.slots = max(lookup.slots, plan.slots)

    def __str__(self) -> str:
        return f"{self.lookup}, else {self.plan}"

    def draft(self, known: Known, depth: int, sampler) -> Draft:
        """See the file's docstring."""
        copied = self.lookup.draft(known, min(depth, self.lookup.depth), sampler)
        if len(copied.tokens) > 1:
            return copied
        return self.plan.draft(known, min(depth, self.plan.depth), sampler)


# --------------------------------------------------------------------------------- which plan


def plan_draft(head, gamma: int | None, nodes: int, target, lookup: int = 0):
    """A chain of `gamma`, or a tree of `nodes` at most `gamma` deep, or a copy where so many tokens
    match as `lookup` says, 0: never. Raises UserError for a draft that cannot be made.
    """
    if not 0 <= lookup <= LONGEST:
        raise UserError(f"lookup is {lookup}, it must lie between 0 (never) and {LONGEST} tokens")
    if gamma is not None and gamma < 1:
        raise UserError(f"gamma is {gamma}, at least 1 token has to be drafted")
    device = target.embed.weight.device
    if head is None:
        length = min(gamma or COPIED, target.config.context)
        return Lookup(lookup, length) if lookup else Chain(0)
    if lookup:
        return CopyFirst(Lookup(lookup), plan_draft(head, gamma, nodes, target))
    gamma = gamma or GAMMA
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
