"""Speculative decoding: draft some tokens cheaply, verify them all in one pass of the target.

A language model writes one token a pass, and a pass over a handful of tokens takes little longer
than a pass over one, since most of its time goes into reading the weights. So, again and again:

    draft    a small head guesses the next tokens: gamma of them in a chain, or a tree of tokens
             with several guesses for each place
    verify   the target reads all of them in ONE pass, which gives its distribution p after each
    accept   the leading tokens that pass the rule below, and one more of the target's own

**Drawn tokens** (`verify`; arXiv 2211.17192, 2302.01318). A token x that was drawn from the head's
distribution q is accepted with probability min(1, p(x) / q(x)). At the first rejection the target's
token is drawn from the residual norm(max(0, p - q)), where norm divides by the sum, and the rest of
the draft is dropped. If all are accepted, one more token is drawn from p. In all, x is written at a
place with probability

    q(x) min(1, p(x)/q(x))  +  P(reject) * residual(x)  =  min(p, q)(x) + max(0, p - q)(x)  =  p(x)

because P(reject) = 1 - sum of min(p, q) = sum of max(0, p - q), the very sum that norm divides by.

This holds at every place, whatever was written before. The p there is the target's after the tokens
drafted before, and is used only if these were accepted: then they are the text. Whether they are
depends neither on x, which was drawn afterwards, nor on the uniforms that judge x and draw from the
residual. So the text has exactly the target's distribution (after temperature, top-k and top-p,
which change p and q alike), however bad the draft, and wherever cycles end.

**Named tokens** (`match`). A greedy draft, or a tree, just names the likeliest tokens; a copy names
those that stood in the text before. q decides nothing any more. The target draws its own token Y
from p after each node. Y is always the token that is written: if a child of the node carries Y,
that child is accepted and the next p is there already; if none does, the cycle ends. Greedily Y is
the likeliest token. (It is the rule above with one-hot q's: the first child x is accepted with
probability p(x), the next one y with (1 - p(x)) times p(y) / (1 - p(x)), which is p(y).)

The gain is the **acceptance length** tau, the tokens written per pass of the target, at most one
more than the draft is deep; the price is the drafting. Read the two rules and `generate`; the rest
is the command line. In shapes () is a single number, V the vocabulary, D the width of a state, and
N + 1 counts a draft's N tokens with its root, the last certain token. Read next: sampling.py.
"""

import plumbing.early  # noqa: F401 (for Ctrl-C during the imports)

import math
import sys
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from costs import best_size, tree_warning, usual_lookup
from drafts import ALONE, COPIED, GAMMA, Draft, Known, Shape, deepest, plan_draft, root_only
from model import GPT, GPTConfig
from plumbing.cli import UserError, check_ranges, fail, number_or_auto, option, parse, run
from plumbing.files import atomic_write, check_writable
from plumbing.machine import Stopwatch, describe_device
from plumbing.page import page, record
from plumbing.show import Printer, chances, compare, remark
from sampling import Sampler, acceptance_probability, argmax, residual, sample
from targets.bpe import encode_prompt
from targets.loading import WHICH_RUN, came_along, favourite, find_run, load, name_of
from targets.outputs import is_loop, same_or_not

# -------------------------------------------------------------------------------- the rules


