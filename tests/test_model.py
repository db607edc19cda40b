"""The target, its cache and its files; the draft heads before any training.

Speculative decoding is exact only if reading a text in pieces gives what reading it at once gives,
and a head learns the right thing only if its training form is the form it is decoded in. Neither
mistake crashes: both merely lower the acceptance, which is why they are tested in float64 here.
"""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from toys import draft_chain, logits_of, whole_batch

from draft_head import HeadConfig, build_head
from drafts import plan_draft
from model import GPT, GPTConfig, KVCache
from plumbing import files
from plumbing.cli import UserError
from plumbing.files import load_checkpoint
from sampling import Vocabulary
from targets.runs import fingerprint, load_head, load_target, save_head, save_target

CONFIG = GPTConfig(
    vocab_size=50, context=24, num_layers=2, width=24, num_heads=4, num_kv_heads=2, mlp_width=40
)
SHAPES = {
    "tied": CONFIG,
    "untied": replace(CONFIG, tied=False),
    "every head its own keys": replace(CONFIG, num_kv_heads=4),
    "one key for all": replace(CONFIG, num_kv_heads=1, rope_theta=100.0, norm_eps=1e-3),
}


def randomized(module: torch.nn.Module, seed: int = 0, size: float = 0.3) -> torch.nn.Module:
    """Weights large enough to matter; none of them is left at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(size * torch.randn(weight.shape, generator=generator))
    return module.eval()


def new_target(config: GPTConfig = CONFIG, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return randomized(GPT(config), seed).requires_grad_(False)


def some_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------- architecture


def reference_logits(target: GPT, tokens: list[int]) -> torch.Tensor:
    """The Llama architecture, one position and one head at a time -> logits (T, V)."""
    config, weights, half = target.config, target.state_dict(), target.config.head_dim // 2

    def norm(x, name):
        return x / (x.square().mean() + config.norm_eps).sqrt() * weights[name]

    def rotate(x, position):
        angle = position * config.rope_theta ** (-torch.arange(half) / half)
        x1, x2, cos, sin = x[:half], x[half:], angle.cos(), angle.sin()
        return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin])

    states = [weights["embed.weight"][token] for token in tokens]
    for layer in range(config.num_layers):
        names = ["qkv", "attention_out", "gate_up", "mlp_out"]
        qkv, out, gate_up, down = (weights[f"blocks.{layer}.{name}.weight"] for name in names)
        queries, keys, values = [], [], []  # [position][head]
        for position, x in enumerate(states):
            rows = (qkv @ norm(x, f"blocks.{layer}.attention_norm.weight")).split(config.head_dim)
            split = config.num_heads, config.num_heads + config.num_kv_heads
            queries.append([rotate(row, position) for row in rows[: split[0]]])
            keys.append([rotate(row, position) for row in rows[split[0] : split[1]]])
            values.append(rows[split[1] :])
        for position, x in enumerate(states):
            attended = []
            for head in range(config.num_heads):
                shared = head // (config.num_heads // config.num_kv_heads)
                seen = range(position + 1)
                scores = torch.stack([queries[position][head] @ keys[s][shared] for s in seen])
                share = (scores / config.head_dim**0.5).softmax(0)
                attended.append(sum(share[s] * values[s][shared] for s in seen))
            x = x + out @ torch.cat(attended)
            gate, up = (gate_up @ norm(x, f"blocks.{layer}.mlp_norm.weight")).chunk(2)
            states[position] = x + down @ (gate * torch.sigmoid(gate) * up)
    matrix = weights["embed.weight" if config.tied else "lm_head.weight"]
    return torch.stack([matrix @ norm(x, "norm.weight") for x in states])


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_the_model_is_the_llama_architecture(config, float64):
    target, tokens = new_target(config), some_tokens(2, 9)
    logits = target.lm_head(target(tokens))
    for row, sequence in zip(logits, tokens.tolist()):
        torch.testing.assert_close(row, reference_logits(target, sequence), rtol=0, atol=1e-10)


@pytest.mark.parametrize("cached", [False, True])
def test_a_later_token_changes_no_earlier_state(cached, float64):
    target, tokens = new_target(), some_tokens(1, 12)
    other = tokens.clone()
    other[0, 7] += 1
    first, second = (target(x, target.new_cache() if cached else None) for x in (tokens, other))
    assert torch.equal(first[:, :7], second[:, :7])
    assert (first[:, 7:] - second[:, 7:]).abs().amax(-1).min() > 1e-6


# -------------------------------------------------------------------------------------- cache


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 6], [1, 3, 2, 6], [11, 1]])
@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_reading_in_pieces_is_reading_at_once(config, pieces, batch, float64):
    """A single token takes another way through the attention, where heads share their keys."""
    target, tokens = new_target(config), some_tokens(batch, 12)
    cache = target.new_cache(12, batch=batch)
    states = torch.cat([target(piece, cache) for piece in tokens.split(pieces, dim=1)], dim=1)
    torch.testing.assert_close(states, target(tokens), rtol=0, atol=1e-12)
    assert cache.length == 12


def test_what_was_rolled_back_leaves_no_trace(float64):
    target, kept = new_target(), []
    cache, generator = target.new_cache(), torch.Generator().manual_seed(3)
    for trial in range(60):
        length = int(torch.randint(0, len(kept) + 1, (), generator=generator))
        cache.rollback(length)
        count = int(torch.randint(1, 6, (), generator=generator))
        if length + count > CONFIG.context:
            continue
        fresh = some_tokens(1, count, seed=trial)
        kept = kept[:length] + fresh[0].tolist()
        states = target(fresh, cache)
        afresh = target(torch.tensor([kept]))[:, length:]
        torch.testing.assert_close(states, afresh, rtol=0, atol=1e-12)


def test_a_full_cache_takes_no_more():
    """torch writes one token into no place at all without a word."""
    cache, more = KVCache(CONFIG, 1, 8, torch.zeros(1)), torch.zeros(1, 2, 1, 4)
    cache.length = 8
    with pytest.raises(ValueError, match="9 tokens exceed a cache of 8"):
        cache.write(0, more, more)


def test_the_cache_cannot_be_rolled_outside_of_what_it_holds():
    cache = KVCache(CONFIG, 1, 8, torch.zeros(1))
    cache.advance(3)
    for length in (-1, 4):
        with pytest.raises(ValueError, match="cannot roll back"):
            cache.rollback(length)
    assert cache.length == 3


def test_nothing_is_read_beyond_the_window():
    target = new_target()
    target(some_tokens(1, CONFIG.context))
    with pytest.raises(ValueError, match="exceed 24"):
        target(some_tokens(1, CONFIG.context + 1))
    cache = target.new_cache()
    target(some_tokens(1, 20), cache)
    with pytest.raises(ValueError, match="exceed 24"):
        target(some_tokens(1, 5), cache)
    assert cache.length == 20


@pytest.mark.parametrize("sizes", [dict(width=25), dict(num_heads=24), dict(num_kv_heads=3)])
def test_shapes_that_cannot_be_are_refused(sizes):
    with pytest.raises(UserError, match="heads"):
        replace(CONFIG, **sizes)


# -------------------------------------------------------------------------------------- files


@pytest.fixture
def saved(tmp_path) -> Path:
    save_target(tmp_path / "target.pt", new_target(), {"name": "bpe"}, {"seconds": 1.0})
    return tmp_path / "target.pt"


@pytest.mark.parametrize("at", ["save", "fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch, at, error):
    before = saved.read_bytes()

    def fail(*args):
        if at == "save":
            args[1].write(b"half of it")
        raise error

    monkeypatch.setattr(files.torch if at == "save" else files.os, at, fail)
    with pytest.raises(UserError, match="cannot write.*disk full"):
        save_target(saved, new_target(seed=1), {}, {})
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def interrupt(checkpoint, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(files.torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_target(saved, new_target(seed=1), {}, {})
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_missing_and_foreign_checkpoints_are_refused(saved, tmp_path):
    with pytest.raises(UserError, match="there is no target at .*nowhere.pt"):
        load_checkpoint(tmp_path / "nowhere.pt", "target")
    with pytest.raises(UserError, match="not the checkpoint of a draft head"):
        load_checkpoint(saved, "draft head")
    torch.save([1, 2], saved)
    with pytest.raises(UserError, match="not the checkpoint of a target"):
        load_checkpoint(saved, "target")


@pytest.mark.parametrize("keep", [0, 1, 100, 0.5, 0.9, -100, -1])
def test_truncated_checkpoints_are_refused(saved, keep):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else keep])
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(saved, "target")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("garbage", [b"\n", b"garbage" * 99, b"PK\3\4" + b"\0" * 99, b"\x80\4."])
def test_garbage_is_refused(saved, garbage):
    saved.write_bytes(garbage)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(saved, "target")


class Code:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.write_text, (self.path, "executed")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_code_in_a_checkpoint_is_not_executed(saved, tmp_path, write):
    write({"kind": "target", "config": Code(tmp_path / "trace")}, saved)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(saved, "target")
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES)
def test_a_target_comes_back_as_it_was_saved_and_frozen(config, tmp_path):
    target = new_target(config)
    save_target(tmp_path / "target.pt", target, {"name": "bpe", "tokens": ["a"]}, {"x": 1})
    loaded, checkpoint = load_target(tmp_path / "target.pt")
    assert loaded.config == config and checkpoint["tokenizer"] == {"name": "bpe", "tokens": ["a"]}
    assert torch.equal(loaded(some_tokens(1, 9)), target(some_tokens(1, 9)))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert (
        load_target(tmp_path / "target.pt", dtype=torch.bfloat16)[0].norm.weight.dtype.itemsize == 2
    )


def test_weights_that_do_not_match_their_fingerprint_are_refused(saved):
    checkpoint = torch.load(saved, weights_only=True)
    checkpoint["weights"]["blocks.1.mlp_out.weight"][3, 4] += 1e-3
    torch.save(checkpoint, saved)
    with pytest.raises(UserError, match="do not match their fingerprint"):
        load_target(saved)


def test_the_fingerprint_is_of_every_weight_and_of_the_shape():
    target = new_target(SHAPES["untied"])
    prints = {fingerprint(target)}
    for weight in target.parameters():
        old = weight.clone()
        weight.view(-1)[-1] += 1e-4
        prints.add(fingerprint(target))
        weight.copy_(old)
    assert len(prints) == 1 + len(list(target.parameters()))
    target.config = replace(target.config, rope_theta=1.0)
    assert fingerprint(target) not in prints


def test_the_fingerprint_outlives_dtypes_and_files(saved):
    target = new_target()
    assert fingerprint(target) == fingerprint(target.double()) == fingerprint(target.float())
    assert fingerprint(load_target(saved)[0]) == fingerprint(target)


# -------------------------------------------------------------------------------------- heads

KINDS = ("medusa", "eagle")


def new_head(kind: str, target: GPT, layers: int = 2, seed: int = 5):
    """A head with no weight at its starting value."""
    torch.manual_seed(seed)
    head = build_head(HeadConfig(kind, layers), target).to(target.embed.weight.dtype)
    return randomized(head, seed).requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_has_parameters_of_its_own(kind):
    target, counts = new_target(), []
    for layers in (1, 2, 3):
        head = build_head(HeadConfig(kind, layers), target)
        counts.append(sum(p.numel() for p in head.parameters()))
        stack = head.blocks if kind == "eagle" else head.weights
        assert len({id(layer) for layer in stack}) == layers
        assert len({p.data_ptr() for p in stack.parameters()}) == len(list(stack.parameters()))
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_an_untrained_medusa_head_repeats_the_targets_own_guess(float64):
    target = new_target()
    head = build_head(HeadConfig("medusa", 2), target).double()
    hidden = target(some_tokens(2, 7)).flatten(0, 1)
    for logits in head.heads(hidden):
        torch.testing.assert_close(logits, target.lm_head(hidden), rtol=0, atol=1e-6)


@pytest.mark.parametrize("config", [SHAPES["tied"], SHAPES["untied"]], ids=["tied", "untied"])
def test_eagle_neither_trains_nor_saves_the_targets_matrices(config):
    target = new_target(config)
    head = build_head(HeadConfig("eagle", 2), target)
    theirs = {p.data_ptr() for p in target.parameters()}
    for tensors in (dict(head.named_parameters()), head.state_dict()):
        assert not [name for name in tensors if "embed" in name or "lm_head" in name]
        assert not [name for name, tensor in tensors.items() if tensor.data_ptr() in theirs]
        assert not [tensor for tensor in tensors.values() if config.vocab_size in tensor.shape]


def test_eagle_starts_as_the_least_squares_solution(float64):
    target, tokens = new_target(), some_tokens(8, 24)
    batch = whole_batch(target, tokens)
    hidden, head = batch.hidden, build_head(HeadConfig("eagle", 3), target)
    head.prepare(target, batch)
    embedded = target.embed.weight[tokens[:, 1:-1]]
    inputs = F.pad(torch.cat([embedded, hidden[:, :-1]], -1), (0, 1), value=1.0).flatten(0, 1)
    outputs = hidden[:, 1:].flatten(0, 1)

    weights = torch.cat([head.combine.weight.T, head.combine.bias[None]])
    residual = inputs @ weights - outputs
    assert (inputs.T @ residual / len(inputs)).abs().max() < 1e-4  # the gradient of the MSE
    best = torch.linalg.lstsq(inputs, outputs).solution
    least = (inputs @ best - outputs).square().mean()
    assert least > 0.01 and residual.square().mean() <= least * (1 + 1e-6)

    (features,) = head.eval()(batch).states  # the layers above start as the identity
    torch.testing.assert_close(features, inputs @ weights, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind, own_steps", [("medusa", 1), ("eagle", 1), ("eagle", 3)])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_training_form_is_the_decoding_form(kind, own_steps, layers, float64):
    """At every place and draft position, along the text's own tokens: what is learnt is used."""
    target, tokens = new_target(), some_tokens(2, 13)
    head, batch = new_head(kind, target, layers), whole_batch(target, tokens)
    guess = head(batch, own_steps)
    assert len(logits_of(guess)) == (4 if kind == "medusa" else own_steps)
    logits = [rows.unflatten(0, (2, -1)) for rows in logits_of(guess)]  # (B, T - i, V)
    compared = 0
    for length in range(1, 12):
        state = head.start(CONFIG.context, batch=2)
        head.absorb(state, tokens[:, 1 : length + 1], batch.hidden[:, :length])
        for i, rows in enumerate(logits):
            if length > rows.shape[1]:
                break
            drafted = head.expand(state, tokens[:, length + i, None]) if i else head.expand(state)
            torch.testing.assert_close(rows[:, length - 1], drafted[:, 0], rtol=0, atol=1e-10)
            if kind == "eagle":
                features = guess.states[i].unflatten(0, (2, -1))[:, length - 1]
                torch.testing.assert_close(features, state.nodes[:, 0], rtol=0, atol=1e-10)
            compared += 1
    assert compared == sum(rows.shape[1] for rows in logits)
    assert min(rows.std() for rows in logits) > 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_drafting_leaves_no_trace_in_what_is_absorbed_next(kind, float64):
    target, tokens = new_target(), some_tokens(1, 20)
    head, hidden = new_head(kind, target), target(tokens[:, :-1])
    state, read = head.start(CONFIG.context), 0
    for length, drafts in [(4, 4), (5, 1), (9, 3), (10, 4), (17, 2)]:
        head.absorb(state, tokens[:, read + 1 : length + 1], hidden[:, read:length])
        read = length
        once, again = (draft_chain(head, state, drafts)[1] for _ in range(2))
        afresh = head.start(CONFIG.context)
        head.absorb(afresh, tokens[:, 1 : length + 1], hidden[:, :length])
        torch.testing.assert_close(once, again, rtol=0, atol=1e-10)
        torch.testing.assert_close(once, draft_chain(head, afresh, drafts)[1], rtol=0, atol=1e-10)


