"""The judge at draft time: trained on true verdicts, and unable to change the text.

A tree that is cut by what a network foresees is judged by `match`, so that no network can spoil the
text; a random one must not. What would spoil it is shown beside: a token that was drawn from q, and
is dropped because of its own chance.
"""

import itertools
import json
import shutil
from functools import cache

import pytest
import torch
from toys import (
    FALSE_ALARM,
    chi_square_p_value,
    law_of_text,
    own_text,
    random_prompts,
    random_tables,
    rest_of,
    tiny_head,
    tiny_target,
)

from draft_head import Batch
from drafts import GrowingTree
from sampling import GREEDY_TEMPERATURE, Sampler, acceptance_probability, argmax, residual
from speculate import generate
from study import foresight
from study.judge import POSITIONS, Judge, Logistic, PayingTree, Seen, fit, verdicts
from study.replay import PlainText, replay

CPU = torch.device("cpu")
KNOWS = (0, 2, 3, 5, 7, 8, 11)


@pytest.fixture(scope="module")
def target():
    return tiny_target(seed=2)


@pytest.fixture(scope="module")
def trained(target):
    return cache(lambda knows=(): tiny_head("eagle", 1, target, steps=60, knows=knows))


def random_judge(head) -> Judge:
    torch.manual_seed(5)
    judge = Judge(head.lm_head(), hidden=16)
    for weight in judge.parameters():
        torch.nn.init.normal_(weight, std=0.7)
    return judge.eval()


def costly(width: int, model, speed: float = 2.0) -> PayingTree:
    costs = [1 + 0.15 * n for n in range(9)], 0.2
    return PayingTree(width, 8, 4, CPU, model, speed, costs)


# ------------------------------------------------------------------------------ the law of the text

VOCAB, WRITTEN = 4, 3
UNPROMISING = {0, 3}  # tokens after which a gate would rather stop


def law_by_cycles(p, q, own_chance: bool) -> torch.Tensor:
    """The law of the first tokens: drawn chains of two that stop at an unpromising token.

    It stays in the draft, as the last; or with `own_chance` it is dropped for what it is.
    """
    law = torch.zeros([VOCAB] * WRITTEN, dtype=torch.float64)

    def go_on(text: tuple, probability) -> None:
        if len(text) == WRITTEN:
            law[text] += probability
            return
        begun, depth = len(text), min(2, WRITTEN - len(text) - 1)
        for words in itertools.product(range(VOCAB), repeat=depth):
            reach, kept = probability, depth
            for i, word in enumerate(words):
                reach = reach * q[begun + i][text][words[:i]][word].double()
                if word in UNPROMISING and kept == depth:
                    kept = i if own_chance else i + 1
            for i in range(kept):
                p_row, q_row = (t[begun + i][text][words[:i]].double() for t in (p, q))
                accepted = acceptance_probability(p_row[words[i]], q_row[words[i]])
                rejected = reach * (1 - accepted) * residual(p_row, q_row)
                for x, chance in enumerate(rejected):
                    go_on((*text, *words[:i], x), chance)
                reach = reach * accepted
            for x, chance in enumerate(reach * p[begun + kept][text][words[:kept]].double()):
                go_on((*text, *words[:kept], x), chance)

    for x, chance in enumerate(p[0].double()):
        go_on((x,), chance)
    return law


@pytest.mark.parametrize("own_chance", [False, True])
def test_a_drawn_token_stays_once_it_is_drawn(own_chance):
    """To stop after it is lossless; to drop it for its own chance must be seen."""
    p, q = (random_tables(seed, WRITTEN, VOCAB, temperature=1.0) for seed in (1, 2))
    wrong = (law_by_cycles(p, q, own_chance) - rest_of(p)).abs()
    assert (wrong.sum() / 2 > 0.01) if own_chance else (wrong.max() < 1e-6)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("knows", [(), KNOWS], ids=["all", "some"])
def test_greedy_text_is_the_targets_whatever_the_judge_says(target, trained, width, knows):
    head, drafted = trained(knows), []
    for prompt in random_prompts(target, (1, 2, 7, 20)):
        whole = generate(target, prompt, 100).tokens
        for model in (None, random_judge(head), Logistic()):
            plan = costly(width, model)
            assert generate(target, prompt, 100, head=head, plan=plan).tokens == whole
            drafted += plan.made
    sizes, steps = zip(*drafted)
    assert len(set(sizes)) > 2 and len(set(steps)) > 1 and max(sizes) > 0


