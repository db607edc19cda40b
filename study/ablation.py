"""The worth of each ingredient: heads that differ from the recipe in one thing, trained alike.

KOALA's claim is about two ingredients together, K layers and adversarial training. Here each is
removed or changed alone. Two other causes of a gain are tried as well: more parameters (one layer
as large as two), and training on the head's own guesses. All cells have the same target, number of
tokens and batches, in the same order.

Figures are from held-out text, along which the heads draft (`costs.measure_acceptance`). They help
to choose and prove nothing: the best of many cells is lucky as well.

A chosen question is written into LOG.md first. Then its cells are trained in several seeds, and
seeds are compared in pairs: `--cells eagle-koala eagle-k2 --seeds 1 2 3 4 5`. At last bench.py
decodes texts on which nothing was chosen.
"""

import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

from costs import DRAFT_POSITIONS, chain_paths, expected_length, walk
from draft_head import HeadConfig, build_head
from plumbing.cli import UserError, option, parse, run
from plumbing.curves import read_log
from plumbing.files import load_checkpoint, only_writer, write_json
from plumbing.machine import choose_autocast, choose_device, keep_heap
from plumbing.progress import check_same
from recipe import HEADS, KOALA_WEIGHT, PRESETS, TrainConfig, head_settings, in_order
from sampling import acceptance
from study.plots import plot_games
from study.report import JUDGED, ablation_table
from study.statistics import student_interval
from targets.loading import WHICH_RUN, find_run, name_of, results_folder, target_file
from targets.runs import load_target, settings_of, trained_heads
from targets.text import Text, packages_for, read_text
from train import head_data, train_head

ORIGINAL = dict(layers=1, adversarial_weight=0.0)
SUPERVISED = dict(adversarial_weight=0.0)  # the recipe's head without its discriminator
OWN = dict(own_steps=3, own_from=0.6, joint_from=0.6)
# Each cell's changes to the recipe's KOALA head: K = 2, lambda = 0.1, a learnt discriminator.
CELLS = {
    "medusa-original": ORIGINAL,
    "medusa-k2": SUPERVISED,
    "medusa-k3": SUPERVISED | dict(layers=3),
    "medusa-koala": {},
    "medusa-exact": dict(discriminator="exact"),
    "eagle-original": ORIGINAL,
    "eagle-wide": ORIGINAL,  # as many parameters as two layers: see `cell_config`
    "eagle-k2": SUPERVISED,
    "eagle-k3": SUPERVISED | dict(layers=3),
    "eagle-koala": {},
    "eagle-lambda-0.03": dict(adversarial_weight=0.03),
    "eagle-lambda-0.3": dict(adversarial_weight=0.3),
    # A game out of balance: D takes large steps, and the head follows D more than the target.
    "eagle-unbalanced": dict(discriminator_lr=0.05, adversarial_weight=10.0),
    "eagle-exact": dict(discriminator="exact"),
    "eagle-own-original": ORIGINAL | OWN,
    "eagle-own-k2": SUPERVISED | OWN,
    "eagle-own-nofeature": SUPERVISED | OWN | dict(feature_weight=0.0),
    "eagle-own-koala": OWN,
}
# What EAGLE's loss is told of the target, and who else tells it: labels x discriminator, one layer.
# `none`: its states; `hard`: the tokens; `hardfeature`: both; `soft`: the recipe, states and p.
LABELS = {
    "none": dict(labels="none"),
    "hard": dict(labels="hard", feature_weight=0.0),
    "hardfeature": dict(labels="hard"),
    "soft": {},
}
# Each plays from the first tenth of the steps on. lambda = 0.2 pulls, near p, as much as EAGLE's
# 0.1 of a cross entropy with p: see discriminator.py.
GAME = dict(layers=1, adversarial_weight=0.2, joint_from=0.1)
CELLS |= {f"eagle-{name}": ORIGINAL | label for name, label in LABELS.items() if label}
CELLS |= {
    f"eagle-{name}-{judge}": GAME | label | dict(discriminator=judge)
    for name, label in LABELS.items()
    for judge in ("exact", "learnt", "blind", "difference")
    if judge != "blind" or "hard" in name
}
DOSES = (0.1, 0.3, 1.0, 3.0)  # of `exact` where p is in the loss
CELLS |= {
    f"eagle-soft-exact-{weight:g}": GAME | dict(discriminator="exact", adversarial_weight=weight)
    for weight in DOSES
}
CELLS |= {  # what such a D adds near p, added by CE(p, q) itself: see discriminator.py
    f"eagle-soft-heavier-{weight:g}": ORIGINAL | dict(feature_weight=0.1 / (0.1 + weight / 2))
    for weight in DOSES
}
CELLS |= {  # steps of D alone before the game
    f"eagle-hard-learnt-{steps}": GAME | LABELS["hard"] | dict(discriminator_steps=steps)
    for steps in (0, 1000)
}
# The control of a cell, where it is not `k2`. Committed results hold a cell that is gone,
# eagle-own-window: its comparison stays.
CONTROLS = dict.fromkeys(["original", "wide", "k2", "k3", "own-original"], "original")
CONTROLS |= dict.fromkeys(["own-nofeature", "own-koala", "own-window"], "own-k2")
GAMES = "eagle-koala", "eagle-unbalanced"  # a healthy game and an unhealthy one, side by side
# Settings of a head that a cell chooses for itself, or its name does.
CHOSEN = {"layers", "adversarial_weight", "init", "head_data", "target", "discriminator"}
RATIOS = ("tau_estimate", "tau_sampled", "tau_tuned")  # figures that are compared between cells
TEMPERATURES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4)  # temperatures of q that are tried


