"""A replay finds the cycles that decoding has, and says how likely each is, without decoding.

Greedily the cycles are the decoder's own, one by one. Sampled, they are the decoder's on average:
its cycles are enumerated, with every draft that can be drawn.
"""

import itertools
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from pytest import approx
from toys import random_tables, rest_of, tiny_head, tiny_target, whole_vocabulary

from costs import best_size
from draft_head import Guess
from drafts import COPIED, MATCH, Chain, CopyFirst, GrowingTree, Lookup, fixed_tree, plan_draft
from sampling import Sampler, acceptance_probability
from speculate import generate
from study import sizes
from study.prompts import read_questions
from study.replay import PlainText, replay
from targets.bpe import encode_prompt
from targets.loading import TRAINED, load
from targets.runs import fingerprint

CPU = torch.device("cpu")
TREE = fixed_tree(((0,), (1,), (2,), (0, 0), (0, 1), (1, 0)), CPU)
PLANS = {
    "chain 1": Chain(1),
    "chain 4": Chain(4),
    "fixed tree": TREE,
    "growing tree": GrowingTree(12, 4, 3, CPU),
    "shallow tree": GrowingTree(7, 2, 3, CPU),
    "sparse tree": GrowingTree(5, 6, 3, CPU),
    "narrow tree": GrowingTree(6, 3, 2, CPU),
    "copies": Lookup(1, 5),
    "copies, else a chain": CopyFirst(Lookup(2, 6), Chain(3)),
    "copies, else a tree": CopyFirst(Lookup(1, 2), TREE),
}


@pytest.fixture(scope="module")
def target():
    return tiny_target(seed=2)


@pytest.fixture(scope="module")
def trained(target):
    return cache(lambda kind, knows=(): tiny_head(kind, 1, target, steps=60, knows=knows))


@pytest.mark.parametrize("knows", [(), (0, 2, 3, 5, 7, 8, 11)], ids=["all", "some"])
@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_greedy_cycles_are_those_of_the_decoder(target, trained, kind, knows):
    """For every kind of draft at once, to the limit, to the window's end and to each stop token."""
    head, sampler, lengths, copied = trained(kind, knows), Sampler(CPU), set(), 0
    generator = torch.Generator().manual_seed(1)
    for n in (1, 2, 7, 15):
        prompt = torch.randint(13, (n,), generator=generator).tolist()
        whole = generate(target, prompt, 100).tokens
        for stop, limit in [(None, 100), (None, 9), *((token, 100) for token in set(whole))]:
            plain = generate(target, prompt, limit, stop_token=stop).tokens
            room = min(limit, target.config.context - n)
            text = PlainText.read(target, prompt, plain, room, sampler)
            found = replay(head, PLANS, text, sampler)
            for name, plan in PLANS.items():
                request = dict(head=head, plan=plan, stop_token=stop)
                out = generate(target, prompt, limit, **request)
                starts = [place for place, chance in enumerate(found[name].starts) if chance]
                lengths.update(out.produced)
                places = list(itertools.accumulate(out.produced, initial=n))
                assert starts == [place for place in places if place < n + len(plain) - 1]
                assert set(found[name].starts) <= {0.0, 1.0}
                counted = out.produced[: out.uncut_cycles]
                copies = [d for d in out.drafts[: len(counted)] if d[0] == "copied" and d[1]]
                assert found[name][1:] == (sum(counted), len(counted), len(copies))
                copied += len(copies)
    assert lengths >= {1, 2, 3, 4, 5} and copied > 0


# --------------------------------------------------------------------------------- sampled texts

VOCAB, LIMIT = 3, 5


