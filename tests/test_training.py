"""How a head is trained: the mathematics of the game, who may change what, what is measured.

The adversarial term is easily a term that does nothing, or one that changes what it should not:
the target, the discriminator's share of the game, the original heads that it is compared with.
Whole runs, and how they are resumed, are in test_resuming.py.
"""

import itertools
import math
import operator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from toys import OWN_STEPS, game_setting, gradients, in_training, logits_of, whole_vocabulary

from costs import DRAFT_POSITIONS, measure_acceptance
from discriminator import (
    Discriminator,
    adversarial_loss,
    discriminator_loss,
    exact_logits,
    health,
    health_of,
    jensen_shannon,
)
from draft_head import Guess, HeadConfig, build_head
from model import GPT, GPTConfig
from plumbing.cli import UserError
from plumbing.machine import Autocast
from plumbing.progress import batch_indices, is_due, schedule
from recipe import TrainConfig
from sampling import acceptance, probabilities
from study.ablation import TEMPERATURES, alpha_by_temperature
from targets.features import Features, evenly
from targets.small import bits_per_byte
from train import new_training

# ------------------------------------------------------------------------- the discriminator


def two_laws(seed: int = 0, shape=(5, 30), size: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * size
    return p.softmax(-1), q.softmax(-1)


@pytest.mark.parametrize("size", [0.3, 2.0, 10.0])
def test_the_best_discriminator_reaches_the_bounds_of_theory(size):
    p, q = two_laws(size=size)
    figures, js = health(exact_logits(p, q), p, q), jensen_shannon(p, q).mean().item()
    alpha = acceptance(p, q).mean().item()
    assert figures["d_loss"] == pytest.approx(2 * math.log(2) - 2 * js, abs=1e-6)
    assert figures["share_found"] == pytest.approx(1, abs=1e-6)
    assert figures["d_accuracy"] == pytest.approx(1 - alpha / 2, abs=1e-9)
    assert figures["d_accuracy_bound"] == pytest.approx(1 - alpha / 2, abs=1e-9)


def test_no_other_discriminator_does_better():
    p, q = two_laws()
    best = exact_logits(p, q)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        other = best + 0.1 * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert discriminator_loss(other, p, q) > discriminator_loss(best, p, q)
        assert health(other, p, q)["d_accuracy"] <= health(best, p, q)["d_accuracy"]


def test_a_discriminator_that_knows_nothing_has_found_nothing():
    p, q = two_laws()
    figures = health(torch.zeros_like(p), p, q)
    assert figures["share_found"] == pytest.approx(0, abs=1e-12)
    assert figures["d_accuracy"] == pytest.approx(0.5, abs=1e-12)
    assert figures["d_loss"] == pytest.approx(2 * math.log(2), abs=1e-12)
    assert math.isfinite(health(torch.zeros_like(p), p, p)["share_found"])


def test_the_jensen_shannon_divergence_ends_at_0_and_ln_2():
    p, q = two_laws()
    assert jensen_shannon(p, p).abs().max() < 1e-12
    disjoint = torch.tensor([[0.5, 0.5, 0, 0, 0]]), torch.tensor([[0, 0, 0.25, 0.75, 0]])
    assert jensen_shannon(*disjoint).item() == pytest.approx(math.log(2), abs=1e-6)
    m = (p + q) / 2
    by_entropy = [-(x * x.log()).sum(-1) for x in (m, p, q)]
    expected = by_entropy[0] - (by_entropy[1] + by_entropy[2]) / 2
    torch.testing.assert_close(jensen_shannon(p, q), expected, rtol=0, atol=1e-12)


def test_the_head_is_taught_the_divergence_from_the_target():
    """At D* the gradient of L_adv is that of 2 KL(m || p), m = (p + q) / 2."""
    p, q0 = two_laws()
    logits = q0.log().requires_grad_()

    def gradient(loss) -> torch.Tensor:
        q = logits.softmax(-1)
        return torch.autograd.grad(loss(q), logits)[0]

    def divergence(q):
        m = (p + q) / 2
        return 2 * (m * (m / p).log()).sum(-1).mean()

    game = gradient(lambda q: adversarial_loss(exact_logits(p, q), q))
    torch.testing.assert_close(game, gradient(divergence), rtol=0, atol=1e-10)
    assert game.abs().max() > 1e-3


def test_each_side_learns_from_its_own_loss_only():
    p, q = (law.requires_grad_() for law in two_laws())
    logits = torch.zeros_like(p, requires_grad=True)
    discriminator_loss(logits, p, q).backward()
    assert logits.grad is not None and p.grad is None and q.grad is None
    logits.grad = None
    adversarial_loss(logits, q).backward()
    assert logits.grad is None and q.grad is not None
    assert not exact_logits(p, q).requires_grad


def test_the_loss_is_finite_where_a_law_has_zeros():
    p, q = torch.tensor([[1.0, 0, 0]]), torch.tensor([[0, 1.0, 0]]).requires_grad_()
    logits = exact_logits(p, q)
    adversarial_loss(logits, q).backward()
    assert logits.isfinite().all() and q.grad.isfinite().all()
    assert health(logits, p, q.detach())["d_loss"] == pytest.approx(0, abs=1e-6)


def test_a_new_discriminator_is_undecided_and_owns_no_lm_head():
    lm_head = torch.nn.Parameter(torch.randn(40, 8))
    judge = Discriminator(lm_head, num_positions=4, hidden=16)
    states = torch.randn(2, 3, 8)
    for position in range(4):
        assert torch.equal(
            judge.score(judge.context(states, states, position)), torch.zeros(2, 3, 40)
        )
    context = torch.randn(2, 3, 9)  # g and b
    by_hand = context[..., :8] @ lm_head.T + context[..., 8:]
    torch.testing.assert_close(judge.score(context), by_hand)
    tensors = [*judge.parameters(), *judge.state_dict().values()]
    assert not [t for t in tensors if t.data_ptr() == lm_head.data_ptr() or 40 in t.shape]


def test_the_cosine_compares_what_the_game_teaches_with_what_is_wanted():
    p, q = two_laws()
    z = q.log().requires_grad_()

    def downhill(loss: torch.Tensor) -> torch.Tensor:
        return -torch.autograd.grad(loss, z)[0]

    for logits in (exact_logits(p, q), torch.randn(p.shape, dtype=p.dtype), -exact_logits(p, q)):
        taught = downhill(adversarial_loss(logits, z.softmax(-1)))
        wanted = downhill(-acceptance(p, z.softmax(-1)).sum())
        expected = F.cosine_similarity(taught, wanted, dim=-1).mean().item()
        assert health(logits, p, q)["cosine"] == pytest.approx(expected, abs=1e-9)
    assert health(exact_logits(p, q), p, q)["cosine"] > 0.5
    assert health(-exact_logits(p, q), p, q)["cosine"] < -0.2


def test_a_wider_head_has_a_wider_mlp_and_nothing_else():
    config = GPTConfig(40, 16, num_layers=1, width=16, num_heads=2, num_kv_heads=2, mlp_width=16)
    target = GPT(config)
    plain, wide = (build_head(HeadConfig("eagle", mlp_width=n), target) for n in (0, 40))
    sizes = [{n: w.shape for n, w in head.named_parameters()} for head in (plain, wide)]
    changed = {name for name in sizes[0] if sizes[0][name] != sizes[1][name]}
    assert changed == {"blocks.0.gate_up.weight", "blocks.0.mlp_out.weight"}
    assert sizes[1]["blocks.0.mlp_out.weight"] == (16, 40)
    with pytest.raises(UserError, match="no MLP"):
        HeadConfig("medusa", mlp_width=40)


# -------------------------------------------------------------------------------- the game


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_lambda_0_is_supervised_training(kind):
    target, head, judge, batch = game_setting(kind)
    training = in_training(target, head, judge)
    guess = head(batch, OWN_STEPS)
    supervised, adversarial = (
        training.head_loss(guess, batch),
        training.head_loss(guess, batch, 0.0, 1.0),
    )
    alone, without = gradients(head, supervised), gradients(head, supervised + 0.0 * adversarial)
    assert all(torch.equal(a, b) for a, b in zip(alone, without))
    assert any(g.abs().max() > 1e-4 for g in gradients(head, adversarial))  # it would matter
    both = gradients(head, training.head_loss(guess, batch, 1.0, 0.3))
    for one, other in zip(both, gradients(head, supervised + 0.3 * adversarial)):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["medusa-koala", "eagle-koala"])