def verify(p: Tensor, q: Tensor, drawn: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Drawn tokens: how many are accepted, and the token that follows them, both (...).

    p (..., gamma + 1, V): the target's distributions; q (..., gamma, V): those that the chain
    `drawn` (..., gamma) was drawn from; u (..., gamma + 1): uniforms in [0, 1), one for each drawn
    token and one for the token that follows, wherever that is.
    """
    p_x = p[..., :-1, :].gather(-1, drawn[..., None])[..., 0]  # (..., gamma)
    q_x = q.gather(-1, drawn[..., None])[..., 0]
    passes = u[..., :-1] < acceptance_probability(p_x, q_x)
    accepted = passes.long().cumprod(-1).sum(-1)  # the leading ones
    # After the last drafted position nothing was proposed: q = 0 there, and the residual is p.
    q = torch.nn.functional.pad(q, (0, 0, 0, 1))
    row = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    following = residual(p.gather(-2, row), q.gather(-2, row))[..., 0, :]
    return accepted, sample(following, u[..., -1])


def match(tokens: Tensor, shape: Shape, choice: Tensor) -> tuple[Tensor, Tensor]:
    """Named tokens: the last accepted node (), and the token that follows it ().

    tokens (N + 1,), a tree of this shape. choice (N + 1,): the target's own token after each node,
    its argmax or a sample of its p. A child that carries it is accepted; where none does, it is the
    token that follows.
    """
    if len(tokens) == 1:  # nothing was drafted: plain decoding is spared the work of the rule
        return shape.parents[0], choice[0]  # node 0: the root, its own parent
    node = deepest(tokens == choice[shape.parents], shape)  # which does not ask the root
    return node, choice[node]


def accept(draft: Draft, logits: Tensor, sampler: Sampler):
    """Judge a draft by its rule: (last accepted node (), the token that follows (), p, u).

    logits (N + 1, V): the target's after each node. p (N + 1, V) and u (N + 1,): None if greedy.
    """
    if sampler.temperature == 0:
        return *match(draft.tokens, draft.shape, argmax(logits)), None, None
    p, u = sampler.distribution(logits), sampler.uniforms(len(logits))
    if draft.q is None:
        return *match(draft.tokens, draft.shape, sample(p, u)), p, u
    # In a chain the number of accepted tokens is the number of the last accepted node.
    return *verify(p, draft.q, draft.tokens[1:], u), p, u


# ------------------------------------------------------------------------------ the decoder


@dataclass
class Cycle:
    """One cycle, for `on_cycle` to look at. Prefill comes first, as a cycle without a draft."""

    tokens: list[int]  # written: accepted drafts, then the target's own unless a stop token came
    draft: Draft
    path: list[int]  # the root, then the nodes that passed the rule, also beyond a stop token
    p: list[float]  # p(x) of each drafted token x; at temperature 0, of the softmax
    q: list[float]  # q(x) of each drafted token, likewise; empty for copies
    u: list[float]  # the uniform that judged each drawn token; empty for named tokens
    own: tuple[float, float | None]  # p of the target's own token, and q where a drawn one stood
    short: bool  # whether the draft had no room for all that its plan would have drafted
    seconds: dict[str, float]  # of each phase

    @property
    def accepted(self) -> int:
        """How many of the tokens were drafted."""
        return min(len(self.path) - 1, len(self.tokens))


@dataclass
class Generation:
    """The tokens that `generate` wrote, and the time and cycles it took."""

    tokens: list[int] = field(default_factory=list)  # the new ones, a stop token included
    produced: list[int] = field(default_factory=list)  # written by each cycle; prefill's not here
    drafts: list[tuple[str, int]] = field(default_factory=list)  # of each: its source, its tokens
    # Cycles that drafted as deep as planned and met no stop token inside the draft. Near the token
    # limit less is drafted, and a stop token ends the text: only the last cycles can be cut.
    uncut_cycles: int = 0
    prefill_seconds: float = 0.0  # the target reading the prompt
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    other_seconds: float = 0.0  # the rule, sampling, moving the cache; not `on_cycle`

    @property
    def seconds(self) -> float:
        """All but prefill and `on_cycle`."""
        return self.draft_seconds + self.verify_seconds + self.other_seconds

    @property
    def acceptance_length(self) -> float:
        """tau: tokens per pass, the target's own token included; nan if every cycle was cut."""
        counted = self.produced[: self.uncut_cycles]
        return sum(counted) / len(counted) if counted else math.nan

    @property
    def tokens_per_second(self) -> float:
        # The first token is prefill's.
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else math.nan


@torch.inference_mode()
def generate(
    target: GPT,
    prompt_tokens: list[int],
    max_new_tokens: int,
    head=None,
    gamma: int | None = None,
    nodes: int = 0,
    lookup: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | Collection[int] | None = None,
    on_cycle=None,
    plan=None,
) -> Generation:
    """Continue the prompt by up to `max_new_tokens`, fewer at a stop token or the window's end.

    `head=None` is plain autoregressive decoding: the same loop with nothing drafted. A head drafts
    a chain of `gamma` tokens (`nodes=0`), or a tree of `nodes` tokens at most `gamma` deep. Where
    the last `lookup` tokens stood in the text before, what followed there is copied instead; this
    needs no head. A `plan` of drafts.py takes the place of all three. `on_cycle` is called with a
    `Cycle` after each; its time is not counted. The same seed gives the same text again. With
    other drafts a sampled text is another one of the same distribution. Raises UserError for bad
    requests.
    """
    check_prompt(target.config, prompt_tokens)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
    device = target.embed.weight.device
    sampler = Sampler(device, temperature, top_k, top_p, seed)
    stops = {stop_token} if isinstance(stop_token, int) else set(stop_token or ())
    plan = plan or plan_draft(head, gamma, nodes, target, lookup)
    prompt = torch.tensor(prompt_tokens, device=device)  # (T,)
    limit = min(max_new_tokens, target.config.context - len(prompt_tokens))
    room = len(prompt) + limit + plan.slots
    cache, known = target.new_cache(room), Known(prompt_tokens, head, room)
    out, watch = Generation(), Stopwatch(device)

    # Prefill: the target reads the prompt in one pass and writes one token.
    draft = root_only(prompt[-1:])
    hidden = target(prompt[None], cache)  # (1, T, D)
    _, last, p, u = accept(draft, target.lm_head(hidden[0, -1:]), sampler)
    out.tokens.append(last.item())
    watch.lap("prefill")
    if on_cycle:
        figures = chances(head, draft, target.lm_head(hidden[0, -1:]), p, u, sampler, [0], last)
        on_cycle(Cycle(out.tokens[:], draft, [0], *figures, False, watch.seconds(1)))
        watch.lap("callback")
    # What the head reads: each token with the state that it was chosen from. The last token has no
    # state of its own yet; the target reads it next.
    known.add(out.tokens, torch.cat([prompt[1:], last[None]]), hidden)

    while len(out.tokens) < limit and out.tokens[-1] not in stops:
        # Draft below the last token, but leave room for one token of the target's own. The depth is
        # 0 in plain decoding, and in a last cycle that has room for no more.
        depth = min(plan.depth, limit - len(out.tokens) - 1)
        draft = plan.draft(known, depth, sampler) if depth > 0 else root_only(known.root)
        watch.lap("draft")

        # Verify: the target reads the last token and the whole draft in one pass.
        start = cache.length
        hidden = target(draft.tokens[None], cache, *draft.positions_and_mask(start))
        logits = target.lm_head(hidden[0])  # (N + 1, V); hidden (1, N + 1, D)
        watch.lap("verify")

        # Accept a path of the draft and one token of the target's own; forget the rest.
        node, last, p, u = accept(draft, logits, sampler)
        path, new = draft.path_to(node, last)
        kept = torch.tensor(path, device=device)  # in place already where it is 0, 1, 2, ..
        cache.keep(start, kept, in_place=path[-1] == len(path) - 1)
        written, hidden = torch.cat([draft.tokens[kept[1:]], last[None]]), hidden[:, kept]
        known.add(new, written, hidden)  # the same tokens, as a list and as a tensor
        if cut := not stops.isdisjoint(new[:-1]):  # the text ends there, and the loop with it
            new = new[: 1 + min(new.index(stop) for stop in stops & set(new))]
        out.tokens += new
        out.produced.append(len(new))
        out.drafts.append((draft.source, len(draft.tokens) - 1))
        out.uncut_cycles += depth == plan.depth and not cut
        watch.lap("other")
        if on_cycle:
            figures = chances(head, draft, logits, p, u, sampler, path, last)
            short = int(draft.shape.depth[-1]) == depth < plan.depth
            on_cycle(Cycle(new, draft, path, *figures, short, watch.seconds(3)))
            watch.lap("callback")
    seconds = watch.seconds()
    out.prefill_seconds, out.draft_seconds = seconds["prefill"], seconds["draft"]
    out.verify_seconds, out.other_seconds = seconds["verify"], seconds["other"]
    return out


def check_prompt(config: GPTConfig, prompt: list[int]) -> None:
    """Raise UserError for a text that a target of this shape cannot continue."""
    if not prompt:
        raise UserError("the prompt is empty: give at least one character")
    if len(prompt) >= config.context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, this target reads at most {config.context - 1}"
        )
    if min(prompt) < 0 or max(prompt) >= config.vocab_size:
        raise UserError(f"the prompt has tokens outside the vocabulary of {config.vocab_size}")


