"""Tiny models whose cache is in `CudaLayer`s, beside the store on the CPU.

Is: what test_cuda_generate.py runs in a process of its own under the emulated driver, whose tensors are the CPU's, and
gpu/check_generation.py on a GPU. Is not: collected by pytest.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

import tiny_models
from cuda_store_cases import STREAM, Memory, capture, refused
from skvq import QuantizedDynamicCache, SkvqConfig, cuda_store
from skvq._native import CudaLayer, Layer
from skvq.attention import register_attention
from skvq.bench import layers
from skvq.layer import PackedLayer
from skvq.packed import PackedStates, Snapshot

WINDOW, SINKS = 12, 3
RAW = SkvqConfig(key_bits=16, value_bits=16, window=WINDOW, sinks=SINKS)
# The default, but for blocks that short prompts fill.
LOW = SkvqConfig(keys={"block": 128}, values={"block": 128}, window=WINDOW, sinks=SINKS)
# The default with prompts that are long enough for a fit.
FITTED = SkvqConfig(window=WINDOW, sinks=SINKS, fit_tokens=160)
STATIC = SkvqConfig(keys={"block": 0}, values={"block": 0}, window=WINDOW, sinks=SINKS)
# Of the largest output of a call of attention, by two stores that hold the same: kernels work with f16 levels, queries
# and weights, and this is three steps of f16. In the emulator it is 6e-4, once 1e-3, and 5e-3 at least where the scale
# of scores is wrong by a hundredth.
ATTENTION_ERROR = 3e-3
# Of the largest logit, by two runs of a model whose rows are alike.
LOGIT_ERROR = 5e-3
# Of the largest element, for rows that are alike: those of two runs are 6e-4 apart at most, or 1e-2 and more where a
# code or a scale falls the other way.
ROW_ERROR = 2e-3
# Of the largest output of a call, where two stores were fitted apart: the matrices of a GPU's sums are not those of the
# CPU's to the last bit, and so some codes are others.
FITTED_ERROR = 5e-2
MEMORY = Memory()


CPU = torch.device("cpu")


@contextlib.contextmanager
def on_device(place: torch.device) -> Iterator[None]:
    """Caches of tensors there are in `CudaLayer`s meanwhile; those of the CPU by way of the emulated driver."""
    if place.type == "cpu":
        cuda_store.stand_in = cuda_store.DeviceAccess(0, MEMORY.allocate, lambda: STREAM, host_memory=True)
    try:
        yield
    finally:
        cuda_store.stand_in = None


def model_of(family: str, attention: str = "sdpa", **changes: Any) -> Any:
    if family == "llama":
        changes["num_hidden_layers"] = 2
    return tiny_models.build(family, attention, head_dim=64, **changes)


def both(run: Callable[[torch.device], Any], place: torch.device) -> tuple[Any, Any]:
    """What `run` gives on the CPU and on the device."""
    expected = run(CPU)
    with on_device(place):
        return expected, run(place)


def store_kinds(cache: QuantizedDynamicCache) -> set[type]:
    return {type(layer.native) for layer in cache._packed_layers()}


def generate(model: Any, config: SkvqConfig | None, prompt: torch.Tensor, mask: torch.Tensor, **options: Any) -> Any:
    """Tokens, and the cache if there is a configuration."""
    cache = None
    if config is not None:
        cache = QuantizedDynamicCache(model.config, config, attention_mask=mask)
        options["past_key_values"] = cache
    prompt, mask = (x.to(model.device) for x in (prompt, mask))
    tokens = model.generate(
        prompt, attention_mask=mask, max_new_tokens=10, do_sample=False, disable_compile=True, **options
    )
    return tokens.cpu(), cache


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "chunked": {"prefill_chunk_size": 17},
    "lookup": {"prompt_lookup_num_tokens": 4},
}


def padded_prompt(batch: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and mask, the first sequence with seven of padding where there are several."""
    prompt, mask = tiny_models.prompts(batch, length), torch.ones(batch, length, dtype=torch.long)
    if batch > 1:
        prompt[0, :7], mask[0, :7] = 0, 0
    return prompt, mask


