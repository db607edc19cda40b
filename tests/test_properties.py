"""Properties that hold for every input, tried on inputs that nobody thought of (hypothesis).

Each compares the code with a slower way to say the same: loops over Python lists.
"""

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import tiny_head, tiny_target

from drafts import (
    Chain,
    CopyFirst,
    Draft,
    GrowingTree,
    Known,
    Lookup,
    Shape,
    ancestors,
    deepest,
    fixed_tree,
)
from model import GPTConfig, KVCache
from sampling import distribution, residual, sample
from speculate import generate, match, verify
from study.prompts import read_questions
from targets.bpe import build_encoding, encode, learn_tokenizer, tokenize

settings.register_profile("koala", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("koala")
CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------- the rules


@st.composite
def laws(draw, rows: int, vocab: int):
    """(rows, vocab) probabilities, many of them 0."""
    weights = st.lists(st.integers(0, 5), min_size=vocab, max_size=vocab).filter(any)
    values = torch.tensor([draw(weights) for _ in range(rows)], dtype=torch.float32)
    return values / values.sum(-1, keepdim=True)


@given(st.data(), st.integers(1, 5), st.integers(2, 6))
def test_verify_is_the_rule_one_token_after_the_other(data, gamma, vocab):
    p, q = data.draw(laws(gamma + 1, vocab)), data.draw(laws(gamma, vocab))
    able = [[x for x in range(vocab) if row[x] > 0] for row in q]
    drawn = torch.tensor([data.draw(st.sampled_from(tokens)) for tokens in able])
    uniforms = st.floats(0, 1, exclude_max=True)
    u = torch.tensor([data.draw(uniforms) for _ in range(gamma + 1)], dtype=torch.float64)
    accepted, following = verify(p, q, drawn, u)
    count = 0
    while count < gamma and u[count] < min(1.0, (p[count, drawn[count]] / q[count, drawn[count]])):
        count += 1
    assert accepted.item() == count
    law = p[gamma] if count == gamma else residual(p[count], q[count])
    assert following.item() == sample(law, u[gamma]).item()
    assert law[following] > 0


@st.composite
def trees(draw, most: int = 12):
    """Parents of a tree, each before its child, with no two children of one token."""
    size = draw(st.integers(0, most))
    parents = [0] + [draw(st.integers(0, i)) for i in range(size)]
    depth = [0]
    for parent in parents[1:]:
        depth.append(depth[parent] + 1)
    tokens, used = [99], set()
    for parent in parents[1:]:
        token = draw(st.integers(0, 5).filter(lambda t, p=parent: (p, t) not in used))
        used.add((parent, token))
        tokens.append(token)
        if len({t for p, t in used if p == parent}) == 6:  # no token is left for one more child
            break
    size = len(tokens)
    parents, depth = torch.tensor(parents[:size]), torch.tensor(depth[:size])
    shape = Shape(parents, depth, ancestors(parents, int(depth.max())))
    return torch.tensor(tokens), shape


@given(trees(), st.data())
def test_match_follows_the_targets_choices_down_the_tree(tree, data):
    tokens, shape = tree
    choice = torch.tensor([data.draw(st.integers(0, 5)) for _ in tokens])
    node, following = match(tokens, shape, choice)
    here = 0
    while True:
        below = [i for i in range(1, len(tokens)) if shape.parents[i] == here]
        agreeing = [i for i in below if tokens[i] == choice[here]]
        if not agreeing:
            break
        (here,) = agreeing
    assert (node.item(), following.item()) == (here, choice[here].item())
    path, new = Draft(tokens, shape).path_to(node, following)
    assert path[0] == 0 and path[-1] == here and len(new) == len(path)


@given(trees())
def test_ancestors_are_all_that_lead_to_a_node(tree):
    tokens, shape = tree
    for node in range(len(tokens)):
        path, here = {node}, node
        while here:
            here = shape.parents[here].item()
            path.add(here)
        assert set(shape.ancestors[node].nonzero()[:, 0].tolist()) == path


@given(trees(), st.data())
def test_the_deepest_node_is_the_end_of_the_longest_path_that_agrees(tree, data):
    """Of siblings one agrees at most."""
    tokens, shape = tree
    agrees = torch.zeros(len(tokens), dtype=torch.bool)
    for parent in range(len(tokens)):
        below = [i for i in range(1, len(tokens)) if shape.parents[i] == parent]
        if below and data.draw(st.booleans()):
            agrees[data.draw(st.sampled_from(below))] = True
    whole = [all(agrees[i] for i in row.nonzero()[:, 0].tolist() if i) for row in shape.ancestors]
    best = max((d for d, ok in zip(shape.depth.tolist(), whole) if ok), default=0)
    found = deepest(agrees, shape).item()
    assert whole[found] and shape.depth[found] == best


@given(st.data(), st.integers(2, 8), st.floats(0.05, 5), st.integers(0, 9), st.floats(0.01, 1))
def test_a_distribution_is_one_and_keeps_the_order(data, vocab, temperature, top_k, top_p):
    values = st.lists(st.floats(-20, 20, width=32), min_size=vocab, max_size=vocab)
    logits = torch.tensor(data.draw(values))
    p = distribution(logits, temperature, top_k, top_p)
    assert abs(p.sum().item() - 1) < 1e-5 and (p >= 0).all()
    kept = logits[p > 0]
    assert kept.numel() >= 1 and logits.max() in kept
    if top_k and top_k < vocab:
        assert kept.min() >= logits.topk(top_k).values[-1]


# ------------------------------------------------------------------------------------- the cache


@given(st.data())
def test_a_cache_holds_what_was_written_and_not_forgotten(data):
    config = GPTConfig(vocab_size=8, num_layers=1, width=2, num_heads=1, num_kv_heads=1)
    cache, kept, mark = KVCache(config, 1, 40, torch.zeros(1)), [], 0
    for _ in range(data.draw(st.integers(1, 12))):
        action = data.draw(st.sampled_from(["write", "roll back", "keep"]))
        if action == "write" and len(kept) < 34:
            new = [float(mark + i) for i in range(data.draw(st.integers(1, 6)))]
            mark += len(new)
            values = torch.tensor(new)[None, None, :, None].expand(1, 1, -1, 2)
            cache.write(0, values, -values)
            cache.advance(len(new))
            kept += new
        elif action == "roll back":
            length = data.draw(st.integers(0, len(kept)))
            cache.rollback(length)
            kept = kept[:length]
        elif action == "keep" and kept:
            start = data.draw(st.integers(0, len(kept) - 1))
            places = st.sets(st.integers(0, len(kept) - start - 1), min_size=1)
            path = sorted(data.draw(places))
            in_place = path == list(range(len(path)))
            cache.keep(start, torch.tensor(path), in_place)
            kept = kept[:start] + [kept[start + i] for i in path]
        assert cache.length == len(kept)
        assert cache.keys[0, 0, 0, : len(kept), 0].tolist() == kept
        assert cache.values[0, 0, 0, : len(kept), 1].tolist() == [-value for value in kept]


# ------------------------------------------------------------------------------------- the plans

TARGET = tiny_target(seed=2)
HEADS = {kind: tiny_head(kind, 1, TARGET, steps=40) for kind in ("medusa", "eagle")}


@st.composite
def plans(draw, kind: str):
    which = draw(st.sampled_from(["chain", "fixed", "growing", "copies", "copies first"]))
    if which == "chain":
        return Chain(draw(st.integers(1, 8)))
    if which.startswith("copies"):
        copies = Lookup(draw(st.integers(1, 4)), draw(st.integers(1, 9)))
        others = plans(kind).filter(lambda plan: not isinstance(plan, (Lookup, CopyFirst)))
        return copies if which == "copies" else CopyFirst(copies, draw(others))
    if which == "fixed" or kind == "medusa":
        paths = {()}
        for _ in range(draw(st.integers(1, 8))):
            parent = draw(st.sampled_from(sorted(path for path in paths if len(path) < 4)))
            rank = sum(path[:-1] == parent for path in paths if path)
            paths.add((*parent, rank))
        return fixed_tree(tuple(sorted(paths - {()})), CPU)
    depth, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    return GrowingTree(draw(st.integers(1, 14)), depth, width, CPU)


@given(st.data(), st.sampled_from(["medusa", "eagle"]))
def test_greedy_text_is_the_targets_whatever_is_drafted(data, kind):
    tokens = st.integers(0, TARGET.config.vocab_size - 1)
    prompt = data.draw(st.lists(tokens, min_size=1, max_size=20))
    limit, stop = data.draw(st.integers(1, 30)), data.draw(st.none() | st.sets(tokens, max_size=3))
    plan = data.draw(plans(kind))
    plain = generate(TARGET, prompt, limit, stop_token=stop).tokens
    out = generate(TARGET, prompt, limit, head=HEADS[kind], plan=plan, stop_token=stop)
    assert out.tokens == plain
    assert sum(out.produced) + 1 == len(out.tokens)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 4))
