"""Where K layers pay: the speed of heads with one, two and three layers, by the target's depth.

A draft layer costs about 1/L of a pass of a target of L layers, and the second one raises tau. So
the deeper the target, the more layers should pay (KOALA's trade-off). But a target of another depth
is another target, with another tau. Here the two factors of the speed are measured apart:

    speed(K, L) = tau(K) / (c_verify(L) + c_draft(K, L))

**tau** is that of the small target's own heads, several seeds of each K, replayed along greedy
texts and along sampled ones (study/replay.py), at every size of draft. **Costs** are those of this
target *padded*: layers whose output maps are zero add nothing to its residual stream, so that its
states, texts and taus stay bit-identical, and a pass takes as long as one of a target of that
depth. Each K has its own size of draft, the fastest on validation texts there; test texts judge.

A loop that spends more besides its layers makes a layer look cheap. So the table is reckoned again
with 0.1 and 0.3 plain steps more for each draft step, and every K chooses anew.

The interval holds seeds (Student's t), texts and rounds of timing together. Texts of one
conversation are drawn together. A round times all depths, so that rounds are minutes apart.

Beside it stand one layer with the parameters of two (`wide`), and targets with other layers of
their own (study/deeper.py), padded likewise, each with its own texts and heads.

`python -m study.depth` does it all, and goes on where it was interrupted: targets, heads, taus and
costs lie in the run's folder, under depth/.
"""

import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken
import torch

from costs import kind_of, reckon, size_costs
from draft_head import build_head
from drafts import plan_draft
from model import GPT
from plumbing.cli import UserError, option, parse, run
from plumbing.files import write_json
from plumbing.machine import describe_device, keep_heap, origin
from sampling import Sampler
from speculate import generate
from study.ablation import AblationConfig, train_cells
from study.deeper import real_targets
from study.plots import plot_depth
from study.prompts import Prompt
from study.replay import PlainText, replay
from study.report import depth_table
from study.sizes import Texts, free_prompts, read_texts
from study.statistics import DRAWS, combined, draw
from targets.loading import WHICH_RUN, find_run, load, results_folder, target_file
from targets.runs import fingerprint, load_head, load_target, settings_of

CELLS = {"1": "eagle-original", "2": "eagle-k2", "3": "eagle-k3"}  # by K
WIDE = {"wide": "eagle-wide"}
CHAINS = [(gamma, 0) for gamma in range(1, 11)]
TREES = [(3, 8), (4, 8), (4, 16), (6, 16), (6, 24), (8, 24)]  # depth, nodes
SIZES = CHAINS + TREES
TIMES = (1, 2, 4, 8)  # its own layers a small target is padded to
ROUNDS = 7  # of timing, at each depth
FEW = 5  # texts that a task has at least, to be shown apart
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
    dtype: str = option("float32", "to decode in", choices=["float32", "bfloat16"])


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


def kept(path: Path, key: dict, make, *arguments):
    """What `make` returns, from `path` where it was made before under the same key."""
    key = json.loads(json.dumps(key))
    if path.is_file():
        found = json.loads(path.read_text("utf-8"))
        if found["key"] == key:
            return found["value"]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"key": key, "value": make(*arguments)})
    return json.loads(path.read_text("utf-8"))["value"]


class Loaded(NamedTuple):
    """A run, ready to be measured."""

    folder: Path
    target: GPT
    encoding: tiktoken.Encoding
    key: dict  # by it what was measured before is known


class Written(NamedTuple):
    """Texts of the target, ready to be replayed."""

    texts: list[PlainText]
    sampler: Sampler
    tasks: list[str]
    conversations: list[int]
    key: str


def texts_of(config: DepthConfig, split: str, temperature: float, folder, run: Loaded) -> Written:
    """The loop-free texts of a split. They are written once."""
    count = config.test_texts if split == "test" else config.valid_texts
    asked = Texts(count, config.max_new_tokens, temperature, split=split)
    path, key = folder / f"texts-{kind_of(temperature)}-{split}.json", run.key | asdict(asked)
    found = kept(path, key, free_prompts, asked, run.folder, run.target, run.encoding)
    prompts = [Prompt(*row) for row in found]
    tasks, conversations = zip(*((prompt.task, prompt.conversation) for prompt in prompts))
    key = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    return Written(*read_texts(asked, run.target, prompts), tasks, conversations, key)


