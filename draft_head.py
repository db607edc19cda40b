"""Draft heads: cheap guesses of the target's next tokens, made from its own hidden states.

The target has read x_1..x_t and holds the hidden state h_t; x_{t+1} has been chosen from
p = softmax(lm_head(h_t)). A draft head now guesses x_{t+2}, x_{t+3}, ... without the target.

**Medusa** (arXiv 2401.10774) guesses every position from the same h_t, independently. Head i:

    u = h_t;  K times  u <- u + SiLU(W_ik u + b_ik);  q = softmax(V_i u)  for x_{t+1+i}

**EAGLE** (arXiv 2401.15077) guesses the next *hidden state* and lets the target's own LM head turn
it into a distribution, one token after the other. It knows each drafted token before it goes on:

    u = W [embed(x_{t+1}) ; h_t] + b;  K decoder layers -> h'_{t+1};  q = softmax(lm_head(h'_{t+1}))

**K** is the multi-layer structure of KOALA (arXiv 2408.08146): K = 1 is the original head of either
paper, K >= 2 narrows the gap to the deep target, and costs K times the layers at drafting.

Both have one interface, so that neither decoder, training nor benchmark asks which it holds:

    state = head.start(max_length)         nothing read yet
    head.absorb(state, tokens, hidden)     read text that is certain, with the target's true states
    head.expand(state)                     logits of the token after it: the root of a draft
    head.expand(state, tokens, parents)    and, depth by depth, of what follows drafted tokens

In `absorb`, hidden[t] is the target's state after everything *before* tokens[t]: a head always sees
a token together with the state that led to it. After a cycle the accepted tokens are absorbed
again with their true states; to keep the guessed ones costs 8 to 15 % of the acceptance length
(vLLM issue 14649).

For training, both have

    head(batch, own_steps)                 a Guess: states of each draft position, maps to logits
    head.supervised_loss(...)              L_sup of one draft position
    head.prepare(target, batch)            a start in closed form, where there is one
    head.learns_p                          whether its L_sup is with p, or with the text's token

A head may know the S most frequent tokens only. Its logits are then (.., S) in place of (.., V):
see `sampling.Vocabulary`. Read next: discriminator.py.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT, Block, KVCache, Rotary
from plumbing.cli import UserError
from sampling import Vocabulary


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a draft head; its states have the target's width."""

    kind: str  # "medusa" or "eagle"
    layers: int = 1  # K
    num_heads: int = 4  # Medusa: the positions it can guess. EAGLE can guess any number
    draft_vocab: int = 0  # S, the tokens it can guess; 0: all of the target's
    mlp_width: int = 0  # of EAGLE's layers; 0: that of the target's

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of draft head {self.kind!r}: medusa or eagle")
        if self.layers < 1 or self.num_heads < 1:
            raise UserError("a draft head has at least one layer and one position")
        if self.kind == "medusa" and self.mlp_width:
            raise UserError("a layer of Medusa has no MLP whose width could be chosen")


class Batch(NamedTuple):
    """Windows of text that heads learn from, of T + 1 tokens each."""

    tokens: Tensor  # (B, T + 1)
    # hidden[:, t] is the target's state after tokens[:, : t + 1]; `absorb` pairs it with the next.
    hidden: Tensor  # (B, T, D)
    learn: Tensor  # (B, T + 1) bool: the tokens to be learnt; in a chat the model's own

    def rows(self, values: Tensor, i: int) -> Tensor:
        """The rows (N, ..) of `values` (B, T - i, ..) whose token is to be learnt.

        `values` has one row for each state that draft position i is guessed from.
        """
        return values[self.learn[:, i + 1 :]]


class Guess(NamedTuple):
    """A head's guesses on a batch, for draft positions i = 1..P: states, and maps to logits.

    Position i guesses x_{t+1+i} from h_t. The target's own p of that token is that of h_{t+i}. Its
    N rows are those of `Batch.rows`. The maps are still to be applied: training never has the
    logits of all positions at once.
    """

    states: list[Tensor]  # of each position (N, D); EAGLE's are its guesses of the hidden states
    maps: list[Tensor]  # of each position (S, D), from states to logits

    def detach(self) -> "Guess":
        return Guess([s.detach() for s in self.states], [m.detach() for m in self.maps])


