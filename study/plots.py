"""Results as plots. They draw what they are given; report.py says what of results/ is drawn."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from plumbing.curves import colours, read_log

# Of all plots: their text can be read when they are shown at half size.
STYLE = {"font.size": 12, "axes.titlesize": 13, "legend.frameon": False, "savefig.dpi": 120}
STYLE |= {"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3}
STYLE |= {"axes.axisbelow": True, "hatch.color": "white"}

REPORTED = 1.1057  # the least gain in speed that KOALA's abstract reports


@plt.rc_context(STYLE)
def plot_games(logs: dict[str, Path], path: Path) -> None:
    """The course of the game in several runs, a column each. discriminator.py has the figures."""
    labels = {"d_accuracy": "D is right\n(dashed: bound)", "share_found": "share found\n(cut off)"}
    labels |= {"cosine": "cosine with\nacceptance", "gradient_ratio": "gradients,\nadv. / sup."}
    labels |= {"tau_estimate": "tau, estimated\non held-out text"}
    figure, axes = plt.subplots(5, len(logs), figsize=(9, 10), sharex=True, sharey="row")
    axes[1, 0].set_ylim(-1, 1)
    axes[3, 0].set_yscale("log")
    for column, (name, log) in zip(axes.T, logs.items()):
        column[0].set_title(name)
        column[-1].set_xlabel("tokens trained on (millions)")
        columns, color = read_log(log), colours(list(logs))[name]
        column[0].plot(*columns["d_accuracy_bound"], ".--", color=color)
        for axis, key in zip(column, labels):
            axis.plot(*columns[key], ".-", color=color)
    for axis, label in zip(axes[:, 0], labels.values()):
        axis.set_ylabel(label)
    figure.savefig(path)
    plt.close(figure)


@plt.rc_context(STYLE)
def plot_bench(result: dict, path: Path) -> None:
    """Speedup, measured beside predicted, and how acceptance falls along the draft.

    A head has one colour. Its chain has plain bars and lines; its other drafts have hatched bars
    and dashed lines.
    """
    heads, methods = result["figures"]["heads"], result["methods"]
    colour = colours(list(dict.fromkeys(method["head"] for method in methods.values())))
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    for place, (name, f) in enumerate(heads.items()):
        color, chances = colour[methods[name]["head"]], f["conditional_acceptance"]
        hatch, line = ("", "o-") if methods[name]["setting"] == "chain" else ("///", "o--")
        left.barh(place, f["speedup"], color=color, hatch=hatch)
        left.plot(f["speedup_interval"], [place, place], "k|-", markersize=9)
        if not methods[name].get("lookup"):  # copies and drafts of another length are no one curve
            right.plot(range(1, len(chances) + 1), chances, line, color=color)
    places, predicted = range(len(heads)), [f["predicted_speedup"] for f in heads.values()]
    left.plot(predicted, places, "kD", markersize=5, label="predicted from the cost of each cycle")
    left.plot([], [], "k|-", markersize=9, label="95 % interval over prompts")
    left.barh(0, 0, color="gray", hatch="///", label="other drafts (right: dashed)")
    left.axvline(1.0, color="black", linestyle="--", label="plain decoding")
    left.set_yticks(places, [f"{name}, tau {f['tau']:.2f}" for name, f in heads.items()])
    left.set(title="speedup", ylim=(len(heads) - 0.5, -0.5))
    right.set(title="acceptance, given all before", xlabel="draft position", ylim=(-0.02, 1.02))
    deepest = max(m["gamma"] for m in methods.values() if not m.get("lookup"))
    right.set_xticks(range(1, deepest + 1))
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path)
    plt.close(figure)


def gains_by_training(result: dict, ablations: list[dict]) -> list[tuple]:
    """Of finished heads: millions of tokens, the ratio of taus, and half of its interval."""
    one, two = (result["training"][head] for head in ("eagle", "eagle-koala"))
    trained = two.get("tokens") or sum(r["tokens"] for r in two["rounds"])  # first edition
    gain = two["valid"]["tau_estimate"] / one["valid"]["tau_estimate"]
    points = [(trained / 1e6, gain, np.nan)]
    for row in (ablation["cells"]["eagle-k2"] for ablation in ablations):
        tokens = max(head["head_tokens"] for head in row["heads"].values()) / 1e6
        mean, *half = row["ratios"]["tau_estimate"]  # a single pair has no interval
        points.append((tokens, mean, *(half or [np.nan])))
    return points


@plt.rc_context(STYLE)
def plot_gain(measured: dict[str, tuple], path: Path) -> None:
    """The gain of eagle-koala over eagle: in speed if layers were cheaper, in tau by training.

    measured: {target: (its benchmark, its ablations)}.

    Speed is tau / (c_verify + c_draft). In a target of twice the depth, a draft layer costs half as
    much of a plain step. So on the left both heads' c_draft shrinks, and tau stays as measured. On
    the right are finished heads only: the gain differs while the learning rate is high.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6))
    for color, (name, (result, ablations)) in zip(("teal", "mediumvioletred"), measured.items()):
        heads, against = result["figures"]["heads"], result["figures"]["comparisons"]["eagle-koala"]
        ratio, (low, high) = against[0]["tau_ratio"], against[0]["tau_ratio_interval"]
        verify = heads["eagle-koala"]["c_verify"]
        one, two = (heads[head]["c_draft"] for head in ("eagle", "eagle-koala"))
        share = np.geomspace(0.02, 1.5, 100)  # of today's cost of drafting
        layer, cheaper = share * (two - one), (verify + share * one) / (verify + share * two)
        left.plot(layer, ratio * cheaper, color=color, label=f"{name}: tau x {ratio:.3f}")
        left.fill_between(layer, low * cheaper, high * cheaper, color=color, alpha=0.15)
        left.plot(two - one, ratio * (verify + one) / (verify + two), "o", color=color)
        right.errorbar(*zip(*gains_by_training(result, ablations)), fmt="o", capsize=4, color=color)
    left.axhline(1.0, color="gray", linestyle="--", label="as fast as eagle")
    left.axhline(REPORTED, color="gray", linestyle=":", label="the least gain that KOALA reports")
    left.set(xscale="log", ymargin=0.1)
    left.set_xticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    left.set(title="speed against eagle (dot: measured)", xlabel="cost of layer 2 in plain steps")
    right.set(title="tau ratio, 2 layers to 1 (bar: 95 %)", xlabel="millions of tokens trained on")
    right.set(xlim=(0, None), ylim=(1.0, None))
    right.locator_params(axis="y", nbins=3)
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path)
    plt.close(figure)