def same_tokens(place: torch.device, family: str, attention: str, way: str) -> dict[str, Any]:
    """A lossless cache on the device gives the tokens of transformers' own, there and on the CPU."""
    model, options = model_of(family, attention), WAYS[way]
    prompt, mask = padded_prompt(1 if way == "lookup" else 2, 45)
    if way == "lookup":
        prompt[:, 20:40] = prompt[:, :20]
    expected, _ = generate(model, None, prompt, mask, **options)
    model.to(place)
    with on_device(place):
        found, cache = generate(model, RAW, prompt, mask, **options)
    assert torch.equal(expected, found), (expected, found)
    if place.type != "cpu":
        there, _ = generate(model, None, prompt, mask, **options)
        assert torch.equal(expected, there), (expected, there)
    assert store_kinds(cache) == {CudaLayer}
    stats = cache.stats()
    assert stats["packed"] > 0
    assert stats["decoded"] == {}, stats
    assert all(layer.figures().packed for layer in cache._packed_layers())
    return {"tokens": found.numel() - prompt.numel()}


@dataclass(frozen=True)
class Told:
    """A call of a layer's `update`, `take_queries` or `attend`, its arguments, what attention gave. Tensors are on the
    CPU.
    """

    layer: int
    method: str
    given: tuple[Any, ...]
    options: dict[str, Any]
    output: torch.Tensor | None = None


@contextlib.contextmanager
def recorded() -> Iterator[list[Told]]:
    """What packed layers are told and asked meanwhile, in order; a call within another one is part of it."""
    told: list[Told] = []

    def on_cpu(x: Any) -> Any:
        return x.detach().cpu().clone() if isinstance(x, torch.Tensor) else x

    def telling(owner: type, name: str, layer_of: Callable[[Any], int]) -> Any:
        method = getattr(owner, name)

        @functools.wraps(method)
        def tell(self: Any, *given: Any, **options: Any) -> Any:
            index, place = layer_of(self), len(told)
            copies, named = tuple(map(on_cpu, given)), {key: on_cpu(x) for key, x in options.items()}
            found = method(self, *given, **options)
            # Attention shows its queries to the layer, and will do so again.
            told[place:] = [Told(index, name, copies, named, on_cpu(found) if name == "attend" else None)]
            return found

        return mock.patch.object(owner, name, tell)

    with (
        telling(PackedLayer, "update", lambda layer: layer.index),
        telling(PackedLayer, "take_queries", lambda layer: layer.index),
        telling(Snapshot, "attend", lambda snapshot: snapshot.source.index),
    ):
        yield told


def told_again(
    told: list[Told], model: Any, mask: torch.Tensor, config: SkvqConfig = LOW
) -> tuple[QuantizedDynamicCache, list[float]]:
    """A cache on the CPU whose layers are told and asked the same, and how far the recorded outputs of each attention
    are from its own, of the largest one. It is fitted to the prompt if the configuration has `fit_tokens`.
    """
    source = model.config if config.fit_tokens is None else model.to(CPU)
    cache = QuantizedDynamicCache(source, config, attention_mask=mask)
    snapshots: dict[int, Snapshot] = {}
    errors = []
    with torch.inference_mode():
        for call in told:
            if call.method == "attend":
                expected = snapshots[call.layer].attend(*call.given, **call.options)
                errors.append(difference(expected, call.output))
                continue
            found = getattr(cache.layers[call.layer], call.method)(*call.given, **call.options)
            if call.method == "update" and type(found[0]) is PackedStates:
                snapshots[call.layer] = found[0]._snapshot
    return cache, errors


def difference(expected: torch.Tensor, found: torch.Tensor | None) -> float:
    """The largest one, of the largest value; infinity where a number is missing."""
    assert found is not None
    return float(((expected - found).abs().max() / expected.abs().max()).nan_to_num(float("inf")))


