"""Does foreseeing acceptance pay? The judge of study/judge.py against q, a regression, an oracle.

    1. A and its controls learn from verdicts along training text; held-out text says how good they
       are: binary cross entropy, and by deciles how often what they foresee comes true.
    2. Along texts that the target wrote after *validation* prompts every plan is replayed, and its
       speed follows from the costs of this machine: chains and fixed sizes of trees, which exist
       already; paying trees by A, by the regression, by q; and an oracle, which drafts along the
       text and stops just before it would be rejected. S, the speed by which a paying tree cuts, is
       the one that it reaches itself: two rounds of replay.
    3. With `--test_prompts`: the best plan of those that exist and the paying trees decode *test*
       prompts, like methods of bench.py.

One variant for each target and temperature: A's tree of at most NODES tokens, DEPTH deep, of the
width (children of a node, and nodes that are expanded at each depth) and the patience that are best
on validation.
"""

import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from bench import BenchConfig, Method, choose_texts, measure
from costs import DEPTHS, fastest, isolated_costs, kind_of, size_costs
from drafts import WIDTH, Draft, Plan, chain_shape, plan_draft
from plumbing.cli import option, parse, run
from plumbing.files import write_json
from plumbing.machine import describe_device, keep_heap, origin
from sampling import Sampler
from study.judge import Judge, Logistic, PayingTree, Seen, fit, verdicts
from study.prompts import held_out_text, load_prompts
from study.replay import replay
from study.report import foresight_table
from study.sizes import TREES, Texts, plain_texts, taus_along
from study.statistics import evaluate
from targets.loading import WHICH_RUN, find_run, load, load_heads, result_file, results_folder
from targets.written import CONTINUING, self_written

WINDOW = 256  # tokens of each text that is learnt from
NODES, DEPTH = 24, 10  # of a paying tree, at most
STEPS = (*DEPTHS, DEPTH)  # draft steps that are timed
ROUNDS = 25  # of timing: by medians of five a plan was 7 % faster, and then 1 %
SHAPES = tuple((width, patience) for width in (2, WIDTH) for patience in (1, 2, 4))
# Trees beside those of study/sizes.py: as small, as deep and as large as paying ones can be.
BESIDE = ((1, 3), (2, 5), (3, 5), (4, 6), (4, 10), (5, 12), (8, 12), (8, 16), (8, 24), (10, 24))
# Figures of bench.py that suppose a draft of one size: a paying tree's cost goes by its steps.
RECKONED = ("predicted_speedup", "predicted_by_task", "c_verify", "c_draft")
RECKONED += ("accepted_histogram", "conditional_acceptance")


@dataclass(frozen=True)
class ForesightConfig:
    out_dir: str | None = option(None, WHICH_RUN)
    head: str = option("eagle", "the head that drafts; one of EAGLE's kind")
    temperature: float = option(0.0, "0 or 1: of the texts, and of the verdicts", least=0)
    rows: int = option(200_000, "nodes to learn from", least=1000)
    written_tokens: int = option(150_000, "of a target that writes its own training text", least=1)
    num_prompts: int = option(30, "validation texts", least=1)
    max_new_tokens: int = option(128, "tokens of each", least=16)
    test_prompts: int = option(0, "to decode; 0: none", least=0)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to decode in", choices=["auto", "float32", "bfloat16"])


# -------------------------------------------------------------------------------- what is foreseen


@torch.no_grad()
def foreseen(model, seen: Seen, chance) -> dict:
    """Cross entropy in nats, and by tenths of the tokens [foreseen, come true]."""
    logits = torch.cat([model(Seen(*part)) for part in zip(*(v.split(4096) for v in seen))])
    order = logits.flatten().argsort().chunk(10)
    logits, chance = logits.flatten(), chance.flatten()
    deciles = [[logits[i].sigmoid().mean().item(), chance[i].mean().item()] for i in order]
    return {"bce": F.binary_cross_entropy_with_logits(logits, chance).item(), "deciles": deciles}


