"""The numbers: acceptance length and speedup, how sure they are, and the cost model's prediction.

**tau**, the acceptance length, is tokens per pass of the target, its own token included, summed
over prompts: between 1 and gamma + 1. The prefill is no cycle, and a cycle that the text's end
cut short is left out. Its interval comes from resampling the prompts (bootstrap, 95 %), the turns
of one conversation together.

**Speedup** is tokens/s of speculative over tokens/s of plain decoding of the same prompts, batch 1,
prefill excluded. All methods decode a prompt in turn, each time in another order, so that a slow
minute hits all of them. It is the median over runs, with its interval over prompts alone; the range
of the runs stands beside it.
Copies alone (`drafts.Lookup`), which need no training, are measured beside any head.

**The cost model** says what speedup the cycles should give, each at the cost of its kind: nothing
drafted, copied, drafted by the head. The costs are measured beforehand, in isolated passes at the
run's middle context length: see costs.py.

**Honesty.** The baseline is compared with a bare loop. Greedy outputs are compared token by token,
and any difference has to be a near-tie of the target's logits, else this script exits with 1. A
small model repeats itself when decoded greedily, and loops flatter every draft: prompts are decoded
plainly until enough of them give a text without a loop (at least half of its 4-grams distinct).
Headline numbers are of those whose text loops with no method; looped ones are counted, and some are
measured apart. This is the last file of the reading order; study/ holds the statistics, prompts and
tables.
"""

import plumbing.early  # noqa: F401

import random
import statistics
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from costs import best_size, isolated_costs, measure_acceptance
from drafts import ALONE, COPIED, GAMMA, plan_draft
from plumbing.cli import UserError, fail, option, parse, run
from plumbing.files import write_json
from plumbing.machine import describe_device, origin, synchronized_time
from recipe import in_order
from sampling import Sampler, argmax
from speculate import DecodeConfig, generate
from study.plots import plot_bench
from study.prompts import check_prompts, choose_prompts, held_out_text, load_prompts, request_of
from study.report import bench_tables
from study.statistics import COPYING, evaluate
from targets.features import Features, evenly
from targets.loading import find_run, load, load_heads, name_of, result_file
from targets.outputs import NEAR_TIE, first_difference, is_loop
from targets.runs import trained_heads

WARM_UP = 2  # prompts decoded before anything is timed


def draft_size(text: str) -> tuple:
    """(gamma, nodes) of an option."""
    if text == "auto":
        return "auto", "auto"
    gamma, _, nodes = text.partition("x")
    return int(gamma), int(nodes) if "x" in text else 0


@dataclass(frozen=True)
class BenchConfig(DecodeConfig):
    heads: list[str] | None = option(
        None,
        "heads to measure; default: the run's own. Copies alone are measured beside them",
        nargs="+",
    )
    sizes: tuple[tuple, ...] = option(
        ((GAMMA, 0),),
        f"of the drafts to compare: {GAMMA} is a chain, 3x8 a tree of 8 tokens, 3 deep, auto the "
        f"fastest by measurement; default: {GAMMA}",
        nargs="+",
        type=draft_size,
    )
    num_prompts: int = option(40, "loop-free prompts wanted, from all tasks", least=1)
    prompts_file: str | None = option(
        None, "instead: a UTF-8 file with a prompt a line, or *.jsonl as Spec-Bench has them"
    )
    split: str = option("test", "of the default prompts", choices=["valid", "test"])
    runs: int = option(2, "repetitions of every timing", least=1)
    name: str = option("bench", "of the result files, written to OUT_DIR/bench/")

    def __post_init__(self):
        super().__post_init__()
        if Path(self.name).name != self.name:
            raise UserError(f"--name {self.name!r} must be the name of a file, without a folder")


# ---------------------------------------------------------------------------------- measuring


class Method(NamedTuple):
    """One way to decode: a head and the size of its drafts."""

    head: str  # or lookup: copies alone
    gamma: int  # tokens in a chain or a copy alone, or depth of the tree
    nodes: int  # 0: a chain
    setting: str  # methods of one setting are compared: KOALA's head with the original's
    chosen: str | None = None  # where the size was chosen: it, with the figures expected of it
    lookup: int = 0  # tokens that have to match for a copy; 0: none is made


