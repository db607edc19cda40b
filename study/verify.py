"""What "lossless" means, for people to see: the law of a text with drafts, beside the target's.

A target of three letters writes three of them. Its 27 texts have probabilities, which can be
written down. Now it writes the same three letters with drafts: every draft that can be drawn, every
verdict on it, every letter that can follow. All of these chances are added up, text by text:

    a chain     letters drawn from another law q, judged by min(1, p / q) and the residual
    a tree      letters named by q, judged by the target's own choice
    a copy      letters that followed before, judged likewise

Each law has to be the target's, to the last digit of float64. That a law *could* be another is
shown by broken rules, each a mistake that somebody has made. The functions are the decoder's own:
`sampling.acceptance_probability`, `sampling.residual`, `speculate.match`, `drafts.Lookup`.

    python -m study.verify
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from drafts import Known, Lookup, Shape, ancestors, chain_shape
from plumbing.cli import option, parse, run
from sampling import acceptance_probability, residual
from speculate import match

LETTERS, LENGTH = "abc", 3
VOCAB, CPU = len(LETTERS), torch.device("cpu")
BEFORE = (0, 1, 2, 0)  # the text before: "abca", so that there is something to copy
EXACT = 1e-12  # a difference that is rounding
Text = tuple[int, ...]
Cycle = Callable[[Text], Iterator[tuple[Text, Tensor]]]  # the ways to go on, with their chances


@dataclass(frozen=True)
class VerifyConfig:
    seed: int = option(0, "of the laws p and q", least=0)


def random_law(seed: int) -> list[Tensor]:
    """law[i][text of i letters]: the distribution (VOCAB,) of the next one, float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ([VOCAB] * (i + 1) for i in range(LENGTH))
    logits = [1.2 * torch.randn(shape, generator=generator) for shape in shapes]
    return [each.double().softmax(-1) for each in logits]


def law_of(cycle: Cycle) -> Tensor:
    """(VOCAB,) * LENGTH: the probability of each text, over all ways to write it in cycles."""
    law = torch.zeros([VOCAB] * LENGTH, dtype=torch.float64)

    def go_on(text: Text, chance: Tensor) -> None:
        if len(text) == LENGTH:
            law[text] += chance
            return
        for written, next_chance in cycle(text):
            go_on((*text, *written), chance * next_chance)

    go_on((), torch.ones((), dtype=torch.float64))
    return law


def plainly(p: list[Tensor], text: Text):
    """One letter of the target's."""
    for x in range(VOCAB):
        yield (x,), p[len(text)][text][x]


# --------------------------------------------------------------------------------- three kinds


def chained(p, q, text: Text, accept=acceptance_probability, rest=residual):
    """Up to two letters drawn from q, and one more: `speculate.verify`, written out."""
    begun = len(text)
    for words in itertools.product(range(VOCAB), repeat=min(2, LENGTH - begun - 1)):
        chance = torch.ones((), dtype=torch.float64)
        for i, x in enumerate(words):
            chance = chance * q[begun + i][(*text, *words[:i])][x]
        for i, x in enumerate(words):
            p_row, q_row = (law[begun + i][(*text, *words[:i])] for law in (p, q))
            accepted = accept(p_row[x], q_row[x])
            for y, instead in enumerate(rest(p_row, q_row)):
                yield (*words[:i], y), chance * (1 - accepted) * instead
            chance = chance * accepted
        for y, own in enumerate(p[begun + len(words)][(*text, *words)]):
            yield (*words, y), chance * own


def judged(p, text: Text, tokens: Tensor, shape: Shape):
    """Named letters: every choice of the target's after each node, judged by `match`."""
    paths = [tokens[shape.ancestors[node]][1:].tolist() for node in range(len(tokens))]
    rows = [p[len(text) + len(path)][(*text, *path)] for path in paths]
    for choice in itertools.product(range(VOCAB), repeat=len(tokens)):
        chance = torch.stack([row[y] for row, y in zip(rows, choice)]).prod()
        node, following = match(tokens, shape, torch.tensor(choice))
        yield (*paths[node], following.item()), chance