@pytest.mark.parametrize("log", [False, True])
def test_until_D_has_learnt_the_head_is_trained_without_it(name, log):
    """A step of the first part is the same with a lambda of 1 and of 0, and D does not move."""
    (one, features), (other, _) = (
        head_training(name, head=name, layers=2, adversarial_weight=weight) for weight in (1.0, 0.0)
    )
    torch.nn.init.normal_(one.discriminator.judge.weight, std=0.3)  # a D with an opinion
    opinion = one.discriminator.judge.weight.clone()
    for training in (one, other):
        torch.manual_seed(1)
        training.joint_step(training.batch(features, torch.arange(4)), "supervised", 2, log=log)
    assert all(map(torch.equal, one.head.parameters(), other.head.parameters()))
    assert torch.equal(one.discriminator.judge.weight, opinion)


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize("closed_form", [False, True])
def test_a_heads_step_changes_neither_target_nor_discriminator(kind, closed_form):
    target, head, judge, batch = game_setting(kind)
    target.requires_grad_(True)  # even then
    training = in_training(target, head, None if closed_form else judge)
    training.head_loss(head(batch, OWN_STEPS), batch, 1.0, 1.0).backward()
    assert all(w.grad is None for w in [*target.parameters(), *judge.parameters()])
    assert any(w.grad is not None and w.grad.abs().max() > 0 for w in head.parameters())


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_the_discriminators_step_changes_neither_target_nor_head(kind):
    target, head, judge, batch = game_setting(kind)
    target.requires_grad_(True)
    training = in_training(target, head, judge)
    training.d_loss(head(batch, OWN_STEPS).detach(), batch).backward()
    assert all(w.grad is None for w in [*target.parameters(), *head.parameters()])
    assert judge.judge.weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_a_guess_is_compared_with_the_targets_law_for_the_same_token(kind):
    """A head that knew the target's next states would be indistinguishable from it."""
    target, head, _, batch = game_setting(kind)
    training = in_training(target, head)
    guess = head(batch, OWN_STEPS)
    places = range(1, len(guess.states) + 1)
    assert len(places) == (4 if kind == "medusa" else OWN_STEPS)
    states = [batch.rows(batch.hidden[:, i:], i) for i in places]
    perfect = Guess(states, [target.lm_head.weight] * len(places))
    assert [x.shape for x in logits_of(perfect)] == [x.shape for x in logits_of(guess)]
    laws = [
        probabilities(after, training.lm_head)
        for *_, (_, _, after, _), _ in training.positions(guess, batch)
    ]
    for i, p in zip(places, laws):  # to be learnt, and with a state to guess from, `i` before
        assert len(p) == batch.learn[:, i + 1 :].sum()
        torch.testing.assert_close(p, logits_of(perfect)[i - 1].softmax(-1))
    figures = health_of(training, perfect, batch)
    assert figures["d_accuracy_bound"] == pytest.approx(0.5, abs=1e-5)
    assert figures["d_loss"] == pytest.approx(2 * math.log(2), abs=1e-5)
    if kind == "eagle":  # SmoothL1 = 0 then, and the cross entropy is the target's own entropy
        entropy = sum(0.8**i * -(p * p.log()).sum(-1).mean() for i, p in enumerate(laws))
        torch.testing.assert_close(training.head_loss(perfect, batch), 0.1 * entropy)
    else:  # equation 1 of Medusa, on logits that spell the text
        labels = [batch.tokens[:, i + 1 :][batch.learn[:, i + 1 :]] for i in places]
        spelled = [100.0 * F.one_hot(label, 40).float() for label in labels]
        loss = training.head_loss(Guess(spelled, [torch.eye(40)] * len(places)), batch)
        assert loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_the_discriminator_sees_the_state_guessed_from_and_the_one_guessed_for(kind):
    target, head, judge, batch = game_setting(kind)
    seen = []

    class Recorder(Discriminator):
        def context(self, before, after, position):
            seen.append((before, after, position))
            return super().context(before, after, position)

    judge.__class__ = Recorder
    training, guess = in_training(target, head, judge), head(batch, OWN_STEPS)
    looks = training.d_loss, partial(training.head_loss, adv=1.0), partial(health_of, training)
    for look in looks:
        seen.clear()
        look(guess.detach(), batch)
        assert len(seen) == (4 if kind == "medusa" else OWN_STEPS)
        for i, (before, after, position) in enumerate(seen, start=1):
            assert torch.equal(before, batch.hidden[:, :-i][batch.learn[:, i + 1 :]])
            assert torch.equal(after, batch.hidden[:, i:][batch.learn[:, i + 1 :]])
            assert position == i - 1


