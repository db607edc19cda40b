"""The cost of a pass, the speedup that follows, and the size of draft that pays.

The cost model (2211.17192, theorem 3.8, in measured units) predicts the speedup from tau:

    speedup = tau / (c_verify + c_draft)

with c_verify the cost of a target pass over the whole draft and c_draft that of making the draft,
both in plain steps, passes over one token. They are measured here in passes that accept nothing and
write nothing: a decoding run's own timers would agree with its speed by construction.

Conditions have to be those of decoding, or the model explains nothing. A plain step is measured
among plain steps. A verification is measured after a draft, and a draft after a verification, since
each finds the processor's caches as the other left them: alone, in a loop of its own, it is up to a
tenth faster. `best_size` chooses the size of draft with the highest predicted speedup.

Read next: bench.py.
"""

import copy
import math
import statistics
import time
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from draft_head import rank_rates
from drafts import (
    COPIED,
    WIDTH,
    Branch,
    CopyFirst,
    Known,
    Lookup,
    best_tree,
    fixed_tree,
    in_words,
    plan_draft,
)
from plumbing.cli import UserError
from plumbing.machine import synchronized_time
from sampling import Sampler, acceptance, argmax

DRAFT_POSITIONS = 4  # how far into a draft the held-out acceptance is measured
RANKS = 16  # how many of a head's guesses at each position are counted
SECONDS = 1.5  # that `size_costs` measures for, at least
ROUNDS = 5  # of measuring, at least; the first does not count
LENGTH = 256  # tokens before a pass that is timed; half the window where that is less
BACKLOG, LONG_BACKLOG = 3, 35  # tokens that a head has yet to read when a timed draft begins
COUNTS = (1, 2, 4, 8, 16, 32)  # tokens of the passes that are timed; the rest is interpolated
DEPTHS = (1, 2, 4, 8)  # of the drafts that are timed, likewise
CHAINS = range(1, 9)  # depths that `best_size` considers, of a head that was not measured
TREES = (4, 6, 8, 10, 12, 16, 20, 24, 31)  # nodes; with the root at most 32 tokens a pass


# ---------------------------------------------------------------------- drafting along a text


def walk(head, tokens: Tensor, hidden: Tensor, positions: int, stride: int):
    """Draft along texts, tokens (B, T + 1) and the target's states hidden (B, T, D) on them.

    A draft begins every `stride` places, and its path is the text itself. Yields (start, i,
    logits, state): the head's logits (B, S) at draft position i = 0, 1, .. of the draft after
    `start` states. The target's own are those of hidden[:, start + i]. It calls the decoder's own
    `absorb` and `expand`.
    """
    length = hidden.shape[1]
    state, read = head.start(length + positions, batch=len(tokens)), 0
    for start in range(min(stride, length - positions), length - positions + 1, stride):
        head.absorb(state, tokens[:, read + 1 : start + 1], hidden[:, read:start])
        read = start
        for i in range(positions):
            here = start + i
            logits = head.expand(state, tokens[:, here, None]) if i else head.expand(state)
            yield start, i, logits[:, 0], state


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
    for start, i, logits, _ in walk(head, tokens, hidden, positions, stride):
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