@dataclass(frozen=True)
class AblationConfig:
    out_dir: str | None = option(None, WHICH_RUN)
    cells: list[str] | None = option(None, f"of {', '.join(CELLS)}; default: all", nargs="+")
    seeds: list[int] | None = option(
        None, "to train and to show, no others; default: train the run's, show all", nargs="+"
    )
    head_tokens: int | None = option(None, "tokens the recipe's head trains on; default: its own")
    head_data_tokens: int | None = option(None, "tokens of hidden states; default: the recipe's")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to compute in", choices=["auto", "float32", "bfloat16"])

    def __post_init__(self):
        unknown = sorted(set(self.cells or ()) - set(CELLS))
        if unknown:
            raise UserError(f"unknown cell {unknown[0]!r}: choose from {', '.join(CELLS)}")


def recipe_of(config: AblationConfig, folder: Path, known: dict) -> TrainConfig:
    """The recipe of a run: the settings of its target, `known`, and those that its heads share."""
    preset, shared = "pretrained" if "source" in known else "cpu", {}
    for name in sorted(in_order(trained_heads(folder)), key=HEADS.__contains__):
        path = folder / f"{name}.pt"  # the last one counts: EAGLE's, with a discriminator
        try:
            used = settings_of(path, load_checkpoint(path, "draft head"))
            if used["head_data"] == "self":  # whose window may be the usual one, filled in
                used.pop("head_window", None)
            shared |= used
        except UserError:
            continue  # of the first edition, by minutes: these amounts are no recipe any more
    shared = {name: value for name, value in shared.items() if name not in CHOSEN} | known
    if "source" in known:
        # The heads learn from all text that this target has written by now.
        shared |= {"target": known["source"], "written_tokens": 1}
    names = {field.name for field in fields(TrainConfig)}
    values = PRESETS[preset] | {k: v for k, v in shared.items() if k in names} | {"preset": preset}
    given = {"head_tokens": config.head_tokens, "head_data_tokens": config.head_data_tokens}
    values |= {name: value for name, value in given.items() if value is not None}
    folder = str(results_folder(folder))
    return TrainConfig(**values, out_dir=folder, device=config.device, dtype=config.dtype)


def cell_config(recipe: TrainConfig, folder: Path, cell: str, seed: int, target) -> TrainConfig:
    """The configuration of one head. Its files lie in `folder`."""
    flags = dict(layers=2, adversarial_weight=KOALA_WEIGHT) | CELLS[cell]
    if cell == "eagle-wide":
        one, two = (build_head(HeadConfig("eagle", k), target) for k in (1, 2))
        more = sum(w.numel() for w in two.parameters()) - sum(w.numel() for w in one.parameters())
        width = target.config.width
        flags["head_mlp_width"] = target.config.mlp_width + round(more / (3 * width))
    name = f"{cell}-seed{seed}"
    return replace(recipe, **flags, head=name, seed=seed, out_dir=str(folder)).of_head(cell)


