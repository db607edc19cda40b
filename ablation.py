"""What each ingredient earns: heads that differ from the recipe in one thing, trained alike.

KOALA's claim is one of two ingredients together, K layers and adversarial training. Here each is
taken away or changed alone, and so is what else may explain a gain: parameters (one layer as large
as two), another supervised loss, training on the head's own guesses. All cells learn from the same
target and the same batches in the same order, for the same number of tokens; with `--equal seconds`
for as long as the recipe's head takes, since a second layer also costs a learner time.

The figures are those of held-out text, along which the heads draft (`features.measure_acceptance`).
They choose; they prove nothing: many cells were looked at, and the best of many is lucky as well.
What is chosen is to be written into LOG.md, trained with and without, in several seeds (`--cells
eagle-koala eagle-k2 --seeds 1 2 3 4 5`: pairs of the same seed are compared), and then decoded with
bench.py, whose texts no choice was made on.
"""

import statistics
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from budget import Budget, step_seconds
from cli import UserError, choose_device, option, parse, run, write_json
from draft_head import HeadConfig, build_head
from features import HEATS, measure_acceptance
from head_training import HeadTraining
from model import load_checkpoint, load_target
from recipe import PRESETS, PRETRAINED, TrainConfig, head_settings
from report import JUDGED, ablation_table, plot_cells, plot_games, read_log
from runs import find_run
from stage import check_same, keep_freed_memory
from train import Lessons, choose_autocast, read_text, train_head
from tree import chain, expected_length

ORIGINAL = dict(layers=1, adversarial_weight=0.0)
SUPERVISED = dict(adversarial_weight=0.0)  # the recipe's head without its discriminator
OWN = dict(own_steps=3, own_from=0.6, supervised_share=0.6)
# How not to play: a D that leaps, and is listened to more than the target is.
UNBALANCED = dict(discriminator_lr=0.05, adversarial_weight=10.0)
# What each cell changes of the recipe's KOALA head: K = 2, lambda = 0.1, a learnt judge of tokens.
CELLS = {
    "medusa-original": ORIGINAL,
    "medusa-k2": SUPERVISED,
    "medusa-k3": SUPERVISED | dict(layers=3),
    "medusa-koala": {},
    "medusa-exact": dict(discriminator="exact"),
    "medusa-lk": SUPERVISED | dict(supervised="lk"),
    "eagle-original": ORIGINAL,
    "eagle-wide": ORIGINAL,  # as many parameters as two layers: see `settings_of`
    "eagle-k2": SUPERVISED,
    "eagle-k3": SUPERVISED | dict(layers=3),
    "eagle-koala": {},
    "eagle-lambda-0.03": dict(adversarial_weight=0.03),
    "eagle-lambda-0.3": dict(adversarial_weight=0.3),
    "eagle-unbalanced": UNBALANCED,
    "eagle-exact": dict(discriminator="exact"),
    "eagle-lk": SUPERVISED | dict(supervised="lk"),
    "eagle-own-original": ORIGINAL | OWN,
    "eagle-own-k2": SUPERVISED | OWN,
    "eagle-own-nofeature": SUPERVISED | OWN | dict(feature_weight=0.0),
    "eagle-own-koala": OWN,
    "eagle-own-window": OWN | dict(discriminator="window"),
}
# What a cell is compared with, where that is not the two layers alone.
CONTROLS = dict.fromkeys(["original", "wide", "k2", "k3", "own-original"], "original")
CONTROLS |= dict.fromkeys(["own-nofeature", "own-koala", "own-window"], "own-k2")
GAMES = "eagle-koala", "eagle-unbalanced"  # a healthy one and one that is not, side by side
# Half the width of a 95 % interval of a mean, in standard errors, by the number of values (Student).
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
RATIOS = ("tau_estimate", "tau_sampled", "tau_tuned")  # that cells are compared by


@dataclass(frozen=True)
class AblationConfig:
    out_dir: str | None = option(None, "the run's folder; default: the newest under out/")
    preset: str = option("cpu", "what heads were trained by in that run", choices=[*PRESETS])
    cells: list[str] | None = option(None, f"of {', '.join(CELLS)}; default: all", nargs="+")
    seeds: list[int] | None = option(
        None,
        "of weights, batches and noise: a head of each, and a table of these alone; default: the "
        "run's, and a table of all",
        nargs="+",
    )
    head_tokens: int | None = option(None, "tokens the recipe's head trains on; default: its own")
    head_data_tokens: int | None = option(
        None, "tokens whose hidden states the heads learn from; default: the recipe's"
    )
    equal: str = option("tokens", "what cells have in common", choices=["tokens", "seconds"])
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to compute in", choices=["auto", "float32", "bfloat16"])

    def __post_init__(self):
        unknown = sorted(set(self.cells or ()) - set(CELLS))
        if unknown:
            raise UserError(f"unknown cell {unknown[0]!r}: choose from {', '.join(CELLS)}")


