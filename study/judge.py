"""A judge at draft time: how likely the target is to accept a token, foreseen from the draft.

The discriminator of KOALA sees the target's state h+ at the guessed place, and no drafter has it.
Without h+ the odds of the best D are E[p | s] / q, which are 1 everywhere for a head at the optimum
of its cross entropy: nothing can be read off them. So acceptance has to be learnt from verdicts. A
network of D's form,

    A(s, x) = sigmoid(<W[x], g(s)> + b(s) + a_i log(q(x) / (1 - q(x))))

is shown what drafting knows, s: the state h_t that the draft began from, the head's guess h' of the
state at the node, and the draft position i. q is that by which trees are grown today, sharpened in
greedy decoding (`sampling.GREEDY_TEMPERATURE`); untrained, A is q. It learns, by binary cross
entropy, the chance that a token *named* after an accepted node is accepted: [x = argmax p] in
greedy decoding, p(x) at temperature 1. (p is over the whole vocabulary: a token that the head
cannot guess is a rejection.) Verdicts come from drafts along text, made by the decoder's own
`absorb` and `expand`. Its controls: a logistic regression on what q alone says, and q itself.

Its use is `PayingTree`: a growing tree whose nodes are ranked by R, the product of A along their
path. A node that is reached and accepted with chance R adds R tokens to its cycle. The speed

    S = E[tokens] / E[cost]     in tokens per plain step

rises by a node exactly if R > S * (cost of the node) (Dinkelbach, 1967). So the tree keeps its best
n nodes, n = argmax of sum R - S c_verify(n), and goes one level deeper while the tokens expected
there, times its patience, are worth the draft step: an accepted token leads to others. It is judged
by `speculate.match`, so that the text's law is the target's whatever A says: its tokens are named,
and none is drawn.

(With drawn tokens such a gate is a trap. A token once drawn from q has to stay in the draft. To
drop it because *its own* chance is low changes the law of the text: see tests/test_judge.py.)

Sources: SpecDec++ (2405.19715) and DISCO (2405.04304) stop chains so, EAGLE-2 (2406.16858) ranks
trees by q.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from costs import walk
from discriminator import Discriminator
from drafts import WIDTH, GrowingTree
from sampling import Sampler, argmax

SCALES = {"scale", "weights", "bias"}  # parameters that learn fast
POSITIONS = 8  # draft positions that are told apart; further ones count as the last


class Seen(NamedTuple):
    """What drafting knows of N nodes, and of their WIDTH likeliest next tokens each."""

    h_from: Tensor  # (N, D): the target's last state before the draft
    h_to: Tensor  # (N, D): the head's guess of the node's own
    position: Tensor  # (N,)
    indices: Tensor  # (N, WIDTH): the tokens, by their places among the head's logits
    odds: Tensor  # (N, WIDTH): log(q / (1 - q)) of these

    @classmethod
    def of(cls, h_from: Tensor, h_to: Tensor, position: int, indices, log_q: Tensor) -> "Seen":
        """Of nodes at one draft position, from 0, and what `Sampler.likeliest` says of them."""
        where = torch.tensor(min(position, POSITIONS - 1), device=log_q.device).expand(len(log_q))
        return cls(h_from.float(), h_to.float(), where, indices, log_q.exp().logit(1e-6))


class Judge(Discriminator):
    """A, see the file's docstring. W: the rows (S, D) of the target's LM head."""

    def __init__(self, lm_head: Tensor, hidden: int = 128):
        super().__init__(lm_head.float(), POSITIONS, hidden)
        self.scale = nn.Embedding.from_pretrained(torch.ones(POSITIONS, 1), freeze=False)  # a_i

    def forward(self, seen: Seen) -> Tensor:
        """Logits of A (N, WIDTH). Untrained, they are the odds of q."""
        g, b = self.context(seen.h_from, seen.h_to, seen.position).tensor_split([-1], -1)
        scores = (F.embedding(seen.indices, self._frozen[0]) @ g[..., None])[..., 0]
        return scores + b + self.scale(seen.position) * seen.odds


class Logistic(nn.Module):
    """The control that sees q alone: the token's odds and the largest, and the position."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.bias = nn.Embedding.from_pretrained(torch.zeros(POSITIONS, 1), freeze=False)

    def forward(self, seen: Seen) -> Tensor:
        """Logits (N, WIDTH). Untrained, they are the odds of q."""
        own, largest = self.weights
        return own * seen.odds + largest * seen.odds[:, :1] + self.bias(seen.position)