# ------------------------------------------------------------------------- the cost of a pass


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
        self.cache = target.new_cache(length + extra)
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
        # Siblings, all at one position: a chain might reach beyond a small window.
        shape = fixed_tree(tuple((r,) for r in range(count - 1)), self.device).shape
        where = self.length + shape.depth, shape.ancestors
        return self.timed(self.target_pass, tokens, *where)

    def drafting(self, head, plan, backlog: int = BACKLOG):
        """A function that drafts where the head has yet to read the last `backlog` tokens."""
        before = self.length - min(backlog, self.length - 1)
        text = self.tokens[0].tolist()
        known = Known(text[:1], head, self.length + 1 + plan.slots)
        for a, b in ((1, before + 1), (before + 1, self.length + 1)):  # the text, then its backlog
            if head is not None:
                known.read()  # what was added before: all but the backlog
            known.add(text[a:b], self.tokens[0, a:b], self.hidden[:, a - 1 : b - 1])

        known.stood_before(1)  # enters the text, as the cycles before would have

        def draft():
            again = copy.copy(known)  # the same each time: absorbing rolls the head's cache back
            again.state, again.unread = copy.copy(known.state), known.unread[:]
            return plan.draft(again, plan.depth, self.sampler)

        return draft

    def cycle(self, head, plan):
        """A function that drafts, verifies, and returns the seconds of either.

        Also "absorb", those of each further token that the head has to read: it drafts after a long
        backlog and after a short one, whose verification counts. Of a plan that copies first, the
        head's part is timed.
        """
        plan = plan.plan if isinstance(plan, CopyFirst) else plan
        backlogs = [min(b, self.length - 1) for b in (LONG_BACKLOG, BACKLOG)]
        jobs = {backlog: self.drafting(head, plan, backlog) for backlog in backlogs}

        def job() -> dict[str, float]:
            seconds = {}
            for backlog, draft in jobs.items():
                begin = synchronized_time(self.device)
                drafted = draft()
                seconds[backlog] = synchronized_time(self.device) - begin
                where = drafted.positions_and_mask(self.length)
                verify = self.timed(self.target_pass, drafted.tokens[None], *where)
            short, long = min(jobs), max(jobs)
            missed = (seconds[long] - seconds[short]) / max(1, long - short)
            return {"draft": seconds[short], "verify": verify, "absorb": missed}

        return job

    def timed(self, function, *arguments) -> float:
        begin = synchronized_time(self.device)
        function(*arguments)
        return synchronized_time(self.device) - begin


@torch.inference_mode()
def isolated_costs(target, methods: dict, length: int, sampler=None, turns: int = 15) -> dict:
    """Median seconds of a plain step, and of each method's drafting and verification.

    methods: name -> (head, plan). -> {"step": s, "passes": [[tokens, s], ..], name: {"draft": s,
    "verify": s, "absorb": s}, "backlog": tokens that the head reads in its draft}. "passes" serve
    copies, and drafts that the end of a text cut short; "absorb" is for each token beyond the
    backlog. The jobs take turns, so that a slow minute hits all of them; a turn is seven
    repetitions, the first two not counted, since a decoder finds the caches as it left them itself.
    """
    most = max((plan.nodes for _, plan in methods.values()), default=0) + 1
    bench = Bench(target, length, most, sampler)
    counts = sorted({n for n in COUNTS if n < most} | {most})
    jobs = {n: lambda n=n: {"pass": bench.read(n)} for n in counts}
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
    passes = [[n, medians.pop(n)["pass"]] for n in counts]
    return {"step": passes[0][1], "passes": passes, "backlog": BACKLOG} | medians


# ------------------------------------------------------------------------ the size of a draft


class Size(NamedTuple):
    """A size of draft and the model's figures for it."""

    gamma: int  # 0: the head drafts nothing
    nodes: int  # 0: a chain
    lookup: int  # tokens that have to match for a copy, which comes first; 0: never
    tau: float
    c_verify: float
    c_draft: float

    @property
    def speedup(self) -> float:
        """Over plain decoding: tokens per plain step."""
        return self.tau / (self.c_verify + self.c_draft)

    def __str__(self) -> str:
        draft = in_words(self.gamma, self.nodes) if self.gamma else "nothing"
        draft = f"{Lookup(self.lookup)}, else {draft}" if self.lookup else draft
        costs = f"{self.c_verify:.2f} + {self.c_draft:.2f}"
        return f"{draft} (expected: tau {self.tau:.2f}, costs {costs}, {self.speedup:.2f}x)"


def chain_paths(length: int) -> tuple[Branch, ...]:
    return tuple((0,) * i for i in range(1, length + 1))


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


def kind_of(temperature: float) -> str:
    """Which of the replayed texts serve a temperature: greedy ones, or those at temperature 1."""
    return "sampled" if temperature >= 0.5 else "greedy"


