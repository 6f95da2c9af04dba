"""`generate()` with the packed cache: every way of decoding, every family of models, every attention implementation.

With 16 bits the tokens are DynamicCache's. With few bits the tokens of attention on packed bytes are those of eager
attention on the decoded rows, and every attention call over a past runs on the packed bytes.
"""

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

import skvq
from skvq import QuantizedDynamicCache
from skvq.layer import PackedLayer
from skvq.model_layers import cache_argument
from tiny_models import CONFIGS, FAMILIES, PACKED_LAYERS, WITHOUT_SDPA, build, cannot_roll_back, prompts

# Padding that the cache is told of is tested in test_padding.py.
pytestmark = pytest.mark.filterwarnings("ignore:the batch is padded on the left")
NEW = 10
LENGTH = 41
PASS_THROUGH: dict[str, Any] = {"key_bits": 16, "value_bits": 16, "window": 8, "sinks": 2}
# Without blocks, so that short texts are packed as well.
LOW_BITS: dict[str, Any] = {"key_bits": 2, "value_bits": 1.6, "window": 8, "sinks": 2, "keys": {"block": 0}}

PACKED_FAMILIES = tuple(family for family in FAMILIES if PACKED_LAYERS[family])
ATTENTION = [(f, a) for f in FAMILIES for a in ("sdpa", "skvq", "eager") if not (a == "sdpa" and f in WITHOUT_SDPA)]


@functools.cache
def model(family: str, attention: str, seed: int = 0) -> Any:
    skvq.register_attention()
    return build(family, attention, seed)


def packed_attention(family: str) -> str:
    """The implementation that keeps this family's attention on packed bytes."""
    return "skvq" if family in WITHOUT_SDPA else "sdpa"


def cache_of(family: str, **options: Any) -> QuantizedDynamicCache:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no layer of this")
        return QuantizedDynamicCache(CONFIGS[family](), **options)


