"""Where K layers pay: the speed of heads with one, two and three layers, by the target's depth.

A draft layer costs a little less than 1/L of a pass of a target of L layers, and the second one
raises tau. So the deeper the target, the more layers should pay (KOALA's trade-off). But a target
of another depth is another target, with another tau. Here the two factors of the speed are measured
apart:

    speed(K, L) = tau(K) / (c_verify(L) + c_draft(K, L))

**tau** is that of the small target's own heads, several seeds of each K, replayed along greedy
texts and along sampled ones (study/replay.py), at every size of draft. **Costs** are those of this
target *padded*: layers whose output maps are zero add nothing to its residual stream, so that its
states, texts and taus stay bit-identical, and a pass takes as long as one of a target of that
depth. Each K has its own size of draft, the fastest on validation texts there; test texts judge.

A loop that spends more besides its layers makes a layer look cheap. So the table is reckoned again
with 0.1 and 0.3 plain steps more for each draft step, and every K chooses anew.

The interval holds seeds, texts and rounds of timing together: all are drawn anew (bootstrap).

Beside it stand one layer with the parameters of two (`wide`), and targets whose depth is real
(study/deeper.py), each with its own texts and heads.

`python -m study.depth` does it all, and goes on where it was interrupted: targets, heads, taus and
costs lie in the run's folder, under depth/.
"""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from costs import kind_of, reckon, size_costs
from draft_head import build_head
from drafts import plan_draft
from model import GPT
from plumbing.cli import UserError, option, parse, run
from plumbing.files import write_json
from plumbing.machine import describe_device, keep_heap, origin
from speculate import generate
from study.ablation import AblationConfig, train_cells
from study.deeper import real_targets
from study.plots import plot_depth
from study.replay import Follower, PlainText, replay
from study.report import depth_table
from study.sizes import Texts, plain_texts
from study.statistics import DRAWS, percentiles
from targets.loading import WHICH_RUN, find_run, load, results_folder, target_file
from targets.runs import load_head, load_target, settings_of

CELLS = {"1": "eagle-original", "2": "eagle-k2", "3": "eagle-k3"}  # by K
WIDE = {"wide": "eagle-wide"}
CHAINS = [(gamma, 0) for gamma in range(1, 11)]
TREES = [(3, 8), (4, 8), (4, 16), (6, 16), (6, 24), (8, 24)]  # depth, nodes
SIZES = CHAINS + TREES
TIMES = (1, 2, 4, 8)  # its own layers a small target is padded to
ROUNDS = 5  # of timing, at each depth
MORE = (0.0, 0.1, 0.3)  # plain steps that a draft step costs besides


@dataclass(frozen=True)
class DepthConfig:
    out_dir: str | None = option(None, WHICH_RUN)
    seeds: tuple[int, ...] = option((1, 2, 3, 4, 5), "of the heads", nargs="+", type=int)
    head_tokens: int = option(3_200_000, "each head trains on", least=1)
    test_texts: int = option(100, "loop-free texts of each kind that judge", least=2)
    valid_texts: int = option(30, "that the sizes of drafts are chosen on", least=2)
    max_new_tokens: int = option(128, "tokens of each text", least=16)
    depths: tuple[int, ...] | None = option(
        None,
        "layers that the target is padded to; default: 1, 2, 4 and 8 times its own, of a "
        "pretrained one its own alone",
        nargs="+",
        type=int,
    )
    check_texts: int = option(8, "texts that are decoded at each depth, as a check", least=1)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to decode in", choices=["auto", "float32", "bfloat16"])


def padded(target: GPT, layers: int) -> GPT:
    """The target with further layers that add nothing: their output maps are zero."""
    weight = target.embed.weight
    deep = GPT(replace(target.config, num_layers=layers)).to(weight.device, weight.dtype)
    for block in deep.blocks[len(target.blocks) :]:
        torch.nn.init.zeros_(block.attention_out.weight)
        torch.nn.init.zeros_(block.mlp_out.weight)
    deep.load_state_dict(target.state_dict(), strict=False)
    return deep.eval().requires_grad_(False)


def beside(head, target: GPT):
    """The same head for a target of another depth."""
    other = build_head(head.config, target).to(target.embed.weight.dtype)
    other.load_state_dict(head.state_dict())
    return other.eval().requires_grad_(False)


# --------------------------------------------------------------------------------------- measuring