def taus_of(head, temperature: float) -> dict[tuple[int, int, int], tuple[float, float]]:
    """{(gamma, nodes, lookup): (tau, share of cycles that copy)} of what comes into question.

    Along texts of the target, where `study.sizes` has measured it; else by `expected_tau`, which
    knows nothing of copies.
    """
    if measured := getattr(head, "sizes", None):
        rows = measured[kind_of(temperature)]
        return {(g, n, lookup): (tau, copied) for g, n, lookup, tau, copied in rows}
    gammas = [g for g in CHAINS if g <= (head.max_draft or g)]
    # No deeper than its nodes, and no more nodes than a growing tree sees.
    trees = [(g, n) for g in gammas for n in TREES if g <= n <= WIDTH * (1 + WIDTH * (g - 1))]
    sizes = [(g, 0) for g in gammas] + trees
    return {(*size, 0): (expected_tau(head, *size, temperature), 0.0) for size in sizes}


def usual_lookup(head, temperature: float) -> int:
    """Tokens that have to match for a copy where nothing else is asked for; 0: none is made.

    What was faster on validation prompts, with a chain of GAMMA, where `study.sizes` ran.
    """
    measured = getattr(head, "sizes", None)
    return measured["lookup"][kind_of(temperature)] if measured else 0


def tree_warning(head, gamma: int, nodes: int, temperature: float) -> str | None:
    """A line on a tree from which less is expected than from a chain; None: there is no reason.

    A tree names the likeliest tokens, a chain draws its tokens as the target does. The head's
    figures are of temperature 1: below 1/2 they say nothing.
    """
    if nodes <= 0 or temperature < 0.5 or not hasattr(head, "training_record"):
        return None
    taus = taus_of(head, temperature)
    known = {size[:2]: tau for size, (tau, _) in taus.items() if size[2] == 0}
    if not {(gamma, nodes), (gamma, 0)} <= known.keys():
        known = {(gamma, n): expected_tau(head, gamma, n, temperature) for n in (nodes, 0)}
    tree, chain = known[gamma, nodes], known[gamma, 0]
    if tree >= chain:
        return None
    chains = f"a chain of {gamma} reaches tau {chain:.2f}"
    return f"at temperature 1 {chains}, a tree of {nodes} {tree:.2f}, on other text: --nodes 0"


