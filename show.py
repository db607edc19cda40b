"""How decoding is shown: text as it is written, the trace of a cycle, the closing comparison.

Nothing here decides anything: speculate.py calls it with what has happened already.
"""

import codecs
import os
import sys


class Printer:
    """Text as it is written: accepted drafts in colour, characters only once they are whole."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, token: int, accepted: bool) -> None:
        text = harmless(self.decoder.decode(self.encoding.decode_bytes([token])))
        print(f"\033[32m{text}\033[0m" if accepted and self.colour else text, end="", flush=True)

    def finish(self) -> None:
        print(harmless(self.decoder.decode(b"", final=True)))


def harmless(text: str) -> str:
    """Control characters as escapes: what a model writes must not command the terminal."""
    shown = (c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
    return "".join(shown)


def trace_lines(cycle, encoding) -> list[str]:
    """A cycle in words: each drafted token with p(x), q(x), u and the verdict."""

    def quoted(token: int) -> str:
        text = encoding.decode_bytes([token]).decode("utf-8", "backslashreplace")
        shown = repr(text)
        return shown if len(shown) <= 24 else shown[:20] + "..." + shown[-1]

    lines, own = [], quoted(cycle.tokens[-1])
    ended = cycle.accepted == len(cycle.tokens)  # by a stop token inside the draft
    for i, token in enumerate(cycle.draft.tolist()):
        p_x, q_x, u = cycle.p[i, token].item(), cycle.q[i, token].item(), cycle.u[i].item()
        if i > cycle.accepted or i == cycle.accepted and ended:
            lines.append(f"  {quoted(token):24} dropped: it came after the last token in use")
            continue
        verdict = "accept" if i < cycle.accepted else "REJECT"
        reason = f"u {u:.3f} {'<' if verdict == 'accept' else '>='} min(1, p/q)"
        lines.append(f"  {quoted(token):24} p {p_x:.3f}  q {q_x:.3f}  {reason:24} {verdict}")
    if ended:
        why = f"{own} ends the text"
    elif cycle.accepted == len(cycle.draft):
        why = f"{own} from p: " + ("all were accepted" if lines else "nothing was drafted")
    else:
        why = f"{own} from the residual max(0, p - q)"
    return [*lines, f"  + {why}"]


def compare(name: str, result, baseline) -> str:
    whole = len(result.tokens) / (result.prefill_seconds + result.seconds)
    line = f"{name:15} {result.tokens_per_second:8.1f} tokens/s decoding, {whole:8.1f} end to end"
    if result is baseline:
        return line
    speedup = result.tokens_per_second / baseline.tokens_per_second
    return f"{line}, tau {result.acceptance_length:.2f}, speedup {speedup:.2f}x"
