"""The cycles that a plan would go through on the way to a given text: tau without decoding.

A text that the target wrote alone holds all that its drafts would be judged by. So no pass of the
target is needed but one that reads the text. Greedily a token is accepted where it is the text's:
the cycles are the decoder's own. In a sampled text the token x after each place came from p. It
comes from an accepted draft with chance min(p, q)(x), so that a drawn token is accepted with chance
min(1, q(x) / p(x)) on the way to this text; else it ends its cycle. Then

    tau = tokens / cycles        expected values, summed over all ways to cut the text in cycles

(A product of alpha from every place, as if each were the beginning of a cycle, is biased by up to
4 %.) Heads are compared without timing, and on the same texts.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from draft_head import Batch
from drafts import Chain, CopyFirst, GrowingTree, Known, Lookup, deepest, root_only
from sampling import Sampler, argmax


class Follower(Sampler):
    """A sampler that knows the text to come, for an oracle to draft by (study/foresight.py)."""

    def follow(self, tokens: Tensor, vocabulary) -> None:
        """tokens (n,): the next ones."""
        self.indices = list(vocabulary.indices_of(tokens).split(1))


class PlainText(NamedTuple):
    """A text that the target wrote alone, and all of the target that a replay needs."""

    tokens: list[int]  # T + 1, the prompt first
    start: int  # the place of the first new token, which prefill wrote
    limit: int  # the new tokens that there was room for; it may have stopped before
    hidden: Tensor  # (1, T, D): the states after all tokens but the last
    p: Tensor  # (T,): the target's probability of each of tokens[1:]

    @classmethod
    @torch.inference_mode()
    def read(cls, target, prompt: list[int], new: list[int], limit: int, sampler: Sampler):
        """Of the `new` tokens after a prompt, in one pass of the target."""
        tokens = torch.tensor([*prompt, *new], device=target.embed.weight.device)
        hidden, p = target(tokens[None, :-1]), []
        for states, following in zip(hidden[0].split(64), tokens[1:, None].split(64)):
            rows = sampler.distribution(target.lm_head(states))
            p.append(rows.gather(-1, following)[:, 0])
        return cls(tokens.tolist(), len(prompt), limit, hidden, torch.cat(p))


class Replayed(NamedTuple):
    """A plan's cycles along a text: tau = written / cycles."""

    starts: list[float]  # (T,): the chance that a cycle begins with each token as its root
    written: float  # tokens of uncut cycles, as in `Generation.acceptance_length`
    cycles: float
    copied: float  # of these cycles those that judged a copy


class AllNodes(GrowingTree):
    """A growing tree that keeps every node it has seen: all smaller trees lie in it."""

    def __init__(self, depth: int, width: int, device):
        super().__init__(width + width**2 * (depth - 1), depth, width, device)

    def children(self, logits: Tensor, state, sampler) -> tuple[Tensor, Tensor]:
        self.found, log_q = super().children(logits, state, sampler)
        return self.found, log_q

    def goes_on(self, scores: Tensor) -> bool:
        """Until the text has left the beam, and no node to come can be better than its last one."""
        place, self.place = self.place, None
        if place is not None and self.ahead:
            children, token = self.found[place].tolist(), self.ahead.pop(0)
            if token in children:
                node = place * self.width + children.index(token)
                self.worst = scores[node]
                beam = scores.topk(self.width).indices.tolist()
                self.place = beam.index(node) if node in beam else None
        return self.place is not None or bool(scores.max() > self.worst)

    def size(self, scores: Tensor) -> int:
        self.scores = scores
        return len(scores)

    def ranks(self, following: Tensor, known: Known, depth: int, sampler) -> list[Tensor]:
        """Of each text token that is a node, the number of better ones, by the tree's depth.

        A tree of n nodes at most d deep has the i-th token if i <= d and ranks[i - 1][d - 1] < n.
        """
        # The text's tokens to come; where its last node is in the beam; and that node's score.
        self.ahead = known.head.vocabulary.indices_of(following).tolist()
        self.place, self.worst = 0, math.inf
        draft, ranks = self.draft(known, depth, sampler), []
        below, node = draft.shape.parents, 0
        for token in following[:depth]:
            children = (below == node) & (draft.tokens == token)
            children[0] = False
            if not children.any():
                break
            node = int(children.nonzero()[0])
            better = torch.bincount(draft.shape.depth[self.scores > self.scores[node]])
            better = torch.nn.functional.pad(better, (0, depth + 1 - len(better)))
            ranks.append(better[1:].cumsum(0))  # without the root
        return ranks