def learnt(config, target, head, folder) -> tuple[dict, dict]:
    """({name: model}, {name: what it foresees on held-out text}); q itself is no model: None."""
    greedy, kind = config.temperature == 0, kind_of(config.temperature)
    window = min(WINDOW, target.config.context)
    asked = window, config.written_tokens, 0, target.embed.weight.dtype
    warm = CONTINUING if greedy else config.temperature
    texts = results_folder(folder) / "foresight" / kind
    data = self_written(texts, target, target.about, None, *asked, warm)
    (seen, chance), held_out = (verdicts(target, head, d, greedy, config.rows) for d in data)
    torch.manual_seed(0)
    models = {
        "judge": fit(Judge(head.lm_head()), seen, chance),
        "logistic": fit(Logistic(), seen, chance),
        "q": lambda seen: seen.odds,
    }
    told = {name: foreseen(model, *held_out) for name, model in models.items()}
    # What remains to whoever knows each chance: nothing greedily, the entropy of p's own draw else.
    told["floor"] = F.binary_cross_entropy(held_out[1], held_out[1]).item()
    told["nodes"] = [len(chance), len(held_out[1])]
    told["followed"] = chance.mean(0).tolist()
    return models | {"q": None}, told


# ------------------------------------------------------------------------------ what it is worth


class Oracle(Plan):
    """Knows the text: drafts it as long as it is among the head's `width` likeliest tokens."""

    def __init__(self, width: int, depth: int):
        self.width, self.depth, self.nodes, self.slots = width, depth, depth, depth
        self.made = []

    def draft(self, known, depth: int, sampler) -> Draft:
        """In replay, where `known` holds the tokens `ahead`."""
        head, state = known.read()
        tokens, logits = [known.root], head.expand(state)[0]
        for index in head.vocabulary.indices_of(known.ahead[:depth]).split(1):
            if index not in logits[0].topk(self.width).indices:
                break
            tokens.append(head.vocabulary.tokens_at(index))
            if len(tokens) <= depth:
                logits = head.expand(state, tokens[-1][None])[0]
        if depth == self.depth:
            self.made.append((len(tokens) - 1, len(tokens) - 1))
        return Draft(torch.cat(tokens), chain_shape(len(tokens) - 1, known.root.device))


class Costs:
    """Of passes over 1, 2, .. tokens, and of drafts by their depth, in plain steps."""

    def __init__(self, passes: dict, drafts: dict, kind):
        tokens = np.arange(1, NODES + 2)
        self.verify = np.interp(tokens, [*passes], np.maximum.accumulate([*passes.values()]))
        of_kind = dict(sorted((depth, cost) for (depth, k), cost in drafts.items() if k == kind))
        depths, costs = [0, *of_kind], [0.0, *np.maximum.accumulate([*of_kind.values()])]
        self.draft = np.interp(np.arange(DEPTH + 1), depths, costs)
        # Of one step more, by a straight line through all depths.
        self.step = float(np.polyfit(depths[1:], costs[1:], 1)[0])

    def speed(self, written: float, made: list) -> float:
        nodes, steps = np.array(made).T
        return written / float((self.verify[nodes] + self.draft[steps]).sum())


def speed_of(plan, costs: Costs, head, texts: list, sampler) -> dict:
    """A plan's tau and speed along texts, and the mean size of its drafts."""
    plan.made, written, cycles = [], 0.0, 0.0
    for text in texts:
        found = replay(head, {"it": plan}, text, sampler)["it"]
        written, cycles = written + found.written, cycles + found.cycles
        del plan.made[round(cycles) :]  # what the text's end cut
    nodes, steps = np.mean(plan.made, 0).tolist()
    speed = costs.speed(written, plan.made)
    return {"tau": written / len(plan.made), "nodes": nodes, "steps": steps, "speed": speed}


