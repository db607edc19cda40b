"""The settings of train.py, one table: default, meaning, range, and whose each one is.

`of` names the files in which a setting is recorded, the target's or each head's; its group is a
section of --help. A recorded setting has to be the same when a second command goes on with that
file. A `hidden` one has no flag: presets, study/ and Python set it.
"""

import re
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import torch

from costs import DRAFT_POSITIONS, RANKS
from draft_head import KINDS
from model import GPTConfig
from plumbing.cli import UserError, check_ranges, option

KOALA_WEIGHT = 0.1  # lambda
HEADS = ("medusa", "medusa-koala", "eagle", "eagle-koala")  # the original ones, and KOALA's
LAB = ("eagle", "eagle-k2")  # one layer and two, without a discriminator
WRITTEN_WINDOW = 128  # tokens of a text that the target writes: a small one repeats itself later on

# The defaults below are those of `cpu`; README has its minutes and memory on two cores. The preset
# with --target is `pretrained`: a run of about two hours for SmolLM2's EAGLE heads on two cores of
# an Intel Xeon with AMX.
PRESETS = {
    "cpu": {},
    "lab": dict(head_data_tokens=500_000, head_tokens=1_400_000),
    "smoke": dict(target_vocab=512, target_context=128, target_layers=2, target_width=64)
    | dict(target_heads=2, target_mlp_width=128, target_tokens=250_000, batch_tokens=2048)
    | dict(head_data_tokens=65_000, written_tokens=24_000, head_tokens=130_000)
    | dict(discriminator_steps=10),
    "gpu": dict(target_vocab=8192, target_context=1024, target_layers=24, target_width=768)
    | dict(target_heads=12, target_mlp_width=2048, target_tokens=400_000_000, target_lr=6e-4)
    | dict(head_data_tokens=1_000_000, written_tokens=4_000_000, head_tokens=40_000_000)
    | dict(batch_tokens=65_536),
    "pretrained": dict(target_context=2048, head_window=384, head_data="self", batch_tokens=3072)
    | dict(written_tokens=2_100_000, head_tokens=10_000_000, draft_vocab=4096)
    | dict(own_steps=3, own_from=0.85, joint_from=0.85, discriminator_steps=100),
}

# One name for each owner: `of_target(4, ..)` is a setting of the target.
of_run = partial(option, group="run", of=())
of_both = partial(option, group="run", of=("target", "head"))
of_target = partial(option, group="target", of=("target",))
of_data = partial(option, group="data", of=("head",))
of_head = partial(option, group="head", of=("head",))
of_d = partial(option, group="discriminator", of=("head",))
named = partial(option, group="head", of=())  # recorded by head_settings, as K and lambda
hidden = dict(flag=False)