def test_the_index_finds_what_a_search_finds(text, least):
    known = Known(text[:1])
    for token in text[1:]:
        known.stood_before(least)
        known.tokens.append(token)
    expected = None
    for n in range(min(4, len(text)), least - 1, -1):
        ends = [i for i in range(n, len(text)) if text[i - n : i] == text[-n:]]
        if ends:
            expected = ends[-1]
            break
    assert known.stood_before(least) == expected


# ------------------------------------------------------------------------------------ the texts

LEARNT = learn_tokenizer(["the cat sees the dog, the cat sleeps\n" * 20], 290)
ENCODING = build_encoding(LEARNT)
# As a pretrained one: special tokens, an added one, one row that is unused, two bytes that it lacks.
END, UNUSED, THINK = range(len(LEARNT["tokens"]), len(LEARNT["tokens"]) + 3)
NAMED = {"<end>": END, f"<|unused {UNUSED}|>": UNUSED, "<think>": THINK}
ELSEWHERE = build_encoding(
    LEARNT
    | {
        "tokens": [*LEARNT["tokens"], *NAMED],
        "special": {
            "<|endoftext|>": END,
            "<end>": END,
            f"<|unused {UNUSED}|>": UNUSED,
            "\0": 0,
            "\1": 1,
        },
        "added": {"<think>": THINK},
    }
)
SPELT = st.lists(st.text(max_size=20) | st.sampled_from([*NAMED, "<th", "ink>"]), max_size=5)


