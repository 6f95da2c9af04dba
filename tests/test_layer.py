"""The native store against the slow one in plain torch: regions, decoded rows, attention; and what only it must keep.

Every program of appends, crops and gathers must leave both with the same regions and decoded rows, bit for bit.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skvq import SkvqError, _native
from skvq.reference import ReferenceCodec
from skvq.reference_layer import ReferenceLayer

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def codec_options(bits: str, head_dim: int, block: int = 0, **more: Any) -> dict[str, Any]:
    uniform = bits in ("8", "raw")
    return {
        "head_dim": head_dim,
        "format": bits,
        "codebook": "uniform" if uniform else "lloyd-max",
        "rule": "range" if uniform else "norm",
        "block": block if bits != "raw" else 0,
    } | more


def both_layers(keys: dict[str, Any], values: dict[str, Any], heads: int = 2, **options: Any) -> tuple[Any, Any]:
    options = {"num_key_value_heads": heads, "sinks": 3, "window": 8, "dtype": "float32"} | options
    native = _native.Layer(keys=_native.Codec(**keys), values=_native.Codec(**values), **options)
    return native, ReferenceLayer(keys=ReferenceCodec(**keys), values=ReferenceCodec(**values), **options)


def decoded(
    layer: Any, head_dims: tuple[int, int], heads: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (layer.batch_size, heads, layer.length)
    keys, values = (torch.empty(*shape, width, dtype=dtype) for width in head_dims)
    layer.decode_keys(keys)
    layer.decode_values(values)
    return keys, values


def regions(layer: Any) -> tuple[int, ...]:
    return layer.length, layer.batch_size, layer.sink_tokens, layer.packed_tokens, layer.window_tokens


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 200)),
        st.tuples(st.just("append"), st.just(1)),
        st.tuples(st.just("crop"), st.integers(0, 200)),
        st.tuples(st.just("gather"), st.integers(0, 5)),
        st.tuples(st.just("query"), st.integers(1, 100)),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None)
@given(
    program=steps,
    bits=st.tuples(
        st.sampled_from(["raw", "8", "4", "3", "2", "1.6", "1.5"]), st.sampled_from(["raw", "4", "2", "1.6"])
    ),
    head_dims=st.tuples(st.sampled_from([64, 96, 128]), st.sampled_from([64, 80])),
    block=st.sampled_from([0, 128]),
    window=st.sampled_from([1, 8, 100, 128, 200]),
    dtype=st.sampled_from(sorted(DTYPES)),
    seed=st.integers(0, 2**16),
)
def test_any_program_leaves_both_stores_alike(
    program: list[tuple[str, int]],
    bits: tuple[str, str],
    head_dims: tuple[int, int],
    block: int,
    window: int,
    dtype: str,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (codec_options(name, width, block) for name, width in zip(bits, head_dims, strict=True))
    keys |= {"scale_exponent": 0.5, "query_exponent": 0.5} if block else {}
    native, twin = both_layers(keys, values, dtype=dtype, window=window)
    for step, number in [("append", 30), *program]:
        if step == "append":
            batch = native.batch_size or 2
            rows = [torch.randn(batch, 2, number, width, generator=generator) * 3 + 2 for width in head_dims]
            rows = [part.to(DTYPES[dtype]) for part in rows]
            native.append(*rows)
            twin.append(*rows)
        elif step == "crop":
            length = max(native.length - number, 0)
            native.crop(length)
            twin.crop(length)
        elif step == "query" and native.length:
            length = min(number, native.length)
            query = torch.randn(native.batch_size, 6, length, head_dims[0], generator=generator).exp()
            native.observe_queries(query)
            twin.observe_queries(query)
        elif native.length:
            indices = [number % native.batch_size, 0, native.batch_size - 1][: 1 + number % 3]
            native.gather(indices)
            twin.gather(indices)
        assert regions(native) == regions(twin)
        assert native.wants_queries == twin.wants_queries
    if native.length:
        found = decoded(native, head_dims, 2, DTYPES[dtype])
        wanted = decoded(twin, head_dims, 2, DTYPES[dtype])
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))


def test_queries_of_padding_say_nothing() -> None:
    """Tokens in front of a sequence are nobody's; those of a prompt count at once, and few are not believed."""
    keys = codec_options("2", 64, 128, scale_exponent=0.5, query_exponent=0.5, unbiased=True)
    values = codec_options("1.6", 64, 128, scale_exponent=0.0)
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randn(2, 2, 300, 64, generator=generator) for _ in range(2)]
    query = torch.randn(2, 4, 300, 64, generator=generator) * torch.linspace(0.1, 3, 64)
    query[1, :, :40] = 1e6
    query[0, 0, 7] = torch.inf
    layers = both_layers(keys, values)
    for layer in layers:
        layer.set_padding([0, 40])
        assert layer.wants_queries
        layer.append(*rows, query)
        assert not layer.wants_queries
    native = layers[0]
    found, wanted = (decoded(layer, (64, 64), 2, torch.float32) for layer in layers)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, wanted, strict=True))
    seen = query[1, 2:, 40:].double().square().sum((0, 1))
    factors = torch.from_dlpack(native.query_factors(1, 1))
    assert torch.equal(factors, ReferenceCodec(**keys).query_factors(seen))
    few, _ = both_layers(keys, values)
    few.append(*(part[:, :, :200] for part in rows), query[:, :, :31])
    assert few.query_factors(0, 0) is None
    assert few.packed_tokens == 128
    with pytest.raises(SkvqError, match="query"):
        few.observe_queries(torch.zeros(2, 3, 1, 64))
    with pytest.raises(SkvqError, match="query"):
        few.append(*(part[:, :, :2] for part in rows), torch.zeros(2, 4, 3, 64))
    assert few.length == 200
    with pytest.raises(SkvqError, match="queries meet keys only"):
        both_layers(keys, values | {"query_exponent": 0.5})


