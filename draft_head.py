"""Draft heads: cheap guesses of the target's next tokens, made from its own hidden states.

The target has read x_1..x_t and holds the hidden state h_t; x_{t+1} has been chosen from
p = softmax(lm_head(h_t)). A draft head now guesses x_{t+2}, x_{t+3}, ... without the target.

**Medusa** (arXiv 2401.10774) guesses every position from the same h_t, independently. Head i:

    u = h_t;  K times  u <- u + SiLU(W_k u + b_k);  q = softmax(V_i u)  for x_{t+1+i}

**EAGLE** (arXiv 2401.15077) guesses the next *hidden state* and lets the target's own LM head turn
it into a distribution, one token after the other. It knows each drafted token before it goes on:

    u = W [embed(x_{t+1}) ; h_t];  K decoder layers;  -> h'_{t+1};  q = softmax(lm_head(h'_{t+1}))

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
(vLLM issue 14649). Read next: discriminator.py.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cli import UserError
from model import GPT, Block, KVCache, Rotary, fingerprint, load_checkpoint, save_checkpoint


@dataclass(frozen=True)
class HeadConfig:
    """The shape of a draft head; all widths are the target's."""

    kind: str  # "medusa" or "eagle"
    layers: int = 1  # K
    num_heads: int = 4  # Medusa: the positions it can guess. EAGLE can go on as long as it likes

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"unknown kind of draft head {self.kind!r}: medusa or eagle")
        if self.layers < 1 or self.num_heads < 1:
            raise UserError("a draft head has at least one layer and one position")


class Guess(NamedTuple):
    """What a head says of a training window of T states, for draft positions i = 1..P.

    `logits[i - 1]` (B, T - i, V): the guess of tokens[:, i + 1 :], made at states 0..T-1-i, to be
    compared with the target's own p there, that of states i..T-1.
    `features` (B, T - 1, D): the guessed hidden states, where the head makes any (EAGLE).
    """

    logits: list[Tensor]
    features: Tensor | None


class MedusaState:
    """What Medusa has to remember: the target's last hidden state (B, D), and where a draft is."""

    hidden: Tensor
    logits: Tensor  # (H, B, V): what all heads guess from it
    depth: int


class Medusa(nn.Module):
    """`num_heads` independent guesses from one hidden state, K residual layers each.

    The heads' weights lie in one tensor with a leading axis H, so that a layer of all heads is one
    product. W, b start at zero and V_i at the target's LM head: untrained, every head repeats the
    target's own next-token guess (Medusa, section 2.1.1).
    """

    autoregressive = False

    def __init__(self, config: HeadConfig, target: GPT):
        super().__init__()
        self.config = config
        heads, width = config.num_heads, target.config.width
        # K tensors of their own. (`[block] * K` would be one block, K times: Medusa's PR 133.)
        self.weights = nn.ParameterList(
            torch.zeros(heads, width, width) for _ in range(config.layers)
        )
        self.biases = nn.ParameterList(torch.zeros(heads, 1, width) for _ in range(config.layers))
        lm_head = target.lm_head.weight.detach().float()
        self.out = nn.Parameter(lm_head.T.repeat(heads, 1, 1))  # (H, D, V)
        self.position_weights = [0.8**i for i in range(1, heads + 1)]  # Medusa, equation 1

    @property
    def max_draft(self) -> int | None:
        """The most tokens it can draft; None: no limit."""
        return self.config.num_heads

    def heads(self, hidden: Tensor) -> Tensor:
        """hidden (N, D) -> logits of every head (H, N, V)."""
        u = hidden.expand(self.config.num_heads, *hidden.shape)  # (H, N, D)
        for weight, bias in zip(self.weights, self.biases):
            u = u + F.silu(torch.baddbmm(bias, u, weight))
        return torch.bmm(u, self.out)

    def forward(self, tokens: Tensor, hidden: Tensor) -> Guess:
        """tokens (B, T + 1), hidden (B, T, D): the training form."""
        batch, length, _ = hidden.shape
        logits = self.heads(hidden.flatten(0, 1)).unflatten(1, (batch, length))  # (H, B, T, V)
        return Guess([logits[i - 1, :, : length - i] for i in range(1, len(logits) + 1)], None)

    def supervised_loss(self, guess: Guess, tokens: Tensor, hidden: Tensor, p: Tensor) -> Tensor:
        """Sum over i of 0.8^i CE(head_i, x_{t+1+i}), with the text's own tokens as labels."""
        loss = hidden.new_zeros(())
        for i, (weight, logits) in enumerate(zip(self.position_weights, guess.logits), start=1):
            labels = tokens[:, i + 1 :]  # (B, T - i)
            loss = loss + weight * F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return loss

    def prepare(self, tokens: Tensor, hidden: Tensor) -> None:
        """Nothing to solve: a Medusa head starts from zeros and the target's LM head."""

    def start(self, max_length: int, batch: int = 1) -> MedusaState:
        return MedusaState()

    def absorb(self, state: MedusaState, tokens: Tensor, hidden: Tensor) -> None:
        """tokens (B, T), hidden (B, T, D): only the last state is of use."""
        state.hidden = hidden[:, -1]

    def expand(self, state: MedusaState, tokens=None, parents=None) -> Tensor:
        """The next head's guess (B, 1, V): the same whatever nodes it follows. See Eagle.expand."""
        if tokens is None:
            state.logits, state.depth = self.heads(state.hidden), 0
        else:
            state.depth += 1
        return state.logits[state.depth, :, None]


