"""`skvq bench capacity`: the longest context that fits beside a model's weights, and how fast the model decodes there.

The model has random weights, made on the device from a configuration (by default the shape of Llama 2 7B in f16), so
nothing is downloaded. Its cache grows, nothing is built twice: by ever smaller steps once one no longer fits, until
a length that does not fit is no more than a hundredth away. A length counts as fitting when the model has decoded a
token there. The first steps follow a prediction, bytes a token over what is free; both numbers are in the report.

How the cache grows is said in the report too. "rows": random keys and values go to every layer as a model's would,
without the model, which takes a time linear in the length. "prefill": the model reads random tokens in chunks, which
takes a quadratic one; this shows that a long prompt can be read at all. What a step costs depends on neither.

On the CPU memory is counted instead of exhausted: weights and cache may take `limit_gib` together.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._native import CudaLayer, SkvqError
from ..evaluate.progress import progress_bar
from . import layers
from .device import GIB, BenchDevice, first_line, is_out_of_memory
from .machine import available_bytes, make_report, peak_resident_bytes, reset_peak
from .weights import held_bytes

FILLS = ("rows", "prefill")
RESOLUTION = 100  # the search ends where what does not fit is a hundredth of the length away
FIRST_SHARE = 0.25  # of the predicted length, as the first step
CPU_SHARE = 0.5  # of the available memory, on the CPU without a limit
WARM_STEPS = 2


@dataclass(frozen=True)
class CapacityOptions:
    """What `skvq bench capacity` builds and how far it goes.

    Attributes:
        config: directory or file of a model's configuration; None: a Llama of the sizes below.
        kv_heads: of keys and values; None: as many as `heads`.
        plan: of a calibrated cache, for this configuration; None: `format`.
        fill: how the cache grows, "rows" or "prefill".
        chunk: tokens at a time, of either.
        tokens: a length that is to be shown to fit; None: the longest is looked for.
        steps: tokens that are decoded and timed at a length.
        limit_gib: of weights and cache together; None: the device's memory.
        budget: seconds after which the cache grows no further.
    """

    device: str = "cuda"
    config: str | None = None
    layers: int = 32
    heads: int = 32
    kv_heads: int | None = None
    head_dim: int = 128
    intermediate: int = 11008
    vocabulary: int = 32000
    dtype: str = "float16"
    format: str = "K2V1.6"
    static: bool = False
    plan: str | None = None
    fill: str = "rows"
    chunk: int = 2048
    tokens: int | None = None
    steps: int = 16
    limit_gib: float | None = None
    budget: float | None = None


# ---- where -----------------------------------------------------------------------------------------------------------


class Place:
    """The device of a run, and what of its memory is in use.

    Attributes:
        limit: bytes that weights and cache may take.
    """

    def __init__(self, options: CapacityOptions) -> None:
        self.gpu = None if options.device == "cpu" else BenchDevice(options.device)
        self.place = torch.device("cpu") if self.gpu is None else self.gpu.place
        self.on_gpu = self.gpu is not None and self.gpu.is_cuda
        limit = None if options.limit_gib is None else int(options.limit_gib * GIB)
        if self.on_gpu:
            total = torch.cuda.get_device_properties(self.place).total_memory
            if limit is not None:
                if limit > total:
                    raise SkvqError(f"limit_gib={options.limit_gib:g}: expected at most {total / GIB:.1f}")
                torch.cuda.set_per_process_memory_fraction(limit / total, self.place)
            self.limit = total if limit is None else limit
            torch.cuda.reset_peak_memory_stats(self.place)
        else:
            available = available_bytes()
            if limit is None and available is None:
                raise SkvqError("limit_gib=None: expected a number where free memory is not known")
            self.limit = int(CPU_SHARE * (available or 0)) if limit is None else limit
            reset_peak()

    def describe(self) -> dict[str, Any] | None:
        """Of the GPU."""
        return None if self.gpu is None else self.gpu.describe()

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.gpu is not None:
            self.gpu.synchronize()

    def free_bytes(self, used: int) -> int:
        """What is left, `used` being what weights and cache take."""
        if self.gpu is not None and (free := self.gpu.free_bytes()) is not None:
            return min(free, self.limit - torch.cuda.memory_reserved(self.place))
        return self.limit - used

    def expect(self, used: int) -> None:
        """Raises MemoryError where memory is counted and `used` is too much."""
        if not self.on_gpu and used > self.limit:
            raise MemoryError(f"out of memory: {used} bytes of at most {self.limit}")

    def peak_bytes(self) -> int | None:
        """Of the run so far: what torch took from the GPU, or the process's resident memory."""
        return torch.cuda.max_memory_reserved(self.place) if self.on_gpu else peak_resident_bytes()


