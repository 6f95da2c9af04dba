"""Reconstruction block by block on tiny random models: losses fall, runs resume, families are served."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from skvq import SkvqError
from skvq.evaluate.methods.ours import reference_codec
from skvq.model_layers import decoder_of
from skvq.weights import ChannelOptions, ReconstructOptions, WeightOptions, load, reconstruct
from skvq.weights.blocks import BlockWindow, capture, decoder_layers
from skvq.weights.channels import ChannelScales, LayerChannels
from skvq.weights.checkpoint import write_checkpoint
from skvq.weights.packing import unpacked_weight
from tiny_models import SEEING, build, build_seeing, prompts

WEIGHTS = WeightOptions(3, 32)
FAMILIES = ("llama", "qwen3", "mistral", "mistral-window", "phi3", "gemma3")
CHANNELS = ChannelOptions(bits=4, window=16, sinks=2)


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_outside_the_model_do_what_they_do_inside(family: str) -> None:
    model, ids = build(family), prompts(3, 48)
    captured = capture(model, ids, batch=2)
    stream = captured.stream
    window = BlockWindow(decoder_layers(model), captured.calls, torch.device("cpu"))
    for index in range(3):
        stream = window.advance(index, stream, 2)
    torch.testing.assert_close(model.base_model.norm(stream), model.base_model(ids).last_hidden_state)


@pytest.mark.parametrize("family", SEEING)
def test_layers_of_models_that_see_images_are_those_of_the_text(family: str, tmp_path: Path) -> None:
    """They do outside what they do inside; only they are quantized, and the checkpoint runs as the model does."""
    model, ids = build_seeing(family), prompts(3, 48)
    layers = decoder_layers(model)
    captured = capture(model, ids, batch=2)
    stream, window = captured.stream, BlockWindow(layers, captured.calls, torch.device("cpu"))
    for index in range(3):
        stream = window.advance(index, stream, 2)
    torch.testing.assert_close(decoder_of(model).norm(stream), model.base_model(ids).last_hidden_state)
    before = {name: x.clone() for name, x in model.named_parameters()}
    found = reconstruct(model, ids, WEIGHTS, ReconstructOptions(epochs=0))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    linears = {name for name, x in model.named_modules() if name.startswith(prefix) and isinstance(x, torch.nn.Linear)}
    assert {name.rpartition(".")[0] for name in found.tensors} == linears
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert changed == {f"{name}.weight" for name in linears}
    write_checkpoint(model, found.tensors, WEIGHTS, tmp_path, dtype=torch.float32)
    loaded = load(tmp_path, dtype=torch.float32, backend="dequantized")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids))


def test_a_model_whose_layers_are_elsewhere_is_refused() -> None:
    config = transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=99)
    with pytest.raises(SkvqError, match="GPT2LMHeadModel: no layers found, expected a decoder of transformers"):
        decoder_layers(transformers.GPT2LMHeadModel(config))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ahead", [0, 2])
def test_losses_fall(family: str, ahead: int) -> None:
    model, ids = build(family), prompts(4, 48)
    options = ReconstructOptions(ahead=ahead, epochs=6, rate=0.2, start="open", rounding="nearest")
    found = reconstruct(model, ids, WEIGHTS, options)
    assert [row["block"] for row in found.log] == [0, 1, 2]
    assert all(row["after"] <= row["before"] for row in found.log)
    assert found.log[0]["after"] < 0.995 * found.log[0]["before"]


def long_tailed() -> Any:
    """Weights as trained ones are: a few in each group are far from the others, so that clipping pays."""
    model, generator = build("llama"), torch.Generator().manual_seed(4)
    for name, weight in model.named_parameters():
        if "proj" in name:
            far = torch.rand(weight.shape, generator=generator) < 0.03
            weight.mul_(torch.where(far, 1.6, 0.5))
    return model


def test_training_beats_round_to_nearest() -> None:
    ids = prompts(8, 64)
    errors = []
    for options in (
        ReconstructOptions(start="range", epochs=0, rounding="nearest"),
        ReconstructOptions(ahead=1, epochs=8, rounding="nearest"),
    ):
        model = long_tailed()
        exact = logits(model, ids)
        reconstruct(model, ids, WeightOptions(4, 32), options)
        errors.append(float((logits(model, ids) - exact).norm() / exact.norm()))
    assert 0.0 < errors[1] < 0.92 * errors[0]


def test_learnt_rounding_beats_nearest() -> None:
    """Same clips to begin with, same steps; on the texts that were trained on, since those of random tokens share
    nothing that rounding could learn.
    """
    ids = prompts(2, 32)
    errors = []
    for rounding in ("nearest", "learnt"):
        model = build("llama")
        exact = logits(model, ids)
        reconstruct(model, ids, WEIGHTS, ReconstructOptions(epochs=24, batch=2, rounding=rounding))
        errors.append(float((logits(model, ids) - exact).norm() / exact.norm()))
    assert 0.0 < errors[1] < 0.8 * errors[0]


def test_a_block_that_got_worse_is_rounded_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    from skvq.weights import reconstruction

    nearest = ReconstructOptions(epochs=0, rounding="nearest")
    plain = reconstruct(build("llama"), prompts(2, 32), WEIGHTS, nearest).tensors
    # a step the wrong way
    monkeypatch.setattr(reconstruction, "_follow_signs", lambda offsets, rate: [x.data.fill_(0.5) for x in offsets])
    options = ReconstructOptions(epochs=1, rounding="learnt", rate=1e-9)
    found = reconstruct(build("llama"), prompts(2, 32), WEIGHTS, options)
    assert all(row["kept_start"] for row in found.log)
    name = "model.layers.0.mlp.up_proj.weight_packed"
    changed = (found.tensors[name] != plain[name]).float().mean()
    assert float(changed) < 0.2  # trainable clips stop at 0.982


@pytest.mark.parametrize("rounding", ["nearest", "compensated", "learnt"])
def test_the_model_ends_with_the_stored_weights(rounding: str) -> None:
    model = build("llama")
    found = reconstruct(model, prompts(2, 32), WEIGHTS, ReconstructOptions(epochs=1, rounding=rounding))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert f"{name}.weight_packed" in found.tensors
            codes = (module.weight / found.tensors[f"{name}.weight_scale"].repeat_interleave(32, 1)).round()
            assert int(codes.max() - codes.min()) <= 2 * WEIGHTS.levels
            assert not hasattr(module, "parametrizations")


@pytest.mark.parametrize(("channels", "rounding"), [(None, "learnt"), (CHANNELS, "compensated")])
def test_an_interrupted_run_ends_the_same(
    tmp_path: Path, channels: ChannelOptions | None, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from skvq.weights import reconstruction

    options, ids = ReconstructOptions(epochs=2, channels=channels, rounding=rounding), prompts(4, 48)
    whole = reconstruct(build("llama"), ids, WEIGHTS, options)
    train = reconstruction._Run._train

    def until_second(self: Any, index: int) -> Any:
        if index == 2:
            raise KeyboardInterrupt
        return train(self, index)

    with monkeypatch.context() as patched:
        patched.setattr(reconstruction._Run, "_train", until_second)
        with pytest.raises(KeyboardInterrupt):
            reconstruct(build("llama"), ids, WEIGHTS, options, state=tmp_path)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["block_000.safetensors", "block_001.safetensors"]
    resumed = reconstruct(build("llama"), ids, WEIGHTS, options, state=tmp_path)
    assert whole.tensors.keys() == resumed.tensors.keys()
    assert all(torch.equal(whole.tensors[name], resumed.tensors[name]) for name in whole.tensors)
    assert [row["after"] for row in whole.log] == [row["after"] for row in resumed.log]
    if channels is not None:
        for index, plans in whole.channels.items():
            for one, other in zip(plans, resumed.channels[index], strict=True):
                assert torch.equal(one.shift, other.shift)
                assert torch.equal(one.scale, other.scale)


@pytest.mark.parametrize("change", ["text", "options", "model"])
def test_the_state_of_another_run_is_refused(tmp_path: Path, change: str) -> None:
    ids, options = prompts(2, 32), ReconstructOptions(epochs=0)
    reconstruct(build("llama"), ids, WEIGHTS, options, state=tmp_path)
    model = build("llama", seed=3 if change == "model" else 0)
    other = ReconstructOptions(epochs=0, ahead=2) if change == "options" else options
    with pytest.raises(SkvqError, match="the state of another model, text or options"):
        reconstruct(model, prompts(2, 32, seed=int(change == "text")), WEIGHTS, other, state=tmp_path)


def test_seeds_give_the_same_weights() -> None:
    ids = prompts(4, 32)
    made = [
        reconstruct(build("llama"), ids, WEIGHTS, ReconstructOptions(epochs=1, seed=seed)).tensors for seed in (0, 0, 1)
    ]
    name = "model.layers.1.mlp.up_proj.weight_packed"
    assert torch.equal(made[0][name], made[1][name])
    assert not torch.equal(made[0][name], made[2][name])


# ---- keys and values -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 64), (2, 64), (3, 256)])
def test_trained_rows_are_those_of_the_codec(bits: int, head_dim: int) -> None:
    """The differentiable twin and the plan that it becomes read back the same rows."""
    rows = torch.randn(2, 3, 40, head_dim, generator=torch.Generator().manual_seed(0)) * 3.0
    scales = ChannelScales.from_rows(rows, bits)
    with torch.no_grad():
        for parameter in scales.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    plan = scales.plan()
    ours = scales(rows)
    codec = reference_codec(plan, head_dim)
    for head in range(3):
        theirs = codec.decode(codec.encode(rows[:, head], head), head)
        # a code may fall to the other side where float32 rounds differently
        differing = ((ours[:, head] - theirs).abs() > 1e-4 * rows.abs().max()).float().mean()
        assert float(differing) < 2e-3


def test_only_the_past_is_quantized() -> None:
    """Without tokens older than the window attention is exact; with them it is not, and only for later queries."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 40, 32, generator=generator) for heads in (4, 2, 2))
    exact = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    def attend(window: int) -> torch.Tensor:
        scales = [ChannelScales.from_rows(x, 2) for x in (key, value)]
        return LayerChannels(scales[0], scales[1], ChannelOptions(2, window, 2, sink_search=0)).attend(
            query, key, value, 32**-0.5, None
        )

    torch.testing.assert_close(attend(40), exact)
    mixed = attend(16)
    torch.testing.assert_close(mixed[:, :, :18], exact[:, :, :18])
    assert float((mixed[:, :, 18:] - exact[:, :, 18:]).abs().max()) > 0.01