def replayed(head, target, texts: list, sampler) -> list:
    """[tokens, cycles] of each text (texts, sizes, 2)."""
    plans = {size: plan_draft(head, *size, target) for size in SIZES}
    found = [replay(head, plans, text, sampler) for text in texts]
    return [
        [[round(row[size].written, 4), round(row[size].cycles, 4)] for size in SIZES]
        for row in found
    ]


def timed(target, heads: dict, temperature: float, length: int, number: int) -> dict:
    """{K: the cost of a cycle with each size of draft, [verify, draft]}, by round `number`.

    A pass is the target's, whichever head drafted: all heads' passes are one.
    """
    sizes, names = [(*size, 0) for size in SIZES], [*heads]
    first = number % len(names)  # whose turn it is
    found = {
        k: size_costs(target, heads[k], sizes, temperature, length=length)
        for k in names[first:] + names[:first]
    }
    all_passes = [passes for passes, _ in found.values()]
    passes = {n: float(np.median([one[n] for one in all_passes])) for n in all_passes[0]}
    costs = {}
    for k in names:
        cycles = [reckon(size, (1.0, 0.0), passes, found[k][1]) for size in sizes]
        costs[k] = [[cycle.c_verify, cycle.c_draft] for cycle in cycles]
    return costs


def decoded(target, heads: dict, rows: dict, texts: list, stops) -> dict:
    """{K: speed over plain decoding, in turn, and what tau and costs predict}.

    rows: what `reckoned` gave at this depth.
    """
    seconds, produced = {k: [] for k in ["plain", *heads]}, {k: [] for k in heads}
    tokens = dict.fromkeys(seconds, 0)
    drafts = {"plain": {}}
    for k, head in heads.items():
        gamma, nodes = rows[k]["size"]
        drafts[k] = dict(head=head, gamma=gamma, nodes=nodes)
    names = [*seconds]
    for number, text in enumerate([texts[0], *texts]):
        prompt, first = text.tokens[: text.start], number % len(names)
        for k in names[first:] + names[:first]:
            out = generate(target, prompt, text.limit, stop_token=stops, **drafts[k])
            if number > 0:  # the first one only warms up
                seconds[k].append(out.seconds)
                tokens[k] += len(out.tokens) - 1
                if k in heads:
                    produced[k] += out.produced[: out.uncut_cycles]
    speed = {k: tokens[k] / sum(seconds[k]) for k in seconds}
    found = {}
    for k, row in rows.items():
        tau, speedup = float(np.mean(produced[k])), speed[k] / speed["plain"]
        predicted = tau / (row["verify"] + row["draft"])
        found[k] = {"tau": tau, "speedup": speedup, "predicted": predicted, "seconds": seconds[k]}
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


