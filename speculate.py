"""Speculative decoding: draft a few tokens cheaply, verify them all in one pass of the target.

A language model writes one token a pass, and a pass over eight tokens costs hardly more than a
pass over one, since most of its time goes into reading the weights. So, again and again:

    draft    a small head guesses the next gamma tokens, one distribution q and one token each
    verify   the target reads all of them in ONE pass, which gives its own p at each position
    accept   the longest prefix that passes the rule below, and one more token from the target

**The rule** (arXiv 2211.17192, 2302.01318). A drafted token x is accepted with probability
min(1, p(x) / q(x)). At the first rejection the target's token is drawn from the residual
norm(max(0, p - q)), scaled to sum to 1, and the rest of the draft is dropped. If all are accepted,
one more token is drawn from p at the end. In all, x is written there with probability

    q(x) min(1, p(x)/q(x))  +  P(reject) * residual(x)  =  min(p, q)(x) + max(0, p - q)(x)  =  p(x)

because P(reject) is the sum of max(0, p - q), just what norm divides by. The p at the i-th place is
the target's after i drafted tokens, and is used only if all of these were accepted; so this holds
at every place, and the text has exactly the target's distribution, however bad the draft. Greedy
decoding is the same rule with one-hot p and q: accept while the draft is the target's own choice.

What we gain is the **acceptance length** tau, the tokens written per pass of the target, from 1 to
gamma + 1; what we pay is the drafting. Read `verify` and `generate` first; the rest is sampling,
timing and printing. Read next: draft_head.py for where q comes from, bench.py for the numbers.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cli import (
    Stopwatch,
    UserError,
    choose_device,
    choose_dtype,
    describe_device,
    option,
    parse,
    run,
)
from data import build_encoding, encode
from draft_head import load_head, trained_heads
from model import GPT, load_target
from sampling import distribution, sample
from show import Printer, compare, trace_lines

# --------------------------------------------------------------------------------- the rule


def acceptance_probability(p_x: Tensor, q_x: Tensor) -> Tensor:
    """min(1, p(x) / q(x)) of drafted tokens; a token can only be drafted where q(x) > 0."""
    return (p_x / q_x).clamp(max=1.0)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm(max(0, p - q)) (..., V), what is left of p after a rejection.

    Where p = q nothing is ever rejected; p stands in there for 0 / 0.
    """
    excess = (p - q).clamp(min=0.0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, p)


def verify(p: Tensor, q: Tensor, draft: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """How many drafted tokens are accepted (...), and the token that follows them (...).

    p (..., gamma + 1, V): the target's distributions; q (..., gamma, V): those that `draft`
    (..., gamma) was drawn from; u (..., gamma + 1): uniforms in [0, 1).
    """
    if draft.shape[-1] == 0:  # nothing to judge: plain decoding does not pay for the rule
        return draft.sum(-1), sample(p[..., 0, :], u[..., 0])
    p_x = p[..., :-1, :].gather(-1, draft[..., None])[..., 0]  # (..., gamma)
    q_x = q.gather(-1, draft[..., None])[..., 0]
    accept = u[..., :-1] < acceptance_probability(p_x, q_x)
    accepted = accept.long().cumprod(-1).sum(-1)  # the leading ones
    # After the last drafted position nothing was proposed: q = 0 there, and the residual is p.
    q = torch.nn.functional.pad(q, (0, 0, 0, 1))
    row = accepted[..., None, None].expand(*accepted.shape, 1, p.shape[-1])
    following = residual(p.gather(-2, row), q.gather(-2, row))[..., 0, :]
    return accepted, sample(following, u[..., -1])


# ------------------------------------------------------------------------------ the decoder


@dataclass
class Cycle:
    """One cycle as `on_cycle` gets to see it. The prefill's own token is a cycle without a draft."""

    tokens: list[int]  # written: accepted drafts, then the target's own unless a stop token came
    accepted: int  # how many of these tokens were drafted
    draft: Tensor  # (n,), n <= gamma tokens; none at the prefill and in plain decoding
    p: Tensor  # (n + 1, V)
    q: Tensor  # (n, V)
    u: Tensor  # (n + 1,)


@dataclass
class Generation:
    """What `generate` wrote, and what it took."""

    tokens: list[int] = field(default_factory=list)  # the new ones, a stop token included
    produced: list[int] = field(default_factory=list)  # written by each cycle; prefill's not here
    # Cycles that drafted all of gamma and did not end at a stop token inside the draft. Near the
    # token limit less is drafted, so cycles that were cut can only be the last ones.
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


def check_request(
    target: GPT, prompt: list[int], max_new_tokens, head, gamma, temperature, top_k, top_p, seed
):
    """Raise UserError for what cannot be decoded."""
    vocab_size, context = target.config.vocab_size, target.config.context
    if not prompt:
        raise UserError("the prompt is empty: give at least one character")
    if len(prompt) >= context:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, this target reads at most {context - 1}"
        )
    if min(prompt) < 0 or max(prompt) >= vocab_size:
        raise UserError(f"the prompt has tokens outside the vocabulary of {vocab_size}")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, it must be at least 1")
    if gamma < 1:
        raise UserError(f"gamma is {gamma}, at least 1 token has to be drafted")
    if head is not None and head.max_draft is not None and gamma > head.max_draft:
        raise UserError(f"gamma is {gamma}, but this head drafts at most {head.max_draft} tokens")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature is {temperature}, it must be a finite number from 0 on")
    if top_k is not None and top_k < 0:
        raise UserError(f"top_k is {top_k}, it must be 0 (no limit) or more")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p is {top_p}, it must be above 0 and at most 1")
    if seed is not None and not 0 <= seed < 2**63:
        raise UserError(f"seed is {seed}, it must lie between 0 and 2^63 - 1")