class EagleState:
    """What EAGLE has to remember: keys and values of the certain text, and its last guess."""

    def __init__(self, cache: KVCache):
        self.cache = cache
        self.length = 0  # how much of the cache is certain; drafting writes beyond it
        self.feature: Tensor  # (B, 1, D): the guessed state after the certain text
        # While drafting: of the nodes expanded last, their guessed states and what they see.
        self.nodes: Tensor  # (B, k, D)
        self.seen: Tensor | None  # (k, all nodes so far) bool; None: all of them, in a chain
        self.depth = 0


class Eagle(nn.Module):
    """Predicts the target's next hidden state with K decoder layers of the target's own kind."""

    autoregressive = True  # a guess depends on the drafted tokens before it
    max_draft = None  # it can go on as long as it likes
    position_weights = [1.0]

    def __init__(self, config: HeadConfig, target: GPT):
        super().__init__()
        self.config = config
        # The target's embedding and LM head are used as they are. In a tuple, because a module or
        # Parameter set as an attribute is registered here, and would be trained and saved with us.
        self._frozen = (target,)
        self.rotary = Rotary(target.config)
        self.combine = nn.Linear(2 * target.config.width, target.config.width)
        self.blocks = nn.ModuleList(Block(target.config) for _ in range(config.layers))
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
        if cache is not None:
            cache.advance(tokens.shape[1])
        return u

    def logits(self, features: Tensor) -> Tensor:
        """The target's LM head on guessed states: gradients pass through it, and not into it."""
        return F.linear(features, self.target.lm_head.weight.detach())

    def forward(self, tokens: Tensor, hidden: Tensor) -> Guess:
        """tokens (B, T + 1), hidden (B, T, D): the training form.

        In training, noise on the input states prepares the head for the errors of its own guesses,
        which it reads while drafting: uniform, a tenth of the states' size (EAGLE, section 4.2).
        """
        hidden = hidden[:, :-1]
        if self.training:
            hidden = hidden + hidden.std() * 0.1 * (2 * torch.rand_like(hidden) - 1)
        features = self.step(tokens[:, 1:-1], hidden)
        return Guess([self.logits(features)], features)

    def supervised_loss(self, guess: Guess, tokens: Tensor, hidden: Tensor, p: Tensor) -> Tensor:
        """SmoothL1(h', h) + 0.1 CE(p, q): EAGLE, section 3.2. p (B, T, V): the target's own."""
        log_q = F.log_softmax(guess.logits[0].float(), dim=-1)
        soft = -(p[:, 1:] * log_q).sum(-1).mean()
        return F.smooth_l1_loss(guess.features.float(), hidden[:, 1:]) + 0.1 * soft

    @torch.no_grad()
    def prepare(self, tokens: Tensor, hidden: Tensor) -> None:
        """Set W in closed form: the best linear guess of h_{t+1} from [embed(x_{t+1}) ; h_t].

        tokens (B, T + 1), hidden (B, T, D). The layers above start as the identity, so that the
        head begins as this least-squares solution, worth many minutes of gradient steps.
        """
        embedded = F.embedding(tokens[:, 1:-1], self.target.embed.weight)
        inputs = torch.cat([embedded, hidden[:, :-1]], dim=-1).flatten(0, 1).double()  # (N, 2D)
        inputs = F.pad(inputs, (0, 1), value=1.0)  # the bias, as an input that is always 1
        outputs = hidden[:, 1:].flatten(0, 1).double()  # (N, D)
        gram = inputs.T @ inputs  # (2D + 1, 2D + 1)
        gram.diagonal().add_(1e-6 * gram.diagonal().mean())  # a little ridge keeps it solvable
        solution = torch.linalg.solve(gram, inputs.T @ outputs).to(self.combine.weight.dtype)
        self.combine.weight.copy_(solution[:-1].T)
        self.combine.bias.copy_(solution[-1])

    def start(self, max_length: int, batch: int = 1) -> EagleState:
        like, layers = self.combine.weight, self.config.layers
        return EagleState(KVCache(self.target.config, layers, max_length, like, batch))

    def absorb(self, state: EagleState, tokens: Tensor, hidden: Tensor) -> None:
        """tokens (B, T), hidden (B, T, D): overwrite what drafting left by the true states."""
        state.cache.rollback(state.length)
        state.feature = self.step(tokens, hidden, state.cache)[:, -1:]
        state.length = state.cache.length

    def expand(self, state: EagleState, tokens=None, parents=None) -> Tensor:
        """Logits (B, k, V) of what follows each of k nodes of the draft, all at one depth.

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
        state.depth += 1
        return self.logits(state.nodes)


KINDS = {"medusa": Medusa, "eagle": Eagle}


def build_head(config: HeadConfig, target: GPT) -> Medusa | Eagle:
    """An untrained head for this target, on its device."""
    return KINDS[config.kind](config, target).to(target.embed.weight.device)


def save_head(path: Path, head: nn.Module, target_fingerprint: str, training: dict) -> None:
    """`training`: how it was trained and what it reached, as plain values."""
    checkpoint = {
        "kind": "draft head",
        "config": asdict(head.config),
        "target": target_fingerprint,
        "weights": head.state_dict(),
        "training": training,
    }
    save_checkpoint(path, checkpoint)


def load_head(path: Path, target: GPT, target_fingerprint: str | None = None) -> nn.Module:
    """The head at `path`, on the target's device and of its dtype, for decoding.

    Raises UserError where it was trained for another target: it would draft nonsense.
    """
    checkpoint = load_checkpoint(path, "draft head")
    if checkpoint["target"] != (target_fingerprint or fingerprint(target)):
        raise UserError(f"{path} was trained for another target: train it anew with train.py")
    head = build_head(HeadConfig(**checkpoint["config"]), target)
    head.load_state_dict(checkpoint["weights"])
    head.training_record = checkpoint["training"]
    return head.to(target.embed.weight.dtype).eval().requires_grad_(False)


def trained_heads(folder: Path) -> list[str]:
    """The names of the heads in a run's folder."""
    names = [path.name.removesuffix(".pt") for path in folder.glob("*.pt")]
    return sorted(n for n in names if n.startswith(tuple(KINDS)) and ".progress" not in n)