def test_scales_of_channels_are_trained() -> None:
    model, ids = build("gemma3"), prompts(4, 48)
    options = ReconstructOptions(epochs=2, channels=ChannelOptions(2, 16, 2))
    found = reconstruct(model, ids, WeightOptions(8, 32), options)
    assert sorted(found.channels) == [1, 2]  # the layers with full attention
    untrained = reconstruct(
        build("gemma3"), ids, WeightOptions(8, 32), ReconstructOptions(epochs=0, channels=ChannelOptions(2, 16, 2))
    )
    moved = [
        (a.scale - b.scale).abs().max()
        for i in (1, 2)
        for a, b in zip(found.channels[i], untrained.channels[i], strict=True)
    ]
    assert all(float(x) > 0.0 for x in moved)
    assert model.config._attn_implementation == "sdpa"


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_a_group_size_that_does_not_divide_is_refused_with_the_layer() -> None:
    with pytest.raises(SkvqError, match=r"group_size=64: layers\.0\.mlp\.down_proj has 96 inputs"):
        reconstruct(build("llama"), prompts(1, 16), WeightOptions(4, 64))


def test_ignored_layers_stay() -> None:
    model = build("llama")
    before = model.model.layers[0].mlp.down_proj.weight.clone()
    options = ReconstructOptions(epochs=0, ignore=("down_proj",))
    found = reconstruct(model, prompts(1, 16), WeightOptions(4, 64), options)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, before)
    assert not any("down_proj" in name for name in found.tensors)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "huber"}, "loss='huber': expected one of 'mae', 'mse'"),
        ({"ahead": -1}, "ahead=-1: expected an integer of at least 0"),
        ({"rate": 0.0}, "rate=0.0: expected a number above 0"),
        ({"start": "range", "epochs": 5}, "start='range', epochs=5: expected epochs=0"),
        ({"rounding": "up"}, "rounding='up': expected one of 'nearest', 'compensated', 'learnt'"),
        ({"rounding": "learnt", "epochs": 0}, "rounding='learnt', epochs=0: expected at least one epoch"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SkvqError, match=message):
        ReconstructOptions(**options)