class Tables:
    """A head whose logits are those of tables: q after the drafted tokens, whatever the text."""

    vocabulary = whole_vocabulary(VOCAB)

    def __init__(self, q: list[torch.Tensor], prompt: int):
        self.q, self.prompt = q, prompt

    def start(self, max_length):
        return None

    def __call__(self, batch, own_steps):
        """As a head in training: of each draft position the logits after every state."""
        text, states = batch.tokens[0].tolist(), []
        for i in range(1, own_steps + 1):
            begun = [tuple(text[self.prompt : t + 1 + i]) for t in range(len(text) - 1 - i)]
            rows = [self.q[len(new)][new].log() for new in begun]
            states.append(torch.stack(rows) if rows else torch.zeros(0, VOCAB))
        return Guess(states, [torch.eye(VOCAB)] * own_steps)


def enumerated(p, q, gamma: int) -> tuple[float, float]:
    """(tokens, cycles) expected of uncut cycles, from all drafts and verdicts of a chain."""
    written = cycles = 0.0

    def go_on(text: tuple, chance: float):
        nonlocal written, cycles
        if len(text) == LIMIT:
            return
        depth = min(gamma, LIMIT - len(text) - 1)
        for drafted in itertools.product(range(VOCAB), repeat=depth):
            reach = chance
            for i, x in enumerate(drafted):
                reach *= q[len(text) + i][(*text, *drafted[:i])][x].item()
            for i in range(depth + 1):
                begun = (*text, *drafted[:i])
                row = p[len(begun)][begun]
                if i < depth:
                    accepted = acceptance_probability(row, q[len(begun)][begun])[drafted[i]].item()
                    excess = (row - q[len(begun)][begun]).clamp(min=0.0)
                    row = excess / excess.sum()
                else:
                    accepted = 0.0
                ends = reach * (1 - accepted)
                if depth == gamma:
                    written, cycles = written + ends * (i + 1), cycles + ends
                for x in range(VOCAB):
                    if ends * row[x] > 1e-12:
                        go_on((*begun, x), ends * row[x].item())
                reach *= accepted

    for x in range(VOCAB):
        go_on((x,), p[0][x].item())
    return written, cycles


@pytest.mark.parametrize("gamma", [1, 2, 3])
def test_sampled_cycles_are_those_of_the_decoder_on_average(gamma):
    """The replay of each text, weighted with the text's probability: the sums of all cycles."""
    p, q = (random_tables(seed, LIMIT, VOCAB, temperature=1.0) for seed in (1, 2))
    law, prompt, sampler = rest_of(p), [0, 1], Sampler(CPU, 1.0, seed=0)
    head, written, cycles = Tables(q, len(prompt)), 0.0, 0.0
    for new in itertools.product(range(VOCAB), repeat=LIMIT):
        chosen = [p[i][new[:i]][new[i]].item() for i in range(LIMIT)]
        hidden = torch.zeros(1, len(prompt) + LIMIT - 1, 1)
        p_of_text = torch.tensor([1.0] * (len(prompt) - 1) + chosen)
        text = PlainText([*prompt, *new], len(prompt), LIMIT, hidden, p_of_text)
        found = replay(head, {"longer": Chain(gamma + 1), "chain": Chain(gamma)}, text, sampler)
        written += law[new].item() * found["chain"].written
        cycles += law[new].item() * found["chain"].cycles
    expected = enumerated(p, q, gamma)
    assert (written, cycles) == approx(expected, rel=1e-5)


# ---------------------------------------------------------------------------- the sizes of a run


@pytest.fixture(scope="module")
def shipped():
    target, head, encoding = load(TRAINED / "cpu", "eagle", "cpu", "float32")
    rows = [row for row in read_questions(TRAINED / "cpu" / "prompts.jsonl") if not row.loop]
    return target, head, [encode_prompt(encoding, row.turns[0]) for row in rows[:4]]


def test_the_shipped_head_is_replayed_as_it_decodes(shipped):
    """In float32, where a pass over a whole text rounds differently from many short ones."""
    target, head, prompts = shipped
    plans = {"chain": Chain(4), "tree": plan_draft(head, 4, 8, target), "copies": Lookup(2)}
    sums, sampler = {name: [0, 0, 0.0, 0.0] for name in plans}, Sampler(CPU)
    for prompt in prompts:
        plain = generate(target, prompt, 48).tokens
        found = replay(head, plans, PlainText.read(target, prompt, plain, 48, sampler), sampler)
        for name, plan in plans.items():
            out = generate(target, prompt, 48, head=head, plan=plan)
            counted = out.produced[: out.uncut_cycles]
            for i, value in enumerate((sum(counted), len(counted), *found[name][1:3])):
                sums[name][i] += value
    for tokens, cycles, written, replayed in sums.values():
        assert written / replayed == approx(tokens / cycles, rel=0.01)


