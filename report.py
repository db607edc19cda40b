"""What the runs leave behind for a reader: tables in Markdown, plots, and README's own tables.

Only formatting: every figure comes from the checkpoints and logs of train.py, or from the result
of bench.py. README's tables are written from the results in results/, never by hand.
"""

import csv
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: plots go to files
import matplotlib.pyplot as plt
import numpy as np

# What shows the gain of a second layer, by what the target is called there: eagle-koala against
# eagle in a benchmark, eagle-k2 against eagle-original in ablations.
GAINS = {
    "small GPT, 16 layers": ("cpu-greedy", ["ablation-pairs", "ablation-long"]),
    "SmolLM2, 30 layers": ("smollm2-greedy", []),
}
README = Path(__file__).with_name("README.md")
RESULTS = Path(__file__).with_name("results")
# The discriminator's figures, see discriminator.py: how they are called in tables, and drawn.
JUDGED = {"share_found": "share", "gradient_ratio": "gradients", "cosine": "cosine"}
JUDGE_LINES = {"d_accuracy": "-", "d_accuracy_bound": "--", "share_found": ":", "cosine": "-."}


def heads_table(records: list[dict]) -> str:
    """The heads' held-out figures as Markdown."""
    lines = ["| head | K | lambda | parameters | minutes | text | agreement at 1, 2, .. |"]
    lines[0] += " alpha at 1 | tau, estimated |"
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for record in records:
        held_out, used = record["valid"], record["settings"]
        agree = ", ".join(f"{held_out[k]:.3f}" for k in held_out if k.startswith("agree"))
        lines.append(
            f"| {record['name']} | {used['layers']} | {used['adversarial_weight']:g} "
            f"| {record['parameters'] / 1e6:.2f} M | {record['seconds'] / 60:.1f} "
            f"| {used['head_data']} | {agree} "
            f"| {held_out['alpha_1']:.3f} | {held_out['tau_estimate']:.2f} |"
        )
    return "\n".join(lines)


def read_log(path: Path) -> dict[str, tuple[list, list]]:
    """Of each column of a CSV log: millions of tokens trained on, and values, where there are any."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return {
        key: tuple(zip(*[(int(r["tokens"]) / 1e6, float(r[key])) for r in rows if r[key]]))
        for key in rows[0]
    }


def plot_training(folder: Path, names: list[str]) -> None:
    """training.png, from the CSV logs: losses, held-out acceptance, the discriminator's health."""
    paths = {name: folder / f"{name}.csv" for name in names}
    logs = {name: read_log(path) for name, path in paths.items() if path.is_file()}
    figure, axes = plt.subplots(2, 2, figsize=(12, 7.5), layout="constrained")
    if (folder / "target.csv").is_file():
        axes[0, 0].plot(*read_log(folder / "target.csv")["loss"], color="black")
        axes[0, 0].set(title="Target: training loss", ylabel="cross entropy (nats)")
    else:  # it was trained elsewhere
        for name, log in logs.items():
            (line,) = axes[0, 0].plot(*log["agree_1"], label=f"{name}, position 1")
            axes[0, 0].plot(*log["agree_4"], "--", color=line.get_color(), label="position 4")
        axes[0, 0].set(title="Heads: same first choice as the target, held out", ylabel="share")
    for name, log in logs.items():
        axes[0, 1].plot(*log["loss_sup"], label=name)
        axes[1, 0].plot(*log["tau_estimate"], marker="o", label=name)
        for key, line in JUDGE_LINES.items():
            if key in log:
                axes[1, 1].plot(*log[key], line, label=f"{name}: {key.replace('_', ' ')}")
    title = "Heads: supervised loss (each kind has its own)"
    axes[0, 1].set(title=title, ylabel="L_sup", yscale="log")
    title = "Heads: estimated acceptance length, held-out text"
    axes[1, 0].set(title=title, ylabel="tokens per target pass")
    title = "Discriminator: accuracy, its bound, share found, cosine"
    axes[1, 1].set(title=title, ylabel="share")
    for axis in axes.flat:
        axis.set(xlabel="tokens trained on (millions)")
        axis.grid(alpha=0.3)
        # The discriminator's eight lines leave no room among them.
        outside = dict(loc="center left", bbox_to_anchor=(1, 0.5)) if axis is axes[1, 1] else {}
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, **outside)
    figure.savefig(folder / "training.png", dpi=120)
    plt.close(figure)