@pytest.mark.slow
def test_sampled_text_has_the_targets_law_whatever_the_judge_says():
    target = tiny_target(seed=7, vocab=5, context=8, layers=1, width=8, spread=0.6)
    head = tiny_head("eagle", 1, target)
    plan = PayingTree(3, 6, 2, CPU, random_judge(head), 1.5, ([1 + 0.1 * n for n in range(7)], 0.1))
    law, sizes = law_of_text(target, [0, 1], 4, temperature=1.0), set()
    counts = torch.zeros(len(law), dtype=torch.long)
    for seed in range(2000):
        request = dict(head=head, plan=plan, temperature=1.0, seed=seed)
        request["on_cycle"] = lambda cycle: sizes.add(len(cycle.draft.tokens))
        cell = 0
        for token in generate(target, [0, 1], 4, **request).tokens:
            cell = cell * 5 + token
        counts[cell] += 1
    assert len(sizes) > 2
    assert chi_square_p_value(counts, law) > FALSE_ALARM


# ------------------------------------------------------------------------------------ the verdicts


class Data:
    """Texts as targets/features.py has them."""

    def __init__(self, target, tokens, learn=None):
        self.tokens, self.hidden = tokens, target(tokens[:, :-1])
        self.learn = torch.ones_like(tokens, dtype=torch.bool) if learn is None else learn

    def __len__(self):
        return len(self.tokens)

    def batch(self, index):
        return Batch(self.tokens[index], self.hidden[index], self.learn[index])


