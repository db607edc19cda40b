"""Speculative decoding: draft some tokens cheaply, verify them all in one pass of the target.

A language model writes one token a pass, and a pass over a handful of tokens takes little longer
than a pass over one, since most of its time goes into reading the weights. So, again and again:

    draft    a small head guesses what comes next: gamma tokens in a chain, or a tree of tokens with
             several guesses for each place; it has a distribution q of its own after each of them
    verify   the target reads all of them in ONE pass, which gives its p after each of them
    accept   what passes the rule below, from the first token on, and one more of the target's own

**The rule** (arXiv 2211.17192, 2302.01318). A drafted token x is accepted with probability
min(1, p(x) / q(x)). At the first rejection the target's token is drawn from the residual
norm(max(0, p - q)), scaled to sum to 1, and the rest of the draft is dropped. If all are accepted,
one more token is drawn from p at the end. In all, x is written there with probability

    q(x) min(1, p(x)/q(x))  +  P(reject) * residual(x)  =  min(p, q)(x) + max(0, p - q)(x)  =  p(x)

because P(reject) = 1 - sum of min(p, q) = sum of max(0, p - q), just what norm divides by. The p at
a place is the target's after the tokens drafted before, and is used only if all of these were
accepted; so this holds at every place, and the text has exactly the target's distribution (after
temperature, top-k and top-p, which change p and q alike), however bad the draft.

**Trees.** After a rejection the token has still to be drawn from the residual, and the next sibling
was drawn from q without the one before: the same problem again, with both in the places of p and q
(`verify_tree`). **Tokens that were not drawn**, because the draft just names the likeliest, have a
one-hot q. The same rule then says: accept x with probability p(x), else the next sibling with p
scaled to what is left. That is to draw *one* token from p and to see whether it was drafted
(`match`). Greedy decoding is this with a one-hot p.

What we gain is the **acceptance length** tau, the tokens written per pass of the target, from 1 to
gamma + 1; what we pay is the drafting. Read the rules and `generate` first; the rest is the command
line. Read next: tree.py and draft_head.py for where drafts come from, bench.py for the numbers.
"""

import math
import sys
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cli import Stopwatch, UserError, describe_device, number_or_auto, option, parse, run
from costs import best_size
from data import encode_prompt
from model import GPT, check_prompt
from runs import find_run, load
from sampling import Sampler, acceptance_probability, argmax, residual, sample, without
from show import Printer, compare
from tree import Draft, Shape, deepest, fixed_tree, plan_draft

# -------------------------------------------------------------------------------- the rules


