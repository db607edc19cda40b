"""Passes of fixed shapes write the text that is written without them.

CUDA graphs are recorded where there is a GPU. On the CPU a stand-in does what one does: it repeats
a pass that reads fixed places, and puts the output where it was the last time. In float64 rounding
flips no choice, so that texts have to be equal token by token.
"""

import gc

import pytest
import torch
from test_device import DEVICES, plans_on
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toys import own_text, random_prompts, tiny_head, tiny_target, whole_batch

from costs import measure_acceptance, size_costs
from draft_head import build_head
from speculate import generate
from targets import graphs
from targets.graphs import Passes, replay_passes

RECORDED = []  # a body for each recording


class Tape(TorchDispatchMode):
    """Notes each call of a kernel, with its tensors and numbers, as a CUDA graph does."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        made = kernel(*args, **(kwargs or {}))
        self.calls.append((kernel, args, kwargs or {}, made))
        return made


def tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def record(body):
    """A CUDA graph. On the CPU: the same kernels again, on the same places, with the numbers that
    Python gave them the first time; results go where they went.
    """
    RECORDED.append(body)
    if torch.cuda.is_available():
        return graphs.record(body)
    with Tape() as tape:
        output = body()

    def replay():
        with torch.inference_mode():
            for kernel, args, kwargs, made in tape.calls:
                places = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
                if kernel._schema.is_mutable:
                    kernel(*args, **kwargs)
                elif any(t.untyped_storage().data_ptr() not in places for t in tensors(made)):
                    for place, value in zip(tensors(made), tensors(kernel(*args, **kwargs))):
                        place.copy_(value)  # no view, which would be up to date anyway
        return output

    return replay


@pytest.fixture(scope="module")
def usual():
    target = tiny_target(seed=2, context=40)
    heads = {
        (kind, k): tiny_head(kind, k, target, 60) for kind in ("medusa", "eagle") for k in (1, 2)
    }
    return target, heads


@pytest.fixture
def replayed(usual, monkeypatch):
    """The same target and heads with recorded passes, on a GPU if there is one; small caches."""
    monkeypatch.setattr(graphs, "ROUND", 8)
    RECORDED.clear()
    target, passes = tiny_target(seed=2, context=40).to(DEVICES[-1]), Passes(record)
    replay_passes(target, passes)
    heads = {}
    for name, head in usual[1].items():
        heads[name] = build_head(head.config, target).double().eval().requires_grad_(False)
        heads[name].to(DEVICES[-1]).load_state_dict(head.state_dict())
        replay_passes(heads[name], passes)
    return target, heads


def texts(target, heads, kind: str, layers: int, **request) -> list[list[int]]:
    """Of several prompts, lengths and plans, one after the other: caches go from text to text."""
    found = []
    for prompt in random_prompts(target, (1, 7, 20)):
        for limit in (3, 40):
            found.append(generate(target, prompt, limit, **request).tokens)
            for name, plan in plans_on(target.embed.weight.device).items():
                if kind == "eagle" or name != "growing tree":
                    head = heads[kind, layers]
                    found.append(
                        generate(target, prompt, limit, head=head, plan=plan, **request).tokens
                    )
    return found


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("sampling", [{}, dict(temperature=0.8, seed=5)], ids=["greedy", "sampled"])
def test_texts_are_those_of_passes_that_are_not_recorded(usual, replayed, kind, layers, sampling):
    assert texts(*replayed, kind, layers, **sampling) == texts(*usual, kind, layers, **sampling)
    assert RECORDED


def test_the_next_text_records_nothing_again(replayed):
    target, heads = replayed
    prompt = random_prompts(target, (7,))[0]
    for plan in plans_on(target.embed.weight.device).values():
        counts = []
        for _ in range(3):
            generate(target, prompt, 30, head=heads["eagle", 1], plan=plan)
            gc.collect()
            counts.append(len(RECORDED))
        assert counts[0] == counts[1] == counts[2]


def test_two_texts_at_once_have_caches_of_their_own(replayed):
    target, _ = replayed
    caches = [target.new_cache(12) for _ in range(2)]
    places = {cache.keys.data_ptr() for cache in caches}
    caches.pop().advance(5)
    again = target.new_cache(9)  # of the same size, 16
    assert again.length == 0 and again.keys.data_ptr() in places
    caches += [again, target.new_cache(12)]
    assert len({cache.keys.data_ptr() for cache in caches}) == 3


def test_an_output_outlives_the_next_replay(replayed):
    target, _ = replayed
    cache, tokens = target.new_cache(), torch.arange(5, device=DEVICES[-1])[None]
    target(tokens, cache)
    first = target(tokens[:, 1:2], cache)
    kept = first.clone()
    target(tokens[:, 3:4], cache)
    assert torch.equal(first, kept)


def test_figures_of_a_head_are_those_of_passes_that_are_not_recorded(usual, replayed):
    tokens = own_text(usual[0], 4, usual[0].config.context + 1)
    found = [
        measure_acceptance(
            target, heads["eagle", 2], whole_batch(target, tokens.to(target.embed.weight.device))
        )
        for target, heads in (usual, replayed)
    ]
    assert found[0]["tau_estimate"] == pytest.approx(found[1]["tau_estimate"])


def test_costs_are_measured_on_recorded_passes(replayed, monkeypatch):
    """Once recorded, a pass is replayed however often it is timed."""
    monkeypatch.setattr("costs.SECONDS", 0.0)
    target, heads = replayed
    sizes = [(2, 0, 0), (2, 4, 0)]
    counts = []
    for _ in range(6):  # of caches of one size any may be taken, until each has all recordings
        size_costs(target, heads["eagle", 1], sizes)
        gc.collect()
        counts.append(len(RECORDED))
    assert counts[-3] == counts[-1] > 4  # a step, two verifications, two drafts, absorbing


def test_a_pass_that_cannot_be_recorded_is_a_line_and_costs_nothing(usual, replayed, capsys):
    def fail(body):
        raise RuntimeError("CUDA error:\n out of luck")

    target, heads = replayed
    target.passes.how = fail
    assert texts(target, heads, "eagle", 1) == texts(*usual, "eagle", 1)
    assert capsys.readouterr().out.count("--compile does not work here (CUDA error: out of") == 1


def test_a_cache_without_room_is_refused_and_a_used_one_is_clean(replayed):
    target, _ = replayed
    cache, tokens = target.new_cache(8), torch.arange(8, device=DEVICES[-1])[None]
    target(tokens, cache)
    with pytest.raises(ValueError, match="9 tokens exceed a cache of 8"):
        target(tokens[:, :1], cache)
    cache.values.fill_(torch.nan)
    del cache
    again = target.new_cache(8)
    target(tokens[:, :3], again)
    assert target(tokens[:, 3:4], again).isfinite().all()