def redrawn_taus(counts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """tau of one size with other texts (DRAWS,): counts (seeds, texts, 2), times (DRAWS, texts)."""
    tokens, cycles = (times @ counts.sum(0)).T
    return tokens / cycles


def reckoned(valid: dict, test: dict, costs: dict, more: float, times: np.ndarray) -> dict:
    """Of each K: its size of draft, tau, costs and speed, and its speed over that of one layer.

    valid, test: {K: counts (seeds, texts, sizes, 2)}; costs: {K: (rounds, sizes, 2)} at one depth;
    times: how often each draw of the bootstrap holds each test text (DRAWS, texts).
    """
    rows, speed, by_seed, redrawn = {}, {}, {}, {}
    rounds = np.random.default_rng(0).integers(ROUNDS, size=(DRAWS, ROUNDS))
    for k, counts in test.items():
        size = int(speeds(valid[k], costs[k], more).argmax())
        gamma, own = SIZES[size][0], counts[:, :, size]
        verify, draft = np.median(costs[k], 0)[size]
        cost = np.median(costs[k][rounds, size], 1).sum(-1) + more * gamma  # (DRAWS,)
        tau, drawn = taus(counts)[size], redrawn_taus(own, times)
        each = own.sum(1)[:, 0] / own.sum(1)[:, 1]  # tau of each seed
        by_seed[k], redrawn[k] = each / (verify + draft + more * gamma), drawn / cost
        speed[k] = tau / (verify + draft + more * gamma)
        rows[k] = {"size": list(SIZES[size]), "tau": tau, "verify": verify, "draft": draft}
        rows[k] |= {"tau_interval": combined(tau, drawn, each), "speed": speed[k]}
        rows[k]["speed_interval"] = combined(speed[k], redrawn[k], by_seed[k])
    for k in test:
        net, each = speed[k] / speed["1"], by_seed[k] / by_seed["1"]
        rows[k] |= {"net": net, "net_interval": combined(net, redrawn[k] / redrawn["1"], each)}
    return rows


def tau_ratios(test: dict, times: np.ndarray) -> dict:
    """tau of K layers over that of one, at each size, with intervals over seeds and texts."""
    found = {}
    for k, counts in test.items():
        pair = counts, test["1"]
        by_seed = [[taus(part[[seed]]) for seed in range(len(part))] for part in pair]
        by_seed = np.divide(*by_seed)  # (seeds, sizes)
        found[k] = []
        for i, ratio in enumerate(np.divide(*map(taus, pair))):
            redrawn = np.divide(*(redrawn_taus(part[:, :, i], times) for part in pair))
            found[k].append([float(ratio), *combined(ratio, redrawn, by_seed[:, i])])
    return {k: rows for k, rows in found.items() if k != "1"}


def tabled(part: dict) -> dict:
    """The figures of a target: `table` and `tau_ratios`, from its counts, costs and texts."""
    table, ratios, counts = [], {}, {name: arrays(of) for name, of in part["counts"].items()}
    for row in part["costs"]:
        kind, depth, cost = row["kind"], row["depth"], arrays(row["cycles"])
        valid, test, texts = counts[f"{kind}-valid"], counts[f"{kind}-test"], part["texts"]
        tasks, conversations = map(np.array, zip(*texts[f"{kind}-test"]))
        samples = [{"conversation": number} for number in conversations]
        times = draw(samples, np.ones(len(samples), dtype=bool), seed=0)
        if kind not in ratios:
            ratios[kind] = tau_ratios(test, times)
        for more in MORE:
            rows = reckoned(valid, test, cost, more, times)
            table.append({"kind": kind, "depth": depth, "more": more, "heads": rows})
        for task in sorted(set(tasks.tolist())):
            use = tasks == task
            if use.sum() >= FEW:
                some = {k: counts[:, use] for k, counts in test.items()}
                rows = reckoned(valid, some, cost, 0.0, draw(samples, use, seed=0)[:, use])
                about = {"kind": kind, "depth": depth, "more": 0.0, "task": task}
                table.append(about | {"texts": int(use.sum()), "heads": rows})
    return {"tau_ratios": ratios, "table": table}


def arrays(found: dict) -> dict:
    return {k: np.array(values) for k, values in found.items()}


def measured(config: DepthConfig, run_folder: Path, cells: dict) -> dict:
    """Heads of these cells {K: cell} beside a run's target: counts, costs, and what follows.

    Raises UserError where the heads of a seed were not trained in one dtype.
    """
    shared = dict(head_tokens=config.head_tokens, device=config.device)
    asked = AblationConfig(cells=[*cells.values()], seeds=[*config.seeds], **shared)
    _, folder, target_print = train_cells(asked, run_folder, "depth")
    target, _, encoding = load(run_folder, None, config.device, config.dtype)
    weight = target.embed.weight
    its = Loaded(run_folder, target, encoding, {"target": target_print, "dtype": str(weight.dtype)})
    heads = {
        (k, seed): load_head(folder / f"{cell}-seed{seed}.pt", target, target_print)
        for k, cell in cells.items()
        for seed in config.seeds
    }
    prints = {which: fingerprint(head) for which, head in heads.items()}
    for seed in config.seeds:
        if len(dtypes := {heads[k, seed].training_record["dtype"] for k in cells}) > 1:
            words = " and ".join(sorted(dtypes))
            raise UserError(
                f"the heads of seed {seed} in {folder} were trained in {words}: remove those of one"
            )

    # tau.
    counts, texts = {}, {}
    for temperature in (0.0, 1.0):
        for split in ("valid", "test"):
            kind = f"{kind_of(temperature)}-{split}"
            found = texts[kind] = texts_of(config, split, temperature, folder, its)
            counts[kind] = {}
            for k, cell in cells.items():
                rows = []
                for seed in config.seeds:
                    where = folder / f"taus-{cell}-seed{seed}-{kind}.json"
                    key = {"head": prints[k, seed], "texts": found.key, "sizes": SIZES}
                    replay_it = heads[k, seed], target, found.texts, found.sampler
                    rows.append(kept(where, its.key | key, replayed, *replay_it))
                    print(f"{cell}, seed {seed}, {kind}: {len(found.texts)} texts", flush=True)
                counts[kind][k] = np.array(rows)

    # Costs, and some decoding to check them by.
    costs, checks, kinds = {}, {}, {"greedy": 0.0, "sampled": 1.0}
    greedy = texts["greedy-test"]
    length = round(np.mean([text.start + text.limit / 2 for text in greedy.texts]))
    stops = None if target.chat is None else target.chat.stops
    key = its.key | {"heads": [prints[k, config.seeds[0]] for k in cells], "length": length}
    key |= {"device": describe_device(weight.device), "machine": platform.node()}
    models = {}  # by depth: the padded target, and the first seed's heads for it
    for depth in config.depths:
        deep = padded(target, depth)
        models[depth] = deep, {k: beside(heads[k, config.seeds[0]], deep) for k in cells}
    for number in range(ROUNDS):
        for depth in config.depths:
            for kind, temperature in kinds.items():
                where, timing = folder / f"costs-{kind}-{depth}-{number}.json", {"sizes": SIZES}
                found = kept(
                    where, key | timing, timed, *models[depth], temperature, length, number
                )
                for k in cells:
                    costs.setdefault((kind, depth), {}).setdefault(k, []).append(found[k])
        print(f"costs, round {number + 1} of {ROUNDS}", flush=True)
    costs = {which: arrays(of) for which, of in costs.items()}
    for depth in config.depths:
        once = np.ones((1, len(greedy.texts)))  # the texts as they are
        both = counts["greedy-valid"], counts["greedy-test"]
        rows = reckoned(*both, costs["greedy", depth], 0.0, once)
        some = greedy.texts[: config.check_texts]
        what = {"texts": greedy.key, "count": len(some), "rows": {k: rows[k]["size"] for k in rows}}
        where, job = folder / f"decoded-{depth}.json", (*models[depth], rows, some, stops)
        checks[str(depth)] = kept(where, key | what, decoded, *job)
        print(f"decoded at {depth} layers: {checks[str(depth)]}", flush=True)
    part = {
        "layers": len(target.blocks),
        "device": describe_device(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "texts": {kind: [*zip(found.tasks, found.conversations)] for kind, found in texts.items()},
        "counts": {kind: {k: v.tolist() for k, v in rows.items()} for kind, rows in counts.items()},
        "costs": [
            {"kind": kind, "depth": depth, "cycles": {k: v.tolist() for k, v in cost.items()}}
            for (kind, depth), cost in costs.items()
        ],
        "decoded": checks,
    }
    return part | tabled(part)


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
    if not small and not (results_folder(run_folder) / "conversations").is_dir():
        raise UserError(
            f"beside {run_folder} no text lies that heads could learn from: make a run of your own "
            "with train.py --target, and give it as --out_dir"
        )
    result = {"config": asdict(config), "sizes": SIZES, "bits": {}, "real": {}}
    result |= measured(replace(config, depths=depths), run_folder, CELLS | WIDE if small else CELLS)

    def keep() -> None:
        write_json(folder / "depth.json", origin() | result)
        plot_depth(result, folder / "depth.png")

    keep()
    if small:
        key = {"target": checkpoint["fingerprint"]}
        real = kept(folder / "real.json", key, real_targets, run_folder, folder, config.device)
        result["bits"] = real["bits"]
        two = replace(config, seeds=config.seeds[:2])
        for own, name in real["runs"].items():
            more = [depth for depth in depths if depth > int(own)]
            it = measured(replace(two, depths=[int(own), *more]), folder / name, CELLS)
            result["real"][own] = it
            keep()
    minutes = (time.monotonic() - begin) / 60
    print(f"\n{depth_table(result)}\n\nwritten: {folder}/depth.json, .png in {minutes:.1f} min")


if __name__ == "__main__":
    run(main)
