"""The judge of runs: it compares a head's own guesses with the very states that they are guesses of.

A run shifted by one place, or rows of another place, would still train a discriminator: better than
ever, since fake and real would then differ by much more than the head's errors.
"""

import math

import pytest
import torch
from toys import OWN_STEPS, game_setting, gradients

from cli import UserError
from draft_head import Guess
from window import RUNS, WindowDiscriminator, WindowGame


def playing(draft_vocab: int = 0):
    target, head, _, batch = game_setting("eagle", draft_vocab=draft_vocab)
    rows = head.vocabulary.rows(target.lm_head.weight)
    judge = WindowDiscriminator(rows, OWN_STEPS, hidden=16)
    torch.nn.init.normal_(judge.judge[-1].weight)
    return target, head, judge, batch, WindowGame(target, head, judge)


@pytest.mark.parametrize("draft_vocab", [0, 20])
def test_each_guess_stands_beside_the_state_that_it_is_a_guess_of(draft_vocab):
    target, head, judge, batch, game = playing(draft_vocab)
    guess = head(batch, OWN_STEPS)
    perfect = [batch.rows(batch.hidden[:, i:], i) for i in range(1, OWN_STEPS + 1)]
    before, real, fake = game.runs(Guess(perfect, guess.maps), batch)
    assert torch.equal(real, fake) and len(real) > 5
    expected = [
        (b, t)
        for b in range(3)
        for t in range(16 - OWN_STEPS)
        if batch.learn[b, t + 2 : t + 2 + OWN_STEPS].all()
    ]
    assert len(expected) == len(real) < RUNS
    for (b, t), first, run in zip(expected, before, real):
        assert torch.equal(first, batch.hidden[b, t])
        assert torch.equal(run, batch.hidden[b, t + 1 : t + 1 + OWN_STEPS])
    figures = game.health(Guess(perfect, guess.maps), batch)
    assert figures["d_accuracy"] == 0.5 and figures["d_loss"] == pytest.approx(math.log(2))
    assert not torch.equal(*game.runs(guess, batch)[1:])


def test_a_large_batch_is_judged_by_some_of_its_runs(monkeypatch):
    monkeypatch.setattr("window.RUNS", 4)
    _, head, _, batch, game = playing()
    before, real, _ = game.runs(head(batch, OWN_STEPS), batch)
    assert 2 <= len(real) <= 4 and real.shape[1:] == (OWN_STEPS, 16)


def test_either_step_changes_its_own_side_only():
    target, head, judge, batch, game = playing()
    target.requires_grad_(True)
    game.head_loss(head(batch, OWN_STEPS), batch, 1.0, 0.5).backward()
    assert all(w.grad is None for w in [*target.parameters(), *judge.parameters()])
    assert any(w.grad.abs().max() > 0 for w in head.parameters())
    head.zero_grad()
    game.discriminator_loss(head(batch, OWN_STEPS), batch).backward()
    assert all(w.grad is None for w in [*target.parameters(), *head.parameters()])
    assert all(w.grad.abs().max() > 0 for w in judge.judge[-1].parameters())


def test_the_adversarial_part_is_added_to_the_supervised_one():
    _, head, _, batch, game = playing()
    guess = head(batch, OWN_STEPS)
    parts = [game.head_loss(guess, batch, *weights) for weights in ((1.0, 0.0), (0.0, 1.0))]
    both = gradients(head, game.head_loss(guess, batch, 1.0, 0.3))
    for one, other in zip(both, gradients(head, parts[0] + 0.3 * parts[1])):
        torch.testing.assert_close(one, other)
    assert any(g.abs().max() > 1e-5 for g in gradients(head, parts[1]))


def test_it_is_shown_neither_the_size_of_a_state_nor_what_all_logits_share():
    _, _, judge, batch, _ = playing()
    run = batch.hidden[:, 1:4]
    rows = judge.likeliest(run)
    best = (run @ judge._frozen[0].T).sort(descending=True).values[..., : rows.shape[-2]]
    shown = judge.shown(run, rows)
    torch.testing.assert_close(shown[..., 16:], best - best.mean(-1, keepdim=True))
    torch.testing.assert_close(judge.shown(3 * run, rows)[..., :16], shown[..., :16])
    shared = judge.shown(run, rows + torch.ones(16))  # one direction more in all rows alike
    torch.testing.assert_close(shared, shown, rtol=1e-4, atol=1e-4)


def test_it_learns_to_tell_the_two_apart():
    _, head, judge, batch, game = playing()
    optimizer = torch.optim.Adam(judge.parameters(), lr=1e-2)
    guess = head(batch, OWN_STEPS).detach()
    for _ in range(60):
        optimizer.zero_grad()
        game.discriminator_loss(guess, batch).backward()
        optimizer.step()
    figures = game.health(guess, batch)
    assert figures["d_accuracy"] > 0.9 and figures["d_loss"] < math.log(2) - 0.01


def test_medusa_makes_no_guesses_of_its_own():
    from test_training import head_training

    with pytest.raises(UserError, match="guesses of its own"):
        head_training("medusa-koala", discriminator="window", own_steps=3, own_from=0.5)


def test_a_head_is_trained_against_it():
    from test_training import head_training

    flags = dict(discriminator="window", own_steps=3, own_from=0.5, draft_vocab=16)
    training, features = head_training("eagle-koala", **flags)
    batch = training.lesson(features.batch(torch.arange(4)))
    training.discriminator_alone(batch)
    values = training.step(batch, True, 3, log=True)
    assert values["gradient_ratio"] > 0 and 0 <= values["d_accuracy"] <= 1
