"""From bench.py's samples to its figures: pure functions, so that anyone can redo them.

A sample holds the text of every method for one prompt. tau = tokens / cycles, each summed over
prompts. So its interval comes from a bootstrap, which draws whole prompts anew.

Prompts differ far more from each other than heads do: KOALA and the original head are compared on
the same draws. The turns of a conversation are drawn together, since the prompt of a later turn
holds the earlier ones and their answers.
"""

import numpy as np

from plumbing.cli import UserError

DRAWS = 2000  # of the bootstrap
# Student's t: half the width of a mean's 95 % interval in standard errors, by number of values.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
COPYING = " + lookup"  # in the name and the setting of a head's drafts beside copies


def percentiles(values: np.ndarray) -> list[float]:
    """The bounds that hold the middle 95 % of the values, of those that are numbers."""
    return [float(x) for x in np.nanpercentile(values, [2.5, 97.5])]


def student_interval(values: list[float]) -> list[float]:
    """The mean, and half the width of its 95 % interval (Student's t) for more than one value."""
    mean, count = float(np.mean(values)), len(values)
    if count == 1:
        return [mean]
    return [mean, STUDENT.get(count, STUDENT[10]) * (float(np.std(values, ddof=1)) / count**0.5)]


def combined(value: float, redrawn: np.ndarray, by_seed: np.ndarray) -> list[float]:
    """The 95 % interval of a positive figure whose noise has two sources, independent and relative.

    redrawn: the figure with other texts and timings (bootstrap); by_seed: that of each seed alone.
    A few seeds drawn anew would hide half of their noise: theirs is Student's interval. Of a single
    seed nothing is known, and the interval is one over texts and timings.
    """
    texts = 1.96 * np.log(redrawn).std()
    seeds = student_interval(np.log(by_seed).tolist())[1:] or [0.0]
    half = float(np.hypot(texts, seeds[0]))
    return [float(value * np.exp(-half)), float(value * np.exp(half))]


def draw(samples: list, use: np.ndarray, seed: int) -> np.ndarray:
    """How often each draw holds each sample, (DRAWS, samples). `use`: the samples to draw from."""
    _, conversation = np.unique([s["conversation"] for s in samples], return_inverse=True)
    usable = np.unique(conversation[use])
    picks = np.random.default_rng(seed).choice(len(usable), size=(DRAWS, len(usable)))
    times = np.stack([np.bincount(usable[row], minlength=len(samples)) for row in picks])
    return times[:, conversation] * use


# ------------------------------------------------------- one method; rows: its part of each sample


def uncut_cycles(row: dict) -> list[int]:
    """Tokens of each cycle, without a cycle that the token limit cut."""
    return row["produced"][: row["uncut_cycles"]]


def tau(rows: list[dict], weights: np.ndarray) -> np.ndarray:
    """Acceptance lengths (..), one for each row of weights (.., samples); 0 where no cycle is."""
    cycles = [uncut_cycles(row) for row in rows]
    tokens, passes = np.array([sum(c) for c in cycles]), np.array([len(c) for c in cycles])
    return weights @ tokens / np.maximum(1, weights @ passes)


def over_runs(name: str, ratios: np.ndarray, redrawn: np.ndarray) -> dict:
    """The median over runs of a ratio of speeds, (runs,), its lowest and its highest value.

    `redrawn` (DRAWS, runs): the ratios of other prompts, for the median's interval.
    """
    return {
        name: float(np.median(ratios)),
        f"{name}_range": [float(ratios.min()), float(ratios.max())],
        f"{name}_interval": percentiles(np.median(redrawn, 1)),
    }


def acceptance(rows: list[dict], depth: int) -> dict:
    """How many tokens of a draft were accepted, and the chance of each, given those before it.

    Cycles in which there was nothing to copy do not count.
    """
    accepted = []
    for row in rows:
        cycles = uncut_cycles(row)
        drafts = row.get("drafts") or [["drafted", depth]] * len(cycles)
        accepted += [tokens - 1 for tokens, (_, nodes) in zip(cycles, drafts) if nodes]
    depth = max([depth, *accepted])
    histogram = [accepted.count(i) for i in range(depth + 1)]
    reached = [sum(a >= i for a in accepted) for i in range(depth + 1)]
    chances = [b / a for a, b in zip(reached, reached[1:]) if a]
    return {"accepted_histogram": histogram, "conditional_acceptance": chances}


def reckoned(row: dict, prompt: int, whole: int, own: dict, costs: dict) -> tuple[float, float]:
    """Seconds of a text's drafts and of its verifications by the isolated costs of each cycle.

    A cycle's kind is the source and the size of its draft: nothing, copied, or drafted by the head,
    which then also reads all that it has missed. `prompt`: tokens before the text; `whole`:
    those of a whole draft by the head, whose costs are `own`. (Results from
    before commit 073a1fc do not tell: each of their cycles counts as a whole draft by the head.)
    """
    if "drafts" not in row:
        cycles = len(row["produced"])
        return cycles * own["draft"], cycles * own["verify"]
    tokens, passes = zip(*costs["passes"])
    drafting, verifying, unread = 0.0, 0.0, prompt
    for (source, nodes), written in zip(row["drafts"], row["produced"]):
        if source == "drafted" and nodes == whole:
            verifying += own["verify"]
        else:
            verifying += float(np.interp(nodes + 1, tokens, passes))
        if source == "drafted" and nodes:
            drafting += own["draft"] * min(1.0, nodes / whole)
            drafting += max(0.0, own["absorb"]) * max(0, unread - costs["backlog"])
            unread = 0
        unread += written
    return drafting, verifying


