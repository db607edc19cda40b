"""The table and the curves of training, and the colour of each head in all plots."""

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no window: plots go to files
import matplotlib.pyplot as plt

COLOURS = {"eagle": "tab:blue", "eagle-koala": "tab:orange", "medusa": "tab:green"}
COLOURS |= {"medusa-koala": "tab:red"}
OTHERS = ("tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan")
# The discriminator's figures that are drawn, see discriminator.py.
JUDGE_LINES = {"d_accuracy": "-", "d_accuracy_bound": "--", "share_found": ":", "cosine": "-."}


def colours(names: list[str]) -> dict[str, str]:
    """The colour of each head: one for all plots, where it is one of the four."""
    others = [name for name in names if name not in COLOURS]
    return COLOURS | {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(others)}


def heads_table(records: list[dict]) -> str:
    """The heads' held-out figures as Markdown."""
    header = "| head | K | lambda | parameters | minutes | text | agreement at 1, 2, .. |"
    lines = [header + " alpha at 1 | tau, estimated |", "|---" * 9 + "|"]
    for record in records:
        held_out, used = record["valid"], record["settings"]
        drafts = held_out.get("drafts", 1000)  # a share of a few is known to no three digits
        digits = 3 if drafts >= 1000 else 2
        agree = ", ".join(f"{held_out[k]:.{digits}f}" for k in held_out if k.startswith("agree"))
        agree += "" if digits == 3 else f" (of {drafts})"
        lines.append(
            f"| {record['name']} | {used['layers']} | {used['adversarial_weight']:g} "
            f"| {record['parameters'] / 1e6:.2f} M | {record['seconds'] / 60:.1f} "
            f"| {used['head_data']} | {agree} "
            f"| {held_out['alpha_1']:.{digits}f} | {held_out['tau_estimate']:.2f} |"
        )
    return "\n".join(lines)


def read_log(path: Path) -> dict[str, tuple[list, list]]:
    """Each column of a CSV log: millions of tokens trained on, and the values, where measured."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {
        key: tuple(zip(*[(int(r["tokens"]) / 1e6, float(r[key])) for r in rows if r[key]]))
        for key in rows[0]
    }


def plot_training(folder: Path, names: list[str]) -> None:
    """training.png, from the CSV logs: losses, held-out acceptance, the discriminator's health."""
    colour, paths = colours(names), {name: folder / f"{name}.csv" for name in names}
    logs = {name: read_log(path) for name, path in paths.items() if path.is_file()}
    with plt.rc_context({"font.size": 12, "axes.titlesize": 12, "axes.grid": True}):
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    first, losses, tau, judge = axes.flat
    if (folder / "target.csv").is_file():
        first.plot(*read_log(folder / "target.csv")["loss"], color="black")
        first.set(title="Target: training loss", ylabel="cross entropy (nats)")
    else:  # it was trained elsewhere
        first.set(title="Held-out agreement,\nposition 1 (solid) and 4 (dashed)", ylabel="share")
    for name, log in logs.items():
        for key, line in (("agree_1", "-"), ("agree_4", "--")):
            if not (folder / "target.csv").is_file():
                first.plot(*log[key], line, color=colour[name])
        losses.plot(*log["loss_sup"], color=colour[name])
        tau.plot(*log["tau_estimate"], color=colour[name], marker="o", label=name)
        for key, line in JUDGE_LINES.items():
            if key in log:
                judge.plot(*log[key], line, color=colour[name])
    losses.set(title="Heads: supervised loss (each kind its own)", ylabel="L_sup", yscale="log")
    tau.set(title="Heads: tau, estimated on held-out text", ylabel="tokens per target pass")
    title = "D: accuracy (solid), bound (dashed),\nshare found (dotted), cosine (dash-dot)"
    judge.set(title=title, ylabel="share")
    for axis in axes.flat:
        axis.set_xlabel("tokens trained on (millions)")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(folder / "training.png", dpi=120)
    plt.close(figure)