# ------------------------------------------------------------------------ the command line

HEADLESS = "none", "lookup"  # names that need no trained head


@dataclass(frozen=True)
class DecodeConfig:
    """The settings that speculate.py and bench.py share."""

    out_dir: str | None = option(None, WHICH_RUN)
    max_new_tokens: int = option(128, "tokens to write for each prompt", least=1)
    lookup: int | None = option(
        None,
        "copy where the last N tokens stood before, else the head drafts; 0: never; default: "
        "what was faster on validation prompts (bench.py: 0)",
    )
    temperature: float = option(0.0, "0 is greedy; higher is more varied")
    top_k: int = option(0, "sample from the k likeliest tokens only; 0: from all")
    top_p: float = option(1.0, "sample from the likeliest tokens that reach this probability")
    seed: int = option(0, "of sampling")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to decode in", choices=["auto", "float32", "bfloat16", "float64"])
    compile: bool = option(False, "on a GPU: record the passes as CUDA graphs")

    def __post_init__(self):
        check_ranges(self)

    @property
    def request(self) -> dict:
        """The arguments of `generate` that are the same for every prompt."""
        names = "max_new_tokens", "temperature", "top_k", "top_p"
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class SpeculateConfig(DecodeConfig):
    prompt: str = option(
        "def get_data(self, data):",
        "text to continue, or a question to a chat model; - reads it from standard input",
        positional=True,
    )
    raw: bool = option(False, "have a chat model continue the prompt as plain text")
    chat: bool = option(False, "talk to a chat model: a turn is a line of standard input")
    head: str = option(
        "auto",
        "a trained head's name, a path to one, lookup (copies alone), or none; auto: eagle-koala "
        "where it is",
    )
    gamma: int | str | None = option(
        None,
        f"tokens of a chain, depth of a tree; auto: measured; default: {GAMMA}, copies {COPIED}",
        type=number_or_auto,
    )
    nodes: int | str | None = option(
        None,
        "tokens of a drafted tree; default: a chain; auto: by measurement",
        type=number_or_auto,
    )
    trace: bool = option(False, "show each cycle: its draft, the verdicts, the time")
    html: str | None = option(None, "write a page of the cycles to this file")

    def __post_init__(self):
        super().__post_init__()
        if self.chat and (self.html is not None or self.raw):
            raise UserError("--chat goes with neither --html, which draws one text, nor --raw")


