"""Options: defaults, what is refused and how, changes, and the way through dictionaries and JSON."""

import dataclasses
import json
from typing import Any

import pytest
import torch

import parts_examples
from skvq import SkvqConfig, SkvqError, StreamOptions
from skvq.plan import LayerPlan, StreamPlan


def refused(*words: str) -> Any:
    """An SkvqError whose message names all of `words`."""
    return pytest.raises(SkvqError, match="(?s)" + "".join(f"(?=.*{word})" for word in words))


def test_defaults() -> None:
    config = SkvqConfig()
    assert (config.key_bits, config.value_bits) == (2, 1.6)
    assert (config.group_size, config.window, config.sinks, config.nonfinite) == (None, 128, 5, "raise")
    assert (config.keys.format, config.values.format) == ("2", "1.6")
    assert config.keys.is_packed
    assert config == SkvqConfig(key_bits=2, value_bits=1.6)
    assert hash(config) == hash(SkvqConfig())


@pytest.mark.parametrize(
    ("bits", "name"), [(16, "raw"), (8, "8"), (4.0, "4"), (3, "3"), (2, "2"), (1.6, "1.6"), (1.5, "1.5")]
)
def test_all_widths(bits: float, name: str) -> None:
    config = SkvqConfig(key_bits=bits, value_bits=bits)
    assert config.keys.format == config.values.format == name
    assert config.keys.is_packed == (bits != 16)


@pytest.mark.parametrize("bits", [1, 5, 1.58, "2", True, None, float("nan")])
def test_other_widths_are_refused(bits: Any) -> None:
    with refused("bits=", "16, 8, 4, 3, 2, 1.6, 1.5"):
        StreamOptions(bits=bits)
    if bits is not None:
        with refused("value_bits="):
            SkvqConfig(value_bits=bits)


BAD_STREAM_OPTIONS = [
    ("group_size", 8),
    ("group_size", 64.0),
    ("group_size", True),
    ("metadata", "fp8"),
    ("symmetric", 1),
    ("codebook", "nf4"),
    ("codebook", []),
    ("codebook", [0.0, 1.0, 2.0]),
    ("codebook", [0.0, 1.0, 1.0, 2.0]),
    ("codebook", [-3.0, -2.0, -1.0, 0.0]),
    ("codebook", [0.0, 1.0, 2.0, float("inf")]),
    ("codebook", 3),
    ("rule", "max"),
    ("clip", 0.0),
    ("clip", float("nan")),
    ("clip", "0.9"),
    ("refinements", -1),
    ("refinements", 1.0),
    ("rotation", "dct"),
    ("block", 100),
    ("block", -128),
    ("block_shift", None),
    ("scale_exponent", 1.5),
    ("scale_exponent", None),
]


@pytest.mark.parametrize(("name", "value"), BAD_STREAM_OPTIONS)
def test_stream_options_name_what_they_refuse(name: str, value: Any) -> None:
    with refused(f"{name}=", "expected"):
        StreamOptions(bits=2, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("window", 0), ("window", 1.0), ("sinks", -1), ("sinks", "5"), ("nonfinite", "ignore"), ("group_size", 0)],
)
def test_config_names_what_it_refuses(name: str, value: Any) -> None:
    with refused(f"{name}=", "expected"):
        SkvqConfig(**{name: value})


def test_unknown_options_are_refused() -> None:
    with refused("bits_of_keys=2", "key_bits"):
        SkvqConfig.from_options(bits_of_keys=2)
    with refused("keys=grup_size=32", "group_size"):
        SkvqConfig(keys={"grup_size": 32})  # type: ignore[arg-type]
    with refused("keys=3", "StreamOptions"):
        SkvqConfig(keys=3)  # type: ignore[arg-type]
    with refused("skvq_config=3", "SkvqConfig"):
        SkvqConfig.from_options(3)  # type: ignore[arg-type]


def test_pairs_need_eight_codewords() -> None:
    pairs = [(0.1 * i, -0.1 * i) for i in range(8)]
    assert StreamOptions(bits=1.5, codebook=pairs).codebook == tuple(pairs)  # type: ignore[arg-type]
    with refused("codebook=", "8 pairs"):
        StreamOptions(bits=1.5, codebook=tuple(range(8)))
    with refused("codebook='uniform'", "lloyd-max"):
        StreamOptions(bits=1.5, codebook="uniform")