def rows_apart(expected: QuantizedDynamicCache, found: QuantizedDynamicCache) -> str:
    """Which rows of two caches are read differently, in words; "" if none are."""
    words = []
    for a, b in zip(expected._packed_layers(), found._packed_layers(), strict=True):
        for name, mine, theirs in (("keys", a.keys, b.keys), ("values", a.values, b.values)):
            apart = (mine - theirs.cpu()).abs().amax(-1) / mine.abs().max()
            if rows := int((~(apart <= ROW_ERROR)).sum()):
                words.append(f"layer {b.index}: {rows} rows of {name} differ, by {float(apart.max()):.2e}")
    return "; ".join(words)


def close_logits(place: torch.device, family: str, attention: str) -> dict[str, Any]:
    """At low bits a store on the device, which is asked for one token and for several, holds the rows and gives the
    attention of one on the CPU that is told the same keys, values and queries.

    The logits of two runs of a model are compared where their rows are alike, and otherwise reported: keys are not the
    same to the last bit on the CPU and on a device, a code or a scale between two values may fall either way, and the
    attention of these models looks right there (on the CPU alone, a change of all weights by 1e-6 moves a logit by a
    tenth of the largest).
    """
    model = model_of(family, attention)
    prompt, mask = padded_prompt(2, 170)
    more = tiny_models.prompts(2, 24, seed=1)

    def run(where: torch.device) -> tuple[list[torch.Tensor], QuantizedDynamicCache]:
        model.to(where)
        cache = QuantizedDynamicCache(model.config, LOW, attention_mask=mask)
        seen, logits, start = mask.to(where), [], 0
        with torch.inference_mode():
            model(prompt.to(where), attention_mask=seen, past_key_values=cache)
            for count in (1, 1, 9, 1, 3, 1):
                tokens = more[:, start : start + count].to(where)
                seen = torch.cat([seen, torch.ones_like(tokens)], 1)
                positions = (seen.cumsum(1) - 1)[:, -count:]
                found = model(tokens, attention_mask=seen, position_ids=positions, past_key_values=cache)
                logits.append(found.logits.cpu())
                start += count
        return logits, cache

    expected, cpu = run(CPU)
    with on_device(place), recorded() as told:
        found, device = run(place)
    twin, errors = told_again(told, model, mask)
    assert store_kinds(cpu) == store_kinds(twin) == {Layer}
    assert store_kinds(device) == {CudaLayer}
    for a, b in zip(twin._packed_layers(), device._packed_layers(), strict=True):
        assert (a.native.packed_tokens, a.wants_queries) == (b.native.packed_tokens, b.wants_queries)
        assert b.native.packed_tokens >= 128
        assert a.wants_queries is False
    apart = rows_apart(twin, device)
    assert not apart, apart
    ours, theirs, alone = (cache.stats() for cache in (device, twin, cpu))
    assert 0 < ours["packed"] == theirs["packed"] == alone["packed"] == len(errors), (ours, theirs, alone, len(errors))
    assert max(errors) <= ATTENTION_ERROR, f"attention differs by {max(errors):.2e} of the largest: {errors}"
    assert ours["score_noise"].keys() == theirs["score_noise"].keys()
    for index, noise in theirs["score_noise"].items():
        assert abs(ours["score_noise"][index] - noise) <= 0.01 * noise, (ours["score_noise"], theirs["score_noise"])

    alike = not rows_apart(cpu, device)
    moved = [difference(a, b) for a, b in zip(expected, found, strict=True)]
    assert not alike or max(moved) <= LOGIT_ERROR, f"all rows are alike, logits differ: {moved}"
    same = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(expected, found, strict=True))
    return {
        "error": max(errors),
        "limit": ATTENTION_ERROR,
        "rows_alike": alike,
        "logits": max(moved),
        "same_tokens": same / sum(x[..., 0].numel() for x in found),
    }


def wrong_scale(place: torch.device, family: str, attention: str) -> dict[str, Any]:
    """`close_logits` finds scores that are off by a hundredth on the device."""
    right = Snapshot.attend

    def attend(self: Snapshot, query: torch.Tensor, scale: float | None, *given: Any, **options: Any) -> torch.Tensor:
        if type(self.source.native) is CudaLayer:
            scale = 1.01 * (query.shape[3] ** -0.5 if scale is None else scale)
        return right(self, query, scale, *given, **options)

    found = ""
    with mock.patch.object(Snapshot, "attend", attend):
        try:
            close_logits(place, family, attention)
        except AssertionError as error:
            found = str(error)
    assert found.startswith("attention differs by"), found or "a wrong scale was not found"
    return {"reason": found}