@torch.inference_mode()
def size_costs(
    target, head, sizes: list, temperature=0.0, others=None, least=ROUNDS, length=LENGTH
) -> tuple[dict, dict]:
    """Costs of passes {tokens: cost} and of drafts {(gamma, is it a tree): cost}, in plain steps.

    sizes: triples (gamma, nodes, lookup). others: plans {(depth, their kind): plan}, whose drafts
    are measured as well. The passes and the drafts take turns for SECONDS or more, `least` rounds
    at least. The first round does not count. Before each, untimed, comes
    the job that precedes it in decoding. All come after a text of `length` tokens.
    """
    others, longest = others or {}, max(max(g, COPIED if copies else 0) for g, _, copies in sizes)
    most = max(longest, *(nodes for _, nodes, _ in sizes), *(o.nodes for o in others.values())) + 1
    counts = [n for n in COUNTS if n < most] + [most]
    sampler = Sampler(target.embed.weight.device, temperature)
    context = target.config.context
    length = min(length, context // 2, context - longest - 1)
    bench = Bench(target, length, most, sampler)
    jobs = {n: (bench.read, n) for n in counts}
    # The cost of drafting a tree depends on its depth, hardly on its nodes. Copies cost nothing.
    plans = {(g, n > 0): plan_draft(head, g, n, target) for g, n, _ in sizes if g > 0} | others
    measured = {}  # depths: of chains and of trees those in DEPTHS, the lowest and the highest
    for tree in {tree for _, tree in plans}:
        depths = sorted(depth for depth, is_tree in plans if is_tree == tree)
        measured[tree] = [d for d in depths if d in DEPTHS or d in (depths[0], depths[-1])]
    drafts = [(depth, tree) for tree, depths in measured.items() for depth in depths]
    jobs |= {key: (bench.timed, bench.drafting(head, plans[key])) for key in drafts}
    # Before a plain step another one, before a verification a draft, before a draft a verification.
    last = plans[max(plans, key=lambda key: key[0])] if plans else Lookup()
    deepest = bench.drafting(head, last)
    before = dict.fromkeys(counts, deepest) | dict.fromkeys(drafts, partial(bench.read, most))
    before[1] = partial(bench.read, 1)
    samples = {name: [] for name in jobs}
    begin, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - begin < SECONDS:
        for name, (job, argument) in jobs.items():
            before[name]()
            samples[name].append(job(argument))
        rounds += 1
    # In units of its round's plain step: a slow round is slow for all.
    steps = samples[1][1:]
    seconds = {
        name: statistics.median(value / step for value, step in zip(values[1:], steps))
        for name, values in samples.items()
    }
    of_depths = {tree: [seconds[d, tree] for d in depths] for tree, depths in measured.items()}
    drafting = {key: np.interp(key[0], measured[key[1]], of_depths[key[1]]).item() for key in plans}
    return {n: seconds[n] for n in counts}, drafting


def reckon(size: tuple, known: tuple, passes: dict, drafts: dict, length: int = COPIED) -> Size:
    """A size (gamma, nodes, lookup) with its costs; known: (tau, share of cycles that copy).

    passes, drafts: see `size_costs`. length: of the copies.
    """
    gamma, nodes, lookup = size
    tau, copied = known
    # More tokens never take less time: where they seem to, that is noise.
    verify = np.maximum.accumulate(list(passes.values()))
    own, copy = np.interp([(nodes or gamma) + 1, length + 1], list(passes), verify).tolist()
    draft = drafts[gamma, nodes > 0] if gamma > 0 else 0.0
    c_verify = copied * copy + (1 - copied) * own
    return Size(gamma, nodes, lookup, tau, c_verify, (1 - copied) * draft)


def fastest(taus: dict, passes: dict, drafts: dict) -> Size:
    """Of the sizes in `taus` (see `taus_of`) the one with the highest predicted speedup."""
    sizes = (reckon(size, known, passes, drafts) for size, known in taus.items())
    return max(sizes, key=lambda size: size.speedup)


def best_size(target, head, gamma, nodes, temperature=0.0, lookup=0) -> Size:
    """The size of draft that promises the highest speed here; "auto" is to be chosen.

    Where the nodes are to be chosen, a given gamma is the greatest depth. Where all three are, it
    may be copies alone, or nothing. Raises UserError for a size that cannot be drafted, or without
    the record that tau is reckoned from.
    """
    for given in ((1 if gamma == "auto" else gamma, 0), (1, 0 if nodes == "auto" else nodes)):
        plan_draft(head, *given, target)  # refuses what cannot be drafted
    deepest = min(math.inf if gamma == "auto" else gamma, target.config.context - 4)
    shallowest = 0 if gamma == nodes == lookup == "auto" else 1
    taus = {
        (g, n, copies): known
        for (g, n, copies), known in taus_of(head, temperature).items()
        if shallowest <= g <= deepest and nodes in ("auto", n) and lookup in ("auto", copies)
        if gamma in ("auto", g) or nodes == "auto"
    }
    if not taus and lookup not in (0, "auto"):  # nobody measured what these copies bring
        return best_size(target, head, gamma, nodes, temperature)._replace(lookup=lookup)
    if not taus:  # a tree of another size
        most = min(deepest, nodes or deepest, head.max_draft or deepest)
        gammas = [g for g in CHAINS if g <= most]
        taus = {(g, nodes, 0): (expected_tau(head, g, nodes, temperature), 0.0) for g in gammas}
    return fastest(taus, *size_costs(target, head, list(taus), temperature))