def test_codebook_and_rule_follow_the_width() -> None:
    chosen = {bits: StreamOptions(bits=bits).resolved() for bits in (8, 4, 2, 1.6, 1.5)}
    assert {bits: (x.codebook, x.rule) for bits, x in chosen.items()} == {
        8: ("uniform", "range"),
        4: ("lloyd-max", "norm"),
        2: ("uniform", "norm"),
        1.6: ("lloyd-max", "norm"),
        1.5: ("lloyd-max", "norm"),
    }
    assert StreamOptions(bits=4, codebook="uniform").resolved().rule == "range"
    assert StreamOptions(bits=2, codebook="uniform").resolved().rule == "range"
    assert StreamOptions(bits=2, codebook="lloyd-max").resolved().rule == "norm"
    assert StreamOptions(bits=4, codebook="uniform", rule="norm").resolved().rule == "norm"
    assert StreamOptions(bits=16).resolved() == StreamOptions(bits=16)
    with refused("bits=8: codebook='lloyd-max'", "'uniform'"):
        StreamOptions(bits=8, codebook="lloyd-max")


def test_streams_and_outer_options_are_joined() -> None:
    config = SkvqConfig(key_bits=4, group_size=32, keys={"rotation": "identity"})  # type: ignore[arg-type]
    assert config.keys == dataclasses.replace(SkvqConfig().keys, bits=4, group_size=32, rotation="identity")
    assert config.values.group_size == 32
    assert SkvqConfig(keys=StreamOptions(bits=3)).key_bits == 3
    with refused("key_bits=2", "expected 3", "keys.bits"):
        SkvqConfig(key_bits=2, keys=StreamOptions(bits=3))
    with refused("group_size=64", "expected 32"):
        SkvqConfig(group_size=64, values=StreamOptions(bits=3, group_size=32))


def test_replace_reaches_into_the_streams() -> None:
    config = SkvqConfig(key_bits=4, group_size=32)
    assert config.replace(key_bits=3, window=7) == SkvqConfig(key_bits=3, group_size=32, window=7)
    assert config.replace(group_size=64) == SkvqConfig(key_bits=4, group_size=64)
    changed = config.replace(values={"clip": 0.9})
    assert changed.values == dataclasses.replace(config.values, clip=0.9)
    assert changed.keys == config.keys
    assert config.replace(keys=StreamOptions(bits=8)).key_bits == 8
    levels = [-2.0, -1.0, -0.5, -0.1, 0.1, 0.5, 1.0, 2.0]
    assert config.replace(key_bits=3, keys={"codebook": levels}).keys.codebook == tuple(levels)
    assert SkvqConfig.from_options(config, value_bits=1.5).value_bits == 1.5
    assert dataclasses.replace(config, window=9).window == 9


@pytest.mark.parametrize(
    "config",
    [
        SkvqConfig(),
        SkvqConfig(key_bits=16, value_bits=1.5, window=1, sinks=0, nonfinite="propagate"),
        SkvqConfig(keys=StreamOptions(bits=2, codebook=(-1.5, -0.5, 0.5, 1.5), group_size=32, symmetric=False)),
        SkvqConfig(values=StreamOptions(bits=1.5, codebook=tuple((float(i), -float(i)) for i in range(8)))),
    ],
)
def test_dictionaries_and_json(config: SkvqConfig) -> None:
    assert SkvqConfig.from_dict(config.to_dict()) == config
    assert SkvqConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == config.to_dict()


def test_bad_json_is_refused() -> None:
    with refused("text=", "JSON"):
        SkvqConfig.from_json("{")
    with refused("values=", "mapping"):
        SkvqConfig.from_json("[]")


def test_nothing_can_be_assigned() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SkvqConfig().window = 3  # type: ignore[misc]


# ---- parts

PARTS = ((4, 16), (1, 32), (0, 16))