# ---- what ------------------------------------------------------------------------------------------------------------


def model_config(options: CapacityOptions) -> Any:
    """The configuration; a Llama's where none is named."""
    from transformers import AutoConfig, LlamaConfig

    if options.config is not None:
        return AutoConfig.from_pretrained(options.config)
    kv_heads = options.kv_heads or options.heads
    if options.heads % kv_heads:
        raise SkvqError(f"kv_heads={kv_heads}: expected a divisor of heads={options.heads}")
    return LlamaConfig(
        vocab_size=options.vocabulary,
        hidden_size=options.heads * options.head_dim,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=kv_heads,
        head_dim=options.head_dim,
        max_position_embeddings=1 << 22,
    )


@contextmanager
def _made_as(dtype: torch.dtype, place: torch.device) -> Iterator[None]:
    """Parameters are made in this dtype and on this device meanwhile."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with place:
            yield
    finally:
        torch.set_default_dtype(before)


def random_model(config: Any, dtype: str, place: torch.device) -> Any:
    """A causal model with random weights."""
    from transformers import AutoModelForCausalLM

    from ..attention import NAME, register_attention

    register_attention()  # it makes no mask of a chunk and all tokens before
    torch.manual_seed(0)
    with _made_as(getattr(torch, dtype), place):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=NAME)
    return model.eval()


def new_cache(options: CapacityOptions, config: Any) -> Any:
    """An empty packed cache in the wanted format."""
    from ..cache import QuantizedDynamicCache

    if options.plan is not None:
        return QuantizedDynamicCache.from_plan(config, options.plan)
    return QuantizedDynamicCache(config, layers.options_of(options.format, static=options.static))


class Growing:
    """A cache that grows to a length, all its layers alike.

    Raises:
        SkvqError: a layer of the model has no packed cache.
    """

    def __init__(self, place: Place, model: Any, cache: Any, options: CapacityOptions) -> None:
        from ..layer import PackedLayer
        from ..model_layers import layer_configs

        self.place, self.model, self.cache, self.options = place, model, cache, options
        kinds = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, PackedLayer)}
        if kinds:
            raise SkvqError(f"config: layers with {', '.join(sorted(kinds))}, expected full attention in all of them")
        self.configs = layer_configs(model.config)
        self.weight_bytes = held_bytes(model)
        self._generator = torch.Generator(place.place).manual_seed(0)
        self._rows: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def length(self) -> int:
        """Tokens of the cache."""
        return min(int(layer.get_seq_length()) for layer in self.cache.layers)

    @property
    def used_bytes(self) -> int:
        """Of weights and cache."""
        return self.weight_bytes + int(self.cache.nbytes)

    def grow_to(self, length: int) -> None:
        """Appends what is missing, the last token by a step of the model.

        Raises what the lack of memory raises (`is_out_of_memory`); the cache is then as long as it was before.
        """
        before = self.length
        try:
            with progress_bar(length - before, "token") as advance:
                while (missing := length - 1 - self.length) > 0:
                    count = min(missing, self.options.chunk)
                    if self.options.fill == "prefill":
                        self._read(count)
                    else:
                        self._take_rows(count)
                    self.place.expect(self.used_bytes)
                    advance(count, None)
                self.decode(1)
                advance(1, None)
        except Exception:
            self._crop(before)
            raise

    def _crop(self, length: int) -> None:
        """Layers may differ in length where one of them had no memory."""
        for layer in self.cache.layers:
            if (extra := int(layer.get_seq_length()) - length) > 0:
                layer.crop(-extra)
        if self.place.gpu is not None:
            self.place.gpu.free_bytes()

    def _read(self, count: int) -> None:
        config = self.model.config.get_text_config(decoder=True)
        place = self.place.place
        self._run(torch.randint(config.vocab_size, (1, count), generator=self._generator, device=place))

    def _take_rows(self, count: int) -> None:
        for index in range(len(self.cache.layers)):
            keys, values = self._random_rows(index)
            self.cache.update(keys[:, :, :count], values[:, :, :count], index)
            self.cache.layers[index].settle()  # no attention will show queries

    def _random_rows(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a chunk, the same every time: what a row costs does not depend on what it holds."""
        from ..model_layers import head_dim_of, kv_heads

        heads, width = kv_heads(self.configs[index]), head_dim_of(self.configs[index])
        if heads is None or width is None:
            raise SkvqError(f"fill='rows': layer {index}: expected num_key_value_heads and head_dim in the config")
        if (heads, width) not in self._rows:
            size = (1, heads, self.options.chunk, width)
            options: dict[str, Any] = {"generator": self._generator, "device": self.place.place}
            keys, values = (torch.randn(size, **options).to(self.model.dtype) for _ in range(2))
            self._rows[heads, width] = keys, values
        return self._rows[heads, width]

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        from ..model_layers import cache_argument

        given = cache_argument(self.model, self.cache)
        found: torch.Tensor = self.model(tokens, **given, use_cache=True, logits_to_keep=1).logits
        return found

    def decode(self, steps: int) -> list[float]:
        """Seconds of so many greedy steps."""
        seconds = []
        token = torch.ones(1, 1, dtype=torch.long, device=self.place.place)
        for _ in range(steps):
            self.place.synchronize()
            start = time.perf_counter()
            token = self._run(token)[:, -1:].argmax(-1)
            self.place.synchronize()
            seconds.append(time.perf_counter() - start)
        self.place.expect(self.used_bytes)
        return seconds

    def bytes_per_token(self) -> float:
        """What a packed token takes in all layers: codes, scales, statistics of blocks."""
        return sum(_bytes_per_token(layer) for layer in self.cache.layers)