def treed(p, q, text: Text):
    """The two letters that q thinks likeliest, and below the first of them its likeliest."""
    begun = len(text)
    if begun == LENGTH - 1:
        yield from plainly(p, text)
        return
    first, second = q[begun][text].topk(2).indices.tolist()
    tokens, parents = [-1, first, second], [0, 0, 0]
    if begun + 2 < LENGTH:
        tokens.append(q[begun + 1][(*text, first)].argmax().item())
        parents.append(1)
    tokens, parents = torch.tensor(tokens), torch.tensor(parents)
    depth = torch.tensor([0, 1, 1, 2][: len(tokens)])
    yield from judged(p, text, tokens, Shape(parents, depth, ancestors(parents, 2)))


def copied(p, text: Text):
    """What followed where the last letter stood before, up to two letters of it."""
    known, depth = Known([*BEFORE, *text]), min(2, LENGTH - len(text) - 1)
    known.root = torch.tensor(known.tokens[-1:])
    draft = Lookup(1, 2).draft(known, depth, None) if depth else None
    if draft is None or len(draft.tokens) == 1:
        yield from plainly(p, text)
    else:
        yield from judged(p, text, draft.tokens, chain_shape(len(draft.tokens) - 1, CPU))


# ----------------------------------------------------------------------------- broken rules


def as_if_drawn(p, q, text: Text):
    """The likeliest letter of q, judged as if it had been drawn from q."""
    begun = len(text)
    p_row, q_row = p[begun][text], q[begun][text]
    x = q_row.argmax().item()
    accepted = acceptance_probability(p_row[x], q_row[x])
    for y, instead in enumerate(residual(p_row, q_row)):
        yield (y,), (1 - accepted) * instead
    if begun == LENGTH - 1:
        yield (x,), accepted
    else:
        for y, own in enumerate(p[begun + 1][(*text, x)]):
            yield (x, y), accepted * own


def generous(p_x: Tensor, q_x: Tensor) -> Tensor:
    return (1.5 * p_x / q_x).clamp(max=1.0)


def main() -> None:
    config = parse(VerifyConfig, about=__doc__)
    p, q = random_law(2 * config.seed + 1), random_law(2 * config.seed + 2)
    target = law_of(partial(plainly, p))
    exact = {
        "a chain": law_of(partial(chained, p, q)),
        "a tree": law_of(partial(treed, p, q)),
        "a copy": law_of(partial(copied, p)),
    }
    print("Probability of each text of three letters, in per cent:\n")
    print(f"  text  {'plain':>9}  " + "  ".join(f"{name:>9}" for name in exact))
    for text in itertools.product(range(VOCAB), repeat=LENGTH):
        cells = [100 * law[text].item() for law in (target, *exact.values())]
        words = "".join(LETTERS[x] for x in text)
        print(f"  {words:<4}  " + "  ".join(f"{cell:9.5f}" for cell in cells))
    worst = max((law - target).abs().max().item() for law in exact.values())
    print(
        f"\nThe largest difference is {worst:.0e}: the texts have one law, however bad the draft."
    )
    broken = {
        "accepts by min(1, 1.5 p / q)": partial(chained, p, q, accept=generous),
        "draws from p after a rejection": partial(chained, p, q, rest=lambda p, q: p),
        "judges a named letter as if it were drawn": partial(as_if_drawn, p, q),
    }
    print("\nA decoder that\n")
    seen = []
    for name, cycle in broken.items():
        law = law_of(cycle)
        apart = (law - target).abs().sum().item() / 2
        most = (law - target).abs().argmax().item()
        text = "".join(LETTERS[most // VOCAB**i % VOCAB] for i in reversed(range(LENGTH)))
        was, now = (100 * each.flatten()[most].item() for each in (target, law))
        print(f"  {name:42} writes {text!r} in {now:.1f} % of texts, not {was:.1f} %: ", end="")
        print(f"{apart:.1%} of its texts are wrong")
        seen.append(apart > 0.001 and abs(law.sum().item() - 1) < EXACT)
    if worst > EXACT or not all(seen):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
