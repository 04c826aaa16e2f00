"""The whole algorithm over a whole Llama, one request at a time, in plain torch of any dtype.

In float64 it is the truth that an engine's output is measured against; in float32 it shows what
rounding alone may do to that output. Of the package it uses only what fixes a convention: which
positions probe, which rotation is meant, and which tokens make whole blocks. There are no
blocks, pages, slots or packed codes here: compression replaces keys and values by what the
cache would give back, or marks them absent.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from vllm_zipvl.config import ZipVLConfig
from vllm_zipvl.core.geometry import num_compressible
from vllm_zipvl.core.probes import probe_positions
from vllm_zipvl.core.quantization import hadamard

HALF_RANGE = 1.49355
"""Of a uniform quantiser of four levels for a unit normal variable (Max, 1960)."""


class Llama:
    """The weights and the arithmetic of a checkpoint, apart from attention."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.settings = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.weights = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        self.dtype = dtype
        self.num_layers = self.settings["num_hidden_layers"]
        self.num_kv_heads = self.settings["num_key_value_heads"]
        self.head_size = self.settings["head_dim"]
        self.scale = self.head_size**-0.5

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.weights["model.embed_tokens.weight"][tokens]

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        variance = x.square().mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.settings["rms_norm_eps"])
        return x * self.weights[f"model.{name}.weight"]

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weights[f"model.{name}.weight"].T + self.weights.get(
            f"model.{name}.bias", 0
        )

    def heads(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return self.linear(name, x).unflatten(-1, (-1, self.head_size))

    def rotary(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate channel i against channel i + head_size / 2 (NeoX style)."""
        theta = self.settings["rope_parameters"]["rope_theta"]
        exponents = torch.arange(0, self.head_size, 2, dtype=self.dtype) / self.head_size
        angles = positions.to(self.dtype)[:, None] / theta**exponents
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        left, right = x.chunk(2, -1)
        return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)

    def mlp(self, name: str, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.linear(f"{name}.gate_proj", x), self.linear(f"{name}.up_proj", x)
        return self.linear(f"{name}.down_proj", F.silu(gate) * up)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        tied = self.settings["tie_word_embeddings"]
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return self.norm("norm", x) @ head.T


class Event(NamedTuple):
    """What was decided on: "chunk" and "prompt" for tokens [0, end), "tail" for the last ones."""

    kind: str
    end: int
    layer: int


@dataclass
class Choice:
    """A decision, and what it rests on.

    Attributes:
        mass: Raw attention mass, [n]; the count comes from it.
        covered: Mass that counts whatever is kept.
        scores: What ranks the tokens, [n].
        num: Tokens kept by rank.
        always: Tokens kept in any case, bool [n].
        kept: Bool [n]; where a prompt is compressed, of those tokens.
        first: The position of the first of them.
    """

    mass: torch.Tensor
    covered: float
    scores: torch.Tensor
    num: int
    always: torch.Tensor
    kept: torch.Tensor
    first: int = 0


@dataclass
class Trace:
    """What a run computed.

    Attributes:
        logits: Of the prompt's last token and of every later one, [num_steps, vocab_size].
        choices: By event; `kept` is the oracle's own even where another was forced.
        compressed_after: Steps, counted from the prompt's, after which tokens were compressed.
    """

    logits: torch.Tensor
    choices: dict[Event, Choice]
    compressed_after: list[int]


class Layer:
    """A request's keys and values in one layer, [num_kv_heads, capacity, head_size], and probes."""

    def __init__(self, model: Llama, capacity: int) -> None:
        shape = (model.num_kv_heads, capacity, model.head_size)
        self.keys = torch.full(shape, math.nan, dtype=model.dtype)
        self.values = torch.full(shape, math.nan, dtype=model.dtype)
        self.present = torch.zeros(capacity, dtype=torch.bool)
        # By pairs of a probe and a token: far ones, near ones.
        self.random_mass = torch.zeros(2, 0, dtype=model.dtype)
        self.cache_choice: Choice
        self.random_positions: list[int] = []
        self.key_norm: KeyNorm

    def store(self, positions: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys[:, positions] = keys.transpose(0, 1)
        self.values[:, positions] = values.transpose(0, 1)
        self.present[positions] = True


def attention_weights(
    queries: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    columns: torch.Tensor,
    scale: float,
    far: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax over the keys at or before each query; weights of 0 where none is left.

    Args:
        queries: [num_queries, num_heads, head_size].
        rows: Their positions.
        keys: [num_kv_heads, num_keys, head_size].
        columns: Their positions; one past all rows hides a key.
        scale: Softmax scale.
        far: Pairs that are hidden too, bool [num_queries, num_keys].

    Returns:
        [num_kv_heads, queries per KV head x num_queries, num_keys].
    """
    grouped = queries.unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)
    scores = (grouped.flatten(1, 2) * scale) @ keys.transpose(1, 2)
    hidden = columns > rows[:, None]
    hidden = (hidden if far is None else hidden | far).repeat(grouped.shape[1], 1)
    return scores.masked_fill_(hidden, -math.inf).softmax(-1).nan_to_num(0)


def weighted(weights: torch.Tensor, values: torch.Tensor, num_queries: int) -> torch.Tensor:
    """[num_queries, num_heads, head_size]."""
    out = weights @ values
    return out.unflatten(1, (-1, num_queries)).flatten(0, 1).transpose(0, 1)


def byte_scale(scale: torch.Tensor, bits: int) -> torch.Tensor:
    """What a byte of 5 exponent and 3 mantissa bits makes of a scale; up at 8 bits."""
    scale = scale.half().to(scale.dtype)
    unit = 2.0 ** (torch.frexp(scale).exponent - 4).clamp(min=-17).to(scale.dtype)
    return ((scale / unit).ceil() if bits == 8 else (scale / unit + 0.5).floor()) * unit


def through_cache(x: torch.Tensor, bits: int, num_zeros: int) -> torch.Tensor:
    """What a cache of `bits` bits gives back for vectors [..., head_size]."""
    rotation = hadamard(x.shape[-1]).to(x.dtype)
    x = (x @ rotation).unflatten(-1, (num_zeros, -1))
    if bits == 2:
        mean = x.mean(-1, keepdim=True)
        reach = HALF_RANGE * (x - mean).square().mean((-2, -1), keepdim=True).sqrt()
        x = torch.maximum(torch.minimum(x, mean + reach), mean - reach)
    levels = 2**bits - 1
    zero = x.amin(-1, keepdim=True).half().to(x.dtype)
    scale = byte_scale((x - zero).amax((-2, -1), keepdim=True) / levels, bits)
    codes = ((x - zero) / scale).round().clamp(0, levels)
    return (codes * scale + zero).flatten(-2) @ rotation


class KeyNorm(NamedTuple):
    """Mean, scale and channel of each place, [num_kv_heads, 1, head_size]."""

    mean: torch.Tensor
    scale: torch.Tensor
    order: torch.Tensor


def key_norm(keys: torch.Tensor, shake: Callable[[torch.Tensor], torch.Tensor]) -> KeyNorm:
    """What keys [num_kv_heads, num_tokens, head_size] are normalised by; size a power of two.

    Figures are rounded to float16 after `shake`, which stands for other arithmetic.
    """
    head_size = keys.shape[-1]
    heads = []
    for own in keys:
        deviation, mean = torch.std_mean(own, dim=0, correction=0)
        power = own.square().mean(0)
        order = key_order(power.tolist())
        largest_pair = [order[0], order[head_size // 2]]
        deviation[largest_pair], power[largest_pair] = 0, 0
        channels = range(head_size)
        partners = [(i, (i + head_size // 2) % head_size, i ^ 1) for i in channels]
        turning = torch.stack([power[list(those)].max() for those in partners])
        scale = (deviation.square() + 0.01 * turning) ** 0.25
        typical = scale.mean()
        scale = scale.clamp(min=typical / 8)[order]
        scale[[0, head_size // 2]] = typical / 2
        heads.append((mean[order], scale, torch.tensor(order)))
    mean, scale, order = (torch.stack(parts)[:, None] for parts in zip(*heads, strict=True))
    return KeyNorm(*(shake(x).half().to(keys.dtype) for x in (mean, scale)), order)


def key_order(power: list[float]) -> list[int]:
    """The largest channel first and its partner in the middle, by exchange of bits and signs."""
    num_bits = len(power).bit_length() - 1
    largest = max(range(len(power)), key=lambda i: power[i])
    bit = max(range(num_bits), key=lambda b: power[largest ^ 1 << b])
    order = []
    for place in range(len(power)):
        digits = [place >> b & 1 for b in range(num_bits)]
        digits[bit], digits[-1] = digits[-1], digits[bit]
        order.append(sum(digit << b for b, digit in enumerate(digits)) ^ largest)
    return order


def count(mass: torch.Tensor, config: ZipVLConfig, covered: float = 0.0) -> int:
    """How many to keep: by `ratio`, or the fewest that carry the share `tau` of the mass."""
    if config.ratio is not None:
        return math.ceil(config.ratio * len(mass))
    if config.tau == 1:
        return len(mass)
    running = mass.sort(descending=True, stable=True).values.cumsum(0)
    wanted = config.tau * (float(running[-1]) + covered) - covered
    return int((running < wanted).sum()) + 1 if wanted > 0 else 0


def top(scores: torch.Tensor, num: int) -> torch.Tensor:
    """Bool [n], true for the `num` largest; the lower position first among equals."""
    order = (-scores).argsort(stable=True)
    return torch.zeros(len(scores), dtype=torch.bool).scatter(0, order[:num], True)


class Request:
    """One request on its way through the algorithm."""

    def __init__(
        self,
        model: Llama,
        config: ZipVLConfig,
        block_size: int,
        capacity: int,
        forced: Mapping[Event, torch.Tensor],
        noise: float,
    ) -> None:
        self.model = model
        self.config = config
        self.block_size = block_size
        self.forced = forced
        self.noise = noise
        self.generator = torch.Generator().manual_seed(0)
        self.layers = [Layer(model, capacity) for _ in range(model.num_layers)]
        self.choices: dict[Event, Choice] = {}
        self.num_tokens = 0
        self.compressed_len = 0
        # Length of a complete prompt that is still to be compressed.
        self.awaiting: int | None = None

    def _settle(self, event: Event, choice: Choice) -> torch.Tensor:
        self.choices[event] = choice
        return self.forced.get(event, choice.kept)

    def _forward(self, tokens: torch.Tensor, attend: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Logits of the last token; `attend(layer, positions, queries)` does the attention."""
        model = self.model
        positions = torch.arange(self.num_tokens, self.num_tokens + len(tokens))
        self.num_tokens += len(tokens)
        x = model.embed(tokens)
        for i, layer in enumerate(self.layers):
            name = f"layers.{i}"
            h = model.norm(f"{name}.input_layernorm", x)
            q, k, v = (model.heads(f"{name}.self_attn.{kind}_proj", h) for kind in "qkv")
            layer.store(positions, model.rotary(k, positions), v)
            out = attend(i, positions, model.rotary(q, positions))
            x = x + model.linear(f"{name}.self_attn.o_proj", out.flatten(1))
            x = x + model.mlp(f"{name}.mlp", model.norm(f"{name}.post_attention_layernorm", x))
        return model.logits(x[-1])

    @property
    def head_len(self) -> int:
        """The blocks of the first `sinks` tokens stay as they are."""
        return math.ceil(self.config.sinks / self.block_size) * self.block_size

    def _num_compressible(self, n: int) -> int:
        end = num_compressible(n, self.config.residual, self.block_size)
        return end if end > self.head_len else 0

    def prefill(self, tokens: torch.Tensor, is_last: bool) -> torch.Tensor:
        end = self.num_tokens + len(tokens)
        config = self.config
        sparse = config.sparse_prefill and end >= config.min_tokens and len(tokens) > 1
        if is_last and config.compress and self._num_compressible(end):
            self.awaiting = end

        def attend(index: int, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            layer = self.layers[index]
            prefill_choice, layer.cache_choice = self._probe(layer, rows, queries)
            columns, far = torch.arange(end), None
            if sparse:
                far = self._far(self._settle(Event("chunk", end, index), prefill_choice), rows)
            keys, values = layer.keys[:, :end], layer.values[:, :end]
            weights = attention_weights(queries, rows, keys, columns, self.model.scale, far)
            return weighted(weights, values, len(rows))

        return self._forward(tokens, attend)

    def _far(self, kept: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Pairs that are neither both kept nor in the query's neighbourhood."""
        far = torch.ones(len(rows), len(kept), dtype=torch.bool)
        for i, row in enumerate(rows.tolist()):
            far[i, max(0, row + 1 - self.config.window) : row + 1] = False
            far[i, : self.config.sinks] = False
            if kept[row]:
                far[i, kept] = False
        return far

    def _probe(
        self, layer: Layer, rows: torch.Tensor, queries: torch.Tensor
    ) -> tuple[Choice, Choice]:
        """What the chunk attends to beside neighbourhoods, and what the cache keeps so far."""
        config = self.config
        start, n = int(rows[0]), self.num_tokens
        probes = probe_positions(config.seed, start, n, config.probe_recent, config.probe_random)
        columns = torch.arange(n)

        def near(positions: torch.Tensor) -> torch.Tensor:
            ahead = positions[:, None] - columns
            return (ahead >= 0) & ((ahead < config.window) | (columns < config.sinks))

        def mass_of(positions: list[int]) -> torch.Tensor:
            at = torch.tensor(positions, dtype=torch.long)
            keys = layer.keys[:, :n]
            weights = attention_weights(queries[at - start], at, keys, columns, self.model.scale)
            weights = weights.unflatten(1, (queries.shape[1] // len(keys), len(at))).sum((0, 1))
            return torch.stack([(weights * part).sum(0) for part in (~near(at), near(at))])

        random = mass_of(probes.random.tolist())
        random[:, : layer.random_mass.shape[1]] += layer.random_mass
        layer.random_mass = random
        layer.random_positions += probes.random.tolist()
        mass = random + mass_of(probes.recent.tolist())
        everyone = torch.tensor([*layer.random_positions, *probes.recent.tolist()])
        sees = everyone[:, None] >= columns
        always = columns >= n - len(probes.recent)
        return (
            self._choose(mass[0], (sees & ~near(everyone)).sum(0), always, float(mass[1].sum())),
            self._choose(mass.sum(0), sees.sum(0), always),
        )

    def _choose(
        self, mass: torch.Tensor, probes: torch.Tensor, always: torch.Tensor, covered: float = 0.0
    ) -> Choice:
        """The count from raw mass, the tokens by mass per probe that it may come from."""
        num = count(mass, self.config, covered)
        scores = mass / probes.clamp(min=1)
        return Choice(mass, covered, scores, num, always, top(scores, num) | always)

    def _compress_prompt(self, n: int) -> None:
        """Tokens [0, b) by the last chunk's choices, bounded by `max_kept`."""
        end = self._num_compressible(n)
        choices = [layer.cache_choice for layer in self.layers]
        budget = self.config.max_kept * n * len(choices)
        factor = min(1.0, budget / sum(choice.num for choice in choices))
        exceeded = sum(int(choice.kept.sum()) for choice in choices) > budget
        for i, choice in enumerate(choices):
            num, kept = choice.num, choice.kept
            if exceeded:
                num = math.floor(num * factor)
                kept = top(choice.scores, num) | choice.always
            if self.config.high_bits == self.config.low_bits:
                num, kept = n, torch.ones(n, dtype=torch.bool)
            start = self.head_len
            mine = replace(choice, num=num, kept=kept[start:end], first=start)
            self._compress(i, start, end, self._settle(Event("prompt", end, i), mine))
        self.compressed_len = end

    def decode(self, token: torch.Tensor) -> torch.Tensor:
        """One step and, after it, the compression of the prompt or of the tail if it is due.

        The prompt's waits for this step so that the first token need not wait for it.
        """
        config = self.config
        n = self.num_tokens + 1
        first, last = max(self.compressed_len, self.head_len), self._num_compressible(n)
        due = config.compress and n - first >= config.interval + config.residual and last > first
        due = due and self.awaiting is None

        def attend(index: int, rows: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
            layer = self.layers[index]
            columns = torch.arange(n).masked_fill(~layer.present[:n], n)
            weights = attention_weights(queries, rows, layer.keys[:, :n], columns, self.model.scale)
            out = weighted(weights, layer.values[:, :n], 1)
            if due:
                mass = weights.sum((0, 1))[first:last]
                num = count(mass, config)
                if config.high_bits == config.low_bits:
                    num = len(mass)
                never = torch.zeros(last - first, dtype=torch.bool)
                choice = Choice(mass, 0.0, mass, num, never, top(mass, num))
                # Applied after the step; nothing of it is read before the next one.
                self._compress(index, first, last, self._settle(Event("tail", last, index), choice))
            return out

        logits = self._forward(token[None], attend)
        if due:
            self.compressed_len = last
        if self.awaiting is not None:
            self._compress_prompt(self.awaiting)
            self.awaiting = None
        return logits

    def _shake(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        return x + self.noise * x.std() * noise

    def _compress(self, index: int, start: int, end: int, kept: torch.Tensor) -> None:
        layer = self.layers[index]
        if start == self.head_len:
            # Of the request's first compression, kept or not; later ones use it too.
            layer.key_norm = key_norm(layer.keys[:, start:end], self._shake)
        mean, scale, order = layer.key_norm
        for mask, bits in ((kept, self.config.high_bits), (~kept, self.config.low_bits)):
            positions = start + mask.nonzero().flatten()
            if bits == 0:
                layer.present[positions] = False
            elif bits < 16 and len(positions):
                keys, into = layer.keys[:, positions], order.expand(-1, len(positions), -1)
                keys = self._shake((keys.gather(-1, into) - mean) / scale)
                values = self._shake(layer.values[:, positions])
                keys = through_cache(keys, bits, num_zeros=2) * scale + mean
                layer.keys[:, positions] = torch.empty_like(keys).scatter(-1, into, keys)
                layer.values[:, positions] = through_cache(values, bits, num_zeros=1)


def use_one_thread() -> None:
    """Prepare a process for `run`: its operations are small."""
    torch.set_num_threads(1)


def run(
    folder: Path,
    dtype: torch.dtype,
    tokens: list[int],
    chunks: list[tuple[int, int]],
    config: ZipVLConfig,
    block_size: int,
    forced: Mapping[Event, torch.Tensor] | None = None,
    noise: float = 0.0,
) -> Trace:
    """Compute a prompt in chunks and every later token one by one.

    Args:
        folder: The checkpoint.
        dtype: Dtype of all arithmetic.
        tokens: The prompt and the tokens generated after it but the last, which no step reads.
        chunks: Start and end of the prompt's chunks.
        config: The settings.
        block_size: Tokens per block of the engine.
        forced: Kept sets to go on with instead of the oracle's own.
        noise: Relative error added to whatever is about to be quantised.
    """
    model = Llama(folder, dtype)
    request = Request(model, config, block_size, len(tokens), forced or {}, noise)
    ids = torch.tensor(tokens)
    n = chunks[-1][1]
    for start, end in chunks:
        logits = [request.prefill(ids[start:end], is_last=end == n)]
    compressed_after = []
    for step, token in enumerate(ids[n:], start=1):
        before = request.compressed_len
        logits.append(request.decode(token))
        if request.compressed_len > before:
            compressed_after.append(step)
    return Trace(torch.stack(logits), request.choices, compressed_after)
