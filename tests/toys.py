"""Small stand-ins whose behaviour is known exactly: laws in tables, tiny models, scripted ones.

In float64 a batched pass and a token-by-token one differ by 1e-15 at most, so that a difference in
the tokens of two decoders is a fault of the decoder, and never of rounding.
"""

import itertools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from discriminator import Discriminator
from draft_head import Batch, HeadConfig, build_head
from drafts import Known
from model import GPT, GPTConfig
from plumbing.machine import Autocast
from sampling import Vocabulary, acceptance_probability, distribution, residual
from targets.tokenizers import DIGITS
from train import HeadTraining

# A correct program fails a chi-square test at this level once in a billion runs.
FALSE_ALARM = 1e-9


# ------------------------------------------------------------------------------------ statistics


def chi_square_p_value(counts, law) -> float:
    """How likely counts at least this far from `law` are, were they drawn from it (1-D, both).

    Cells expected less than 5 times, and the smallest of the others, are taken together. A single
    outcome that the law gives probability 0 is an outright refutation.
    """
    law = law.double() / law.double().sum()
    expected = law * counts.sum()
    if counts[law == 0].any():
        return 0.0
    if (law == 1).any():
        return 1.0
    order = expected.argsort()
    pooled = order[: int((expected < 5).sum()) + 1]
    single = order[len(pooled) :]
    observed = torch.cat([counts[single].double(), counts[pooled].sum()[None].double()])
    expected = torch.cat([expected[single], expected[pooled].sum()[None]])
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(freedom, statistic / 2).item()


# -------------------------------------------------------------------------------- laws as tables


def random_tables(seed: int, depth: int, vocab: int = 4, **sampling) -> list[torch.Tensor]:
    """Conditional laws: the i-th table, (vocab,) * (i + 1), is that of token i after i others."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ([vocab] * (i + 1) for i in range(depth))
    return [distribution(1.5 * torch.randn(s, generator=generator), **sampling) for s in shapes]


def rest_of(tables, begun: tuple = ()) -> torch.Tensor:
    """The joint law of the tokens still missing after `begun`: (vocab,) * how many are missing."""
    law = torch.ones((), dtype=torch.float64)
    for i in range(len(begun), len(tables)):
        law = law[..., None] * tables[i][begun].double()
    return law


def verdicts(p, q, accept=acceptance_probability, rest=residual, q_in_rule=None):
    """All a cycle can come to: (draft, how many accepted, probability of each next token).

    p: gamma + 1 tables, q: gamma. The probability is joint: that of draft, verdict and next token.
    The last three parameters stand in for parts of the rule, to see it fail.
    """
    gamma, vocab = len(q), p[0].shape[-1]
    q_in_rule = q_in_rule or q
    for draft in itertools.product(range(vocab), repeat=gamma):
        reach = 1.0  # the draft is drawn, and all before position i were accepted
        for i in range(gamma):
            reach *= q[i][draft[:i]][draft[i]].double()
        if reach == 0:
            continue
        for i in range(gamma):
            p_row, q_row = (table[i][draft[:i]].double() for table in (p, q_in_rule))
            accepted = accept(p_row[draft[i]], q_row[draft[i]])
            yield draft, i, reach * (1 - accepted) * rest(p_row, q_row)
            reach = reach * accepted
        yield draft, gamma, reach * p[gamma][draft].double()


# ----------------------------------------------------------------------------------- tiny models


def tiny_target(seed=0, vocab=13, context=24, layers=2, width=16, spread=0.5) -> GPT:
    """A random GPT in float64, its weights so large that the text does not just repeat itself."""
    torch.manual_seed(seed)
    config = GPTConfig(vocab, context, layers, width, 2, 1, 2 * width, tied=False)
    target = GPT(config)
    for weight in target.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=spread)
    return target.double().eval().requires_grad_(False)


def random_prompts(target: GPT, lengths: tuple[int, ...]) -> list[list[int]]:
    generator, vocab = torch.Generator().manual_seed(1), target.config.vocab_size
    return [torch.randint(vocab, (n,), generator=generator).tolist() for n in lengths]


def own_text(target: GPT, rows: int, length: int) -> torch.Tensor:
    """(rows, length) tokens written by the target, nearly greedily: what heads learn from."""
    tokens = torch.randint(target.config.vocab_size, (rows, 1))
    while tokens.shape[1] < length:
        p = distribution(target.lm_head(target(tokens)[:, -1]), temperature=0.3)
        tokens = torch.cat([tokens, p.multinomial(1)], 1)
    return tokens


def whole_batch(target: GPT, tokens: torch.Tensor) -> Batch:
    """Windows (B, T + 1) with the target's states, every token of them to be learnt."""
    return Batch(tokens, target(tokens[:, :-1]), torch.ones_like(tokens, dtype=torch.bool))