def test_parts_bring_their_bits() -> None:
    options = StreamOptions(parts=[[4, 16], [1.0, 32], [0, 16]])  # type: ignore[list-item, arg-type]
    assert options.parts == PARTS
    assert [type(bits) for bits, _ in options.parts] == [int] * 3
    assert (options.bits, options.format) == (1.5, "parts")
    assert (options.is_packed, options.rotation, options.codebook) == (True, "identity", None)
    assert options == StreamOptions(bits=options.bits, parts=PARTS) == dataclasses.replace(options)
    assert (options.resolved().rule, options.resolved().metadata) == ("norm", "e4m3")
    assert options.resolved().resolved() == options.resolved()
    assert StreamOptions(parts=PARTS, metadata="fp16").resolved().metadata == "fp16"
    assert StreamOptions(**json.loads(json.dumps(options.to_dict()))) == options
    assert StreamOptions().parts is None
    assert "parts" not in StreamOptions().to_dict()
    assert hash(options) == hash(dataclasses.replace(options, parts=PARTS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "bits=2: expected 1.5"),
        ({"group_size": 32}, "group_size=32: expected None with parts"),
        ({"symmetric": False}, "symmetric=False: expected True with parts"),
        ({"codebook": "nf4"}, "codebook='nf4': expected None or 'lloyd-max' or 'uniform' with parts"),
        ({"codebook": (-1.0, 1.0)}, "codebook="),
        ({"rule": "range"}, "rule='range': expected None or 'norm' with parts"),
        ({"refinements": 1}, "refinements=1: expected 0 with parts"),
        ({"unbiased": True}, "unbiased=True: expected False with parts"),
        ({"block": 128}, "block=128: expected 0 with parts"),
        ({"block_shift": False}, "block_shift=False: expected True with parts"),
        ({"scale_exponent": 0.5}, "scale_exponent=0.5: expected 1.0 with parts"),
        ({"clip": 0}, "clip=0: expected"),
        ({"metadata": "fp8"}, "metadata='fp8': expected"),
        ({"parts": ()}, "parts=.*: expected pairs"),
        ({"parts": 3}, "parts=3: expected pairs"),
        ({"parts": (3,)}, "parts: 3: expected a pair"),
        ({"parts": ((1.6, 16),)}, "parts: bits=1.6: expected one of 5, 4, 3, 2, 1, 0"),
        ({"parts": ((2, 24),)}, "parts: width=24: expected a positive multiple of 16"),
        ({"parts": ((2, 16.0),)}, "parts: width=16.0: expected"),
        ({"parts": ((0, 64),)}, "expected 0 bits for the last part only"),
        ({"parts": ((2, 16), (0, 16), (1, 16))}, "expected 0 bits for the last part only"),
    ],
)
def test_what_does_not_go_with_parts_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SkvqError, match=message):
        StreamOptions(**{"parts": PARTS} | options)


def test_a_config_of_parts() -> None:
    plain = StreamOptions(parts=PARTS)
    for config in (SkvqConfig(keys=plain), SkvqConfig(keys={"parts": PARTS}, values={"clip": 0.9})):  # type: ignore[arg-type]
        assert (config.keys, config.key_bits) == (plain, plain.bits)
        assert SkvqConfig.from_dict(config.to_dict()) == config == SkvqConfig.from_json(config.to_json())
        assert config.replace(window=7).keys == plain
        assert config.replace(keys={"clip": 1.2}).keys == dataclasses.replace(plain, clip=1.2)
        assert config.replace(keys={"parts": ((2, 32), (3, 32))}).key_bits == 2.5
        assert config.replace(key_bits=3, keys={"parts": None}).keys.bits == 3
        with refused("bits=3", "expected 1.5"):
            config.replace(key_bits=3)
    assert SkvqConfig().replace(keys={"parts": PARTS}).keys == plain
    with refused("key_bits=3", "expected 1.5", "keys.bits"):
        SkvqConfig(key_bits=3, keys=plain)
    with refused("group_size=64", "with parts"):
        SkvqConfig(group_size=64, keys=plain)


