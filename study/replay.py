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

from draft_head import Batch, Rollout
from drafts import Chain, CopyFirst, GrowingTree, Known, Lookup, deepest, root_only
from sampling import Sampler, argmax, falling

ROOTS = 32  # places of a text after which trees are drafted at once
FAR = 1 << 30  # a rank that no tree has room for


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


def chain_chances(head, text: PlainText, depth: int, sampler: Sampler) -> list[list[float]]:
    """chances[root]: how likely each token of a chain after that place of a text is accepted.

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
            q = head.vocabulary.spread(sampler.guess(logits))
            chance = (q.gather(-1, following[:, None])[:, 0] / text.p[i:]).clamp(max=1.0)
        for row, value in zip(chances[1:], chance.tolist()):
            row.append(value)
    return chances


def tree_ranks(head, text: PlainText, depth: int, width: int, sampler: Sampler) -> list:
    """How good the text's own tokens are among all nodes that a growing tree sees, of EAGLE's kind.

    ranks[place][i][d]: after the root at `place`, how many nodes that are at most d + 1 deep are
    better than the text's token i + 1 places on. FAR where that is no node. A tree of n nodes holds
    those with a rank below n. ROOTS drafts are made at once, by the head's own step: a node reads
    the text before its root, and its ancestors.
    """
    tokens = torch.tensor(text.tokens, device=text.hidden.device)  # (T + 1,)
    length, ranks = len(tokens) - 1, [[]] * text.start
    following = F.pad(head.vocabulary.indices_of(tokens), (0, depth), value=-1)
    read = Rollout(head.config.layers)
    certain = head.step(tokens[None, 1:], text.hidden, read, head.rotary(0, length))[0]  # (T, D)
    for roots in torch.arange(text.start, length, device=tokens.device).split(ROOTS):
        passes, shape = Rollout(head.config.layers), (len(roots), depth, width * width)
        passes.keys, passes.values = ([*map(list, part)] for part in (read.keys, read.values))
        scores = torch.full(shape, -math.inf, dtype=torch.float64, device=tokens.device)
        ours = scores[..., 0].clone()  # (N, depth): the scores of the text's tokens
        # Of the n drafts that go on: their numbers; their k last nodes, what these see, and their
        # scores; which of the k is the text's, or -1.
        which = torch.arange(len(roots), device=tokens.device)
        nodes = certain[roots - 1]  # (n k, D)
        seen = torch.arange(length, device=tokens.device) < roots[:, None]  # (n k, keys)
        reach, own = scores.new_zeros(len(roots), 1), which.new_zeros(len(roots), 1)
        for i in range(depth):
            n, k = reach.shape
            best, log_q = sampler.likeliest(head.logits(nodes[None])[0], width)  # (n k, width)
            score = (reach[..., None] + falling(log_q).view(n, k, width)).flatten(1)  # (n, k width)
            is_text = best.view(n, k, width) == following[roots[which] + 1 + i, None, None]
            is_text &= (torch.arange(k, device=own.device) == own)[..., None]
            is_text, best = is_text.flatten(1), best.view(n, k * width)
            scores[which, i, : k * width] = score
            ours[which, i] = score.masked_fill(~is_text, -math.inf).amax(1)
            reach, beam = score.topk(width)  # (n, width)
            in_beam, own = is_text.gather(1, beam).int().max(1, keepdim=True)
            own = own.where(in_beam > 0, -1)
            # Without the text in its beam a draft goes on while a node may still be better.
            worst = ours[which].where(ours[which] > -math.inf, math.inf).amin(1)
            on = ((own[:, 0] >= 0) | (reach[:, 0] > worst)).nonzero()[:, 0]
            if i + 1 == depth or len(on) == 0:
                break
            chosen = head.vocabulary.tokens_at(best.gather(1, beam)[on])  # (n', width)
            parents = (on[:, None] * k + beam[on] // width).flatten()
            which, reach, own = which[on], reach[on], own[on]
            itself = torch.eye(len(parents), dtype=torch.bool, device=on.device)
            seen = torch.cat([seen[parents], itself], 1)
            places = (roots[which] + i).clamp(max=head.target.config.context - 1)
            rotary = head.rotary.tree(0, places.repeat_interleave(width), seen)
            nodes = head.step(chosen.view(1, -1), nodes[parents][None], passes, rotary)[0]
        better = (scores[:, None] > ours[..., None, None]).sum(-1).cumsum(-1)  # (N, depth, depth)
        better.masked_fill_(ours[..., None] == -math.inf, FAR)
        ranks += better.tolist()
    return ranks


def accepted_chances(plan, known: Known, following: Tensor, depth: int, sampler) -> list[float]:
    """Of each next token of a text, following (n,): 1 where a draft of named tokens holds it.

    Only tokens that are drafted have one; 0 where the draft goes on otherwise.
    """
    following = following[:depth]
    known.ahead = following  # where an oracle looks: study/foresight.py
    draft = plan.draft(known, depth, sampler) if depth > 0 else root_only(known.root)
    beyond = following.new_full((depth,), -1)
    agrees = draft.tokens == torch.cat([known.root, following, beyond])[draft.shape.depth]
    accepted = draft.shape.depth[deepest(agrees, draft.shape)].item()
    rejected = accepted < min(draft.shape.depth.max().item(), len(following))
    return [1.0] * accepted + [0.0] * rejected


def parts(plan) -> list:
    """The plans that one makes its draft by: the first that drafts anything."""
    return [plan.lookup, plan.plan] if isinstance(plan, CopyFirst) else [plan]


def key(plan, head):
    """Alike for plans whose drafts are parts of one another."""
    if type(plan) is GrowingTree and head.autoregressive:
        return GrowingTree, plan.width
    if isinstance(plan, Lookup):
        return plan.match
    return Chain if isinstance(plan, Chain) else plan


def drafted_at_once(longest: dict, head, text: PlainText, sampler: Sampler) -> dict:
    """Of the plans, {key: the one that drafts furthest}, those that draft after all places at once.

    Of each a function of the root's place, a plan alike and the depth that it has room for, which
    gives the chances of `accepted_chances`.
    """
    found, most = {}, len(text.tokens) - 2
    for which, plan in longest.items():
        if which is Chain:
            depth = min(plan.depth, most)
            chances = chain_chances(head, text, depth, sampler) if depth else [[]] * (most + 2)
            found[which] = lambda place, _, depth, its=chances: its[place][:depth]
        elif isinstance(which, tuple):
            ranks = tree_ranks(head, text, plan.depth, plan.width, sampler)
            found[which] = lambda place, part, depth, its=ranks: (
                [1.0] * sum(rank[depth - 1] < part.nodes for rank in its[place][:depth])
            )
    return found


@torch.inference_mode()
def replay(head, plans: dict, text: PlainText, sampler: Sampler) -> dict[str, Replayed]:
    """The cycles of each plan along a text: {name: Replayed}."""
    tokens = torch.tensor(text.tokens, device=text.hidden.device)
    end, last = len(tokens) - 1, text.start + text.limit - 1  # last: the limit's
    starts = {name: [0.0] * (end + 1) for name in plans}
    sums = {name: [0.0, 0.0, 0.0] for name in plans}
    every = [part for plan in plans.values() for part in parts(plan)]
    longest = {key(part, head): part for part in sorted(every, key=lambda part: part.depth)}
    at_once = drafted_at_once(longest, head, text, sampler)
    room = last + 2 + max(plan.slots for plan in longest.values())
    known, read = Known(text.tokens[:1], head, room), 0
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
                depth, which = min(part.depth, left), key(part, head)
                if which in at_once:
                    found = at_once[which](place, part, depth)
                else:
                    if which not in judged:
                        furthest = longest[which]
                        ahead, most = tokens[place + 1 :], min(furthest.depth, left)
                        judged[which] = accepted_chances(furthest, known, ahead, most, sampler)
                    found = judged[which][:depth]
                if copied := isinstance(part, Lookup) and len(found) > 0:
                    break
            for accepted, chance in enumerate([*found, 0.0]):
                if place + accepted == end:
                    break  # the token that ends the text was accepted: the cycle is cut
                ends = reach * (1 - chance)
                starts[name][place + accepted + 1] += ends
                if plan.depth <= left:  # an uncut cycle, as `generate` counts them
                    for i, count in enumerate((accepted + 1, 1, copied)):
                        sums[name][i] += ends * count
                reach *= chance
    return {name: Replayed(starts[name][:end], *sums[name]) for name in plans}
