"""The cost of a pass, the speedup that follows, and the size of draft that pays.

The cost model (2211.17192, theorem 3.8, in measured units) predicts the speedup from tau:

    speedup = tau / (c_verify + c_draft)

with c_verify the cost of a target pass over the whole draft and c_draft that of making the draft,
both in units of one plain step. They are measured here in passes that accept nothing and write
nothing: taken from a decoding run's own timers they would agree with its speed by construction.

Conditions have to be those of decoding, or the model explains nothing. A plain step is measured
among plain steps. A verification is measured after a draft, and a draft after a verification, since
each finds the processor's caches as the other left them: alone, in a loop of its own, it is up to a
tenth faster. `best_size` chooses the size of draft with the highest predicted speedup.

Read next: bench.py.
"""

import copy
import statistics
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from drafts import (
    WIDTH,
    best_tree,
    chain_paths,
    expected_length,
    fixed_tree,
    plan_draft,
    rank_rates,
)
from plumbing.machine import synchronized_time
from sampling import Sampler, argmax

SECONDS = 1.5  # that `best_size` may measure for
LENGTH = 256  # of the text that they come after; half the window where that is less
ROUNDS = 5  # that it measures at least, however long they take
COUNTS = (1, 2, 4, 8, 16, 32)  # tokens of the passes it measures; the rest is interpolated
DEPTHS = (1, 2, 4, 8)  # of the drafts it measures, likewise
CHAINS = range(1, 9)  # depths it considers
TREES = (4, 6, 8, 10, 12, 16, 20, 24, 31)  # nodes; with the root at most 32 tokens a pass


class Bench:
    """A text of `length` tokens that has been read, and passes that are timed after it."""

    @torch.inference_mode()
    def __init__(self, target, length: int, extra: int, sampler: Sampler | None = None):
        """`extra`: the most tokens a pass will read. `sampler`: the rule of drafting, or greedy."""
        self.target, self.length, self.device = target, length, target.embed.weight.device
        self.sampler = sampler or Sampler(self.device)
        generator, size = torch.Generator().manual_seed(0), (1, length + extra)
        tokens = torch.randint(target.config.vocab_size, size, generator=generator)
        self.tokens = tokens.to(self.device)
        self.cache = target.new_cache(target.config.context + extra)
        self.hidden = target(self.tokens[:, :length], self.cache)

    def target_pass(self, tokens, *where) -> None:
        """One pass of the target and its choices as numbers. Rolling back is free."""
        self.cache.rollback(self.length)
        argmax(self.target.lm_head(self.target(tokens, self.cache, *where)[0])).tolist()

    def read(self, count: int) -> float:
        """Seconds of a pass over `count` tokens: a plain step, or a draft of count - 1 nodes."""
        tokens = self.tokens[:, self.length : self.length + count]
        if count == 1:
            return self.timed(self.target_pass, tokens)
        # A star: beside a small window a chain would reach beyond its end.
        shape = fixed_tree(tuple((r,) for r in range(count - 1)), self.device).shape
        where = self.length + shape.depth, shape.ancestors
        return self.timed(self.target_pass, tokens, *where)

    def drafting(self, head, plan):
        """A function that drafts as after a cycle that accepted a middling number of tokens."""
        read = min(3, self.length - 1)
        state = head.start(self.target.config.context + plan.slots)
        before = self.length - read
        head.absorb(state, self.tokens[:, 1 : before + 1], self.hidden[:, :before])
        root = self.tokens[0, self.length, None]
        new = self.tokens[:, before + 1 : self.length + 1], self.hidden[:, before:]

        def draft():
            again = copy.copy(state)  # the same state each time: absorbing rolls its cache back
            head.absorb(again, *new)
            return plan.draft(head, again, root, plan.depth, self.sampler)

        return draft

    def cycle(self, head, plan):
        """A function that drafts, verifies, and returns the seconds of either."""
        draft = self.drafting(head, plan)

        def job() -> dict[str, float]:
            begin = synchronized_time(self.device)
            drafted = draft()
            seconds = synchronized_time(self.device) - begin
            where = drafted.positions_and_mask(self.length)
            verify = self.timed(self.target_pass, drafted.tokens[None], *where)
            return {"draft": seconds, "verify": verify}

        return job

    def timed(self, function, *arguments) -> float:
        begin = synchronized_time(self.device)
        function(*arguments)
        return synchronized_time(self.device) - begin


