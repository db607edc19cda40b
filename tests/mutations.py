"""Lines that must not be broken unnoticed: each with a wrong line, and the tests that must fail.

A test that cannot fail proves nothing. `python -m tests.mutate` breaks each of these lines in a
copy of the project and expects its tests to fail there; a part of them runs in CI. A fast test sees
to it that each line stands exactly once where it is said to stand.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from study.exercise import EXERCISES, emptied, function


class Mutation(NamedTuple):
    file: str
    line: str  # it occurs exactly once in the file
    wrong: str
    tests: str  # of which one must fail: what pytest is given
    why: str


def of(file: str, tests: str, *rows) -> list[Mutation]:
    return [Mutation(file, line, wrong, f"tests/{tests}", why) for line, wrong, why in rows]


RULES = of(
    "sampling.py",
    "test_rule.py",
    (
        "return (p_x / q_x).clamp(max=1.0)",
        "return (p_x / q_x).clamp(max=0.9)",
        "tokens are rejected that the rule accepts",
    ),
    (
        "excess = (p - q).clamp(min=0.0)",
        "excess = p",
        "after a rejection the token comes from p, so the rejected ones come too often",
    ),
    (
        "return torch.where(total > 0, excess / total, p)",
        "return excess / total",
        "where p = q the residual is 0 / 0",
    ),
    (
        "threshold = u[..., None].double() * cumulative[..., -1:]",
        "threshold = u[..., None].float() * cumulative[..., -1:].float()",
        "float32 can pass the end of the sum, and draw what is impossible",
    ),
    (
        "torch.searchsorted(cumulative, threshold, right=True)",
        "torch.searchsorted(cumulative, threshold)",
        "at u = 0 a token of probability 0 is drawn",
    ),
    (
        "ordered = ordered.masked_fill(before >= max(top_p, SMALLEST), 0.0)",
        "ordered = ordered.masked_fill(before > max(top_p, SMALLEST), 0.0)",
        "top-p keeps a token more than it takes",
    ),
    (
        "logits = logits.masked_fill(logits < last_kept, -math.inf)",
        "logits = logits.masked_fill(logits <= last_kept, -math.inf)",
        "top-k keeps a token less",
    ),
)
RULES += of(
    "sampling.py",
    "test_lossless.py tests/test_model.py",
    (
        "return q.new_zeros(len(q), self.whole).index_copy_(1, self.tokens, q)",
        "return torch.nn.functional.pad(q, (0, self.whole - q.shape[-1]))",
        "q stands at the places of other tokens",
    ),
    (
        "return indices if self.tokens is None else self.tokens[indices]",
        "return indices",
        "places among the logits are taken for tokens",
    ),
)
RULES += of(
    "speculate.py",
    "test_rule.py tests/test_lossless.py tests/test_drafts.py",
    (
        "accepted = passes.long().cumprod(-1).sum(-1)  # the leading ones",
        "accepted = passes.long().sum(-1)  # the leading ones",
        "tokens after a rejected one are accepted",
    ),
    (
        "q = torch.nn.functional.pad(q, (0, 0, 0, 1))",
        "q = torch.cat([q, q[..., -1:, :]], -2)",
        "after a whole draft the token comes from a residual, not from p",
    ),
    (
        "return accepted, sample(following, u[..., -1])",
        "return accepted, sample(following, u[..., 0])",
        "the uniform that judged a token also draws the next one",
    ),
    (
        "node = deepest(tokens == choice[shape.parents], shape)  # which does not ask the root",
        "node = deepest(tokens == choice, shape)  # which does not ask the root",
        "a node is compared with the choice after itself, not after its parent",
    ),
    (
        "if draft.q is None:\n        return *match",
        "if False:\n        return *match",
        "named tokens are judged as if they were drawn",
    ),
)
DECODER = of(
    "speculate.py",
    "test_lossless.py",
    (
        "depth = min(plan.depth, limit - len(out.tokens) - 1)",
        "depth = min(plan.depth, limit - len(out.tokens))",
        "a text is a token longer than asked for",
    ),
    (
        "cache.keep(start, kept, in_place=path[-1] == len(path) - 1)",
        "cache.keep(start, kept, in_place=True)",
        "the path accepted in a tree is not moved to its places",
    ),
    (
        "known.add(new, written, hidden)",
        "known.add(new, written, hidden.roll(1, 1))",
        "the head reads tokens with the states after others",
    ),
    (
        "out.uncut_cycles += depth == plan.depth and not cut",
        "out.uncut_cycles += 1",
        "cycles that the end of a text cut count in tau",
    ),
    (
        "new = new[: 1 + min(new.index(stop) for stop in stops & set(new))]",
        "new = new[: min(new.index(stop) for stop in stops & set(new))]",
        "the stop token is lost",
    ),
    (
        "known.add(out.tokens, torch.cat([prompt[1:], last[None]]), hidden)",
        "known.add(out.tokens, torch.cat([prompt[:-1], last[None]]), hidden)",
        "the head reads the prompt with the states before its tokens",
    ),
    (
        "return sum(counted) / len(counted) if counted else math.nan",
        "return sum(counted) / max(1, len(counted) - 1) if counted else math.nan",
        "tau is too good",
    ),
)
CACHE = of(
    "model.py",
    "test_model.py tests/test_drafts.py",
    (
        "self.keys[layer, :, :, self.length : end] = keys",
        "self.keys[layer, :, :, : keys.shape[2]] = keys",
        "keys overwrite the beginning of the text",
    ),
    (
        "stored[..., start : self.length, :] = stored[..., start + path, :]",
        "stored[..., start : self.length, :] = stored[..., path, :]",
        "the kept path is taken from the beginning of the text",
    ),
    (
        "self.rollback(start + len(path))",
        "self.rollback(start + len(path) - 1)",
        "the last accepted token is forgotten",
    ),
    (
        "first = len(self.causal) // 2 - end  # position t sees t + 1 keys",
        "first = len(self.causal) // 2 - end - 1  # position t sees t + 1 keys",
        "each position sees the token after it",
    ),
    (
        "hidden = torch.zeros_like(seen, dtype=self.causal.dtype).masked_fill_(~seen, -math.inf)",
        "hidden = torch.zeros_like(seen, dtype=self.causal.dtype)",
        "the nodes of a tree see each other",
    ),
    (
        "qk = torch.addcmul(qk * cos, qk.roll(self.head_dim // 2, dims=-1), sin)",
        "qk = torch.addcmul(qk * cos, qk.roll(1, dims=-1), sin)",
        "the wrong coordinates are rotated together",
    ),
)
PLANS = of(
    "drafts.py",
    "test_drafts.py tests/test_lossless.py tests/test_lookup.py tests/test_faults.py",
    (
        "whole_path = (shape.ancestors[:, 1:] <= agrees[1:]).all(1)",
        "whole_path = agrees",
        "a node is accepted whose ancestor was not",
    ),
    (
        "log_q = log_q.double().nan_to_num(nan=LEAST).clamp(LEAST, -1e-9)",
        "log_q = log_q.double()",
        "NaN ranks first, and a node at probability 1 ties with its parent",
    ),
    (
        "kept = scores.topk(self.size(scores)).indices.sort().values",
        "kept = scores.topk(self.size(scores)).indices",
        "nodes come before their parents",
    ),
    (
        "above = best + seen",
        "above = best",
        "nodes are hung below others",
    ),
    (
        "if self.unread:",
        "if len(self.unread) > 1:",
        "the head misses what it has not read",
    ),
    (
        "self.after[tuple(text[self.entered - n : self.entered])] = self.entered",
        "self.after.setdefault(tuple(text[self.entered - n : self.entered]), self.entered)",
        "the earliest copy is taken, not the latest",
    ),
    (
        "for n in range(min(LONGEST, len(text)), least - 1, -1):",
        "for n in range(least, min(LONGEST, len(text)) + 1):",
        "the shortest match is taken, not the longest",
    ),
    (
        "text.append(text[place - len(known.tokens) + len(text)])",
        "text.append(text[-1])",
        "a copy that reaches the end of the text repeats one token",
    ),
    (
        "rates = [[min(row[: r + 1]) for r in range(len(row))] for row in rates]",
        "rates = [[*row] for row in rates]",
        "a guess joins a tree without the better one beside it",
    ),
)
HEADS = of(
    "draft_head.py",
    "test_model.py tests/test_lossless.py",
    (
        "state.cache.rollback(state.length)\n        state.hidden",
        "state.hidden",
        "drafted keys stay where certain ones belong",
    ),
    (
        "state.nodes = self.step(tokens, nodes.expand(-1, k, -1), state.cache, rotary)",
        "state.nodes = self.step(tokens, state.feature.expand(-1, k, -1), state.cache, rotary)",
        "a node is read with the state of the text, not of the node before it",
    ),
    (
        "guesses.append(batch.rows(states[:, own:], own + 1))",
        "guesses.append(batch.rows(states[:, : states.shape[1] - own], own + 1))",
        "a guess is compared with another place's state",
    ),
    (
        "return torch.cat([before >= own, *(before == own - j for j in range(1, own + 1))], 1)",
        "return torch.cat([before >= 0, *(before == own - j for j in range(1, own + 1))], 1)",
        "in training a guess sees true states that drafting would not have",
    ),
    (
        "u = u + F.silu(torch.baddbmm(bias, u, weight))",
        "u = F.silu(torch.baddbmm(bias, u, weight))",
        "a layer of Medusa has lost its residual path",
    ),
)
GAME = of(
    "train.py",
    "test_training.py",
    (
        "loss = self.d_loss(guess.detach(), batch)",
        "loss = self.d_loss(guess, batch)",
        "D's step is not one of D alone: a gradient is asked for that reaches the head",
    ),
    (
        'weight, figures = self.weight if part == "joint" else 0.0, {}',
        "weight, figures = self.weight, {}",
        "D plays before it has learnt",
    ),
    (
        "update(self.optimizer, self.head_lr * rate, loss, clip=True)",
        "update(self.optimizer, self.head_lr, loss, clip=True)",
        "the head's rate does not follow the schedule",
    ),
    (
        "update(self.d_optimizer, self.discriminator_lr * rate, loss)",
        "update(self.d_optimizer, self.discriminator_lr, loss)",
        "D leaps beside a head at rest",
    ),
    (
        "h_to = batch.rows(batch.hidden[:, i:], i)",
        "h_to = batch.rows(batch.hidden[:, :-i], i)",
        "p is that of another place",
    ),
    (
        "yield i - 1, self.head.position_weights[i - 1], rows, to_logits.to(self.lm_head.dtype)",
        "yield i - 1, 1.0, rows, to_logits.to(self.lm_head.dtype)",
        "all draft positions weigh alike",
    ),
    (
        "if not batch.learn[:, positions + 1 :].any():",
        "if not batch.learn.any():",
        "a batch without rows for the last position makes a loss that is no number",
    ),
    (
        "return exact_logits(p, q)",
        "return exact_logits(q, p)",
        "the best D calls the head's tokens the target's",
    ),
)
GAME += of(
    "discriminator.py",
    "test_training.py",
    (
        "return -(q * F.logsigmoid(logits.detach())).sum(-1).mean()",
        "return -(q.detach() * F.logsigmoid(logits)).sum(-1).mean()",
        "the lesson does not reach the head",
    ),
    (
        "fake = (q.detach() * F.logsigmoid(-logits)).sum(-1)  # 1 - sigmoid(s) = sigmoid(-s)",
        "fake = (q.detach() * F.logsigmoid(logits)).sum(-1)  # 1 - sigmoid(s) = sigmoid(-s)",
        "D is told that both sides are the target's",
    ),
    (
        "return F.linear(g, self._frozen[0]) + b",
        "return F.linear(g, self._frozen[0])",
        "D has no bias",
    ),
)
FIGURES = of(
    "costs.py",
    "test_training.py tests/test_costs.py",
    (
        "alpha[i] += acceptance(head.vocabulary.rows(p.T).T, q).sum().item()",
        "alpha[i] += acceptance(q, q).sum().item()",
        "acceptance is measured as 1",
    ),
    (
        "use = learn[:, start + 1 : start + positions + 1].all(1)  # (B,)",
        "use = learn[:, start + 1 : start + positions + 1].any(1)  # (B,)",
        "drafts count whose tokens are not to be learnt",
    ),
    (
        'result["tau_estimate"] = math.nan if diverged else 1 + agree.cumprod(0).sum().item()',
        'result["tau_estimate"] = math.nan if diverged else 1 + agree.sum().item()',
        "tokens count after a rejected one",
    ),
    (
        "here = start + i\n            logits = head.expand(state, tokens[:, here, None])",
        "here = start + i - 1\n            logits = head.expand(state, tokens[:, here, None])",
        "a draft follows other tokens than the text's",
    ),
)
FIGURES += of(
    "study/replay.py",
    "test_replay.py",
    (
        "ends = reach * (1 - chance)",
        "ends = reach * chance",
        "cycles end where tokens are accepted",
    ),
    (
        "if plan.depth <= left:",
        "if True:",
        "cycles that the limit cut count in tau",
    ),
    (
        "rank[d - 1] < part.nodes",
        "rank[d - 1] <= part.nodes",
        "a tree has a node more than it has room for",
    ),
)
FILES = of(
    "plumbing/files.py",
    "test_model.py tests/test_faults.py",
    (
        'return path.with_name(f"{path.name}.{os.getpid()}.part")',
        'return path.with_name(f"{path.name}.1.part")',
        "two processes write to one scratch file",
    ),
    (
        "os.replace(scratch, path)",
        "path.write_bytes(scratch.read_bytes())",
        "a reader can see half a file",
    ),
    (
        "weights_only=True",
        "weights_only=False",
        "a checkpoint may run code",
    ),
)


def answers(number: int, file: str, *rows) -> list[Mutation]:
    """Wrong answers to an exercise, which its own checks have to see."""
    tests = EXERCISES[number].tests
    return [Mutation(file, line, wrong, tests, why) for line, wrong, why in rows]


ANSWERS = answers(
    1,
    "sampling.py",
    (
        "return (p_x / q_x).clamp(max=1.0)",
        "return p_x.clamp(max=1.0)",
        "drawn tokens are judged as named ones",
    ),
    (
        "excess = (p - q).clamp(min=0.0)",
        "excess = (p - q).abs()",
        "what q has too much of is drawn again",
    ),
)
ANSWERS += answers(
    2,
    "speculate.py",
    (
        "passes = u[..., :-1] < acceptance_probability(p_x, q_x)",
        "passes = u[..., 1:] < acceptance_probability(p_x, q_x)",
        "a token is judged by the uniform of the next one",
    ),
    (
        "following = residual(p.gather(-2, row), q.gather(-2, row))[..., 0, :]",
        "following = p.gather(-2, row)[..., 0, :]",
        "the token after a rejection comes from p",
    ),
)
ANSWERS += answers(
    3,
    "sampling.py",
    (
        "return (p_x / q_x).clamp(max=1.0)",
        "return (1.5 * p_x / q_x).clamp(max=1.0)",
        "the cheat itself",
    ),
)
ANSWERS += answers(
    4,
    "speculate.py",
    (
        "    return node, choice[node]",
        "    return node, choice[shape.parents[node]]",
        "the last accepted token is written twice",
    ),
)
ANSWERS += answers(
    4,
    "drafts.py",
    (
        "return (whole_path * shape.depth).argmax(0)",
        "return whole_path.long().argmax(0)",
        "the first node that agrees, not the deepest",
    ),
)
ANSWERS += answers(
    5,
    "drafts.py",
    (
        "parents, depth = parents[parents], depth // 2",
        "parents, depth = parents, depth // 2",
        "the rounds do not double: deep nodes lose their first ancestors",
    ),
    (
        "seen = torch.eye(len(parents), dtype=torch.bool, device=parents.device)",
        "seen = torch.ones(len(parents), len(parents), dtype=torch.bool).tril()",
        "a node sees its elder siblings",
    ),
)
ANSWERS += answers(
    5,
    "model.py",
    (
        "        self.length = length\n\n    def keep",
        "        self.keys[..., length:, :] = 0\n\n    def keep",
        "what was forgotten is emptied, and still counts",
    ),
    (
        "stored[..., start : self.length, :] = stored[..., start + path, :]",
        "stored[..., start : self.length, :] = stored[..., path, :]",
        "places are counted from the beginning of the text",
    ),
)
ANSWERS += answers(
    6,
    "drafts.py",
    (
        "for n in range(min(LONGEST, len(text)), least - 1, -1):",
        "for n in range(least, min(LONGEST, len(text)) + 1):",
        "the shortest match is taken, not the longest",
    ),
    (
        "while self.entered + 1 < len(text):  #",
        "while self.entered < len(text):  #",
        "the text's own end is found, which nothing follows",
    ),
    (
        "text.append(text[place - len(known.tokens) + len(text)])",
        "text.append(text[0])",
        "a copy at the end of the text does not go round",
    ),
)
ANSWERS += answers(
    7,
    "speculate.py",
    (
        "depth = min(plan.depth, limit - len(out.tokens) - 1)",
        "depth = plan.depth",
        "more is written than was asked for",
    ),
)
ANSWERS += answers(
    8,
    "draft_head.py",
    (
        "            u = u + F.silu(torch.baddbmm(bias, u, weight))",
        "            u = F.silu(torch.baddbmm(bias, u, weight))",
        "no residual: an untrained head is not the target's own",
    ),
    (
        "u = self.combine(torch.cat([embedded, hidden], dim=-1))",
        "u = self.combine(torch.cat([hidden, embedded], dim=-1))",
        "states are read as embeddings",
    ),
    (
        "outputs = batch.rows(batch.hidden[:, 1:], 1).double()",
        "outputs = batch.rows(batch.hidden[:, :-1], 1).double()",
        "it is solved for the state it was given",
    ),
)
ANSWERS += answers(
    9,
    "discriminator.py",
    (
        "return (p.clamp_min(tiny).log() - q.clamp_min(tiny).log()).detach()",
        "return p.clamp_min(tiny).log() - q.clamp_min(tiny).log()",
        "the head changes D to please it",
    ),
    (
        "fake = (q.detach() * F.logsigmoid(-logits)).sum(-1)",
        "fake = (q.detach() * F.logsigmoid(logits)).sum(-1)",
        "D learns to take all for real",
    ),
    (
        "return -(q * F.logsigmoid(logits.detach())).sum(-1).mean()",
        "return -(q.detach() * F.logsigmoid(logits)).sum(-1).mean()",
        "the gradient goes through D, not through q",
    ),
)
ANSWERS += answers(
    9,
    "sampling.py",
    (
        "return torch.minimum(p, q).sum(-1)",
        "return (p * q).sum(-1)",
        "the chance that two draws are equal",
    ),
)
ANSWERS += answers(
    10,
    "train.py",
    (
        "loss = self.d_loss(guess.detach(), batch)",
        "loss = -self.d_loss(guess.detach(), batch)",
        "D learns to be wrong",
    ),
    (
        "update(self.optimizer, self.head_lr * rate, loss, clip=True)",
        "update(self.optimizer, self.head_lr, loss, clip=True)",
        "the head's rate does not fall",
    ),
    (
        "loss = self.head_loss(guess, batch, 1.0, weight)",
        "loss = self.head_loss(guess, batch, 1.0, self.weight)",
        "lambda counts before the game has begun",
    ),
)
ANSWERS += answers(
    11,
    "costs.py",
    (
        "        total += chance\n",
        "        total = 1.0 + chance\n",
        "the last node counts alone",
    ),
    (
        "return self.tau / (self.c_verify + self.c_draft)",
        "return self.tau / self.c_verify",
        "drafting is free",
    ),
    (
        "return max(sizes, key=lambda size: size.speedup)",
        "return max(sizes, key=lambda size: size.tau)",
        "tau is taken for speed",
    ),
)
ANSWERS += answers(
    12,
    "study/judge.py",
    (
        "tokens = (reach[:, None] * self.followed - self.speed * self.node).clamp(min=0).sum()",
        "tokens = (reach[:, None] * self.followed).sum()",
        "a step's tokens are wanted, and their verification is forgotten",
    ),
    (
        "return 1 + int((tokens - self.speed * self.verify[: len(tokens)]).argmax())",
        "return 1 + int((tokens / self.verify[: len(tokens)]).argmax())",
        "the best ratio of this one draft, not the speed of the text",
    ),
)


def blank(number: int, file: str, name: str) -> Mutation:
    """A function of an exercise as its student finds it."""
    source = (Path(__file__).parent.parent / file).read_text("utf-8")
    lines, node = source.splitlines(keepends=True), function(ast.parse(source), name)
    before, after = "".join(lines[: node.lineno - 1]), "".join(lines[node.end_lineno :])
    line, empty = source, emptied(source, [name], number)
    line, empty = (text[len(before) : len(text) - len(after)] for text in (line, empty))
    return Mutation(
        file, line, empty, EXERCISES[number].tests, f"exercise {number}: {name} is empty"
    )


BLANKS = [
    blank(number, file, name)
    for number, exercise in EXERCISES.items()
    for file, names in exercise.blanks.items()
    for name in names
    if not exercise.fails
]
MUTATIONS = RULES + DECODER + CACHE + PLANS + HEADS + GAME + FIGURES + FILES + ANSWERS + BLANKS
