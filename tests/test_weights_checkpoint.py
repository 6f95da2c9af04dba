"""Checkpoints: plain transformers loads them, and so do our own backends, with the logits of the quantized model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from skvq import QuantizedDynamicCache, SkvqError
from skvq.cli import main
from skvq.models import load as load_model
from skvq.models import load_as_stored
from skvq.weights import ReconstructOptions, WeightOptions, load, reconstruct, running
from skvq.weights.checkpoint import write_checkpoint
from skvq.weights.grid import QuantizedWeight
from skvq.weights.head import quantized_head
from skvq.weights.product import PackedLinear
from skvq.weights.running import Int4Linear, unpacked_codes
from tiny_directory import save
from tiny_models import build, prompts

FAMILIES = ("llama", "qwen3", "phi3", "gemma3")


def made(folder: Path, family: str = "llama", bits: int = 4, dtype: torch.dtype = torch.float32) -> Any:
    """A quantized tiny model, written to `folder`."""
    model, options = build(family), WeightOptions(bits, 32)
    found = reconstruct(model, prompts(2, 32), options, ReconstructOptions(epochs=0))
    write_checkpoint(model, found.tensors, options, folder, dtype)
    return model


def test_without_our_package(tmp_path: Path) -> None:
    """In a process that cannot import skvq."""
    pytest.importorskip("compressed_tensors")
    import subprocess
    import sys

    model, ids = made(tmp_path), prompts(2, 24)
    torch.save(model(ids).logits, tmp_path / "expected.pt")
    torch.save(ids, tmp_path / "ids.pt")
    program = (
        "import sys, torch; sys.modules['skvq'] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        f"folder = {str(tmp_path)!r}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)\n"
        "found = model(torch.load(folder + '/ids.pt')).logits\n"
        "assert torch.equal(found, torch.load(folder + '/expected.pt')), 'other logits'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_has_the_same_logits(tmp_path: Path, family: str, bits: int) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    if pack_to_int32(torch.zeros(1, 32, dtype=torch.int8), bits).shape[1] != bits:
        pytest.skip("this compressed-tensors packs ten 3-bit codes into a word: dense packing came with 0.18")
    model, ids = made(tmp_path, family, bits), prompts(2, 24)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(plain(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_our_dequantized_backend_has_the_same_logits(tmp_path: Path, family: str) -> None:
    model, ids = made(tmp_path, family), prompts(2, 24)
    mine = load(tmp_path, dtype=torch.float32, backend="dequantized")
    assert torch.equal(mine(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int4_products_are_near(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """Within what bfloat16 inputs cost: three times the error of the same model in bfloat16."""
    model, ids = made(tmp_path, family), prompts(2, 24)
    exact = model(ids).logits
    mine = load(tmp_path, dtype=dtype, backend="int4pack")
    count = sum(isinstance(x, Int4Linear) for x in mine.modules())
    assert count == sum(isinstance(x, torch.nn.Linear) for x in model.modules()) - 1
    half = load(tmp_path, dtype=torch.bfloat16, backend="dequantized")

    def error(found: torch.Tensor) -> float:
        return float((found.float() - exact).norm() / exact.norm())

    assert 0.0 < error(mine(ids).logits) < 3.0 * error(half(ids).logits)


def test_int4_products_against_plain_arithmetic() -> None:
    from skvq.weights.grid import encode

    generator = torch.Generator().manual_seed(0)
    weight = encode(torch.randn(48, 256, generator=generator), WeightOptions(4, 128))
    bias, rows = torch.randn(48, generator=generator), torch.randn(2, 5, 256, generator=generator).bfloat16().float()
    found = Int4Linear(weight, bias)(rows)
    expected = rows @ weight.dequantize().T + bias
    assert found.dtype == torch.float32
    assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_our_product_has_the_logits_of_unpacked_weights(tmp_path: Path, family: str, bits: int) -> None:
    """Within float noise, for the many rows of a prompt and for single ones."""
    model = made(tmp_path, family, bits)
    mine = load(tmp_path, dtype=torch.float32)
    count = sum(isinstance(x, PackedLinear) for x in mine.modules())
    assert count == sum(isinstance(x, torch.nn.Linear) for x in model.modules()) - 1
    for ids in (prompts(2, 24), prompts(1, 1), prompts(1, 3)):
        torch.testing.assert_close(mine(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_our_product_in_half_precision(tmp_path: Path) -> None:
    """Nearer to float32 than the same model in bfloat16 throughout, or as near."""
    model, ids = made(tmp_path), prompts(2, 6)
    exact = model(ids).logits
    for dtype in (torch.bfloat16, torch.float16):
        mine = load(tmp_path, dtype=dtype)(ids).logits
        half = load(tmp_path, dtype=dtype, backend="dequantized")(ids).logits
        assert mine.dtype == dtype
        assert float((mine.float() - exact).norm()) < 1.5 * float((half.float() - exact).norm())


def with_low_bit_head(folder: Path, bits: int) -> Any:
    """The unpacked model whose embedding and output layer are rounded in place."""
    model = load(folder, dtype=torch.float32, backend="dequantized")
    for weight in {module.weight for module in (model.get_input_embeddings(), model.get_output_embeddings())}:
        made = quantized_head(weight.data, bits).dequantize()
        assert 0.0 < float((made - weight).norm() / weight.norm()) < {8: 0.01, 6: 0.03, 4: 0.1}[bits]
        weight.data.copy_(made)
    return model


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_low_bit_head(tmp_path: Path, family: str, bits: int) -> None:
    model, ids = made(tmp_path, family), prompts(2, 24)
    small = load(tmp_path, dtype=torch.float32, head_bits=bits)
    torch.testing.assert_close(small(ids).logits, with_low_bit_head(tmp_path, bits)(ids).logits, rtol=1e-4, atol=1e-4)
    assert small.lm_head.packed.codes.dtype == torch.uint8
    width = model.config.hidden_size
    assert small.lm_head.packed.codes.shape[1] == {8: width, 6: width * 6 // 8, 4: 64}[bits]
    assert small.generate(ids[:1], max_new_tokens=4, do_sample=False).shape == (1, 28)


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_low_bit_head_of_tied_embeddings_is_held_once(tmp_path: Path, bits: int) -> None:
    model, options = build("llama", tie_word_embeddings=True), WeightOptions(4, 32)
    found = reconstruct(model, prompts(2, 32), options, ReconstructOptions(epochs=0))
    write_checkpoint(model, found.tensors, options, tmp_path, torch.float32)
    exact, ids = model(prompts(2, 24)).logits, prompts(2, 24)
    assert torch.equal(load(tmp_path, dtype=torch.float32, backend="dequantized")(ids).logits, exact)
    small = load(tmp_path, dtype=torch.float32, head_bits=bits)
    assert small.lm_head.packed.codes.data_ptr() == small.model.embed_tokens.packed.codes.data_ptr()
    torch.testing.assert_close(small(ids).logits, with_low_bit_head(tmp_path, bits)(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_packed_cache_over_packed_weights(tmp_path: Path) -> None:
    made(tmp_path)
    model = load(tmp_path, dtype=torch.float32)
    cache = QuantizedDynamicCache(model.config, window=16, sinks=2)
    ids = prompts(1, 300)
    output = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert output.shape == (1, 304)
    assert cache.layers[0].get_seq_length() == 303
    assert cache.nbytes < 0.5 * 303 * 3 * 2 * 2 * 16 * 4  # of float32 rows: 3 layers, keys and values, 2 heads of 16


@pytest.mark.parametrize(
    ("options", "message"),
    [({"backend": "marlin"}, "backend='marlin': expected one of"), ({"head_bits": 2}, "head_bits=2: expected one of")],
)
def test_bad_options(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    made(tmp_path)
    with pytest.raises(SkvqError, match=message):
        load(tmp_path, **options)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path)
    with pytest.raises(SkvqError, match=r"expected 'compressed-tensors', 'pack-quantized'"):
        load(tmp_path)


@pytest.mark.parametrize("inputs", [128, 64, 96])
def test_int4_products_on_a_gpu_fit_torchs_operations(inputs: int) -> None:
    """Shapes and types alone, on tensors without memory: a GPU has to show the numbers (tests/gpu)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            torch.zeros(1).to("cuda")
        except RuntimeError as error:
            pytest.skip(f"this torch asks a driver even for tensors without memory ({error})"[:120])
        codes, groups = torch.zeros(24, inputs, dtype=torch.uint8), (24, inputs // 32)
        weight = QuantizedWeight(codes, torch.ones(groups), torch.zeros(groups, dtype=torch.uint8))
        layer = Int4Linear(weight, torch.zeros(24), torch.device("cuda"))
        found = layer(torch.zeros(2, 3, inputs, device="cuda"))
    assert (found.device.type, found.dtype, found.shape) == ("cuda", torch.float32, (2, 3, 24))
    assert {x.device.type for x in layer.buffers()} == {"cuda"}


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_torchs_layout_on_a_gpu_is_unpacked(tiles: int) -> None:
    """That of `matrix_to_m16n8k16_Bint4_layout`, word by word: lane t has output t / 4, channels from 2·(t % 4) on."""
    outputs, inputs = 16, 48 * tiles
    codes = torch.randint(16, (outputs, inputs), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    packed = torch.zeros(outputs // 8, inputs // (16 * tiles), 32, tiles // 2, dtype=torch.int64)
    for outer in range(outputs // 8):
        for step in range(inputs // (16 * tiles)):
            for lane in range(32):
                for word in range(tiles // 2):
                    row, first = codes[8 * outer + lane // 4], 16 * (step * tiles + 2 * word) + lane % 4 * 2
                    channels = [first, first + 1, first + 8, first + 9, *(first + 16 + x for x in (0, 1, 8, 9))]
                    order = [0, 2, 4, 6, 1, 3, 5, 7]  # from the lowest nibble on
                    packed[outer, step, lane, word] = sum(int(row[channels[x]]) << 4 * at for at, x in enumerate(order))
    words = torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)
    assert torch.equal(unpacked_codes(words), codes)


def test_unpacked_weights_are_those_of_the_product() -> None:
    from skvq.weights.grid import encode

    weight = encode(torch.randn(16, 256, generator=torch.Generator().manual_seed(1)), WeightOptions(4, 64))
    layer = Int4Linear(weight, None)
    identity = torch.eye(256, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "unpacked_codes", lambda _: weight.codes)
        assert torch.allclose(layer._unpacked().float(), layer(identity).float().mT, atol=0.02)


def test_our_own_product_is_for_the_cpu(tmp_path: Path) -> None:
    made(tmp_path)
    with pytest.raises(SkvqError, match="backend='packed': our own product, which is for the CPU"):
        load(tmp_path, backend="packed", device="cuda")
    with pytest.raises(SkvqError, match="head_bits=8: our own product, which is for the CPU"):
        load(tmp_path, head_bits=8, device="cuda")


def test_three_bits_have_no_int4_product(tmp_path: Path) -> None:
    made(tmp_path, bits=3)
    with pytest.raises(SkvqError, match="has 3 bits, expected 4"):
        load(tmp_path, backend="int4pack")
    packed = [x for x in load(tmp_path, dtype=torch.float32).modules() if isinstance(x, PackedLinear)]
    assert {x.packed.bits for x in packed} == {4}


# ---- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_models_as_stored(tmp_path: Path, family: str) -> None:
    """Turned to float32 they are what loading in float32 gives, though √48 is not a number of bfloat16."""
    source = save(tmp_path, family, hidden_size=48, dtype=torch.bfloat16)
    exact, model = load_model(str(source), dtype="float32").model, load_as_stored(str(source)).model
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.float()(prompts(1, 24)).logits, exact(prompts(1, 24)).logits)


def test_models_with_buffers_of_unknown_origin_are_loaded_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    source, before = save(tmp_path, dtype=torch.bfloat16), LlamaRMSNorm.__init__

    def with_a_buffer(self: Any, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options)
        self.register_buffer("third", torch.tensor(1 / 3), persistent=False)

    monkeypatch.setattr(LlamaRMSNorm, "__init__", with_a_buffer)
    model = load_as_stored(str(source)).model
    assert {x.dtype for x in (*model.parameters(), *model.buffers())} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "epochs"),
    [
        ([], 0),
        (["--rounding", "compensated"], 0),
        (["--rounding", "nearest"], 4),
        (["--rounding", "learnt"], 4),
        (["--kv-bits", "4"], 4),
        (["--kv-bits", "4", "--epochs", "0"], 0),
        (["--epochs", "2"], 2),
    ],
)
def test_what_lives_on_training_is_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], epochs: int
) -> None:
    seen: list[Any] = []

    def remember(source: str, output: Path, options: Any, **_: Any) -> dict[str, Any]:
        seen.append(options)
        return {"peak_bytes": 1, "plan": None, "checkpoint_bytes": 1, "seconds": {"all": 1.0}}

    monkeypatch.setattr("skvq.weights.quantize.quantize_model", remember)
    assert main(["quantize", "model", "-o", str(tmp_path / "out"), *arguments]) == 0
    assert seen[0].reconstruct.epochs == epochs


SMALL = ["--group-size", "32", "--samples", "4", "--tokens", "64", "--epochs", "1", "--window", "16", "--sinks", "2"]
PLAN = ["--plan-chunks", "2", "--plan-tokens", "200"]


def test_quantize_and_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole way: weights, both plans, the table of the comparison, its JSON."""
    source, out = save(tmp_path / "model"), tmp_path / "w4"
    assert main(["quantize", str(source), "-o", str(out), "--kv-bits", "4", *SMALL, *PLAN]) == 0
    report = json.loads((out / "quantization.json").read_text(encoding="utf-8"))
    assert len(report["blocks"]) == 3
    assert report["bits_per_weight"] == 4.625
    for plan in ("plan.safetensors", "plan_2d.safetensors"):
        assert QuantizedDynamicCache.from_plan(load(out, dtype=torch.float32), out / plan) is not None
    figures = tmp_path / "figures.json"
    candidates = ["full", "rtn:bits=4,group_size=32", str(out), f"{out}+plan:{out / 'plan.safetensors'}"]
    candidates += [f"{out}+plan:{out / 'plan_2d.safetensors'}"]
    sizes = ["--chunks", "1", "--tokens", "160", "--score-from", "64", "--window", "16", "--sinks", "2"]
    capsys.readouterr()
    arguments = ["eval", "weights", "--model", str(source), "--candidates", *candidates, *sizes]
    assert main([*arguments, "--json", str(figures)]) == 0
    table = capsys.readouterr().out
    found = json.loads(figures.read_text())
    by_name = {row["candidate"]: row for row in found["summary"]}
    assert list(by_name) == candidates
    assert all(name in table for name in candidates)
    assert by_name["full"]["kl"] == pytest.approx(0.0, abs=1e-5)
    assert by_name["full"]["top1"] == 1.0
    assert by_name[candidates[1]]["kl"] > 1e-4
    assert by_name[candidates[3]]["rise_over_weights_percent"] is not None


def test_a_plan_that_was_fitted_to_the_evaluation_text_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, text = save(tmp_path / "model"), tmp_path / "w4", tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} of a text that is short." for i in range(400)))
    assert main(["quantize", str(source), "-o", str(out), *SMALL, *PLAN, "--texts", str(text)]) == 0
    candidate = f"{out}+plan:{out / 'plan.safetensors'}"
    arguments = ["eval", "weights", "--model", str(source), "--candidates", candidate, "--texts", str(text)]
    assert main(arguments) == 1
    assert "was fitted to 'text.txt'" in capsys.readouterr().err


def test_the_plan_of_a_quantized_model_is_named_in_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = save(tmp_path / "model")
    arguments = ["eval", "weights", "--model", str(source), "--candidates", "gptq:bits=4"]
    assert main(arguments) == 1
    assert "candidate 'gptq:bits=4': expected full, rtn:OPTIONS" in capsys.readouterr().err
    assert main(["quantize", str(source), "-o", str(source), *SMALL, "--no-plan"]) == 1
    assert "expected an empty directory" in capsys.readouterr().err


def test_bench_weights_of_shapes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "bench.json"
    sizes = ["--shapes", "256x128", "48x256", "--rows", "1", "3"]
    assert main(["bench", "weights", *sizes, "--json", str(figures)]) == 0
    found = json.loads(figures.read_text())
    assert found["rows"] == []
    assert found["device"] is None
    assert found["machine"]["processor"]
    title = f"{found['machine']['processor']}, torch {torch.__version__}, threads: {torch.get_num_threads()}\n"
    assert capsys.readouterr().out.startswith(title)
    shapes = [(row["outputs"], row["inputs"], row["rows"]) for row in found["products"]]
    assert shapes == [(256, 128, 1), (256, 128, 3), (48, 256, 1), (48, 256, 3)]
    assert all(row["packed_float32_ms"] > 0.0 < row["int4pack_bfloat16_ms"] for row in found["products"])
    for arguments, message in (
        (["--shapes", "256"], "shapes='256': expected OUTPUTSxINPUTS"),
        (["--model", "somewhere"], "checkpoint='': expected a model directory beside model='somewhere'"),
        (["--device", "tpu"], "device='tpu': expected 'cuda' or 'cuda:N'"),
    ):
        assert main(["bench", "weights", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_bench_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every contestant decodes; the quantized ones hold fewer bytes."""
    source, out = save(tmp_path / "model"), tmp_path / "w4"
    assert main(["quantize", str(source), "-o", str(out), *SMALL, "--no-plan"]) == 0
    figures = tmp_path / "bench.json"
    sizes = ["--tokens", "700", "--new-tokens", "2", "--rows", "1", "--dtypes", "float32", "bfloat16"]
    assert (
        main(["bench", "weights", "--model", str(source), "--checkpoint", str(out), *sizes, "--json", str(figures)])
        == 0
    )
    found = json.loads(figures.read_text())
    assert found["device"] is None
    assert len(found["rows"]) == 24
    assert len(found["products"]) >= 3
    plain, small = found["rows"][0], found["rows"][-1]
    assert plain["speed_ratio"] == plain["memory_ratio"] == 1.0
    assert small["cache"] == "packed"
    assert small["cache_bytes"] < 0.8 * plain["cache_bytes"]
    assert small["weight_bytes"] < plain["weight_bytes"]
    assert "8-bit output layer" in capsys.readouterr().out
