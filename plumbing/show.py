"""How decoding is shown: text as it is written, the trace of a cycle, the closing comparison.

Nothing here decides anything: speculate.py calls it after the fact.
"""

import codecs
import os
import sys


class Printer:
    """Text as it is written: accepted drafts in colour, characters only once they are whole.

    With `trace` each cycle is told in words instead.
    """

    def __init__(self, encoding, stop_token: int, trace: bool = False):
        self.encoding, self.stop_token, self.trace, self.cycles = encoding, stop_token, trace, 0
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, cycle) -> None:
        if self.trace:
            print("\n".join(trace_lines(self.cycles, cycle, self.encoding)))
        for i, token in enumerate(cycle.tokens if not self.trace else ()):
            if token != self.stop_token:
                self.write(token, accepted=i < cycle.accepted)
        self.cycles += 1

    def write(self, token: int, accepted: bool) -> None:
        text = harmless(self.decoder.decode(self.encoding.decode_bytes([token])))
        print(f"\033[32m{text}\033[0m" if accepted and self.colour else text, end="", flush=True)

    def finish(self) -> None:
        print(harmless(self.decoder.decode(b"", final=True)))


def harmless(text: str) -> str:
    """Control characters as escapes: a model's text must not command the terminal."""
    shown = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return "".join(shown)


def trace_lines(number: int, cycle, encoding) -> list[str]:
    """A cycle in words, at most 100 columns wide: each drafted node, the verdict, the time."""
    draft, accepted = cycle.draft, set(cycle.path[1 : cycle.accepted + 1])
    tokens, parents = draft.tokens.tolist(), draft.shape.parents.tolist()
    own = cycle.tokens[-1]
    ended = cycle.accepted == len(cycle.tokens)  # by a stop token inside the draft
    end = cycle.path[cycle.accepted]  # the last node in use
    ms = {phase: 1000 * seconds for phase, seconds in cycle.seconds.items()}
    if number == 0:
        return [f"prefill {ms['prefill']:.1f} ms: {quoted(own, encoding)} from the target's p"]

    def verdict(node: int) -> str:
        parent = parents[node]
        if node in accepted:
            return "accept: u < p / q" if cycle.u else "accept: the target's own choice"
        if parent == end and ended:
            return "dropped: the text has ended"
        if parent != 0 and parent not in accepted:
            return "dropped with what it follows"
        if cycle.u:
            return "REJECT: u >= p / q"
        chosen = [other for other in accepted if parents[other] == parent]
        choice = quoted(tokens[chosen[0]] if chosen else own, encoding, 12)
        return f"REJECT: the target chose {choice}"

    def below(parent: int, depth: int) -> list[str]:
        lines = []
        for node in range(1, len(tokens)):
            if parents[node] == parent:
                name = "  " * min(depth, 8) + quoted(tokens[node], encoding)
                figures = f"p {cycle.p[node - 1]:.3f}  q {cycle.q[node - 1]:.3f}"
                figures += f"  u {cycle.u[node - 1]:.3f}" if cycle.u else ""
                lines += [f"{name:40} {figures}  {verdict(node)}", *below(node, depth + 1)]
        return lines

    if ended:
        why = "ends the text"
    elif end not in parents[1:]:
        why = "from the target's p: nothing was drafted after" if end else "from the target's p"
    else:
        why = "from the residual, where p exceeds q" if cycle.u else "the target's own choice"
    return [
        f"cycle {number}: drafted {len(tokens) - 1}, accepted {cycle.accepted}, wrote "
        f"{len(cycle.tokens)}; draft {ms['draft']:.1f} ms, verify {ms['verify']:.1f}, "
        f"rest {ms['other']:.1f}",
        *below(0, 1),
        f"  + {quoted(own, encoding)} {why}",
    ]


def quoted(token: int, encoding, width: int = 24) -> str:
    """A token in quotes, cut to `width` columns."""
    shown = repr(encoding.decode_bytes([token]).decode("utf-8", "backslashreplace"))
    return shown if len(shown) <= width else shown[: width - 4] + "..." + shown[-1]


def remark(result, baseline, depth: int) -> str | None:
    """Why drafts of up to `depth` tokens brought no speed, by the cost model; None if they did."""
    if not result.produced or result.tokens_per_second >= baseline.tokens_per_second:
        return None
    step, cycles = baseline.seconds / (len(baseline.tokens) - 1), len(result.produced)
    draft, cost = (seconds / cycles / step for seconds in (result.draft_seconds, result.seconds))
    parts = f"{cost:.1f} plain steps (its draft {draft:.1f})"
    if cost > depth + 1:
        return (
            f"drafting cannot pay here: a cycle costs {parts} and writes at most {depth + 1} tokens"
        )
    wrote = sum(result.produced) / cycles
    return f"this draft did not pay: a cycle cost {parts} and wrote {wrote:.1f} tokens"


def compare(name: str, result, baseline) -> str:
    whole = len(result.tokens) / (result.prefill_seconds + result.seconds)
    line = f"{name:15} {result.tokens_per_second:8.1f} tokens/s decoding, {whole:8.1f} end to end"
    if result is baseline:
        return line
    speedup = result.tokens_per_second / baseline.tokens_per_second
    return f"{line}, tau {result.acceptance_length:.2f}, speedup {speedup:.2f}x"
