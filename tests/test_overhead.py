"""What layers cost: each figure against a count of its own."""

import json
import shutil

import torch

from draft_head import HeadConfig, build_head
from study import overhead
from study.overhead import LAYERS, cache_bytes, step_seconds
from study.report import overhead_table
from targets.loading import load


def test_what_layers_cost_is_measured_in_one_command(tiny_run, tmp_path, call):
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    argv = ["--out_dir", run, "--steps", 1, "--device", "cpu", "--dtype", "float32"]
    status, out, err = call(overhead.main, *argv)
    assert (status, err) == (0, "")
    result = json.loads((run / "overhead.json").read_text())
    rows = {(row["kind"], row["layers"]): row for row in result["overhead"]}
    assert len(rows) == 2 * len(LAYERS)
    target, head, _ = load(run, "eagle", "cpu", "float32")
    layer = sum(w.numel() for w in head.blocks.parameters())
    for layers in LAYERS:
        row = rows["eagle", layers]
        assert row["parameters"] == sum(w.numel() for w in head.parameters()) + (layers - 1) * layer
        shape = target.config.num_kv_heads * target.config.head_dim
        assert row["cache_bytes"] == layers * 2 * shape * 4
        cache = build_head(HeadConfig("eagle", layers), target).start(target.config.context).cache
        held = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values))
        assert row["held_bytes"] == 4 * row["parameters"] + held
        assert rows["medusa", layers]["cache_bytes"] == 0
        assert row["step"] > 0 and row["step_with_d"] > 0
    assert overhead_table(result) in out


def test_a_cache_takes_what_is_reckoned(tiny_run):
    target, _, _ = load(tiny_run.folder, None, "cpu", "float32")
    cache = target.new_cache(10)
    held = sum(t.numel() * t.element_size() for t in (cache.keys, cache.values))
    assert 10 * cache_bytes(target.config, target.config.num_layers, torch.float32) == held


def test_the_first_step_is_not_counted_and_all_take_turns(monkeypatch):
    calls, now = [], iter(range(0, 1000, 1))
    monkeypatch.setattr(overhead, "synchronized_time", lambda device: next(now))

    class Counted:
        def __init__(self, name):
            self.name = name

        def joint_step(self, batch, part, own_steps):
            calls.append((self.name, part))
            for _ in range(100 if len(calls) <= 2 else 2):
                next(now)

    trainings = {("eagle", 1, d): (Counted(d), None, 1) for d in (False, True)}
    seconds = step_seconds(trainings, 2, None)
    assert seconds == {("eagle", 1, False): 3, ("eagle", 1, True): 3}
    assert calls[:2] == [(False, "supervised"), (True, "joint")] and len(calls) == 6