def recipe_of(config: AblationConfig, folder: Path, checkpoint: dict) -> TrainConfig:
    """The run's settings: of its target as that remembers them, of its heads as the preset says.

    Raises UserError beside a pretrained target, whose heads had minutes, without --head_tokens.
    """
    known = checkpoint["training"]["settings"]
    if "source" in known:
        # What that target has written by now is what there is to learn from.
        values = PRETRAINED | {"target": known["source"], "minutes": None, "written_tokens": 1}
        values |= {"preset": "pretrained", "context": known["context"]}
        if config.head_tokens is None:
            raise UserError("--head_tokens is needed beside a pretrained target")
    else:
        names = {field.name for field in fields(TrainConfig)}
        values = PRESETS[config.preset] | {k: v for k, v in known.items() if k in names}
        values |= {"preset": config.preset}
    given = {"head_tokens": config.head_tokens, "head_data_tokens": config.head_data_tokens}
    values |= {name: value for name, value in given.items() if value is not None}
    return TrainConfig(**values, out_dir=str(folder), device=config.device, dtype=config.dtype)


def settings_of(recipe: TrainConfig, cell: str, seed: int, target) -> TrainConfig:
    """The configuration of one head; its files are beside the run's, in ablation/."""
    flags = dict(layers=2, adversarial_weight=recipe.koala_weight) | CELLS[cell]
    if cell == "eagle-wide":
        one, two = (build_head(HeadConfig("eagle", k), target) for k in (1, 2))
        more = sum(w.numel() for w in two.parameters()) - sum(w.numel() for w in one.parameters())
        width = target.config.width
        flags["head_mlp_width"] = target.config.mlp_width + round(more / (3 * width))
    folder = str(recipe.folder / "ablation")
    one = replace(recipe, **flags, head=f"{cell}-seed{seed}", seed=seed, out_dir=folder)
    return one.of_head(cell)


# -------------------------------------------------------------------------------- the result


def judged(folder: Path, name: str) -> dict[str, float]:
    """The last figures of the discriminator, from the head's log; none where it had none."""
    log = read_log(folder / f"{name}.csv")
    return {key: log[key][1][-1] for key in JUDGED if log.get(key)}


def figures(record: dict, folder: Path) -> dict:
    """What is kept of one head.

    `tau_sampled`: the acceptance length at temperature 1, as `tau_estimate` is the greedy one's.
    `tau_tuned`: the same with q at the best temperature of HEATS, `heat`. A loss that does no more
    than make q sharper or flatter gains nothing of that.
    """
    valid = record["valid"]
    kept = {key: value for key, value in valid.items() if isinstance(value, float)}
    # The rates of a chain: one guess at each position.
    heated = [[[alpha] for alpha in alphas] for alphas in valid["heated"]]
    lengths = [expected_length(rates, chain(len(rates))) for rates in heated]
    kept["tau_sampled"] = lengths[HEATS.index(1.0)]
    kept["tau_tuned"], kept["heat"] = max(zip(lengths, HEATS))
    shape = {key: record[key] for key in ("parameters", "seconds", "kept_step")}
    tokens = record["settings"]["head_tokens"]
    return kept | shape | {"head_tokens": tokens} | judged(folder, record["name"])


def collect(folder: Path, equal: str, target_print: str, seeds: list[int] | None = None) -> dict:
    """results[cell][seed] of the heads trained so far, of these seeds; None: of all.

    Raises UserError for a head of another target.
    """
    results, end = {}, "-seconds" if equal == "seconds" else ""
    for cell in CELLS:
        for path in sorted(folder.glob(f"{cell}-seed*{end}.pt")):
            seed = path.stem.removeprefix(f"{cell}-seed").removesuffix(end)
            # Not a head that is still being trained, nor one of equal seconds.
            if seed.isdigit() and (seeds is None or int(seed) in seeds):
                head = load_checkpoint(path, "draft head")
                if head["target"] != target_print:
                    raise UserError(f"{path} was trained for another target: remove it")
                results.setdefault(cell, {})[int(seed)] = figures(head["training"], folder)
    return results