@torch.inference_mode()
def generate(
    target: GPT,
    prompt_tokens: list[int],
    max_new_tokens: int,
    head=None,
    gamma: int = 4,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    on_cycle=None,
) -> Generation:
    """Continue the prompt by up to `max_new_tokens`, fewer at a stop token or the window's end.

    `head=None` is plain autoregressive decoding: the same loop with nothing drafted. `on_cycle` is
    called with a `Cycle` after each; the time it takes is not counted. The same seed gives the same
    text again; with and without a head the texts differ, and only their distribution is the same.
    Raises UserError for a request that cannot be met.
    """
    check_request(
        target, prompt_tokens, max_new_tokens, head, gamma, temperature, top_k, top_p, seed
    )
    device = target.embed.weight.device
    limit = min(max_new_tokens, target.config.context - len(prompt_tokens))
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    watch, out = Stopwatch(device), Generation()

    def uniforms(n: int) -> Tensor:
        return torch.rand(n, generator=generator, device=device, dtype=torch.float64)

    def law(logits: Tensor) -> Tensor:
        return distribution(logits, temperature, top_k, top_p)

    def choose(logits: Tensor) -> tuple[Tensor, Tensor]:
        q = law(logits)  # (1, V)
        return sample(q, uniforms(1)), q

    # Prefill: read the prompt in one pass, and let the target write one token.
    cache = target.new_cache()
    prompt = torch.tensor(prompt_tokens, device=device)  # (T,)
    hidden = target(prompt[None], cache)  # (1, T, D)
    p, u = law(target.lm_head(hidden[0, -1:])), uniforms(1)
    last = sample(p, u)  # (1,): written, but not yet read by the target
    no_draft, no_q = last[:0], p[:0]
    new = last.tolist()
    out.tokens += new
    watch.lap("prefill")
    if on_cycle:
        on_cycle(Cycle(new, 0, no_draft, p, no_q, u))
        watch.lap("callback")
    if head is not None:
        state = head.start(target.config.context)
    # To the head the prompt is like a draft that was accepted whole.
    draft, count = prompt[1:], len(prompt) - 1

    while len(out.tokens) < limit and new[-1] != stop_token:
        # Draft: at most what can still be written, less the one token that the target adds.
        n = min(gamma, limit - len(out.tokens) - 1) if head is not None else 0
        if n > 0:
            # What is certain since the last cycle: its accepted drafts and the target's own token.
            # The head reads each beside the state that led to it, the one just before it.
            certain = torch.cat([draft[:count], last])[None]  # (1, count + 1)
            head.absorb(state, certain, hidden[:, : count + 1])
            draft, q = (guess[0] for guess in head.draft(state, n, choose))
        else:
            draft, q = no_draft, no_q
        watch.lap("draft")

        # Verify: one pass over the last written token and the draft.
        hidden = target(torch.cat([last, draft])[None], cache)  # (1, n + 1, D)
        p = law(target.lm_head(hidden[0]))  # (n + 1, V)
        watch.lap("verify")

        # Accept. Numbers leave the device in `tolist`, once a cycle. Of the n + 1 tokens just read
        # the cache forgets the rejected ones; the one that follows has not been read yet.
        u = uniforms(n + 1)
        accepted, last = (result[None] for result in verify(p, q, draft, u))  # (1,) each
        *new, count, follows = torch.cat([draft, accepted, last]).tolist()
        cache.rollback(cache.length - (n - count))
        new = new[:count] + [follows]
        cut = stop_token in new[:-1]
        if cut:
            new = new[: new.index(stop_token) + 1]
        out.tokens += new
        out.produced.append(len(new))
        out.uncut_cycles += n == (gamma if head is not None else 0) and not cut
        watch.lap("other")
        if on_cycle:
            on_cycle(Cycle(new, min(count, len(new)), draft, p, q, u))
            watch.lap("callback")

    seconds = watch.seconds()
    out.prefill_seconds = seconds.pop("prefill")
    out.draft_seconds, out.verify_seconds = seconds["draft"], seconds["verify"]
    out.seconds = seconds["draft"] + seconds["verify"] + seconds["other"]
    return out