def fitted_prompt(place: torch.device, family: str, attention: str) -> dict[str, Any]:
    """A cache that is fitted to its prompt on the device gives the attention of one on the CPU, told the same."""
    model = model_of(family, attention)
    prompt, mask = padded_prompt(2, 190)
    more = tiny_models.prompts(2, 24, seed=1)
    seen, start = mask.to(place), 0
    model.to(place)
    with on_device(place), recorded() as told, torch.inference_mode():
        cache = QuantizedDynamicCache(model, FITTED, attention_mask=mask)
        model(prompt.to(place), attention_mask=seen, past_key_values=cache)
        for count in (1, 1, 9, 1, 3, 1):
            tokens = more[:, start : start + count].to(place)
            seen = torch.cat([seen, torch.ones_like(tokens)], 1)
            positions = (seen.cumsum(1) - 1)[:, -count:]
            model(tokens, attention_mask=seen, position_ids=positions, past_key_values=cache)
            start += count
    twin, errors = told_again(told, model, mask, FITTED)
    assert store_kinds(cache) == {CudaLayer}
    for mine, theirs in zip(cache._packed_layers(), twin._packed_layers(), strict=True):
        assert mine.kind == theirs.kind == "K2 V1.6 fitted"
        assert mine.nbytes > mine.native.nbytes
        assert mine.native.packed_tokens == theirs.native.packed_tokens == 190 + 16 - WINDOW - SINKS
    ours, theirs = cache.stats(), twin.stats()
    assert ours["fitted"] == theirs["fitted"]
    assert ours["decoded"] == {}
    assert 0 < ours["packed"] == len(errors)
    limit = ATTENTION_ERROR if place.type == "cpu" else FITTED_ERROR
    assert max(errors) <= limit, errors
    return {"error": max(errors), "limit": limit}


# Of the largest number of an output.
STEP_ERROR = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}


def steps_of_one_launch(
    place: torch.device, form: str, shape: layers.Shape, dtype: str, steps: int = 300
) -> dict[str, Any]:
    """Steps whose token enters with its attention leave the rows of steps by launches apart, to the last bit, and give
    the same attention, over ends of pages and of the ring; some tokens have two readers, some none.
    """
    plan = layers.layer_plan(shape, form, static=True)
    with on_device(place):
        one, apart = (layers.cuda_layer(shape, plan, dtype=dtype, device=place) for _ in range(2))
    apart.one_launch = False
    kind, generator = getattr(torch, dtype), torch.Generator(place).manual_seed(0)
    for rows in layers.random_rows(shape, kind, device=place):
        one.append(*rows)
        apart.append(*rows)
    worst = 0.0
    for step in range(steps):
        size = (shape.batch, shape.num_key_value_heads, 1, shape.head_dim)
        rows = tuple(torch.randn(size, generator=generator, device=place).to(kind) for _ in range(2))
        one.append(*rows)
        apart.append(*rows)
        for _ in range((1, 1, 2, 1, 0)[step % 5]):
            size = (shape.batch, shape.num_attention_heads, 1, shape.head_dim)
            query = torch.randn(size, generator=generator, device=place).to(kind)
            outputs = [torch.full_like(query, float("nan")) for _ in range(2)]
            for layer, output in zip((one, apart), outputs, strict=True):
                layer.attend(query, output, scale=shape.head_dim**-0.5)
            worst = max(worst, difference(*(output.float() for output in outputs)))
    for name in ("decode_keys", "decode_values"):
        whole = (shape.batch, shape.num_key_value_heads, one.length, shape.head_dim)
        found = [torch.empty(whole, dtype=kind, device=place) for _ in range(2)]
        for layer, output in zip((one, apart), found, strict=True):
            getattr(layer, name)(output)
        assert torch.equal(*found), f"{name}: {int((found[0] != found[1]).any(-1).sum())} rows differ"
    limit = STEP_ERROR[dtype]
    assert worst <= limit, f"attention differs by {worst:.2e} of the largest, limit {limit:g}"
    return {"error": worst, "limit": limit, "tokens": one.length}


