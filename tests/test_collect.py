"""Calibration statistics: every moment against plain float64 arithmetic, and passes that stop and go on."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import tiny_models
from skvq import SkvqError
from skvq.calibrate import Statistics, collect
from skvq.calibrate.collect import sample_slot
from skvq.calibrate.moments import AttentionMoments, StreamMoments
from skvq.calibrate.turning import TurnedMoments, Turning, find_turning
from skvq.evaluate.rope import Rotary
from skvq.model_layers import cache_argument
from skvq.reference_parts import turn_tables
from skvq.sinks import sink_scores

SINKS, BLOCK, WINDOW, LAYER = 3, 32, 16, 1
OPTIONS: dict[str, Any] = {
    "sinks": SINKS,
    "block": BLOCK,
    "window": WINDOW,
    "sample_tokens": 160,
    "sample_length": 80,
    "query_stride": 4,
    "attention_stride": 3,
    "sink_search": 0,
}
# positions whose keys are far from all others of `LAYER` and whose values are short, up to the last that is searched
PLANTED = (2, 11, SINKS + WINDOW - 1)
CHUNKS = [tiny_models.prompts(1, length, seed)[0] for seed, length in enumerate((120, 67, 101, 35, 99))]


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_models.build("llama")


@pytest.fixture(scope="module")
def statistics(llama: Any) -> Statistics:
    return collect(llama, CHUNKS, before_rope=True, texts={"a.txt": "00"}, **OPTIONS)


@contextmanager
def planted(model: Any) -> Iterator[None]:
    """Makes the tokens at `PLANTED` sinks of `LAYER` by their looks."""
    attention = model.model.layers[LAYER].self_attn

    def far(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, [t for t in PLANTED if t < output.shape[1]]] += 30.0 * output.std()
        return output

    def short(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[:, [t for t in PLANTED if t < output.shape[1]]] *= 0.05
        return output

    hooks = [attention.k_proj.register_forward_hook(far), attention.v_proj.register_forward_hook(short)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def record_rows(llama: Any) -> list[dict[str, torch.Tensor]]:
    """For every chunk the rows of `LAYER`, float64, in a way that has nothing to do with `collect`."""
    chunks: list[dict[str, torch.Tensor]] = []
    attention = llama.model.layers[LAYER].self_attn

    def record(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if module is attention:
            rows = {"queries": query * kwargs["scaling"], "keys": key, "values": value}
            chunks[-1] |= {name: x[0].double() for name, x in rows.items()}
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    def before_rope(module: Any, args: Any, output: torch.Tensor) -> None:
        chunks[-1]["keys_before_rope"] = output[0].unflatten(-1, (2, -1)).transpose(0, 1).double()

    AttentionInterface.register("test_record", record)
    hook = attention.k_proj.register_forward_hook(before_rope)
    llama.set_attn_implementation("test_record")
    with torch.no_grad():
        for ids in CHUNKS:
            chunks.append({})
            llama(ids[None], use_cache=False)
    hook.remove()
    llama.set_attn_implementation("sdpa")
    return chunks


@pytest.fixture(scope="module")
def recorded(llama: Any) -> list[dict[str, torch.Tensor]]:
    return record_rows(llama)


class Case(NamedTuple):
    """A pass, the rows it has read, and the tokens that are sinks of `LAYER`."""

    statistics: Statistics
    chunks: list[dict[str, torch.Tensor]]
    sinks: tuple[int, ...]


@pytest.fixture(scope="module")
def chosen(llama: Any) -> Case:
    """The sinks are those that look like it."""
    with planted(llama):
        found = collect(llama, CHUNKS, before_rope=True, **(OPTIONS | {"sink_search": 64}))
        return Case(found, record_rows(llama), PLANTED)


@pytest.fixture(params=["first", "chosen"])
def case(
    request: pytest.FixtureRequest, statistics: Statistics, recorded: list[dict[str, torch.Tensor]], chosen: Case
) -> Case:
    return chosen if request.param == "chosen" else Case(statistics, recorded, tuple(range(SINKS)))


def others(length: int, sinks: tuple[int, ...]) -> list[int]:
    """All positions but those of the sinks."""
    return [t for t in range(length) if t not in sinks]


def rows_of(case: Case, name: str) -> torch.Tensor:
    """All rows but the sinks' [Hkv, n, D]; queries behind the first ones, of a kv head's group one after the other."""
    if name == "queries":
        parts = [chunk[name][:, SINKS:].unflatten(0, (2, -1)).flatten(1, 2) for chunk in case.chunks]
    else:
        parts = [chunk[name][:, others(chunk[name].shape[1], case.sinks)] for chunk in case.chunks]
    return torch.cat(parts, dim=1)


def covariance(rows: torch.Tensor) -> torch.Tensor:
    centred = rows - rows.mean(1, keepdim=True)
    return torch.einsum("hnd,hne->hde", centred, centred) / rows.shape[1]


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-6) -> None:
    """Within a share of the largest magnitude."""
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


# ---- moments


@pytest.mark.parametrize("name", ["keys", "values", "queries", "keys_before_rope"])
def test_moments_are_those_of_all_rows(case: Case, name: str) -> None:
    found: StreamMoments = getattr(case.statistics.layers[LAYER], name)
    rows = rows_of(case, name)
    assert int(found.count) == rows.shape[1]
    assert_close(found.mean, rows.mean(1), 1e-5 if name == "keys_before_rope" else 2e-6)
    assert_close(found.covariance, covariance(rows))
    assert_close(found.variance, rows.var(1, correction=0))
    assert_close(found.second_moment, torch.einsum("hnd,hne->hde", rows, rows) / rows.shape[1])
    assert_close(found.low.double(), rows.amin(1))
    assert_close(found.high.double(), rows.amax(1))


@pytest.mark.parametrize("name", ["keys", "values", "keys_before_rope"])
def test_block_covariance_is_about_each_blocks_mean(case: Case, name: str) -> None:
    found: StreamMoments = getattr(case.statistics.layers[LAYER], name)
    chunks = [rows_of(case._replace(chunks=[chunk]), name) for chunk in case.chunks]
    blocks = [block for rows in chunks for block in rows.split(BLOCK, dim=1) if block.shape[1] == BLOCK]
    assert int(found.block_count) == BLOCK * len(blocks)
    assert_close(found.block_covariance, torch.stack([covariance(block) for block in blocks]).mean(0))


@pytest.mark.parametrize("probability", [0.0, 0.01, 0.25, 0.5, 0.9, 1.0])
def test_quantiles_within_a_bin(
    statistics: Statistics, recorded: list[dict[str, torch.Tensor]], probability: float
) -> None:
    case = Case(statistics, recorded, tuple(range(SINKS)))
    for name in ("keys", "values", "queries"):
        found: StreamMoments = getattr(statistics.layers[LAYER], name)
        assert int(found.histogram.sum(-1).unique()) == int(found.count)
        expected = torch.quantile(rows_of(case, name), probability, dim=1, interpolation="nearest")
        # the two neighbours of the exact position may be further apart than a bin
        rows = rows_of(case, name).sort(dim=1).values
        position = probability * (rows.shape[1] - 1)
        gap = rows[:, min(int(position) + 1, rows.shape[1] - 1)] - rows[:, max(int(position) - 1, 0)]
        assert bool(((found.quantile(probability) - expected).abs() <= found.width + gap).all())


def test_rows_far_from_the_first_ones_are_counted() -> None:
    moments = StreamMoments.empty(1, 2, torch.device("cpu"))
    first = torch.stack([torch.full((4,), 7.0), torch.arange(4.0)], dim=-1)[None]
    moments.update(first, 0)
    moments.update(first * -1e6, 0)
    assert moments.histogram.sum(-1).tolist() == [[8, 8]]
    assert moments.quantile(0.0).tolist() == [[-7e6, -3e6]]
    assert moments.quantile(1.0).tolist() == [[7.0, 3.0]]
    assert_close(moments.mean, torch.cat([first, first * -1e6], dim=1).double().mean(1))


def test_attention_moments(case: Case) -> None:
    found = case.statistics.layers[LAYER].attention
    assert found is not None
    expected = {name: torch.zeros_like(x) for name, x in vars(found).items()}
    token_weights = []
    for chunk in case.chunks:
        length = chunk["keys"].shape[1]
        kept = others(length, case.sinks)
        token_weight = torch.zeros(2, length, dtype=torch.float64)
        for head, q in ((h // 2, chunk["queries"][h]) for h in range(4)):
            keys, values = chunk["keys"][head], chunk["values"][head]
            for now in range(OPTIONS["attention_stride"] - 1, length, OPTIONS["attention_stride"]):
                p = (keys[: now + 1] @ q[now]).softmax(0)
                sinks = [t for t in case.sinks if t <= now]
                packed = [t for t in kept if t <= now - WINDOW]
                window = [t for t in kept if now - WINDOW < t <= now]
                expected["mass"][head] += torch.stack([p[x].sum() for x in (sinks, packed, window)])
                output = p @ values[: now + 1]
                expected["output_moment"][head] += torch.outer(output, output)
                distance = (values[packed] - output).square().sum(-1)
                weight = (p[packed].square() * distance).sum()
                expected["query_weight"][head] += weight
                expected["query_moment"][head] += weight * torch.outer(q[now], q[now])
                token_weight[head, packed] += p[packed].square()
        expected["value_weight"] += token_weight.sum(1)
        expected["value_sum"] += torch.einsum("hn,hnd->hd", token_weight, chunk["values"])
        expected["value_moment"] += torch.einsum("hn,hnd,hne->hde", token_weight, chunk["values"], chunk["values"])
        token_weights.append(token_weight[:, kept])
    for name, value in expected.items():
        assert_close(getattr(found, name), value, 1e-5)
    rows, weight = rows_of(case, "values"), torch.cat(token_weights, dim=1)
    centred = rows - rows.mean(1, keepdim=True)
    direct = torch.einsum("hn,hnd,hne->hde", weight / weight.sum(1, keepdim=True), centred, centred)
    assert_close(found.weighted_value_covariance(rows.mean(1)), direct, 1e-5)


# ---- which tokens are left out


def test_every_layer_has_sinks_of_its_own(llama: Any, chosen: Case) -> None:
    ids = CHUNKS[0]
    with planted(llama), torch.no_grad():
        one = collect(llama, [ids], **(OPTIONS | {"sink_search": 64}))
        cache = DynamicCache(config=llama.config)
        llama(ids[None], **cache_argument(llama, cache))
    found = []
    for index, layer in one.layers.items():
        rows = cache.layers[index]
        span = SINKS + WINDOW
        sinks = sink_scores(rows.keys[:, :, :span], rows.values[:, :, :span])[0].topk(SINKS).indices.tolist()
        assert_close(layer.keys.mean, rows.keys[0, :, others(len(ids), sinks)].double().mean(1))
        found.append(sorted(sinks))
    assert found[LAYER] == sorted(PLANTED)
    assert found[0] != found[LAYER]


@pytest.mark.parametrize(
    ("options", "length"),
    [({"sink_search": 64}, SINKS + WINDOW - 1), ({"sink_search": 11}, 10), ({"sink_search": SINKS}, 60)],
)
def test_without_a_choice_the_first_tokens_are_left_out(llama: Any, options: dict[str, Any], length: int) -> None:
    """In chunks too short for it, or if there is nothing to choose from."""
    with planted(llama):
        found, expected = (
            collect(llama, [CHUNKS[0][:length]], before_rope=True, **(OPTIONS | x)) for x in (options, {})
        )
    for name, tensor in expected._tensors().items():
        assert torch.equal(found._tensors()[name], tensor), name


def test_no_sinks_at_all(llama: Any) -> None:
    with planted(llama):
        found = collect(llama, CHUNKS, **(OPTIONS | {"sinks": 0, "sink_search": 64}))
    assert int(found.layers[LAYER].keys.count) == found.tokens
    assert found.layers[LAYER].attention is not None
    assert not found.layers[LAYER].attention.mass[:, 0].any()


def test_sinks_of_attention_may_lie_in_the_window() -> None:
    """A sink counts as one from its own query on, and never as packed."""
    generator = torch.Generator().manual_seed(2)
    keys, values = torch.zeros(1, 6, 4), torch.randn(1, 6, 4, generator=generator)
    moments = AttentionMoments.empty(1, 4, 4, torch.device("cpu"))
    is_sink = torch.tensor([False, False, True, False, False, False])
    moments.update(torch.zeros(1, 6, 4), keys, values, is_sink=is_sink, window=2, stride=1)
    # every token seen gets the same: of the queries 0 to 5 there are 0, 0, 1, 2, 2, 3 tokens packed with it, if at all
    packed = 1 / 3 + 2 / 4 + 2 / 5 + 3 / 6
    sinks = 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6
    assert_close(moments.mass, torch.tensor([[sinks, packed, 6.0 - sinks - packed]], dtype=torch.float64), 1e-6)


# ---- the mean that turns


def turned_by_hand(case: Case, model: Any, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """In two passes with the model's own rotation: the mean before RoPE, and the covariance about it, rotated."""
    rope = Rotary(model)(layer)
    kept = [others(chunk["keys"].shape[1], case.sinks) for chunk in case.chunks]
    plain = [
        rope.back(chunk["keys"][None].float(), 0)[0, :, rows].double()
        for chunk, rows in zip(case.chunks, kept, strict=True)
    ]
    mean = torch.cat(plain, dim=1).mean(1)
    centred = []
    for chunk, rows in zip(case.chunks, kept, strict=True):
        means = mean[None, :, None].expand(-1, -1, chunk["keys"].shape[1], -1).float()
        centred.append((chunk["keys"] - rope.forward(means, 0)[0])[:, rows])
    z = torch.cat(centred, dim=1)
    return mean, z.mT @ z / z.shape[1]