@pytest.mark.parametrize(
    "kind, labels, form",
    [
        ("medusa", "own", "learnt"),
        ("medusa", "own", "blind"),
        ("eagle", "own", "learnt"),
        ("eagle", "hard", "learnt"),
        ("eagle", "hard", "blind"),
        ("eagle", "hard", "difference"),
        ("eagle", "none", "learnt"),
    ],
)
@pytest.mark.parametrize("draft_vocab", [0, 20])
def test_losses_by_rows_are_those_of_all_rows_at_once(kind, labels, form, draft_vocab):
    """Values and gradients of L_sup, L_adv and L_D, written down with whole tensors."""
    target, head, judge, batch = game_setting(kind, draft_vocab=draft_vocab)
    for weight in head.parameters():  # away from p = q, where min(p, q) has an edge
        weight.data += 0.1 * torch.randn_like(weight)
    how = dict(feature_weight=0.7, labels=labels, form=form)
    training, guess = in_training(target, head, judge, **how), head(batch, OWN_STEPS)
    supervised = adversarial = of_judge = 0.0
    for i, (logits, state) in enumerate(zip(logits_of(guess), guess.states), start=1):
        before, after = batch.rows(batch.hidden[:, :-i], i), batch.rows(batch.hidden[:, i:], i)
        tokens = head.vocabulary.indices_of(batch.rows(batch.tokens[:, i + 1 :], i))
        p, q = F.linear(after, training.lm_head).softmax(-1), logits.softmax(-1)
        seen, real = shown(form, state.detach(), after), p
        if form == "blind":
            real = F.one_hot(tokens, q.shape[-1])
        judged = judge.score(judge.context(before, seen, i - 1))
        weight = head.position_weights[i - 1]
        of_judge += weight * discriminator_loss(judged, real, q)
        adversarial += weight * adversarial_loss(judged, q)
        label = tokens if kind == "medusa" or labels == "hard" else p
        fit = F.cross_entropy(logits, label)
        close = 0.7 * F.smooth_l1_loss(state, after) + 0.1 * fit * (labels != "none")
        supervised += weight * (fit if kind == "medusa" else close)
    for piece in (1, 7, 1000):
        training.piece = piece
        for loss, expected, module in (
            (training.head_loss(guess, batch), supervised, head),
            (training.head_loss(guess, batch, 0.0, 1.0), adversarial, head),
            (training.d_loss(guess.detach(), batch), of_judge, judge),
        ):
            torch.testing.assert_close(loss, expected)
            for one, other in zip(gradients(module, loss), gradients(module, expected)):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_in_bfloat16_the_losses_teach_the_same(kind):
    target, head, judge, batch = game_setting(kind, draft_vocab=20)

    def taught(dtype) -> tuple[list, list]:
        def autocast():  # one for each loss: it keeps weights it met without a gradient so
            return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)

        training = in_training(target, head, judge, dtype)
        with autocast():
            guess = head(batch, OWN_STEPS)
            loss = training.head_loss(guess, batch, 1.0, 0.3)
        with autocast():
            of_judge = training.d_loss(guess.detach(), batch)
        return gradients(head, loss), gradients(judge, of_judge)

    for exact, low in zip(taught(torch.float32), taught(torch.bfloat16)):
        assert all(one.dtype == torch.float32 for one in low)
        exact, low = torch.cat([g.flatten() for g in exact]), torch.cat([g.flatten() for g in low])
        assert (exact - low).norm() < 0.03 * exact.norm()


