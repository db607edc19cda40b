"""Depth: a padded target is the same target, and the arithmetic of its table, by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from toys import tiny_head, tiny_target

from speculate import generate
from study import deeper, depth
from study.deeper import with_layers
from study.depth import ROUNDS, SIZES, beside, padded, reckoned, tau_ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_padded_target_is_bit_for_bit_the_same(dtype):
    target = tiny_target(seed=2).to(dtype)
    deep = padded(target, 7)
    tokens = torch.arange(12)[None]
    assert len(deep.blocks) == 7 > len(target.blocks)
    assert deep(tokens).equal(target(tokens))
    assert deep.lm_head(deep(tokens)).equal(target.lm_head(target(tokens)))
    cache = deep.new_cache(12)
    deep(tokens[:, :9], cache)
    assert deep(tokens[:, 9:], cache).dtype == dtype and cache.keys.shape[0] == 7


def test_a_head_decodes_alike_beside_a_padded_target():
    target = tiny_target(seed=2)
    head, deep = tiny_head("eagle", 2, target, steps=40), padded(target, 5)
    request = dict(gamma=3, temperature=1.0, seed=1)
    ours = generate(deep, [1, 2], 20, head=beside(head, deep), **request)
    theirs = generate(target, [1, 2], 20, head=head, **request)
    assert ours.tokens == theirs.tokens and ours.produced == theirs.produced


def test_layers_are_stacked_in_order_and_taken_away_again():
    target = tiny_target(seed=2).float()
    tokens = torch.arange(12)[None]
    twice = with_layers(target, [0, 1, 0, 1])
    assert with_layers(target, [0, 1])(tokens).equal(target(tokens))
    assert with_layers(twice, [0, 1])(tokens).equal(target(tokens))
    target.blocks = torch.nn.ModuleList([*target.blocks, *target.blocks])
    target.config = twice.config
    assert twice(tokens).equal(target(tokens))
    assert all(weight.requires_grad for weight in twice.parameters())


def counts_of(tau: list[float], seeds: int = 2, texts: int = 3) -> np.ndarray:
    """(seeds, texts, sizes, 2): every text 10 cycles, tau that of each size."""
    row = np.array([[10 * t, 10] for t in tau], dtype=float)
    return np.broadcast_to(row, (seeds, texts, *row.shape)).copy()


def costs_of(verify: float, draft: float) -> np.ndarray:
    """(rounds, sizes, 2): each drafted token costs so much."""
    row = np.array([[1.0 + verify * (n or g), draft * g] for g, n in SIZES])
    return np.broadcast_to(row, (ROUNDS, *row.shape)).copy()


def test_each_k_takes_its_own_size_by_validation_and_is_judged_by_test_texts():
    """A chain of g writes 1 + g a tokens, a = 0.5 for one layer, 0.6 for two; trees write one."""
    tau = {k: [1 + a * g if n == 0 else 1.0 for g, n in SIZES] for k, a in (("1", 0.5), ("2", 0.6))}
    valid = {k: counts_of(row) for k, row in tau.items()}
    test = {k: counts_of([t + 0.1 for t in row]) for k, row in tau.items()}
    costs = {"1": costs_of(0.05, 0.1), "2": costs_of(0.05, 0.5)}
    rows = reckoned(valid, test, costs, more=0.0)
    # One layer: (1 + 0.5 g) / (1 + 0.15 g) rises to a chain of 10; two: / (1 + 0.55 g), from 1 on.
    assert rows["1"]["size"] == (10, 0) and rows["2"]["size"] == (10, 0)
    assert rows["1"]["speed"] == pytest.approx(6.1 / 2.5) and rows["1"]["net"] == 1.0
    assert rows["2"]["speed"] == pytest.approx(7.1 / 6.5)
    assert rows["2"]["net"] == pytest.approx((7.1 / 6.5) / (6.1 / 2.5))
    assert rows["2"]["net_interval"] == pytest.approx([rows["2"]["net"]] * 2)
    # With 0.3 more a step two layers earn nothing by a longer chain: (1 + 0.6 g) / (1 + 0.85 g).
    assert reckoned(valid, test, costs, more=0.3)["2"]["size"] == (1, 0)


def test_intervals_hold_seeds_texts_and_timings():
    """Each alone widens the interval of the speed; of tau's ratio the first two."""
    flat = [2.0] * len(SIZES)
    for what in ("seeds", "texts", "timings"):
        test, costs = (
            {k: counts_of(flat) for k in ("1", "2")},
            {k: costs_of(0, 0) for k in ("1", "2")},
        )
        if what == "timings":
            costs["2"][::2] *= 1.2
        else:
            axis = np.array([0.8, 1.2]) if what == "seeds" else np.array([0.8, 1.0, 1.2])
            shape = (2, 1, 1) if what == "seeds" else (1, 3, 1)
            test["2"][..., 0] *= axis.reshape(shape)
        rows = reckoned({k: counts_of(flat) for k in ("1", "2")}, test, costs, 0.0)
        low, high = rows["2"]["net_interval"]
        assert low < 0.99 * rows["2"]["net"] or high > 1.01 * rows["2"]["net"], what
        ratio, low, high = tau_ratios(test)["2"][0]
        assert ratio == pytest.approx(1.0)
        assert (high - low > 0.1) == (what != "timings")