def test_eagle_reads_each_drafted_token_with_the_state_it_guessed(float64):
    target, tokens = new_target(), some_tokens(1, 9)
    head, hidden = new_head("eagle", target), target(tokens[:, :-1])
    state = head.start(CONFIG.context)
    head.absorb(state, tokens[:, 1:], hidden)
    drafted, logits = draft_chain(head, state, 4)
    read, states = tokens[:, 1:], hidden  # the same, without a cache
    for i in range(4):
        feature = head.step(read, states)[:, -1:]
        torch.testing.assert_close(head.logits(feature)[:, 0], logits[:, i], rtol=0, atol=1e-10)
        read, states = torch.cat([read, drafted[:, i : i + 1]], 1), torch.cat([states, feature], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_drafted_as_its_rows_are(kind, float64):
    target, tokens = new_target(), some_tokens(3, 10)
    head, hidden = new_head(kind, target), target(tokens[:, :-1])

    def draft(rows: slice):
        state = head.start(CONFIG.context, batch=len(tokens[rows]))
        head.absorb(state, tokens[rows, 1:], hidden[rows])
        return draft_chain(head, state, 4)

    rows = [draft(slice(i, i + 1)) for i in range(3)]
    assert torch.equal(draft(slice(None))[0], torch.cat([row[0] for row in rows]))
    whole = torch.cat([row[1] for row in rows])
    torch.testing.assert_close(draft(slice(None))[1], whole, rtol=0, atol=1e-10)


def test_only_medusa_has_a_last_position():
    target = new_target()
    for kind, most in (("medusa", 4), ("eagle", None)):
        head = new_head(kind, target)
        assert head.max_draft == most
        state = head.start(CONFIG.context)
        head.absorb(state, some_tokens(1, 2), target(some_tokens(1, 2)))
        if most:
            with pytest.raises(UserError, match="at most 4"):
                plan_draft(head, 5, 0, target)
        else:
            assert draft_chain(head, state, 9)[0].shape == (1, 9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_comes_back_as_it_was_saved_for_its_own_target_only(kind, tmp_path):
    target, path = new_target(), tmp_path / "head.pt"
    head = new_head(kind, target, layers=3)
    save_head(path, head, fingerprint(target), {"name": kind})
    loaded = load_head(path, target)
    batch = whole_batch(target, some_tokens(1, 9))
    assert loaded.config == head.config and loaded.training_record == {"name": kind}
    for one, other in zip(logits_of(loaded(batch)), logits_of(head(batch))):
        assert torch.equal(one, other)
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(UserError, match="trained for another target"):
        load_head(path, new_target(seed=1))


# ------------------------------------------------------------------------- draft vocabulary


def some_vocabulary(size: int = 8) -> tuple[Vocabulary, torch.Tensor]:
    """The `size` most frequent of 50 tokens, and how frequent each is."""
    vocabulary = Vocabulary(size, new_target())
    counts = torch.randint(0, 20, (50,), generator=torch.Generator().manual_seed(7))
    vocabulary.choose(counts)
    return vocabulary, counts


def test_a_draft_vocabulary_holds_the_most_frequent_tokens_in_order():
    vocabulary, counts = some_vocabulary()
    known = vocabulary.tokens.tolist()
    assert known == sorted(set(known)) and len(known) == 8
    others = sorted(set(range(50)) - set(known))
    assert counts[known].min() >= counts[others].max()
    vocabulary.choose(torch.ones(50))
    assert vocabulary.tokens.tolist() == list(range(8))  # of equals the first: for ever the same


def test_tokens_and_their_indices_agree():
    vocabulary, _ = some_vocabulary()
    known = vocabulary.tokens
    assert torch.equal(vocabulary.tokens_at(torch.arange(8)), known)
    every = torch.arange(50).view(5, 10)
    indices = vocabulary.indices_of(every)
    assert torch.equal(indices >= 0, torch.isin(every, known)) and indices.shape == every.shape
    assert torch.equal(vocabulary.tokens_at(indices[indices >= 0]), known)
    assert (indices[~torch.isin(every, known)] == -1).all()


def test_rows_and_laws_of_tokens_agree_with_their_indices():
    vocabulary, _ = some_vocabulary()
    weight, q = torch.randn(50, 6), torch.rand(3, 8).softmax(-1)
    whole = vocabulary.spread(q)
    assert whole.shape == (3, 50) and whole.dtype == q.dtype
    for index, token in enumerate(vocabulary.tokens_at(torch.arange(8)).tolist()):
        assert torch.equal(vocabulary.rows(weight)[index], weight[token])
        assert torch.equal(whole[:, token], q[:, index])
    torch.testing.assert_close(whole.sum(-1), torch.ones(3))


def test_a_whole_vocabulary_changes_nothing():
    vocabulary, tokens = Vocabulary(0, new_target()), some_tokens(3, 4)
    vocabulary.choose(torch.rand(50))
    weight, q = torch.randn(50, 6), torch.rand(3, 50)
    assert torch.equal(vocabulary.tokens_at(tokens), tokens)
    assert torch.equal(vocabulary.indices_of(tokens), tokens)
    assert torch.equal(vocabulary.rows(weight), weight) and torch.equal(vocabulary.spread(q), q)
    assert not vocabulary.state_dict()  # nothing to be saved


def vocabulary_head(kind: str, target: GPT, size: int = 8):
    """An untrained head that knows every sixth token."""
    torch.manual_seed(5)
    head = build_head(HeadConfig(kind, 1, draft_vocab=size), target).to(target.embed.weight.dtype)
    head.vocabulary.choose(torch.arange(50) % 6 == 1)
    head.prepare(target, whole_batch(target, some_tokens(8, 24)))
    return head.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_few_tokens_is_the_whole_head_at_their_places(kind, float64):
    target, batch = new_target(), whole_batch(new_target(), some_tokens(2, 9))
    few, whole = vocabulary_head(kind, target), vocabulary_head(kind, target, size=0)
    for one, other in zip(logits_of(few(batch)), logits_of(whole(batch))):
        assert one.shape[-1] == 8
        torch.testing.assert_close(one, other[:, torch.arange(50) % 6 == 1][:, :8])
    if kind == "medusa":  # this is where it is cheaper
        assert few.out.shape == (4, CONFIG.width, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_vocabulary_is_saved_with_its_head(kind, tmp_path):
    target, batch = new_target(), whole_batch(new_target(), some_tokens(1, 9))
    head = vocabulary_head(kind, target)
    save_head(tmp_path / "head.pt", head, fingerprint(target), {})
    loaded = load_head(tmp_path / "head.pt", target)
    assert torch.equal(loaded.vocabulary.tokens, head.vocabulary.tokens)
    assert loaded.vocabulary.tokens.tolist() == list(range(1, 44, 6))
    for one, other in zip(logits_of(loaded(batch)), logits_of(head(batch))):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [dict(kind="hydra"), dict(layers=0), dict(num_heads=0)])
def test_head_shapes_that_cannot_be_are_refused(shape):
    with pytest.raises(UserError, match="draft head"):
        HeadConfig(**{"kind": "medusa"} | shape)