def test_covariance_about_the_turned_mean_is_that_of_two_passes(case: Case, llama: Any) -> None:
    found = case.statistics.layers[LAYER].keys_turned
    assert found is not None
    mean, expected = turned_by_hand(case, llama, LAYER)
    assert int(found.count) == int(case.statistics.layers[LAYER].keys.count)
    assert_close(found.mean, mean, 1e-5)
    assert_close(found.covariance, expected, 1e-5)
    # the first chunk alone has another mean, which is what the correction is for
    assert float(found.drift.abs().max()) > 0.02 * float(mean.abs().max())


def test_large_means_cost_no_precision() -> None:
    """Keys with a bias of a hundred deviations, in a model whose rotation leaves half of the channels alone.

    Of some positions, not one after the other, there are no keys.
    """
    generator = torch.Generator().manual_seed(1)
    turning = Turning(
        torch.tensor([0.7, 0.7, 0.0, 0.0]), torch.tensor([1, 0, 2, 3]), torch.tensor([-1.0, 1.0, 0.0, 0.0])
    )
    moments, rows = TurnedMoments.empty(1, turning), []
    for length in (50, 80, 30):
        plain = torch.randn(1, length - 3, 4, dtype=torch.float64, generator=generator) + 100.0
        positions = torch.tensor(others(length, (0, 7, 11)))
        cos, sin = turning.tables(positions)
        keys = plain * cos + turning.quarter(plain) * sin
        moments.update(keys.float(), positions)
        rows.append((plain, cos, sin))
    mean = torch.cat([plain for plain, _, _ in rows], dim=1).mean(1)
    z = [(x - mean[:, None]) * cos + turning.quarter(x - mean[:, None]) * sin for x, cos, sin in rows]
    z = torch.cat(z, dim=1)
    assert_close(moments.mean, mean, 1e-6)
    assert_close(moments.mean_sine, torch.tensor([[-1.0, 1.0, 0.0, 0.0]]) * mean[:, [1, 0, 2, 3]], 1e-6)
    assert_close(moments.covariance, z.mT @ z / z.shape[1], 2e-5)


