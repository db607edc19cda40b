"""What can be said of texts that a target wrote: does one loop, are two the same but for rounding?

A small model that decodes greedily repeats itself sooner or later, and a loop is easy to draft. Two
greedy outputs are the same text, or they part where the target's two best logits are nearly equal:
a pass over five tokens rounds differently from five passes.
"""

import torch

# The largest gap between the target's two best logits at which two outputs may part: rounding. (In
# bfloat16 SmolLM2's own gap changes by 0.5 at one place of a thousand, by 1.0 at one of five
# thousand, between reading a text token by token and all at once: study/LOG.md.)
NEAR_TIE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 1.0}


def is_loop(tokens: list[int], n: int = 4) -> bool:
    """Whether a text repeats itself: fewer than half of its n-grams are distinct."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) < len(grams) / 2


@torch.inference_mode()
def first_difference(target, prompt: list[int], ours: list[int], theirs: list[int]) -> dict:
    """Where two outputs part, and how far the worse token's logit is from the best there."""
    position = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
    text = torch.tensor([prompt + theirs[:position]], device=target.embed.weight.device)
    logits = target.lm_head(target(text)[0, -1]).float()
    either = logits[[ours[position], theirs[position]]]
    return {"position": position, "gap": (logits.max() - either.min()).item()}


def same_or_not(target, prompt: list[int], ours: list[int], plain: list[int]) -> str:
    """Greedy speculative output beside plain output, in words."""
    if ours == plain:
        return "the two outputs are identical"
    place, gap = first_difference(target, prompt, ours, plain).values()
    if gap > NEAR_TIE[target.embed.weight.dtype]:
        return f"the outputs part after token {place}, at a clear choice (gap {gap:.2g}): a bug"
    tie = f"there the target's two best tie (gap {gap:.2g}), and rounding decides"
    return f"the outputs are the same up to token {place}; {tie}"