def test_query_factors_are_counted() -> None:
    keys = codec_options("2", 64, 128, scale_exponent=0.5, query_exponent=0.5)
    layer, _ = both_layers(keys, codec_options("2", 64, 128))
    rows = torch.randn(1, 2, 260, 64)
    layer.append(rows, rows)
    plain = layer.nbytes
    layer.reset()
    layer.append(rows, rows, torch.randn(1, 2, 260, 64))
    assert layer.nbytes == plain + 2 * 2 * 64


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 500),
    cropped=st.sampled_from([0, 0, 1, 60]),
    window=st.sampled_from([8, 100]),
    length=st.integers(1, 9),
    group=st.sampled_from([1, 2, 3, 4, 8]),
    batch=st.integers(1, 2),
    block=st.sampled_from([0, 128]),
    dtype=st.sampled_from(sorted(DTYPES)),
    mask_kind=st.sampled_from(["none", "bool", "float", "per query"]),
    causal=st.booleans(),
    softcap=st.sampled_from([None, 20.0]),
    sinks=st.booleans(),
    fresh=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_attention_equals_the_twin(
    tokens: int,
    cropped: int,
    window: int,
    length: int,
    group: int,
    batch: int,
    block: int,
    dtype: str,
    mask_kind: str,
    causal: bool,
    softcap: float | None,
    sinks: bool,
    fresh: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = min(length, tokens)
    codecs = codec_options("2", 64, block), codec_options("1.6", 96, block)
    native, twin = both_layers(*codecs, dtype=dtype, window=window)
    kind = DTYPES[dtype]
    keys = (torch.randn(batch, 2, tokens + cropped, 64, generator=generator) * 2 + 1).to(kind)
    values = torch.randn(batch, 2, tokens + cropped, 96, generator=generator).to(kind)
    for layer in (native, twin):
        layer.append(keys, values)
        layer.crop(tokens)
    query = torch.randn(batch, 2 * group, length, 64, generator=generator).to(kind)
    options: dict[str, Any] = {"scale": 0.125, "causal": causal, "softcap": softcap}
    if mask_kind == "bool":
        options["mask"] = torch.rand(batch, 1, 1, tokens, generator=generator) > 0.3
    elif mask_kind == "per query":
        options["mask"] = torch.rand(batch, 2 * group, length, tokens, generator=generator) > 0.3
    elif mask_kind == "float":
        options["mask"] = torch.randn(1, 1, length, tokens, generator=generator).to(kind)
    if sinks:
        options["sink_logits"] = torch.randn(2 * group, generator=generator)
    if fresh:
        last = slice(tokens - length, tokens)
        options |= {"fresh_keys": keys[:, :, last], "fresh_values": values[:, :, last]}
    outputs = [torch.full((batch, 2 * group, length, 96), torch.nan, dtype=kind) for _ in range(2)]
    native.attend(query, outputs[0], **options)
    twin.attend(query, outputs[1], **options)
    tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}[dtype]
    assert torch.allclose(*outputs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("isa", _native.available_isas())
def test_float_error_stays_within_twice_that_of_plain_attention(isa: str) -> None:
    """STYLE rule 4: against an f64 oracle on the same decoded rows, beside torch's SDPA in the same dtype."""
    torch.manual_seed(0)
    for dtype, kind in DTYPES.items():
        keys, values = torch.randn(1, 2, 3000, 128).to(kind), torch.randn(1, 2, 3000, 128).to(kind)
        query = torch.randn(1, 8, 1, 128).to(kind)
        codecs = [_native.Codec(**codec_options(bits, 128)) for bits in ("2", "1.6")]
        layer = _native.Layer(
            num_key_value_heads=2, keys=codecs[0], values=codecs[1], sinks=5, window=128, dtype=dtype, isa=isa
        )
        layer.append(keys, values)
        rows = decoded(layer, (128, 128), 2, kind)
        sdpa = torch.nn.functional.scaled_dot_product_attention
        exact = sdpa(query.double(), rows[0].double(), rows[1].double(), enable_gqa=True)
        plain = sdpa(query, *rows, enable_gqa=True).double()
        output = torch.empty_like(query)
        layer.attend(query, output, scale=128**-0.5)
        # Decoding rounds to the model's dtype and attention does not: that distance belongs to neither.
        slack = {"float32": 2e-7, "float16": 2e-4, "bfloat16": 2e-3}[dtype]
        assert (output.double() - exact).abs().max() <= 2 * (plain - exact).abs().max() + slack, dtype


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_attention_at_every_head_size_is_that_on_decoded_rows(head_dim: int, isa: str) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    keys, values = (torch.randn(2, 2, 400, head_dim, generator=generator) for _ in range(2))
    for key_bits, value_bits, length in (("2", "1.6", 1), ("4", "2", 5), ("3", "1.5", 1), ("8", "raw", 9)):
        codecs = [_native.Codec(**codec_options(bits, head_dim, 128)) for bits in (key_bits, value_bits)]
        layer = _native.Layer(
            num_key_value_heads=2, keys=codecs[0], values=codecs[1], sinks=5, window=50, dtype="float32", isa=isa
        )
        layer.append(keys + 1.0, values)
        assert layer.packed_tokens == 345
        query = torch.randn(2, 8, length, head_dim, generator=generator)
        output = torch.empty_like(query)
        layer.attend(query, output, scale=head_dim**-0.5, causal=True)
        rows = decoded(layer, (head_dim, head_dim), 2, torch.float32)
        mask = torch.ones(length, 400, dtype=torch.bool).tril(400 - length)
        wanted = torch.nn.functional.scaled_dot_product_attention(query, *rows, attn_mask=mask, enable_gqa=True)
        torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5, msg=f"K{key_bits} V{value_bits}")


