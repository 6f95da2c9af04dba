"""Layers that are fitted to their first prompt (skvq/calibrate/prompt.py, skvq/layer.py)."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import DynamicCache

import tiny_models
from demo_model import skip_without_the_demo_model
from skvq import QuantizedDynamicCache, SkvqConfig, SkvqError, models
from skvq.attention import register_attention
from skvq.calibrate import prompt as prompt_module
from skvq.calibrate import turning as turning_module
from skvq.calibrate.moments import AttentionMoments
from skvq.calibrate.prompt import PromptFit
from skvq.layer import CHUNK_TOKENS, PackedLayer
from skvq.model_layers import cache_argument
from skvq.plan import LayerPlan
from skvq.waiting import SeenQueries, WaitingRows

DIM, HEADS, GROUP = 64, 2, 2
FIT, WINDOW, SINKS = 256, 24, 3
REGIONS: dict[str, Any] = {"window": WINDOW, "sinks": SINKS, "sink_search": 16}
QUERY_SCALE = 0.01
OPTIONS: dict[str, Any] = REGIONS | {"fit_tokens": FIT}


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_models.build("llama", head_dim=DIM)


def rows_of(model: Any, tokens: int, batch: int = 1, seed: int = 0, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys with a large mean before the model's rotation and channels that hang together, values, and queries.

    Scores have a standard deviation of about two.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(7)) * torch.logspace(0.5, -1.5, DIM)
    mean = 6.0 * torch.randn(HEADS, 1, DIM, generator=torch.Generator().manual_seed(8))
    keys, values = (torch.randn(batch, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    query = torch.randn(batch, GROUP * HEADS, tokens, DIM, generator=generator)
    rope = prompt_module.Rotary(model, torch.float32)(0)
    keys = rope.forward(keys @ mixing + mean, start)
    return keys, values + 1.0, rope.forward(QUERY_SCALE * query @ mixing.mT, start)


def layer_of(model: Any, padding: tuple[int, ...] = (), **changes: Any) -> PackedLayer:
    layer = QuantizedDynamicCache(model, **(OPTIONS | changes)).layers[0]
    assert isinstance(layer, PackedLayer)
    layer.padding = padding
    return layer


Rows = tuple[Tensor, Tensor, Tensor]


def give(to: PackedLayer, given: Rows, begin: int, end: int) -> Tensor:
    """One call, and causal attention to it."""
    keys, values, query = (x[:, :, begin:end] for x in given)
    handles = to.update(keys, values)
    mask = torch.ones(end - begin, to.get_seq_length(), dtype=torch.bool).tril(to.get_seq_length() - (end - begin))
    return sdpa(query, *handles, attn_mask=mask, enable_gqa=True)


def assert_alike(one: PackedLayer, other: PackedLayer) -> None:
    for name in ("length", "sink_tokens", "packed_tokens", "window_tokens", "nbytes", "wants_queries"):
        assert getattr(one.settle(), name) == getattr(other.settle(), name), name
    assert (one.kind, one.nbytes) == (other.kind, other.nbytes)
    for mine, theirs in ((one.keys, other.keys), (one.values, other.values)):
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]


# ---- what the fit is worth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1.5, 2, 3, 4])
def test_attention_is_nearer_than_with_blocks(llama: Any, bits: float) -> None:
    options = {"key_bits": bits, "value_bits": 16}
    tokens = 512 + WINDOW + SINKS  # two blocks
    given = rows_of(llama, tokens)
    keys, values, query = given
    exact = sdpa(query[:, :, -60:], keys, values, enable_gqa=True)
    errors = {}
    for name, fit_tokens in (("fitted", FIT), ("blocks", 0)):
        layer = layer_of(llama, fit_tokens=fit_tokens, **options)
        give(layer, given, 0, tokens)
        assert layer.kind == f"K{bits:g} V16" + (" fitted" if fit_tokens else "")
        handles = layer.update(keys[:, :, :0], values[:, :, :0])
        errors[name] = float((sdpa(query[:, :, -60:], *handles, enable_gqa=True) - exact).square().mean())
        assert layer.native.packed_tokens == 512
    assert errors["fitted"] < 0.75 * errors["blocks"], errors


def test_the_store_is_that_of_the_fitted_plan(llama: Any) -> None:
    given = rows_of(llama, 400)
    layer = layer_of(llama)
    give(layer, given, 0, 400)
    base = LayerPlan.from_config(SkvqConfig(**REGIONS))
    plan = PromptFit(llama).fitted(base, 0, WaitingRows(*given[:2]), SeenQueries(given[2], 400))
    assert isinstance(plan, LayerPlan)
    assert plan.keys.shift_sine is not None, "the mean turns"
    assert plan.keys.noise is not None
    assert plan.values.options.block == 0
    assert sum(width for _, width in plan.keys.options.parts or ()) == DIM
    same = PackedLayer(plan, 0, layer.counts)
    give(same, given, 0, 400)
    for mine, theirs in ((layer.keys, same.keys), (layer.values, same.values)):
        assert torch.equal(mine, theirs)  # type: ignore[arg-type]
    assert layer.nbytes == same.nbytes + plan.nbytes
    assert plan.nbytes == 4 * (HEADS * (2 * DIM * DIM + 3 * DIM) + 2 * DIM)
    assert layer.plan.nbytes == 0, "the matrices are in the store alone"


def test_the_mean_before_the_rotation_is_found(llama: Any) -> None:
    """The turning mean at a far position is the mean of keys there."""
    keys, values, query = rows_of(llama, 600)
    base = LayerPlan.from_config(SkvqConfig(**REGIONS))
    plan = PromptFit(llama).fitted(base, 0, WaitingRows(keys, values), SeenQueries(query, 600))
    assert isinstance(plan, LayerPlan)
    assert plan.keys.shift is not None
    assert plan.keys.shift_sine is not None
    assert plan.keys.frequencies is not None
    far, _, _ = rows_of(llama, 400, start=5000, seed=3)
    angles = plan.keys.frequencies.double() * 5200
    mean = plan.keys.shift * angles.cos() + plan.keys.shift_sine * angles.sin()
    # over some positions around the middle of 5000..5400 slow channels have hardly turned
    slow = plan.keys.frequencies < 3e-4
    assert bool(slow.any())
    error = (far[0].mean(1) - mean)[:, slow].abs().max()
    assert error < 0.25 * far[0].mean(1)[:, slow].abs().max()


def test_queries_say_which_errors_count(llama: Any) -> None:
    """Channels that no query looks at get fewer bits."""
    keys, values, query = rows_of(llama, 500)
    query = query * torch.cat([torch.ones(DIM // 2), torch.full((DIM // 2,), 0.01)]).roll(DIM // 4)
    base = LayerPlan.from_config(SkvqConfig(**REGIONS))
    rows = WaitingRows(keys, values)
    plan = PromptFit(llama).fitted(base, 0, rows, SeenQueries(query, 500))
    other = PromptFit(llama).fitted(base, 0, rows, SeenQueries(query.roll(DIM // 2, 3), 500))
    assert isinstance(plan, LayerPlan)
    assert isinstance(other, LayerPlan)
    error = {}
    for name, one in (("own", plan), ("other", other)):
        layer = PackedLayer(one, 0, QuantizedDynamicCache(llama)._counts)
        give(layer, (keys, values, query), 0, 500)
        read = layer.keys
        assert read is not None
        apart = (read - keys).repeat_interleave(GROUP, 1)
        error[name] = float((query @ apart.mT).square().mean())
    assert error["own"] < 0.5 * error["other"], error


# ---- when it happens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(400,), (100, 400), (64, 128, 192, 400), (10, 100, 300, 400), (250, 400)])
def test_calls_of_a_prompt_do_not_matter(llama: Any, cuts: tuple[int, ...]) -> None:
    """A fit needs `FIT` tokens, in however many calls of `CHUNK_TOKENS` and more they come."""
    given = rows_of(llama, 460)
    stepped = layer_of(llama)
    for begin, end in pairwise((0, *cuts)):
        give(stepped, given, begin, end)
        assert (stepped.waiting is None) == (end >= FIT)
    fitted_to = next(end for end in cuts if end >= FIT)
    whole = layer_of(llama)
    for begin, end in pairwise((0, fitted_to, *(x for x in cuts if x > fitted_to))):
        give(whole, given, begin, end)
    for layer in (whole, stepped):
        give(layer, given, 400, 401)
        give(layer, given, 401, 460)
        assert layer.counts.fitted == {0: fitted_to}
    assert_alike(whole, stepped)


def test_attention_of_chunks_that_wait_is_exact(llama: Any) -> None:
    given = rows_of(llama, 240)
    layer = layer_of(llama)
    for begin, end in ((0, 80), (80, 160), (160, 240)):
        found = give(layer, given, begin, end)
        mask = torch.ones(end - begin, end, dtype=torch.bool).tril(begin)
        exact = sdpa(given[2][:, :, begin:end], *(x[:, :, :end] for x in given[:2]), attn_mask=mask, enable_gqa=True)
        assert torch.equal(found, exact)
    assert layer.waiting is not None


def test_a_call_of_few_tokens_ends_the_wait(llama: Any) -> None:
    """Then it is as if nothing could have been fitted."""
    given = rows_of(llama, 400)
    layer, plain = layer_of(llama), layer_of(llama, fit_tokens=0)
    assert plain.fit is None
    for begin, end in ((0, 150), (150, 150 + CHUNK_TOKENS - 1), (213, 400)):
        for one in (layer, plain):
            give(one, given, begin, end)
    assert layer.waiting is None
    assert layer.counts.fitted == {}
    assert layer.kind == "K2 V1.6"
    assert_alike(layer, plain)


def test_a_prompt_that_is_too_short_is_packed_as_without(llama: Any) -> None:
    given = rows_of(llama, 300)
    layer, plain = layer_of(llama), layer_of(llama, fit_tokens=0)
    for one in (layer, plain):
        give(one, given, 0, FIT - 1)
        for token in range(FIT - 1, 290):
            give(one, given, token, token + 1)
    assert layer.counts.fitted == {}
    assert_alike(layer, plain)


def test_without_queries_there_is_no_fit(llama: Any) -> None:
    keys, values, _ = rows_of(llama, 400)
    layer, plain = layer_of(llama), layer_of(llama, fit_tokens=0)
    for one in (layer, plain):
        one.update(keys[:, :, :300], values[:, :, :300])
        one.update(keys[:, :, 300:], values[:, :, 300:])
    assert layer.counts.fitted == {}
    assert_alike(layer, plain)


def test_an_empty_layer_is_fitted_anew(llama: Any) -> None:
    first, second = rows_of(llama, 300), rows_of(llama, 330, seed=1)

    def by_crop(layer: PackedLayer) -> None:
        layer.crop(-layer.get_seq_length())

    forget: tuple[Callable[[PackedLayer], None], ...] = (PackedLayer.reset, by_crop)
    for empty in forget:
        for length in (330, 100):
            layer, fresh = layer_of(llama), layer_of(llama)
            give(layer, first, 0, 300)
            assert layer.kind.endswith("fitted")
            empty(layer)
            assert layer.kind == "K2 V1.6"
            assert layer.nbytes == 0
            for one in (layer, fresh):
                give(one, second, 0, length)
                one.settle()
            assert_alike(layer, fresh)


def test_changes_of_a_fitted_layer(llama: Any) -> None:
    """A crop that leaves less than what is searched for sinks, copies and selections keep the fit."""
    given = rows_of(llama, 400, batch=2)
    layer = layer_of(llama)
    give(layer, given, 0, 300)
    twin = copy.deepcopy(layer)
    assert twin.fit is layer.fit
    layer.gather([1, 0, 1])
    three = tuple(x[[1, 0, 1]] for x in given)
    found = give(layer, three, 300, 310)  # type: ignore[arg-type]
    expected = give(twin, given, 300, 310)
    assert torch.allclose(found, expected[[1, 0, 1]], atol=1e-5)
    for one in (twin, layer):
        one.crop(-(one.get_seq_length() - 8))
        assert one.waiting is not None
        assert one.kind.endswith("fitted")
    give(twin, given, 8, 200)
    twin.settle()
    assert twin.native.packed_tokens == 200 - WINDOW - SINKS
    assert twin.nbytes > twin.native.nbytes


def test_padding_has_no_part_in_it(llama: Any) -> None:
    """A padded sequence is packed as it would be without the padding."""
    given = rows_of(llama, 340)
    pad = 37
    padded: Any = tuple(torch.cat([50.0 * torch.ones_like(x[:, :, :pad]), x], dim=2) for x in given)
    plain, layer = layer_of(llama), layer_of(llama, padding=(pad,))
    give(plain, given, 0, 300)
    for begin, end in ((0, 200), (200, FIT + pad - 1)):  # so many tokens in all, but not of the text
        layer.update(*(x[:, :, begin:end] for x in padded[:2]))
        assert layer.waiting is not None
    layer.reset()
    layer.padding = (pad,)
    handles = layer.update(padded[0][:, :, : 300 + pad], padded[1][:, :, : 300 + pad])
    hidden = torch.arange(300 + pad) >= pad
    mask = torch.ones(300 + pad, 300 + pad, dtype=torch.bool).tril() & hidden
    sdpa(padded[2][:, :, : 300 + pad], *handles, attn_mask=mask, enable_gqa=True)
    assert layer.kind.endswith("fitted")
    for mine, theirs in ((layer.keys, plain.keys), (layer.values, plain.values)):
        assert mine is not None
        assert torch.allclose(mine[:, :, pad:], theirs, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["sdpa", "skvq"])
def test_padding_that_is_not_told_of_prevents_it(llama: Any, attention: str) -> None:
    """Positions are not known then: blocks serve, whatever comes."""
    register_attention()
    llama.set_attn_implementation(attention)
    tokens, mask = tiny_models.prompts(2, 300), torch.ones(2, 300, dtype=torch.long)
    mask[1, :20] = 0
    told = {False: QuantizedDynamicCache(llama, **OPTIONS), True: QuantizedDynamicCache(llama, **OPTIONS)}
    told[True].set_padding(mask)
    try:
        for is_told, cache in told.items():
            with torch.inference_mode():
                llama(tokens, attention_mask=mask, **cache_argument(llama, cache))
            stats = cache.stats()
            assert stats["fitted"] == (dict.fromkeys(range(3), 300) if is_told else {})
            reasons = set(stats["not_fitted"].values())
            assert reasons == (set() if is_told else {"padding that set_padding was not told of"})
            cache.reset()
            with torch.inference_mode():
                llama(tokens, **cache_argument(llama, cache))
            assert len(cache.stats()["fitted"]) == 3, "another text without padding"
    finally:
        llama.set_attn_implementation("sdpa")


def test_a_batch_is_fitted_to_all_of_its_sequences(llama: Any) -> None:
    """Two alike give what one gives; two that differ something between."""
    one, other = rows_of(llama, 300), rows_of(llama, 300, seed=5)
    base = LayerPlan.from_config(SkvqConfig(**REGIONS))

    def fitted(*given: Rows) -> LayerPlan:
        keys, values, query = (torch.cat(x) for x in zip(*given, strict=True))
        plan = PromptFit(llama).fitted(base, 0, WaitingRows(keys, values), SeenQueries(query, 300))
        assert isinstance(plan, LayerPlan)
        return plan

    single, twice, both = fitted(one), fitted(one, one), fitted(one, other)
    assert single.values.shift is not None
    assert torch.allclose(single.values.shift, twice.values.shift, atol=1e-6)  # type: ignore[arg-type]
    assert torch.allclose(single.keys.shift, twice.keys.shift, atol=1e-5)  # type: ignore[arg-type]
    mean = (single.values.shift + fitted(other).values.shift) / 2  # type: ignore[operator]
    assert torch.allclose(both.values.shift, mean, atol=1e-6)  # type: ignore[arg-type]


# ---- which caches ----------------------------------------------------------------------------------------------------


def test_a_configuration_alone_fits_nothing(llama: Any) -> None:
    for cache, wanted in (
        (QuantizedDynamicCache(llama.config), 0),
        (QuantizedDynamicCache(llama), 8 * DIM),
        (QuantizedDynamicCache(llama, fit_tokens=0), 0),
        (QuantizedDynamicCache(llama, fit_tokens=900), 900),
        (QuantizedDynamicCache(llama, key_bits=4, value_bits=8, keys={"clip": 1.1}), 8 * DIM),
        (QuantizedDynamicCache(llama, key_bits=8), 0),
        (QuantizedDynamicCache(llama, key_bits=16), 0),
        (QuantizedDynamicCache(llama, keys={"unbiased": False}), 0),
        (QuantizedDynamicCache(llama, group_size=32), 0),
        (QuantizedDynamicCache(llama, keys={"block": 0}, values={"block": 0}), 0),
    ):
        assert {x.fit_tokens for x in cache.layers} == {wanted}


def test_values_of_one_s_own_choice_stay(llama: Any) -> None:
    given = rows_of(llama, 600)
    layer = layer_of(llama, values={"rotation": "identity"})
    give(layer, given, 0, 600)
    assert layer.plan.keys.options.parts is not None
    assert layer.plan.values.options.block == 256
    assert layer.native.packed_tokens == 512


@pytest.mark.parametrize("value", [-1, 1.5, True, "all"])
def test_fit_tokens_is_checked(value: Any) -> None:
    with pytest.raises(SkvqError, match=r"fit_tokens=.*expected an integer"):
        SkvqConfig(fit_tokens=value)


def test_what_cannot_be_fitted_is_told(llama: Any) -> None:
    """A rotation that is not known: blocks serve, and stats say why. Queries and heads that are odd are no reason."""
    turning = tiny_models.build("llama", head_dim=DIM)
    turning.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    dynamic = tiny_models.transformers.AutoModelForCausalLM.from_config(turning.config).eval()
    cache = QuantizedDynamicCache(dynamic, **OPTIONS)
    tokens = tiny_models.prompts(1, 300)
    with torch.inference_mode():
        dynamic(tokens, **cache_argument(dynamic, cache))
    stats = cache.stats()
    assert stats["fitted"] == {}
    assert set(stats["not_fitted"]) == {0, 1, 2}
    assert stats["not_fitted"][0].startswith("rotation not known")
    assert {x.kind for x in cache.layers} == {"K2 V1.6"}

    layer = layer_of(llama)
    keys, values, query = rows_of(llama, 300)
    give(layer, (keys, values, 0.0 * query), 0, 300)  # every query looks at all tokens alike
    assert layer.counts.fitted == {0: 300}

    narrow = tiny_models.build("llama")  # heads of 16 channels are one part
    cache = QuantizedDynamicCache(narrow, key_bits=1.5, **OPTIONS)
    with torch.inference_mode():
        narrow(tokens, **cache_argument(narrow, cache))
    assert cache.stats()["fitted"] == {0: 300, 1: 300, 2: 300}
    assert cache.layers[0].plan.keys.options.parts == ((1, 16),)


@pytest.mark.parametrize("field", ["matrix", "inverse", "shift", "shift_sine", "frequencies", "noise"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_numbers_of_a_plan_are_checked_without_a_codec_and_by_it(llama: Any, field: str, number: float) -> None:
    keys, values, query = rows_of(llama, 300)
    base = LayerPlan.from_config(SkvqConfig(**REGIONS))
    plan = PromptFit(llama).fitted(base, 0, WaitingRows(keys, values), SeenQueries(query, 300))
    assert isinstance(plan, LayerPlan)
    broken = getattr(plan.keys, field).clone()
    broken.view(-1)[-1] = number
    stream = dataclasses.replace(plan.keys, **{field: broken})
    for refuse in (stream.check, stream.codec):
        with pytest.raises(SkvqError, match=rf"^keys: {field}: expected .*finite numbers"):
            refuse("keys", DIM)


def test_a_rotation_that_is_known_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fit of a model sees the rotation that the model has then."""
    searches: list[int] = []
    find = turning_module.find_turning
    monkeypatch.setattr(turning_module, "find_turning", lambda *given: searches.append(1) or find(*given))
    model = tiny_models.build("llama", head_dim=DIM)
    decoder, cpu = model.base_model, torch.device("cpu")

    def found() -> tuple[Any, int]:
        searches.clear()
        return PromptFit(model)._turning(0, DIM, cpu), len(searches)

    first, count = found()
    assert count == 1
    assert found() == (first, 0)
    fit = PromptFit(model)
    assert fit._turning(1, DIM, cpu) is fit._turning(0, DIM, cpu) is first
    # one frequency, by a unit in the last place: in place, and as another tensor
    for channel, anew in ((0, False), (5, True)):
        inv_freq = decoder.rotary_emb.inv_freq.clone()
        inv_freq[channel] = inv_freq[channel].nextafter(torch.tensor(2.0))
        if anew:
            decoder.rotary_emb.inv_freq = inv_freq
        else:
            decoder.rotary_emb.inv_freq.copy_(inv_freq)
        turning, count = found()
        assert count == 1
        assert turning.frequencies[channel] == inv_freq[channel]
        assert found() == (turning, 0)
    # a factor on cosines and sines is part of the mean, not of the rotation
    decoder.rotary_emb.attention_scaling = 1.25
    assert found() == (turning, 0)
    # a rotation that changes with the length is not taken for the known one, nor kept
    config = copy.deepcopy(decoder.config)
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    plain, decoder.rotary_emb = decoder.rotary_emb, type(decoder.rotary_emb)(config)
    for _ in range(2):
        reason, count = found()
        assert count == 1
        assert reason.startswith("rotation not known")
    decoder.rotary_emb = plain
    assert found() == (turning, 0)


