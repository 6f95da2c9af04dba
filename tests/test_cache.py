"""`QuantizedDynamicCache` and its layers: transformers' protocol, errors that change nothing, copies, figures."""

import copy
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import tiny_models
from skvq import QuantizedDynamicCache, SkvqConfig, SkvqError
from skvq.layer import CROP_TAKES_LENGTH, CROP_TAKES_LENGTH_ZERO, PackedLayer
from skvq.packed import AttentionCounts, PackedStates
from skvq.plan import LayerPlan

HEADS, D = 2, 16
LLAMA = tiny_models.CONFIGS["llama"]()
GEMMA3 = tiny_models.CONFIGS["gemma3"]()
PASS_THROUGH = {"key_bits": 16, "value_bits": 16, "window": 8, "sinks": 2}
LOW_BITS: dict[str, Any] = {"window": 8, "sinks": 2, "keys": {"block": 128}}


def states(tokens: int, batch: int = 2, seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, tokens, D, generator=generator).to(dtype) for _ in range(2)]


def packed_layer(**options: Any) -> PackedLayer:
    config = SkvqConfig.from_options(**(LOW_BITS | options))
    return PackedLayer(LayerPlan.from_config(config), 3, AttentionCounts())


def filled(config: Any = LLAMA, tokens: int = 150, settled: bool = True, **options: Any) -> QuantizedDynamicCache:
    cache = QuantizedDynamicCache(config, **(LOW_BITS | options))
    for index, layer in enumerate(cache.layers):
        cache.update(*states(tokens, seed=index), index)
        if settled and isinstance(layer, PackedLayer):
            layer.settle()
    return cache


def contents(cache: QuantizedDynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(layer.keys, layer.values) for layer in cache.layers]