# ---------------------------------------------------------------------------- trained runs


def find_run(out_dir: str | None) -> Path:
    """The run's folder; None is the newest one that has a target."""
    if out_dir is not None:
        return Path(out_dir)
    targets = sorted(Path("out").glob("*/target.pt"), key=lambda path: path.stat().st_mtime)
    if not targets:
        raise UserError(
            "there is no trained run under out/: run `python train.py` first (about 35 minutes on "
            "two CPU cores), or `python train.py --preset smoke` (half a minute, writes nonsense)"
        )
    return targets[-1].parent


def load(out_dir=None, head: str | None = "eagle-koala", device="auto", dtype="auto"):
    """(target, head, encoding) of a trained run, ready for `generate`.

    `out_dir=None` is the newest run; `head` is the name of a head in it, a path, or None.
    """
    folder, device = find_run(out_dir), choose_device(device)
    target, checkpoint = load_target(folder / "target.pt", device, choose_dtype(dtype, device))
    if head is not None:
        head = load_head(head_path(folder, head), target, checkpoint["fingerprint"])
    return target, head, build_encoding(checkpoint["tokenizer"])


def head_path(folder: Path, head: str) -> Path:
    """Where the head of this name, or at this path, is. Raises UserError, naming those there are."""
    path = Path(head) if head.endswith(".pt") else folder / f"{head}.pt"
    if not path.is_file() and (names := trained_heads(folder)):
        raise UserError(f"there is no head at {path}; trained here: {', '.join(names)}")
    return path


# ------------------------------------------------------------------------ the command line


@dataclass(frozen=True)
class SpeculateConfig:
    prompt: str = option(
        "def read_file(path):", "text to continue, or - to read it from standard input"
    )
    out_dir: str | None = option(None, "the run's folder; default: the newest under out/")
    head: str = option("eagle-koala", "a trained head's name, a path to one, or none")
    gamma: int = option(4, "tokens to draft in each cycle")
    max_new_tokens: int = option(128, "tokens to write")
    temperature: float = option(0.0, "0 is greedy; higher is more varied")
    top_k: int = option(0, "sample from the k likeliest tokens only; 0: from all")
    top_p: float = option(1.0, "sample from the likeliest tokens that reach this probability")
    seed: int = option(0, "of sampling")
    trace: bool = option(False, "show what every cycle drafted, accepted and why it stopped")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to decode in", choices=["auto", "float32", "bfloat16", "float64"])


def main() -> None:
    config = parse(SpeculateConfig)
    folder = find_run(config.out_dir)
    prompt = sys.stdin.buffer.read() if config.prompt == "-" else config.prompt
    head_name = None if config.head == "none" else config.head
    target, head, encoding = load(folder, head_name, config.device, config.dtype)
    weight = target.embed.weight
    print(f"run {folder}, head {config.head}, {describe_device(weight.device)}, {weight.dtype}\n")
    request = dict(
        prompt_tokens=encode(encoding, prompt),
        max_new_tokens=config.max_new_tokens,
        gamma=config.gamma,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        seed=config.seed,
        stop_token=encoding.eot_token,
    )
    printer = Printer(encoding)
    cycles = 0

    def on_cycle(cycle: Cycle) -> None:
        nonlocal cycles
        if config.trace:
            print(f"cycle {cycles}" if cycles else "prefill")
            print("\n".join(trace_lines(cycle, encoding)))
        cycles += 1
        for i, token in enumerate(cycle.tokens):
            if not config.trace and token != encoding.eot_token:
                printer.show(token, accepted=i < cycle.accepted)

    generate(target, head=head, on_cycle=on_cycle, **request)
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
