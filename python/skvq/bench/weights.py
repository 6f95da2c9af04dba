"""`skvq bench weights`: linear layers of a quantized checkpoint on every backend, and decoding with weights and cache
of every kind.

Products: the distinct shapes of one decoder layer, 1 row (decoding) and a prompt's many; without a checkpoint, random
weights of `shapes`, and nothing else. On a GPU the contestants are torch's products in bfloat16 and of 4 bits.
Decoding: greedy steps over a cache that is filled without a prompt pass: keys and values of `real_tokens` tokens,
repeated up to the wanted length, which costs what as many different ones would. Bytes of weights are those that the
model holds, shared ones once.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .device import Place
from .machine import make_report

LAYER = "layers.1."  # whose products are timed; the first one may differ
GROUP = 128  # inputs that share a scale in random weights


@dataclass(frozen=True)
class WeightsOptions:
    """What `skvq bench weights` runs.

    Attributes:
        model: of full precision, a directory or hub id.
        checkpoint: of the same model, from `skvq quantize`.
        plan: of the packed cache; None: the default format.
        rows: of a product.
        tokens: in the cache while decoding.
        new_tokens: timed steps.
        real_tokens: of a text that fill the cache.
        dtypes: of activations, and of the full-precision weights; the first is what ratios are to.
        shapes: outputs and inputs of products where there is no checkpoint.
        device: "cpu" or a GPU.
    """

    model: str = ""
    checkpoint: str = ""
    plan: str | None = None
    rows: tuple[int, ...] = (1, 256)
    tokens: int = 8192
    new_tokens: int = 8
    real_tokens: int = 512
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    shapes: tuple[str, ...] = ("4096x4096", "11008x4096", "4096x11008")  # those of Llama 2 7B
    device: str = "cpu"


def held_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, shared memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


# ---- products --------------------------------------------------------------------------------------------------------


def _random_linears(shapes: Sequence[str]) -> dict[str, Any]:
    """Weights of 4 bits in groups of 128. Raises ValueError if a shape is not like "4096x4096"."""
    from ..weights.grid import WeightOptions, encode

    found = {}
    for shape in shapes:
        sizes = [int(x) for x in shape.split("x") if x.isdecimal()]
        if len(sizes) != 2 or 0 in sizes or sizes[1] % GROUP:
            raise ValueError(
                f"shapes={shape!r}: expected OUTPUTSxINPUTS, such as 4096x4096, inputs a multiple of {GROUP}"
            )
        weight = torch.randn(sizes[0], sizes[1], generator=torch.Generator().manual_seed(0))
        found[shape] = encode(weight, WeightOptions(4, GROUP))
    return found


def _products(place: Place, options: WeightsOptions, linears: dict[str, Any], bits: int) -> list[dict[str, Any]]:
    from ..weights.product import PackedLinear, PackedWeight
    from ..weights.running import Int4Linear

    found: dict[tuple[int, int], Any] = {}
    for name, weight in linears.items():
        found.setdefault((weight.codes.shape[0], weight.codes.shape[1]), (name, weight))
    rows = []
    for (outputs, inputs), (name, weight) in found.items():
        dense = weight.dequantize().to(place.device)
        half = dense.bfloat16()
        ours = PackedLinear(PackedWeight(weight, bits), None) if place.is_cpu else None
        torchs = Int4Linear(weight, None, place.device) if bits == 4 else None
        for count in options.rows:
            x = torch.randn(count, inputs, generator=torch.Generator().manual_seed(0)).to(place.device)
            times = place.compare(_contestants(x, dense, half, ours, torchs), cold=count == 1)
            row = {"layer": name, "outputs": outputs, "inputs": inputs, "rows": count}
            rows.append(row | {f"{key}_ms": 1e3 * value.median for key, value in times.items()})
            print(_product_line(rows[-1]), flush=True)
    return rows


def _contestants(x: Tensor, dense: Tensor, half: Tensor, ours: Any, torchs: Any) -> dict[str, Callable[[], object]]:
    y = x.bfloat16()
    found: dict[str, Callable[[], object]] = {"float32": lambda: x @ dense.T, "bfloat16": lambda: y @ half.T}
    if ours is not None:
        found |= {"packed_float32": lambda: ours(x), "packed_bfloat16": lambda: ours(y)}
    if torchs is not None:
        found |= {"int4pack_float32": lambda: torchs(x), "int4pack_bfloat16": lambda: torchs(y)}
    return found


def _product_line(row: dict[str, Any]) -> str:
    times = "  ".join(f"{name.removesuffix('_ms')} {value:.3g} ms" for name, value in row.items() if "_ms" in name)
    return f"{row['outputs']} x {row['inputs']}, {row['rows']} rows: {times}"


# ---- decoding --------------------------------------------------------------------------------------------------------


def _rows_of_text(options: WeightsOptions) -> tuple[list[tuple[Any, Any]], Any, Any]:
    """Keys and values of every layer for a text [1, H, real_tokens, D], its last token, the configuration."""
    from transformers import DynamicCache

    from ..model_layers import cache_argument
    from ..models import load, packaged_tokens

    loaded = load(options.model, dtype="float32")
    ids = packaged_tokens(loaded.tokenizer, "northanger_abbey", options.real_tokens)
    cache = DynamicCache(config=loaded.model.config)
    with torch.inference_mode():
        loaded.model.base_model(ids, **cache_argument(loaded.model.base_model, cache))
    layers: list[Any] = list(cache.layers)
    return [(layer.keys, layer.values) for layer in layers], ids[:, -1:], loaded.model.config


def _filled(make: Callable[[], Any], rows: list[tuple[Any, Any]], tokens: int, model: Any) -> Any:
    cache, device, dtype = make(), model.device, model.dtype
    for index, pair in enumerate(rows):
        length = pair[0].shape[2]
        for start in range(0, tokens, length):
            keys, values = (x[:, :, : tokens - start].to(device, dtype) for x in pair)
            cache.update(keys, values, index)
    return cache


def _decode(place: Place, model: Any, cache: Any, token: Any, steps: int) -> list[float]:
    """Seconds of each step; the first, which warms up, is left out."""
    from ..model_layers import cache_argument

    given, token = cache_argument(model, cache), token.to(place.device)

    def step() -> None:
        nonlocal token
        token = model(token, **given, use_cache=True).logits[:, -1:].argmax(-1)

    with torch.inference_mode():
        return [place.seconds(step) for _ in range(steps + 1)][1:]


def _models(place: Place, options: WeightsOptions, bits: int) -> dict[str, Callable[[], Any]]:
    from ..models import load
    from ..weights import load as load_packed

    def plain(dtype: str) -> Callable[[], Any]:
        return lambda: load(options.model, dtype=dtype).model.to(place.device)

    def quantized(dtype: str, backend: str, head_bits: int) -> Callable[[], Any]:
        return lambda: load_packed(
            options.checkpoint,
            dtype=getattr(torch, dtype),
            backend=backend,
            head_bits=head_bits,
            device=place.device,
        )

    found = {f"{dtype} weights": plain(dtype) for dtype in options.dtypes}
    for dtype in options.dtypes:
        if bits == 4:
            found[f"low-bit, {dtype}, torch's int4 product"] = quantized(dtype, "int4pack", 16)
        if not place.is_cpu:
            continue
        found[f"low-bit, {dtype}"] = quantized(dtype, "auto", 16)
        for head_bits in (8, 6, 4):
            found[f"low-bit, {dtype}, {head_bits}-bit output layer"] = quantized(dtype, "auto", head_bits)
    return found


def _decoding(place: Place, options: WeightsOptions, bits: int) -> list[dict[str, Any]]:
    from transformers import DynamicCache

    from ..cache import QuantizedDynamicCache
    from ..evaluate import bytes_of_cache

    text_rows, token, config = _rows_of_text(options)
    gc.collect()
    rows: list[dict[str, Any]] = []
    for label, make_model in _models(place, options, bits).items():
        model = make_model()

        def packed(model: Any = model) -> Any:
            if options.plan is not None:
                return QuantizedDynamicCache.from_plan(model, options.plan)
            return QuantizedDynamicCache(model.config)

        for name, make in {"DynamicCache": lambda: DynamicCache(config=config), "packed": packed}.items():
            print(f"{label} | {name}", file=sys.stderr, flush=True)
            cache = _filled(make, text_rows, options.tokens, model)
            steps = _decode(place, model, cache, token, options.new_tokens)
            rows.append(
                {
                    "weights": label,
                    "cache": name,
                    "tokens": options.tokens,
                    "tokens_per_second": 1.0 / statistics.median(steps),
                    "weight_bytes": held_bytes(model),
                    "cache_bytes": bytes_of_cache(cache, config).total,
                }
            )
            del cache
        del model
        gc.collect()
    base = rows[0]
    for row in rows:
        row["speed_ratio"] = row["tokens_per_second"] / base["tokens_per_second"]
        held = row["weight_bytes"] + row["cache_bytes"]
        row["memory_ratio"] = held / (base["weight_bytes"] + base["cache_bytes"])
    return rows


def _print_decoding(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<58}{'tokens/s':>10}{'ratio':>8}{'weights MiB':>13}{'cache MiB':>11}{'memory':>9}")
    for row in rows:
        print(
            f"{row['weights'] + ' | ' + row['cache']:<58}{row['tokens_per_second']:>10.2f}{row['speed_ratio']:>8.2f}"
            f"{row['weight_bytes'] / 2**20:>13.1f}{row['cache_bytes'] / 2**20:>11.1f}{100 * row['memory_ratio']:>8.1f}%"
        )


def run_weights(options: WeightsOptions) -> dict[str, Any]:
    """Times products and decoding, and prints both tables behind the device. Ratios are to the first dtype with
    DynamicCache. The report's "device" is None on the CPU, which is in "machine" in any case.
    """
    from transformers.utils import logging as transformers_logging

    from ..weights.running import read_linears

    transformers_logging.set_verbosity_error()
    given = {name: getattr(options, name) for name in ("model", "checkpoint")}
    for name, other in (("model", "checkpoint"), ("checkpoint", "model")):
        if given[other] and not given[name]:
            raise ValueError(f"{name}={given[name]!r}: expected a model directory beside {other}={given[other]!r}")
    place = Place(options.device)
    print(place.title(), flush=True)
    if not options.checkpoint:
        products = _products(place, options, _random_linears(options.shapes), 4)
        return make_report("weights", asdict(options), [], device=place.describe(), products=products)
    linears, bits = read_linears(Path(options.checkpoint), LAYER)
    products = _products(place, options, linears, bits)
    del linears
    rows = _decoding(place, options, bits)
    _print_decoding(rows)
    more = {"model": Path(options.model).name, "device": place.describe(), "products": products}
    return make_report("weights", asdict(options), rows, **more)