@dataclass(frozen=True)
class TrainConfig:
    preset: str = of_run(
        "cpu",
        "sizes and amounts; pretrained: for --target; lab: heads in minutes, beside the target "
        "that came with the code",
        choices=[*PRESETS],
    )
    out_dir: str | None = of_run(None, "the run's folder; default: out/PRESET, or out/TARGET")
    seed: int = of_both(0, "decides weights, batches, noise", least=0, most=2**31 - 1)
    batch_tokens: int = of_both(4096, "tokens in a training step", above=0)
    device: str = of_run("auto", "auto, cpu or cuda")
    dtype: str = of_run("auto", "to compute in", choices=["auto", "float32", "bfloat16"])

    target: str | None = of_target(
        None, "a pretrained one: smollm2, a GGUF file, a folder with safetensors", of=()
    )
    target_vocab: int = of_target(2048, "tokens in the vocabulary", least=257)  # bytes, end of text
    target_context: int = of_target(512, "window in tokens", least=2 * DRAFT_POSITIONS)
    target_layers: int = of_target(16, "layers; the more, the cheaper is a draft layer", above=0)
    target_width: int = of_target(256, "width of a hidden state", above=0)
    target_tokens: int = of_target(2_600_000, "tokens to train on, repeats included", above=0)
    target_heads: int = of_target(4, "attention heads", above=0, **hidden)
    target_mlp_width: int = of_target(704, "width of a layer's MLP", above=0, **hidden)
    target_lr: float = of_target(4e-3, "peak learning rate", above=0, **hidden)
    optimizer: str = of_run("auto", "adamw, muon; auto: muon unless bfloat16 is slow", **hidden)

    data: list[str] | None = of_data(
        None, "UTF-8 files or folders; default: Python's own", of=("target", "head"), nargs="+"
    )
    head_data: str = of_data(
        "auto",
        "corpus, the text; self, the target's own writing; auto: self for Medusa, which learns "
        "tokens, corpus for EAGLE, which learns p",
        choices=["auto", "corpus", "self"],
    )
    head_data_tokens: int = of_data(1_600_000, "tokens of the corpus to learn from", above=0)
    written_tokens: int = of_data(900_000, "tokens to write, openings included", above=0)
    head_window: int | None = of_data(
        None,
        f"tokens of each text; default: the target's, {WRITTEN_WINDOW} of its own writing",
        least=2 * DRAFT_POSITIONS,
    )

    head: str | None = named(None, "only this: medusa[-NAME], eagle[-NAME]; none: the target only")
    layers: int | None = named(None, "K; default: 1, 2 for ..-koala.., 3 for ..-k3..", above=0)
    init: str | None = of_head(None, "file of a head to start from")
    head_tokens: int = of_head(3_200_000, "tokens to train on, repeats included", above=0)
    head_lr: float = of_head(2e-3, "peak learning rate", above=0)
    draft_vocab: int = of_head(0, "S, tokens it can guess, the most frequent; 0: all", least=0)
    own_steps: int = of_head(
        1, "draft positions that EAGLE trains on", least=1, most=2 * DRAFT_POSITIONS
    )
    own_from: float = of_head(
        0.6, "share of steps with one draft position, before own_steps", least=0, most=1, **hidden
    )
    feature_weight: float = of_head(1.0, "weight of states in EAGLE's loss", least=0, **hidden)
    labels: str = of_head(
        "own",
        "soft, the target's p; hard, the text's tokens; none; own: the kind's, soft for EAGLE",
        choices=["own", "soft", "hard", "none"],
        **hidden,
    )
    head_mlp_width: int = of_head(0, "of EAGLE's MLPs; 0: the target's", least=0, **hidden)

    adversarial_weight: float | None = named(
        None, f"lambda; default: 0, and {KOALA_WEIGHT} for ..-koala..", least=0
    )
    discriminator: str = of_d(
        "learnt",
        "exact: the closed form; blind: sees what the head sees, and the text's tokens, never p; "
        "difference: sees h+ less the head's guess",
        choices=["learnt", "exact", "blind", "difference"],
    )
    joint_from: float = of_d(0.6, "share of steps before the joint part", least=0, most=1)
    discriminator_steps: int = of_d(200, "steps of D alone before the joint part", least=0)
    discriminator_lr: float = of_d(1e-3, "peak learning rate; falls with the head's", above=0)

    def __post_init__(self):
        check_ranges(self)
        if self.head is not None and self.head != "none":
            if self.head.split("-")[0] not in KINDS or "/" in self.head:
                raise UserError(f"unknown head {self.head!r}: name it medusa-... or eagle-...")
        elif (self.layers, self.adversarial_weight, self.init) != (None, None, None):
            raise UserError("--layers, --adversarial_weight and --init need --head, their head")
        if 0 < self.draft_vocab < RANKS:
            raise UserError(f"--draft_vocab must be 0 (all tokens) or at least {RANKS}")
        if (self.head_window or 0) > self.target_context:
            raise UserError(f"--head_window {self.head_window} is beyond --target_context")
        if self.window <= self.own_steps:
            raise UserError(f"--own_steps {self.own_steps} need longer windows (--head_window)")
        if (self.preset == "pretrained") != (self.target is not None):
            raise UserError("--preset pretrained and --target go together")
        if self.target is not None and self.head == "none" and self.data:
            raise UserError("--head none reads no --data where the target is pretrained")

    @property
    def folder(self) -> Path:
        name = self.preset
        if self.target is not None:  # "Llama-3.1-8B" has no suffix that could be cut off
            name = Path(self.target).resolve().name.lower().removesuffix(".gguf")
        return Path(self.out_dir or f"out/{name}")

    @property
    def heads(self) -> list[str]:
        """The heads to train: beside a pretrained target EAGLE's, as Medusa's gain less there."""
        if self.head is not None:
            return [] if self.head == "none" else [self.head]
        if self.preset == "lab":
            return [*LAB]
        return [name for name in HEADS if self.target is None or name.startswith("eagle")]

    @property
    def needs_text(self) -> bool:
        return self.target is None or bool(self.data) or self.head_data != "self"

    @property
    def window(self) -> int:
        return self.head_window or self.target_context

    @property
    def windows_per_step(self) -> int:
        return max(1, self.batch_tokens // self.window)

    def gpt(self) -> GPTConfig:
        """The shape of the small target."""
        sizes = self.target_vocab, self.target_context, self.target_layers, self.target_width
        return GPTConfig(*sizes, self.target_heads, self.target_heads, self.target_mlp_width)

    def of_head(self, name: str) -> "TrainConfig":
        """The settings of the head of this name: its data and window, where they are left open."""
        data, window = self.head_data, self.head_window
        if self.target and self.data:  # text that is given to a pretrained target counts
            data = "corpus"
        elif data == "auto":
            data = "self" if name.startswith("medusa") else "corpus"
        if data == "self" and window is None:
            window = min(WRITTEN_WINDOW, self.target_context)
        return replace(self, head_data=data, head_window=window)

    def layers_and_weight(self, name: str) -> tuple[int, float]:
        """(K, lambda) of the head of this name."""
        layers, weight = (2, KOALA_WEIGHT) if "koala" in name.lower().split("-") else (1, 0.0)
        if numbered := re.search(r"-k([1-9]\d*)(-|$)", name.lower()):
            layers = int(numbered[1])
        layers = layers if self.layers is None else self.layers
        return layers, weight if self.adversarial_weight is None else self.adversarial_weight


def in_order(names: list[str]) -> list[str]:
    """The names of heads, the four of the recipe first and in its order."""
    return sorted(names, key=lambda name: HEADS.index(name) if name in HEADS else len(HEADS))


def usual_preset(argv: list[str]) -> str:
    """The preset of a command line that names none.

    One more head goes beside your own target. Where there is none, training one would take an hour:
    the head then goes beside the target that came with the code.
    """
    words = [word.partition("=")[0] for word in argv]
    if "--target" in words:
        return "pretrained"
    usual, others = "gpu" if torch.cuda.is_available() else "cpu", ("--target_", "--data")
    head = re.search(r"--head[= ](\S+)", " ".join(argv))
    elsewhere = any(word.startswith(others) or word == "--out_dir" for word in words)
    if head is None or head[1] == "none" or elsewhere:
        return usual
    # Begun there, finished or not: the same command goes on there.
    begun = any(Path(f"out/lab/{head[1]}{end}").is_file() for end in (".pt", ".progress.pt"))
    return usual if Path(f"out/{usual}/target.pt").is_file() and not begun else "lab"


def recorded(config: TrainConfig, owner: str) -> dict:
    """The settings that the file of this owner records, "target" or "head"."""
    of = {field.name: field.metadata["about"]["of"] for field in fields(config)}
    return {name: value for name, value in asdict(config).items() if owner in of[name]}


def target_settings(config: TrainConfig) -> dict:
    """The settings that a target has to have been made with; a pretrained one has its own shape."""
    if config.target is not None:
        return {"target_context": config.target_context}
    known = recorded(config, "target")
    if config.preset == "lab":  # it was made before; its heads may have these of their own
        known = {k: v for k, v in known.items() if k not in ("seed", "batch_tokens")}
    return known


def head_settings(config: TrainConfig, name: str, target_print: str) -> dict:
    """The settings that this head has to have been made with; `config` is that `of_head`."""
    layers, weight = config.layers_and_weight(name)
    unused = {"head_data_tokens" if config.head_data == "self" else "written_tokens"}
    unused |= {"labels"} if config.labels == "own" else set()  # older heads know of no other
    if weight == 0:
        unused |= {"discriminator", "discriminator_steps", "discriminator_lr", "joint_from"}
    known = {k: v for k, v in recorded(config, "head").items() if k not in unused}
    return known | {"layers": layers, "adversarial_weight": weight, "target": target_print}