def bytes_of_codes(bits: str, width: int) -> int:
    """The table of FORMAT.md section 1; raw rows are float32 here."""
    return {
        "8": width,
        "4": width // 2,
        "3": width // 4 + width // 8,
        "2": width // 4,
        "1.6": math.ceil(width / 5),
        "1.5": width // 8 + width // 16,
        "raw": 4 * width,
    }[bits]


BYTES_OF_METADATA = {"e4m3": 1, "fp16": 2}
STORED: dict[str, tuple[tuple[str, dict[str, Any]], tuple[str, dict[str, Any]]]] = {
    "the default's": (("2", {"scale_exponent": 0.5}), ("1.6", {"scale_exponent": 0.0})),
    "groups": (("4", {"group_size": 32}), ("3", {"group_size": 64, "metadata": "fp16"})),
    "zero points": (("2", {"group_size": 32, "symmetric": False}), ("1.5", {"group_size": 64})),
    "fp16": (("8", {"metadata": "fp16", "symmetric": False}), ("raw", {})),
}


@pytest.mark.parametrize("block", [0, 128, 256])
@pytest.mark.parametrize("name", STORED)
def test_a_packed_token_takes_the_bytes_of_the_specification(name: str, block: int) -> None:
    """In a store that grows page by page, to the byte: codes, metadata, and what every block has of statistics."""
    widths, heads, batch, pages = (128, 192), 2, 3, 5
    codecs, row_bytes, statistics = [], [], 0
    for (bits, options), width in zip(STORED[name], widths, strict=True):
        if not block:
            options = {key: value for key, value in options.items() if key != "scale_exponent"}
        codecs.append(_native.Codec(**codec_options(bits, width, block, **options)))
        row = bytes_of_codes(bits, width)
        if bits != "raw":
            parts = 1 if options.get("symmetric", True) else 2
            row += (
                width // options.get("group_size", width) * BYTES_OF_METADATA[options.get("metadata", "e4m3")] * parts
            )
            scales = 1 if options.get("scale_exponent") == 0.0 else width  # all alike: one
            statistics += 2 * (width + scales)  # fp16
        row_bytes.append(row)
    expected = 256 * sum(row_bytes) + (256 // block * statistics if block else 0)
    layer = _native.Layer(
        num_key_value_heads=heads, keys=codecs[0], values=codecs[1], sinks=5, window=128, dtype="float32"
    )
    generator = torch.Generator().manual_seed(0)

    def grow(tokens: int) -> int:
        rows = (torch.randn(batch, heads, tokens, width, generator=generator) for width in widths)
        layer.append(*rows)
        return int(layer.nbytes)

    grow(5 + 128)
    sizes = [grow(256) for _ in range(pages)]
    assert layer.packed_tokens in (256 * pages, 256 * pages - 128)
    assert [b - a for a, b in pairwise(sizes)][1:] == [batch * heads * expected] * (pages - 2)
    assert [codec.row_bytes for codec, (bits, _) in zip(codecs, STORED[name], strict=True) if bits != "raw"] == [
        row for row, (bits, _) in zip(row_bytes, STORED[name], strict=True) if bits != "raw"
    ]


def test_errors_name_what_was_expected_and_change_nothing() -> None:
    native, _ = both_layers(codec_options("2", 64), codec_options("2", 64))
    rows = torch.randn(2, 2, 50, 64)
    native.append(rows, rows)
    before = regions(native), decoded(native, (64, 64), 2, torch.float32)
    broken = rows.clone()
    broken[1, 0, 7, 3] = torch.nan
    infinite = rows.clone()
    infinite[0, 1, 49, 0] = -torch.inf
    cases: list[tuple[Any, Any, list[str]]] = [
        (rows[0], rows, ["keys", "4", "batch"]),
        (rows[:, :1], rows, ["keys", "[2, 2, tokens ≥ 1, 64]", "[2, 1, 50, 64]"]),
        (rows, rows[..., :32], ["values", "64]", "32]"]),
        (rows, rows[:, :, :3], ["values", "50"]),
        (rows[:1], rows[:1], ["keys", "[2, 2", "[1, 2"]),
        (rows[:0], rows[:0], ["keys", "[0, 2"]),
        (rows[:, :, :0], rows[:, :, :0], ["keys", "tokens ≥ 1"]),
        (rows.half(), rows, ["keys", "float32", "float16"]),
        (rows, rows.long(), ["values", "int64"]),
        (rows, broken, ["values", "batch 1, head 0, token 7"]),
        (infinite, rows, ["keys", "batch 0, head 1, token 49"]),
        (rows.to("meta"), rows, ["keys"]),
        ("rows", rows, ["keys"]),
    ]
    for keys, values, names in cases:
        with pytest.raises(SkvqError) as error:
            native.append(keys, values)
        assert all(name in str(error.value) for name in names), str(error.value)
    after = regions(native), decoded(native, (64, 64), 2, torch.float32)
    assert before[0] == after[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True))
    for call, names in [
        (lambda: native.crop(51), ["length", "at most 50", "51"]),
        (lambda: native.gather([2]), ["indices", "0..2", "2"]),
        (lambda: native.gather([]), ["indices"]),
        (lambda: native.decode_keys(torch.empty(2, 2, 49, 64)), ["output", "[2, 2, 50, 64]"]),
        (lambda: native.decode_keys(torch.empty(2, 2, 50, 64).half()), ["output", "float32"]),
    ]:
        with pytest.raises(SkvqError) as error:
            call()
        assert all(name in str(error.value) for name in names), str(error.value)