def differences(rows: list[dict]) -> dict:
    """The share of texts that are plain decoding's own, and the largest gap between logits."""
    gaps = [row["differs"]["gap"] for row in rows if "differs" in row]
    return {"identical": 1 - len(gaps) / len(rows), "largest_gap": max(gaps, default=0.0)}


# ------------------------------------------------------------------------------------ all methods


def references(methods: dict) -> dict[str, list[str]]:
    """The methods that each is compared with.

    A head is compared with the original one of its kind in the same setting, any other draft with
    the chain of its own head, and one beside copies with either alone.
    """
    known = {(m["head"], m["setting"]): name for name, m in methods.items()}
    found = {}
    for name, method in methods.items():
        head, setting = method["head"], method["setting"]
        keys = [(head.split("-")[0], setting), (head, "chain")]
        if setting.endswith(COPYING):
            keys += [(head, setting.removesuffix(COPYING)), ("lookup", "copies")]
        others = [known[key] for key in keys if known.get(key, name) != name]
        found[name] = list(dict.fromkeys(others))
    return {name: others for name, others in found.items() if others}


def evaluate(
    methods: dict, seed: int, samples: list, seconds: dict, costs: dict, pairs=None, greedy=True
):
    """The figures of each method (bench.Method) from the samples; the headline is loop-free.

    `pairs`: the methods to compare each with, {name: [others]}, in place of `references`. `greedy`:
    whether texts were compared with plain decoding's; sampled ones are not. Raises UserError for a
    method without a whole cycle: tau is at least 1, and unknown without one.
    """
    free = np.array([not s["loop"] for s in samples])
    use = free if free.any() else ~free
    names = sorted({s["task"] for s in samples})
    tasks = {task: use & np.array([s["task"] == task for s in samples]) for task in names}
    rows = {name: [s["methods"][name] for s in samples] for name in ["autoregressive", *methods]}
    times = draw(samples, use, seed)
    for name in methods:
        if not tau(rows[name], use):
            reason = "each text that counts ends within its first cycle, so that tau is unknown"
            raise UserError(f"{name}: {reason}: ask for shorter drafts or other prompts")
    resampled = {name: tau(rows[name], times) for name in methods}
    for values in resampled.values():
        values[values == 0] = np.nan  # a draw without a cycle knows no tau

    def speed(name: str, times: np.ndarray = use) -> np.ndarray:
        """Tokens/s (.., runs), each sample counted so many times (.., samples).

        The prefill gave the first token.
        """
        tokens = np.array([len(row["tokens"]) - 1 for row in rows[name]])
        return (times @ tokens)[..., None] / (times @ np.array(seconds[name]).T)

    plain, plain_redrawn = speed("autoregressive"), speed("autoregressive", times)
    redrawn = {name: speed(name, times) for name in methods}

    def head_figures(name: str, ours: list[dict]) -> dict:
        by_task = {task: float(tau(ours, where)) for task, where in tasks.items()}
        by_task = {task: value for task, value in by_task.items() if value}
        drafts = [draft for row in ours for draft in row.get("drafts", ())]
        whole = max((nodes for source, nodes in drafts if source == "drafted"), default=0)
        prompts = [len(sample["prompt"]) for sample in samples]
        reckoning = [reckoned(r, p, whole, costs[name], costs) for r, p in zip(ours, prompts)]
        reckoning = np.array(reckoning)  # (samples, 2)
        cycles = np.array([len(row["produced"]) for row in ours])
        tokens = np.array([len(row["tokens"]) - 1 for row in ours])
        draft, verify = reckoning[use].sum(0) / cycles[use].sum() / costs["step"]

        def predicted(where: np.ndarray) -> float:
            return float(tokens[where].sum() * costs["step"] / reckoning[where].sum())

        def measured(where: np.ndarray) -> float:
            return float(np.median(speed(name, where) / speed("autoregressive", where)))

        phases = np.array([row["phases"] for row in ours])[use].sum(0)
        return {
            "tau": float(tau(ours, use)),
            "tau_interval": percentiles(resampled[name]),
            "tau_on_loops": float(tau(ours, ~free)),
            "tau_by_task": by_task,
            "speedup_by_task": {task: measured(tasks[task]) for task in by_task},
            "predicted_by_task": {task: predicted(tasks[task]) for task in by_task},
            **acceptance([row for row, used in zip(ours, use) if used], methods[name]["gamma"]),
            **over_runs("speedup", speed(name) / plain, redrawn[name] / plain_redrawn),
            "c_verify": float(verify),
            "c_draft": float(draft),
            "predicted_speedup": predicted(use),
            "elsewhere": float(phases[2] / phases.sum()),  # neither drafting nor verifying
            **(differences(ours) if greedy else {}),
        }

    heads = {name: head_figures(name, rows[name]) for name in methods}

    def compared(name: str, other: str) -> dict:
        ours, theirs = heads[name], heads[other]
        return {
            "with": other,
            "tau_ratio": ours["tau"] / theirs["tau"],
            "tau_ratio_interval": percentiles(resampled[name] / resampled[other]),
            **over_runs("net_speed", speed(name) / speed(other), redrawn[name] / redrawn[other]),
            "predicted": ours["predicted_speedup"] / theirs["predicted_speedup"],
        }

    pairs = references(methods) if pairs is None else pairs
    return {
        "heads": heads,
        "comparisons": {
            name: [compared(name, other) for other in others] for name, others in pairs.items()
        },
        "autoregressive_tokens_per_second": float(np.median(plain)),
        "prompts": len(samples),
        "headline": "loop-free" if free.any() else "all loops",
        "loop_free": int(free.sum()),
    }
