"""How decoding is shown: text as it is written, the trace of a cycle, the closing comparison.

Nothing here decides anything: speculate.py calls it after the fact. What a cycle came to is worked
out once, in `judge`, and likewise the figures of a run, in `figures`. The page of page.py shows
the same.
"""

import codecs
import os
import sys

import torch
from torch import Tensor


class Printer:
    """Text as it is written: accepted drafts in colour, characters only once they are whole.

    With `trace` each cycle is told in words instead.
    """

    def __init__(self, encoding, stops, trace: bool = False):
        """`stops`: the tokens that end a text, and are not shown."""
        self.encoding, self.stops, self.trace, self.cycles = encoding, stops, trace, 0
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.speller = Speller(encoding)

    def show(self, cycle) -> None:
        if self.trace:
            print("\n".join(trace_lines(self.cycles, cycle, self.encoding)))
        for i, token in enumerate(cycle.tokens if not self.trace else ()):
            if token not in self.stops:
                self.write(token, accepted=i < cycle.accepted)
        self.cycles += 1

    def write(self, token: int, accepted: bool) -> None:
        text = self.speller.spell(token)
        print(f"\033[32m{text}\033[0m" if accepted and self.colour else text, end="", flush=True)

    def finish(self) -> None:
        print(self.speller.rest())


def chances(head, draft, logits: Tensor, p, u, sampler, path: list[int], last: Tensor) -> tuple:
    """The figures p, q, u and own of a `Cycle`: chances of the drafted tokens and of `last` ().

    Greedy decoding compares no probabilities; shown are those of temperature 1.
    """
    tokens, parents = draft.tokens[1:, None], draft.shape.parents[1:]  # (N, 1), (N,)

    def law(logits: Tensor) -> Tensor:
        return sampler.distribution(logits) if sampler.temperature else logits.float().softmax(-1)

    p, q = law(logits) if p is None else p, []
    own_p, own_q = p[path[-1], last].item(), None
    if draft.q is not None:
        q = draft.q.gather(-1, tokens)[:, 0].tolist()
        own_q = draft.q[path[-1], last].item() if path[-1] < len(tokens) else None
    elif draft.logits:
        rows = law(torch.cat(draft.logits)[draft.rows])  # (N, S)
        q = rows.gather(-1, head.vocabulary.indices_of(tokens))[:, 0].tolist()
    p_x = p[parents].gather(-1, tokens)[:, 0].tolist()
    return p_x, q, u[:-1].tolist() if draft.q is not None else [], (own_p, own_q)


class Speller:
    """Tokens as text: characters only once they are whole, control characters as escapes."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def spell(self, token: int) -> str:
        """The characters that this token completes."""
        return harmless(self.decoder.decode(self.encoding.decode_bytes([token])))

    def rest(self) -> str:
        """What is left of a last character that was never completed."""
        return harmless(self.decoder.decode(b"", final=True))


def harmless(text: str) -> str:
    """Control characters as escapes: a model's text must not command the terminal."""
    shown = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return "".join(shown)


def judge(cycle, encoding) -> tuple[list[tuple[str, str]], str]:
    """What a cycle came to: each drafted node's verdict, and where its last token is from.

    A verdict is (kind, words): accepted, rejected or dropped, and the same with its reason.
    """
    tokens, parents = cycle.draft.tokens.tolist(), cycle.draft.shape.parents.tolist()
    accepted, own = set(cycle.path[1 : cycle.accepted + 1]), cycle.tokens[-1]
    ended = cycle.accepted == len(cycle.tokens)  # by a stop token inside the draft
    end = cycle.path[cycle.accepted]  # the last node in use

    def verdict(node: int) -> tuple[str, str]:
        parent = parents[node]
        if node in accepted:
            reason = "u < p / q" if cycle.u else "the target's own choice"
            return "accepted", f"accept: {reason}"
        if parent == end and ended:
            return "dropped", "dropped: the text has ended"
        if parent != 0 and parent not in accepted:
            return "dropped", "dropped with what it follows"
        if cycle.u:
            return "rejected", "REJECT: u >= p / q"
        chosen = [other for other in accepted if parents[other] == parent]
        choice = quoted(tokens[chosen[0]] if chosen else own, encoding, 12)
        return "rejected", f"REJECT: the target chose {choice}"

    if ended:
        why = "ends the text"
    elif end not in parents[1:]:
        why = "from the target's p: nothing was drafted after" if end else "from the target's p"
    else:
        why = "from the residual, where p exceeds q" if cycle.u else "the target's own choice"
    why += "" if ended else f"  ({p_and_q(*cycle.own)})"
    return [verdict(node) for node in range(1, len(tokens))], why