@torch.inference_mode()
def isolated_costs(target, methods: dict, length: int, sampler=None, turns: int = 15) -> dict:
    """Median seconds of a plain step, and of each method's drafting and verification.

    methods: name -> (head, plan). -> {"step": s, name: {"draft": s, "verify": s}}. The jobs take
    turns, so that a slow minute hits all of them; a turn is seven repetitions, the first two not
    counted, since a decoder finds the caches as it left them itself.
    """
    most = max((plan.nodes for _, plan in methods.values()), default=0) + 1
    bench = Bench(target, length, most, sampler)
    jobs = {"step": lambda: {"step": bench.read(1)}}
    jobs |= {name: bench.cycle(head, plan) for name, (head, plan) in methods.items()}
    samples = {name: {} for name in jobs}
    for _ in range(turns):
        for name, job in jobs.items():
            for repeat in range(7):
                for phase, seconds in job().items():
                    if repeat >= 2:
                        samples[name].setdefault(phase, []).append(seconds)
    medians = {
        name: {phase: statistics.median(values) for phase, values in phases.items()}
        for name, phases in samples.items()
    }
    return medians | {"step": medians["step"]["step"]}


# ------------------------------------------------------------------------ the size of a draft


def in_words(gamma: int, nodes: int) -> str:
    return f"a tree of {nodes} tokens, at most {gamma} deep" if nodes else f"a chain of {gamma}"


class Size(NamedTuple):
    """A size of draft and the model's figures for it."""

    gamma: int
    nodes: int  # 0: a chain
    tau: float
    c_verify: float
    c_draft: float

    @property
    def speedup(self) -> float:
        return self.tau / (self.c_verify + self.c_draft)

    def __str__(self) -> str:
        draft = in_words(self.gamma, self.nodes)
        costs = f"{self.c_verify:.2f} + {self.c_draft:.2f}"
        return f"{draft} (expected: tau {self.tau:.2f}, costs {costs}, {self.speedup:.2f}x)"


def expected_tau(head, gamma: int, nodes: int, temperature: float) -> float:
    """tau by the head's record on held-out text, all positions independent.

    Greedily by how often each guess was the target's choice. Above temperature 0, from figures at
    temperature 1, by alpha for a chain and by the target's p of each guess for a tree. A growing
    tree is reckoned as the best fixed one of its width, which it should surpass.
    """
    ranks, rates = rank_rates(head), rank_rates(head, "mass" if temperature > 0 else "ranks")
    if nodes == 0:
        if temperature > 0:
            valid = head.training_record["valid"]
            rates = [[valid[f"alpha_{i + 1}"]] for i in range(len(rates))]
        return expected_length(rates, chain_paths(gamma))
    if head.autoregressive:
        ranks = rates = [row[:WIDTH] for row in rates]
    return expected_length(rates, best_tree(ranks, nodes, gamma))


def tree_warning(head, gamma: int, nodes: int, temperature: float) -> str | None:
    """A line on a tree from which less is expected than from a chain; None: there is no reason.

    A tree names the likeliest tokens, a chain draws its tokens as the target does. The head's
    figures are of temperature 1: below 1/2 they say nothing.
    """
    if nodes <= 0 or temperature < 0.5 or not hasattr(head, "training_record"):
        return None
    tree, chain = (expected_tau(head, gamma, n, temperature) for n in (nodes, 0))
    if tree >= chain:
        return None
    chains = f"a chain of {gamma} reaches tau {chain:.2f}"
    return f"at temperature 1 {chains}, a tree of {nodes} {tree:.2f} (held-out text): --nodes 0"