def test_a_known_rotation_does_not_keep_its_model() -> None:
    model = tiny_models.build("llama", head_dim=DIM)
    assert isinstance(PromptFit(model)._turning(0, DIM, torch.device("cpu")), turning_module.Turning)
    decoder = weakref.ref(model.base_model)
    del model
    gc.collect()
    assert decoder() is None


def test_rows_that_are_no_numbers_are_refused_as_ever(llama: Any) -> None:
    keys, values, query = rows_of(llama, 300)
    keys[0, 1, 200, 3] = torch.nan
    layer = layer_of(llama)
    with pytest.raises(SkvqError, match="NaN"):
        give(layer, (keys, values, query), 0, 300)
    assert layer.kind == "K2 V1.6"
    assert layer.get_seq_length() == 0
    propagating = layer_of(llama, nonfinite="propagate")
    give(propagating, (keys, values, query), 0, 300)
    assert propagating.counts.not_fitted == {0: "keys, values or queries are not finite"}


# ---- moments ---------------------------------------------------------------------------------------------------------


def test_moments_of_the_last_queries_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, 100, 16, generator=generator) for _ in range(2))
    query = torch.randn(GROUP * HEADS, 100, 16, generator=generator)
    is_sink = torch.arange(100) < 3
    options: dict[str, Any] = {"is_sink": is_sink, "window": 8, "stride": 5}
    whole, early, late = (AttentionMoments.empty(HEADS, 16, 16, torch.device("cpu")) for _ in range(3))
    whole.update(query, keys, values, **options)
    early.update(query[:, :40], keys, values, **options)
    late.update(query[:, 40:], keys, values, first=40, **options)
    for name in ("query_moment", "value_moment", "mass"):
        wanted = getattr(whole, name)
        error = (getattr(early, name) + getattr(late, name) - wanted).abs().max()
        assert error < 1e-5 * wanted.abs().max(), name
    assert late.query_moment.abs().max() > 0