def test_sizes_are_written_beside_the_heads_and_chosen_by(tiny_run, tmp_path, call, monkeypatch):
    monkeypatch.setattr("costs.SECONDS", 0.0)
    folder = shutil.copytree(tiny_run.folder, tmp_path / "run")
    argv = ["--out_dir", folder, "--num_prompts", 2, "--max_new_tokens", 16]
    monkeypatch.setattr("study.prompts.from_documents.__defaults__", (12,))
    status, out, err = call(sizes.main, *argv, "--dtype", "float32")
    assert (status, err) == (0, "") and re.search(r"^eagle, \d sampled texts: ", out, re.M)
    target, head, _ = load(folder, "eagle", "cpu", "float32")
    lookup = head.sizes["lookup"]
    assert lookup.keys() == {"greedy", "sampled"} and set(lookup.values()) <= {0, MATCH}
    for kind in lookup:
        known = {tuple(row[:3]): row[3:] for row in head.sizes[kind]}
        assert known.keys() >= {(1, 0, 0), (8, 0, 0), (4, 8, 0), (4, 8, MATCH), (0, 0, MATCH)}
        assert known[0, 0, 0] == [1.0, 0.0]
        for (gamma, _, copies), (tau, copied) in known.items():
            assert 1 <= tau <= 1 + max(gamma, COPIED if copies else 0)
            assert 0 <= copied <= 1 and (copies or not copied)
        assert known[8, 0, 0][0] >= known[1, 0, 0][0]
    # The length and the match that are usual are rows of the copies' table, too.
    found = json.loads((folder / "sizes.json").read_text())
    rows = {tuple(row[:2]): row[2:4] for row in found["copies"]["eagle, sampled"]}
    assert rows.keys() >= {(8, 1), (8, 4), (2, 3)} and rows[COPIED, MATCH] == approx(
        known[4, 0, MATCH]
    )
    rows = {tuple(row[:2]): row[2:4] for row in found["copies"]["alone, sampled"]}
    assert rows[COPIED, MATCH] == approx(known[0, 0, MATCH])
    taus = {size[:2] for size in known}
    head.training_record = None  # nothing is reckoned from it any more
    assert best_size(target, head, "auto", "auto", 0.8)[:2] in taus

    # Of other weights of the same name nothing is known.
    shutil.copy(folder / "eagle-koala.pt", folder / "eagle.pt")
    assert not hasattr(load(folder, "eagle", "cpu", "float32")[1], "sizes")
    (folder / "sizes.json").write_text('{"eagle": 3}')
    assert not hasattr(load(folder, "eagle", "cpu", "float32")[1], "sizes")


def test_sizes_of_a_run_that_came_along_are_found_where_they_are_written(
    tiny_run, tmp_path, monkeypatch
):
    folder = shutil.copytree(tiny_run.folder, tmp_path / "trained" / "cpu")
    monkeypatch.setattr("targets.loading.TRAINED", folder.parent)
    monkeypatch.chdir(tmp_path)
    weights = fingerprint(load(folder, "eagle", "cpu", "float32")[1])
    ours, shipped = Path("out/trained-cpu/sizes.json"), folder / "sizes.json"
    ours.parent.mkdir(parents=True)
    for path, tau in ((shipped, 1.5), (ours, 1.7)):
        rows = {"greedy": [[1, 0, 0, tau, 0.0]], "sampled": [], "lookup": {"greedy": 3}}
        path.write_text(json.dumps({"eagle": rows | {"weights": weights}}))
        assert load(folder, "eagle", "cpu", "float32")[1].sizes == rows
