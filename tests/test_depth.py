"""Depth: a padded target is the same target, and the arithmetic of its table, by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from toys import tiny_head, tiny_target

from sampling import Sampler
from speculate import generate
from study import deeper, depth
from study.deeper import with_layers
from study.depth import ROUNDS, SIZES, beside, kept, padded, reckoned, replayed, tau_ratios, timed
from study.replay import PlainText
from study.report import crossovers
from study.statistics import DRAWS, combined, draw


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_padded_target_is_bit_for_bit_the_same(dtype):
    target = tiny_target(seed=2).to(dtype)
    deep = padded(target, 7)
    tokens = torch.arange(12)[None]
    assert len(deep.blocks) == 7 > len(target.blocks)
    assert deep(tokens).equal(target(tokens))
    assert deep.lm_head(deep(tokens)).equal(target.lm_head(target(tokens)))
    caches = [model.new_cache(12) for model in (deep, target)]
    states = [model(tokens[:, :9], cache) for model, cache in zip((deep, target), caches)]
    states += [model(tokens[:, 9:], cache) for model, cache in zip((deep, target), caches)]
    assert states[0].equal(states[1]) and states[2].equal(states[3])
    assert states[2].dtype == dtype and caches[0].keys.shape[0] == 7


def test_a_head_decodes_alike_beside_a_padded_target():
    target = tiny_target(seed=2)
    head, deep = tiny_head("eagle", 2, target, steps=40), padded(target, 5)
    request = dict(gamma=3, temperature=1.0, seed=1)
    ours = generate(deep, [1, 2], 20, head=beside(head, deep), **request)
    theirs = generate(target, [1, 2], 20, head=head, **request)
    assert ours.tokens == theirs.tokens and ours.produced == theirs.produced


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_head_is_replayed_alike_beside_a_padded_target(temperature):
    target = tiny_target(seed=2)
    head, deep, counts = tiny_head("eagle", 2, target, steps=40), padded(target, 5), []
    new = generate(target, [1, 2], 18, temperature=temperature).tokens
    for model, its in ((target, head), (deep, beside(head, deep))):
        sampler = Sampler(torch.device("cpu"), temperature, seed=0)
        text = PlainText.read(model, [1, 2], new, 18, sampler)
        counts.append(replayed(its, model, [text], sampler))
    assert counts[0] == counts[1] and np.array(counts).shape == (2, 1, len(SIZES), 2)


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


def times_of(texts: int) -> np.ndarray:
    samples = [{"conversation": number} for number in range(texts)]
    return draw(samples, np.ones(texts, dtype=bool), seed=0)


def test_a_cycles_cost_is_the_targets_pass_and_the_heads_draft(monkeypatch):
    """The pass is the median of what all heads' rounds say of it; the heads take turns to begin."""
    asked = []

    def costs(target, head, sizes, temperature, length):
        asked.append((head, temperature, length))
        passes = {n: 1 + 0.1 * n * (head + 1) for n in (1, 2, 4, 8, 16, 32)}
        return passes, {(g, n > 0): 0.5 * g * (head + 1) for g, n, _ in sizes}

    monkeypatch.setattr(depth, "size_costs", costs)
    for number in range(3):
        found = timed(None, {"1": 0, "2": 1, "3": 2}, 1.0, 77, number)
        assert [*found] == ["1", "2", "3"]
        for k, row in found.items():
            for (gamma, nodes), (verify, draft) in zip(SIZES, row, strict=True):
                assert verify == pytest.approx(1 + 0.2 * ((nodes or gamma) + 1))
                assert draft == pytest.approx(0.5 * gamma * int(k))
    assert [head for head, *_ in asked] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert {(temperature, length) for _, temperature, length in asked} == {(1.0, 77)}


def test_what_was_made_under_other_settings_is_made_again(tmp_path):
    made = []

    def make(value):
        made.append(value)
        return [value]

    path = tmp_path / "new" / "it.json"
    assert kept(path, {"size": (1, 2)}, make, 1) == [1] == kept(path, {"size": (1, 2)}, make, 2)
    assert kept(path, {"size": (1, 3)}, make, 3) == [3] == kept(path, {"size": (1, 3)}, make, 4)
    assert made == [1, 3]