def kept(path: Path, make, *arguments):
    """What `make` returns, from `path` where it was made before."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, make(*arguments))
    return json.loads(path.read_text("utf-8"))


def written(asked: Texts, run_folder: Path, target, encoding) -> list:
    """[prompt, new tokens] of each text."""
    texts, _ = plain_texts(asked, run_folder, target, encoding)
    return [[text.tokens[: text.start], text.tokens[text.start :]] for text in texts]


def texts_of(config: DepthConfig, split: str, temperature: float, folder, *run) -> tuple:
    """(texts, their sampler). run: its folder, target and encoding. Texts are written once."""
    target = run[1]
    count = config.test_texts if split == "test" else config.valid_texts
    asked = Texts(count, config.max_new_tokens, temperature, split=split)
    found = kept(folder / f"texts-{kind_of(temperature)}-{split}.json", written, asked, *run)
    sampler, texts = Follower(target.embed.weight.device, temperature, seed=0), []
    for prompt, new in found:
        room = min(config.max_new_tokens, target.config.context - len(prompt))
        texts.append(PlainText.read(target, prompt, new, room, sampler))
    return texts, sampler


def replayed(head, target, texts: list, sampler) -> list:
    """[tokens, cycles] of each text (texts, sizes, 2)."""
    plans = {size: plan_draft(head, *size, target) for size in SIZES}
    found = [replay(head, plans, text, sampler) for text in texts]
    return [[[row[size].written, row[size].cycles] for size in SIZES] for row in found]


def timed(target, heads: dict) -> dict:
    """{K: ROUNDS times the cost of a cycle with each size of draft, as [verify, draft]}."""
    rounds, sizes = {k: [] for k in heads}, [(*size, 0) for size in SIZES]
    for _ in range(ROUNDS):
        for k, head in heads.items():
            costs = size_costs(target, head, sizes)
            cycles = [reckon(size, (1.0, 0.0), *costs) for size in sizes]
            rounds[k].append([[cycle.c_verify, cycle.c_draft] for cycle in cycles])
    return rounds


def decoded(target, heads: dict, rows: dict, texts: list) -> dict:
    """{K: speed over plain decoding, in turn, and what tau and costs predict}; rows: `reckoned`."""
    seconds, produced = dict.fromkeys(["plain", *heads], 0.0), {k: [] for k in heads}
    for text in texts:
        for k in seconds:
            drafts = {}
            if k != "plain":
                gamma, nodes = rows[k]["size"]
                drafts = dict(head=heads[k], gamma=gamma, nodes=nodes)
            out = generate(target, text.tokens[: text.start], text.limit, **drafts)
            seconds[k] += out.seconds
            if drafts:
                produced[k] += out.produced
    found = {}
    for k, row in rows.items():
        tau, speedup = float(np.mean(produced[k])), seconds["plain"] / seconds[k]
        predicted = tau / (row["verify"] + row["draft"])
        found[k] = {"tau": tau, "speedup": speedup, "predicted": predicted}
    return found


# --------------------------------------------------------------------------------------- reckoning


def taus(counts: np.ndarray) -> np.ndarray:
    """counts (seeds, texts, sizes, 2) -> tau of each size (sizes,), over all seeds and texts."""
    tokens, cycles = np.moveaxis(counts.sum((0, 1)), -1, 0)
    return tokens / cycles


def speeds(counts: np.ndarray, costs: np.ndarray, more: float) -> np.ndarray:
    """The speed of each size (sizes,); costs (rounds, sizes, 2)."""
    verify, draft = np.moveaxis(np.median(costs, 0), -1, 0)
    return taus(counts) / (verify + draft + more * np.array([gamma for gamma, _ in SIZES]))


def reckoned(valid: dict, test: dict, costs: dict, more: float, seed: int = 0) -> dict:
    """Of each K: its size of draft, tau, costs and speed, and its speed over that of one layer.

    valid, test: {K: counts (seeds, texts, sizes, 2)}; costs: {K: (rounds, sizes, 2)} at one depth.
    """
    rows, generator = {}, np.random.default_rng(seed)
    size = {k: int(speeds(valid[k], costs[k], more).argmax()) for k in valid}
    seeds, texts = test["1"].shape[:2]
    draws = {k: [] for k in test}
    for _ in range(DRAWS):
        s, t = generator.integers(seeds, size=seeds), generator.integers(texts, size=texts)
        r = generator.integers(ROUNDS, size=ROUNDS)
        for k in test:
            counts = test[k][s][:, t][:, :, [size[k]]]
            cost = np.median(costs[k][r][:, size[k]], 0)
            tau = float(counts[..., 0].sum() / counts[..., 1].sum())
            draws[k].append([tau, tau / (cost.sum() + more * SIZES[size[k]][0])])
    draws = {k: np.array(row) for k, row in draws.items()}
    for k in test:
        verify, draft = np.median(costs[k], 0)[size[k]]
        speed, tau = speeds(test[k], costs[k], more)[size[k]], taus(test[k])[size[k]]
        rows[k] = {"size": SIZES[size[k]], "tau": tau, "verify": verify, "draft": draft}
        rows[k] |= {"speed": speed, "speed_interval": percentiles(draws[k][:, 1])}
        rows[k]["net"] = speed / speeds(test["1"], costs["1"], more)[size["1"]]
        rows[k]["net_interval"] = percentiles(draws[k][:, 1] / draws["1"][:, 1])
    return rows


def tau_ratios(test: dict, seed: int = 0) -> dict:
    """tau of K layers over that of one, at each size, with intervals over seeds and texts."""
    generator, (seeds, texts) = np.random.default_rng(seed), test["1"].shape[:2]
    draws = []
    for _ in range(DRAWS):
        s, t = generator.integers(seeds, size=seeds), generator.integers(texts, size=texts)
        draws.append({k: taus(counts[s][:, t]) for k, counts in test.items()})
    return {
        k: [
            [float(ratio), *percentiles(np.array([d[k][i] / d["1"][i] for d in draws]))]
            for i, ratio in enumerate(taus(test[k]) / taus(test["1"]))
        ]
        for k in test
        if k != "1"
    }


def measured(config: DepthConfig, run_folder: Path, cells: dict) -> dict:
    """Heads of these cells {K: cell} beside a run's target: counts, costs, and what follows."""
    shared = dict(head_tokens=config.head_tokens, device=config.device)
    asked = AblationConfig(cells=[*cells.values()], seeds=[*config.seeds], **shared)
    _, folder, fingerprint = train_cells(asked, run_folder, "depth")
    target, _, encoding = load(run_folder, None, config.device, config.dtype)

    def head_of(k: str, seed: int):
        return load_head(folder / f"{cells[k]}-seed{seed}.pt", target, fingerprint)

    # tau.
    loaded, counts = (run_folder, target, encoding), {}
    for temperature in (0.0, 1.0):
        for split in ("valid", "test"):
            kind = f"{kind_of(temperature)}-{split}"
            texts, sampler = texts_of(config, split, temperature, folder, *loaded)
            counts[kind] = {}
            for k, cell in cells.items():
                rows = []
                for seed in config.seeds:
                    where = folder / f"taus-{cell}-seed{seed}-{kind}.json"
                    rows.append(kept(where, replayed, head_of(k, seed), target, texts, sampler))
                    print(f"{cell}, seed {seed}, {kind}: {len(texts)} texts", flush=True)
                counts[kind][k] = np.array(rows)

    # Costs, and some decoding to check them by.
    costs, checks = {}, {}
    texts, _ = texts_of(config, "test", 0.0, folder, *loaded)
    for depth in config.depths:
        deep = padded(target, depth)
        heads = {k: beside(head_of(k, config.seeds[0]), deep) for k in cells}
        found = kept(folder / f"costs-{depth}.json", timed, deep, heads)
        costs[str(depth)] = {k: np.array(rounds) for k, rounds in found.items()}
        print(f"costs at {depth} layers", flush=True)
        rows = reckoned(counts["greedy-valid"], counts["greedy-test"], costs[str(depth)], 0.0)
        decode = deep, heads, rows, texts[: config.check_texts]
        checks[str(depth)] = kept(folder / f"decoded-{depth}.json", decoded, *decode)
        print(f"decoded at {depth} layers: {checks[str(depth)]}", flush=True)
    kinds = ("greedy", "sampled")
    return {
        "layers": len(target.blocks),
        "device": describe_device(target.embed.weight.device),
        "dtype": str(target.embed.weight.dtype).removeprefix("torch."),
        "counts": {kind: {k: v.tolist() for k, v in rows.items()} for kind, rows in counts.items()},
        "costs": {d: {k: v.tolist() for k, v in rows.items()} for d, rows in costs.items()},
        "decoded": checks,
        "tau_ratios": {kind: tau_ratios(counts[f"{kind}-test"]) for kind in kinds},
        "table": [
            {"kind": kind, "depth": int(depth), "more": more, "heads": rows}
            for kind in kinds
            for more in MORE
            for depth, cost in costs.items()
            for rows in [reckoned(counts[f"{kind}-valid"], counts[f"{kind}-test"], cost, more)]
        ],
    }