def _bytes_per_token(layer: Any) -> float:
    """Of one packed layer that has been filled."""
    total, native = 0.0, layer.native
    for name, stream, width in (
        ("keys", layer.plan.keys, layer.key_dim),
        ("values", layer.plan.values, layer.value_dim),
    ):
        codec = stream.codec(name, width)
        on_gpu = codec.block > 0 and isinstance(native, CudaLayer)
        # The codec counts statistics in fp16; a GPU has shift and scale in f32.
        total += codec.row_bytes + 8 * width / codec.block if on_gpu else width * codec.bits_per_element / 8
    return float(native.num_key_value_heads * total)


# ---- how far ---------------------------------------------------------------------------------------------------------


class Search:
    """Lengths that were tried, as rows of the report; `tried` is called after each."""

    def __init__(self, growing: Growing, tried: Callable[[Search], None]) -> None:
        self.growing, self.options, self.tried = growing, growing.options, tried
        self.rows: list[dict[str, Any]] = []
        self.start = time.perf_counter()
        self.stopped_by = "memory"

    @property
    def over(self) -> bool:
        """Whether the time for growing is spent."""
        spent = self.options.budget is not None and time.perf_counter() - self.start > self.options.budget
        if spent:
            self.stopped_by = "budget"
        return spent

    def fits(self, tokens: int) -> bool:
        """Grows to a length and decodes there; a row of the report either way."""
        growing = self.growing
        try:
            growing.grow_to(tokens)
            seconds = growing.decode(WARM_STEPS + self.options.steps)[WARM_STEPS:]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._add({"tokens": tokens, "fits": False, "reason": first_line(error)})
            return False
        self._add(
            {
                "tokens": tokens,
                "fits": True,
                "decode_tokens_per_second": 1.0 / statistics.median(seconds),
                "cache_bytes": int(growing.cache.nbytes),
                "bits_per_element": float(growing.cache.bits_per_element),
                "used_bytes": growing.used_bytes,
                "peak_bytes": growing.place.peak_bytes(),
            }
        )
        return True

    def _add(self, row: dict[str, Any]) -> None:
        self.rows.append(row | {"seconds": time.perf_counter() - self.start})
        if row["fits"]:
            rate, size = row["decode_tokens_per_second"], row["cache_bytes"] / GIB
            print(f"{row['tokens']:>10} tokens{rate:>9.1f} tokens/s{size:>10.3f} GiB of cache", flush=True)
        else:
            print(f"{row['tokens']:>10} tokens do not fit: {row['reason']}", flush=True)
        self.tried(self)

    def reach(self, tokens: int) -> None:
        """One length, by doubling up to it."""
        length = 2 * self.options.chunk
        while length < tokens and not self.over:
            if not self.fits(length):
                return
            length *= 2
        if tokens <= self.growing.length or (not self.over and self.fits(tokens)):
            self.stopped_by = "tokens"

    def longest(self, step: int) -> None:
        """The longest length, by steps that are halved where one does not fit."""
        growing, ceiling = self.growing, None
        while not self.over:
            # A decode step grows the cache too, so the next length counts from what there is.
            length = growing.length
            if ceiling is not None:
                if (ceiling - length) * RESOLUTION <= length:
                    return
                step = max(1, min(step, (ceiling - length) // 2))
            if not self.fits(length + step):
                ceiling = length + step


def run_capacity(
    options: CapacityOptions, partial: Callable[[dict[str, Any]], None] = lambda _: None
) -> dict[str, Any]:
    """Builds the model, grows the cache as far as it goes, and prints the lengths on the way.

    `partial` gets the report so far after every length.
    """
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if options.fill not in FILLS:
        raise SkvqError(f"fill={options.fill!r}: expected one of {', '.join(map(repr, FILLS))}")
    if options.tokens is not None and options.tokens < 2:
        raise SkvqError(f"tokens={options.tokens}: expected at least 2")
    place = Place(options)
    with torch.inference_mode():
        config = model_config(options)
        model = random_model(config, options.dtype, place.place)
        growing = Growing(place, model, new_cache(options, model.config), options)
        print(
            f"{config.model_type}: {growing.weight_bytes / GIB:.2f} GiB of random {options.dtype} weights", flush=True
        )
        search = Search(growing, lambda search: partial(_report(search)))
        if not search.fits(min(options.chunk, options.tokens or options.chunk)):
            raise SkvqError(f"no room for {options.chunk} tokens beside the weights: {search.rows[-1]['reason']}")
        per_token = growing.bytes_per_token()
        free = place.free_bytes(growing.used_bytes)
        predicted = growing.length + int(free / per_token)
        print(f"{per_token:.0f} bytes a token, {free / GIB:.2f} GiB free: about {predicted} tokens", flush=True)
        if options.tokens is not None:
            search.reach(options.tokens)
        else:
            search.longest(max(1, int(predicted * FIRST_SHARE)))
    report = _report(search) | {"predicted_tokens": predicted, "bytes_per_token": per_token}
    longest, peak = report["longest"], report["peak_bytes"]
    print(
        f"longest: {longest['tokens']} tokens (filled by {options.fill}, stopped by {search.stopped_by}), "
        f"{longest['decode_tokens_per_second']:.1f} tokens/s; weights {growing.weight_bytes / GIB:.2f} GiB, "
        f"cache {longest['cache_bytes'] / GIB:.2f} GiB, peak {'unknown' if peak is None else f'{peak / GIB:.2f} GiB'}"
    )
    return report


def _report(search: Search) -> dict[str, Any]:
    options, growing, place = search.options, search.growing, search.growing.place
    fitting = [row for row in search.rows if row["fits"]]
    more: dict[str, Any] = {"longest": max(fitting, key=lambda row: int(row["tokens"]), default=None)}
    more |= {"stopped_by": search.stopped_by, "filled_by": options.fill, "weight_bytes": growing.weight_bytes}
    more |= {"limit_bytes": place.limit, "peak_bytes": place.peak_bytes(), "device": place.describe()}
    if options.tokens is not None:
        more["reached"] = search.stopped_by == "tokens"
    return make_report("capacity", asdict(options), search.rows, **more)
