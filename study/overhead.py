"""What K layers cost besides time at decoding: parameters, keys and values, memory, training.

The founding question of a head with more layers is what they bring, and the next what they take.
For each kind of head, with one, two and three layers:

    parameters        of the head alone, and as a share of the target's
    keys and values   bytes for each token of the text, beside the target's own; Medusa keeps none
    memory            that it holds while it decodes: weights, keys and values of a whole window
    training step     seconds of one joint step on a batch of the recipe, without D and with a
                      learnt one, medians; all kinds take turns

Nothing of it depends on what was learnt: the heads are untrained. `python -m study.overhead` writes
overhead.json to the run's folder.
"""

import statistics
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch

from plumbing.cli import option, parse, run
from plumbing.files import write_json
from plumbing.machine import choose_autocast, describe_device, keep_heap, origin, synchronized_time
from recipe import KOALA_WEIGHT
from study.ablation import AblationConfig, recipe_of
from study.report import overhead_table
from targets.features import Features, evenly
from targets.loading import WHICH_RUN, find_run, load, result_file, target_file
from targets.runs import settings_of
from targets.text import Text
from train import new_training

LAYERS = (1, 2, 3)
KINDS = ("eagle", "medusa")


@dataclass(frozen=True)
class OverheadConfig:
    out_dir: str | None = option(None, WHICH_RUN)
    steps: int = option(5, "of training that are timed, after one that is not", least=1)
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option(
        "auto", "to decode and to train in", choices=["auto", "float32", "bfloat16"]
    )


def cache_bytes(config, layers: int, dtype: torch.dtype) -> int:
    """Of the keys and values of one token."""
    return 2 * layers * config.num_kv_heads * config.head_dim * dtype.itemsize


def held_bytes(module, cache_bytes: int, context: int, dtype: torch.dtype) -> int:
    """Of its weights, and of the keys and values of a whole window; passes add little.

    (A process's peak does not tell: it takes more to load a checkpoint.)
    """
    weights = sum(weight.numel() for weight in module.parameters())
    return weights * dtype.itemsize + context * cache_bytes


def trainings(recipe, target, autocast, windows: torch.Tensor) -> dict:
    """{(kind, K, has it a D): (its training, a batch)}."""
    data, found = Features(target, windows, nullcontext), {}
    for kind in KINDS:
        for layers in LAYERS:
            for weight in (0.0, KOALA_WEIGHT):
                one = dict(layers=layers, adversarial_weight=weight, head=f"{kind}-k{layers}")
                own = replace(recipe, **one).of_head(kind)
                training = new_training(own, kind, target, autocast)
                training.begin(data)
                training.head.train()
                batch = training.batch(data, torch.arange(len(data)), 0)
                found[kind, layers, weight > 0] = training, batch, own.own_steps
    return found


def step_seconds(trainings: dict, steps: int, device) -> dict:
    """The median seconds of a joint step of each; the first is not counted."""
    seconds = {name: [] for name in trainings}
    for _ in range(1 + steps):
        for name, (training, batch, own_steps) in trainings.items():
            begin = synchronized_time(device)
            training.joint_step(batch, "joint" if name[2] else "supervised", own_steps)
            seconds[name].append(synchronized_time(device) - begin)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    config = parse(OverheadConfig, about=__doc__)
    keep_heap()
    folder = find_run(config.out_dir, needs_head=False)
    target, _, _ = load(folder, None, config.device, config.dtype)
    path = result_file(folder, "overhead.json")
    device, dtype = target.embed.weight.device, target.embed.weight.dtype
    known = settings_of(target_file(folder), target.about)
    asked = AblationConfig(out_dir=config.out_dir, device=config.device, dtype=config.dtype)
    recipe, text = recipe_of(asked, folder, known), Text(None, (), ("valid",))
    text.use(target.about["tokenizer"])
    own = recipe.of_head("eagle")
    windows = evenly(text.windows("valid", own.window + 1), own.windows_per_step)
    autocast = choose_autocast(config.dtype, device)
    ready = trainings(recipe, target.float(), autocast, windows)
    seconds = step_seconds(ready, config.steps, device)

    of_target = sum(weight.numel() for weight in target.parameters())
    own_bytes = cache_bytes(target.config, target.config.num_layers, dtype)
    context, rows = target.config.context, []
    for kind in KINDS:
        for layers in LAYERS:
            head = ready[kind, layers, False][0].head
            kept = cache_bytes(target.config, layers, dtype) if kind == "eagle" else 0
            rows.append(
                {
                    "kind": kind,
                    "layers": layers,
                    "parameters": sum(weight.numel() for weight in head.parameters()),
                    "cache_bytes": kept,
                    "held_bytes": held_bytes(head, kept, context, dtype),
                    "step": seconds[kind, layers, False],
                    "step_with_d": seconds[kind, layers, True],
                }
            )
    result = origin() | {
        "device": describe_device(device),
        "dtypes": [str(d).removeprefix("torch.") for d in (dtype, autocast.dtype)],
        "config": asdict(config),
        "target": {
            "parameters": of_target,
            "cache_bytes": own_bytes,
            "held_bytes": held_bytes(target, own_bytes, context, dtype),
        },
        "batch_tokens": windows[:, :-1].numel(),
        "overhead": rows,
    }
    write_json(path, result)
    print(f"{overhead_table(result)}\n\nwritten: {path}")


if __name__ == "__main__":
    run(main)