@torch.no_grad()
def verdicts(target, head, data, greedy: bool, count: int) -> tuple[Seen, Tensor]:
    """Up to `count` nodes, on the way along texts, and the chances (N, WIDTH) of their tokens.

    data: see targets/features.py. A node counts where a draft along the text comes to it: all
    before it were named and accepted. (Greedily a text's token is accepted where it is the target's
    first choice, and a text of the corpus has others as well.)
    """
    sampler, batch = Sampler(head.combine.weight.device, 0.0 if greedy else 1.0), 64
    nodes, chances, found, accepted = [], [], 0, None
    for first in range(0, len(data), batch):
        tokens, hidden, learn = data.batch(torch.arange(first, min(first + batch, len(data))))
        for start, i, logits, state in walk(head, tokens, hidden, POSITIONS, POSITIONS):
            here = start + i
            use = learn[:, here + 1] & (accepted if i > 0 else True)  # (B,)
            p = target.lm_head(hidden[:, here]).float().softmax(-1)  # (B, V)
            likeliest = sampler.likeliest(logits[use], WIDTH)
            seen = Seen.of(hidden[use, start - 1], state.nodes[use, 0], i, *likeliest)
            named, choice = head.vocabulary.tokens_at(seen.indices), argmax(p)
            is_it = named == choice[use, None]
            nodes.append(seen)
            chances.append(is_it.float() if greedy else p[use].gather(-1, named))
            following, accepted = tokens[:, here + 1], use.clone()
            accepted[use] = (named == following[use, None]).any(-1)
            if greedy:
                accepted &= choice == following
        found = sum(map(len, chances))
        if found >= count:
            break
    return Seen(*map(torch.cat, zip(*nodes))), torch.cat(chances)


def fit(model: nn.Module, seen: Seen, chance: Tensor, epochs: int = 6, rows: int = 512):
    """Minimise the binary cross entropy with `chance`; the rates fall to 0."""
    few = [w for name, w in model.named_parameters() if name.split(".")[0] in SCALES]
    many = [w for name, w in model.named_parameters() if name.split(".")[0] not in SCALES]
    groups = [{"params": few, "weight_decay": 0.0}, {"params": many, "weight_decay": 1.0}]
    optimizer, rates = torch.optim.AdamW(groups), [3e-2, 1e-3]
    steps = epochs * -(-len(chance) // rows)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, steps, pct_start=0.05)
    for _ in range(epochs):
        for index in torch.randperm(len(chance)).split(rows):
            logits = model(Seen(*(values[index] for values in seen)))
            loss = F.binary_cross_entropy_with_logits(logits, chance[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


class PayingTree(GrowingTree):
    """The tree of the nodes that pay, see the file's docstring.

    model: ranks them; None: q does, as in `GrowingTree`. speed: S. verify (nodes + 1,): the cost of
    a pass over 1, 2, .. tokens; step: that of a draft step; both in plain steps. followed (WIDTH,):
    how often the first, second, .. child of a node is accepted. patience: what a token of the next
    level counts, with those that it leads to. At speed 0 all is drafted and kept.
    """

    def __init__(
        self,
        width,
        nodes,
        depth,
        device,
        model=None,
        speed=0,
        costs=None,
        followed=None,
        patience=1,
    ):
        super().__init__(nodes, depth, width, device)
        self.model, self.speed, self.patience = model, speed, patience
        verify, self.step = (torch.zeros(nodes + 1), 0.0) if costs is None else costs
        self.verify = torch.as_tensor(verify).double().to(device)
        self.followed = torch.ones(width, device=device) if followed is None else followed[:width]
        self.node = float(self.verify[-1] - self.verify[0]) / nodes  # the cost of one more
        self.made = []  # (nodes, draft steps) of each draft that was not cut short

    def children(self, logits: Tensor, state, sampler) -> tuple[Tensor, Tensor]:
        indices, log_q = super().children(logits, state, sampler)
        if self.model is None:
            return indices, log_q
        h_from = state.hidden[0].expand(len(logits), -1)
        seen = Seen.of(h_from, state.nodes[0], state.depth, indices, log_q)
        return indices, F.logsigmoid(self.model(seen))

    def goes_on(self, scores: Tensor) -> bool:
        """Whether the children to be expected are worth a draft step; a step is counted in `steps`.

        They are those of the `width` likeliest nodes, each less the cost of a node, and together
        count `patience` times.
        """
        reach = scores.topk(self.width).values.exp()
        tokens = (reach[:, None] * self.followed - self.speed * self.node).clamp(min=0).sum()
        self.steps += (on := bool(self.patience * tokens > self.speed * self.step))
        return on

    def size(self, scores: Tensor) -> int:
        """Nodes to keep, the root among them: they bring the most, less what their pass costs."""
        tokens = scores.topk(min(self.nodes + 1, len(scores))).values.exp().cumsum(0)
        return 1 + int((tokens - self.speed * self.verify[: len(tokens)]).argmax())

    def draft(self, known, depth: int, sampler):
        self.steps = 1
        draft = super().draft(known, depth, sampler)
        if depth == self.depth:
            self.made.append((len(draft.tokens) - 1, self.steps))
        return draft