def rounded(family: str) -> Any:
    """A model in bfloat16; "llama with biases" in its attention, as Qwen2 has them."""
    if family != "llama with biases":
        return build(family).bfloat16()
    model = build("llama", attention_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model.bfloat16()


@pytest.mark.parametrize("channels", [None, CHANNELS])
@pytest.mark.parametrize("family", ["llama", "llama with biases", "mistral-window", "phi3"])
@pytest.mark.parametrize("ahead", [0, 1])
def test_a_window_of_blocks_is_in_float32(
    family: str, ahead: int, channels: ChannelOptions | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in bfloat16 gives, bit by bit, what the same weights in float32 give, with 1 + ahead blocks at a time."""
    options, ids = ReconstructOptions(ahead=ahead, epochs=1, batch=2, channels=channels), prompts(3, 48)
    expected = reconstruct(rounded(family).float(), ids, WEIGHTS, options)
    sizes, layer = [], BlockWindow.layer

    def seen(self: BlockWindow, index: int) -> torch.nn.Module:
        found = layer(self, index)
        sizes.append(len(self))
        assert {x.dtype for x in found.parameters()} == {torch.float32}
        return found

    monkeypatch.setattr(BlockWindow, "layer", seen)
    model = rounded(family)
    before = {name: x.clone() for name, x in model.named_parameters()}
    found = reconstruct(model, ids, WEIGHTS, options)
    assert max(sizes) == 1 + ahead
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert [row["after"] for row in found.log] == [row["after"] for row in expected.log]
    for index, plans in expected.channels.items():
        for one, other in zip(plans, found.channels[index], strict=True):
            assert torch.equal(one.shift, other.shift)
            assert torch.equal(one.scale, other.scale)
    for name, parameter in model.named_parameters():
        part = name.removesuffix(".weight")
        if f"{part}.weight_packed" in found.tensors:
            shape = (parameter.shape[0], parameter.shape[1])
            parts = [found.tensors[f"{part}.{x}"] for x in ("weight_packed", "weight_scale", "weight_zero_point")]
            stored = unpacked_weight(parts[0], parts[1], parts[2], shape, WEIGHTS.bits)
            assert torch.equal(parameter, stored.dequantize().bfloat16())
        else:
            assert torch.equal(parameter, before[name])
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_model_that_is_not_on_the_cpu_is_refused() -> None:
    with pytest.raises(SkvqError, match=r"model: on meta, expected it on the CPU"):
        reconstruct(build("llama").to("meta"), prompts(1, 16), WEIGHTS)


def test_the_log_is_json() -> None:
    found = reconstruct(build("llama"), prompts(1, 16), WEIGHTS, ReconstructOptions(epochs=0))
    assert json.loads(json.dumps(found.log)) == found.log