def test_attend_refuses_what_does_not_fit() -> None:
    native, _ = both_layers(codec_options("2", 64), codec_options("2", 64))
    query, output = torch.randn(1, 4, 1, 64), torch.empty(1, 4, 1, 64)
    with pytest.raises(SkvqError, match="empty"):
        native.attend(query, output, scale=1.0)
    rows = torch.randn(1, 2, 20, 64)
    native.append(rows, rows)
    cases: list[tuple[torch.Tensor, torch.Tensor, dict[str, Any], str]] = [
        (query[:, :3], output, {}, "query"),
        (query[..., :32], output, {}, "query"),
        (query, output[:, :2], {}, "output"),
        (query, output.half(), {}, "output"),
        (query, output[:, :, :0], {}, "output"),
        (query, output, {"scale": float("nan")}, "scale"),
        (query, output, {"softcap": -1.0}, "softcap"),
        (query, output, {"mask": torch.ones(1, 1, 1, 19, dtype=torch.bool)}, "mask"),
        (query, output, {"sink_logits": torch.zeros(3)}, "sink_logits"),
        (query, output, {"fresh_keys": rows}, "fresh"),
        (query, output, {"fresh_keys": rows, "fresh_values": rows[:, :, :5]}, "fresh_values"),
        (query, query, {}, "output"),
        (query.clone().requires_grad_(), output, {}, "query"),
    ]
    for given_query, given_output, options, name in cases:
        with pytest.raises(SkvqError, match=name):
            native.attend(given_query, given_output, **({"scale": 1.0} | options))