def ablation_table(result: dict) -> str:
    """An ablation's cells as Markdown, means over seeds; all taus are estimates, on held-out text."""
    lines = ["| cell | seeds | parameters | tokens | minutes | agreement 1, 4 | tau, greedy "]
    lines[0] += "| tau at temperature 1 (q at its best) | against | ratio, greedy "
    lines[0] += "| ratio at temperature 1 (q at its best) | discriminator |"
    lines.append("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for cell, row in result["cells"].items():
        heads = list(row["heads"].values())
        mean = {key: np.mean([head[key] for head in heads]) for key in heads[0]}
        ratio = {
            key: " ± ".join(f"{value:.4f}" for value in interval)
            for key, interval in row["ratios"].items()
        }
        cells = [
            cell,
            len(heads),
            f"{mean['parameters'] / 1e6:.2f} M",
            f"{mean['head_tokens'] / 1e6:.2f} M",
            f"{mean['seconds'] / 60:.1f}",
            f"{mean['agree_1']:.3f}, {mean['agree_4']:.3f}",
            f"{mean['tau_estimate']:.3f}",
            f"{mean['tau_sampled']:.3f} ({mean['tau_tuned']:.3f} at {mean['heat']:.2g})",
            row["against"] or "",
            ratio.get("tau_estimate", ""),
            f"{ratio['tau_sampled']} ({ratio['tau_tuned']})" if ratio else "",
            ", ".join(f"{name} {mean[key]:.2f}" for key, name in JUDGED.items() if key in mean),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def plot_games(logs: dict[str, Path], path: Path) -> None:
    """The course of the game in several runs, a column each: discriminator.py has what to look for."""
    rows = [
        (("d_accuracy", "d_accuracy_bound"), "how often D is right\n(dashed: its bound)", {}),
        (("share_found",), "share found\n(cut off at -1)", {"ylim": (-1, 1)}),
        (("cosine",), "cosine with\nacceptance", {}),
        (("gradient_ratio",), "gradients, adversarial\n/ supervised", {"yscale": "log"}),
        (("tau_estimate",), "tau, estimated\non held-out text", {}),
    ]
    shape = dict(figsize=(9, 10), sharex=True, sharey="row", layout="constrained")
    figure, axes = plt.subplots(len(rows), len(logs), **shape)
    for axis, (_, label, scale) in zip(axes[:, 0], rows):
        axis.set(ylabel=label, **scale)
    for column, (name, log) in zip(axes.T, logs.items()):
        column[0].set_title(name)
        column[-1].set_xlabel("tokens trained on (millions)")
        columns = read_log(log)
        for axis, (keys, *_) in zip(column, rows):
            for key, line in zip(keys, ("-", "--")):
                axis.plot(*columns[key], line, marker=".", color="tab:blue")
            axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_cells(result: dict, path: Path) -> None:
    """An ablation's cells: a bar each, the mean; a dot a head."""
    cells = result["cells"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 1.5 + 0.35 * len(cells)), sharey=True)
    panels = [("tau_estimate", "greedy"), ("tau_sampled", "at temperature 1")]
    for axis, (key, how) in zip(axes, panels):
        for place, (cell, row) in enumerate(cells.items()):
            values = [head[key] for head in row["heads"].values()]
            color = "tab:blue" if cell.startswith("eagle") else "tab:orange"
            axis.barh(place, np.mean(values), color=color, alpha=0.6)
            axis.plot(values, [place] * len(values), "k.", markersize=5)
        axis.set(title=f"tau {how}, estimated on held-out text", xlim=(1.0, None))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(cells)), list(cells))
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def bench_tables(result: dict, fold: bool = False) -> str:
    """A result as three Markdown tables with what is needed to read them.

    `fold`: the last one, by task, is to be unfolded by the reader.
    """
    figures, config = result["figures"], result["config"]
    how = "greedy" if config["temperature"] == 0 else f"temperature {config['temperature']:g}"
    lines = [
        f"{figures['loop_free']} loop-free prompts ({result['candidates']['looped']} of "
        f"{result['candidates']['candidates']} candidates looped)"
        + ("" if figures["loop_free"] >= 30 else " (FEWER THAN 30: no headline figure)")
        + ("" if figures["headline"] == "loop-free" else ", SO ALL ARE USED")
        + " x "
        f"{config['max_new_tokens']} tokens, {how}, {config['runs']} runs, seed {config['seed']}; "
        f"{result['device']}, {result['dtype']}; plain decoding "
        f"{figures['autoregressive_tokens_per_second']:.0f} tokens/s, "
        f"{result['baseline_share']:.0%} of a bare loop.",
        "",
        "| head | draft | tau [95 %] | tau on loops | speedup (low to high) | predicted "
        "| c_verify + c_draft | elsewhere |"
        + (" identical |" if config["temperature"] == 0 else ""),
        "|---|---|---|---|---|---|---|---|" + ("---|" if config["temperature"] == 0 else ""),
    ]

    def spread(low: float, high: float, digits: int) -> str:
        """The lowest and the highest of the runs; of a single one there is no spread."""
        return f" ({low:.{digits}f} to {high:.{digits}f})" if config["runs"] > 1 else ""

    for name, f in figures["heads"].items():
        low, high = f["tau_interval"]
        loops = f"{f['tau_on_loops']:.2f}" if f["tau_on_loops"] else "none"
        lines.append(
            f"| {result['methods'][name]['head']} | {draft_name(result['methods'][name])} "
            f"| {f['tau']:.2f} [{low:.2f}, {high:.2f}] | {loops} "
            f"| {f['speedup']:.2f}x{spread(*f['speedup_range'], 2)} | {f['predicted_speedup']:.2f}x "
            f"| {f['c_verify']:.2f} + {f['c_draft']:.2f} | {f['elsewhere']:.1%} |"
            + (f" {f['identical']:.0%} |" if config["temperature"] == 0 else "")
        )
    if figures["comparisons"]:
        lines += ["", "| this | against | tau ratio [95 %] | net speed (low to high) | predicted |"]
        lines += ["|---|---|---|---|---|"]
    for name, rows in figures["comparisons"].items():
        for f in rows:
            low, high = f["tau_ratio_interval"]
            lines.append(
                f"| {name} | {f['with']} | {f['tau_ratio']:.3f} [{low:.3f}, {high:.3f}] "
                f"| {f['net_speed']:.3f}{spread(*f['net_speed_range'], 3)} | {f['predicted']:.3f} |"
            )
    title, end = "By task (loop-free prompts): tau, speedup measured (and predicted)", []
    if fold:
        title, end = f"<details><summary>{title}</summary>", ["", "</details>"]
    return "\n".join([*lines, "", title, "", task_table(result), *end])


