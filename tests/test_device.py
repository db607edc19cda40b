"""Every device decodes and trains alike: run on the CPU always, and on a GPU where there is one.

A tensor on the wrong device is an error on a GPU alone, so each kind of draft is made once here. In
float64 rounding flips no choice: the texts of all devices are the CPU's plain one.
"""

import pytest
import torch
from toys import (
    FALSE_ALARM,
    chi_square_p_value,
    law_of_text,
    own_text,
    random_prompts,
    tiny_head,
    tiny_target,
    whole_batch,
)

from costs import best_size, measure_acceptance, size_costs
from discriminator import Discriminator
from draft_head import build_head
from drafts import Chain, CopyFirst, GrowingTree, Lookup, fixed_tree
from plumbing.machine import Autocast
from sampling import Sampler
from speculate import generate
from study.judge import Judge, PayingTree
from study.replay import PlainText, replay
from targets.loading import TRAINED, load
from train import HeadTraining

DEVICES = [torch.device("cpu")]
if torch.cuda.is_available():
    DEVICES.append(torch.device("cuda"))
BRANCHES = ((0,), (1,), (2,), (0, 0), (0, 1), (1, 0))
KINDS = ("medusa", "eagle")


def plans_on(device) -> dict:
    return {
        "chain": Chain(4),
        "fixed tree": fixed_tree(BRANCHES, device),
        "growing tree": GrowingTree(12, 4, 3, device),
        "copies": CopyFirst(Lookup(1, 3), Chain(2)),
    }


@pytest.fixture(scope="module", params=DEVICES, ids=str)
def device(request):
    return request.param


@pytest.fixture(scope="module")
def here():
    """A target and its trained heads on the CPU."""
    target = tiny_target(seed=2)
    heads = {(kind, k): tiny_head(kind, k, target, steps=60) for kind in KINDS for k in (1, 2)}
    return target, heads


@pytest.fixture(scope="module")
def there(here, device):
    """The same on the device."""
    target = tiny_target(seed=2).to(device)
    heads = {}
    for name, head in here[1].items():
        heads[name] = build_head(head.config, target).double().to(device)
        heads[name].load_state_dict(head.state_dict())
        heads[name].eval().requires_grad_(False)
    return target, heads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
def test_greedy_text_is_the_same_on_every_device(here, there, device, kind, layers):
    (target, heads), other = there, here[0]
    for prompt in random_prompts(other, (1, 7, 20)):
        whole = generate(other, prompt, 100).tokens
        assert generate(target, prompt, 100).tokens == whole
        for name, plan in plans_on(device).items():
            if kind == "eagle" or name != "growing tree":
                out = generate(target, prompt, 100, head=heads[kind, layers], plan=plan)
                assert out.tokens == whole, name


def test_a_paying_tree_decodes_on_every_device(here, there, device):
    target, heads = there
    head, prompt = heads["eagle", 1], random_prompts(here[0], (7,))[0]
    costs = [1 + 0.1 * n for n in range(9)], 0.1
    judge = Judge(head.lm_head(), 16).to(device).eval()
    plan = PayingTree(3, 8, 4, device, judge, 1.5, costs)
    text = generate(target, prompt, 100, head=head, plan=plan).tokens
    assert text == generate(here[0], prompt, 100).tokens


@pytest.mark.parametrize("plan", ["chain", "growing tree", "copies"])
def test_sampled_text_has_the_targets_law_on_every_device(device, plan):
    cpu = tiny_target(seed=7, vocab=5, context=12, layers=1, width=8, spread=0.6)
    law = law_of_text(cpu, [0, 1, 0], 3, temperature=1.0)
    head = tiny_head("eagle", 1, cpu)
    target = tiny_target(seed=7, vocab=5, context=12, layers=1, width=8, spread=0.6).to(device)
    moved = build_head(head.config, target).double().to(device)
    moved.load_state_dict(head.state_dict())
    counts, plan = torch.zeros(len(law), dtype=torch.long), plans_on(device)[plan]
    for seed in range(400):
        request = dict(head=moved, plan=plan, temperature=1.0, seed=seed)
        cell = 0
        for token in generate(target, [0, 1, 0], 3, **request).tokens:
            cell = cell * 5 + token
        counts[cell] += 1
    assert chi_square_p_value(counts, law) > FALSE_ALARM


def test_replayed_cycles_are_the_same_on_every_device(here, there, device):
    (target, heads), prompt = there, random_prompts(here[0], (7,))[0]
    head, new = heads["eagle", 2], generate(target, prompt, 100).tokens
    sampler = Sampler(device)
    text = PlainText.read(target, prompt, new, target.config.context - len(prompt), sampler)
    for name, plan in plans_on(device).items():
        found = replay(head, {name: plan}, text, sampler)[name]
        decoded = generate(target, prompt, 100, head=head, plan=plan)
        assert found.written / found.cycles == pytest.approx(decoded.acceptance_length)


def test_costs_are_measured_on_every_device(here, there, monkeypatch):
    monkeypatch.setattr("costs.SECONDS", 0.0)
    target, heads = there
    passes, drafts = size_costs(target, heads["eagle", 1], [(2, 0, 0), (2, 4, 0), (3, 0, 1)])
    assert passes[1] == 1.0 and min([*passes.values(), *drafts.values()]) > 0
    heads["eagle", 1].training_record = {"valid": {"ranks": [[0.5] * 4], "mass": [[0.5] * 4]}}
    assert best_size(target, heads["eagle", 1], "auto", "auto").speedup > 0
    tokens = own_text(here[0], 4, target.config.context + 1).to(target.embed.weight.device)
    batch = whole_batch(target, tokens)
    assert measure_acceptance(target, heads["eagle", 1], batch)["tau_estimate"] >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_joint_loss_is_the_same_on_every_device(here, there, device, kind):
    """With the discriminator in closed form, and then that of a learnt one."""
    losses, tokens = [], own_text(here[0], 4, here[0].config.context + 1)
    for target, heads in (here, there):
        at = target.embed.weight.device
        head = build_head(heads[kind, 2].config, target).double().to(at)
        head.load_state_dict(heads[kind, 2].state_dict())
        torch.manual_seed(0)
        judge = Discriminator(here[0].lm_head.weight, 8, 16).double()
        torch.nn.init.normal_(judge.judge.weight)
        judge.to(at).set_lm_head(target.lm_head.weight)
        batch = whole_batch(target, tokens.to(at))
        for one in (None, judge):
            training = HeadTraining(target, head, one, 1.0, Autocast(at, torch.float64))
            training.ready()
            guess = head.eval()(batch)
            loss = training.head_loss(guess, batch, 1.0, 0.1)
            loss.backward()
            losses.append(loss.item())
        losses.append(training.d_loss(guess.detach(), batch).item())
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-9)


def test_the_shipped_heads_decode_on_every_device(device):
    """In float32, where texts may part at a near-tie only: compared are the first tokens."""
    target, head, encoding = load(TRAINED / "cpu", "eagle-koala", str(device), "float32")
    prompt = encoding.encode_ordinary("def read(self, size=-1):\n")
    plain = generate(target, prompt, 24).tokens
    for size in (dict(gamma=4), dict(gamma=4, nodes=12), dict(lookup=2)):
        assert generate(target, prompt, 24, head=head, **size).tokens == plain
