"""What each size of draft brings: tau of chains, trees and copies, along the target's own texts.

`python -m study.sizes` writes sizes.json beside a run's heads. By it `--gamma auto` and `--nodes
auto` choose: with the costs of a machine, tau gives the speed of each size there (costs.py). Until
then they reckon tau from a head's figures on held-out text. The texts here are those of validation
prompts, greedy ones and ones at temperature 1. Heads are replayed along them (`study.replay`), so
that nothing is decoded but the texts themselves.

It also settles, with the costs of the machine that it runs on, whether copies come first where
nothing is asked for, and shows which length of copies, and how long a match, are the fastest.
"""

import time
from dataclasses import dataclass

import numpy as np

from costs import fastest, kind_of, reckon, size_costs
from drafts import GAMMA, MATCH, Chain, CopyFirst, Lookup, plan_draft
from plumbing.cli import UserError, option, parse, run
from plumbing.files import write_json
from plumbing.machine import describe_device, origin
from recipe import in_order
from sampling import Sampler
from study.prompts import Prompt, check_prompts, choose_prompts, held_out_text, load_prompts
from study.replay import PlainText, replay
from targets.loading import SIZES, WHICH_RUN, find_run, load, load_heads, result_file
from targets.outputs import is_loop
from targets.runs import fingerprint, trained_heads

CHAINS = range(1, 9)
TREES = ((2, 8), (3, 8), (4, 8), (3, 16), (4, 16), (6, 16), (4, 24), (6, 24))  # depth, nodes
MATCHES, LENGTHS = (1, 2, 3, 4), (2, 4, 6, 8, 12, 16)  # of copies


@dataclass(frozen=True)
class SizesConfig:
    out_dir: str | None = option(None, WHICH_RUN)
    num_prompts: int = option(30, "validation texts, without loops, of each kind", least=1)
    max_new_tokens: int = option(128, "tokens of each", least=16)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to decode in", choices=["auto", "float32", "bfloat16"])


@dataclass(frozen=True)
class Texts:
    """The settings of one kind of text, for study/prompts.py."""

    num_prompts: int
    max_new_tokens: int
    temperature: float
    seed: int = 0
    split: str = "valid"
    prompts_file: str | None = None

    @property
    def request(self) -> dict:
        return {"max_new_tokens": self.max_new_tokens, "temperature": self.temperature}


def free_prompts(asked: Texts, folder, target, encoding) -> list[Prompt]:
    """Prompts whose text, written by the target alone, does not end in a loop."""
    held_out = held_out_text(target.about, asked.split)
    candidates = load_prompts(asked, folder, target, held_out, encoding)
    check_prompts(asked, target, max(CHAINS), candidates)
    prompts, _ = choose_prompts(asked, target, candidates)
    prompts = [prompt for prompt in prompts if not is_loop(prompt.plain)]
    if not prompts:
        raise UserError("every text ends in a loop: there is nothing to measure with")
    return prompts


def plain_texts(asked: Texts, folder, target, encoding) -> tuple[list[PlainText], Sampler]:
    """Texts that the target wrote alone and that do not end in loops, and a sampler for replays."""
    return read_texts(asked, target, free_prompts(asked, folder, target, encoding))


def read_texts(asked: Texts, target, prompts: list) -> tuple[list[PlainText], Sampler]:
    """The texts after these prompts, ready for replays, and a sampler."""
    sampler, texts = Sampler(target.embed.weight.device, asked.temperature, seed=0), []
    for prompt in prompts:
        room = min(asked.max_new_tokens, target.config.context - len(prompt.tokens))
        texts.append(PlainText.read(target, prompt.tokens, prompt.plain, room, sampler))
    return texts, sampler


def plans_of(head, target) -> dict:
    """Every size that this head can draft, alone and after copies: {(gamma, nodes, lookup): plan}.

    And copies without it, and nothing: gamma 0.
    """
    most = min(head.max_draft or max(CHAINS), target.config.context - 4)
    sizes = [(g, n) for g, n in [*((g, 0) for g in CHAINS), *TREES] if g <= most]
    alone = {(0, 0): Chain(0)} | {size: plan_draft(head, *size, target) for size in sizes}
    plans = {(*size, 0): plan for size, plan in alone.items()}
    plans |= {(*size, MATCH): CopyFirst(Lookup(), plan) for size, plan in alone.items()}
    return plans | {(0, 0, m): CopyFirst(Lookup(m), alone[0, 0]) for m in MATCHES}


def copies_of(plan) -> dict:
    """Copies of each length, and for each match, else `plan`: {(length, match): plan}."""
    return {(n, m): CopyFirst(Lookup(m, n), plan) for n in LENGTHS for m in MATCHES}


def taus_along(texts: list, head, plans: dict, sampler) -> dict:
    """{name of a plan: (tau, the share of its cycles that copy)}."""
    sums = {name: np.zeros(3) for name in plans}
    for text in texts:
        for name, found in replay(head, plans, text, sampler).items():
            sums[name] += found.written, found.cycles, found.copied
    return {name: tuple((s[[0, 2]] / max(1e-9, s[1])).tolist()) for name, s in sums.items()}


def speeds_of_copies(taus: dict, gamma: int, costs: tuple) -> list[list]:
    """Rows of length, match, tau, share of cycles that copy, predicted speedup."""
    rows = []
    for (length, match), known in taus.items():
        speedup = reckon((gamma, 0, match), known, *costs, length).speedup
        rows.append([length, match, *known, speedup])
    return rows


def main() -> None:
    config = parse(SizesConfig, about=__doc__)
    folder, begin = find_run(config.out_dir), time.monotonic()
    names = in_order(trained_heads(folder))
    if not names:
        raise UserError(f"there is no trained head in {folder}: train one with python train.py")
    path = result_file(folder, SIZES)
    target, _, encoding = load(folder, None, config.device, config.dtype)
    heads = load_heads(folder, names, target)
    found = {name: {"weights": fingerprint(head), "lookup": {}} for name, head in heads.items()}
    copies = {}
    for temperature in (0.0, 1.0):
        kind = kind_of(temperature)
        asked = Texts(config.num_prompts, config.max_new_tokens, temperature)
        texts, sampler = plain_texts(asked, folder, target, encoding)
        alone = taus_along(texts, None, copies_of(Chain(0)), sampler)
        for name, head in heads.items():
            plans = plans_of(head, target)
            taus = taus_along(texts, head, plans, sampler)
            gamma = min(GAMMA, max(gamma for gamma, *_ in plans))
            beside = taus_along(texts, head, copies_of(plans[gamma, 0, 0]), sampler)
            costs = size_costs(target, head, [*plans], temperature)
            usual = fastest({(gamma, 0, m): taus[gamma, 0, m] for m in (0, MATCH)}, *costs)
            found[name][kind] = [[*size, *known] for size, known in taus.items()]
            found[name]["lookup"][kind] = usual.lookup
            copies[f"{name}, {kind}"] = speeds_of_copies(beside, gamma, costs)
            best = fastest(taus, *costs)
            told = f"usual draft here {usual}; fastest {best}"
            print(f"{name}, {len(texts)} {kind} texts: {told}", flush=True)
        # Their passes are the target's alone: those measured beside the last head.
        copies[f"alone, {kind}"] = speeds_of_copies(alone, 0, costs)
    device = describe_device(target.embed.weight.device)
    write_json(path, found | {"copies": copies, "costs from": origin() | {"device": device}})
    print(f"written: {path} in {(time.monotonic() - begin) / 60:.1f} min")


if __name__ == "__main__":
    run(main)
