"""An ablation compares heads that differ in what its table says, and in nothing else."""

import json
import math
import shutil

import pytest
import torch

import ablation
from ablation import (
    CELLS,
    GAMES,
    STUDENT,
    AblationConfig,
    control_of,
    interval,
    recipe_of,
    settings_of,
)
from budget import Seconds
from cli import UserError
from features import HEATS
from head_training import HeadTraining
from model import load_checkpoint, load_target, save_checkpoint
from recipe import head_settings
from stage import Autocast


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A run of its own for each test: it has the target, which is all that an ablation takes."""
    return shutil.copy(tiny_run.folder / "target.pt", tmp_path / "target.pt").parent


@pytest.fixture
def recipe(folder):
    target, checkpoint = load_target(folder / "target.pt")
    config = AblationConfig(preset="smoke", head_tokens=512, head_data_tokens=4000)
    return target, recipe_of(config, folder, checkpoint)


def test_the_recipe_is_that_of_the_run(recipe, folder, tiny_run):
    _, config = recipe
    assert (config.width, config.context, config.data) == (32, 32, [str(tiny_run.data)])
    assert config.head_tokens == 512 and config.folder == folder


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_can_be_trained_and_differs_from_the_others(cell, recipe):
    target, config = recipe
    one = settings_of(config, cell, 3, target)
    assert one.seed == 3 and one.folder == config.folder / "ablation"
    training = HeadTraining(one, one.head, target, Autocast(torch.device("cpu"), torch.float32))
    assert (training.discriminator is None) == (
        one.adversarial_weight == 0 or one.discriminator == "exact"
    )
    wanted = head_settings(one, one.head, "t")
    for other in set(CELLS) - {cell}:
        if other.split("-")[0] == cell.split("-")[0]:
            others = settings_of(config, other, 3, target)
            assert head_settings(others, others.head, "t") != wanted, other


def test_the_wide_head_is_as_large_as_two_layers(recipe):
    target, config = recipe
    sizes = {}
    for cell in ("eagle-original", "eagle-wide", "eagle-k2"):
        one = settings_of(config, cell, 0, target)
        training = HeadTraining(one, one.head, target, Autocast(torch.device("cpu"), torch.float32))
        sizes[cell] = sum(w.numel() for w in training.head.parameters())
    assert sizes["eagle-wide"] == pytest.approx(sizes["eagle-k2"], rel=0.01)
    assert sizes["eagle-original"] < 0.8 * sizes["eagle-k2"]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_compared_with_one_that_differs_in_one_ingredient(cell):
    other = control_of(cell)
    assert other in CELLS and other.split("-")[0] == cell.split("-")[0]
    if cell.endswith(("koala", "exact", "window", "unbalanced", "0.03", "0.3")):
        of_d = ("adversarial_weight", "discriminator", "discriminator_lr")  # and nothing else
        flags, others = (
            {k: v for k, v in CELLS[c].items() if k not in of_d} for c in (cell, other)
        )
        assert flags == others and CELLS[other]["adversarial_weight"] == 0


def test_an_interval_is_students():
    mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-3)
    assert interval([1.0]) == [1.0] and STUDENT[2] == pytest.approx(12.706, rel=1e-3)


def test_cells_are_trained_once_and_pairs_of_seeds_compared(call, folder):
    flags = ["--out_dir", folder, "--preset", "smoke", "--device", "cpu"]
    flags += ["--dtype", "float32", "--head_tokens", "512", "--head_data_tokens", "4000"]
    flags += ["--cells", "eagle-k2", "eagle-koala", "--seeds"]
    status, out, err = call(ablation.main, *flags, "0", "1")
    assert status == 0, err
    folder = folder / "ablation"
    rows = json.loads((folder / "ablation-tokens.json").read_text())["cells"]
    cells = {cell: row["heads"] for cell, row in rows.items()}
    assert {c: set(seeds) for c, seeds in cells.items()} == {
        "eagle-k2": {"0", "1"},
        "eagle-koala": {"0", "1"},
    }
    assert cells["eagle-koala"]["0"] != cells["eagle-koala"]["1"]
    ratios = [
        cells["eagle-koala"][s]["tau_estimate"] / cells["eagle-k2"][s]["tau_estimate"] for s in "01"
    ]
    mean, half = interval(ratios)
    assert (
        f"| eagle-k2 | {mean:.4f} ± {half:.4f} |" in out
        and (folder / "ablation-tokens.png").is_file()
    )
    for seed in "01":
        row = cells["eagle-koala"][seed]
        alphas = [row[f"alpha_{i}"] for i in range(1, 5)]
        assert row["tau_sampled"] == pytest.approx(
            1 + sum(math.prod(alphas[:i]) for i in (1, 2, 3, 4))
        )
        assert row["tau_tuned"] >= row["tau_sampled"] and row["heat"] in HEATS
    before = {path: path.read_bytes() for path in folder.glob("*.pt")}
    status, out, err = call(ablation.main, *flags, "1")
    assert status == 0 and out.count("trained already") == 2
    assert "± " not in out and f"| {ratios[1]:.4f} |" in out  # of this pair alone
    status, out, err = call(ablation.main, *flags[:-1])
    assert status == 0 and f"{mean:.4f} ± {half:.4f}" in out  # nothing is forgotten
    assert before == {path: path.read_bytes() for path in folder.glob("*.pt")}
    status, _, err = call(ablation.main, *flags[:-3], "eagle-k2", "--head_tokens", "768")
    assert status == 2 and "head_tokens 512" in err


def test_two_games_are_drawn_side_by_side(call, folder):
    flags = ["--out_dir", folder, "--preset", "smoke", "--device", "cpu", "--dtype", "float32"]
    flags += ["--head_tokens", "4096", "--head_data_tokens", "4000", "--cells"]
    picture = folder / "ablation/games.png"
    assert call(ablation.main, *flags, GAMES[0])[0] == 0 and not picture.exists()
    assert call(ablation.main, *flags, GAMES[1])[0] == 0 and picture.is_file()


def test_a_judge_of_runs_is_never_shown_shorter_ones(call, folder):
    """Where own steps and the game begin together, they do so with the same step."""
    flags = ["--out_dir", folder, "--preset", "smoke", "--device", "cpu", "--dtype", "float32"]
    flags += ["--head_data_tokens", "4000", "--cells", "eagle-own-window"]
    for tokens in (31 * 256, 32 * 256):  # 0.6 of 31 steps is no whole number
        status, _, err = call(ablation.main, *flags, "--head_tokens", tokens, "--seeds", tokens)
        assert status == 0, err


def test_for_equal_seconds_a_cell_learns_as_long_as_the_recipes_head(call, folder, monkeypatch):
    # Of the cell, and of the recipe's head, which takes a second longer for D alone.
    costs = iter([Seconds(step=2.0, once=1.0), Seconds(step=1.0, once=2.0)])
    monkeypatch.setattr("ablation.step_seconds", lambda *_: next(costs))
    flags = ["--out_dir", folder, "--preset", "smoke", "--device", "cpu"]
    flags += ["--dtype", "float32", "--head_tokens", "2048", "--head_data_tokens", "4000"]
    status, _, err = call(ablation.main, *flags, "--cells", "eagle-k3", "--equal", "seconds")
    assert status == 0, err
    head = load_checkpoint(folder / "ablation/eagle-k3-seed0-seconds.pt", "draft head")
    settings = head["training"]["settings"]
    steps = 2048 / settings["batch_tokens"]  # of the recipe's head, a second each, and one more
    assert settings["head_tokens"] == (steps + 1) / 2 * settings["batch_tokens"]
    status, out, _ = call(ablation.main, *flags, "--cells", "eagle-k3", "--equal", "seconds")
    assert status == 0 and "trained already" in out  # and not measured anew


def test_heads_of_another_target_are_refused(tmp_path):
    head = {"kind": "draft head", "target": "old"}
    save_checkpoint(tmp_path / "eagle-k2-seed0.pt", head)
    with pytest.raises(UserError, match="another target"):
        ablation.collect(tmp_path, "tokens", "new")
    assert ablation.collect(tmp_path, "seconds", "new") == {}


def test_an_unknown_cell_is_refused():
    with pytest.raises(UserError, match="eagle-nonsense"):
        AblationConfig(cells=["eagle-nonsense"])