def test_moments_do_not_depend_on_how_many_queries_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    from skvq.calibrate import moments

    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(HEADS, 90, 16, generator=generator) for _ in range(2))
    query = torch.randn(GROUP * HEADS, 90, 16, generator=generator)
    found = []
    for numbers in (1 << 26, 1, 5 * GROUP * HEADS * 90):
        monkeypatch.setattr(moments, "PROBABILITIES", numbers)
        sums = AttentionMoments.empty(HEADS, 16, 16, torch.device("cpu"))
        sums.update(query, keys, values, is_sink=torch.arange(90) < 3, window=8, stride=2)
        found.append(sums.query_moment)
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-5 * found[0].abs().max()


# ---- models ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt-oss", "gemma2", "kv-shared", "phi3"])
@pytest.mark.parametrize("way", ["greedy", "beams", "chunked", "lookup"])
def test_generation_with_a_fit_is_packed_all_the_way(family: str, way: str) -> None:
    options: dict[str, Any] = {
        "greedy": {},
        "beams": {"num_beams": 3},
        "chunked": {"prefill_chunk_size": 100},
        "lookup": {"prompt_lookup_num_tokens": 4, "eos_token_id": 1},  # which transformers 5.0 needs
    }[way]
    if way == "lookup" and family == "kv-shared":
        pytest.skip("transformers: no assisted decoding for it")
    if way == "lookup" and tiny_models.cannot_roll_back(family):
        pytest.skip(f"transformers {transformers.__version__} cannot roll back sliding layers, with any cache")
    register_attention()
    model = tiny_models.build(family, "skvq")
    tokens = tiny_models.prompts(1, 300)
    tokens[:, 200:300] = tokens[:, 100:200]
    cache = QuantizedDynamicCache(model, **OPTIONS)
    model.generate(
        tokens, max_new_tokens=12, do_sample=False, disable_compile=True, **cache_argument(model, cache), **options
    )
    stats = cache.stats()
    assert len(stats["fitted"]) == tiny_models.PACKED_LAYERS[family], stats["not_fitted"]
    assert stats["decoded"] == {}
    assert stats["packed"] > 0
    assert " fitted" in str(cache)