def text_of(recipe: TrainConfig, path: Path, checkpoint: dict) -> Text:
    """The text of a run, in the tokens of its target at `path`."""
    text = read_text(recipe.data, packages_for(recipe.target_vocab))
    text.expect(settings_of(path, checkpoint).get("text", text.description["hash"]))
    text.use(checkpoint["tokenizer"])
    return text


def train_cells(config: AblationConfig, run_folder: Path, name: str) -> tuple:
    """Train those heads that the run's results do not have yet, beside its target.

    Returns (the recipe, the folder `name` in which the heads lie, the target's fingerprint). Two
    processes may train different heads. Raises UserError where another one trains this head.
    """
    path, device = target_file(run_folder), choose_device(config.device)
    target, checkpoint = load_target(path, device)
    recipe = recipe_of(config, run_folder, settings_of(path, checkpoint))
    print(f"run {name_of(run_folder)}, its own recipe: {recipe.head_tokens:,} tokens a head")
    autocast, data = choose_autocast(recipe.dtype, device), {}
    text = text_of(recipe, path, checkpoint) if recipe.needs_text else None
    folder = recipe.folder / name
    folder.mkdir(parents=True, exist_ok=True)
    heads = [
        (cell, seed) for cell in config.cells or CELLS for seed in config.seeds or [recipe.seed]
    ]
    for cell, seed in heads:
        own, one = recipe.of_head(cell), cell_config(recipe, folder, cell, seed, target)
        path = folder / f"{one.head}.pt"
        wanted = head_settings(one, one.head, checkpoint["fingerprint"])
        with only_writer(folder, one.head):
            if path.is_file():
                check_same(path, settings_of(path, load_checkpoint(path, "draft head")), wanted)
                print(f"{one.head}: trained already")
                continue
            if own.head_data not in data:
                data[own.head_data] = head_data(own, target, checkpoint, text, autocast)
            windows = data[own.head_data]
            train_head(one, one.head, target, wanted, *windows, autocast, alpha_by_temperature)
    return recipe, folder, checkpoint["fingerprint"]


# -------------------------------------------------------------------------------- the result


@torch.no_grad()
def alpha_by_temperature(target, head, batch, stride: int = 16) -> dict:
    """alpha (TEMPERATURES, P) along text, with q's logits divided by each of the temperatures."""
    tokens, hidden, learn = batch
    positions = min(DRAFT_POSITIONS, head.max_draft or DRAFT_POSITIONS)
    drafts, total = 0, torch.zeros(len(TEMPERATURES), positions, dtype=torch.float64)
    for start, i, logits, _ in walk(head, tokens, hidden, positions, stride):
        use = learn[:, start + 1 : start + positions + 1].all(1)
        drafts += use.sum().item() if i == 0 else 0
        p = target.lm_head(hidden[use, start + i]).float().softmax(-1)
        p = head.vocabulary.rows(p.T).T  # of the tokens that the head can guess
        for row, temperature in zip(total, TEMPERATURES):
            row[i] += acceptance(p, (logits[use].float() / temperature).softmax(-1)).sum().item()
    return {"heated": (total / drafts).tolist()}


def figures(record: dict, folder: Path) -> dict:
    """The figures that are kept of one head.

    `tau_estimate` is the acceptance length of greedy drafts, `tau_sampled` that at temperature 1.
    `tau_tuned` is the latter with q at its best temperature, `heat`. A loss gains nothing there by
    only making q sharper or flatter. The discriminator's last figures are from its log.
    """
    kept = {key: value for key, value in record["valid"].items() if isinstance(value, float)}
    # A chain's rates: one guess at each position.
    heated = [[[alpha] for alpha in alphas] for alphas in record["valid"]["heated"]]
    lengths = [expected_length(rates, chain_paths(len(rates))) for rates in heated]
    kept["tau_sampled"] = lengths[TEMPERATURES.index(1.0)]
    kept["tau_tuned"], kept["heat"] = max(zip(lengths, TEMPERATURES))
    kept |= {key: record[key] for key in ("parameters", "seconds", "kept_step", "dtype")}
    kept["head_tokens"] = record["settings"]["head_tokens"]
    if record.get("dose"):
        kept["dose"] = record["dose"]["share"]
    log = read_log(folder / f"{record['name']}.csv")
    return kept | {key: log[key][1][-1] for key in JUDGED if log.get(key)}