def rotated(name: str, **options: Any) -> Any:
    """A tiny model of a family by the name of its configuration."""
    return transformers.AutoModelForCausalLM.from_config(tiny_models._config(name, **options))


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "rope_theta": 5e5, "original_max_position_embeddings": 512}
LLAMA3 |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 512}
LONGROPE |= {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    ("name", "options", "partners"),
    [
        ("LlamaConfig", {}, [8, 9, 10]),
        ("LlamaConfig", {"rope_parameters": YARN}, [8, 9, 10]),
        ("LlamaConfig", {"rope_parameters": LLAMA3}, [8, 9, 10]),
        ("Phi3Config", {"hidden_size": 128, "partial_rotary_factor": 0.5}, [8, 9, 10]),
        ("CohereConfig", {}, [1, 0, 3]),
        ("GlmConfig", {"head_dim": 32, "partial_rotary_factor": 0.5}, [1, 0, 3]),
    ],
)
def test_frequencies_and_pairs_of_a_models_rotation(name: str, options: dict[str, Any], partners: list[int]) -> None:
    model = rotated(name, **options)
    dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads
    # half precision tables would hide the angles, so they are asked for in float32
    rope = Rotary(model.to(torch.bfloat16).float(), torch.float32)(1)
    turning = find_turning(rope, dim)
    turns = turning.sign != 0.0
    assert int(turns.sum()) == 16
    assert turning.partner[:3].tolist() == partners
    assert set(turning.frequencies[turns].tolist()) == set(model.base_model.rotary_emb.inv_freq.tolist())
    assert not turning.frequencies[~turns].any()
    mean = torch.linspace(-3, 2, dim)
    factor = rope.forward(torch.ones(1, 1, 1, dim), 0)[0, 0, 0]
    scaled = (factor * mean).double()
    for position in (0, 1, 100, 5000):
        cos, sin = turn_tables(turning.frequencies, position, 1)
        found = scaled * cos + turning.quarter(scaled) * sin
        expected = rope.forward(mean[None, None, None], position)[0, 0]
        # a float32 angle near 5000 is known to 2.4e-4
        assert_close(found, expected.double(), 1e-6 + position * 2.0**-23)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        (
            "LlamaConfig",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}},
            "position 2048",
        ),
        ("Phi3Config", {"original_max_position_embeddings": 512, "rope_parameters": LONGROPE}, "position 512"),
        ("StableLmConfig", {}, "cannot be turned back"),
    ],
)
def test_other_rotations_leave_the_mean_static(name: str, options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    model = rotated(name, **options)
    before = model.base_model.rotary_emb.inv_freq.clone()
    found = collect(model, CHUNKS[:1], **OPTIONS)
    assert torch.equal(model.base_model.rotary_emb.inv_freq, before)
    for layer in found.layers.values():
        assert layer.keys_turned is None
        assert reason in layer.turning_refused
    found.save(tmp_path / "state")
    loaded = Statistics.load(tmp_path / "state")
    assert loaded.layers[0].keys_turned is None
    assert loaded.layers[0].turning_refused == found.layers[0].turning_refused


# ---- samples


def test_samples_are_the_rows_of_whole_chunks(statistics: Statistics, recorded: list[dict[str, torch.Tensor]]) -> None:
    slots = {}
    for number in range(len(CHUNKS)):
        slot = sample_slot(number, 2)
        if slot is not None:
            slots[slot] = number
    for slot, sample in statistics.layers[LAYER].samples.items():
        chunk = recorded[slots[slot]]
        length = min(80, chunk["keys"].shape[1])
        assert torch.equal(sample.keys.double(), chunk["keys"][:, :length])
        assert torch.equal(sample.values.double(), chunk["values"][:, :length])
        assert sample.query_positions.tolist() == list(range(3, length, 4))
        scaled = sample.queries * statistics.layers[LAYER].scaling
        assert torch.equal(scaled.double(), chunk["queries"][:, sample.query_positions])
    assert sorted(slots) == sorted(statistics.layers[LAYER].samples) == [0, 1]


def test_every_chunk_has_its_chance_of_a_sample() -> None:
    kept: dict[int, int] = {}
    for number in range(2000):
        slot = sample_slot(number, 100)
        if slot is not None:
            kept[slot] = number
    assert sorted(kept) == list(range(100))
    assert 800 < sum(kept.values()) / 100 < 1200


# ---- models


@pytest.mark.parametrize("family", [name for name in tiny_models.FAMILIES if tiny_models.PACKED_LAYERS[name]])
def test_every_family(family: str) -> None:
    model = tiny_models.build(family)
    before, ids = model.config._attn_implementation, tiny_models.prompts(1, 60)
    # interleaved or partly rotated embeddings would be refused, not counted wrongly
    found = collect(model, [ids], before_rope=True, **OPTIONS)
    assert model.config._attn_implementation == before
    cache = DynamicCache(config=model.config)
    model(ids, **cache_argument(model, cache))
    assert len(found.layers) == tiny_models.PACKED_LAYERS[family]
    for index, layer in found.layers.items():
        assert_close(layer.keys.mean, cache.layers[index].keys[0, :, SINKS:].double().mean(1), 1e-4)
        assert_close(layer.values.mean, cache.layers[index].values[0, :, SINKS:].double().mean(1), 1e-4)
        assert layer.keys_before_rope is not None
        assert layer.keys_turned is not None
        # YaRN's rotation of gpt-oss has a factor, which the mean that turns includes
        factor = getattr(model.base_model.rotary_emb, "attention_scaling", 1.0)
        assert_close(layer.keys_turned.mean, factor * layer.keys_before_rope.mean, 1e-4)
        assert layer.attention is not None
        queries = 20 * model.config.num_attention_heads
        # gpt-oss lets a part of the attention go nowhere
        assert float(layer.attention.mass.sum()) == pytest.approx(queries, rel=0.9 if family == "gpt-oss" else 1e-5)
    if family == "kv-shared" and getattr(model.config, "kv_sharing_modes", None):
        # layer 3 attends to what layer 1 stored; an older transformers does not say whose queries those are
        assert int(found.layers[1].queries.count) == 2 * 2 * (60 - SINKS)


def test_half_precision_stays_in_samples() -> None:
    model = tiny_models.build("qwen3").to(torch.bfloat16)
    found = collect(model, CHUNKS[:1], before_rope=True, **OPTIONS).layers[0]
    assert found.samples[0].keys.dtype == torch.bfloat16
    assert found.keys.mean.dtype == torch.float64
    # undone exactly up to the rounding of cos and sin
    assert found.keys_before_rope is not None
    both = (found.keys.second_moment, found.keys_before_rope.second_moment)
    powers = [x.diagonal(dim1=1, dim2=2).sum(-1) for x in both]
    assert_close(powers[0], powers[1], 2e-2)


def test_models_without_full_attention_are_refused() -> None:
    with pytest.raises(SkvqError, match="no layer of this mistral model has full attention"):
        collect(tiny_models.build("mistral-window"), CHUNKS)


def test_rows_that_are_not_finite_are_refused() -> None:
    model = tiny_models.build("llama")
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(SkvqError, match="layer 1: values of chunk 0 have NaN or infinity"):
        collect(model, CHUNKS, **OPTIONS)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("chunk", [torch.ones(SINKS, dtype=torch.int64), torch.ones(2, 9, dtype=torch.int64), [1, 2]])
def test_chunks_are_checked(llama: Any, chunk: Any) -> None:
    with pytest.raises(SkvqError, match=r"chunk 1: got .*, expected token numbers"):
        collect(llama, [CHUNKS[0], chunk], **OPTIONS)


@pytest.mark.parametrize(
    "options", [{"block": 0}, {"sinks": -1}, {"sink_search": -1}, {"before_rope": 1}, {"samples": 3}]
)
def test_options_are_checked(llama: Any, options: dict[str, Any]) -> None:
    with pytest.raises(SkvqError, match=f"{next(iter(options))}=.*expected"):
        collect(llama, CHUNKS, **options)


# ---- files, interruptions


def test_a_continued_pass_ends_bit_for_bit_the_same(
    llama: Any, statistics: Statistics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, whole = tmp_path / "state.safetensors", tmp_path / "whole.safetensors"
    options: dict[str, Any] = {"before_rope": True, "texts": {"a.txt": "00"}, "state_path": state, **OPTIONS}

    def interrupted() -> Iterator[torch.Tensor]:
        yield from CHUNKS[:3]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(llama, interrupted(), save_every=2, **options)
    assert Statistics.load(state).chunks == 2
    # The function hides the module of its name.
    monkeypatch.setattr(sys.modules[collect.__module__], "SECONDS_BETWEEN_SAVES", 0.0)
    with pytest.raises(KeyboardInterrupt):
        collect(llama, interrupted(), save_every=8, **options)
    assert Statistics.load(state).chunks == 3
    collect(llama, CHUNKS, save_every=2, **options)
    statistics.save(whole)
    assert state.read_bytes() == whole.read_bytes()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["state.safetensors", "whole.safetensors"]


def test_files_hold_everything(statistics: Statistics, llama: Any, tmp_path: Path) -> None:
    statistics.save(tmp_path / "a")
    loaded = Statistics.load(tmp_path / "a", llama)
    assert loaded.options == statistics.options
    assert loaded.texts == {"a.txt": "00"}
    assert (loaded.chunks, loaded.tokens) == (5, sum(map(len, CHUNKS)))
    assert torch.equal(loaded.layers[2].keys.comoment, statistics.layers[2].keys.comoment)
    loaded.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_size_does_not_grow_with_the_text(llama: Any) -> None:
    few, many = (collect(llama, [CHUNKS[0]] * count, **OPTIONS) for count in (2, 9))
    assert few.nbytes == many.nbytes
    assert few.tokens < many.tokens


def test_states_of_other_passes_are_refused(llama: Any, tmp_path: Path) -> None:
    state = tmp_path / "state"
    collect(llama, CHUNKS[:2], state_path=state, **OPTIONS)
    with pytest.raises(SkvqError, match="the state of other text"):
        collect(llama, CHUNKS[1:], state_path=state, **OPTIONS)
    with pytest.raises(SkvqError, match="the state of 2 chunks, but only 1 were given"):
        collect(llama, CHUNKS[:1], state_path=state, **OPTIONS)
    with pytest.raises(SkvqError, match="the state of a pass with options"):
        collect(llama, CHUNKS, state_path=state, **(OPTIONS | {"block": 64}))
    with pytest.raises(SkvqError, match=r"made for another model: .*model_type: expected 'llama', found 'qwen3'"):
        collect(tiny_models.build("qwen3"), CHUNKS, state_path=state, **OPTIONS)
    state.write_bytes(state.read_bytes()[:-8])
    with pytest.raises(SkvqError, match="damaged or not a safetensors file"):
        collect(llama, CHUNKS, state_path=state, **OPTIONS)