def choose_methods(config: BenchConfig, target, heads: dict) -> tuple[dict, dict]:
    """Every head with every size of draft, and copies alone.

    Returns ({name: Method as a dictionary}, {name: (head, plan)}). Raises UserError for a size that
    a head cannot draft.
    """
    # The first chain is the one that others are compared with: its setting is "chain".
    methods, chains = {}, [size for size in config.sizes if size[1] == 0]
    for size in config.sizes:
        gamma, nodes = size
        setting = f"tree {gamma}x{nodes}" if nodes else f"chain {gamma}"
        setting = "auto" if nodes == "auto" else "chain" if [size] == chains[:1] else setting
        for name, head in heads.items():
            method = Method(name, gamma, nodes, setting)
            if nodes == "auto":
                best = best_size(target, head, gamma, nodes, config.temperature)
                print(f"{name}, by measurement: {best}")
                method = Method(name, best.gamma, best.nodes, setting, str(best))
            methods[name if setting == "chain" else f"{name} {setting}"] = method
    if config.lookup:
        methods |= {
            name + COPYING: m._replace(setting=m.setting + COPYING, lookup=config.lookup)
            for name, m in methods.items()
        }
    length = max(1, min(COPIED, config.max_new_tokens - 2))
    methods["lookup"] = Method("lookup", length, 0, "copies", lookup=ALONE)
    ready = {}
    for name, m in methods.items():
        head = heads.get(m.head)
        ready[name] = head, plan_draft(head, m.gamma, m.nodes, target, m.lookup)
    return {name: method._asdict() for name, method in methods.items()}, ready


class Chosen(NamedTuple):
    """What is decoded."""

    prompts: list  # see `study.prompts.choose_prompts`
    rooms: list[int]  # new tokens after each
    counts: dict  # of the candidates
    middle: int  # the run's middle context length