@torch.inference_mode()
def size_costs(target, head, sizes: list, temperature: float = 0.0) -> tuple[dict, dict]:
    """Seconds of passes {tokens: s} and of making drafts {(gamma, is it a tree): s}.

    sizes: pairs (gamma, nodes). The passes and the drafts take turns for about SECONDS, ROUNDS at
    least: a large target takes longer. The first round does not count. Before each, untimed, comes
    the job that precedes it in decoding.
    """
    context, longest = target.config.context, max(gamma for gamma, _ in sizes)
    most = max(nodes or gamma for gamma, nodes in sizes) + 1
    counts = [n for n in COUNTS if n < most] + [most]
    sampler = Sampler(target.embed.weight.device, temperature)
    length = min(LENGTH, context // 2, context - longest - 1)
    bench = Bench(target, length, most, sampler)
    jobs = {n: (bench.read, n) for n in counts}
    # The cost of drafting a tree depends on its depth, hardly on its nodes.
    plans = {(gamma, nodes > 0): plan_draft(head, gamma, nodes, target) for gamma, nodes in sizes}
    measured = {}  # depths: of chains and of trees those in DEPTHS, the lowest and the highest
    for tree in {tree for _, tree in plans}:
        depths = sorted(depth for depth, is_tree in plans if is_tree == tree)
        measured[tree] = [d for d in depths if d in DEPTHS or d in (depths[0], depths[-1])]
    drafts = [(depth, tree) for tree, depths in measured.items() for depth in depths]
    jobs |= {key: (bench.timed, bench.drafting(head, plans[key])) for key in drafts}
    # Before a plain step another one, before a verification a draft, before a draft a verification.
    deepest = bench.drafting(head, plans[max(plans)])
    before = dict.fromkeys(counts, deepest) | dict.fromkeys(drafts, partial(bench.read, most))
    before[1] = partial(bench.read, 1)
    samples = {name: [] for name in jobs}
    begin, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - begin < SECONDS:
        for name, (job, argument) in jobs.items():
            before[name]()
            samples[name].append(job(argument))
        rounds += 1
    seconds = {name: statistics.median(values[1:]) for name, values in samples.items()}
    of_depths = {tree: [seconds[d, tree] for d in depths] for tree, depths in measured.items()}
    drafting = {key: np.interp(key[0], measured[key[1]], of_depths[key[1]]).item() for key in plans}
    return {n: seconds[n] for n in counts}, drafting


def fastest(head, sizes: list, passes: dict, drafts: dict, temperature: float = 0.0) -> Size:
    """Of the sizes (gamma, nodes) the one with the highest predicted speedup."""

    def size(gamma: int, nodes: int) -> Size:
        verify = np.interp((nodes or gamma) + 1, list(passes), list(passes.values())).item()
        tau = expected_tau(head, gamma, nodes, temperature)
        return Size(gamma, nodes, tau, verify / passes[1], drafts[gamma, nodes > 0] / passes[1])

    return max((size(*pair) for pair in sizes), key=lambda size: size.speedup)


def best_size(target, head, gamma: int | str, nodes: int | str, temperature=0.0) -> Size:
    """The size of draft that promises the highest speed here; "auto" is to be chosen.

    Where the nodes are to be chosen, a given gamma is the deepest. Raises UserError for a size that
    cannot be drafted, or without the record that tau is reckoned from.
    """
    for given in ((1 if gamma == "auto" else gamma, 0), (1, 0 if nodes == "auto" else nodes)):
        plan_draft(head, *given, target)  # refuses what cannot be drafted
    deepest = min(head.max_draft or max(CHAINS), target.config.context - 4)
    most = deepest if gamma == "auto" else min(gamma, target.config.context - 4)
    gammas = [g for g in CHAINS if g <= most] if "auto" in (gamma, nodes) else [most]
    numbers = [0, *TREES] if nodes == "auto" else [nodes]
    # A tree has to be able to reach its depth, and to hold its nodes within it.
    fits = [(g, n) for g in gammas for n in numbers if g <= n <= WIDTH * (1 + WIDTH * (g - 1))]
    sizes = [(g, 0) for g in gammas if 0 in numbers] + fits
    sizes = sizes or [(g, n) for g in gammas for n in numbers]
    return fastest(head, sizes, *size_costs(target, head, sizes, temperature), temperature)