class Rollout:
    """Keys and values of several passes over one training window, in the place of a cache.

    Pass 1 reads the target's true states. Pass j + 1 reads the head's own guesses of pass j, as the
    head does while drafting. A place of pass 3, say, sees just what a draft's third token sees:

        from pass 1, which read true states, the places two and more before it
        from pass 2, which read a guess, the place before it; from pass 3 its own
    """

    def __init__(self, num_layers: int):
        self.keys = [[] for _ in range(num_layers)]
        self.values = [[] for _ in range(num_layers)]

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[layer].append(keys)
        self.values[layer].append(values)
        return torch.cat(self.keys[layer], 2), torch.cat(self.values[layer], 2)

    @staticmethod
    def mask(length: int, own: int, device) -> Tensor:
        """(T, (own + 1) T) bool: the keys that a place of pass own + 1 sees, pass after pass."""
        place = torch.arange(length, device=device)
        before = place[:, None] - place  # (T, T): how far back a key lies
        return torch.cat([before >= own, *(before == own - j for j in range(1, own + 1))], 1)


class MedusaState:
    """Medusa's memory: the target's last hidden state (B, D), and where a draft is."""

    hidden: Tensor
    logits: Tensor  # (H, B, S): the guesses of all heads from it
    depth: int


class Medusa(nn.Module):
    """`num_heads` independent guesses from one hidden state, K residual layers each.

    The heads' weights lie in one tensor with a leading axis H, so that a layer of all heads is one
    product. W, b start at zero and V_i at the target's LM head: untrained, every head repeats the
    target's own next-token guess (Medusa, section 2.1.1).
    """

    autoregressive = False
    learns_p = False  # it learns the text's own tokens

    def __init__(self, config: HeadConfig, target: GPT):
        super().__init__()
        self.config = config
        heads, width = config.num_heads, target.config.width
        # K tensors of their own. (`[block] * K` would be one block, K times: Medusa's PR 133.)
        self.weights = nn.ParameterList(
            torch.zeros(heads, width, width) for _ in range(config.layers)
        )
        self.biases = nn.ParameterList(torch.zeros(heads, 1, width) for _ in range(config.layers))
        self.vocabulary = Vocabulary(config.draft_vocab, target)
        lm_head = self.vocabulary.rows(target.lm_head.weight.detach().float())
        self.out = nn.Parameter(lm_head.T.repeat(heads, 1, 1))  # (H, D, S)
        self.position_weights = [0.8**i for i in range(1, heads + 1)]  # from 0.8 on: its equation 1

    @property
    def max_draft(self) -> int | None:
        """The most tokens it can draft; None: no limit."""
        return self.config.num_heads

    def heads(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> logits of every head (H, N, S)."""
        u = hidden.expand(self.config.num_heads, *hidden.shape)  # (H, N, D)
        for weight, bias in zip(self.weights, self.biases):
            u = u + F.silu(torch.baddbmm(bias, u, weight))
        return torch.bmm(u, self.out)

    def forward(self, batch: Batch, own_steps: int = 1) -> Guess:
        """The training form."""
        states = []
        for i in range(1, self.config.num_heads + 1):
            u = batch.rows(batch.hidden[:, :-i], i)  # (N, D)
            for weight, bias in zip(self.weights, self.biases):
                u = u + F.silu(torch.addmm(bias[i - 1], u, weight[i - 1]))
            states.append(u)
        return Guess(states, [out.T for out in self.out])

    def supervised_loss(self, logits, label, state, true, feature_weight=1.0):
        """CE(head_i, x_{t+1+i}) of logits (N, S) and the tokens' indices (N,), their mean ()."""
        return F.cross_entropy(logits, label)

    def prepare(self, target: GPT, batch: Batch) -> None:
        """Take V_i anew: the vocabulary may have been chosen since. There is nothing to solve."""
        with torch.no_grad():
            self.out.copy_(self.vocabulary.rows(target.lm_head.weight).T)

    def start(self, max_length: int, batch: int = 1) -> MedusaState:
        return MedusaState()

    def absorb(self, state: MedusaState, tokens: Tensor, hidden: Tensor) -> None:
        """tokens (B, T), hidden (B, T, D): only the last state is of use."""
        state.hidden = hidden[:, -1]

    def expand(self, state: MedusaState, tokens=None, parents=None) -> Tensor:
        """The next head's guess (B, 1, S): the same whatever nodes it follows. See Eagle.expand."""
        if tokens is None:
            state.logits, state.depth = self.heads(state.hidden), 0
        else:
            state.depth += 1
        return state.logits[state.depth, :, None]


class EagleState:
    """EAGLE's memory: keys and values of the certain text, and its last guess."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.length = 0  # how much of the cache is certain; drafting writes beyond it
        self.hidden: Tensor  # (B, 1, D): the target's last state that was read
        self.feature: Tensor  # (B, 1, D): the guessed state after the certain text
        # While drafting, of the nodes expanded last: their guessed states, and the nodes they see.
        self.nodes: Tensor  # (B, k, D)
        self.seen: Tensor | None  # (k, all nodes so far) bool; None: all of them, in a chain
        self.depth = 0


class Eagle(nn.Module):
    """Predicts the target's next hidden state with K decoder layers of the target's own kind."""

    autoregressive = True  # a guess depends on the drafted tokens before it
    learns_p = True
    max_draft = None  # it can go on as long as it likes
    position_weights = [0.8**i for i in range(8)]  # of the first, second, .. guess: from 1 on

    def __init__(self, config: HeadConfig, target: GPT):
        super().__init__()
        self.config = config
        # The target's embedding and LM head are used as they are. In a tuple, because a module or
        # Parameter set as an attribute is registered here, and would be trained and saved with us.
        self._frozen = (target,)
        self.vocabulary, self._lm_rows = Vocabulary(config.draft_vocab, target), None
        self.rotary = Rotary(target.config)
        self.combine = nn.Linear(2 * target.config.width, target.config.width)
        shape = replace(target.config, mlp_width=config.mlp_width or target.config.mlp_width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(config.layers))
        for block in self.blocks:  # each layer starts as the identity: see `prepare`
            nn.init.normal_(block.qkv.weight, std=0.02)
            nn.init.normal_(block.gate_up.weight, std=0.02)
            nn.init.zeros_(block.attention_out.weight)
            nn.init.zeros_(block.mlp_out.weight)

    @property
    def target(self) -> GPT:
        return self._frozen[0]

    def step(self, tokens: Tensor, hidden: Tensor, cache: KVCache | None = None, rotary=None):
        """tokens (B, T) and the states before them (B, T, D) -> guessed states after (B, T, D)."""
        rotary = rotary or self.rotary(cache.length if cache is not None else 0, tokens.shape[1])
        embedded = F.embedding(tokens, self.target.embed.weight.detach())
        u = self.combine(torch.cat([embedded, hidden], dim=-1))  # (B, T, 2D) -> (B, T, D)
        u = u.to(hidden.dtype)  # under autocast the residual stream stays in float32
        for layer, block in enumerate(self.blocks):
            u = block(u, rotary, cache, layer)
        return u

    def lm_head(self) -> Tensor:
        """The rows (S, D) of the target's LM head for the tokens that this one can guess.

        Gradients pass through it, and not into it.
        """
        weight = self.target.lm_head.weight.detach()
        if self._lm_rows is None or self._lm_rows.dtype != weight.dtype:
            # Kept until the dtype changes. Made while decoding, it may serve training later.
            with torch.inference_mode(False):
                self._lm_rows = self.vocabulary.rows(weight)
        return self._lm_rows

    def logits(self, states: Tensor) -> Tensor:
        """(B, k, D) -> (B, k, S)"""
        # As one matrix: of a slice of three dimensions torch makes a batched product, and copies
        # the LM head for it (torch 2.13: half the time of a draft).
        return F.linear(states.flatten(0, 1), self.lm_head()).unflatten(0, states.shape[:2])

    def forward(self, batch: Batch, own_steps: int = 1) -> Guess:
        """The training form.

        In training, noise on the input states prepares the head for the errors of its own guesses,
        which it reads while drafting (as in EAGLE): uniform, within a tenth of their deviation.
        `own_steps`: the draft positions trained. The first reads true states, each further one the
        guesses before it (HASS, 2408.15766; EAGLE-3, 2503.01840), along the text's own tokens: a
        guess counts only where all tokens drafted before it were accepted.
        """
        states = batch.hidden[:, :-1]
        if self.training:
            states = states + states.std() * 0.1 * (2 * torch.rand_like(states) - 1)
        length, guesses = states.shape[1], []
        passes = Rollout(self.config.layers) if own_steps > 1 else None
        cos, sin, mask = self.rotary(0, length)
        for own in range(own_steps):
            if own > 0:  # place t reads what the pass before guessed at t - 1
                states = F.pad(states[:, :-1], (0, 0, 1, 0))
                mask = Rollout.mask(length, own, states.device)
            states = self.step(batch.tokens[:, 1:-1], states, passes, (cos, sin, mask))
            # (B, T - 1, D). At its first `own` places the draft would begin before the window.
            guesses.append(batch.rows(states[:, own:], own + 1))
        return Guess(guesses, [self.lm_head()] * own_steps)

    def supervised_loss(self, logits, label, state, true, feature_weight=1.0):
        """SmoothL1(h', h) + 0.1 CE(p, q), means () over N rows, as in EAGLE.

        logits (N, S), the guessed states and the true ones (N, D). `label`: p (N, S), or in trials
        the text's tokens (N,), or None: no CE. `feature_weight`: of SmoothL1; EAGLE-3 does without.
        """
        loss = feature_weight * F.smooth_l1_loss(state.float(), true)
        return loss if label is None else loss + 0.1 * F.cross_entropy(logits, label)

    @torch.no_grad()
    def prepare(self, target: GPT, batch: Batch) -> None:
        """Set W and b in closed form: the best affine guess of h_{t+1} from [embed(x_{t+1}) ; h_t].

        The layers above start as the identity, so that the head begins as this least-squares
        solution, worth many minutes of gradient steps.
        """
        self._lm_rows = None  # the vocabulary may have been chosen since
        embedded = F.embedding(batch.tokens[:, 1:-1], target.embed.weight)
        inputs = torch.cat([embedded, batch.hidden[:, :-1]], dim=-1)
        inputs = batch.rows(inputs, 1).double()  # (N, 2D)
        inputs = F.pad(inputs, (0, 1), value=1.0)  # the bias, as an input that is always 1
        outputs = batch.rows(batch.hidden[:, 1:], 1).double()  # (N, D)
        gram = inputs.T @ inputs  # (2D + 1, 2D + 1)
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())  # a little ridge keeps it solvable
        solution = torch.linalg.solve(gram, inputs.T @ outputs).to(self.combine.weight.dtype)
        self.combine.weight.copy_(solution[:-1].T)
        self.combine.bias.copy_(solution[-1])

    def start(self, max_length: int, batch: int = 1) -> EagleState:
        like, layers = self.combine.weight, self.config.layers
        return EagleState(KVCache(self.target.config, layers, max_length, like, batch))

    def absorb(self, state: EagleState, tokens: Tensor, hidden: Tensor) -> None:
        """tokens (B, T), hidden (B, T, D): read them in the place of what drafting left there."""
        state.cache.rollback(state.length)
        state.hidden = hidden[:, -1:]
        state.feature = self.step(tokens, hidden, state.cache)[:, -1:]
        state.cache.advance(tokens.shape[1])
        state.length = state.cache.length

    def expand(self, state: EagleState, tokens=None, parents=None) -> Tensor:
        """Logits (B, k, S) of what follows each of k nodes of the draft, all at one depth.

        First without tokens: what follows the certain text, k = 1. Then, depth by depth, `tokens`
        (B, k) are read, and `parents` (k,) tells which node of the call before each one follows;
        None if there was only one. What it reads of a node before is its own guess of its state.
        """
        if tokens is None:
            state.cache.rollback(state.length)
            state.nodes, state.seen, state.depth = state.feature, None, 0
            return self.logits(state.nodes)
        nodes, seen, k = state.nodes, state.seen, tokens.shape[1]
        here = state.length + state.depth
        if k == 1 and seen is None:
            rotary = self.rotary(here, 1)
        else:
            itself = torch.eye(k, dtype=torch.bool, device=tokens.device)
            seen = itself.new_ones(1, state.depth) if seen is None else seen
            if parents is not None:
                nodes, seen = nodes[:, parents], seen[parents]
            state.seen = torch.cat([seen.expand(k, -1), itself], 1)
            rotary = self.rotary.tree(state.length, slice(here, here + 1), state.seen)
        state.nodes = self.step(tokens, nodes.expand(-1, k, -1), state.cache, rotary)
        state.cache.advance(k)
        state.depth += 1
        return self.logits(state.nodes)


KINDS = {"medusa": Medusa, "eagle": Eagle}


def build_head(config: HeadConfig, target: GPT) -> Medusa | Eagle:
    """An untrained head for this target, on its device."""
    return KINDS[config.kind](config, target).to(target.embed.weight.device)


def rank_rates(head, name: str = "ranks") -> list[list[float]]:
    """How good a head's r-th guess at each draft position was when it was last validated.

    `ranks`: how often it is the target's first choice; `mass`: the target's mean p of it.
    Raises UserError where the head came without.
    """
    try:
        return head.training_record["valid"][name]
    except (AttributeError, KeyError) as error:
        raise UserError(
            "this head has no record of how often its guesses are right, which is what trees and "
            "sizes are chosen by: train it anew with train.py, or draft a chain of a fixed length"
        ) from error