def same(one: QuantizedDynamicCache, other: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    return all(torch.equal(a, b) for x, y in zip(contents(one), other, strict=True) for a, b in zip(x, y, strict=True))


# ---- which layers


def test_full_layers_are_packed_and_sliding_layers_stay() -> None:
    kinds = [type(layer) for layer in QuantizedDynamicCache(GEMMA3).layers]
    assert kinds == [DynamicSlidingWindowLayer, PackedLayer, PackedLayer]
    assert QuantizedDynamicCache(GEMMA3).is_sliding == [True, False, False]
    shared = QuantizedDynamicCache(tiny_models.CONFIGS["kv-shared"]())
    assert [type(layer).__name__ for layer in shared.layers][:2] == ["DynamicSlidingWindowLayer", "PackedLayer"]
    assert not any(isinstance(layer, PackedLayer) for layer in shared.layers[2:])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_has_its_packed_layers(family: str) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cache = QuantizedDynamicCache(tiny_models.CONFIGS[family]())
    count = sum(isinstance(layer, PackedLayer) for layer in cache.layers)
    assert count == (1 if family == "kv-shared" else tiny_models.PACKED_LAYERS[family])
    assert bool(seen) == (count == 0)
    assert all("nothing will be packed" in str(warning.message) for warning in seen)


def test_options_by_object_and_by_name() -> None:
    assert QuantizedDynamicCache(LLAMA).skvq_config == SkvqConfig()
    config = SkvqConfig(key_bits=4, window=9)
    assert QuantizedDynamicCache(LLAMA, config).skvq_config == config
    assert QuantizedDynamicCache(LLAMA, config, window=7).skvq_config == config.replace(window=7)
    assert QuantizedDynamicCache(LLAMA, value_bits=3, sinks=0).skvq_config == SkvqConfig(value_bits=3, sinks=0)
    with pytest.raises(SkvqError, match="windw=3: unknown option"):
        QuantizedDynamicCache(LLAMA, windw=3)


def _small(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(transformers, name)(**options)


REFUSED_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "latents": (_small("DeepseekV3Config", num_hidden_layers=2), "latent attention.*kv_lora_rank"),
    "encoder-decoder": (_small("T5Config"), "encoder-decoder.*decoder-only"),
    "linear attention": (
        _small("Qwen3NextConfig", num_hidden_layers=4),
        "'linear_attention', expected.*full_attention",
    ),
    "state space": (_small("MambaConfig", num_hidden_layers=2), "recurrent layers.*expected attention"),
    "hybrid": (_small("FalconH1Config", num_hidden_layers=2), "recurrent layers.*expected attention"),
    "head size": (_small("LlamaConfig", head_dim=72), "head_dim=72.*multiple of 16"),
    "model": (lambda: torch.nn.Linear(2, 2), "got Linear, expected a model's configuration"),
    "none": (lambda: None, "got NoneType, expected a model's configuration"),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_that_cannot_be_served_are_refused(name: str) -> None:
    config, message = REFUSED_MODELS[name]
    with pytest.raises(SkvqError, match=message):
        QuantizedDynamicCache(config())


def test_groups_that_do_not_divide_the_head_are_refused_at_once() -> None:
    with pytest.raises(SkvqError, match="group_size=64: expected one of 16 for head_dim=16"):
        QuantizedDynamicCache(LLAMA, group_size=64)
    # where the configuration does not tell, the first keys do
    open_config = copy.deepcopy(LLAMA)
    open_config.v_head_dim = 32
    cache = QuantizedDynamicCache(open_config, group_size=64)
    with pytest.raises(SkvqError, match="layer 0: keys: group_size=64"):
        cache.update(*states(3), 0)
    assert cache.get_seq_length() == 0


# ---- the protocol, against the stock layer


def test_lengths_and_masks() -> None:
    cache = QuantizedDynamicCache(LLAMA, **LOW_BITS)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (0, -1, False)
    assert cache.get_mask_sizes(5, 0) == (5, 0)
    assert len(cache) == tiny_models.LAYERS
    for index in range(len(cache)):
        cache.update(*states(40), index)
    assert (cache.get_seq_length(), cache.batch_size, cache.is_initialized) == (40, 2, True)
    assert cache.get_mask_sizes(5, 1) == (45, 0)
    layer = cache.layers[0]
    assert layer.get_mask_sizes(torch.arange(40, 45)) == (45, 0)
    assert (layer.get_max_length(), layer.get_max_cache_shape()) == (-1, -1)
    assert layer.is_croppable
    assert not cache.is_compileable
    before = layer.keys
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.keys, before)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 30)),
        st.tuples(st.just("crop"), st.integers(0, 40)),
        st.tuples(st.just("reorder"), st.integers(0, 1000)),
        st.tuples(st.just("select"), st.integers(1, 7)),
        st.tuples(st.just("repeat"), st.integers(1, 2)),
        st.tuples(st.just("reset"), st.just(0)),
        st.tuples(st.just("copy"), st.just(0)),
    ),
    min_size=3,
    max_size=10,
)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(0, 6), st.integers(1, 40))
def test_pass_through_is_the_stock_cache(steps: list[tuple[str, int]], sinks: int, window: int) -> None:
    """Any order of appends, crops and batch changes leaves the same keys and values as a DynamicCache."""
    config = copy.deepcopy(LLAMA)
    config.num_hidden_layers = 1
    cache = QuantizedDynamicCache(config, key_bits=16, value_bits=16, sinks=sinks, window=window)
    stock = DynamicCache(config=config)
    batch = 2
    for index, (name, number) in enumerate([("update", 20), *steps, ("update", 1)]):
        length = cache.get_seq_length()
        if name == "update":
            batch = batch if length else 2
            new = states(number, batch, index)
            got, wanted = cache.update(*new, 0), stock.update(*new, 0)
            for mine, theirs in zip(got, wanted, strict=True):
                mine = mine.decode() if isinstance(mine, PackedStates) else mine
                assert torch.equal(mine, theirs)
        elif name == "crop":
            for each in (cache, stock):
                if length > 1:
                    each.crop(-max(1, min(number, length - 1)))
        elif name == "reset":
            cache.reset()
            stock = DynamicCache(config=config)  # the oldest transformers keep zeros instead
        elif name == "copy":
            cache = copy.deepcopy(cache)
        elif length:
            generator = torch.Generator().manual_seed(number)
            if name == "reorder":
                order = torch.randint(0, batch, (batch,), generator=generator)
                cache.reorder_cache(order)
                stock.reorder_cache(order)
            elif name == "select":
                rows = torch.randperm(batch, generator=generator)[: max(1, number % (batch + 1))]
                cache.batch_select_indices(rows)
                stock.batch_select_indices(rows)
                batch = len(rows)
            elif batch * number <= 8:
                cache.batch_repeat_interleave(number)
                stock.batch_repeat_interleave(number)
                batch *= number
        if cache.get_seq_length():
            assert torch.equal(cache.layers[0].keys, stock.layers[0].keys)
            assert torch.equal(cache.layers[0].values, stock.layers[0].values)
            assert cache.batch_size == batch
        assert cache.get_seq_length() == stock.get_seq_length()


