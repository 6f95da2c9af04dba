"""The state of a reconstruction on disk: one file for every finished block, refused by any other run.

Is: what makes an interrupted run go on and end the same. Is not: the streams, which are computed again from the blocks
(one forward pass each).
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._native import SkvqError
from ..config import StreamOptions
from ..evaluate.comparison import fingerprint
from ..plan import StreamPlan
from ..tensor_file import read_tensors, take, write_tensors

KIND, VERSION = "weight reconstruction block", 1
_STREAMS = ("keys", "values")


@dataclass(eq=False)
class BlockState:
    """One finished block: its checkpoint tensors by their names inside the block, its key and value plan, its log."""

    tensors: dict[str, Tensor]
    channels: tuple[StreamPlan, StreamPlan] | None
    log: dict[str, Any]


@dataclass(frozen=True)
class StateFolder:
    """A folder of blocks, or none."""

    path: Path | None
    run: str  # a hash of the model, the samples and all options

    @classmethod
    def open(cls, path: Path | None, model: Any, token_ids: Tensor, options: dict[str, Any]) -> StateFolder:
        """Of one run. The model must still have its own weights."""
        if path is None:
            return cls(None, "")
        parts = {
            "model": fingerprint(model),
            "samples": hashlib.sha256(token_ids.to(torch.int64).contiguous().numpy().tobytes()).hexdigest(),
            "options": options,
        }
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest())

    def _file(self, index: int) -> Path | None:
        return None if self.path is None else self.path / f"block_{index:03d}.safetensors"

    def read(self, index: int) -> BlockState | None:
        """A finished block, None if it is still to be done. Raises SkvqError if it is of another run."""
        file = self._file(index)
        if file is None or not file.exists():
            return None
        header, tensors = read_tensors(file, KIND, VERSION)
        if take(file, header, "run") != self.run:
            raise SkvqError(
                f"{file}: the state of another model, text or options, expected that of this run: name another folder, "
                "or delete this one to begin again"
            )
        streams = take(file, header, "channels")
        channels = None
        if streams is not None:
            made = [
                StreamPlan(
                    StreamOptions(**streams[x]), shift=tensors.pop(f"{x}.shift"), scale=tensors.pop(f"{x}.scale")
                )
                for x in _STREAMS
            ]
            channels = (made[0], made[1])
        return BlockState(tensors, channels, take(file, header, "log"))

    def write(self, index: int, block: BlockState) -> None:
        """Keep a finished block."""
        file = self._file(index)
        if file is None or file.exists():
            return
        tensors, streams = dict(block.tensors), None
        if block.channels is not None:
            streams = {}
            for name, plan in zip(_STREAMS, block.channels, strict=True):
                streams[name] = plan.options.to_dict()
                for part in ("shift", "scale"):
                    tensors[f"{name}.{part}"] = getattr(plan, part)
        header = {"run": self.run, "log": block.log, "channels": streams}
        write_tensors(file, KIND, VERSION, header, tensors)
