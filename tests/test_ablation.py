"""An ablation compares heads that differ in what its table says, and in nothing else."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from plumbing.cli import UserError
from plumbing.files import PARTS, load_checkpoint, save_checkpoint
from plumbing.machine import Autocast
from recipe import KOALA_WEIGHT, head_settings
from study import ablation
from study.ablation import (
    CELLS,
    GAMES,
    TEMPERATURES,
    AblationConfig,
    cell_config,
    control_of,
    recipe_of,
)
from study.statistics import STUDENT, student_interval
from targets.runs import load_target, settings_of
from train import HeadTraining, new_training

FLOAT32 = Autocast(torch.device("cpu"), torch.float32)


@pytest.fixture
def folder(tiny_run, tmp_path):
    """A run of its own for each test: the target, and the heads whose recipe is taken."""
    for path in tiny_run.folder.glob("*.pt"):
        shutil.copy(path, tmp_path)
    return tmp_path


@pytest.fixture
def recipe(folder):
    target, checkpoint = load_target(folder / "target.pt")
    config = AblationConfig(head_tokens=512, head_data_tokens=4000)
    return target, recipe_of(config, folder, settings_of(folder / "target.pt", checkpoint))


def test_the_recipe_is_that_of_the_run(recipe, folder, tiny_run):
    _, config = recipe
    assert (config.target_width, config.target_context, config.data) == (
        32,
        32,
        [str(tiny_run.data)],
    )
    assert config.head_tokens == 512 and config.folder == folder
    target, checkpoint = load_target(folder / "target.pt")
    known = settings_of(folder / "target.pt", checkpoint)
    config = recipe_of(AblationConfig(), folder, known)
    assert (config.head_tokens, config.head_data_tokens, config.written_tokens) == (
        8000,
        4000,
        4000,
    )
    assert (config.discriminator_steps, config.head_window, config.head_data) == (3, None, "auto")
    # What another head was trained with on purpose, or by its kind, is no recipe for all.
    for name, setting in (
        ("eagle-koala", {"discriminator": "exact"}),
        ("medusa", {"head_window": 16}),
    ):
        head = torch.load(folder / f"{name}.pt", weights_only=True)
        head["training"]["settings"] |= setting
        torch.save(head, folder / f"{name}.pt")
    for name in ("eagle", "eagle-koala"):
        (folder / f"{name}.pt").rename(folder / f"{name}.kept")
    assert recipe_of(AblationConfig(), folder, known).head_window is None
    for name in ("eagle", "eagle-koala"):
        (folder / f"{name}.kept").rename(folder / f"{name}.pt")
    assert recipe_of(AblationConfig(), folder, known) == config
    (folder / "eagle-koala.pt").unlink()  # Medusa's has all there is to know about D
    assert recipe_of(AblationConfig(), folder, known) == config


@pytest.mark.parametrize("context", ["target_context", "context"])
def test_the_recipe_beside_a_pretrained_target_is_its_presets(tmp_path, context):
    """In its own window, and with as much text as is written by now; of either edition."""
    known = {"source": "tiny.gguf", "sha256": "0", context: 1024}
    checkpoint = {"training": {"settings": known}}
    known = settings_of(tmp_path / "target.pt", checkpoint)
    config = recipe_of(AblationConfig(head_tokens=512), tmp_path, known)
    assert (config.preset, config.target, config.target_context) == (
        "pretrained",
        "tiny.gguf",
        1024,
    )
    assert (config.written_tokens, config.head_tokens, config.folder) == (1, 512, tmp_path)
    assert (config.own_steps, config.own_from) == (3, 0.85)


@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_can_be_trained_and_differs_from_the_others(cell, recipe):
    target, config = recipe
    one = cell_config(config, config.folder, cell, 3, target)
    assert one.seed == 3 and one.folder == config.folder
    training = new_training(one, one.head, target, FLOAT32)
    assert (training.discriminator is None) == (
        one.adversarial_weight == 0 or one.discriminator == "exact"
    )
    wanted = head_settings(one, one.head, "t")
    for other in set(CELLS) - {cell}:
        if other.split("-")[0] == cell.split("-")[0]:
            others = cell_config(config, config.folder, other, 3, target)
            assert head_settings(others, others.head, "t") != wanted, other


def test_the_wide_head_is_as_large_as_two_layers(recipe):
    target, config = recipe
    sizes = {}
    for cell in ("eagle-original", "eagle-wide", "eagle-k2"):
        one = cell_config(config, config.folder, cell, 0, target)
        training = new_training(one, one.head, target, FLOAT32)
        sizes[cell] = sum(w.numel() for w in training.head.parameters())
    assert sizes["eagle-wide"] == pytest.approx(sizes["eagle-k2"], rel=0.01)
    assert sizes["eagle-original"] < 0.8 * sizes["eagle-k2"]


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_compared_with_one_that_differs_in_one_ingredient(cell):
    other = control_of(cell)
    assert other in CELLS and other.split("-")[0] == cell.split("-")[0]
    if CELLS[cell].get("adversarial_weight", KOALA_WEIGHT) > 0:
        of_d = ("adversarial_weight", "discriminator", "discriminator_lr")  # and nothing else
        of_d += ("joint_from", "discriminator_steps")
        flags, others = (
            {k: v for k, v in CELLS[c].items() if k not in of_d} for c in (cell, other)
        )
        assert flags == others and CELLS[other]["adversarial_weight"] == 0


def test_an_interval_is_students():
    mean, half = student_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3 and half == pytest.approx(2.776 * math.sqrt(2.5 / 5), rel=2e-3)
    assert student_interval([1.0]) == [1.0] and STUDENT[2] == pytest.approx(12.706, rel=1e-3)


def test_cells_are_trained_once_and_pairs_of_seeds_compared(call, folder):
    flags = ["--out_dir", folder, "--device", "cpu"]
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
    mean, half = student_interval(ratios)
    assert f"| eagle-k2 | {mean:.4f} ± {half:.4f} |" in out
    assert (folder / "ablation-tokens.md").read_text().strip() in out
    for seed in "01":
        row = cells["eagle-koala"][seed]
        alphas = [row[f"alpha_{i}"] for i in range(1, 5)]
        assert row["tau_sampled"] == pytest.approx(
            1 + sum(math.prod(alphas[:i]) for i in (1, 2, 3, 4))
        )
        assert row["tau_tuned"] >= row["tau_sampled"] and row["heat"] in TEMPERATURES
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
    flags = ["--out_dir", folder, "--device", "cpu", "--dtype", "float32"]
    flags += ["--head_tokens", "4096", "--head_data_tokens", "4000", "--cells"]
    picture = folder / "ablation/games.png"
    assert call(ablation.main, *flags, GAMES[0])[0] == 0 and not picture.exists()
    assert call(ablation.main, *flags, GAMES[1])[0] == 0 and picture.is_file()


@pytest.mark.parametrize("steps, begun", [(31, 18), (32, 19)])  # 0.6 of them: no whole number
def test_own_steps_and_the_game_begin_with_the_same_step(call, folder, monkeypatch, steps, begun):
    """Else D would learn on shorter drafts than the head is trained on when it joins."""
    made, step = [], HeadTraining.joint_step

    def noted(training, batch, part, own_steps, *more):
        made.append((part, own_steps))
        return step(training, batch, part, own_steps, *more)

    monkeypatch.setattr(HeadTraining, "joint_step", noted)
    flags = ["--out_dir", folder, "--device", "cpu", "--dtype", "float32"]
    flags += ["--head_data_tokens", "4000", "--cells", "eagle-own-koala"]
    status, _, err = call(ablation.main, *flags, "--head_tokens", steps * 256)
    assert status == 0, err
    alone = [("D alone", 3)] * 3  # of the run's own heads
    assert made == [("supervised", 1)] * begun + alone + [("joint", 3)] * (steps - begun)


def test_heads_of_another_target_are_refused(tmp_path, recipe):
    target, _ = recipe
    head = dict.fromkeys(PARTS["draft head"]) | {"kind": "draft head", "target": "old"}
    save_checkpoint(tmp_path / "eagle-k2-seed0.pt", head)
    with pytest.raises(UserError, match="another target"):
        ablation.collect(tmp_path, "new", None)
    assert ablation.collect(tmp_path, "new", [1]) == {}


def test_only_finished_heads_are_counted_and_cells_that_are_gone_too(tmp_path):
    """Not one that is still in training, nor one of equal seconds, which the first edition made;
    but its other cells stay in the table, or the next ablation would forget what they found."""
    for name in ("eagle-k2-seed0.progress", "eagle-k2-seed0-seconds", "target"):
        (tmp_path / f"{name}.pt").write_bytes(b"not to be read")
    assert ablation.collect(tmp_path, "new", None) == {}
    folder = Path(__file__).parent / "first_edition"
    for name in ("eagle-own-window-seed0", "eagle-k2-seed0"):
        old = load_checkpoint(folder / "eagle.pt", "draft head")
        old["training"]["name"] = name
        save_checkpoint(tmp_path / f"{name}.pt", old)
        (tmp_path / f"{name}.csv").write_text("step,tokens\n1,256\n")
    found = ablation.collect(tmp_path, old["target"], None)
    assert list(found) == ["eagle-k2", "eagle-own-window"]
    assert control_of("eagle-own-window") == "eagle-own-k2"


def test_the_run_of_the_first_edition_can_be_ablated():
    """Its settings have other names: what is lost on the way would be that of the preset."""
    folder = Path(__file__).parent / "first_edition"
    target, checkpoint = load_target(folder / "target.pt")
    config = recipe_of(AblationConfig(), folder, settings_of(folder / "target.pt", checkpoint))
    assert (config.target_vocab, config.target_layers, config.target_heads) == (300, 1, 2)
    assert (config.target_width, config.target_context, config.target_mlp_width) == (16, 32, 16)
    assert (config.batch_tokens, config.target_tokens, config.data) == (256, 20000, ["text"])
    assert config.gpt() == target.config


def test_an_unknown_cell_is_refused():
    with pytest.raises(UserError, match="eagle-nonsense"):
        AblationConfig(cells=["eagle-nonsense"])