def test_selection_takes_numbers_and_booleans() -> None:
    cache = filled(GEMMA3)
    wanted = [(keys[1:], values[1:]) for keys, values in contents(cache)]
    for rows in (torch.tensor([1]), torch.tensor([-1]), torch.tensor([False, True])):
        selected = copy.deepcopy(cache)
        selected.batch_select_indices(rows)
        assert same(selected, wanted)
        assert selected.batch_size == 1
    cache.layers[1].batch_select_indices(torch.tensor([1]))
    cache.layers[2].reorder_cache(torch.tensor([1]))
    assert cache.layers[1].batch_rows == cache.layers[2].batch_rows == 1
    cache.layers[1].batch_repeat_interleave(3)
    assert cache.layers[1].batch_rows == 3


def test_crop_counts_and_lengths() -> None:
    layer = packed_layer()
    layer.crop(-3)  # nothing stored yet
    layer.update(*states(50))
    if not CROP_TAKES_LENGTH_ZERO:
        layer.crop(0)
    assert layer.get_seq_length() == 50
    layer.crop(-8)
    assert layer.get_seq_length() == 42
    with pytest.raises(SkvqError, match="tokens_to_remove=-43: expected -42 to 0"):
        layer.crop(-43)
    if CROP_TAKES_LENGTH:
        layer.crop(60)
        assert layer.get_seq_length() == 42
        layer.crop(20)
        assert layer.get_seq_length() == 20
    else:
        with pytest.raises(SkvqError, match="tokens_to_remove=20: expected 0 or a negative number"):
            layer.crop(20)
        layer.crop(-22)
    layer.crop(-20)
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    layer.update(*states(4, batch=3))
    assert layer.batch_rows == 3