def test_propagated_rows_stay_alone() -> None:
    keys, values = codec_options("2", 64, 128), codec_options("2", 64, 128)
    native, twin = both_layers(keys, values, nonfinite="propagate")
    rows = torch.randn(1, 2, 300, 64)
    rows[0, 1, 50, 3] = torch.nan
    for layer in (native, twin):
        layer.append(rows, rows)
    found, wanted = (decoded(layer, (64, 64), 2, torch.float32)[0] for layer in (native, twin))
    assert found[0, 1, 50].isnan().all()
    assert torch.equal(found.nan_to_num(), wanted.nan_to_num())
    assert found[0, 0].isfinite().all()
    assert found[0, 1, 51:].isfinite().all()


def test_growing_never_copies_the_past() -> None:
    """The memory of a long prompt is what its bytes say, and the most ever held is near what is held at the end."""
    keys, values = codec_options("2", 128), codec_options("1.6", 128)
    native, _ = both_layers(keys, values, heads=4, sinks=5, window=128)
    chunk = torch.randn(1, 4, 2048, 128)
    process = psutil.Process()
    native.append(chunk, chunk)
    base, held = process.memory_info().rss, native.nbytes
    peak = 0
    for _ in range(63):
        native.append(chunk, chunk)
        peak = max(peak, process.memory_info().rss)
    grown, final = native.nbytes - held, process.memory_info().rss - base
    assert native.length == 131072
    packed = native.packed_tokens // 128 * 128 * 4 * ((32 + 1) + (26 + 1))
    assert packed <= native.nbytes <= packed * 1.02 + 4 * 2 * 200 * 128 * 4
    assert peak - base <= 1.1 * max(final, grown)
    assert final <= 1.1 * grown + 2**22


def test_a_shared_prompt_is_stored_once() -> None:
    native, _ = both_layers(codec_options("2", 64), codec_options("2", 64))
    rows = torch.randn(1, 2, 1000, 64)
    native.append(rows, rows)
    alone = native.nbytes
    native.gather([0] * 8)
    assert native.nbytes == alone
    step = torch.randn(8, 2, 1, 64)
    native.append(step, step)
    assert native.nbytes < alone + 8 * 2 * 2 * (128 * 17 + 3 * 12 * 64 * 4)
    clone = native.clone()
    native.append(step, step)
    assert clone.length + 1 == native.length


def native_layer(isa: str) -> Any:
    keys, values = (_native.Codec(**codec_options(bits, 64)) for bits in ("2", "1.5"))
    return _native.Layer(num_key_value_heads=2, keys=keys, values=values, sinks=3, window=8, dtype="float32", isa=isa)


def test_threads_and_isas_agree() -> None:
    rows = torch.randn(1, 2, 5000, 64)
    query = torch.randn(1, 8, 1, 64)
    outputs = []
    threads = _native.num_threads()
    try:
        for isa in _native.available_isas():
            for count in (1, 3):
                _native.set_num_threads(count)
                assert _native.num_threads() == count
                layer = native_layer(isa)
                layer.append(rows, rows)
                outputs.append(torch.empty_like(query))
                layer.attend(query, outputs[-1], scale=0.125)
                assert layer.isa == isa
    finally:
        _native.set_num_threads(threads)
    assert all(torch.allclose(outputs[0], output, atol=1e-5) for output in outputs)
    with pytest.raises(SkvqError, match="threads"):
        _native.set_num_threads(0)
    with pytest.raises(SkvqError, match="isa"):
        native_layer("mmx")