def choose_draft(config: SpeculateConfig, target, head, usual: int) -> tuple:
    """(head, plan, the plan in words). `usual`: the match of copies where there is no head."""
    gamma, nodes, lookup = config.gamma, config.nodes, config.lookup
    if head is None:
        if gamma == "auto" or nodes:
            raise UserError("--gamma auto and --nodes need a trained head")
        plan = plan_draft(None, gamma, 0, target, lookup or usual)
        return None, plan, plan
    if config.chat and gamma is None and nodes is None:
        gamma = nodes = "auto"  # a conversation has the time to measure
    if "auto" in (gamma, nodes):
        gamma, lookup = ("auto" if asked is None else asked for asked in (gamma, lookup))
        size = best_size(target, head, gamma, nodes or 0, config.temperature, lookup)
        head = head if size.gamma else None  # it may be that no head pays here
        plan = plan_draft(head, size.gamma or None, size.nodes, target, size.lookup)
        return head, plan, f"{size}, by measurement"
    if warning := tree_warning(head, gamma or GAMMA, nodes or 0, config.temperature):
        print(warning)
    lookup = usual_lookup(head, config.temperature) if lookup is None else lookup
    plan = plan_draft(head, gamma, nodes or 0, target, lookup)
    return head, plan, plan


def converse(target, encoding, request: dict) -> None:
    """Answer the lines of standard input, one turn each, until it ends."""
    said, room = [], target.config.context - request["max_new_tokens"]
    if room < 1:
        raise UserError(f"--max_new_tokens has to leave room in {target.config.context} tokens")
    print("Type a line; an empty one or the end of input ends it.\n")
    while question := sys.stdin.buffer.readline().decode("utf-8", "surrogateescape").strip():
        said.append(question)
        while len(prompt := target.chat.prompt(said)) > room and len(said) > 1:
            said = said[2:]  # the oldest question and its answer
        if len(prompt) > room:
            fail(f"this question has {len(prompt)} tokens, there is room for {room}")
            said = []
            continue
        printer = Printer(encoding, target.chat.stops)
        out = generate(target, prompt, on_cycle=printer.show, **request)
        printer.finish()
        tau = f", tau {out.acceptance_length:.2f}" if request["plan"].depth else ""
        print(f"({len(out.tokens)} tokens, {out.tokens_per_second:.1f} tokens/s{tau})\n")
        answer = [token for token in out.tokens if token not in target.chat.stops]
        said.append(encoding.decode(answer))