def main() -> None:
    config = parse(DepthConfig, about=__doc__)
    keep_heap()
    begin, run_folder = time.monotonic(), find_run(config.out_dir, needs_head=False)
    folder, path = results_folder(run_folder) / "depth", target_file(run_folder)
    target, checkpoint = load_target(path)
    small, layers = "source" not in settings_of(path, checkpoint), len(target.blocks)
    depths = config.depths or [layers * times for times in (TIMES if small else (1,))]
    if min(depths) < layers:  # before anything is trained
        raise UserError(f"--depths {min(depths)}: the target has {layers} layers of its own")
    cells, real = CELLS, {"runs": {}, "bits": {}}
    if small:
        cells = CELLS | WIDE
        real = kept(folder / "real.json", real_targets, run_folder, folder, config.device)
    for name, value in real["bits"].items():
        print(f"{name}: {value:.3f} bits per byte", flush=True)
    result = {"config": asdict(config), "sizes": SIZES, "bits": real["bits"]}
    result |= measured(replace(config, depths=depths), run_folder, cells)
    half = dict(seeds=config.seeds[:2], head_tokens=config.head_tokens // 2)
    half |= dict(test_texts=max(2, config.test_texts // 2))
    result["real"] = {
        depth: measured(replace(config, **half, depths=[int(depth)]), folder / name, CELLS)
        for depth, name in real["runs"].items()
    }
    write_json(folder / "depth.json", origin() | result)
    plot_depth(result, folder / "depth.png")
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{depth_table(result)}\n\nwritten: {folder}/depth.json, .png in {minutes:.1f} min")


if __name__ == "__main__":
    run(main)
