"""Passes of fixed shapes, which a GPU records once and then replays: `--compile`.

A small model's pass is hundreds of kernels, and on a GPU each takes longer to launch from Python
than to run. A CUDA graph is a recording of these launches; to replay it costs one launch. But it
repeats them to the letter: the same shapes, the same places in memory. So in a recorded pass

- tokens, states and rotations are copied to where the recording reads them
- keys and values are written by index: where they go is data, no longer part of the program
- attention runs over a whole cache, whose size never changes; a mask hides what is not text

All else is the code that is read without it: `GPT.read` and `Eagle.step` run as they are, with
`Places` where they expect a cache. There is a recording for each cache and each number of tokens,
made when it is first needed. Caches have `ROUND` places, or twice or four times as many, and so on;
the next text takes over what the last one is done with. Passes from the beginning of a text, or
over more than `MOST` tokens, are few and large, and run unrecorded; so do the rule, Medusa's heads,
and training.
"""

import copy
import math
import weakref
from collections import defaultdict

import torch
from torch import Tensor

from draft_head import Eagle, EagleState
from model import GPT, KVCache

ROUND = 256  # places at least: few sizes, so that most texts find a cache with recorded passes
MOST = 64  # tokens of a recorded pass


def record(body):
    """The replay of `body()`, which reads and writes fixed places. Its output is one of them."""
    usual, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(usual)
    with torch.cuda.stream(stream):
        for _ in range(3):  # kernels are chosen and workspaces made before the recording
            body()
    usual.wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            output = body()
    finally:
        torch.cuda.set_stream(usual)  # a recording that fails leaves its own behind

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


class Places:
    """Stands for a cache within a recorded pass: writes by index, and shows all of its places."""

    def __init__(self, cache: KVCache, count: int):
        self.keys, self.values = cache.keys, cache.values
        self.slots = torch.zeros(count, dtype=torch.long, device=cache.keys.device)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Put (B, Hkv, T, hd) keys and values into the slots; return all of the layer's."""
        self.keys[layer].index_copy_(2, self.slots, keys)
        self.values[layer].index_copy_(2, self.slots, values)
        return self.keys[layer], self.values[layer]


class Pass:
    """One pass, with all that it reads and writes at fixed places."""

    def __init__(self, function, cache: KVCache, inputs: list[Tensor], record):
        """`function(*inputs, places, rotary)`; `inputs`: examples, cos and sin come last."""
        count = inputs[0].shape[1]
        self.inputs = [value.new_zeros(value.shape) for value in inputs]
        self.places = Places(cache, count)
        self.mask = inputs[-1].new_zeros(count, cache.max_length)
        self.function, self.record, self.replay = function, record, None

    def body(self) -> Tensor:
        *inputs, cos, sin = self.inputs
        return self.function(*inputs, self.places, (cos, sin, self.mask))

    def __call__(self, start: int, mask: Tensor | None, inputs: list[Tensor]) -> Tensor:
        """The output, in memory of its own. `start`: tokens in the cache. mask (T, start + T);
        None: all of them are seen.
        """
        count = len(self.places.slots)
        for place, value in zip(self.inputs, inputs):
            place.copy_(value)
        torch.arange(start, start + count, out=self.places.slots)
        self.mask.fill_(-math.inf)
        self.mask[:, : start + count] = 0.0 if mask is None else mask
        self.replay = self.replay or self.record(self.body)
        return self.replay().clone()


class Passes:
    """The recorded passes of a target and its heads, and the caches they write to."""

    def __init__(self, record=record):
        """`record(body)` gives the replay of `body`: a CUDA graph, or what stands for one."""
        self.how, self.known, self.free = record, {}, defaultdict(list)

    def record(self, body):
        """The replay of `body`; where it cannot be recorded, itself, and so from then on."""
        try:
            return self.how(body)
        except RuntimeError as error:  # of CUDA, whatever it is
            self.how = lambda body: body
            reason = " ".join(str(error).split())[:100]
            print(f"--compile does not work here ({reason}): going on without")
            return body

    def __call__(self, function, cache: KVCache, rotary, *inputs: Tensor) -> Tensor:
        """function(*inputs, cache, rotary), a pass over the tokens that follow what is cached.

        Raises ValueError where there is no room for them.
        """
        if (end := cache.length + inputs[0].shape[1]) > cache.max_length:
            raise ValueError(f"{end} tokens exceed a cache of {cache.max_length}")
        cos, sin, mask = rotary
        inputs = [*inputs, cos, sin]
        key = (function, id(cache.keys), *(value.shape for value in inputs))
        if key not in self.known:
            with torch.inference_mode(False):  # they outlive the text
                self.known[key] = Pass(function, cache, inputs, self.record)
        return self.known[key](cache.length, mask, inputs)

    def cache(self, make, length: int, *key) -> KVCache:
        """An empty cache of at least `length` places, by `make(size)` if none of its size and key
        is free. It is free again as soon as nobody holds it.
        """
        size = ROUND
        while size < length:
            size *= 2
        free = self.free[size, key]
        with torch.inference_mode(False):
            whole = free.pop() if free else make(size)
        # What is masked counts 0 times its value, which has to be a number.
        whole.values.zero_()
        cache = copy.copy(whole)  # of the same keys and values
        weakref.finalize(cache, free.append, whole).atexit = False
        return cache


def recordable(tokens: Tensor, cache) -> bool:
    """Whether a pass over tokens (B, T) is one of many like it."""
    return isinstance(cache, KVCache) and cache.length > 0 and tokens.shape[1] <= MOST


class ReplayedGPT(GPT):
    def new_cache(self, max_length: int | None = None, batch: int = 1) -> KVCache:
        make = super().new_cache
        length = max_length or self.config.context
        return self.passes.cache(lambda size: make(size, batch), length, id(self), batch)

    def read(self, tokens: Tensor, cache: KVCache | None, rotary) -> Tensor:
        if not recordable(tokens, cache):
            return super().read(tokens, cache, rotary)
        return self.passes(super().read, cache, rotary, tokens)


class ReplayedEagle(Eagle):
    def start(self, max_length: int, batch: int = 1) -> EagleState:
        make = super().start
        return EagleState(
            self.passes.cache(lambda size: make(size, batch).cache, max_length, id(self), batch)
        )

    def step(self, tokens: Tensor, hidden: Tensor, cache=None, rotary=None) -> Tensor:
        if not recordable(tokens, cache):
            return super().step(tokens, hidden, cache, rotary)
        rotary = rotary or self.rotary(cache.length, tokens.shape[1])
        return self.passes(super().step, cache, rotary, tokens, hidden)


def replay_passes(model, passes: Passes) -> None:
    """Have a target or a head that is ready for decoding replay its passes. Medusa has none."""
    replayed = {GPT: ReplayedGPT, Eagle: ReplayedEagle}.get(type(model))
    if replayed is not None:
        model.__class__, model.passes = replayed, passes


def replay_on_a_gpu(target: GPT) -> None:
    """Have a target on a GPU replay its passes, and the heads that are loaded for it."""
    if target.embed.weight.device.type == "cuda":
        replay_passes(target, Passes())
    else:
        print("--compile records passes on a GPU: there is none, going on without")
