"""The pictures of README, RESULTS.md and EXERCISES.md: drawn from the code, with the small target.

`python -m study.pictures` writes them to docs/pictures/. Numbers in them are those of a run: of a
cycle, of p and q at one place, of one tree. Two are drawings of who is connected with whom.

    cycle.png   one cycle on a time axis, beside the plain steps that it replaces
    rule.png    p and q at one place: what is accepted, and what the residual adds
    tree.png    a tree, the row that the target reads, its mask, and the path that is kept
    heads.png   Medusa and EAGLE, and where the K layers are
    joint.png   the joint step: who learns, who is held fixed
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import to_rgba
from matplotlib.patches import FancyBboxPatch

from drafts import GrowingTree
from plumbing.cli import option, parse, run
from plumbing.curves import colours
from plumbing.machine import describe_device
from sampling import acceptance, residual
from speculate import generate
from study.plots import STYLE
from targets.bpe import encode_prompt
from targets.loading import load

DOCS = Path(__file__).parent.parent / "docs/pictures"
PROMPT = "def read(self, size=-1):\n    "
NAMES = ["eagle", "eagle-koala", "medusa"]
TARGET, HEAD, JUDGE = (colours(NAMES)[name] for name in NAMES)


@dataclass(frozen=True)
class PicturesConfig:
    out: str = option(str(DOCS), "the folder to write to")


def spelt(encoding, token: int) -> str:
    """A token as a reader sees it: blanks and line breaks are shown."""
    text = encoding.decode([token])
    return text.replace("\n", "↵").replace(" ", "·") or "∅"


def bare(axis, title: str) -> None:
    axis.set_title(title)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def box(axis, x: float, y: float, words: str, color, width=2.6, height=0.7, **more) -> None:
    """A box with words, its middle at (x, y)."""
    shape = FancyBboxPatch(
        (x - width / 2, y - height / 2),
        width,
        height,
        boxstyle="round,pad=0.05",
        facecolor=to_rgba(color, 0.6),  # words on it stay legible
        edgecolor="black",
        **more,
    )
    axis.add_patch(shape)
    axis.text(x, y, words, ha="center", va="center", fontsize=11)


def arrow(axis, start, end, words="", **more) -> None:
    style = dict(arrowstyle="->", color="black", lw=1.4) | more
    axis.annotate("", xy=end, xytext=start, arrowprops=style)
    if words:
        middle = (np.array(start) + np.array(end)) / 2
        axis.text(middle[0] + 0.1, middle[1], words, fontsize=10, va="center")


# ------------------------------------------------------------------------------- from a run


def draw_cycle(target, head, encoding, path: Path) -> None:
    """Where the time of a cycle goes, and how many plain steps write the same tokens."""
    cycles, prompt = [], encode_prompt(encoding, PROMPT)
    for _ in range(2):  # a process's first passes are slow
        cycles.clear()
        generate(target, prompt, 64, head=head, gamma=4, on_cycle=cycles.append)
        plain = generate(target, prompt, 64)
    step = plain.seconds / (len(plain.tokens) - 1) * 1000
    cycle = next(cycle for cycle in cycles[2:] if cycle.accepted == 3)
    written = [spelt(encoding, token) for token in cycle.tokens]
    figure, axis = plt.subplots(figsize=(10, 2.8))
    for i, word in enumerate(written):
        axis.barh(1, 0.96 * step, left=i * step, color=TARGET, height=0.5)
        axis.text((i + 0.48) * step, 1, word, ha="center", va="center")
    left = 0.0
    for phase, color in (("draft", HEAD), ("verify", TARGET), ("other", "lightgray")):
        width = cycle.seconds[phase] * 1000
        axis.barh(0, width, left=left, color=color, height=0.5)
        if phase != "other":
            words = {"draft": "4 drafts", "verify": "one pass over 5 tokens"}[phase]
            axis.text(left + width / 2, 0, words, ha="center", va="center")
        left += width
    said = f" {' '.join(written)}\n ({cycle.accepted} of 4 accepted, and one of the target's own)"
    axis.text(left, 0, said, va="center", fontsize=11)
    axis.set_yticks([0, 1], ["with drafts", "plain"])
    where = target.embed.weight
    axis.set(
        xlabel=f"milliseconds, {describe_device(where.device)}, {where.dtype}".replace(
            "torch.", ""
        ),
        ylim=(-0.5, 1.5),
        title="The same tokens, with and without drafts",
    )
    figure.savefig(path)
    plt.close(figure)


def draw_rule(target, head, encoding, path: Path) -> None:
    """p and q at one place: alpha is the area below both."""
    text = encode_prompt(encoding, PROMPT)
    with torch.inference_mode():
        tokens = torch.tensor([text])
        hidden = target(tokens)
        state = head.start(64)
        head.absorb(state, tokens[:, 1:], hidden[:, :-1])
        q = head.expand(state)[0, 0].float().softmax(-1)
        p = target.lm_head(hidden[0, -1]).float().softmax(-1)
    alpha, rest = acceptance(p, q).item(), residual(p, q)
    order = torch.maximum(p, q).topk(11).indices
    p, q, rest = (law[order].numpy() for law in (p, q, rest))
    figure, axis = plt.subplots(figsize=(10, 4.2))
    places, edges = np.arange(len(order)), np.arange(len(order) + 1) - 0.5
    both, missing, too_much = np.minimum(p, q), np.clip(p - q, 0, None), np.clip(q - p, 0, None)
    words = "missing: the residual, from which a rejection draws"
    axis.bar(places, missing, 1.0, both, color=TARGET, alpha=0.5, label=words)
    words = "rejected: in all as much as is missing"
    axis.bar(places, too_much, 1.0, both, color=HEAD, alpha=0.25, label=words)
    axis.bar(places, both, 1.0, color="lightgray", label=f"accepted: alpha = {alpha:.2f}")
    axis.stairs(p, edges, color=TARGET, lw=2, label="p, the target's")
    axis.stairs(q, edges, color=HEAD, lw=2, linestyle="--", label="q, the head's")
    axis.set_xticks(places, [spelt(encoding, token) for token in order.tolist()])
    title = "One place of a draft: a token drawn from q is accepted with probability min(1, p / q)"
    axis.set(title=title, ylabel="probability")
    axis.legend()
    figure.savefig(path)
    plt.close(figure)


def draw_tree(target, head, encoding, path: Path) -> None:
    """A tree of eight, the row that the target reads, the mask, and the path that is kept."""
    tokens = encode_prompt(encoding, PROMPT)
    device = target.embed.weight.device
    plan, kept, text = GrowingTree(8, 4, 3, device), None, list(tokens)
    cycles = []
    generate(target, text, 48, head=head, plan=plan, on_cycle=cycles.append)
    cycle = max(cycles[1:], key=lambda c: (1 < c.accepted < 4, len(set(c.path))))
    draft, kept = cycle.draft, cycle.path
    shape = draft.shape
    names = [spelt(encoding, token) for token in draft.tokens.tolist()]
    figure, (left, middle) = plt.subplots(1, 2, figsize=(11, 4.6), width_ratios=[1.2, 1])
    bare(left, "a tree: its root and the accepted nodes coloured")
    depth, parents = shape.depth.tolist(), shape.parents.tolist()
    leaves = [i for i in range(len(names)) if i not in parents[1:]]
    height = {
        leaf: -float(row) for row, leaf in enumerate(sorted(leaves, key=lambda i: walk(i, parents)))
    }
    for node in sorted(range(len(names)), key=lambda i: -depth[i]):
        if node not in height:
            height[node] = np.mean([height[i] for i in range(1, len(names)) if parents[i] == node])
    for node in range(len(names)):
        if node:
            ends = [depth[parents[node]], depth[node]], [height[parents[node]], height[node]]
            left.plot(*ends, color="gray", zorder=0)
        color = HEAD if node in kept else "white"
        left.text(
            depth[node],
            height[node],
            f" {names[node]} ",
            ha="center",
            va="center",
            bbox=dict(facecolor=color, edgecolor="black", boxstyle="round"),
        )
    left.margins(0.15)
    bare(middle, "what each node (row) sees (grey)")
    middle.imshow(~shape.ancestors, cmap="gray", vmin=-1, vmax=1)
    places = range(len(names))
    middle.set_xticks(places, names, rotation=60)
    middle.set_yticks(places, names)
    for node in kept:
        middle.get_xticklabels()[node].set_color(HEAD)
        middle.get_yticklabels()[node].set_color(HEAD)
    figure.savefig(path)
    plt.close(figure)


def walk(node: int, parents: list[int]) -> list[int]:
    """The nodes from the root to this one, which put leaves in order."""
    path = [node]
    while path[-1]:
        path.append(parents[path[-1]])
    return path[::-1]


# ---------------------------------------------------------------------------------- drawings


def draw_heads(path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4))
    bare(left, "Medusa: every place from the same state")
    box(left, 3.5, 0, "$h_t$, the target's state", TARGET, 4)
    for i in range(3):
        x = 1 + 2.5 * i
        for k in (1, 2):
            box(left, x, 0.6 + k, f"$u + SiLU(W_{k} u + b)$", HEAD, 2.2)
        box(left, x, 3.8, "map to logits", HEAD, 2.2)
        arrow(left, (3.5, 0.4), (x, 1.2))
        arrow(left, (x, 2.0), (x, 2.2))
        arrow(left, (x, 3.0), (x, 3.4))
        left.text(x, 4.5, f"q of $x_{{t+{2 + i}}}$", ha="center", fontsize=11)
    left.text(-0.6, 2.1, "K layers", rotation=90, va="center", ha="center", fontsize=12)
    left.set(xlim=(-1, 8), ylim=(-0.7, 5))
    bare(right, "EAGLE: one token after the other")
    box(right, 1.4, 0, "embed($x_{t+1}$)", TARGET, 2.4)
    box(right, 4.4, 0, "$h_t$", TARGET, 2)
    box(right, 2.8, 1.1, "$W$ [embed ; $h$]", HEAD, 3.4)
    for k in (1, 2):
        box(right, 2.8, 1.2 + k, f"decoder layer {k}", HEAD, 3.4)
    box(right, 2.8, 4.3, "LM head of the target", TARGET, 3.4)
    arrow(right, (1.4, 0.4), (2.2, 0.7))
    arrow(right, (4.2, 0.4), (3.4, 0.7))
    for y in (1.5, 2.6, 3.6):
        arrow(right, (2.8, y), (2.8, y + 0.3))
    right.text(4.7, 3.75, "$h'$, its guess of $h_{t+1}$", fontsize=11, va="center")
    right.text(2.8, 5.0, "q of $x_{t+2}$", ha="center", fontsize=11)
    right.text(0.6, 2.7, "K layers", rotation=90, va="center", ha="center", fontsize=12)
    arrow(right, (5.8, 3.5), (5.5, 0.1), connectionstyle="arc3,rad=-0.2", linestyle="--")
    again = "once more,\n$h'$ for $h_t$,\nthe drafted token\nfor $x_{t+1}$:\nq of $x_{t+3}$, .."
    right.text(7.6, 1.9, again, ha="center", va="center", fontsize=11)
    right.set(xlim=(0, 9), ylim=(-0.7, 5.3))
    figure.supxlabel("blue: the target's, frozen; orange: the head's, trained", fontsize=11)
    figure.savefig(path)
    plt.close(figure)


def draw_joint(path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4))
    for axis, title, learns in ((left, "1. D learns", "D"), (right, "2. the head learns", "head")):
        bare(axis, title)
        edge = {name: dict(lw=3 if name == learns else 1) for name in ("head", "D")}
        box(axis, 1.5, 0, "target (frozen)", "lightgray", 2.6)
        box(axis, 5.9, 0, "head", HEAD, 2.6, **edge["head"])
        box(axis, 3.7, 2.6, "D: target's or head's?", JUDGE, 3.6, **edge["D"])
        arrow(axis, (1.5, 0.4), (2.9, 2.2), "p, $h^+$" if learns == "D" else "$h^+$")
        arrow(axis, (5.9, 0.4), (4.5, 2.2), "q")
        axis.set(xlim=(0, 7.6), ylim=(-0.9, 4.0))
    left.text(3.7, 3.4, r"$L_D = - E_p \log D - E_q \log(1 - D)$", ha="center", fontsize=12)
    left.text(5.9, -0.8, "held fixed", ha="center", fontsize=11)
    loss = r"$L_{sup} + \lambda\, L_{adv}$,   $L_{adv} = - E_q \log D$"
    right.text(3.7, 3.4, loss, ha="center", fontsize=12)
    right.text(3.7, 1.8, "held fixed", ha="center", fontsize=11)
    words = "thick: learns; $h^+$: the target's next state, which the head has to guess"
    figure.supxlabel(words, fontsize=11)
    arrow(right, (2.9, 0.0), (4.5, 0.0))
    right.text(3.7, 0.2, "p: $L_{sup}$", ha="center", fontsize=12)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    config = parse(PicturesConfig, about=__doc__)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    target, head, encoding = load(None, "eagle", "cpu", "float32")
    torch.manual_seed(0)
    with plt.rc_context(STYLE):
        for name, draw in (("cycle", draw_cycle), ("rule", draw_rule), ("tree", draw_tree)):
            draw(target, head, encoding, out / f"{name}.png")
        draw_heads(out / "heads.png")
        draw_joint(out / "joint.png")
    print(f"written: {out}/cycle.png, rule.png, tree.png, heads.png, joint.png")


if __name__ == "__main__":
    run(main)