def interval(values: list[float]) -> list[float]:
    """The mean and half the width of its 95 % interval (Student's t); of one value no width."""
    mean = statistics.mean(values)
    if len(values) == 1:
        return [mean]
    error = statistics.stdev(values) / len(values) ** 0.5
    return [mean, STUDENT.get(len(values), STUDENT[10]) * error]


def control_of(cell: str) -> str:
    """The cell that this one is compared with: it lacks one ingredient."""
    kind, name = cell.split("-", 1)
    return f"{kind}-{CONTROLS.get(name, 'k2')}"


def compared(results: dict) -> dict:
    """results[cell][seed] -> of each cell its heads, what it is compared with, and the ratios to
    that: mean and half of its interval over the seeds that both were trained with."""
    cells = {}
    for cell, heads in results.items():
        other, row = control_of(cell), {"heads": heads, "against": None, "ratios": {}}
        seeds = sorted(heads.keys() & results.get(other, {}).keys())
        if seeds and other != cell:
            row["against"] = other
            for key in RATIOS:
                pairs = [(heads[s][key], results[other][s][key]) for s in seeds]
                row["ratios"][key] = interval([ours / theirs for ours, theirs in pairs])
        cells[cell] = row
    return cells


# -------------------------------------------------------------------------------------- main


def main() -> None:
    config = parse(AblationConfig)
    run_folder, device = find_run(config.out_dir), choose_device(config.device)
    target, checkpoint = load_target(run_folder / "target.pt", device)
    recipe = recipe_of(config, run_folder, checkpoint)
    autocast = choose_autocast(recipe, device)
    keep_freed_memory()
    text = None
    if recipe.needs_text:
        text = read_text(recipe)
        known = checkpoint["training"]["settings"]
        check_same(run_folder / "target.pt", known, {"text": text.description["hash"]})
        text.use(checkpoint["tokenizer"])
    budget = Budget(recipe, lambda rounds: False)
    lessons = Lessons(recipe, target, checkpoint, text, budget, autocast)
    folder = recipe.folder / "ablation"
    folder.mkdir(exist_ok=True)
    seconds = {}  # of each cell: of a step, and once

    def as_long(cell: str, one: TrainConfig) -> int:
        """Tokens for this cell, so that it takes as long as the recipe's head of its kind, whose
        steps of D alone count as well."""
        train, valid = lessons.of(cell)
        evaluate = partial(measure_acceptance, target, features=valid, count=64)
        base = f"{cell.split('-')[0]}-koala"
        for name in (cell, base):
            if name not in seconds:
                settings = settings_of(recipe, name, 0, target)
                training = HeadTraining(settings, settings.head, target, autocast)
                seconds[name] = step_seconds(training, train, evaluate)
        theirs, ours = seconds[base], seconds[cell]
        steps = recipe.head_tokens / one.head_tokens_per_step
        steps = (steps * theirs.step + theirs.once - ours.once) / ours.step
        return round(steps * one.head_tokens_per_step)

    for cell in config.cells or CELLS:
        for seed in config.seeds or [recipe.seed]:
            one = settings_of(recipe, cell, seed, target)
            if config.equal == "seconds":
                one = replace(one, head=f"{one.head}-seconds")
            path, before = folder / f"{one.head}.pt", None
            if path.is_file():
                before = load_checkpoint(path, "draft head")["training"]["settings"]
            if config.equal == "seconds":
                tokens = before["head_tokens"] if before else as_long(cell, one)
                one = replace(one, head_tokens=tokens)
            wanted = head_settings(one, one.head, checkpoint["fingerprint"])
            if before:
                check_same(path, before, wanted)
                print(f"{one.head}: trained already")
                continue
            train_head(one, one.head, target, wanted, *lessons.of(cell), autocast)
    cells = compared(collect(folder, config.equal, checkpoint["fingerprint"], config.seeds))
    result = {"target": checkpoint["fingerprint"], "equal": config.equal, "cells": cells}
    name, shown = f"ablation-{config.equal}", ablation_table(result)
    write_json(folder / f"{name}.json", result)
    (folder / f"{name}.md").write_text(shown + "\n")
    plot_cells(result, folder / f"{name}.png")
    logs = {cell: folder / f"{cell}-seed{recipe.seed}.csv" for cell in GAMES}
    if config.equal == "tokens" and all(path.is_file() for path in logs.values()):
        plot_games(logs, folder / "games.png")
    print(f"\nOn held-out text:\n\n{shown}\n\nwritten: {folder}/{name}.json, .md and .png")


if __name__ == "__main__":
    run(main)