def verify(p: Tensor, q: Tensor, draft: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """A sampled chain: how many tokens are accepted (...), and the token that follows them (...).

    p (..., gamma + 1, V): the target's distributions; q (..., gamma, V): those that `draft`
    (..., gamma) was drawn from; u (..., gamma + 1): uniforms in [0, 1).
    """
    p_x = p[..., :-1, :].gather(-1, draft[..., None])[..., 0]  # (..., gamma)
    q_x = q.gather(-1, draft[..., None])[..., 0]
    accept = u[..., :-1] < acceptance_probability(p_x, q_x)
    accepted = accept.long().cumprod(-1).sum(-1)  # the leading ones
    # After the last drafted position nothing was proposed: q = 0 there, and the residual is p.
    q = torch.nn.functional.pad(q, (0, 0, 0, 1))
    row = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    following = residual(p.gather(-2, row), q.gather(-2, row))[..., 0, :]
    return accepted, sample(following, u[..., -1])


def verify_tree(p: Tensor, q: Tensor, tokens: Tensor, shape: Shape, u: Tensor):
    """A sampled tree of fixed shape: the last accepted node (), and the token that follows ().

    p, q (N + 1, V): the target's and the draft's distributions after each node; siblings were drawn
    from q one after the other, without putting back. u (N + 1,): uniforms, one for each drafted
    node and one for the last token. After a rejection *both* change: p to the residual, and q to
    what the next sibling was drawn from (2402.14160). All nodes judge their r-th child at once.
    """
    passes_to = torch.zeros_like(tokens)  # the child that each node accepts; 0: none
    for child in shape.children.T:  # (N + 1,): the r-th child of every node; 0: it has none
        x = tokens[child][:, None]
        p_x, q_x = p.gather(-1, x)[:, 0], q.gather(-1, x)[:, 0]
        # q_x is 0 where top-k or top-p left q fewer tokens than the node has children.
        tried = (child > 0) & (passes_to == 0) & (q_x > 0)
        accepted = tried & (u[child - 1] < acceptance_probability(p_x, q_x))
        passes_to = torch.where(accepted, child, passes_to)
        rejected = (tried & ~accepted)[:, None]
        p, q = torch.where(rejected, residual(p, q), p), torch.where(rejected, without(q, x), q)
    here = torch.arange(len(tokens), device=tokens.device)
    node = deepest(passes_to[shape.parents] == here, shape)
    return node, sample(p[node], u[-1])


def match(tokens: Tensor, shape: Shape, choice: Tensor) -> tuple[Tensor, Tensor]:
    """A tree that was not sampled: the last accepted node (), and the token that follows ().

    choice (N + 1,): the target's own token after each node, its argmax or a sample of its p. Where
    a child carries it, that child is accepted; where none does, it is the token that follows.
    """
    if len(tokens) == 1:  # nothing was drafted: plain decoding does not pay for the rule
        return shape.parents[0], choice[0]  # node 0
    node = deepest(tokens == choice[shape.parents], shape)
    return node, choice[node]


def accept(draft: Draft, logits: Tensor, sampler: Sampler):
    """What a draft comes to, by the rule that is its own: (node (), next token (), p, u).

    logits (N + 1, V): the target's after each node. p (N + 1, V), u (N + 1,): None if greedy.
    """
    if sampler.temperature == 0:
        return *match(draft.tokens, draft.shape, argmax(logits)), None, None
    p, u = sampler.law(logits), sampler.uniforms(len(logits))
    if draft.q is None:
        return *match(draft.tokens, draft.shape, sample(p, u)), p, u
    if draft.shape.children.shape[1] == 1:  # a chain: its nodes are numbered by depth
        return *verify(p, draft.q[:-1], draft.tokens[1:], u), p, u
    return *verify_tree(p, draft.q, draft.tokens, draft.shape, u), p, u


# ------------------------------------------------------------------------------ the decoder


@dataclass
class Cycle:
    """One cycle as `on_cycle` gets to see it. It is told of prefill too, as one without a draft."""

    tokens: list[int]  # written: accepted drafts, then the target's own unless a stop token came
    accepted: int  # how many of these tokens were drafted
    draft: Draft
    path: list[int]  # the root, then the nodes that passed the rule, also beyond a stop token
    p: Tensor  # (N + 1, V): what the target's tokens come from; at temperature 0, its softmax
    u: Tensor | None  # (N + 1,); none at temperature 0
    seconds: dict[str, float]  # of each phase


@dataclass
class Generation:
    """What `generate` wrote, and what it took."""

    tokens: list[int] = field(default_factory=list)  # the new ones, a stop token included
    produced: list[int] = field(default_factory=list)  # written by each cycle; prefill's not here
    # Cycles that drafted as deep as planned and did not end at a stop token inside the draft. Near
    # the token limit less is drafted, so cycles that were cut can only be the last ones.
    uncut_cycles: int = 0
    prefill_seconds: float = 0.0  # the target reading the prompt
    seconds: float = 0.0  # all that comes after it, `on_cycle` excepted
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0

    @property
    def other_seconds(self) -> float:
        return self.seconds - self.draft_seconds - self.verify_seconds

    @property
    def acceptance_length(self) -> float:
        """tau: tokens per pass, the target's own token included; nan if every cycle was cut."""
        counted = self.produced[: self.uncut_cycles]
        return sum(counted) / len(counted) if counted else math.nan

    @property
    def tokens_per_second(self) -> float:
        return (len(self.tokens) - 1) / self.seconds if len(self.tokens) > 1 else math.nan


@torch.inference_mode()
def generate(
    target: GPT,
    prompt_tokens: list[int],
    max_new_tokens: int,
    head=None,
    gamma: int = 4,
    nodes: int = 0,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    on_cycle=None,
    plan=None,
) -> Generation:
    """Continue the prompt by up to `max_new_tokens`, fewer at a stop token or the window's end.

    `head=None` is plain autoregressive decoding: the same loop with nothing drafted. A head drafts
    `gamma` tokens in a chain, or a tree of `nodes` tokens at most `gamma` deep; a `plan` of tree.py
    takes the place of both. `on_cycle` is called with a `Cycle` after each; the time it takes is
    not counted. The same seed gives the same text again; sampled with and without a head the texts
    differ, and only their distribution is the same. Raises UserError for what cannot be done.
    """
    check_prompt(target.config, prompt_tokens)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
    device = target.embed.weight.device
    sampler = Sampler(device, temperature, top_k, top_p, seed, explain=on_cycle is not None)
    if head is None:
        plan = fixed_tree((), device)
    elif plan is None:
        plan = plan_draft(head, gamma, nodes, target)
    prompt = torch.tensor(prompt_tokens, device=device)  # (T,)
    limit = min(max_new_tokens, target.config.context - len(prompt_tokens))
    watch, out = Stopwatch(device), Generation()
    decode(target, head, plan, prompt, limit, sampler, stop_token, on_cycle, watch, out)
    seconds = watch.seconds()
    out.prefill_seconds = seconds.pop("prefill")
    out.draft_seconds, out.verify_seconds = seconds["draft"], seconds["verify"]
    out.seconds = seconds["draft"] + seconds["verify"] + seconds["other"]
    return out


def decode(target, head, plan, prompt, limit, sampler, stop_token, on_cycle, watch, out) -> None:
    """The algorithm: prefill, then draft, verify and accept, over and over. Fills `out`."""
    root_only = fixed_tree((), prompt.device).shape
    # Prefill: read the prompt in one pass, and let the target write one token.
    room = len(prompt) + limit + plan.slots
    cache = target.new_cache(room)
    state = head.start(room) if head is not None else None
    hidden = target(prompt[None], cache)  # (1, T, D)
    draft, logits = Draft(prompt[-1:], root_only), target.lm_head(hidden[0, -1:])
    _, last, p, u = accept(draft, logits, sampler)
    new, path = [last.item()], [0]
    out.tokens += new
    watch.lap("prefill")
    if on_cycle:
        on_cycle(Cycle(new, 0, draft, path, sampler.shown(p, logits), u, watch.seconds(1)))
        watch.lap("callback")
    # What became certain and the head has to read: tokens, and the target's states that led to each.
    certain, states = torch.cat([prompt[1:], last[None]]), hidden  # (T,), (1, T, D)

    while len(out.tokens) < limit and new[-1] != stop_token:
        # Draft: no deeper than what can still be written, less the one token the target adds.
        depth = min(plan.depth, limit - len(out.tokens) - 1)
        draft = Draft(last[None], root_only)
        if depth > 0:
            head.absorb(state, certain[None], states)
            draft = plan.draft(head, state, last[None], depth, sampler)
        watch.lap("draft")

        # Verify: one pass over the last written token and all that was drafted after it.
        start, shape = cache.length, draft.shape
        where = (start + shape.depth, shape.ancestors) if depth > 0 else ()
        hidden = target(draft.tokens[None], cache, *where)  # (1, N + 1, D)
        logits = target.lm_head(hidden[0])  # (N + 1, V)
        watch.lap("verify")

        # Accept. Numbers leave the device in `tolist`, once a cycle.
        node, last, p, u = accept(draft, logits, sampler)
        numbers = torch.cat([draft.tokens, shape.parents, node[None], last[None]]).tolist()
        size = len(draft.tokens)
        tokens, parents, path = numbers[:size], numbers[size : 2 * size], numbers[2 * size : -1]
        while path[-1] != 0:
            path.append(parents[path[-1]])
        path.reverse()
        # What was read and rejected is forgotten; a chain's accepted part lies in place already.
        kept = torch.tensor(path, device=prompt.device)
        cache.keep(start, kept, in_place=path[-1] == len(path) - 1)
        certain, states = torch.cat([draft.tokens[kept[1:]], last[None]]), hidden[:, kept]
        new = [tokens[i] for i in path[1:]] + numbers[-1:]
        if cut := stop_token in new[:-1]:
            new = new[: new.index(stop_token) + 1]
        out.tokens += new
        out.produced.append(len(new))
        out.uncut_cycles += depth == plan.depth and not cut
        watch.lap("other")
        if on_cycle:
            accepted, p = min(len(path) - 1, len(new)), sampler.shown(p, logits)
            on_cycle(Cycle(new, accepted, draft, path, p, u, watch.seconds(3)))
            watch.lap("callback")


# ------------------------------------------------------------------------ the command line


@dataclass(frozen=True)
class SpeculateConfig:
    prompt: str = option(
        "def read_file(path):",
        "text to continue, or what to say to a chat model; - reads it from standard input",
    )
    raw: bool = option(False, "have a chat model continue the prompt as plain text")
    out_dir: str | None = option(None, "the run's folder; default: the newest under out/")
    head: str = option("eagle-koala", "a trained head's name, a path to one, or none")
    gamma: int | str = option(
        4,
        "tokens to draft in a chain, or depth of the tree; auto: by measurement",
        type=number_or_auto,
    )
    nodes: int | str = option(
        0, "tokens of a drafted tree; 0: a chain; auto: by measurement", type=number_or_auto
    )
    max_new_tokens: int = option(128, "tokens to write")
    temperature: float = option(0.0, "0 is greedy; higher is more varied")
    top_k: int = option(0, "sample from the k likeliest tokens only; 0: from all")
    top_p: float = option(1.0, "sample from the likeliest tokens that reach this probability")
    seed: int = option(0, "of sampling")
    trace: bool = option(False, "show what every cycle drafted, accepted and why it stopped")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to decode in", choices=["auto", "float32", "bfloat16", "float64"])
    compile: bool = option(False, "have torch compile the target's layers")


def main() -> None:
    config = parse(SpeculateConfig)
    folder = find_run(config.out_dir)
    prompt = config.prompt
    if prompt == "-":
        prompt = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    head_name = None if config.head == "none" else config.head
    target, head, encoding = load(folder, head_name, config.device, config.dtype, config.compile)
    weight = target.embed.weight
    dtype = f"{str(weight.dtype).removeprefix('torch.')} ({target.why_dtype})"
    print(f"run {folder}, head {config.head}, {describe_device(weight.device)}, {dtype}")
    gamma, nodes = config.gamma, config.nodes
    if head is not None and "auto" in (gamma, nodes):
        size = best_size(target, head, gamma, nodes, config.temperature)
        gamma, nodes = size.gamma, size.nodes
        print(f"drafting {size}, by measurement")
    print()
    chat = None if config.raw else target.chat
    stop = encoding.eot_token if chat is None else chat.stop
    request = dict(
        prompt_tokens=encode_prompt(encoding, prompt) if chat is None else chat.prompt([prompt]),
        max_new_tokens=config.max_new_tokens,
        gamma=gamma,
        nodes=nodes,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_token=stop,
    )
    printer = Printer(encoding, stop, config.trace)
    generate(target, head=head, on_cycle=printer.show, **request)
    printer.finish()

    baseline = generate(target, head=None, **request)
    print(compare("autoregressive", baseline, baseline))
    if head is None:
        return
    speculative = generate(target, head=head, **request)
    print(compare("speculative", speculative, baseline))
    if config.temperature == 0:
        same = speculative.tokens == baseline.tokens
        print(
            "the two outputs are "
            + ("identical" if same else "different: see README, What lossless means here")
        )


if __name__ == "__main__":
    run(main)