def test_less_than_its_own_layers_is_refused_before_anything_is_trained(tiny_run, tmp_path, call):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    status, _, err = call(depth.main, "--out_dir", str(run), "--depths", "0", "3")
    assert status == 2 and err.count("\n") == 1 and "1 layers of its own" in err
    assert not (run / "depth").exists()


@pytest.mark.slow
def test_one_command_measures_it_all_and_goes_on(tiny_run, tmp_path, call, monkeypatch):
    """On the tests' tiny run; the second time nothing is measured again."""
    monkeypatch.setattr("costs.SECONDS", 0.0)
    monkeypatch.setattr("study.sizes.is_loop", lambda tokens: False)
    monkeypatch.setattr("study.prompts.from_documents.__defaults__", (12,))
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    monkeypatch.setattr(depth, "SIZES", [(1, 0), (3, 0), (2, 3)])
    monkeypatch.setattr(depth, "ROUNDS", 2)
    monkeypatch.setattr(deeper, "ON_TOKENS", 2000)
    argv = ["--out_dir", str(run), "--seeds", "0", "1", "--head_tokens", "256"]
    argv += ["--test_texts", "2", "--valid_texts", "2", "--max_new_tokens", "16"]
    argv += ["--depths", "3", "5", "--check_texts", "1", "--dtype", "float32"]
    status, out, err = call(depth.main, *argv)
    assert status == 0, err
    folder = run / "depth"
    result = json.loads((folder / "depth.json").read_text())
    bits, real = result["bits"], result["real"]
    kept = bits["twice"] < bits["own, trained on"]
    assert list(real) == (["1", "2"] if kept else ["1"])
    assert np.array(real["1"]["counts"]["greedy-test"]["3"]).shape[0] == 2
    seeds, texts, *rest = np.array(result["counts"]["greedy-test"]["2"]).shape
    assert (seeds, rest) == (2, [3, 2]) and texts >= 2
    assert np.array(result["costs"]["5"]["3"]).shape == (2, 3, 2)
    assert result["decoded"]["5"]["1"]["speedup"] > 0
    assert len(result["table"]) == 2 * 3 * 2
    rows = out.split("speed, 0.3 more a draft step |\n")[1].splitlines()[1:13]
    assert [row.split(" | ")[2] for row in rows] == ["1", "2", "3", "wide"] * 3
    assert (folder / "depth.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    status, out, err = call(depth.main, *argv)
    assert status == 0 and out.count("trained already") == 8 + 6 * len(real)
    changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"depth.json", "depth.png"}