def small_steps(place: torch.device) -> dict[str, Any]:
    """`steps_of_one_launch` of a small layer."""
    return steps_of_one_launch(place, "K2V1.6", layers.Shape(2, 4, 2, 250, head_dim=64), "float32", steps=25)


def changes_of_a_cache(place: torch.device) -> dict[str, Any]:
    """Copies, crops, selections and resets, and what is refused."""
    model = model_of("llama")
    prompt = tiny_models.prompts(2, 40)

    def logits_of(cache: QuantizedDynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return model(tokens.to(model.device), past_key_values=cache).logits.cpu()

    def run(where: torch.device) -> list[torch.Tensor]:
        model.to(where)
        cache = QuantizedDynamicCache(model.config, RAW)
        found = [logits_of(cache, prompt), logits_of(cache, prompt[:, :1])]
        twin = copy.deepcopy(cache)
        cache.crop(-5)
        cache.batch_select_indices(torch.tensor([1]))
        found.append(logits_of(cache, prompt[:1, 3:5]))
        cache.batch_repeat_interleave(3)
        found.append(logits_of(cache, prompt[:1, 5:6].expand(3, 1)))
        found.append(logits_of(twin, prompt[:, 7:8]))
        twin.reset()
        found.append(logits_of(twin, prompt[:1, :9]))
        # tokens wait for those among which sinks are chosen, are stored, and wait again
        twin.batch_repeat_interleave(2)
        twin = copy.deepcopy(twin)
        found += [logits_of(twin, prompt[:, start : start + count]) for start, count in ((9, 1), (10, 3), (13, 20))]
        twin.crop(-19)
        found += [logits_of(twin, prompt[:, start : start + count]) for start, count in ((14, 1), (15, 9), (24, 1))]
        held = [x.cpu() for one in (cache, twin) for x in (one.layers[1].keys, one.layers[1].values)]
        return [*found, *held]

    largest = 0.0
    for expected, found in zip(*both(run, place), strict=True):
        largest = max(largest, float((expected - found).abs().max()) / float(expected.abs().max()))
    assert largest <= 1e-4, largest

    with on_device(place):
        cache = QuantizedDynamicCache(model.config, LOW)
        keys, values = torch.randn(2, 1, 2, 200, 64, device=place)
        keys[0, 1, 70, 5] = torch.nan
        cache.update(keys, values, 0)
        cache.layers[0].settle()
        assert cache.stats()["nonfinite_rows"] == {0: 1}
        before = cache.layers[0].get_seq_length()
        wrong: list[tuple[Any, str]] = [
            ((keys.to("meta"), values.to("meta")), "key_states: on device meta, expected cpu or cuda"),
            ((keys[:, :1], values[:, :1]), "expected torch.float32 with batch 1, 2 heads and head_dim 64"),
            ((keys, values.half()), "value_states: torch.float16"),
        ]
        for tensors, message in wrong:
            refused(functools.partial(cache.update, *tensors, 0), message)
        assert cache.layers[0].get_seq_length() == before
        handle, _ = cache.update(keys[:, :, :1], values[:, :, :1], 0)
        assert handle.shape == (1, 2, 201, 64)
        assert (handle + 0.0).isnan().any()
        assert cache.nbytes > 0
    return {"error": largest, "limit": 1e-4}


# Of a captured step: tokens of the prompt, the configuration, replays. With blocks of 128 the first or the second block
# is complete among these, and the queries of the prompt alone, or of captured steps too, have their say in it.
CAPTURED = {
    "static": (60, STATIC, 40),
    "fitted": (170, FITTED, 40),
    "blocks": (110, LOW, 160),
    "blocks, a long prompt": (200, LOW, 80),
    "blocks, a short prompt": (20, LOW, 130),
}


def replayed_steps(place: torch.device, way: str = "static") -> dict[str, Any]:
    """A captured step of a cache, replayed, against the same tokens on the CPU; of one of `CAPTURED`.

    On the emulated driver only: on a GPU the graph is torch's (gpu/check_generation.py).
    """
    length, config, replays = CAPTURED[way]
    model, generator = model_of("llama"), torch.Generator().manual_seed(0)
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def rows(count: int, heads: int = 2) -> torch.Tensor:
        return torch.randn(1, heads, count, 64, generator=generator)

    prompt = [(rows(length), rows(length), rows(length, 4)) for _ in range(2)]
    token = [(rows(1), rows(1), rows(1, 4)) for _ in range(2)]

    def step(cache: QuantizedDynamicCache) -> list[torch.Tensor]:
        return [sdpa(q, *cache.update(k, v, index), enable_gqa=True) for index, (k, v, q) in enumerate(token)]

    def filled(cache: QuantizedDynamicCache) -> QuantizedDynamicCache:
        for index, (keys, values, query) in enumerate(prompt):
            sdpa(query, *cache.update(keys, values, index), is_causal=True, enable_gqa=True)
        return cache

    expected_cache = filled(QuantizedDynamicCache(model, config))
    with on_device(place), torch.no_grad():
        cache = QuantizedDynamicCache(model, config)
        refused(
            lambda: cache.reserve(length + 40),
            "reserve: layer 0: PackedLayer, expected a packed layer with tokens on a GPU",
        )
        filled(cache)
        assert set(cache.stats()["fitted"]) == ({0, 1} if way == "fitted" else set())
        cache.reserve(length + replays + 20)
        step(cache)
        step(expected_cache)
        found: list[torch.Tensor] = []
        with cache.capturing():
            replay = capture(lambda: found.extend(step(cache)), MEMORY)
        assert cache.get_seq_length() == length + 1
        largest = 0.0
        for _ in range(replays):
            for group in token:
                for tensor in group:
                    tensor.copy_(torch.randn(tensor.shape, generator=generator))
            replay()
            for mine, theirs in zip(found, step(expected_cache), strict=True):
                largest = max(largest, float((mine - theirs).abs().max() / theirs.abs().max()))
        cache.replayed(replays)
        assert cache.get_seq_length() == expected_cache.get_seq_length() == length + replays + 1
        assert cache.stats()["nonfinite_rows"] == {}
        refused(lambda: cache.crop(-1), "release_capture")
        refused(lambda: cache.crop(-cache.get_seq_length()), "release_capture")
        refused(lambda: copy.deepcopy(cache), "release_capture")
        cache.release_capture()
        cache.crop(-1)
        expected_cache.crop(-1)
        assert cache.get_seq_length() == length + replays
        for mine, theirs in zip(step(cache), step(expected_cache), strict=True):
            largest = max(largest, float((mine - theirs).abs().max() / theirs.abs().max()))
        figures, expected = ([layer.figures() for layer in one._packed_layers()] for one in (cache, expected_cache))
        for mine, theirs in zip(figures, expected, strict=True):
            assert mine.packed == theirs.packed > 0
    refused(lambda: expected_cache.reserve(300), "reserve: layer 0: a store on the CPU, expected a packed layer")
    assert largest <= LOGIT_ERROR, largest
    return {"error": largest, "limit": LOGIT_ERROR}


CASES: dict[str, Callable[..., dict[str, Any]]] = {
    "same": same_tokens,
    "close": close_logits,
    "wrong": wrong_scale,
    "fitted": fitted_prompt,
    "changes": changes_of_a_cache,
    "replayed": replayed_steps,
    "steps": small_steps,
}


def stay_on_the_cpu() -> None:
    """torch's own CUDA must not meet the stand-in for the driver."""
    torch.set_num_threads(1)
    torch.cuda.is_available = torch.cuda.is_current_stream_capturing = lambda: False


def main(what: str, *arguments: str) -> None:
    stay_on_the_cpu()
    register_attention()
    found = CASES[what](CPU, *arguments)
    print(found, file=sys.stderr)
    print("equal")