def inputs(batch: int, padded: bool = False, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = prompts(batch, length)
    # a repeated passage, for prompt lookup to find
    ids[:, length // 2 : length // 2 + 12] = ids[:, :12]
    ids[:, -4:] = ids[:, 2:6]
    mask = torch.ones_like(ids)
    if padded:
        for row in range(batch):
            mask[row, : 7 * row] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


# name -> (batch, padded, arguments of generate)
MODES: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "greedy": (2, False, {}),
    "one sequence": (1, False, {}),
    "left-padded": (3, True, {}),
    "beams": (2, True, {"num_beams": 3}),
    "sampling": (2, False, {"do_sample": True, "temperature": 1.5, "top_k": 20}),
    "several returned": (2, True, {"do_sample": True, "num_return_sequences": 2, "top_k": 20}),
    "chunked prefill": (2, True, {"prefill_chunk_size": 13}),
    "prompt lookup": (1, False, {"prompt_lookup_num_tokens": 4, "max_matching_ngram_size": 2, "eos_token_id": 1}),
    "assisted": (1, False, {}),
}


def generate(family: str, attention: str, mode: str, cache: Any, new: int = NEW, length: int = LENGTH) -> torch.Tensor:
    batch, padded, options = MODES[mode]
    if mode == "assisted":
        assistant = model(family, "eager", 1)
        assistant.generation_config.num_assistant_tokens = 3
        assistant.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": assistant}
    torch.manual_seed(5)
    given = inputs(batch, padded, length)
    options = {"do_sample": False, "max_new_tokens": new, "pad_token_id": 0} | options
    tokens: torch.Tensor = model(family, attention).generate(
        **given, **cache_argument(model(family, attention), cache), **options
    )
    return tokens


def needs_rollback(family: str, mode: str) -> None:
    """Skip where transformers itself cannot decode: old sliding layers cannot be rolled back."""
    if mode in ("prompt lookup", "assisted") and cannot_roll_back(family):
        pytest.skip(f"transformers {transformers.__version__} cannot roll back sliding layers, with any cache")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pass_through_gives_the_tokens_of_the_stock_cache(family: str, mode: str) -> None:
    needs_rollback(family, mode)
    attention = packed_attention(family)
    wanted = generate(family, attention, mode, DynamicCache(config=CONFIGS[family]()))
    cache = cache_of(family, **PASS_THROUGH)
    assert torch.equal(generate(family, attention, mode, cache), wanted)
    stats = cache.stats()
    assert stats["decoded"] == {}
    assert bool(stats["packed"]) == bool(PACKED_LAYERS[family])


@pytest.mark.parametrize(("family", "attention"), ATTENTION)
@pytest.mark.filterwarnings("ignore:skvq decodes the whole cache")
def test_pass_through_under_every_attention(family: str, attention: str) -> None:
    wanted = generate(family, attention, "left-padded", DynamicCache(config=CONFIGS[family]()))
    cache = cache_of(family, **PASS_THROUGH)
    assert torch.equal(generate(family, attention, "left-padded", cache), wanted)
    assert bool(cache.stats()["decoded"]) == (attention == "eager" and PACKED_LAYERS[family] > 0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", PACKED_FAMILIES)
@pytest.mark.filterwarnings("ignore:skvq decodes the whole cache")
def test_low_bits_on_packed_bytes_and_decoded_agree(family: str, mode: str) -> None:
    needs_rollback(family, mode)
    # Among tokens of a random model none is a sink more than others: which are chosen would hang on the last digits.
    options = LOW_BITS | {"sink_search": 0}
    decoded = cache_of(family, **options)
    wanted = generate(family, "eager", mode, decoded)
    assert decoded.stats()["packed"] == 0
    cache = cache_of(family, **options)
    assert torch.equal(generate(family, packed_attention(family), mode, cache), wanted)
    assert cache.stats()["decoded"] == {}
    assert cache.nbytes < 2 * decoded.nbytes
    layer = next(layer for layer in cache.layers if isinstance(layer, PackedLayer))
    # a rollback leaves packed what was packed, within the window too
    assert layer.native.packed_tokens >= layer.get_seq_length() - 2 - 8


@pytest.mark.parametrize("family", PACKED_FAMILIES)
def test_every_step_takes_the_packed_path(family: str) -> None:
    cache = cache_of(family, **LOW_BITS)
    generate(family, packed_attention(family), "greedy", cache)
    calls = sum(2 if family == "kv-shared" else 1 for _ in range(PACKED_LAYERS[family]))
    stats = cache.stats()
    # every layer that packed a key has an estimate of what that does to scores
    assert len(stats.pop("score_noise")) <= PACKED_LAYERS[family]
    expected = {"packed": calls * (NEW - 1), "prefill": PACKED_LAYERS[family], "decoded": {}, "nonfinite_rows": {}}
    expected |= {"fitted": {}, "not_fitted": {}}
    assert stats == expected


@pytest.mark.parametrize("family", ["llama", "gemma3", "kv-shared"])
@pytest.mark.filterwarnings("ignore:skvq decodes the whole cache")
def test_default_blocks_over_a_longer_text(family: str) -> None:
    tokens = []
    # eager attention shows no queries
    for attention, exponent in (("sdpa", 0.5), ("skvq", 0.5), ("sdpa", 0.0), ("eager", 0.0)):
        cache = cache_of(family, window=16, keys={"query_exponent": exponent})
        # not padded: what padding tokens attend to differs between sdpa and eager, and they are part of a block
        tokens.append(generate(family, attention, "greedy", cache, new=NEW, length=700))
        layer = next(layer for layer in cache.layers if isinstance(layer, PackedLayer))
        assert layer.native.packed_tokens == 512
        assert (layer.native.query_factors(0, 0) is None) == (exponent == 0.0)
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[2], tokens[3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype: torch.dtype) -> None:
    half = build("qwen3", "sdpa").to(dtype)
    given = inputs(2, padded=True)
    options = {"do_sample": False, "max_new_tokens": 4, "pad_token_id": 0}
    logits = []
    for cache in (DynamicCache(config=half.config), QuantizedDynamicCache(half.config, **PASS_THROUGH)):
        out = half.generate(
            **given, **cache_argument(half, cache), output_scores=True, return_dict_in_generate=True, **options
        )
        logits.append(out.scores[1].float())
    assert (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


def test_a_cached_prompt_is_continued_many_times() -> None:
    llama = model("llama", "sdpa")
    given = inputs(1)
    prefix = QuantizedDynamicCache(llama.config, **LOW_BITS)
    llama(**given, **cache_argument(llama, prefix))
    for seed in range(3):
        ids = torch.cat([given["input_ids"], prompts(1, 6, seed)], dim=1)
        cache = copy.deepcopy(prefix)
        tokens = llama.generate(ids, **cache_argument(llama, cache), max_new_tokens=5, do_sample=False, pad_token_id=0)
        assert tokens.shape == (1, LENGTH + 11)
        assert cache.get_seq_length() == LENGTH + 10
        assert cache.stats()["decoded"] == {}
    assert prefix.get_seq_length() == LENGTH


def test_a_conversation_continues_with_the_same_cache() -> None:
    """Several tokens over a past: the packed bytes serve the default attention as well."""
    llama = model("llama", "sdpa")
    stock, packed = DynamicCache(config=llama.config), QuantizedDynamicCache(llama.config, **PASS_THROUGH)
    for turn in range(3):
        ids = prompts(2, 15, turn)
        a, b = (llama(input_ids=ids, **cache_argument(llama, cache)).logits for cache in (stock, packed))
        assert torch.allclose(a, b, atol=1e-4)
    assert packed.stats()["decoded"] == {}


def test_a_call_that_keeps_gradients_works_on_decoded_rows() -> None:
    llama = model("llama", "sdpa")
    stock, packed = DynamicCache(config=llama.config), QuantizedDynamicCache(llama.config, **PASS_THROUGH)
    for ids in (prompts(2, 15), prompts(2, 1, 1)):
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="keys and values that need a gradient")
            a, b = (llama(input_ids=ids, **cache_argument(llama, cache)).logits for cache in (stock, packed))
        assert torch.allclose(a, b, atol=1e-4)
    assert packed.stats()["packed"] == 0
    assert list(packed.stats()["decoded"]) == ["sdpa: query needs a gradient"]