def whole_vocabulary(size: int) -> Vocabulary:
    """That of a head which can guess all of a target's `size` tokens."""
    return Vocabulary(0, SimpleNamespace(config=SimpleNamespace(vocab_size=size)))


def tiny_head(kind: str, layers: int, target: GPT, steps=0, num_heads=8, knows: tuple = ()):
    """A head with no weight left at zero, untrained or after some quick supervised steps.

    `knows`: the only tokens it can guess; (): all.
    """
    torch.manual_seed(layers)
    head = build_head(HeadConfig(kind, layers, num_heads, len(knows)), target).double()
    counts = torch.zeros(target.config.vocab_size)
    head.vocabulary.choose(counts.index_fill(0, torch.tensor(knows).long(), 1.0))
    for weight in head.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.1)
    if steps or knows:
        batch = whole_batch(target, own_text(target, 64, target.config.context + 1))
        batch = batch._replace(learn=head.vocabulary.indices_of(batch.tokens) >= 0)
        head.prepare(target, batch)
    if steps:
        optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
        training = in_training(target, head, dtype=torch.float64)
        for _ in range(steps):
            optimizer.zero_grad()
            training.head_loss(head(batch), batch).backward()
            optimizer.step()
    head.trained = steps > 0
    return head.eval().requires_grad_(False)


def with_sizes(head):
    """The head with taus as study/sizes.py finds them: copies come first in greedy decoding."""
    sizes = [[g, 0, 0, 1 + 0.4 * g, 0.0] for g in range(1, 9)]
    sizes += [[2, 4, 0, 2.0, 0.0], [3, 8, 0, 2.4, 0.0]]
    sizes += [[g, n, 3, tau + 0.1, 0.5] for g, n, _, tau, _ in sizes]
    sizes += [[0, 0, 0, 1.0, 0.0], [0, 0, 3, 1.2, 0.1]]
    sampled = [[g, n, lookup, 1 + tau / 4, copied] for g, n, lookup, tau, copied in sizes]
    head.sizes = {"greedy": sizes, "sampled": sampled, "lookup": {"greedy": 3, "sampled": 0}}
    return head


def known_text(head, tokens: torch.Tensor, hidden: torch.Tensor, room: int = 100) -> Known:
    """A text (1, T + 1) with the target's states on its first T tokens, for a plan to go on with."""
    known = Known(tokens[0, :1].tolist(), head, room)
    known.add(tokens[0, 1:].tolist(), tokens[0, 1:], hidden)
    return known