PARTS_STATIC = parts_examples.static_data(64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"matrix": None}, "keys: matrix: expected one with parts"),
        ({"inverse": None}, "keys: inverse: expected one with parts"),
        ({"scale": torch.ones(2, 64)}, "keys: scale: expected none with parts"),
        ({"permutation": tuple(range(64))}, "keys: permutation: expected none with parts"),
        ({"frequencies": None}, "keys: frequencies: expected one for a mean that turns"),
        ({"shift_sine": None}, "keys: shift_sine: expected one for a mean that turns"),
        ({"shift": None}, "keys: shift: expected one for a mean that turns"),
        ({"inverse": PARTS_STATIC["inverse"][:1]}, r"inverse: torch.float32 \[1, 64, 64\], expected .* \[2, 64, 64\]"),
        ({"matrix": PARTS_STATIC["matrix"].double()}, "matrix: torch.float64"),
        ({"shift": torch.zeros(64)}, r"shift: .* expected torch.float32 \[2, 64\]"),
        ({"frequencies": torch.zeros(32)}, r"frequencies: .* expected torch.float32 \[64\]"),
        ({"noise": torch.full((64,), torch.nan)}, "noise: expected finite numbers"),
        ({"noise": torch.full((64,), -1.0)}, "noise: -1.0, expected no negative number"),
        ({"options": StreamOptions(parts=PARTS[:2])}, "expected widths that add up to head_dim=64"),
        ({"options": StreamOptions(bits=2)}, "keys: shift_sine: expected none without parts"),
    ],
)
def test_static_data_of_parts_is_checked(change: dict[str, Any], message: str) -> None:
    given = {"options": StreamOptions(parts=PARTS)} | PARTS_STATIC
    StreamPlan(**given).check("keys", 64)
    with pytest.raises(SkvqError, match=message):
        StreamPlan(**given | change).check("keys", 64)
    with pytest.raises(SkvqError, match="values: noise: expected none for values"):
        StreamPlan(**given).check("values", 64)


# ---- plans


@pytest.mark.parametrize("bits", [16, 8, 4, 3, 2, 1.6, 1.5])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256])
def test_every_width_fits_every_head(bits: float, head_dim: int) -> None:
    plan = LayerPlan.from_config(SkvqConfig(key_bits=bits, value_bits=bits))
    layer = plan.build(2, head_dim, head_dim, torch.float16)
    layer.append(torch.randn(1, 2, 600, head_dim).half(), torch.randn(1, 2, 600, head_dim).half())
    assert layer.length == 600
    codec = plan.keys.codec("keys", head_dim)
    assert codec.format == plan.keys.options.format
    assert codec.group_size == (128 if head_dim % 128 == 0 else head_dim) or bits == 16


@pytest.mark.parametrize(("head_dim", "group"), [(80, 32), (96, 64), (64, 128), (128, 48), (192, 128)])
def test_groups_must_divide_the_head(head_dim: int, group: int) -> None:
    plan = StreamPlan(StreamOptions(bits=2, group_size=group))
    with refused(f"group_size={group}", "expected", f"head_dim={head_dim}"):
        plan.check("keys", head_dim)


def test_heads_are_multiples_of_sixteen() -> None:
    with refused("values", "head_dim=72", "multiple of 16"):
        LayerPlan.from_config(SkvqConfig()).check(128, 72)


def test_static_data_reaches_the_codec() -> None:
    shift, scale = torch.randn(2, 32), torch.rand(2, 32) + 0.5
    order = tuple(torch.randperm(32).tolist())
    plan = StreamPlan(StreamOptions(bits=8), shift=shift, scale=scale, permutation=order)
    rows = shift[1] + scale[1] * torch.randn(50, 32)
    codec = plan.codec("keys", 32)
    decoded = torch.from_dlpack(codec.decode(codec.encode(rows, 1), 1))
    assert (decoded - rows).abs().max() < 0.3
    assert not torch.equal(torch.from_dlpack(codec.decode(codec.encode(rows, 1), 0)), decoded)


def test_keys_and_values_have_blocks_of_one_size() -> None:
    assert SkvqConfig(keys={"block": 128}).values.block == 128
    assert SkvqConfig(values=StreamOptions(bits=2, block=512)).keys.block == 512
    assert SkvqConfig(keys={"block": 0}).values.block == 0
    assert SkvqConfig(keys={"block": 0}, values={"block": 256}).keys.block == 0
    assert SkvqConfig(key_bits=16, keys={"block": 128}, values={"block": 256}).values.block == 256
    with pytest.raises(SkvqError, match=r"keys\.block=128, values\.block=256"):
        SkvqConfig(keys={"block": 128}, values={"block": 256})
