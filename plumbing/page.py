"""A page that shows how a text was decoded, to be looked at in a browser.

From top to bottom: the figures of the run, the text with the accepted drafts in colour, plain and
speculative decoding on one scale of time, and each cycle with the verdicts on its draft.

The page is one file of HTML. It holds no script, and fetches nothing: its drawings are SVG. A model
can write anything, markup too, so all of its text is escaped. One colour stands for the target, its
passes and its p, another one for the head, its drafting and its q.

A drawn token is accepted where u < p / q, that is, where u * q < p. So p and q become bars on one
axis from 0 to 1, with a tick at u * q: the token is accepted where the tick lies inside p's bar.
"""

from dataclasses import replace
from html import escape

from plumbing.show import Speller, counts, figures, harmless, judge, quoted, times

SIGNS = {"accepted": "✓", "rejected": "✗", "dropped": "–"}  # not all readers see the colours
PHASES = {"draft": "head", "verify": "target", "other": "rest"}  # and the class of their blocks
PHONE, DESKTOP = 300, 1080  # about how many pixels a lane is wide

STYLE = """
:root { color-scheme: light dark; --page: #f5f5f3; --card: #fff; --line: #dcdcd7; --ink: #1f2328;
  --muted: #5a6169; --track: #ecece9; --target: #2b63b3; --head: #b06c0c; --rest: #858b92;
  --good: #166e30; --bad: #c0281f; --even: #e6edf7; --odd: #f4f0e4 }
@media (prefers-color-scheme: dark) { :root { --page: #121418; --card: #1b1e23; --line: #343941;
  --ink: #e4e6e9; --muted: #9aa2ac; --track: #2b2f36; --target: #78a9f0; --head: #e0a243;
  --rest: #6d747e; --good: #5ccb78; --bad: #ff8b80; --even: #222c3d; --odd: #2d2a20 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 32px 20px 64px; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 26px; line-height: 1.2; margin: 0 0 8px; text-wrap: balance }
h2 { font-size: 18px; margin: 40px 0 4px } ol { list-style: none; margin: 0; padding: 0 }
p { font-size: 13px; color: var(--muted); max-width: 100ch; margin: 4px 0 }
i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px }
.key i:not(:first-child) { margin-left: 14px }
.tile, .panel, article { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; padding: 12px 16px; margin: 10px 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 0 12px }
.tile { font-size: 13px; color: var(--muted); margin: 12px 0 0 }
.tile b { display: block; font-size: 24px; line-height: 1.3; color: var(--ink) }
.text, .token, .bars { font-family: ui-monospace, Menlo, Consolas, monospace }
.text { font-size: 14px; line-height: 1.9; tab-size: 4 }
.text, .token, .why { white-space: pre-wrap } .text > span:first-child { color: var(--muted) }
.text > :nth-child(n + 2) { background: var(--even); border-radius: 3px; padding: 3px 0;
  color: inherit; text-decoration: none }
.text > :nth-child(2n + 3) { background: var(--odd) }
.text b, p b { font-weight: inherit; color: var(--good); text-underline-offset: 4px;
  text-decoration: underline 1px color-mix(in srgb, currentColor 50%, transparent) }
.text a:hover, article:target { outline: 2px solid var(--target) }
.target { fill: var(--target); background: var(--target) }
.head { fill: var(--head); background: var(--head) }
.rest { fill: var(--rest); background: var(--rest) }
svg { display: block; width: 100%; overflow: visible }
.panel.lanes { overflow-x: auto; padding: 14px 26px }
.lanes text { font-size: 12px; fill: var(--muted) } .lanes .name { fill: var(--ink) }
.lanes .count, .lanes .tick { text-anchor: middle }
.lanes .count { font-weight: 600; fill: var(--card) }
.lanes line { stroke: var(--line) } .lanes .rest { stroke: var(--card); stroke-width: .5px }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 0 14px; font-size: 13px;
  color: var(--muted); margin-bottom: 8px }
header b { font-size: 15px; color: var(--ink) } header span:last-child { margin-left: auto }
.box { border: 1.5px solid var(--target); border-radius: 8px; padding: 6px 10px; font-size: 12px }
.accepted { border-color: var(--good) } .rejected { border-color: var(--bad) }
.accepted .token::first-letter { color: var(--good) }
.rejected .token::first-letter { color: var(--bad) }
.dropped { border: 1.5px dashed var(--line); color: var(--muted) } .dropped svg { opacity: .45 }
.token { font-size: 13px; font-weight: 600 } .why { line-height: 1.4; color: var(--muted) }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: 8px; margin: 4px 0;
  font-size: 11px; line-height: 13px } .bars line { stroke: var(--ink); stroke-width: 2px }
.bars svg { height: 26px; background: var(--track); border-radius: 2px }
.chain { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 8px }
.chain ol, .chain li { display: contents } .tree > ol { overflow-x: auto; padding-left: 16px }
.tree .box { flex: none; width: 230px; margin: 4px 0 }
.tree > .box { width: fit-content; margin-left: 16px } .tree li > ol { margin-left: 32px }
.tree li { display: flex; align-items: flex-start; position: relative }
.tree li::before, .tree li::after { content: ""; position: absolute; left: -16px;
  border: 0 solid var(--rest) }
.tree li::before { width: 16px; top: 22px; border-top-width: 1.5px }
.tree li::after { top: 0; bottom: 0; border-left-width: 1.5px }
.tree li:first-child::after { top: 22px }
.tree li:last-child::after { bottom: auto; height: 23px }
.tree li:only-child::after, .tree > ol > li:only-child::before { display: none }
.tree li li:first-child::before { left: -32px; width: 32px }
@media (max-width: 700px) { .wide { display: none } body { padding: 20px 12px 48px }
  header span:last-child { margin-left: 0 } .panel { padding: 12px } .chain { display: block }
  .chain .box { margin: 6px 0 } .tree li { display: block } .tree li .box { width: auto }
  .tree > ol { padding-left: 10px } .tree > .box { margin-left: 10px }
  .tree li > ol { margin-left: 18px } .tree li li:nth-child(n)::before { left: -10px }
  .tree li:nth-child(n)::before, .tree li:nth-child(n)::after { left: -10px }
  .tree li:nth-child(n)::before, .tree li li:nth-child(n)::before { width: 10px }
  .tree li li:nth-child(n)::after { display: block; top: -4px } }
"""
TEXT_KEY = """<p>Grey: the prompt. <b>Green and underlined</b>: drafted and accepted. The others are
the target's own. The background changes with each cycle; a click leads to the cycle.</p>"""
TIME_KEY = """<p class="key"><i class="target"></i>a pass of the target <i class="head"></i>drafting
<i class="rest"></i>the rest</p><p>A number tells how many tokens a cycle wrote. The first token,
which comes from reading the prompt, is left out. Sampled, each run writes a text of its own.</p>"""
KEY = """<p class="key"><i class="target"></i>p, the target's probability of the token
<i class="head"></i>q, the head's</p><p>✓ accepted, ✗ rejected, – dropped, + the last token that the
cycle wrote, and where it is from</p>"""
DRAWN = """<p>A token that was drawn from q is accepted where u &lt; p / q, that is, where u times
q is less than p. The tick stands at u times q: a token is accepted exactly where the tick lies
inside p's bar.</p>"""
NAMED = """<p>The draft just names tokens, likely or copied ones. One is accepted where it is the
target's own choice; p and q decide nothing. (At temperature 0 they are those of temperature
1.)</p>"""