@plt.rc_context(STYLE)
def plot_labels(result: dict, path: Path) -> None:
    """tau by the labels of the loss and by the discriminator: see study/README.md, the cells."""
    judges = {"": "no D", "exact": "exact D", "difference": "D by difference"}
    judges |= {"learnt": "learnt D", "blind": "blind D"}
    labels = {"none": "states", "hard": "tokens", "hardfeature": "states, tokens"}
    labels |= {"soft": "states, p\n(the recipe)"}
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6))
    keys = {"tau_sampled": "temperature 1", "tau_estimate": "greedy"}
    for axis, (key, title) in zip(axes, keys.items()):
        for shift, (judge, name) in enumerate(judges.items()):
            for place, label in enumerate(labels):
                name_of = "original" if label == "soft" and not judge else label
                cell = f"eagle-{name_of}-{judge}".rstrip("-")
                heads = result["cells"].get(cell, {"heads": {}})["heads"].values()
                taus = [head[key] for head in heads]
                x = place + 0.16 * (shift - 2)
                axis.plot([x] * len(taus), taus, "o", color=f"C{shift}", alpha=0.4, markersize=4)
                axis.plot([x - 0.06, x + 0.06], [np.mean(taus or [np.nan])] * 2, color=f"C{shift}")
            axis.plot([], [], "o-", color=f"C{shift}", label=name if axis is axes[0] else None)
        axis.set_xticks(range(len(labels)), labels.values())
        axis.set(title=f"tau on held-out text, {title}", xlabel="what the loss knows of the target")
    figure.legend(loc="outside lower center", ncols=5)
    figure.savefig(path)
    plt.close(figure)


