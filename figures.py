"""From the samples of bench.py to its figures: pure functions, so that anyone can redo them.

A sample is what every method wrote for one prompt. tau is a ratio of sums (tokens over cycles), so
its interval comes from drawing whole prompts anew, and KOALA and the original head are compared on
the same draws: prompts differ far more from each other than heads do. The turns of one conversation
are drawn together: the later one's prompt holds the earlier one and its answer.
"""

import numpy as np


def is_loop(tokens: list[int], n: int = 4) -> bool:
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams) / 2


def interval(values: np.ndarray) -> list[float]:
    return [float(x) for x in np.percentile(values, [2.5, 97.5])]


def evaluate(methods: dict, seed: int, samples: list, seconds: dict, costs: dict) -> dict:
    """The figures of each method (bench.Method) from the samples; the headline is loop-free."""
    free = np.array([not s["loop"] for s in samples])
    use = free if free.any() else ~free
    rng = np.random.default_rng(seed)
    names = list(methods)

    def counts(name: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and cycles of each prompt, uncut cycles only."""
        rows = [s["methods"][name] for s in samples]
        uncut = [r["produced"][: r["uncut_cycles"]] for r in rows]
        return np.array([sum(u) for u in uncut]), np.array([len(u) for u in uncut])

    def speed(name: str, use: np.ndarray = use) -> np.ndarray:
        """Tokens/s of each run, over the prompts in use."""
        tokens = np.array([len(s["methods"][name]["tokens"]) - 1 for s in samples])
        return np.array([tokens[use].sum() / np.array(row)[use].sum() for row in seconds[name]])

    _, conversation = np.unique([s["conversation"] for s in samples], return_inverse=True)
    # How often each sample is in each of the draws: (2000, samples).
    drawn = np.unique(conversation[use])
    picks = rng.choice(len(drawn), size=(2000, len(drawn)))
    times = np.stack([np.bincount(drawn[row], minlength=len(samples)) for row in picks])
    times = times[:, conversation] * use
    plain = speed("autoregressive")
    figures, resampled = {}, {}
    for name in names:
        tokens, cycles = counts(name)
        resampled[name] = times @ tokens / np.maximum(1, times @ cycles)
        tau = float(tokens[use].sum() / max(1, cycles[use].sum()))
        accepted = [
            length - 1
            for s, keep in zip(samples, use)
            if keep
            for length in s["methods"][name]["produced"][: s["methods"][name]["uncut_cycles"]]
        ]
        deepest = methods[name]["gamma"]
        reached = [sum(a >= i for a in accepted) for i in range(deepest + 1)]
        speedups = speed(name) / plain
        c_verify, c_draft = (costs[name][phase] / costs["step"] for phase in ("verify", "draft"))
        phases = np.array([s["methods"][name]["phases"] for s in samples])[use].sum(0)
        differing = [
            s["methods"][name]["differs"] for s in samples if "differs" in s["methods"][name]
        ]
        tasks = sorted({s["task"] for s in samples})
        in_task = {t: use & np.array([s["task"] == t for s in samples]) for t in tasks}
        figures[name] = {
            "tau": tau,
            "tau_interval": interval(resampled[name]),
            "tau_on_loops": float(tokens[~free].sum() / max(1, cycles[~free].sum())),
            "tau_by_task": {
                t: float(tokens[m].sum() / cycles[m].sum())
                for t, m in in_task.items()
                if cycles[m].any()
            },
            "speedup_by_task": {
                t: float(np.median(speed(name, m) / speed("autoregressive", m)))
                for t, m in in_task.items()
                if cycles[m].any()
            },
            "accepted_histogram": [accepted.count(i) for i in range(deepest + 1)],
            "conditional_acceptance": [b / a for a, b in zip(reached, reached[1:]) if a],
            "speedup": float(np.median(speedups)),
            "speedup_range": [float(speedups.min()), float(speedups.max())],
            "c_verify": c_verify,
            "c_draft": c_draft,
            "predicted_speedup": tau / (c_verify + c_draft),
            "elsewhere": float(phases[2] / phases.sum()),  # neither drafting nor verifying
            "identical": 1 - len(differing) / len(samples),
            "largest_gap": max((d["gap"] for d in differing), default=0.0),
        }

    def compared(name: str, other: str) -> dict:
        net = speed(name) / speed(other)
        return {
            "with": other,
            "tau_ratio": figures[name]["tau"] / figures[other]["tau"],
            "tau_ratio_interval": interval(resampled[name] / resampled[other]),
            "net_speed": float(np.median(net)),
            "net_speed_range": [float(net.min()), float(net.max())],
            "predicted": figures[name]["predicted_speedup"] / figures[other]["predicted_speedup"],
        }

    # KOALA's head with the original one of the same setting, and trees with their head's chain.
    known = {(m["head"], m["setting"]): name for name, m in methods.items()}
    comparisons = {}
    for name, method in methods.items():
        original = known.get((method["head"].removesuffix("-koala"), method["setting"]))
        chain = known.get((method["head"], "chain"))
        comparisons[name] = [compared(name, o) for o in (original, chain) if o not in (None, name)]
    return {
        "heads": figures,
        "comparisons": {name: rows for name, rows in comparisons.items() if rows},
        "autoregressive_tokens_per_second": float(np.median(plain)),
        "prompts": len(samples),
        "headline": "loop-free" if free.any() else "all loops",
        "loop_free": int(free.sum()),
    }