def record(cycles: list, show=None):
    """An `on_cycle` that shows each cycle and keeps it in the list, but for its large tensors."""

    def look(cycle) -> None:
        if show is not None:
            show(cycle)
        cycles.append(replace(cycle, draft=cycle.draft._replace(q=None, logits=())))

    return look


def page(facts: list[str], prompt: str, lanes: dict, encoding, stops) -> str:
    """The page as HTML. `facts`: what is to be told of the run.

    `lanes`: name -> (result, cycles) of a run, plain decoding first. The last one is shown in full.
    """
    name, (_, cycles) = list(lanes.items())[-1]
    cards = [card(i, cycle, encoding) for i, cycle in enumerate(cycles) if cycle.p]
    parts = [
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{name.capitalize()} decoding</title><style>{STYLE}</style></head>",
        f"<body><h1>{name.capitalize()} decoding, cycle by cycle</h1>",
        *(f"<p>{escape(harmless(fact))}</p>" for fact in facts),
        tiles(lanes),
        f"<h2>The text</h2>{TEXT_KEY}",
        text(prompt, cycles, encoding, stops),
        f"<h2>The time</h2>{TIME_KEY}",
        timeline(lanes),
    ]
    if cards:
        drafted = [cycle for cycle in cycles if cycle.p]
        rules = DRAWN if any(cycle.u for cycle in drafted) else ""
        rules += NAMED if any(not cycle.u for cycle in drafted) else ""
        parts += [f"<h2>The cycles</h2>{KEY}{rules}", *cards]
    return "\n".join([*parts, "</body></html>\n"])


def tiles(lanes: dict) -> str:
    """The figures of the runs, large."""
    shown, baseline = [], list(lanes.values())[0][0]
    for name, (result, _) in lanes.items():
        found = figures(result, baseline)
        shown.append((found["decoding"], f"tokens/s, {name}"))
        if result is not baseline:
            shown += [(found["speedup"], "speedup"), (found["tau"], "tau, tokens per pass")]
    tiles = (f'<div class="tile"><b>{value}</b>{of}</div>' for value, of in shown)
    return f'<div class="tiles">{"".join(tiles)}</div>'


def linked(number: int, cycle, inner: str, tag: str) -> str:
    """Something of a cycle, as a link to its card: a cycle with a draft has one."""
    return f'<a href="#cycle-{number}">{inner}</a>' if cycle.p else f"<{tag}>{inner}</{tag}>"