def test_early_initialization() -> None:
    cache = QuantizedDynamicCache(LLAMA)
    cache.early_initialization(2, HEADS, D, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.get_seq_length() == 0
    keys, values = states(9, batch=4)
    returned = cache.update(keys, values, 0)
    assert torch.equal(returned[0], keys)
    assert cache.batch_size == 4


def test_no_token_is_no_change() -> None:
    layer = packed_layer()
    layer.update(*states(30))
    key, value = layer.update(*states(0))
    assert key.shape == value.shape == (2, HEADS, 30, D)
    assert torch.equal(key[:, :, :5], layer.keys[:, :, :5])  # type: ignore[index]


def test_keys_with_a_gradient_are_stored_without_it_and_said_so() -> None:
    layer = packed_layer()
    with torch.enable_grad():
        keys, values = (x.requires_grad_() for x in states(30))
        with pytest.warns(UserWarning, match="no gradient flows"):
            returned, _ = layer.update(keys, values)
        assert returned is keys
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            key, _ = layer.update(*(x.requires_grad_() for x in states(1)))
    assert not key.requires_grad
    assert torch.equal(layer.keys[:, :, -1:], states(1)[0])  # type: ignore[index]


# ---- errors


def _with_nan(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[1, 0, 0, 3] = float("nan")
    return x


BAD_STATES: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], tuple[Any, Any]], str]] = {
    "rank of keys": (lambda k, v: (k[0], v), r"key_states: got \(2, 1, 16\), expected a tensor \[batch, "),
    "rank of values": (lambda k, v: (k, v[None]), r"value_states: got .*expected a tensor \[batch, "),
    "no tensor": (lambda k, v: (k, v.numpy()), "value_states: got ndarray, expected a tensor"),
    "heads": (lambda k, v: (k[:, :1], v[:, :1]), "key_states: .*expected .*2 heads"),
    "heads of values": (lambda k, v: (k, v[:, :1]), "value_states: .*expected batch, heads, tokens"),
    "tokens of values": (lambda k, v: (k, torch.cat([v, v], dim=2)), "value_states: .*expected batch, heads, tokens"),
    "head size": (lambda k, v: (k[..., :8], v), "key_states: .*expected .*head_dim 16"),
    "head size of values": (lambda k, v: (k, v[..., :8]), "value_states: .*expected .*head_dim 16"),
    "batch": (lambda k, v: (k[:1], v[:1]), "key_states: .*expected .*batch 2"),
    "empty batch": (lambda k, v: (k[:0], v[:0]), "key_states: .*expected at least one sequence"),
    "dtype": (lambda k, v: (k.half(), v.half()), "key_states: .*expected torch.float32"),
    "dtype of values": (lambda k, v: (k, v.half()), "value_states: .*dtype of key_states"),
    "unknown dtype": (
        lambda k, v: (k.double(), v.double()),
        "key_states: dtype torch.float64, expected one of float32",
    ),
    "device": (lambda k, v: (k.to("meta"), v.to("meta")), "key_states: on device meta, expected cpu"),
    "NaN in keys": (lambda k, v: (_with_nan(k), v), "layer 3.*(nan|NaN|finite)"),
    "NaN in values": (lambda k, v: (k, _with_nan(v)), "layer 3.*(nan|NaN|finite)"),
    "infinity in values": (lambda k, v: (k, v / 0), "layer 3.*(infinit|finite)"),
}


# An empty layer takes any shape and dtype.
AGREED_BY_FIRST_TOKENS = ("heads", "batch", "dtype", "head size", "head size of values")
# Tokens before, and what they do: too few to choose sinks, or a prompt whose queries nobody has shown, or stored.
BEFORE = ((0, "nothing"), (5, "wait"), (150, "wait"), (150, "are stored"))
BAD_CASES = [(name, *past) for name in BAD_STATES for past in BEFORE if past[0] or name not in AGREED_BY_FIRST_TOKENS]


@pytest.mark.parametrize(("name", "tokens", "they"), BAD_CASES)
def test_bad_states_change_nothing(name: str, tokens: int, they: str) -> None:
    spoil, message = BAD_STATES[name]
    layer = packed_layer()
    if tokens:
        layer.update(*states(tokens))
    if they == "are stored":
        layer.settle()
    waiting = layer.waiting
    assert (waiting is not None) == (they == "wait")
    before = (layer.get_seq_length(), layer.nbytes, layer.version, layer.keys, layer.values)
    with pytest.raises(SkvqError, match=f"(?s)layer 3: .*{message}" if "layer 3" not in message else message):
        layer.update(*spoil(*states(1)))
    assert layer.is_initialized == bool(tokens)
    assert (layer.get_seq_length(), layer.nbytes) == before[:2]
    assert layer.waiting is waiting
    if tokens:
        assert torch.equal(layer.keys, before[3])  # type: ignore[arg-type]
        assert torch.equal(layer.values, before[4])  # type: ignore[arg-type]
    fine = layer.update(*states(1))
    assert fine[0].shape[2] == tokens + 1


def test_rows_that_are_not_finite_can_be_let_through() -> None:
    layer = packed_layer(nonfinite="propagate", keys={"block": 0}, window=1, sinks=0)
    keys, values = states(20)
    clean = packed_layer(keys={"block": 0}, window=1, sinks=0)
    clean.update(keys, values)
    layer.update(_with_nan(keys), values)
    got, wanted = layer.keys, clean.keys
    assert got is not None
    assert wanted is not None
    assert torch.isnan(got[1, 0, 0]).all()
    assert torch.isnan(got).sum() == D
    assert torch.equal(got[0], wanted[0])
    assert torch.equal(got[1, 0, 1:], wanted[1, 0, 1:])