def collect(folder: Path, target_print: str, seeds: list[int] | None) -> dict:
    """results[cell][seed] of the heads trained so far, of these seeds; None: of all.

    Cells that are gone come last. Raises UserError for a head of another target.
    """
    results = {cell: {} for cell in CELLS}
    for path in sorted(folder.glob("*-seed*.pt")):
        name = re.fullmatch(r"(.+)-seed(\d+)", path.stem)  # of a finished head
        if name and (seeds is None or int(name[2]) in seeds):
            head = load_checkpoint(path, "draft head")
            if head["target"] != target_print:
                raise UserError(f"{path} was trained for another target: remove it")
            cell = results.setdefault(name[1], {})
            cell[int(name[2])] = figures(head["training"], folder)
    return {cell: heads for cell, heads in results.items() if heads}


def control_of(cell: str) -> str:
    """The cell that this one is compared with: the same without one ingredient."""
    kind, name = cell.split("-", 1)
    label, _, judge = name.partition("-")
    if label in LABELS:  # without a game: the recipe's; with one: the same without it
        name = "original" if label == "soft" or not judge else label
        return f"{kind}-{name}"
    return f"{kind}-{CONTROLS.get(name, 'k2')}"


def compared(results: dict) -> dict:
    """From results[cell][seed] to each cell's heads, its control, and the ratios to the control.

    A ratio is a mean over the seeds that both cells have, trained in one dtype, and half the width
    of its interval. `recovered`, likewise: of what its labels lack to p, how much a D brings back.
    """
    cells = {}
    for cell, heads in results.items():
        other, row = control_of(cell), {"heads": heads, "against": None, "ratios": {}}
        seeds = pairs(heads, controls := results.get(other, {}))
        if seeds and other != cell:
            row["against"] = other
            for key in RATIOS:
                ratios = [heads[seed][key] / controls[seed][key] for seed in seeds]
                row["ratios"][key] = student_interval(ratios)
        kind, label = other.split("-", 1)
        whole = results.get(f"{kind}-original", {})
        if label in LABELS and (seeds := sorted({*seeds} & {*pairs(heads, whole)})):
            taus = [[part[s]["tau_sampled"] for part in (heads, controls, whole)] for s in seeds]
            row["recovered"] = student_interval([(a - b) / (c - b) for a, b, c in taus])
        cells[cell] = row
    return cells


def pairs(heads: dict, controls: dict) -> list[int]:
    """The seeds of two cells whose heads were trained in one dtype."""
    both = heads.keys() & controls.keys()
    return sorted(s for s in both if heads[s].get("dtype") == controls[s].get("dtype"))


# -------------------------------------------------------------------------------------- main


def main() -> None:
    config = parse(AblationConfig, about=__doc__)
    run_folder = find_run(config.out_dir, needs_head=False)
    keep_heap()
    recipe, folder, fingerprint = train_cells(config, run_folder, "ablation")
    results = collect(folder, fingerprint, config.seeds)
    # "equal": the first edition could also train all cells for equal seconds.
    result = {"target": fingerprint, "equal": "tokens", "cells": compared(results)}
    name, shown = "ablation-tokens", ablation_table(result)
    write_json(folder / f"{name}.json", result)
    (folder / f"{name}.md").write_text(shown + "\n", "utf-8")
    logs = {cell: folder / f"{cell}-seed{recipe.seed}.csv" for cell in GAMES}
    if all(path.is_file() for path in logs.values()):
        plot_games(logs, folder / "games.png")
    print(f"\nOn held-out text:\n\n{shown}\n\nwritten: {folder}/{name}.json and .md")


if __name__ == "__main__":
    run(main)