def draft_chain(head, state, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n likeliest tokens (B, n), one after the other, and their logits (B, n, V)."""
    tokens, rows = [], []
    for _ in range(n):
        rows.append(head.expand(state, tokens[-1][:, None] if tokens else None)[:, 0])
        tokens.append(rows[-1].argmax(-1))
    return torch.stack(tokens, 1), torch.stack(rows, 1)


def reference_text(target: GPT, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding as one would write it down: no cache, no draft, the whole text each time."""
    text = list(prompt)
    for _ in range(count):
        text.append(target.lm_head(target(torch.tensor([text]))[0, -1]).argmax().item())
    return text[len(prompt) :]


def law_of_text(target: GPT, prompt: list[int], count: int, **sampling) -> torch.Tensor:
    """The exact law of the next `count` tokens, (vocab ** count,), by reading every text."""
    vocab = target.config.vocab_size
    texts = torch.tensor(list(itertools.product(range(vocab), repeat=count)))
    read = torch.cat([torch.tensor(prompt).expand(len(texts), -1), texts[:, :-1]], 1)
    p = distribution(target.lm_head(target(read)[:, -count:]), **sampling).double()
    return p.gather(-1, texts[..., None])[..., 0].prod(-1)


# --------------------------------------------------------------------------------- scripted models


class ScriptedCache:
    """It holds the tokens themselves: what is left of a rejected draft would be seen at once."""

    def __init__(self):
        self.tokens = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def keep(self, start: int, path, in_place: bool) -> None:
        path = path.tolist()
        assert path == sorted(set(path)) and path[0] == 0 and start + path[-1] < self.length
        assert in_place == (path == list(range(len(path))))
        self.tokens[start:] = [self.tokens[start + place] for place in path]


class ScriptedTarget:
    """Its first choice after the text so far is the script's next token, if the text is the script.

    After any other text it is token 0, so that text once wrong stays wrong. A hidden state is the
    one-hot of the token that follows.
    """

    def __init__(self, script: list[int], vocab: int = 10):
        self.script = script
        self.config = SimpleNamespace(vocab_size=vocab, context=len(script))
        self.embed = SimpleNamespace(weight=torch.zeros(1))
        self.vocab = vocab

    def new_cache(self, max_length: int) -> ScriptedCache:
        return ScriptedCache()

    def lm_head(self, hidden):
        return 10 * hidden

    def __call__(self, tokens, cache, positions=None, mask=None):
        tokens, before = tokens[0].tolist(), list(cache.tokens)
        mask = torch.ones(len(tokens), len(tokens)).tril().bool() if mask is None else mask
        following = []
        for i, row in enumerate(mask.tolist()):
            text = before + [token for token, seen in zip(tokens, row) if seen]
            assert positions is None or positions[i] == len(text) - 1
            good = len(text) < len(self.script) and text == self.script[: len(text)]
            following.append(self.script[len(text)] if good else 0)
        cache.tokens += tokens
        return F.one_hot(torch.tensor(following), self.vocab).double()[None]


class ScriptedHead:
    """Drafts `script[t]` for position t of the text, except where `wrong` says otherwise.

    There the script's own token is its second choice: a tree can still have it.
    """

    max_draft, autoregressive = None, False

    def __init__(self, script: list[int], wrong=(), vocab: int = 10):
        first = [(token + 1) % vocab if t in wrong else token for t, token in enumerate(script)]
        second = F.one_hot(torch.tensor(script), vocab)
        self.logits = 10.0 * F.one_hot(torch.tensor(first), vocab) + 5.0 * second
        self.vocabulary = whole_vocabulary(vocab)

    def start(self, max_length: int):
        return SimpleNamespace(read=1)  # the text's first token has no state before it

    def absorb(self, state, tokens, hidden) -> None:
        assert tokens.shape == hidden.shape[:2]
        state.read += tokens.shape[1]

    def expand(self, state, tokens=None, parents=None):
        state.depth = 0 if tokens is None else state.depth + 1
        return self.logits[None, None, state.read + state.depth]


class Wrapped:
    """A head that behaves as the one inside; what a test wants to change, it overrides."""

    def __init__(self, head):
        self.head, self.vocabulary = head, head.vocabulary
        self.max_draft, self.autoregressive = head.max_draft, head.autoregressive

    def start(self, max_length: int):
        return self.head.start(max_length)

    def absorb(self, state, tokens, hidden) -> None:
        self.head.absorb(state, tokens, hidden)

    def expand(self, state, tokens=None, parents=None):
        return self.head.expand(state, tokens, parents)


class Liar:
    """A plan that drafts from q, and reports that of another temperature: no longer exact."""

    def __init__(self, plan):
        self.plan, self.depth, self.slots = plan, plan.depth, plan.slots

    def draft(self, *arguments):
        draft = self.plan.draft(*arguments)
        q = draft.q.sqrt()
        return draft._replace(q=q / q.sum(-1, keepdim=True).clamp(min=1e-30))


class Recorder(Wrapped):
    """It keeps what was absorbed, and after how much text each draft was made."""

    def __init__(self, head):
        super().__init__(head)
        self.tokens, self.hidden = [], []

    def absorb(self, state, tokens, hidden) -> None:
        self.tokens += tokens[0].tolist()
        self.hidden += hidden[0].unbind()
        self.state = state
        super().absorb(state, tokens, hidden)


BYTES = SimpleNamespace(decode_bytes=lambda tokens: bytes(tokens))  # an encoding: a token, a byte


def spelt(words) -> SimpleNamespace:
    """An encoding whose token i is words[i]."""
    return SimpleNamespace(decode_bytes=lambda tokens: b"".join(words[t] for t in tokens))


LETTERS = spelt([bytes([ord("a") + i]) for i in range(10)])


# ------------------------------------------------------------------------------ a chat vocabulary

SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
LACKING = b"\x00\x01\xf8\xff"  # bytes that it has no token for
MERGES = [
    tuple(merge.split("|")) for merge in ("\n|\n", "u|s", "e|r", " |a", " | ", "1|2", "us|er")
]
FORM = {
    "begin": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n",
    "to_answer": "<|im_end|>\n<|im_start|>assistant\n",
    "to_ask": "<|im_end|>\n<|im_start|>user\n",
}


def chat_tokenizer(form: dict | None = FORM) -> dict:
    """A small byte-level vocabulary of a chat model, as a checkpoint keeps it; None: of no chat."""
    tokens = [*SPECIAL, *(chr(byte) for byte in range(256) if byte not in LACKING)]
    tokens += [left + right for left, right in MERGES]
    tokenizer = {"name": "bpe", "pattern": DIGITS, "tokens": tokens, "special": dict(SPECIAL)}
    return tokenizer | ({"chat": form} if form else {})


# -------------------------------------------------------------------------------- the game

OWN_STEPS = 3  # draft positions of EAGLE here


def game_setting(kind: str, layers: int = 2, draft_vocab: int = 0):
    """A random target, a head for it, a discriminator that has an opinion, and a batch.

    In the batch some tokens are not to be learnt, as in a chat those that are not the model's own,
    and those that the head has no token for.
    """
    torch.manual_seed(0)
    config = GPTConfig(40, 16, num_layers=1, width=16, num_heads=2, num_kv_heads=2, mlp_width=16)
    target = GPT(config).requires_grad_(False).eval()
    target.embed.weight.mul_(20)
    head = build_head(HeadConfig(kind, layers, draft_vocab=draft_vocab), target)
    head.vocabulary.choose(torch.arange(40) % 7)
    judge = Discriminator(
        head.vocabulary.rows(target.lm_head.weight), head.max_draft or OWN_STEPS, hidden=16
    )
    torch.nn.init.normal_(judge.judge.weight)
    batch = whole_batch(target, torch.randint(0, 40, (3, 17)))
    learn = (torch.rand(3, 17) < 0.8) & (head.vocabulary.indices_of(batch.tokens) >= 0)
    head.prepare(target, batch._replace(learn=learn))
    return target, head.eval(), judge, batch._replace(learn=learn)


def in_training(target, head, judge=None, dtype=torch.float32, **values) -> HeadTraining:
    """The training of a head against this discriminator, or against its closed form."""
    autocast = Autocast(torch.device("cpu"), dtype)
    training = HeadTraining(target, head, judge, 1.0, autocast, **values)
    training.ready()
    return training


def logits_of(guess) -> list[torch.Tensor]:
    """The logits (N, S) of each draft position, all at once."""
    return [F.linear(state, to_logits) for state, to_logits in zip(guess.states, guess.maps)]


def gradients(head, loss) -> list[torch.Tensor]:
    found = torch.autograd.grad(loss, list(head.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros(()) if g is None else g for g in found]