BAD_CHANGES: dict[str, tuple[Callable[[QuantizedDynamicCache], Any], str]] = {
    "crop too much": (lambda cache: cache.crop(-151), "tokens_to_remove=-151: expected -150 to 0"),
    "reorder": (
        lambda cache: cache.reorder_cache(torch.tensor([0, 2])),
        r"indices=\[0, 2\]: expected rows from 0 to 1",
    ),
    "reorder a layer": (
        lambda cache: cache._packed_layers()[0].reorder_cache(torch.tensor([0, -3])),
        r"indices=\[0, -3\]: expected rows from 0 to 1",
    ),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([-3])), r"indices=\[-3\]: expected rows"),
    "select by boolean": (
        lambda cache: cache.batch_select_indices(torch.tensor([True])),
        r"boolean of shape \(1,\), expected \(2,\)",
    ),
    "repeat": (lambda cache: cache.batch_repeat_interleave(0), "repeats=0: expected a positive integer"),
    "layer": (lambda cache: cache.update(*states(1), 3), "layer_idx=3: expected 0 to 2"),
    "layer below": (lambda cache: cache.update(*states(1), -1), "layer_idx=-1: expected 0 to 2"),
}


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("name", BAD_CHANGES)
def test_bad_changes_change_no_layer(name: str, settled: bool) -> None:
    change, message = BAD_CHANGES[name]
    cache = filled(GEMMA3, settled=settled)
    before = contents(cache)
    with pytest.raises(SkvqError, match=message):
        change(cache)
    assert same(cache, before)


def test_a_crop_that_a_sliding_layer_refuses_changes_no_layer() -> None:
    cache = filled(GEMMA3)
    before = contents(cache)
    with pytest.raises((RuntimeError, ValueError)):
        cache.crop(-1)
    assert same(cache, before)


def test_a_batch_that_differs_after_selection_is_refused() -> None:
    cache = filled()
    cache.batch_select_indices(torch.tensor([1]))
    with pytest.raises(SkvqError, match=r"layer 0: key_states: .*expected .*batch 1"):
        cache.update(*states(1, batch=2), 0)
    cache.update(*states(1, batch=1), 0)


# ---- copies


def test_copies_are_independent() -> None:
    cache = filled(GEMMA3)
    before = contents(cache)
    twin = copy.deepcopy(cache)
    assert same(twin, before)
    for index in range(3):
        twin.update(*states(2, seed=9), index)
    assert same(cache, before)
    cache.layers[1].crop(-40)
    assert twin.get_seq_length(1) == 152
    counted = cache.stats()
    assert twin.stats() == counted
    twin.reset()
    twin.update(*states(2), 1)
    assert twin.stats()["prefill"] == counted["prefill"] + 1
    assert cache.stats() == counted
    assert twin.layers[1].counts is twin.layers[2].counts is twin._counts
    assert cache.layers[1].counts is cache._counts


def test_copies_share_packed_memory_until_written() -> None:
    layer = packed_layer(window=8, keys={"block": 0})
    layer.update(*states(3000))
    copies = [copy.deepcopy(layer) for _ in range(3)]
    assert all(torch.equal(x.keys, layer.keys) for x in copies)  # type: ignore[arg-type]
    one = layer.nbytes
    layer.batch_repeat_interleave(8)
    assert layer.nbytes < 2 * one


def test_pickling_is_refused() -> None:
    cache = filled()
    for action in (pickle.dumps, copy.copy):
        with pytest.raises(SkvqError, match=r"use copy\.deepcopy"):
            action(cache.layers[0])  # type: ignore[operator]
    with pytest.raises(SkvqError, match=r"use copy\.deepcopy"):
        pickle.dumps(cache)


# ---- figures


