"""Targets of other real depths: half and twice the layers of the small one, for study/depth.py.

A padded target has the costs of a deeper one and the texts of its own. Is that how a target behaves
whose layers all do something? Two are trained:

    half    from scratch, by the recipe of the run's own target
    twice   its trained layers stacked twice (Gong et al., "Efficient Training of BERT by
            Progressively Stacking", ICML 2019), then trained on

The latter counts only if its layers earn their place: it has to end below the target's own layers,
trained on alike, in bits per byte of held-out text. What remains without its upper half tells how
much that half does.
"""

import shutil
from dataclasses import replace
from functools import partial

import torch

from model import GPT
from plumbing.files import only_writer
from plumbing.machine import choose_autocast, choose_device
from recipe import target_settings
from study.ablation import AblationConfig, recipe_of, text_of
from study.prompts import MARKED
from targets.loading import target_file
from targets.runs import get_target, load_target, settings_of
from targets.small import bits_per_byte, fit_target

ON_TOKENS = 1_000_000  # that the stacked layers, and the own ones, are trained on, by AdamW
ON_RATE = 1e-3  # their peak learning rate: a quarter of that from scratch


def with_layers(target: GPT, layers: list[int]) -> GPT:
    """A trainable target of these layers of another, counted from 0, in this order."""
    deep = GPT(replace(target.config, num_layers=len(layers)))
    deep.load_state_dict(target.state_dict(), strict=False)  # but for the layers, below
    for block, layer in zip(deep.blocks, layers):
        block.load_state_dict(target.blocks[layer].state_dict())
    return deep.to(target.embed.weight.device)


def real_targets(run_folder, folder, device: str) -> dict:
    """{"runs": {layers: name of the run in `folder` with that target}, "bits": per byte, of all}.

    Trained where they are not there yet, as heads are: in the faster dtype.
    """
    path, where = target_file(run_folder), choose_device(device)
    target, checkpoint = load_target(path, where)
    asked = AblationConfig(device=device)
    recipe = recipe_of(asked, run_folder, settings_of(path, checkpoint))
    text, autocast = text_of(recipe, path, checkpoint), choose_autocast(recipe.dtype, where)
    count = len(target.blocks)
    settings = target_settings(recipe) | {"text": text.description["hash"]}
    held_out = text.windows("valid", target.config.context + 1).long().to(where)
    byte_counts = text.byte_counts.to(where)

    def bits(model: GPT) -> float:
        return bits_per_byte(model, held_out, byte_counts, autocast)

    def trained(name: str, model: GPT, tokens: int, rate: float, optimizer: str) -> GPT:
        to = folder / name / "target.pt"
        to.parent.mkdir(parents=True, exist_ok=True)
        if (marked := run_folder / MARKED).is_file():  # its benchmarks decode the same prompts
            shutil.copy(marked, to.parent)
        new = {"target_layers": len(model.blocks), "target_tokens": tokens, "target_lr": rate}
        how = dict(tokens=tokens, learning_rate=rate, autocast=autocast, known_by=settings | new)
        how |= dict(batch_tokens=recipe.batch_tokens, optimizer=optimizer)
        make = partial(fit_target, to, text, model, recipe.seed, **how)
        with only_writer(to.parent):
            get_target(to, settings | new, make, text)
        return load_target(to, where)[0]

    torch.manual_seed(recipe.seed)
    half = GPT(replace(target.config, num_layers=max(1, count // 2)))
    stacked = with_layers(target, [*range(count)] * 2)
    found = {"own": bits(target), "stacked": bits(stacked)}
    # From scratch by what the run's own target learnt with, whichever is fast here.
    from_scratch = recipe.target_tokens, recipe.target_lr, checkpoint["training"]["optimizer"]
    half = trained("half", half, *from_scratch)
    own = trained("own", with_layers(target, [*range(count)]), ON_TOKENS, ON_RATE, "adamw")
    twice = trained("twice", stacked, ON_TOKENS, ON_RATE, "adamw")
    found |= {"half": bits(half), "own, trained on": bits(own), "twice": bits(twice)}
    found["twice, lower half alone"] = bits(with_layers(twice, [*range(count)]))
    runs = {str(len(half.blocks)): "half"}
    if found["twice"] < found["own, trained on"]:
        runs[str(2 * count)] = "twice"
    return {"runs": runs, "bits": found}