def task_table(result: dict) -> str:
    """Of each method and task: tau, and the speedup measured (and predicted)."""
    heads = result["figures"]["heads"]
    tasks = list(next(iter(heads.values()))["tau_by_task"])
    use = [s for s in result["samples"] if not s["loop"]]
    counts = {t: sum(s["task"] == t for s in use) for t in tasks}
    lines = ["| head | draft | " + " | ".join(f"{t} ({counts[t]})" for t in tasks) + " |"]
    lines.append("|---|---|" + "---|" * len(tasks))
    for name, f in heads.items():
        method, cost = result["methods"][name], f["c_verify"] + f["c_draft"]
        cells = [
            f"{f['tau_by_task'][t]:.2f}, {f['speedup_by_task'][t]:.2f}x "
            f"({f['tau_by_task'][t] / cost:.2f}x)"
            if t in f["tau_by_task"]
            else ""
            for t in tasks
        ]
        lines.append(f"| {method['head']} | {draft_name(method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draft_name(method: dict) -> str:
    size = f"tree of {method['nodes']}, {method['gamma']} deep"
    chosen = " (chosen)" if method["chosen"] else ""
    return (size if method["nodes"] else f"chain of {method['gamma']}") + chosen


def plot_bench(result: dict, path: Path) -> None:
    """Speedup, measured beside predicted, and how acceptance falls along the draft."""
    heads = result["figures"]["heads"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    places = np.arange(len(heads))
    measured = np.array([f["speedup"] for f in heads.values()])
    spread = np.array([f["speedup_range"] for f in heads.values()]).T
    errors = np.abs(spread - measured)
    left.bar(
        places, measured, yerr=errors, capsize=4, color="tab:blue", label="measured (range of runs)"
    )
    predicted = [f["predicted_speedup"] for f in heads.values()]
    left.plot(places, predicted, "D", color="black", label="tau / (c_verify + c_draft)")
    left.axhline(1.0, color="gray", linestyle="--", label="plain decoding")
    labels = [f"{name}, tau {f['tau']:.2f}" for name, f in heads.items()]
    left.set_xticks(places, labels, rotation=25, ha="right")
    left.set(ylabel="speedup (x)", title="Speed of decoding, plain decoding = 1")
    left.legend(loc="lower left", fontsize=8)
    for name, f in heads.items():
        chances = f["conditional_acceptance"]
        right.plot(range(1, len(chances) + 1), chances, marker="o", label=name)
    right.set_xticks(range(1, max(len(f["conditional_acceptance"]) for f in heads.values()) + 1))
    right.set(xlabel="draft position", ylabel="share accepted", ylim=(0, 1))
    right.set(title="Chance of acceptance, given that all before were")
    right.legend(fontsize=8, ncols=2)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def read_result(name: str) -> dict:
    """What bench.py or ablation.py found, as it is committed."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def plot_gain(path: Path) -> None:
    """What eagle-koala gains over eagle: in speed, were its layers cheaper, and in tau by training.

    Speed is tau / (c_verify + c_draft). In a target of twice the depth a draft layer costs half as
    much of a plain step: so the left panel lets both heads' c_draft shrink, tau as it was measured.
    The right one has finished heads only: while the learning rate is high, the gain is another.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for color, (name, (bench, ablations)) in zip(("tab:blue", "tab:orange"), GAINS.items()):
        result = read_result(bench)
        heads = result["figures"]["heads"]
        against = result["figures"]["comparisons"]["eagle-koala"][0]
        one, two = (heads[head]["c_draft"] for head in ("eagle", "eagle-koala"))
        verify = heads["eagle-koala"]["c_verify"]
        layer, ratio = two - one, against["tau_ratio"]
        share = np.geomspace(0.02, 1.5, 100)  # of what drafting costs today
        cheaper = (verify + share * one) / (verify + share * two)
        low, high = against["tau_ratio_interval"]
        label = f"{name}: tau x {ratio:.3f}"
        left.plot(share * layer, ratio * cheaper, color=color, label=label)
        left.fill_between(share * layer, low * cheaper, high * cheaper, color=color, alpha=0.15)
        left.plot(layer, ratio * (verify + one) / (verify + two), "o", color=color)
        one, two = (result["training"][head] for head in ("eagle", "eagle-koala"))
        gain = two["valid"]["tau_estimate"] / one["valid"]["tau_estimate"]
        points = [(sum(r["tokens"] for r in two["rounds"]) / 1e6, gain, 0.0)]
        for row in (read_result(ablation)["cells"]["eagle-k2"] for ablation in ablations):
            tokens = max(head["head_tokens"] for head in row["heads"].values()) / 1e6
            mean, *half = row["ratios"]["tau_estimate"]  # of a single pair there is no interval
            points.append((tokens, mean, *(half or [0.0])))
        right.errorbar(*zip(*sorted(points)), fmt="o", capsize=3, color=color, label=name)
    for level, label in ((1.0, "as fast as eagle"), (1.1057, "the least gain that KOALA reports")):
        left.axhline(level, color="gray", linestyle="--" if level == 1 else ":", label=label)
    left.set_xscale("log")
    left.set_xticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
    left.set(xlabel="the second layer in a chain of 4, in plain steps (dot: measured)")
    left.set(title="Net speed against eagle, were draft layers cheaper", ylabel="ratio of speeds")
    right.set(title="tau of two layers against one (bars: over seeds)", ylabel="ratio of taus")
    right.set(xlabel="tokens trained on (millions)", ylim=(1.0, None), xlim=(0.0, None))
    for axis, place in ((left, "lower left"), (right, "center left")):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc=place)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def readme_tables(text: str) -> str:
    """README with each `<!-- results/NAME.json -->` block rewritten from that file."""
    parts = text.split("<!-- results/")
    for index, part in enumerate(parts[1:], start=1):
        name, rest = part.split(".json -->", 1)
        after = rest[rest.index("<!-- end -->") :]
        result = read_result(name)
        tables = ablation_table(result) if "cells" in result else bench_tables(result, fold=True)
        parts[index] = f"{name}.json -->\n{tables}\n{after}"
    return "<!-- results/".join(parts)