def counts(cycle) -> str:
    """Where the draft came from, and how many tokens came to what."""
    drafted = len(cycle.draft.tokens) - 1
    if drafted == 0 and cycle.draft.source == "copied":
        return "nothing to copy, wrote 1"
    source = f"{cycle.draft.source} {drafted}"
    source += " (no room for more)" if cycle.short else ""
    return f"{source}, accepted {cycle.accepted}, wrote {len(cycle.tokens)}"


def p_and_q(p: float, q: float | None) -> str:
    """q: None for a copy, and after all that was drafted."""
    return f"p {p:.3f}" + (f"  q {q:.3f}" if q is not None else "")


def times(cycle) -> str:
    """How long each phase took."""
    ms = {phase: 1000 * seconds for phase, seconds in cycle.seconds.items()}
    return f"draft {ms['draft']:.1f} ms, verify {ms['verify']:.1f}, rest {ms['other']:.1f}"


def trace_lines(number: int, cycle, encoding) -> list[str]:
    """A cycle in words, at most 100 columns wide: each drafted node, the verdict, the time."""
    tokens, parents = cycle.draft.tokens.tolist(), cycle.draft.shape.parents.tolist()
    verdicts, why = judge(cycle, encoding)
    own = f"{quoted(cycle.tokens[-1], encoding)} {why}"
    if number == 0:
        return [f"prefill {1000 * cycle.seconds['prefill']:.1f} ms: {own}"]

    def below(parent: int, depth: int) -> list[str]:
        lines = []
        for node in range(1, len(tokens)):
            if parents[node] == parent:
                name = "  " * min(depth, 8) + quoted(tokens[node], encoding)
                p, q = cycle.p[node - 1], cycle.q[node - 1] if cycle.q else None
                kind, words = verdicts[node - 1]
                figures = p_and_q(p, q)
                if cycle.u and kind != "dropped":  # of what was dropped no u decided
                    figures += f"  p/q {p / q:<5.3g} u {cycle.u[node - 1]:.3f}"
                lines.append(f"{name:40} {figures}  {words}")
                lines += below(node, depth + 1)
        return lines

    first = f"cycle {number}: {counts(cycle)}; {times(cycle)}"
    return [first, *below(0, 1), f"  + {own}"]


def quoted(token: int, encoding, width: int = 24) -> str:
    """A token in quotes, cut to `width` columns."""
    shown = repr(encoding.decode_bytes([token]).decode("utf-8", "backslashreplace"))
    return shown if len(shown) <= width else shown[: width - 4] + "..." + shown[-1]


def remark(result, baseline, depth: int) -> str | None:
    """Why drafts of up to `depth` tokens brought no speed, by the cost model; None if they did."""
    if min(len(result.tokens), len(baseline.tokens)) < 2:
        return None
    if result.tokens_per_second >= baseline.tokens_per_second:
        return None
    step, cycles = baseline.seconds / (len(baseline.tokens) - 1), len(result.produced)
    draft, cost = (seconds / cycles / step for seconds in (result.draft_seconds, result.seconds))
    parts = f"{cost:.1f} plain steps (its draft {draft:.1f})"
    if cost > depth + 1:
        return f"drafting cannot pay here: a cycle costs {parts}, writes at most {depth + 1} tokens"
    wrote = sum(result.produced) / cycles
    return f"this draft did not pay: a cycle cost {parts} and wrote {wrote:.1f} tokens"


def figures(result, baseline) -> dict[str, str]:
    """Speeds in tokens a second; also the gain over the baseline, if that is another run."""
    whole = len(result.tokens) / (result.prefill_seconds + result.seconds)
    found = {"decoding": f"{result.tokens_per_second:.1f}", "whole": f"{whole:.1f}"}
    if result is not baseline:
        speedup = result.tokens_per_second / baseline.tokens_per_second
        found |= {"tau": f"{result.acceptance_length:.2f}", "speedup": f"{speedup:.2f}x"}
    return found


def compare(name: str, result, baseline) -> str:
    """The figures of a run in one line."""
    if min(len(result.tokens), len(baseline.tokens)) < 2:
        return f"{name:15} a text ended with its first token, which prefill wrote: nothing to time"
    found = figures(result, baseline)
    line = f"{name:15} {found['decoding']:>8} tokens/s decoding, {found['whole']:>8} end to end"
    gained = result is not baseline
    return f"{line}, tau {found['tau']}, speedup {found['speedup']}" if gained else line