def test_each_k_takes_its_own_size_by_validation_and_is_judged_by_test_texts():
    """A chain of g writes 1 + g a tokens, a = 0.5 for one layer, 0.6 for two; trees write one."""
    tau = {k: [1 + a * g if n == 0 else 1.0 for g, n in SIZES] for k, a in (("1", 0.5), ("2", 0.6))}
    valid = {k: counts_of(row) for k, row in tau.items()}
    test = {k: counts_of([t + 0.1 for t in row]) for k, row in tau.items()}
    costs = {"1": costs_of(0.05, 0.1), "2": costs_of(0.05, 0.5)}
    rows = reckoned(valid, test, costs, 0.0, times_of(3))
    # One layer: (1 + 0.5 g) / (1 + 0.15 g) rises to a chain of 10; two: / (1 + 0.55 g), from 1 on.
    assert rows["1"]["size"] == [10, 0] == rows["2"]["size"]
    assert rows["1"]["speed"] == pytest.approx(6.1 / 2.5) and rows["1"]["net"] == 1.0
    assert rows["2"]["speed"] == pytest.approx(7.1 / 6.5)
    assert rows["2"]["net"] == pytest.approx((7.1 / 6.5) / (6.1 / 2.5))
    assert rows["2"]["net_interval"] == pytest.approx([rows["2"]["net"]] * 2)
    # With 0.3 more a step two layers earn nothing by a longer chain: (1 + 0.6 g) / (1 + 0.85 g).
    rows = reckoned(valid, test, costs, 0.3, times_of(3))
    assert rows["2"]["size"] == [1, 0] and rows["1"]["size"] == [10, 0]
    assert rows["2"]["speed"] == pytest.approx(1.7 / (1.55 + 0.3))
    assert rows["2"]["net"] == pytest.approx((1.7 / 1.85) / (6.1 / (2.5 + 3.0)))
    assert rows["2"]["net_interval"] == pytest.approx([rows["2"]["net"]] * 2)


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
        valid = {k: counts_of(flat) for k in ("1", "2")}
        rows = reckoned(valid, test, costs, 0.0, times_of(3))
        low, high = rows["2"]["net_interval"]
        assert low < 0.99 * rows["2"]["net"] and high > 1.01 * rows["2"]["net"], what
        ratio, low, high = tau_ratios(test, times_of(3))["2"][0]
        assert ratio == pytest.approx(1.0)
        assert (high - low > 0.1) == (what != "timings")
        # Both vary alike: they are compared on the same seeds, texts and rounds.
        test["1"], costs["1"] = test["2"], costs["2"]
        rows = reckoned(valid, test, costs, 0.0, times_of(3))
        assert rows["2"]["net_interval"] == pytest.approx([1.0, 1.0])
        assert rows["2"]["speed_interval"][1] > 1.01 * rows["2"]["speed"]
        assert tau_ratios(test, times_of(3))["2"][0] == pytest.approx([1.0, 1.0, 1.0])


def test_the_turns_of_a_conversation_are_drawn_together():
    """Two texts of one conversation that vary alike are worth one; apart they are worth two."""
    test = {k: counts_of([2.0] * len(SIZES), texts=4) for k in ("1", "2")}
    test["2"][..., 0] *= np.array([0.8, 0.8, 1.2, 1.2]).reshape(1, 4, 1)
    widths = []
    for conversations in ([0, 1, 2, 3], [0, 0, 1, 1]):
        samples = [{"conversation": number} for number in conversations]
        _, low, high = tau_ratios(test, draw(samples, np.ones(4, dtype=bool), 0))["2"][0]
        widths.append(np.log(high / low))
    assert widths[1] == pytest.approx(2**0.5 * widths[0], rel=0.1)


def test_an_interval_of_two_sources():
    """Of five seeds Student's, 2.78 standard errors; of texts 1.96 standard deviations."""
    logs = np.array([-0.2, -0.1, 0.0, 0.1, 0.2])
    redrawn = np.exp(np.random.default_rng(0).normal(0, 0.1, DRAWS))
    seeds, texts = 2.78 * logs.std(ddof=1) / 5**0.5, 1.96 * np.log(redrawn).std()
    low, high = combined(3.0, redrawn, np.exp(logs))
    assert np.log([3 / low, high / 3]) == pytest.approx(np.hypot(seeds, texts))
    low, high = combined(3.0, redrawn, np.exp(logs[:1]))  # of one seed nothing is known
    assert np.log([3 / low, high / 3]) == pytest.approx(texts)