def chain_chances(head, text: PlainText, depth: int, sampler: Sampler) -> list[list[float]]:
    """The chance that each token of a chain is accepted, for drafts after every place of a text.

    A token counts only where all drafted before it were the text's. So the draft is the head's
    training form, in which it reads its own guesses along the text's own tokens.
    """
    tokens = torch.tensor([text.tokens], device=text.hidden.device)  # (1, T + 1)
    chances = [[] for _ in text.tokens]
    guess = head(Batch(tokens, text.hidden, torch.ones_like(tokens, dtype=torch.bool)), depth)
    for i, (states, to_logits) in enumerate(zip(guess.states, guess.maps), 1):
        following = tokens[0, 1 + i :]  # (N,): the i-th token after each root
        logits = F.linear(states, to_logits)
        if sampler.temperature == 0:
            chance = (head.vocabulary.tokens_at(argmax(logits)) == following).double()
        else:
            q = head.vocabulary.spread(sampler.distribution(logits))
            chance = (q.gather(-1, following[:, None])[:, 0] / text.p[i:]).clamp(max=1.0)
        for row, value in zip(chances[1:], chance.tolist()):
            row.append(value)
    return chances


def accepted_chances(plan, known: Known, following: Tensor, depth: int, sampler) -> list[float]:
    """Of each next token of a text, following (n,): 1 where a draft of named tokens holds it.

    Only tokens that are drafted have one; 0 where the draft goes on otherwise.
    """
    following = following[:depth]
    if known.head is not None:
        sampler.follow(following, known.head.vocabulary)
    draft = plan.draft(known, depth, sampler) if depth > 0 else root_only(known.root)
    beyond = following.new_full((depth,), -1)
    agrees = draft.tokens == torch.cat([known.root, following, beyond])[draft.shape.depth]
    accepted = draft.shape.depth[deepest(agrees, draft.shape)].item()
    rejected = accepted < min(draft.shape.depth.max().item(), len(following))
    return [1.0] * accepted + [0.0] * rejected


def parts(plan) -> list:
    """The plans that one makes its draft by: the first that drafts anything."""
    return [plan.lookup, plan.plan] if isinstance(plan, CopyFirst) else [plan]


def key(plan):
    """Alike for plans whose drafts are parts of one another."""
    if type(plan) is GrowingTree:
        return "tree", plan.width
    return Chain if isinstance(plan, Chain) else getattr(plan, "match", plan)


def judge(whole, known: Known, following: Tensor, depth: int, sampler):
    """A function of a part of the plan `whole`, and of the depth that it has room for.

    It gives the chances of `accepted_chances`; here the draft is made, for all parts at once.
    """
    if isinstance(whole, AllNodes):
        ranks = whole.ranks(following, known, depth, sampler) if depth > 0 else []
        ranks = [rank.tolist() for rank in ranks]
        return lambda part, d: [1.0] * sum(rank[d - 1] < part.nodes for rank in ranks[:d])
    chances = accepted_chances(whole, known, following, depth, sampler)
    return lambda part, d: chances[:d]


@torch.inference_mode()
def replay(head, plans: dict, text: PlainText, sampler: Follower) -> dict[str, Replayed]:
    """The cycles of each plan along a text: {name: Replayed}."""
    tokens = torch.tensor(text.tokens, device=text.hidden.device)
    end, last = len(tokens) - 1, text.start + text.limit - 1  # last: the limit's
    starts = {name: [0.0] * (end + 1) for name in plans}
    sums = {name: [0.0, 0.0, 0.0] for name in plans}
    longest = {}  # of the plans that are alike, the one that drafts furthest
    every = [part for plan in plans.values() for part in parts(plan)]
    for plan in sorted(every, key=lambda plan: plan.depth):
        longest[key(plan)] = plan
        if type(plan) is GrowingTree:
            longest[key(plan)] = AllNodes(plan.depth, plan.width, tokens.device)
    room = last + 2 + max(plan.slots for plan in longest.values())
    known, read = Known(text.tokens[:1], head, room), 0
    depth = min(longest[Chain].depth, end - 1) if Chain in longest else 0
    along = chain_chances(head, text, depth, sampler) if depth else [[]] * end
    for name in plans:
        starts[name][text.start] = 1.0
    for place in range(text.start, end):
        new = slice(read + 1, place + 1)
        known.add(text.tokens[new], tokens[new], text.hidden[:, read:place])
        read, left, judged = place, last - place - 1, {}
        for name, plan in plans.items():
            if (reach := starts[name][place]) == 0:
                continue
            for part in parts(plan):
                depth, which = min(part.depth, left), key(part)
                if which is not Chain and which not in judged:
                    ahead = tokens[place + 1 :], min(longest[which].depth, left)
                    judged[which] = judge(longest[which], known, *ahead, sampler)
                found = along[place][:depth] if which is Chain else judged[which](part, depth)
                if copied := isinstance(part, Lookup) and found:
                    break
            for accepted, chance in enumerate([*found, 0.0]):
                if place + accepted == end:
                    break  # the token that ends the text was accepted: the cycle is cut
                ends = reach * (1 - chance)
                starts[name][place + accepted + 1] += ends
                if plan.depth <= left:
                    for i, count in enumerate((accepted + 1, 1, bool(copied))):
                        sums[name][i] += ends * count
                reach *= chance
    return {name: Replayed(starts[name][:end], *sums[name]) for name in plans}