def choose_texts(config, target, depth: int, candidates: list) -> Chosen:
    """Of the prompts that came into question, for drafts at most `depth` deep.

    Raises UserError for one that has no room for a draft, and where no answer has a cycle.
    """
    check_prompts(config, target, depth, candidates)
    prompts, counts = choose_prompts(config, target, candidates)
    if not prompts:
        raise UserError("every answer ends after a word or two: there is no cycle to measure")
    rooms = check_prompts(config, target, depth, prompts)
    middle = statistics.median(len(p[1]) + room // 2 for p, room in zip(prompts, rooms))
    return Chosen(prompts, rooms, counts, min(int(middle), target.config.context - depth - 1))


@torch.inference_mode()
def baseline_share(target, prompt: list[int], count: int, repeats: int) -> float:
    """Speed of `generate` without a head, in units of the barest loop one could write."""
    device = target.embed.weight.device

    def bare() -> float:
        cache = target.new_cache(len(prompt) + count)
        hidden = target(torch.tensor([prompt], device=device), cache)
        token = argmax(target.lm_head(hidden[:, -1:]))
        start = synchronized_time(device)
        for _ in range(count - 1):
            token = argmax(target.lm_head(target(token, cache)))
            token.item()
        return synchronized_time(device) - start

    ratios = [bare() / generate(target, prompt, count).seconds for _ in range(repeats + 1)]
    return statistics.median(ratios[1:])


def measure(config: BenchConfig, target, ready: dict, prompts: list) -> tuple[list, dict]:
    """Decode every prompt with every method and without, `runs` times, interleaved.

    Returns (a record per prompt, {method: [seconds of each prompt] for each run}).
    """
    request = request_of(config, target)
    methods = {"autoregressive": (None, None)} | ready
    samples = [
        {"task": task, "conversation": number, "prompt": prompt, "methods": {}}
        for task, prompt, number, _ in prompts
    ]
    seconds = {name: [] for name in methods}
    for number in range(config.runs):
        for rows in seconds.values():
            rows.append([])
        few = len(prompts) if config.compile else WARM_UP  # each length records passes of its own
        warm_up = prompts[:few] if number == 0 else []
        for index, (_, prompt, *_) in enumerate(warm_up + prompts, start=-len(warm_up)):
            seed = config.seed + max(index, 0)
            # Each time in another order: whatever one leaves behind hits all.
            order = random.Random(f"{number} {index}").sample([*methods], len(methods))
            for name in order:
                head, plan = methods[name]
                out = generate(target, prompt, head=head, plan=plan, seed=seed, **request)
                if index < 0:
                    continue
                seconds[name][-1].append(out.seconds)
                if number == 0:
                    samples[index]["methods"][name] = {
                        "tokens": out.tokens,
                        "produced": out.produced,
                        "uncut_cycles": out.uncut_cycles,
                        "drafts": out.drafts,
                        "phases": [out.draft_seconds, out.verify_seconds, out.other_seconds],
                    }
            if index >= 0 and (index + 1) % 10 == 0:
                done = f"run {number + 1}/{config.runs}: {index + 1}/{len(prompts)} prompts"
                print(done, flush=True)
    for row, (_, prompt, *_) in zip(samples, prompts):
        plain = row["methods"]["autoregressive"]["tokens"]
        # In bfloat16 texts can part at a near-tie, and one with drafts loop where the plain one did
        # not: it would flatter its draft.
        row["loop"] = any(is_loop(method["tokens"]) for method in row["methods"].values())
        for name in ready if config.temperature == 0 else ():
            ours = row["methods"][name]["tokens"]
            if ours != plain:
                row["methods"][name]["differs"] = first_difference(target, prompt, ours, plain)
    return samples, seconds


def main() -> None:
    config = parse(BenchConfig, about=__doc__)
    folder = find_run(config.out_dir)
    names = config.heads or in_order(trained_heads(folder))
    if not names:
        raise UserError(f"there is no trained head in {folder}: train one with python train.py")
    target, _, encoding = load(folder, None, config.device, config.dtype, config.compile)
    heads = load_heads(folder, names, target)
    weight = target.embed.weight
    print(f"run {name_of(folder)}, {describe_device(weight.device)}, heads {', '.join(heads)}")
    print(f"{weight.dtype}: {target.why_dtype}")
    text = held_out_text(target.about, config.split)
    candidates = load_prompts(config, folder, target, text, encoding)
    out = result_file(folder, f"bench/{config.name}.json")
    sampler = Sampler(weight.device, config.temperature, config.top_k, config.top_p, config.seed)
    methods, ready = choose_methods(config, target, heads)
    depth = max(plan.depth for _, plan in ready.values())
    prompts, rooms, counts, middle = choose_texts(config, target, depth, candidates)

    held_out = None
    if text is not None:
        rows = evenly(text.windows(config.split, target.config.context + 1), 64)
        batch = Features(target, rows, nullcontext).batch(torch.arange(len(rows)))
        held_out = {n: measure_acceptance(target, head, batch) for n, head in heads.items()}
    costs = isolated_costs(target, ready, middle, sampler)
    share = baseline_share(target, prompts[0][1], rooms[0], 5)
    samples, seconds = measure(config, target, ready, prompts)
    result = origin() | {
        "device": describe_device(weight.device),
        "dtype": str(weight.dtype).removeprefix("torch."),
        "why_dtype": target.why_dtype,
        "config": asdict(config),
        "target": target.about["training"],
        "training": {n: getattr(h, "training_record", None) for n, h in heads.items()},
        "on_held_out_text": held_out,
        "isolated_seconds": costs,
        "baseline_share": share,
        "candidates": counts,
        "methods": methods,
        "seconds": seconds,
        "samples": samples,
    }
    write_json(out, result)  # whatever becomes of its figures
    greedy = config.temperature == 0
    result["figures"] = evaluate(methods, config.seed, samples, seconds, costs, greedy=greedy)
    write_json(out, result)
    out.with_suffix(".md").write_text(bench_tables(result) + "\n", "utf-8")
    plot_bench(result, out.with_suffix(".png"))
    print(f"\n{bench_tables(result)}\n\nwritten: {out}, .md and .png")
    worst = max(
        (f.get("largest_gap", 0.0) for f in result["figures"]["heads"].values()), default=0.0
    )
    if worst > NEAR_TIE[weight.dtype]:
        fail(f"outputs part where the target's choice was clear (gap {worst:.4f}): a bug")
        sys.exit(1)


if __name__ == "__main__":
    run(main)
