"""What each size of draft brings: tau of chains and trees, along texts that the target wrote alone.

`python -m study.sizes` writes sizes.json beside a run's heads. By it `--gamma auto` and `--nodes
auto` choose: with the costs of a machine, tau gives the speed of each size there (costs.py). Until
then they reckon tau from a head's figures on held-out text. The texts here are those of validation
prompts, greedy ones and ones at temperature 1. Heads are replayed along them (`study.replay`), so
that nothing is decoded but the texts themselves.
"""

import time
from dataclasses import dataclass

from drafts import plan_draft
from plumbing.cli import UserError, option, parse, run
from plumbing.files import write_json
from recipe import in_order
from study.prompts import check_prompts, choose_prompts, held_out_text, load_prompts
from study.replay import Follower, PlainText, replay
from targets.loading import SIZES, WHICH_RUN, find_run, load, load_heads, results_folder
from targets.outputs import is_loop
from targets.runs import fingerprint, trained_heads

CHAINS = range(1, 9)
TREES = ((2, 8), (3, 8), (4, 8), (3, 16), (4, 16), (6, 16), (4, 24), (6, 24))  # depth, nodes


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


def plans_of(head, target) -> dict:
    """Every size that this head can draft: {(gamma, nodes): plan}."""
    most = min(head.max_draft or max(CHAINS), target.config.context - 4)
    sizes = [(g, 0) for g in CHAINS] + list(TREES)
    return {(g, n): plan_draft(head, g, n, target) for g, n in sizes if g <= most}


def main() -> None:
    config = parse(SizesConfig, about=__doc__)
    folder, begin, found = find_run(config.out_dir), time.monotonic(), {}
    names = in_order(trained_heads(folder))
    if not names:
        raise UserError(f"there is no trained head in {folder}: train one with python train.py")
    target, _, encoding = load(folder, None, config.device, config.dtype)
    heads = load_heads(folder, names, target)
    for kind, temperature in (("greedy", 0.0), ("sampled", 1.0)):
        asked = Texts(config.num_prompts, config.max_new_tokens, temperature)
        held_out = held_out_text(target.about, asked.split)
        candidates = load_prompts(asked, folder, target, held_out, encoding)
        check_prompts(asked, target, max(CHAINS), candidates)
        prompts, _ = choose_prompts(asked, target, candidates)
        prompts = [prompt for prompt in prompts if not is_loop(prompt.plain)]
        if not prompts:
            raise UserError("every text ends in a loop: there is nothing to measure with")
        sampler, texts = Follower(target.embed.weight.device, temperature, seed=0), []
        for prompt in prompts:
            room = min(config.max_new_tokens, target.config.context - len(prompt.tokens))
            texts.append(PlainText.read(target, prompt.tokens, prompt.plain, room, sampler))
        for name, head in heads.items():
            plans = plans_of(head, target)
            sums = {size: [0.0, 0.0] for size in plans}
            for text in texts:
                for size, one in replay(head, plans, text, sampler).items():
                    sums[size][0] += one.written
                    sums[size][1] += one.cycles
            taus = [
                [*size, written / max(1e-9, cycles)] for size, (written, cycles) in sums.items()
            ]
            found.setdefault(name, {"weights": fingerprint(head)})[kind] = taus
            best = max(taus, key=lambda row: row[2])
            told = f"tau {taus[3][2]:.2f} as a chain of 4, {best[2]:.2f} at best"
            print(f"{name}, {len(texts)} {kind} texts: {told}", flush=True)
    path = results_folder(folder) / SIZES
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, found)
    print(f"written: {path} in {(time.monotonic() - begin) / 60:.1f} min")


if __name__ == "__main__":
    run(main)