def along_validation(config, target, head, models, followed, folder, encoding) -> tuple:
    """(the best plan that exists, {name: paying tree of the best width}, the figures of all)."""
    asked = Texts(config.num_prompts, config.max_new_tokens, config.temperature)
    followed = torch.tensor(followed, device=target.embed.weight.device)
    texts, sampler = plain_texts(asked, folder, target, encoding)
    sizes = [(g, 0, 0) for g in range(1, DEPTH + 1)]
    sizes += [(*size, 0) for size in TREES + BESIDE if size[0] <= DEPTH]
    plans = {size: plan_draft(head, *size[:2], target) for size in sizes}
    tree = partial(PayingTree, nodes=NODES, device=target.embed.weight.device)
    widths = sorted({width for width, _ in SHAPES})
    others = {
        (depth, (name, width)): tree(width, depth=depth, model=model)
        for name, model in models.items()
        for width in widths
        for depth in STEPS
    }
    measured = size_costs(target, head, sizes, config.temperature, others, ROUNDS)
    best, trees = fastest(taus_along(texts, head, plans, sampler), *measured), {}
    without = max(1.0, best.speedup)  # 1: to draft nothing
    figures = {"texts": len(texts), "passes": [*measured[0].items()]}
    figures["best"] = {"size": best[:2], "tau": best.tau, "speed": best.speedup}
    for name, model in models.items():
        for width, patience in SHAPES:
            costs, speed = Costs(*measured, (name, width)), without
            for _ in range(2):
                cut = dict(speed=speed, costs=(costs.verify, costs.step), followed=followed)
                one = tree(width, depth=DEPTH, model=model, patience=patience, **cut)
                row = speed_of(one, costs, head, texts, sampler) | {"cut at": speed}
                row["a step"], speed = costs.step, row["speed"]
            figures[f"{name} of {width}, {patience}"] = row
            if speed > figures.get(name, {"speed": 0.0})["speed"]:
                figures[name], trees[name] = row | {"shape": [width, patience]}, one
    for width in (1, *widths):
        oracle, costs = Oracle(width, DEPTH), Costs(*measured, False)
        figures[f"oracle of {width}"] = speed_of(oracle, costs, head, texts, sampler)
    most = max(row["speed"] for name, row in figures.items() if name.startswith("oracle"))
    for name in figures.keys() - {"texts", "passes"}:
        gain = figures[name]["speed"] - without
        # Of all there is to gain; 0 where the oracle gains nothing.
        figures[name]["share"] = gain / (most - without) if most > without else 0.0
    return plans[best[:3]], trees, figures


def figures_of(test: dict, greedy: bool) -> dict:
    """The figures of what was decoded: every paying tree against the best plan without."""
    measured = [test[key] for key in ("methods", "seed", "samples", "seconds", "costs")]
    pairs = {name: ["best"] for name in test["methods"] if name != "best"}
    figures = evaluate(*measured, pairs, greedy=greedy)
    for name in pairs:
        for row in (figures["heads"][name], *figures["comparisons"][name]):
            for figure in ("predicted", *RECKONED):
                row.pop(figure, None)
    return figures


def on_test(config, target, heads, best, trees: dict, folder, encoding) -> dict:
    """What the plans bring in decoding: as bench.py measures it."""
    plans = {"best": best} | trees
    bench = BenchConfig(
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        num_prompts=config.test_prompts,
    )
    text = held_out_text(target.about, bench.split)
    depth = max(plan.depth for plan in plans.values())
    candidates = load_prompts(bench, folder, target, text, encoding)
    prompts, _, counts, middle = choose_texts(bench, target, depth, candidates)
    ready = {name: (heads[config.head], plan) for name, plan in plans.items()}
    methods = {n: Method(config.head, p.depth, p.nodes, n)._asdict() for n, p in plans.items()}
    sampler = Sampler(target.embed.weight.device, config.temperature, seed=bench.seed)
    costs = isolated_costs(target, ready, middle, sampler)
    samples, seconds = measure(bench, target, ready, prompts)
    result = {"methods": methods, "seed": bench.seed, "samples": samples, "seconds": seconds}
    result |= {"costs": costs, "candidates": counts}
    return result | {"figures": figures_of(result, config.temperature == 0)}


def main() -> None:
    config = parse(ForesightConfig, about=__doc__)
    keep_heap()
    folder, begin = find_run(config.out_dir), time.monotonic()
    target, _, encoding = load(folder, None, config.device, config.dtype)
    path = result_file(folder, f"foresight-{kind_of(config.temperature)}.json")
    heads = load_heads(folder, [config.head], target)
    head = heads[config.head]
    models, told = learnt(config, target, head, folder)
    for name in models:
        print(f"{name}: cross entropy {told[name]['bce']:.4f} on held-out text", flush=True)
    best, trees, figures = along_validation(
        config, target, head, models, told["followed"], folder, encoding
    )
    for name, row in figures.items():
        print(f"{name}: {row}", flush=True)
    result = origin() | {
        "device": describe_device(target.embed.weight.device),
        "dtype": str(target.embed.weight.dtype).removeprefix("torch."),
        "config": asdict(config),
        "foreseen": told,
        "validation": figures,
    }
    write_json(path, result)  # whatever becomes of the test
    if config.test_prompts:
        result["test"] = on_test(config, target, heads, best, trees, folder, encoding)
        write_json(path, result)
    print(f"{foresight_table(result)}\n\nwritten: {path}")
    print(f"{(time.monotonic() - begin) / 60:.1f} min")


if __name__ == "__main__":
    run(main)
