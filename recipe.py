"""The recipe of a run: every setting of train.py, and the presets that change several at once.

One frozen dataclass is the command line of train.py, its help, and the record in each checkpoint
that tells whether a second command goes on with the same run.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cli import UserError, option
from draft_head import KINDS
from features import DRAFT_POSITIONS, RANKS, Text
from model import GPTConfig

# name -> (K, lambda): the original heads, and KOALA's.
HEADS = {
    "medusa": (1, 0.0),
    "medusa-koala": (2, None),
    "eagle": (1, 0.0),
    "eagle-koala": (2, None),
}

# What `cpu` (the defaults below) costs on two cores is in README.
PRESETS = {
    "cpu": {},
    "smoke": dict(
        vocab_size=512,
        context=128,
        num_layers=2,
        width=64,
        attention_heads=2,
        mlp_width=128,
        target_tokens=250_000,
        head_data_tokens=65_000,
        written_tokens=24_000,
        head_tokens=130_000,
        batch_tokens=2048,
        discriminator_steps=10,
    ),
    "gpu": dict(
        vocab_size=8192,
        context=1024,
        num_layers=24,
        width=768,
        attention_heads=12,
        mlp_width=2048,
        target_tokens=400_000_000,
        target_lr=6e-4,
        head_data_tokens=1_000_000,
        written_tokens=4_000_000,
        head_tokens=40_000_000,
        batch_tokens=65_536,
    ),
}

WRITTEN_WINDOW = 128  # tokens of a text that the target writes

# Beside a target from elsewhere (--target): for two CPU cores, but a GPU does more in the minutes.
PRETRAINED = dict(
    context=2048,
    window=384,
    head_data="self",
    draft_vocab=4096,
    own_steps=3,
    own_from=0.85,
    supervised_share=0.85,
    batch_tokens=3072,
    discriminator_steps=100,
    minutes=90.0,
)


@dataclass(frozen=True)
class TrainConfig:
    preset: str = option(
        "cpu",
        "smoke: a minute, for tests; cpu: a laptop; gpu: a CUDA GPU; pretrained: for --target",
    )
    target: str | None = option(
        None, "a pretrained target: smollm2, a GGUF file, or a folder with safetensors"
    )
    minutes: float | None = option(
        None, "for all heads and their data; the amounts of both then follow from it"
    )
    more: bool = option(False, "go on with trained heads: write more data, train them further")
    stage: str = option("all", "what to train", choices=["target", "heads", "all"])
    out_dir: str | None = option(None, "the run's folder; default: out/PRESET, or out/TARGET")
    head: str | None = option(
        None, "train this head only: medusa, eagle, medusa-NAME or eagle-NAME"
    )
    layers: int | None = option(None, "K, the head's layers; default: 1, and 2 for ...-koala")
    adversarial_weight: float | None = option(None, "lambda; default: 0, see koala_weight")
    koala_weight: float = option(0.1, "lambda of the heads named ...-koala")
    discriminator: str = option(
        "learnt",
        "learnt: a judge of tokens; exact: its closed form; window: of runs of EAGLE's own guesses",
        choices=["learnt", "exact", "window"],
    )
    data: list[str] | None = option(
        None, "UTF-8 files or folders instead of the default", nargs="+"
    )
    tokenizer: str = option(
        "bpe",
        "bpe: learnt from the text; gpt2: tiktoken's own, fetched by it",
        choices=["bpe", "gpt2"],
    )
    vocab_size: int = option(2048, "tokens to learn")
    context: int = option(512, "window, in tokens")
    num_layers: int = option(
        16, "of the target; the deeper, the cheaper is a draft layer beside it"
    )
    width: int = option(256, "of the target")
    attention_heads: int = option(4, "of the target")
    mlp_width: int = option(704, "of the target")
    target_tokens: int = option(2_600_000, "tokens the target trains on, repeats included")
    target_lr: float = option(4e-3, "peak learning rate of the target")
    optimizer: str = option(
        "auto",
        "of the target; auto: muon unless bfloat16 is slow here",
        choices=["auto", "muon", "adamw"],
    )
    head_data: str = option(
        "auto",
        "what heads learn from: corpus, the text; self, what the target writes itself; auto: self "
        "for Medusa, which learns the tokens of its text, corpus for EAGLE, which learns p",
        choices=["auto", "corpus", "self"],
    )
    window: int | None = option(
        None,
        "tokens of each text they learn from; default: --context, or for what the target writes "
        f"{WRITTEN_WINDOW}, since a small one repeats itself later on",
    )
    head_data_tokens: int = option(1_600_000, "of the corpus, to learn from")
    written_tokens: int = option(
        900_000, "for the target to write, to learn from; with what it goes on from"
    )
    head_tokens: int = option(3_200_000, "tokens each head trains on, repeats included")
    draft_vocab: int = option(0, "tokens that a head can guess, the most frequent ones; 0: all")
    own_steps: int = option(1, "draft positions that EAGLE is trained on, from its own guesses on")
    own_from: float = option(0.6, "share of the head's steps before that; on true states till then")
    head_lr: float = option(2e-3, "peak learning rate of a head")
    supervised: str = option(
        "paper",
        "loss of the supervised part: paper, or lk, which is closer to the rate of acceptance",
        choices=["paper", "lk"],
    )
    feature_weight: float = option(1.0, "in EAGLE's supervised loss, of guessing hidden states")
    head_mlp_width: int = option(0, "of EAGLE's layers; 0: that of the target's")
    supervised_share: float = option(0.6, "of the head's steps before the discriminator joins")
    discriminator_steps: int = option(200, "of D alone before it joins")
    discriminator_lr: float = option(1e-3, "of D; it falls with the head's")
    batch_tokens: int = option(4096, "tokens a step")
    cache_gb: float = option(2.0, "hidden states kept in memory; recomputed beyond that")
    seed: int = option(0, "of weights, batches and noise")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("auto", "to compute in", choices=["auto", "float32", "bfloat16"])
    compile: bool = option(False, "torch.compile the target for its training")

    def __post_init__(self):
        if self.head is not None and (self.head.split("-")[0] not in KINDS or "/" in self.head):
            raise UserError(f"unknown head {self.head!r}: name it medusa-... or eagle-...")
        if self.head is None and (self.layers, self.adversarial_weight) != (None, None):
            raise UserError("--layers and --adversarial_weight need --head, the head they are for")
        positive = ("layers", "vocab_size", "context", "num_layers", "width", "attention_heads")
        positive += (
            "mlp_width",
            "target_tokens",
            "head_data_tokens",
            "written_tokens",
            "head_tokens",
            "batch_tokens",
            "window",
            "minutes",
            "own_steps",
        )
        positive += ("target_lr", "head_lr", "discriminator_lr")
        for name in positive:
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be above 0")
        unsigned = ("adversarial_weight", "koala_weight", "cache_gb", "discriminator_steps")
        for name in (*unsigned, "draft_vocab", "feature_weight", "head_mlp_width"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} is {getattr(self, name)}, it must be 0 or more")
        if 0 < self.draft_vocab < RANKS:
            raise UserError(f"--draft_vocab must be 0 (all tokens) or at least {RANKS}")
        if self.vocab_size < 257:
            raise UserError("--vocab_size must be at least 257: every byte, and the end of text")
        for name in ("supervised_share", "own_from"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} is {getattr(self, name)}, it must lie between 0 and 1")
        if not 0 <= self.seed < 2**31:
            raise UserError(f"--seed is {self.seed}, it must lie between 0 and 2^31 - 1")
        if min(self.context, self.head_window) < 2 * DRAFT_POSITIONS:
            raise UserError(f"--context and --window must be at least {2 * DRAFT_POSITIONS}")
        if self.head_window > self.context:
            raise UserError(f"--window {self.window} is beyond the target's --context")
        if self.own_steps > DRAFT_POSITIONS * 2:
            raise UserError(f"--own_steps must be at most {DRAFT_POSITIONS * 2}")
        if self.discriminator == "window" and not (
            self.own_steps > 1 and self.own_from <= self.supervised_share
        ):
            raise UserError(
                "--discriminator window judges the head's own guesses: give --own_steps 2 or more, "
                "and an --own_from that is not above --supervised_share"
            )
        if (self.preset == "pretrained") != (self.target is not None):
            raise UserError("--preset pretrained and --target go together")
        if self.target is not None and self.stage == "target" and self.data:
            raise UserError("--stage target reads no --data where the target is pretrained")

    @property
    def folder(self) -> Path:
        name = self.preset
        if self.target is not None:  # "Llama-3.1-8B" has no suffix that could be cut off
            name = Path(self.target).resolve().name.lower().removesuffix(".gguf")
        return Path(self.out_dir or f"out/{name}")

    @property
    def head_window(self) -> int:
        return self.window or self.context

    @property
    def head_windows_per_step(self) -> int:
        return max(1, self.batch_tokens // self.head_window)

    @property
    def head_tokens_per_step(self) -> int:
        return self.head_windows_per_step * self.head_window

    def head_vocab(self, target) -> int:
        """S of a head for this target; 0 where that is all it has."""
        return self.draft_vocab if self.draft_vocab < target.config.vocab_size else 0

    def of_head(self, name: str) -> "TrainConfig":
        """What the head of this name learns from, and in which windows, where that is left open."""
        data, window = self.head_data, self.window
        if self.target and self.data:  # text that is given to a pretrained target counts
            data = "corpus"
        elif data == "auto":
            data = "self" if name.startswith("medusa") else "corpus"
        if data == "self" and window is None:
            window = min(WRITTEN_WINDOW, self.context)
        return replace(self, head_data=data, window=window)

    @property
    def needs_text(self) -> bool:
        return self.target is None or bool(self.data) or self.head_data != "self"

    def gpt(self, vocab_size: int) -> GPTConfig:
        return GPTConfig(
            vocab_size=vocab_size,
            context=self.context,
            num_layers=self.num_layers,
            width=self.width,
            num_heads=self.attention_heads,
            num_kv_heads=self.attention_heads,
            mlp_width=self.mlp_width,
        )

    def layers_and_weight(self, name: str) -> tuple[int, float]:
        """(K, lambda) of the head of this name."""
        layers, weight = HEADS.get(name, (2, None) if name.endswith("-koala") else (1, 0.0))
        if self.layers is not None:
            layers = self.layers
        if self.adversarial_weight is not None:
            return layers, self.adversarial_weight
        return layers, self.koala_weight if weight is None else weight


# What may differ between two commands that go on with the same run.
FREE = {"preset", "stage", "out_dir", "head", "layers", "adversarial_weight", "device", "dtype"}
FREE |= {"compile", "cache_gb", "optimizer"}  # each file records what it used of these
FREE |= {"minutes", "more"}
OF_HEADS = {"koala_weight", "discriminator", "head_data_tokens", "head_tokens", "head_lr"}
OF_HEADS |= {"head_data", "written_tokens", "window", "draft_vocab", "own_steps", "own_from"}
OF_HEADS |= {"supervised", "feature_weight", "head_mlp_width"}
OF_HEADS |= {"supervised_share", "discriminator_steps", "discriminator_lr"}


def settings(config: TrainConfig, leave_out: set[str]) -> dict:
    return {k: v for k, v in asdict(config).items() if k not in leave_out}


def text_packages(settings: dict) -> tuple[str, ...]:
    """The installed packages whose sources the default text includes: a large vocabulary has
    a large model behind it, and that wants more text than the standard library has."""
    return ("torch", "numpy", "matplotlib") if settings["vocab_size"] >= 8192 else ()


def head_settings(config: TrainConfig, name: str, target_print: str) -> dict:
    """What this head is known by; `config` is that `of_head`."""
    layers, weight = config.layers_and_weight(name)
    own = {"layers": layers, "adversarial_weight": weight, "target": target_print}
    unused = {"koala_weight"}  # it is in adversarial_weight already
    unused |= {"head_data_tokens" if config.head_data == "self" else "written_tokens"}
    if config.minutes is not None:
        unused |= {"head_tokens", "written_tokens"}  # as many as there was time for: budget.py
    if weight == 0:
        unused |= {"discriminator", "discriminator_steps", "discriminator_lr", "supervised_share"}
    return settings(config, FREE | unused) | own


def target_settings(config: TrainConfig, text: Text | None) -> dict:
    if config.target is not None:
        return {"context": config.context}  # what it is, its own file says
    return settings(config, FREE | OF_HEADS) | {"text": text.description["hash"]}