def main() -> None:
    config = parse(SpeculateConfig, about=__doc__)
    if config.html is not None:
        check_writable(Path(config.html))
    folder = find_run(config.out_dir, config.chat)
    prompt = config.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    name = favourite(folder) if config.head == "auto" else config.head
    asked = None if name in HEADLESS else name
    target, head, encoding = load(folder, asked, config.device, config.dtype, config.compile)
    weight = target.embed.weight
    dtype = f"{str(weight.dtype).removeprefix('torch.')} ({target.why_dtype})"
    about = f"run {name_of(folder)}, head {name}, {describe_device(weight.device)}, {dtype}"
    print(about)
    if config.out_dir is None and came_along(folder):
        print("(another: --out_dir FOLDER; your own, in about an hour: train.py, see README)")
    if config.chat and target.chat is None:
        raise UserError("--chat needs a chat model: see targets/README.md for SmolLM2")
    head, plan, words = choose_draft(config, target, head, ALONE if name == "lookup" else 0)
    if name != "none":
        print(f"drafting {words}")
    chat = None if config.raw else target.chat
    stops = encoding.stops if chat is None else chat.stops
    request = config.request | dict(seed=config.seed, stop_token=stops)
    drafting = request | dict(head=head, plan=plan)
    if config.chat:
        return converse(target, encoding, drafting)
    print()
    tokens = encode_prompt(encoding, prompt) if chat is None else chat.prompt([prompt])
    few = config.max_new_tokens if config.compile else min(8, config.max_new_tokens)
    for first in (request, drafting) if config.compile else (drafting,):  # slow, or recorded
        generate(target, tokens, **first | {"max_new_tokens": few})
    printer, cycles, steps = Printer(encoding, stops, config.trace), [], []
    look, look_again = printer.show, None
    if config.html is not None:
        look, look_again = record(cycles, printer.show), record(steps)
    shown = generate(target, tokens, on_cycle=look, **drafting)
    printer.finish()
    size = sum(weight.numel() for weight in target.parameters()) / 1e6
    facts = [about, f"target of {size:.1f} M parameters, temperature {config.temperature:g}"]
    if plan.depth == 0:
        lanes = {"plain": (shown, cycles)}
        print(compare("autoregressive", shown, shown))
    else:
        plain = generate(target, tokens, on_cycle=look_again, **request)
        lanes = {"plain": (plain, steps), "speculative": (shown, cycles)}
        facts[1] += f", drafting {plan}"
        print(compare("autoregressive", plain, plain))
        print(compare("speculative", shown, plain))
        if config.temperature == 0:
            facts.append(same_or_not(target, tokens, shown.tokens, plain.tokens))
        if is_loop(shown.tokens):
            facts.append("the text ends in a loop, which is easy to draft: its speed flatters")
        if reason := remark(shown, plain, plan.depth):
            facts.append(reason)
        for fact in facts[2:]:
            print(fact)
    if config.html is not None:
        with atomic_write(Path(config.html)) as file:
            asked = prompt if chat is None else f"{prompt}\n\n"
            file.write(page(facts, asked, lanes, encoding, stops).encode())
        print(f"written: {config.html}")


if __name__ == "__main__":
    run(main)