@plt.rc_context(STYLE)
def plot_foresight(results: dict[str, dict], path: Path) -> None:
    """How often what is foreseen comes true, by tenths: {title: a run of study/foresight.py}."""
    figure, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 4.6), squeeze=False)
    names = {"judge": "A", "logistic": "regression on q", "q": "q"}
    for axis, (title, result) in zip(axes[0], results.items()):
        axis.plot([1e-4, 1], [1e-4, 1], "--", color="gray")
        for name, label in names.items():
            foreseen, true = np.array(result["foreseen"][name]["deciles"]).T
            true[true == 0] = np.nan  # the axes are logarithmic
            axis.plot(foreseen, true, "o-", label=label if axis is axes[0, 0] else None)
        axis.set(title=title, xlabel="foreseen", xscale="log", yscale="log")
        axis.set(xlim=(1e-4, 1.2), ylim=(1e-4, 1.2))
    axes[0, 0].set_ylabel("accepted")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)
    plt.close(figure)


def is_padded(result: dict) -> bool:
    """Whether a run of study/depth.py holds more than its target's own layers."""
    return max(row["depth"] for row in result["table"]) > result["layers"]


def depths_name(part: dict) -> str:
    return f"{part['layers']} layers, padded" if is_padded(part) else f"{part['layers']} layers"


@plt.rc_context(STYLE)
def plot_depth(result: dict, path: Path, beside: dict | None = None) -> None:
    """Net speed of K layers against one, by the target's depth, each K with its own draft.

    Lines: a padded target; dashed, where each draft step costs the most besides its layers; dotted,
    with diamonds: targets with other layers of their own. Crosses: some texts, decoded. Stars:
    other targets, of the results `beside` {name: result}.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in result["table"]))
    most, real = max(row["more"] for row in result["table"]), result["real"].values()
    figure, axes = plt.subplots(1, len(kinds), figsize=(10, 4.6), sharey=True, squeeze=False)

    def draw(axis, table, layers: str, more: float, line: str, color: str, label: str, shift=1.0):
        rows = [row for row in table if (row["kind"], row["more"]) == (kind, more)]
        rows = [row for row in rows if "task" not in row]
        depths, found = [row["depth"] for row in rows], [row["heads"][layers] for row in rows]
        net = np.array([f["net"] for f in found])
        low, high = np.abs(np.array([f["net_interval"] for f in found]).T - net)
        label = label if axis is axes[0, 0] else None
        at = np.array(depths) * shift  # so that bars lie side by side
        axis.errorbar(at, net, (low, high), fmt=line, capsize=4, color=color, label=label)
        return depths

    for axis, kind in zip(axes[0], kinds):
        ticks = set()
        for color, layers in (("teal", "2"), ("mediumvioletred", "3")):
            name = f"K = {layers}"
            label = f"{name}, {depths_name(result)}"
            ticks.update(draw(axis, result["table"], layers, 0.0, "o-", color, label))
            if kind == "greedy":
                checks = {int(depth): check for depth, check in result["decoded"].items()}
                net = [
                    check[layers]["speedup"] / check["1"]["speedup"] for check in checks.values()
                ]
                axis.plot([*checks], net, "x", color=color, label=f"{name}, decoded")
            dear = f"{name}, a draft step {most:g} dearer"
            draw(axis, result["table"], layers, most, "s--", color, dear)
            for part in real:
                label = f"{name}, {depths_name(part)}"
                ticks.update(draw(axis, part["table"], layers, 0.0, "D:", color, label, shift=1.06))
            for other, found in (beside or {}).items():
                draw(axis, found["table"], layers, 0.0, "*", color, f"{name}, {other}")
        axis.axhline(1.0, color="gray", linestyle="--")
        axis.axhline(REPORTED, color="gray", linestyle=":")
        axis.set(title=kind, xlabel="layers of the target (padded beyond its own)", xscale="log")
        axis.set_xticks(sorted(ticks), [str(depth) for depth in sorted(ticks)])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("speed against one layer (bar: 95 %)")
    axes[0, 0].plot([], [], ":", color="gray", label="KOALA's least gain")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path)
    plt.close(figure)