@pytest.mark.parametrize("knows", [(), KNOWS], ids=["all", "some"])
@pytest.mark.parametrize("greedy", [True, False])
def test_verdicts_are_those_of_the_target_after_the_tokens_before(target, trained, greedy, knows):
    """Each node found again: in a draft of the decoder's own, with the target's p read apart.

    A node after a token that the head does not name is in no draft.
    """
    head, tokens = trained(knows), own_text(target, 8, target.config.context + 1)
    learn = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.9
    seen, chances = verdicts(target, head, Data(target, tokens, learn), greedy, 10_000)
    expected, unnamed, heat = [], 0, GREEDY_TEMPERATURE if greedy else 1.0
    with torch.no_grad():
        starts = range(POSITIONS, target.config.context - POSITIONS + 1, POSITIONS)
        for start, i in itertools.product(starts, range(POSITIONS)):
            for text, marks in zip(tokens, learn):
                p = target.lm_head(target(text[None, : start + i + 1])[0]).softmax(-1)  # after each
                drafted = slice(start, start + i)
                whole = argmax(p)[drafted].equal(text[start + 1 : start + i + 1])
                if (whole or not greedy) and marks[start + 1 : start + i + 2].all():
                    state = head.start(64)
                    before = target(text[None, :start])
                    head.absorb(state, text[None, 1 : start + 1], before)
                    logits, named = head.expand(state), True
                    for token in text[start + 1 : start + i + 1]:
                        named &= token in head.vocabulary.tokens_at(logits[0, 0].topk(4).indices)
                        logits = head.expand(state, token[None, None])
                    unnamed += not named
                    if not named:
                        continue
                    best = logits[0, 0].topk(4).indices
                    q = logits[0, 0].softmax(-1).double() ** (1 / heat)
                    odds, best = (q / q.sum())[best].logit(1e-6), head.vocabulary.tokens_at(best)
                    chance = (best == argmax(p[-1])).float() if greedy else p[-1][best]
                    expected.append((i, before[0, -1], state.nodes[0, 0], chance, odds))
    assert len(expected) == len(chances) > 20 and unnamed > 0
    for node, (i, h_from, h_to, chance, odds) in enumerate(expected):
        assert seen.position[node] == i
        torch.testing.assert_close(seen.odds[node].double(), odds, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(seen.h_from[node], h_from.float())
        torch.testing.assert_close(seen.h_to[node], h_to.float())
        torch.testing.assert_close(chances[node], chance.float(), check_dtype=False)


def some_nodes(count: int) -> Seen:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(2, count, 8, generator=generator)
    odds = torch.randn(count, 4, generator=generator).sort(descending=True).values
    position = torch.arange(count) % POSITIONS
    return Seen(*states, position, torch.arange(4).expand(count, 4), odds)


def test_a_judge_learns_the_chances_that_a_state_tells():
    """q says nothing of them here, so that the regression cannot."""
    seen, lm_head = some_nodes(4000), torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    chance = (seen.h_to @ lm_head.T).sigmoid()
    torch.manual_seed(0)
    loss = {}
    for name, model in {"judge": Judge(lm_head), "logistic": Logistic()}.items():
        logits = fit(model, seen, chance, epochs=60)(seen)
        loss[name] = torch.nn.functional.binary_cross_entropy_with_logits(logits, chance).item()
    best = torch.nn.functional.binary_cross_entropy(chance, chance).item()
    assert loss["judge"] < best + 0.02 and loss["logistic"] > best + 0.1


def test_a_regression_learns_how_far_q_is_to_be_trusted():
    seen = some_nodes(4000)
    truth = 0.4 * seen.odds - 0.3 * seen.odds[:, :1] + 0.1 * seen.position[:, None]
    fitted = fit(Logistic(), seen, truth.sigmoid(), epochs=40)
    torch.testing.assert_close(fitted(seen), truth, atol=0.02, rtol=0)


def test_a_judge_is_the_formula():
    seen, lm_head = some_nodes(20), torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    seen = seen._replace(indices=torch.arange(80).reshape(20, 4) % 9)
    torch.manual_seed(5)
    judge = Judge(lm_head, hidden=16)
    for weight in judge.parameters():
        torch.nn.init.normal_(weight)
    logits = judge(seen)
    for n, (h_from, h_to, position, indices, odds) in enumerate(zip(*seen)):
        context = judge.context(h_from, h_to, position)
        for x, own, logit in zip(indices, odds, logits[n]):
            expected = lm_head[x] @ context[:-1] + context[-1] + judge.scale.weight[position] * own
            torch.testing.assert_close(logit, expected[0], rtol=1e-4, atol=1e-4)


def test_while_drafting_a_judge_is_shown_what_it_learnt_from(target, trained):
    """Along chains, the path to whose nodes is known: states and odds are computed anew."""
    head, shown, text = trained(), [], random_prompts(target, (7,))[0]

    class Spy(torch.nn.Module):
        def forward(self, seen):
            shown.append(seen)
            return seen.odds

    def check(cycle):
        nodes = shown[:]
        shown.clear()
        for i, seen in enumerate(nodes):
            path, state = cycle.draft.tokens[1 : i + 1], head.start(64)
            before = target(torch.tensor([text[:-1]]))
            head.absorb(state, torch.tensor([text[1:]]), before)
            logits = head.expand(state)
            for token in path:
                logits = head.expand(state, token[None, None])
            q = logits[0].softmax(-1).double() ** (1 / GREEDY_TEMPERATURE)
            q = (q / q.sum()).gather(-1, seen.indices)
            assert seen.position.tolist() == [i]
            torch.testing.assert_close(seen.h_from[0], before[0, -1].float())
            torch.testing.assert_close(seen.h_to[0], state.nodes[0, 0].float())
            torch.testing.assert_close(seen.odds.double(), q.logit(1e-6), rtol=1e-3, atol=1e-3)
        text.extend(cycle.tokens)
        lengths.append(len(nodes))

    lengths = []
    generate(target, text[:], 100, head=head, plan=costly(1, Spy(), 0.0), on_cycle=check)
    assert lengths.count(4) > 3


# ---------------------------------------------------------------------------------------- the tree


def test_an_untrained_judge_grows_the_tree_that_q_grows(target, trained):
    """At speed 0 nothing is cut."""
    head, prompt = trained(), random_prompts(target, (7,))[0]
    trees = {"q": GrowingTree(8, 4, 3, CPU), "judge": costly(3, Judge(head.lm_head()).eval(), 0.0)}
    texts = {name: [] for name in trees}
    for name, plan in trees.items():
        note = texts[name].append
        generate(target, prompt, 100, head=head, plan=plan, on_cycle=note)
    pairs = list(zip(*texts.values(), strict=True))
    assert len(pairs) > 4
    for ours, theirs in pairs:
        assert ours.draft.tokens.equal(theirs.draft.tokens)
        assert ours.draft.shape.parents.equal(theirs.draft.shape.parents)


@pytest.mark.parametrize("speed, size", [(0.0, 3), (1.0, 2), (2.0, 1), (4.0, 0)])
def test_a_tree_keeps_the_nodes_that_pay(speed, size):
    """Their chances 0.9, 0.5, 0.15; the costs of 1 to 4 tokens 1, 1.3, 1.7, 1.9."""
    tree = PayingTree(1, 3, 3, CPU, None, speed, ([1, 1.3, 1.7, 1.9], 0.2))
    assert tree.size(torch.tensor([1.0, 0.9, 0.5, 0.15]).log()) == 1 + size


@pytest.mark.parametrize("speed, on", [(0.5, True), (1.0, True), (1.4, False), (3.0, False)])
def test_a_tree_goes_on_where_a_step_pays(speed, on):
    """Expected: 0.6 x 0.5 and 0.6 x 0.2, each less 0.1 S; beside them nothing; a step costs 0.2 S.

    At S = 1 that is 0.2 + 0.02 against 0.2, at 1.4 0.16 + 0 against 0.28.
    """
    costs, followed = ([1, 1.1, 1.2], 0.2), torch.tensor([0.5, 0.2])
    scores = torch.tensor([0.6, 0.001, 0.0005, 0.0001]).log()
    for patience, goes in ((1, on), (2, speed < 3)):  # twice 0.16 is more than 0.28
        tree = PayingTree(2, 2, 3, CPU, None, speed, costs, followed, patience)
        tree.steps = 1
        assert tree.goes_on(scores) is goes
        assert tree.steps == 1 + goes


def test_replayed_cycles_are_those_of_the_decoder(target, trained):
    """And their sizes: by them `study.foresight` reckons what a plan costs."""
    head = trained()
    for prompt in random_prompts(target, (2, 7)):
        plan, sampler = costly(3, random_judge(head)), Sampler(CPU)
        decoded = generate(target, prompt, 100, head=head, plan=plan)
        made, plan.made = plan.made, []
        plain = generate(target, prompt, 100).tokens
        room = target.config.context - len(prompt)
        text = PlainText.read(target, prompt, plain, room, sampler)
        found = replay(head, {"it": plan}, text, sampler)["it"]
        assert plan.made == made
        assert found.written / found.cycles == pytest.approx(decoded.acceptance_length)


def test_a_speed_is_tokens_over_the_costs_of_their_cycles():
    passes, drafts = {1: 1.0, 3: 1.4, 25: 5.8}, {(1, "a"): 0.1, (3, "a"): 0.5, (9, "b"): 7.0}
    costs = foresight.Costs(passes, drafts, "a")
    assert costs.verify[[0, 1, 2, 24]].tolist() == pytest.approx([1.0, 1.2, 1.4, 5.8])
    assert costs.draft[[0, 1, 2, 3]].tolist() == pytest.approx([0.0, 0.1, 0.3, 0.5])
    assert costs.step == pytest.approx(0.2)
    # Two cycles: two nodes after three steps, and nothing after one.
    assert costs.speed(4.0, [(2, 3), (0, 1)]) == pytest.approx(4 / (1.4 + 0.5 + 1.0 + 0.1))


class Scripted:
    """Costs that count every cycle as 1: speeds are taus."""

    def speed(self, written, made):
        return written / len(made)


@pytest.mark.parametrize("width", [1, 4])
def test_the_oracle_drafts_what_a_tree_would_have_accepted(target, trained, width):
    """As far as three tokens. One token wide, a tree is a chain: the same cycles."""
    head, sampler = trained(), Sampler(CPU)
    tree, oracle = GrowingTree(3 * width, 3, width, CPU), foresight.Oracle(width, 3)
    for prompt in random_prompts(target, (2, 7)):
        decoded = generate(target, prompt, 100, head=head, plan=tree)
        plain, room = generate(target, prompt, 100), target.config.context - len(prompt)
        text = PlainText.read(target, prompt, plain.tokens, room, sampler)
        row = foresight.speed_of(oracle, Scripted(), head, [text], sampler)
        assert row["tau"] == row["speed"] == pytest.approx(1 + row["nodes"]) and row["nodes"] > 0
        assert row["nodes"] == row["steps"] and row["tau"] >= decoded.acceptance_length
        if width == 1:
            lengths = decoded.produced[: decoded.uncut_cycles]
            assert [1 + nodes for nodes, _ in oracle.made] == lengths


def test_a_cycle_that_a_stop_token_cuts_costs_nothing(target, trained):
    """As little as it counts in tau: its draft does not count either."""
    head, sampler, oracle = trained(), Sampler(CPU), foresight.Oracle(4, 3)
    prompt = random_prompts(target, (7,))[0]
    plain, counted = generate(target, prompt, 100).tokens, set()
    room = target.config.context - len(prompt)
    whole = PlainText.read(target, prompt, plain, room, sampler)
    for end in range(2, len(plain)):  # the other text stops there, although there was room
        cut = PlainText.read(target, prompt, plain[:end], room, sampler)
        row = foresight.speed_of(oracle, Scripted(), head, [cut, whole], sampler)
        drafts = len(oracle.made)
        found = [replay(head, {"it": oracle}, text, sampler)["it"] for text in (cut, whole)]
        assert drafts == sum(one.cycles for one in found)
        assert row["tau"] == pytest.approx(sum(one.written for one in found) / drafts)
        counted.add(drafts)
    assert len(counted) > 3


def test_what_is_foreseen_is_told_by_tenths_of_the_tokens():
    """Each tenth: its mean forecast, and how often it came true; here exactly as foreseen."""
    sure = torch.linspace(-3, 3, 200, dtype=torch.float64)[torch.randperm(200)]
    seen = Seen(*(sure[:, None] for _ in Seen._fields))
    told = foresight.foreseen(lambda part: part[0], seen, sure.sigmoid()[:, None])
    tenths = sure.sort().values.view(10, 20).sigmoid().mean(1).tolist()
    assert told["deciles"] == [pytest.approx([tenth, tenth]) for tenth in tenths]
    entropy = torch.nn.functional.binary_cross_entropy(sure.sigmoid(), sure.sigmoid())
    assert told["bce"] == pytest.approx(entropy.item())


@pytest.mark.parametrize("temperature", [0, 1])
def test_foresight_is_measured_in_one_command(tiny_run, tmp_path, call, monkeypatch, temperature):
    """On the tests' tiny run: what it foresees, what that is worth, and decoding."""
    monkeypatch.setattr("costs.SECONDS", 0.0)
    monkeypatch.setattr("study.sizes.is_loop", lambda tokens: False)
    monkeypatch.setattr("study.prompts.from_documents.__defaults__", (12,))
    monkeypatch.setattr("study.foresight.DEPTH", 5)
    monkeypatch.setattr("study.foresight.ROUNDS", 2)
    monkeypatch.setattr("study.foresight.STEPS", (1, 5))
    monkeypatch.setattr("targets.written.ON_CPU", 40)
    run = shutil.copytree(tiny_run.folder, tmp_path / "run")
    argv = ["--out_dir", run, "--temperature", temperature, "--written_tokens", 3840]
    argv += ["--rows", 1000, "--num_prompts", 2, "--max_new_tokens", 12, "--test_prompts", 2]
    status, out, err = call(foresight.main, *argv, "--dtype", "float32")
    assert (status, err) == (0, "")
    kind = "sampled" if temperature else "greedy"
    result = json.loads((run / f"foresight-{kind}.json").read_text())
    told, valid = result["foreseen"], result["validation"]
    for name in ("judge", "logistic", "q"):
        assert told[name]["bce"] > 0 and 8 <= len(told[name]["deciles"]) <= 10
        for width, patience in foresight.SHAPES:
            row = valid[f"{name} of {width}, {patience}"]
            assert row["tau"] >= 1 and 0 <= row["nodes"] <= 24 and 1 <= row["steps"] <= 5
    for name in ("judge", "logistic", "q"):
        rows = {shape: valid["{} of {}, {}".format(name, *shape)] for shape in foresight.SHAPES}
        fastest = max(rows, key=lambda shape: rows[shape]["speed"])
        assert valid[name] == rows[fastest] | {"shape": [*fastest]}
    most, without = max(valid[f"oracle of {w}"]["speed"] for w in (1, 2, 4)), valid["best"]["speed"]
    if most > max(1.0, without):
        gain = valid["judge"]["speed"] - max(1.0, without)
        share = gain / (most - max(1.0, without))
        assert valid["judge"]["share"] == pytest.approx(share)
    heads = result["test"]["figures"]["heads"]
    assert heads.keys() == {"best", "judge", "logistic", "q"}
    assert all(("identical" in row) == (temperature == 0) for row in heads.values())
    # A paying tree's cost goes by its steps, and is not reckoned as that of a draft of one size.
    assert [name for name, row in heads.items() if "c_draft" in row] == ["best"]
    assert temperature or all(row["identical"] == 1 for row in heads.values())
    assert "| judge, width " in out
