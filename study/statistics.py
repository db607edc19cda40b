"""From bench.py's samples to its figures: pure functions, so that anyone can redo them.

A sample holds the text of every method for one prompt. tau = tokens / cycles, each summed over
prompts. So its interval comes from a bootstrap, which draws whole prompts anew.

Prompts differ far more from each other than heads do: KOALA and the original head are compared on
the same draws. The turns of a conversation are drawn together, since the prompt of a later turn
holds the earlier ones and their answers.
"""

import numpy as np

DRAWS = 2000  # of the bootstrap


def percentiles(values: np.ndarray) -> list[float]:
    """The bounds that hold the middle 95 % of the values."""
    return [float(x) for x in np.percentile(values, [2.5, 97.5])]


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


def over_runs(name: str, ratios: np.ndarray) -> dict:
    """The median of a ratio of speeds, and its lowest and highest value."""
    spread = [float(ratios.min()), float(ratios.max())]
    return {name: float(np.median(ratios)), f"{name}_range": spread}


def acceptance(rows: list[dict], depth: int) -> dict:
    """How many tokens of a draft were accepted, and the chance of each, given those before it."""
    accepted = [tokens - 1 for row in rows for tokens in uncut_cycles(row)]
    histogram = [accepted.count(i) for i in range(depth + 1)]
    reached = [sum(a >= i for a in accepted) for i in range(depth + 1)]
    chances = [b / a for a, b in zip(reached, reached[1:]) if a]
    return {"accepted_histogram": histogram, "conditional_acceptance": chances}


def differences(rows: list[dict]) -> dict:
    """The share of texts that are plain decoding's own, and the largest gap between logits."""
    gaps = [row["differs"]["gap"] for row in rows if "differs" in row]
    return {"identical": 1 - len(gaps) / len(rows), "largest_gap": max(gaps, default=0.0)}


# ------------------------------------------------------------------------------------ all methods


def references(methods: dict) -> dict[str, list[str]]:
    """The methods that each is compared with.

    A head is compared with the original one of its kind in the same setting, and any other draft
    with the chain of its own head.
    """
    known = {(m["head"], m["setting"]): name for name, m in methods.items()}
    found = {}
    for name, method in methods.items():
        keys = (method["head"].split("-")[0], method["setting"]), (method["head"], "chain")
        found[name] = [known[key] for key in keys if known.get(key, name) != name]
    return {name: others for name, others in found.items() if others}


def evaluate(methods: dict, seed: int, samples: list, seconds: dict, costs: dict) -> dict:
    """The figures of each method (bench.Method) from the samples; the headline is loop-free."""
    free = np.array([not s["loop"] for s in samples])
    use = free if free.any() else ~free
    names = sorted({s["task"] for s in samples})
    tasks = {task: use & np.array([s["task"] == task for s in samples]) for task in names}
    rows = {name: [s["methods"][name] for s in samples] for name in ["autoregressive", *methods]}
    times = draw(samples, use, seed)
    resampled = {name: tau(rows[name], times) for name in methods}

    def speed(name: str, where: np.ndarray = use) -> np.ndarray:
        """Tokens/s of each run, over some samples. The prefill gave the first token."""
        tokens = np.array([len(row["tokens"]) - 1 for row in rows[name]])
        return np.array([tokens[where].sum() / np.array(run)[where].sum() for run in seconds[name]])

    def speedup(name: str, where: np.ndarray = use) -> np.ndarray:
        return speed(name, where) / speed("autoregressive", where)

    def head_figures(name: str, ours: list[dict]) -> dict:
        by_task = {task: float(tau(ours, where)) for task, where in tasks.items()}
        by_task = {task: value for task, value in by_task.items() if value}
        verify, draft = (costs[name][phase] / costs["step"] for phase in ("verify", "draft"))
        phases = np.array([row["phases"] for row in ours])[use].sum(0)
        return {
            "tau": float(tau(ours, use)),
            "tau_interval": percentiles(resampled[name]),
            "tau_on_loops": float(tau(ours, ~free)),
            "tau_by_task": by_task,
            "speedup_by_task": {t: float(np.median(speedup(name, tasks[t]))) for t in by_task},
            **acceptance([row for row, used in zip(ours, use) if used], methods[name]["gamma"]),
            **over_runs("speedup", speedup(name)),
            "c_verify": verify,
            "c_draft": draft,
            "predicted_speedup": float(tau(ours, use)) / (verify + draft),
            "elsewhere": float(phases[2] / phases.sum()),  # neither drafting nor verifying
            **differences(ours),
        }

    heads = {name: head_figures(name, rows[name]) for name in methods}

    def compared(name: str, other: str) -> dict:
        ours, theirs = heads[name], heads[other]
        return {
            "with": other,
            "tau_ratio": ours["tau"] / theirs["tau"],
            "tau_ratio_interval": percentiles(resampled[name] / resampled[other]),
            **over_runs("net_speed", speed(name) / speed(other)),
            "predicted": ours["predicted_speedup"] / theirs["predicted_speedup"],
        }

    pairs = references(methods).items()
    return {
        "heads": heads,
        "comparisons": {name: [compared(name, o) for o in others] for name, others in pairs},
        "autoregressive_tokens_per_second": float(np.median(speed("autoregressive"))),
        "prompts": len(samples),
        "headline": "loop-free" if free.any() else "all loops",
        "loop_free": int(free.sum()),
    }