def test_the_decoder_of_a_model_that_sees_images_is_found() -> None:
    model = tiny_models.build_seeing("gemma3")
    cache, tokens = QuantizedDynamicCache(model, **OPTIONS), tiny_models.prompts(1, 300)
    with torch.inference_mode():
        model(tokens, **cache_argument(model, cache))
    assert cache.stats()["fitted"] == {1: 300, 2: 300}


def test_a_module_of_another_kind_is_not_fitted(llama: Any) -> None:
    class Other(torch.nn.Module):
        config = llama.config

    layer = QuantizedDynamicCache(Other(), **OPTIONS).layers[0]
    give(layer, rows_of(llama, 300), 0, 300)
    assert layer.kind == "K2 V1.6"
    assert layer.counts.not_fitted == {0: "Other: no layers found, expected a decoder of transformers"}


@pytest.fixture(scope="module")
def gemma() -> Any:
    skip_without_the_demo_model()
    return models.load(dtype="float32")


@pytest.mark.model
def test_a_real_prompt_is_better_served(gemma: Any) -> None:
    """Predictions behind a prompt move less than without a fit, at fewer bytes a token."""
    ids = models.packaged_tokens(gemma.tokenizer, "northanger_abbey", 1280)
    model = gemma.model

    def logits(cache: Any) -> Tensor:
        with torch.inference_mode():
            model(ids[:, :1088], logits_to_keep=1, **cache_argument(model, cache))
            found: Tensor = model(ids[:, 1088:], **cache_argument(model, cache)).logits[0]
        return found.log_softmax(-1)

    exact = logits(DynamicCache(config=model.config))
    fitted, blocks = (QuantizedDynamicCache(model, fit_tokens=tokens) for tokens in (1024, 0))
    kl = [float((exact.exp() * (exact - logits(cache))).sum(-1).mean()) for cache in (fitted, blocks)]
    assert set(fitted.stats()["fitted"].values()) == {1088}
    assert blocks.stats()["fitted"] == {}
    assert kl[0] < 0.8 * kl[1], kl