def test_bytes_and_bits_follow_the_layers() -> None:
    cache = filled(GEMMA3, tokens=600)
    sliding, *packed = cache.layers
    orders = 2 * 2 * 10 * 8  # of two layers: the positions of the first ten rows of two sequences
    native = sum(layer.native.nbytes for layer in packed)
    assert cache.nbytes == sliding.keys.nbytes + sliding.values.nbytes + native + orders
    elements = 2 * sum(keys.numel() for keys, _ in contents(cache))
    assert cache.bits_per_element == pytest.approx(8 * cache.nbytes / elements)
    assert cache.bits_per_element < 16
    empty = QuantizedDynamicCache(LLAMA)
    assert (empty.nbytes, empty.bits_per_element) == (0, 0.0)
    whole = filled(**PASS_THROUGH, keys=None, tokens=600)
    assert whole.nbytes >= 4 * 2 * sum(keys.numel() for keys, _ in contents(whole))


def test_a_reset_cache_is_empty() -> None:
    cache = filled()
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes) == (0, 0)
    cache.update(*states(3, batch=5, dtype=torch.bfloat16), 1)
    assert cache.layers[1].keys.dtype == torch.bfloat16


def test_repr_shows_layers_regions_bytes_and_bits() -> None:
    text = repr(filled(GEMMA3, tokens=400))
    assert "keys 2 bits, values 1.6 bits, sinks 2, window 8" in text
    for word in ("layer", "sliding", "K2 V1.6", "1-2", "384", "KiB", "bits per element"):
        assert word in text, word
    assert "0-2" in repr(QuantizedDynamicCache(LLAMA))
    assert "tokens 2 | 384 | 14" in repr(filled(tokens=400).layers[0])
    page = filled(GEMMA3, tokens=400)._repr_html_()
    assert page.count("<tr>") == 3
    assert 'title="packed: 384"' in page


def test_stats_count_prompts_and_decodes() -> None:
    cache = filled()
    counts = {"packed": 0, "prefill": 3, "decoded": {}, "score_noise": {}, "nonfinite_rows": {}}
    assert cache.stats() == counts | {"fitted": {}, "not_fitted": {}}
    contents(cache)
    assert cache.stats()["decoded"] == {"layer.keys": 3, "layer.values": 3}


@pytest.mark.parametrize("wide", [1.0, 40.0])
def test_a_cache_warns_where_its_own_estimate_of_the_error_is_large(wide: float) -> None:
    layer = packed_layer(keys={"block": 0, "rotation": "identity"}, values={"block": 0})
    keys, values = states(100, batch=1)
    layer.update(keys * wide, values)
    query = torch.randn(1, 2 * HEADS, 1, D, generator=torch.Generator().manual_seed(5))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(2):
            states_ = layer.update(*(x[:, :, :1] * wide for x in states(1, batch=1, seed=7 + step)))
            with torch.no_grad():
                torch.nn.functional.scaled_dot_product_attention(query, *states_, enable_gqa=True)
    noise = layer.counts.score_noise[3]
    # the estimate against the error itself, of the rows packed by then
    exact = torch.cat([keys, states(1, batch=1, seed=7)[0][:, :, :1]], dim=2) * wide
    error = (layer.keys[:, :, :101] - exact)[:, :, 2 : 101 - 8].repeat_interleave(2, dim=1)
    found = float((query * D**-0.5 @ error.mT).square().mean().sqrt())
    assert noise == pytest.approx(found, rel=0.35)
    messages = [str(x.message) for x in caught if "packing puts the scores" in str(x.message)]
    assert len(messages) == (wide > 1.0)
    if messages:
        assert "layer 3" in messages[0]
        assert "key_bits" in messages[0]


def test_human_bytes() -> None:
    from skvq.display import human_bytes

    assert [human_bytes(x) for x in (0, 1023, 1024, 3 * 2**20)] == ["0 B", "1023 B", "1.0 KiB", "3.0 MiB"]
    assert human_bytes(5 * 2**40) == "5.0 TiB"


def test_a_configuration_without_layers_is_refused() -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(model_type="strange"))
    with pytest.raises(SkvqError, match="transformers builds no dynamic cache"):
        QuantizedDynamicCache(config)