def text(prompt: str, cycles: list, encoding, stops) -> str:
    """The prompt and what was written, accepted drafts in colour, a group for each cycle."""
    speller, groups = Speller(encoding), [f"<span>{escape(harmless(prompt))}</span>"]
    for number, cycle in enumerate(cycles):
        inner = ""
        for i, token in enumerate(cycle.tokens):
            spelt = escape(speller.spell(token)) if token not in stops else ""
            inner += f"<b>{spelt}</b>" if i < cycle.accepted else spelt
        groups.append(linked(number, cycle, inner, "span"))
    return f'<div class="panel text">{"".join(groups)}{escape(speller.rest())}</div>'


def timeline(lanes: dict) -> str:
    """A lane for each run, on one scale: the phases of each cycle as blocks."""
    whole = max(result.seconds for result, _ in lanes.values()) or 1.0  # 1: nothing was decoded
    step = next(s * 10**k for k in range(-6, 9) for s in (1, 2, 5) if whole <= 5 * s * 10**k)
    bottom, shapes = 58 * len(lanes), []
    for i in range(int(whole / step) + 1):
        x = f"{100 * i * step / whole:.2f}%"
        label = f'<text class="tick" x="{x}" y="{bottom + 18}">{1000 * i * step:g} ms</text>'
        shapes.append(f'<line x1="{x}" x2="{x}" y1="0" y2="{bottom + 2}"/>{label}')
    for lane, (name, (result, cycles)) in enumerate(lanes.items()):
        y, start = 58 * lane, 0.0
        told = f"{name}: {len(result.tokens) - 1} tokens in {1000 * result.seconds:.0f} ms"
        shapes.append(f'<text class="name" y="{y + 12}">{told}</text>')
        for number, cycle in enumerate(cycles[1:], 1):
            inner = f"<title>cycle {number}: {counts(cycle)}; {times(cycle)}</title>"
            for phase, kind in PHASES.items():
                width = cycle.seconds[phase] / whole
                place = f'x="{100 * start:.3f}%" width="{100 * width:.3f}%"'
                inner += f'<rect class="{kind}" y="{y + 20}" height="28" {place}/>'
                if phase == "verify" and cycle.p and width * DESKTOP > 10:
                    wide = "" if width * PHONE > 10 else " wide"
                    place = f'x="{100 * (start + width / 2):.3f}%" y="{y + 38}"'
                    inner += f'<text class="count{wide}" {place}>{len(cycle.tokens)}</text>'
                start += width
            shapes.append(linked(number, cycle, inner, "g"))
    least = 2 * max(len(cycles) for _, cycles in lanes.values())  # pixels; more than that scrolls
    size = f'height="{bottom + 22}" style="min-width: {least}px"'
    return f'<div class="panel lanes"><svg {size}>{"".join(shapes)}</svg></div>'


def card(number: int, cycle, encoding) -> str:
    """A cycle: its draft as a tree of boxes, each after its parent, and the token that follows."""
    tokens, parents = cycle.draft.tokens.tolist(), cycle.draft.shape.parents.tolist()
    verdicts, why = judge(cycle, encoding)
    items = [""] * len(tokens)  # of each node: the items of its children
    for node in reversed(range(1, len(tokens))):  # a node comes after its parent
        children = f"<ol>{items[node]}</ol>" if items[node] else ""
        drafted = box(cycle, node, quoted(tokens[node], encoding), *verdicts[node - 1])
        items[parents[node]] = f"<li>{drafted}{children}</li>\n" + items[parents[node]]
    kind = "chain" if parents[1:] == list(range(len(tokens) - 1)) else "tree"
    own = escape(quoted(cycle.tokens[-1], encoding))
    return (
        f'<article id="cycle-{number}"><header><b>Cycle {number}</b><span>{counts(cycle)}</span>'
        f'<span>{times(cycle)}</span></header><div class="{kind}">\n<ol>{items[0]}</ol>'
        f'<div class="box own"><div class="token">+ {own}</div><div class="why">{why}</div></div>'
        "</div></article>"
    )


def box(cycle, node: int, token: str, kind: str, words: str) -> str:
    """A drafted token: its p and q, and the u that decided. What was dropped no u decided."""
    p, q = cycle.p[node - 1], cycle.q[node - 1] if cycle.q else None
    bars = f'<rect class="target" y="3" height="7" width="{100 * p:.6f}%"/>'
    names, values = "p", f"{p:.3f}"
    if q is not None:  # a copy has none
        bars += f'<rect class="head" y="16" height="7" width="{100 * q:.6f}%"/>'
        names, values = f"{names}<br>q", f"{values}<br>{q:.3f}"
    if cycle.u and kind != "dropped":
        u = cycle.u[node - 1]
        x, words = f"{100 * u * q:.6f}%", f"u {u:.3f}, {words}"
        bars += f'<line x1="{x}" x2="{x}" y1="0" y2="26"/>'
    return (
        f'<div class="box {kind}"><div class="token">{SIGNS[kind]} {escape(token)}</div>'
        f'<div class="bars"><span>{names}</span><svg>{bars}</svg>'
        f'<span>{values}</span></div><div class="why">{escape(words)}</div></div>'
    )
