"""`quantize_model`: from a model directory to a checkpoint with low-bit weights, and plans of the cache beside it.

| file | what |
|---|---|
| `model.safetensors`, `config.json`, ... | the checkpoint, which needs nothing of skvq |
| `plan.safetensors` | the cache's plan, fitted to the quantized model as `skvq calibrate` does |
| `plan_2d.safetensors` | WKVQuant's two-dimensional plan, trained with the weights; if asked for |
| `quantization.json` | settings, texts, and every block's loss before and after |
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError
from ..bench.machine import describe_machine, peak_of_process, write_json
from ..calibrate.collect import collect
from ..calibrate.spectral_plan import SpectralOptions, spectral_plan
from ..config import SkvqConfig
from ..evaluate.texts import CALIBRATION_TEXTS, Text, cut_chunks, digests, packaged_texts, read_text
from ..models import load_as_stored
from ..plan_file import FILE_NAME, QuantizationPlan
from .channels import stream_options
from .checkpoint import write_checkpoint
from .grid import WeightOptions
from .reconstruction import Reconstruction, ReconstructOptions, reconstruct
from .running import load as load_checkpoint

PLAN_2D, LOG = "plan_2d.safetensors", "quantization.json"


@dataclass(frozen=True)
class QuantizeOptions:
    """What `skvq quantize` makes.

    Attributes:
        weights: the grid.
        reconstruct: how clips are found.
        texts: files or parts of files; none: the package's.
        samples, tokens: number and length of calibration samples.
        plan: bits of the cache's plan; None: no plan.
        plan_chunks, plan_tokens: what the plan is fitted to.
        window, sinks: of both plans.
    """

    weights: WeightOptions = field(default_factory=WeightOptions)
    reconstruct: ReconstructOptions = field(default_factory=ReconstructOptions)
    texts: tuple[str, ...] = ()
    samples: int = 16
    tokens: int = 512
    plan: SpectralOptions | None = field(default_factory=SpectralOptions)
    plan_chunks: int = 4
    plan_tokens: int = 2048
    window: int = 128
    sinks: int = 5

    def __post_init__(self) -> None:
        for name in ("samples", "tokens", "plan_chunks", "plan_tokens"):
            if getattr(self, name) < 1:
                raise SkvqError(f"{name}={getattr(self, name)!r}: expected an integer of at least 1")
        channels = self.reconstruct.channels
        if channels is not None and self.tokens <= channels.window + channels.sinks:
            raise SkvqError(
                f"tokens={self.tokens}: expected more than window + sinks = {channels.window + channels.sinks}, "
                "since only older tokens are quantized"
            )


def calibration_ids(tokenizer: Any, texts: list[Text], samples: int, tokens: int) -> Tensor:
    """Samples int64 [S, T], in turn from the texts."""
    return torch.stack([chunk.token_ids for chunk in cut_chunks(tokenizer, texts, samples, tokens)])


def quantize_model(
    source: str,
    output: Path,
    options: QuantizeOptions,
    *,
    state: Path | None = None,
    progress: bool = True,
    device: str = "cpu",
) -> dict[str, Any]:
    """Quantize the model `source` (a directory or hub id) into the directory `output`.

    The model stays on the CPU in the dtype of its files; `device` has a few blocks of it in float32 at a time, and
    where it is not the CPU, the quantized model in bfloat16 while the plan is fitted.

    Returns:
        What `quantization.json` holds.

    Raises:
        SkvqError: as `reconstruct`; also where `output` is not an empty directory or a former result.
    """
    start = time.monotonic()
    if output.exists() and any(output.iterdir()) and not (output / LOG).is_file() and state != output:
        raise SkvqError(f"output={str(output)!r}: has files that are not a former result, expected an empty directory")
    loaded = load_as_stored(source)
    texts = [read_text(x) for x in options.texts] or packaged_texts(CALIBRATION_TEXTS)
    ids = calibration_ids(loaded.tokenizer, texts, options.samples, options.tokens)
    found = reconstruct(
        loaded.model, ids, options.weights, options.reconstruct, state=state, progress=progress, device=device
    )
    trained = time.monotonic() - start
    size = write_checkpoint(loaded.model, found.tensors, options.weights, output)
    loaded.tokenizer.save_pretrained(output)
    sha256 = digests(texts)
    for name in (FILE_NAME, PLAN_2D):
        (output / name).unlink(missing_ok=True)
    if found.channels:
        _plan_2d(loaded.model, found, options, sha256).save(output / PLAN_2D)
    name, tokenizer, predicted = loaded.name, loaded.tokenizer, None
    del loaded  # the plan is fitted to what was written
    if options.plan is not None:
        plan, predicted = _plan(_written(output, device), tokenizer, texts, options, sha256, progress)
        plan.save(output / FILE_NAME)
    report = {
        "model": name,
        "settings": json.loads(json.dumps(asdict(options), default=str)),
        "texts": sha256,
        "bits_per_weight": options.weights.bits_per_weight,
        "checkpoint_bytes": size,
        "seconds": {"weights": round(trained, 1), "all": round(time.monotonic() - start, 1)},
        "peak_bytes": peak_of_process(),
        "plan": predicted,
        "machine": describe_machine(),
        "blocks": found.log,
    }
    write_json(report, output / LOG)
    return report


def _plan_2d(model: Any, found: Reconstruction, options: QuantizeOptions, sha256: dict[str, str]) -> QuantizationPlan:
    channels = options.reconstruct.channels
    assert channels is not None
    streams = stream_options(channels.bits)
    config = SkvqConfig(
        keys=streams,
        values=streams,
        window=channels.window,
        sinks=channels.sinks,
        sink_search=channels.sink_search,
    )
    notes = {"ahead": options.reconstruct.ahead, "loss": options.reconstruct.loss, "epochs": options.reconstruct.epochs}
    return QuantizationPlan.for_model(model, config, found.channels, method="wkvquant", texts=sha256, notes=notes)


def _written(output: Path, device: str) -> Any:
    """The quantized model: packed in float32 on the CPU, unpacked in bfloat16 on other devices."""
    if torch.device(device).type == "cpu":
        return load_checkpoint(output, dtype=torch.float32)
    return load_checkpoint(output, backend="dequantized", device=device)


def _plan(
    model: Any, tokenizer: Any, texts: list[Text], options: QuantizeOptions, sha256: dict[str, str], progress: bool
) -> tuple[QuantizationPlan, str]:
    assert options.plan is not None
    chunks = cut_chunks(tokenizer, texts, options.plan_chunks, options.plan_tokens)
    statistics = collect(
        model,
        [chunk.token_ids for chunk in chunks],
        sinks=options.sinks,
        window=options.window,
        texts=sha256,
        total=len(chunks),
        progress=progress,
    )
    fitted = spectral_plan(model, statistics, options.plan)
    config = SkvqConfig(window=options.window, sinks=options.sinks)
    notes = fitted.notes | {"chunks": statistics.chunks, "tokens": statistics.tokens, "weights": options.weights.bits}
    plan = QuantizationPlan.for_model(model, config, fitted.streams, method="spectral", texts=sha256, notes=notes)
    return plan, fitted.describe()