def test_where_a_second_layer_pays_is_told_and_whether_that_target_is_padded():
    bounds = {16: (0.8, 0.9), 32: (0.9, 1.1), 64: (1.1, 1.2)}
    table = [
        {"kind": "greedy", "more": 0.0, "depth": depth, "heads": {"2": {"net_interval": interval}}}
        for depth, interval in bounds.items()
    ]
    told = "- Two layers, greedy: slower than one at 16; undecided at 32; faster at 64 layers"
    assert crossovers({"layers": 16, "table": table}) == [f"{told} (16 of its own)."]
    told = "- Two layers, greedy: undecided at 32 layers."
    assert crossovers({"layers": 32, "table": table[1:2]}) == [told]


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
    order, costs_of_a_round = [], depth.timed

    def timed(target, heads, temperature, length, number):
        order.append((number, len(target.blocks), temperature))
        return costs_of_a_round(target, heads, temperature, length, number)

    monkeypatch.setattr(depth, "timed", timed)
    status, out, err = call(depth.main, *argv)
    assert status == 0, err
    folder = run / "depth"
    result = json.loads((folder / "depth.json").read_text())
    bits, real = result["bits"], result["real"]
    assert list(real) == (["1", "2"] if bits["twice"] < bits["own, trained on"] else ["1"])
    assert np.array(real["1"]["counts"]["greedy-test"]["3"]).shape[0] == 2
    seeds, texts, *rest = np.array(result["counts"]["greedy-test"]["2"]).shape
    assert (seeds, rest) == (2, [3, 2]) and texts >= 2
    costs = {(row["kind"], row["depth"]): row["cycles"] for row in result["costs"]}
    assert [*costs] == [("greedy", 3), ("sampled", 3), ("greedy", 5), ("sampled", 5)]
    each = [(depth, temperature) for depth in (3, 5) for temperature in (0.0, 1.0)]
    assert order[:8] == [(number, *which) for number in (0, 1) for which in each]
    assert np.array(costs["greedy", 5]["3"]).shape == (2, 3, 2)
    check = result["decoded"]["5"]["1"]
    assert len(check["seconds"]) == 1 and 1 <= check["tau"] <= 4
    whole = [row for row in result["table"] if "task" not in row]
    row = next(row for row in whole if (row["kind"], row["depth"]) == ("greedy", 5))
    costs = row["heads"]["1"]["verify"] + row["heads"]["1"]["draft"]
    assert check["predicted"] == pytest.approx(check["tau"] / costs)
    assert len(whole) == 2 * 3 * 2
    for part in (result, *real.values()):  # anyone can redo the figures
        again = json.loads(json.dumps(depth.tabled(part)))
        assert again == {key: part[key] for key in ("tau_ratios", "table")}
    assert {row["depth"] for row in real["1"]["costs"]} == {1, 3, 5}  # padded likewise
    assert out.count("Two layers, ") == 2 * 3 * (1 + len(real)) and "twice, lower half alone" in out
    rows = out.split("speed, 0.3 more a draft step |\n")[1].splitlines()[1:13]
    assert [row.split(" | ")[2] for row in rows] == ["1", "2", "3", "wide"] * 3
    assert (folder / "depth.png").stat().st_size > 10_000
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    status, out, err = call(depth.main, *argv)
    assert status == 0 and out.count("trained already") == 8 + 6 * len(real)
    changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"depth.json", "depth.png"}
    # What an interrupt left out is made, of what there is; other texts are replayed anew.
    (folder / "taus-eagle-k2-seed1-sampled-test.json").unlink()
    assert call(depth.main, *argv)[0] == 0 and all(path.is_file() for path in before)
    assert call(depth.main, *argv[:-8], "12", *argv[-7:])[0] == 0
    names = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert "taus-eagle-k2-seed0-greedy-test.json" in names and "eagle-k2-seed0.pt" not in names
    # Heads of one seed that learnt in different dtypes are no pair.
    one = folder / "eagle-k2-seed1.pt"
    head = torch.load(one, weights_only=True)
    dtypes = {"torch.float32": "torch.bfloat16", "torch.bfloat16": "torch.float32"}
    head["training"]["dtype"] = dtypes[head["training"]["dtype"]]  # of what this machine chose
    torch.save(head, one)
    status, _, err = call(depth.main, *argv)
    assert status == 2 and "seed 1" in err and "bfloat16 and torch.float32" in err