@given(st.text(max_size=80))
def test_tokens_are_the_text_again(text):
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    raw = text.encode("utf-8", "surrogateescape")
    assert ENCODING.decode_bytes(encode(ENCODING, text)) == raw
    assert encode(ENCODING, raw) == encode(ENCODING, text)


@given(SPELT.map("".join))
def test_tokens_of_a_pretrained_tokenizer_are_the_text_again(text):
    """But for bytes that it lacks. What spells an added token is one, a special token never."""
    text = text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape")
    tokens = encode(ELSEWHERE, text)
    kept = text.translate({0: None, 1: None}).encode("utf-8", "surrogateescape")
    assert ELSEWHERE.decode_bytes(tokens) == kept
    assert tokens.count(THINK) == text.count("<think>")
    assert not {END, UNUSED} & set(tokens)


@given(st.lists(st.text(max_size=30).filter(lambda t: t.isascii()), min_size=1, max_size=4))
def test_many_texts_are_cut_as_one_by_one(texts):
    rows = [[*encode(ENCODING, text), ENCODING.eot_token] for text in texts]
    assert tokenize(ENCODING, texts).tolist() == sum(rows, [])


@given(
    st.lists(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=3), min_size=1),
    st.booleans(),
)
def test_question_files_are_read_as_they_were_written(tmp_path_factory, conversations, escaped):
    """JSON may hold any character as it is, but for a few."""
    path = tmp_path_factory.mktemp("questions") / "q.jsonl"
    rows = [json.dumps({"turns": turns}, ensure_ascii=escaped) for turns in conversations]
    path.write_bytes(("\n".join(rows) + "\n").encode())
    assert [question.turns for question in read_questions(path)] == conversations