def test_a_head_that_has_decoded_can_be_trained():
    target, head, _, batch = game_setting("eagle", draft_vocab=20)
    with torch.inference_mode():
        state = head.start(8)
        head.absorb(state, batch.tokens[:1, 1:3], batch.hidden[:1, :2])
        head.expand(state)
    assert (
        gradients(head, in_training(target, head).head_loss(head(batch), batch))[0].abs().max() > 0
    )


@pytest.mark.parametrize("draft_vocab", [0, 20])
@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_the_loss_is_the_mean_over_what_is_to_be_learnt(kind, draft_vocab):
    """Written down token by token, from guesses at all places; masked tokens have no share in it."""
    target, head, _, batch = game_setting(kind, draft_vocab=draft_vocab)
    training = in_training(target, head)
    everywhere = batch._replace(learn=torch.ones_like(batch.learn))
    all_guesses, (tokens, hidden, learn) = head(everywhere, OWN_STEPS), batch
    known = head.vocabulary.tokens_at(torch.arange(draft_vocab or 40))
    expected = 0.0
    for i, rows in enumerate(logits_of(all_guesses), start=1):
        logits, losses = rows.unflatten(0, (3, -1)), []
        for b, t in itertools.product(range(3), range(16 - i)):
            if not learn[b, t + 1 + i]:
                continue
            log_q = logits[b, t].log_softmax(-1)
            if kind == "medusa":
                (place,) = (known == tokens[b, t + 1 + i]).nonzero()[:, 0].tolist()
                losses.append(-log_q[place])
            else:
                p = target.lm_head(hidden[b, t + i])[known].softmax(-1)
                feature = all_guesses.states[i - 1].unflatten(0, (3, -1))[b, t]
                close = F.smooth_l1_loss(feature, hidden[b, t + i])
                losses.append(close - 0.1 * (p * log_q).sum())
        expected += head.position_weights[i - 1] * torch.stack(losses).mean()
        assert 3 < len(losses) < 3 * (16 - i)
    guess = head(batch, OWN_STEPS)
    loss = training.head_loss(guess, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    # And other labels there change nothing, not by a bit.
    others = torch.randint(0, 40, tokens.shape), torch.randn_like(hidden)
    changed = batch._replace(
        tokens=torch.where(learn, tokens, others[0]),
        hidden=torch.where(learn[:, 1:, None], hidden, others[1]),
    )
    assert torch.equal(training.head_loss(guess, changed), loss)


def test_noise_is_added_in_training_only_and_to_the_input_only():
    target, head, _, batch = game_setting("eagle")
    before = batch.hidden.clone()
    calm = head.eval()(batch).states[0]
    assert torch.equal(calm, head(batch).states[0])
    noisy = head.train()(batch).states[0]
    assert not torch.equal(noisy, calm) and torch.equal(batch.hidden, before)


# ------------------------------------------------------------------------ one step of training


def head_training(name: str = "eagle-koala", window: int = 16, **flags):
    """A `HeadTraining` that has begun, and the features it learns from."""
    target, _, _, batch = game_setting("eagle")
    config = TrainConfig(target_context=window, batch_tokens=64, **flags)
    features = Features(target, batch.tokens[:, : window + 1].repeat(4, 1), nullcontext)
    training = new_training(config, name, target, Autocast(torch.device("cpu"), torch.float32))
    training.begin(features)
    training.head.train()
    return training, features


def test_a_training_has_the_rates_and_weights_of_its_settings():
    rates = dict(head_lr=0.5, discriminator_lr=0.25, feature_weight=0.125)
    flags = dict(head="eagle", adversarial_weight=2.0)
    training, _ = head_training("eagle", **flags, **rates)
    assert {name: getattr(training, name) for name in rates} == rates and training.weight == 2.0


@pytest.mark.parametrize("name", ["medusa-koala", "eagle-koala"])
def test_a_batch_is_learnt_from_if_each_draft_position_has_a_row(name):
    """The last position has one where the token after it is to be learnt; else its mean is none."""
    training, features = head_training(name, own_steps=3)
    positions = training.head.max_draft or 3
    for column, learnt in ((positions, False), (positions + 1, True), (16, True)):
        batch = features.batch(torch.arange(4))
        batch.learn[:] = False
        batch.learn[:, column:] = column > positions
        batch.learn[:, : column + 1] |= column == positions
        figures = training.joint_step(batch, "joint", 3, log=True)
        assert bool(figures) == learnt
        assert all(math.isfinite(value) for value in figures.values())


def state_of(training) -> list[torch.Tensor]:
    """All that training may change, in copies."""
    parts = [training.head, training.discriminator, training.optimizer, training.d_optimizer]
    tensors = torch.utils._pytree.tree_leaves([part.state_dict() for part in parts])
    return [value.clone() for value in tensors if isinstance(value, torch.Tensor)]


def shown(form: str, state: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """What a D of this form sees of the head's guess and of h+."""
    return {"blind": state, "difference": after - state}.get(form, after)


@pytest.mark.parametrize("form", ["learnt", "exact", "blind", "difference"])
@pytest.mark.parametrize("kind", ["medusa", "eagle"])
@pytest.mark.parametrize("log", [False, True])
def test_a_joint_step_is_one_of_D_and_then_one_of_the_head(kind, form, log):
    """Both losses written by hand, with whole tensors, from discriminator.py and draft_head.py.

    Without it a D that never steps, or a lambda of the wrong sign, would leave every other test
    green and turn the finding on the discriminator into one about a bug.
    """
    name = f"{kind}-{form}"
    flags = dict(head=name, layers=2, adversarial_weight=0.5, own_steps=2, discriminator=form)
    (ours, features), (hand, _) = head_training(name, **flags), head_training(name, **flags)
    batch = ours.batch(features, torch.arange(4))
    head, judge, target = hand.head, hand.discriminator, hand.target
    if judge is not None:  # one that has an opinion: a new one teaches nothing
        for training in (ours, hand):
            torch.manual_seed(7)
            torch.nn.init.normal_(training.discriminator.judge.weight, std=0.3)
    torch.manual_seed(1)
    ours.joint_step(batch, "joint", 2, log=log)  # the one call of what is tested

    torch.manual_seed(1)
    guess = head(batch, 2)
    places = []  # of each draft position: weight, logits, state, h_t, h+, p, tokens, label
    for i, (logits, state) in enumerate(zip(logits_of(guess), guess.states), start=1):
        before, after = batch.rows(batch.hidden[:, :-i], i), batch.rows(batch.hidden[:, i:], i)
        p = target.lm_head(after).softmax(-1)
        tokens = batch.rows(batch.tokens[:, i + 1 :], i)
        weight, label = (0.8**i, tokens) if "medusa" in name else (0.8 ** (i - 1), p)
        places.append((weight, logits, state, before, after, p, tokens, label))
    if judge is not None:
        loss = 0.0
        for i, (weight, logits, state, before, after, p, tokens, _) in enumerate(places):
            q, state = logits.detach().softmax(-1), state.detach()
            seen, real = shown(form, state, after), p
            if form == "blind":
                real = F.one_hot(tokens, 40)
            loss = loss + weight * discriminator_loss(
                judge.score(judge.context(before, seen, i)), real, q
            )
        hand.d_optimizer.zero_grad()
        loss.backward()
        hand.d_optimizer.step()
    loss = 0.0
    for i, (weight, logits, state, before, after, p, _, label) in enumerate(places):
        q, seen = logits.softmax(-1), shown(form, state.detach(), after)
        judged = (
            exact_logits(p, q) if judge is None else judge.score(judge.context(before, seen, i))
        )
        supervised = head.supervised_loss(logits, label, state, after)
        loss = loss + weight * (supervised + 0.5 * adversarial_loss(judged, q))
    hand.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    hand.optimizer.step()

    sides = [("the head", ours.head, head)]
    sides += [("D", ours.discriminator, judge)] if judge is not None else []
    for name, mine, theirs in sides:
        for one, other in zip(mine.parameters(), theirs.parameters()):
            differ = f"{name} is another after the step: clipped, at its rate, held fixed?"
            assert torch.allclose(one, other, rtol=0, atol=1e-5), differ


@pytest.mark.parametrize("name", ["medusa-koala", "eagle-koala"])
@pytest.mark.parametrize("part", ["supervised", "joint"])
def test_a_batch_with_nothing_to_learn_changes_nothing(name, part):
    """In a chat it can be all question. The mean of no losses is no number, and would be learnt."""
    training, features = head_training(name, own_steps=3)
    batch = features.batch(torch.arange(4))
    training.joint_step(batch, part, 3)  # so that the optimisers remember something
    before = state_of(training)
    nothing = batch._replace(learn=torch.zeros_like(batch.learn))
    assert training.joint_step(nothing, part, 3, log=True) == {}
    assert all(torch.equal(a, b) for a, b in zip(before, state_of(training), strict=True))
    values = training.joint_step(batch, part, 3, log=True)
    assert all(math.isfinite(value) for value in values.values()) and "loss_sup" in values
    assert not all(torch.equal(a, b) for a, b in zip(before, state_of(training), strict=True))


def test_the_discriminator_slows_down_with_the_head():
    """Both still at the end: a D that leapt on there would have the last word."""
    training, features = head_training()
    batch = features.batch(torch.arange(4))
    training.joint_step(batch, "joint", 1)
    weights = [*training.head.parameters(), *training.discriminator.parameters()]
    before = [w.clone() for w in weights]
    training.joint_step(batch, "joint", 1, rate=0.0)
    assert all(torch.equal(a, b) for a, b in zip(before, weights))
    training.joint_step(batch, "D alone", 1)  # before the game it learns at its full rate
    assert not torch.equal(before[-2], weights[-2])


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_a_head_learns_in_the_smallest_window_too(name):
    training, features = head_training(name, window=2 * DRAFT_POSITIONS)
    assert "loss_sup" in training.joint_step(
        features.batch(torch.arange(4)), "supervised", 1, log=True
    )


@pytest.mark.parametrize(
    "name, labels", [("eagle", "own"), ("medusa", "own"), ("eagle", "hard"), ("medusa", "soft")]
)
def test_who_learns_p_learns_from_every_token_and_who_learns_tokens_from_the_targets_own(
    name, labels
):
    training, features = head_training(name, labels=labels)
    batch = features.batch(torch.arange(4))
    batch.learn[:, ::3] = False
    data = SimpleNamespace(batch=lambda windows: batch)
    learn = training.batch(data, torch.arange(4)).learn
    soft = (name, labels) in (("eagle", "own"), ("medusa", "soft"))
    assert learn.all() if soft else torch.equal(learn, batch.learn)


@pytest.mark.parametrize("name", ["medusa-koala", "eagle-koala"])
def test_a_draft_vocabulary_is_made_of_the_most_frequent_tokens_and_alone_is_learnt(name):
    training, features = head_training(name, own_steps=3, draft_vocab=16)
    known = training.head.vocabulary.tokens
    counts = features.windows.flatten().bincount(minlength=40)
    assert counts[known].min() >= counts.sort().values[-16]
    batch = training.batch(features, torch.arange(4))
    assert torch.equal(batch.learn, torch.isin(batch.tokens, known))
    assert all(rows.shape[-1] == 16 for rows in logits_of(training.head(batch, 3)))
    weight = training.target.lm_head.weight[known]
    assert torch.equal(training.discriminator._frozen[0], weight)  # it judges the same tokens
    before = state_of(training)
    values = training.joint_step(batch, "joint", 3, log=True)
    assert values["loss_sup"] > 0 and 0 <= values["d_accuracy"] <= 1
    assert not all(torch.equal(a, b) for a, b in zip(before, state_of(training), strict=True))


# -------------------------------------------------------------------------------- features


def test_kept_states_are_those_of_the_target(capsys):
    target, _, _, batch = game_setting("eagle")
    windows = batch.tokens.int().repeat(5, 1)
    kept = Features(target, windows, nullcontext, 1.0)
    afresh = Features(target, windows, nullcontext, 0.0)
    assert kept.kept is not None and afresh.kept is None
    assert "computed as needed" in capsys.readouterr().out
    index = torch.tensor([4, 0, 14])
    for features, exact in ((kept, 2e-3), (afresh, 1e-6)):
        read, states, learn = features.batch(index)
        assert torch.equal(read, windows[index].long()) and states.dtype == torch.float32
        assert learn.shape == read.shape and learn.all()  # text is learnt from its first token on
        torch.testing.assert_close(states, target(read[:, :-1]), rtol=exact, atol=exact)
    logits = target.lm_head(afresh.batch(index).hidden)
    torch.testing.assert_close(logits, target.lm_head(target(windows[index, :-1].long())))


def test_the_limit_is_that_of_the_memory_taken():
    target, _, _, batch = game_setting("eagle")
    tokens = batch.tokens
    needed = 3 * 16 * 16 * 2 / 1e9  # windows x positions x width x bytes of a float16
    assert Features(target, tokens, nullcontext, needed * 1.001).kept is not None
    assert Features(target, tokens, nullcontext, needed * 0.999).kept is None


@pytest.mark.parametrize(
    "rows, count", [(1, 1), (10, 10), (10, 99), (10, 0), (1000, 7), (999, 998)]
)
def test_a_sample_is_spread_over_all_rows_without_repeating_one(rows, count):
    picked = evenly(torch.arange(rows), count).tolist()
    assert len(picked) == max(1, min(count, rows)) and sorted(set(picked)) == picked
    gaps = [after - before for before, after in zip(picked, picked[1:])]
    assert picked[0] == 0 and (not gaps or (picked[-1] == rows - 1 and max(gaps) - min(gaps) <= 1))


def test_bits_per_byte_is_the_cross_entropy_of_the_text():
    target, _, _, (tokens, hidden, _) = game_setting("eagle")
    counts = torch.arange(40) % 3 + 1
    log_p = target.lm_head(hidden).log_softmax(-1)
    nats = -sum(log_p[b, t, tokens[b, t + 1]].item() for b in range(3) for t in range(16))
    expected = nats / math.log(2) / sum(counts[x].item() for row in tokens for x in row[1:])
    assert bits_per_byte(target, tokens, counts, nullcontext) == pytest.approx(expected, rel=1e-5)


class Oracle:
    """A head that has looked the target's states up: each of its guesses is the target's law."""

    max_draft = None

    def __init__(self, target, tokens, hidden, sign=1.0):
        self.target, self.tokens, self.hidden, self.sign = target, tokens, hidden, sign
        self.vocabulary = whole_vocabulary(target.config.vocab_size)

    def start(self, max_length, batch):
        return [0, 0]  # how much was absorbed, where the draft is

    def absorb(self, state, tokens, hidden):
        assert torch.equal(hidden, self.hidden[:, state[0] : state[0] + tokens.shape[1]])
        state[0] += tokens.shape[1]

    def expand(self, state, tokens=None):
        if tokens is None:
            state[1] = state[0]
        else:  # the text itself is the path
            assert torch.equal(tokens, self.tokens[:, state[1] + 1, None])
            state[1] += 1
        return self.sign * self.target.lm_head(self.hidden[:, state[1], None])


def test_a_perfect_head_is_measured_as_perfect_and_a_contrary_one_as_useless():
    target, _, _, (tokens, hidden, _) = game_setting("eagle")
    batch = Features(target, tokens, nullcontext, 0.0).batch(torch.arange(3))
    perfect = measure_acceptance(target, Oracle(target, tokens, hidden), batch, stride=2)
    for i in range(1, DRAFT_POSITIONS + 1):
        assert perfect[f"agree_{i}"] == 1
        assert perfect[f"alpha_{i}"] == pytest.approx(1, abs=1e-5)
    assert perfect["tau_estimate"] == pytest.approx(1 + DRAFT_POSITIONS)
    useless = measure_acceptance(target, Oracle(target, tokens, hidden, -1.0), batch, stride=2)
    assert useless["agree_1"] == 0 and useless["tau_estimate"] == 1 and useless["alpha_1"] < 0.2


@pytest.mark.parametrize("kind", ["medusa", "eagle"])
def test_the_first_position_is_measured_as_training_sees_it(kind):
    target, head, _, batch = game_setting(kind)
    torch.nn.init.normal_(head.biases[0] if kind == "medusa" else head.combine.weight)
    features = Features(target, batch.tokens, nullcontext, 0.0)
    batch = features.batch(torch.arange(3))
    measured = measure_acceptance(target, head, batch, stride=1)
    places = range(0, 16 - DRAFT_POSITIONS)
    q, p = logits_of(head(batch))[0].unflatten(0, (3, -1)), target.lm_head(batch.hidden)
    same = [(q[:, t].argmax(-1) == p[:, t + 1].argmax(-1)).float().mean() for t in places]
    alpha = [acceptance(p[:, t + 1].softmax(-1), q[:, t].softmax(-1)).mean() for t in places]
    assert measured["agree_1"] == pytest.approx(torch.stack(same).mean().item(), abs=1e-6)
    agree = [measured[f"agree_{i}"] for i in range(1, DRAFT_POSITIONS + 1)]
    tau = 1 + sum(itertools.accumulate(agree, operator.mul))
    assert measured["tau_estimate"] == pytest.approx(tau) != 1 + sum(agree)
    by_rank = measure_acceptance(target, head, batch, stride=1, by_rank=True)
    for r, (rank, mass) in enumerate(zip(by_rank["ranks"][0], by_rank["mass"][0])):
        guess = [q[:, t].argsort(-1, descending=True)[:, r] for t in places]
        right = [(g == p[:, t + 1].argmax(-1)).float().mean() for g, t in zip(guess, places)]
        p_of = [
            p[:, t + 1].softmax(-1).gather(-1, g[:, None]).mean() for g, t in zip(guess, places)
        ]
        assert rank == pytest.approx(torch.stack(right).mean().item(), abs=1e-6)
        assert mass == pytest.approx(torch.stack(p_of).mean().item(), abs=1e-5)
    assert measured["alpha_1"] == pytest.approx(torch.stack(alpha).mean().item(), abs=1e-5)
    heated = alpha_by_temperature(target, head, batch, stride=1)["heated"]
    for heat, alphas in zip(TEMPERATURES, heated, strict=True):
        hot = [acceptance(p[:, t + 1].softmax(-1), (q[:, t] / heat).softmax(-1)) for t in places]
        assert alphas[0] == pytest.approx(torch.stack(hot).mean().item(), abs=1e-5)


def test_only_drafts_of_what_is_to_be_learnt_are_measured():
    """In a chat a head drafts the model's answers, and what it makes of questions is no matter."""
    target, head, _, batch = game_setting("eagle", draft_vocab=20)
    learn = torch.ones(3, 17, dtype=torch.bool)
    learn[0, 6] = learn[1] = (
        False  # a draft that begins after tokens 1..5 of the first needs the 6th
    )
    masked = batch._replace(learn=learn)
    measured = measure_acceptance(target, head, masked, stride=1, by_rank=True)
    known, agree, alpha = head.vocabulary.tokens, [], []
    everywhere = batch._replace(learn=torch.ones_like(learn))
    q = logits_of(head(everywhere))[0].unflatten(0, (3, -1)).softmax(-1)  # (3, 15, 20)
    p = target.lm_head(batch.hidden).softmax(-1)
    for b, start in itertools.product(range(3), range(1, 13)):
        if learn[b, start + 1 : start + 5].all():
            mine, theirs = q[b, start - 1], p[b, start]
            agree.append(known[mine.argmax()] == theirs.argmax())
            alpha.append(torch.minimum(mine, theirs[known]).sum())
    assert 12 < len(agree) < 24 and 0 < sum(agree) < len(agree)
    assert measured["agree_1"] == pytest.approx(sum(agree).item() / len(agree), abs=1e-6)
    assert measured["alpha_1"] == pytest.approx(sum(alpha).item() / len(alpha), abs=1e-5)
    learn[:] = False
    with pytest.raises(UserError, match="nothing to learn"):
        measure_acceptance(target, head, masked)


# ---------------------------------------------------------------------- batches and schedule


@pytest.mark.parametrize("count, per_step", [(10, 3), (7, 7), (5, 12), (1, 4), (100, 8)])
def test_every_window_is_read_once_an_epoch(count, per_step):
    picks = torch.cat([batch_indices(count, per_step, step, 3) for step in range(60)])
    assert len(picks) == 60 * per_step
    for epoch in picks[: len(picks) // count * count].view(-1, count):
        assert torch.equal(epoch.sort().values, torch.arange(count))


def test_a_batch_is_a_function_of_step_and_seed_alone():
    first = batch_indices(100, 8, 17, 3)
    torch.manual_seed(99)
    torch.rand(5)
    state = torch.get_rng_state()
    assert torch.equal(batch_indices(100, 8, 17, 3), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(batch_indices(100, 8, 17, 4), first)
    assert not torch.equal(batch_indices(100, 100, 0, 3), batch_indices(100, 100, 1, 3))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 1000])
def test_the_schedule_rises_holds_and_falls(steps):
    shares = [schedule(step, steps) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    if steps == 1000:
        assert shares[0] == pytest.approx(1 / 20) and shares[-1] == pytest.approx(1 / 400)
        assert set(shares[19:600]) == {1.0}


@pytest.mark.parametrize("steps, times", [(1, 5), (7, 3), (100, 10), (31, 50)])
def test_the_last_step_is_always_due(steps, times):
    due = [step for step in range(steps) if is_due(step, steps, times)]
    assert due[-1] == steps - 1 and 1 <= len(due) <= 2 * times + 1
