"""The projects, done, for the test of their checks. Yours may look otherwise."""

import torch
import torch.nn.functional as F
from torch import nn

from sampling import acceptance, acceptance_probability, residual


def siblings(p, q, drawn):
    """After a rejection both change: p to its residual, q to what the next one was drawn from."""
    accepted, left = torch.zeros(len(drawn), dtype=p.dtype), 1.0
    for i, token in enumerate(drawn):
        keep = acceptance_probability(p[token], q[token])
        accepted[i], left = left * keep, left * (1 - keep)
        p, q = residual(p, q), q.index_fill(0, torch.tensor(token), 0.0)
        q = q / q.sum() if q.any() else q
    return accepted, left * p


def lk_loss(logits, p):
    log_q = logits.log_softmax(-1)
    alpha = acceptance(p, log_q.exp())
    divergence = F.kl_div(log_q, p, reduction="none").sum(-1)
    w = (-3 * alpha.detach()).exp()
    return (w * divergence + (1 - w) * (1 - alpha)).mean()


class run_judge(nn.Module):
    """A recurrent one: its state at a place knows all places before."""

    def __init__(self, width: int, hidden: int = 32):
        super().__init__()
        self.begin, self.run = nn.Linear(width, hidden), nn.GRU(width, hidden, batch_first=True)
        self.judge = nn.Linear(hidden, 1)

    def forward(self, h_from, states):
        return self.judge(self.run(states, self.begin(h_from)[None].contiguous())[0])[..., 0]
