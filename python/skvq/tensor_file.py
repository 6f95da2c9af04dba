"""Named tensors and a JSON header in one safetensors file: how plans and calibration statistics lie on disk.

Is: a file that appears only when complete, the same bytes for the same content, and one clear error for whatever else
is found in its place. Is not: what the tensors mean. The header is the metadata entry "skvq", JSON with sorted keys,
and says what kind of file it is and in which version of that kind.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ._native import SkvqError

_ENTRY = "skvq"


def tensor_bytes(kind: str, version: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The contents of such a file."""
    text = json.dumps({**header, "kind": kind, "format_version": version}, sort_keys=True, allow_nan=False)
    # Tensors that share memory would be refused, views of larger ones would be saved whole.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in sorted(tensors.items())}
    return save(plain, metadata={_ENTRY: text})


def write_tensors(
    path: Path | str, kind: str, version: int, header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write the file at `path`, replacing what is there only when the new one is complete."""
    target, data = Path(path), tensor_bytes(kind, version, header, tensors)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_header(path: Path | str, kind: str, version: int) -> dict[str, Any]:
    """The header of a file that `write_tensors` made. Raises SkvqError if it is not one of this kind and version."""
    return _read(Path(path), kind, version, with_tensors=False)[0]


def read_tensors(path: Path | str, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors (on the CPU) of a file that `write_tensors` made.

    Raises:
        SkvqError: there is no such file, it is damaged, or it is of another kind or version.
    """
    return _read(Path(path), kind, version, with_tensors=True)


def _read(path: Path, kind: str, version: int, *, with_tensors: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise SkvqError(f"{path}: no such file, expected a skvq {kind}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _header(path, kind, version, file.metadata())
            # Cloned: the file may be replaced while its tensors are in use.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if with_tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise SkvqError(f"{path}: damaged or not a safetensors file ({error}), expected a skvq {kind}") from None
    return header, tensors


def _header(path: Path, kind: str, version: int, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    try:
        header = json.loads((metadata or {})[_ENTRY])
    except (KeyError, json.JSONDecodeError):
        raise SkvqError(f"{path}: a safetensors file without skvq's header, expected a skvq {kind}") from None
    if not isinstance(header, dict) or header.get("kind") != kind:
        found = header.get("kind") if isinstance(header, dict) else header
        raise SkvqError(f"{path}: kind {found!r}, expected {kind!r}")
    if header.get("format_version") != version:
        raise SkvqError(
            f"{path}: format_version={header.get('format_version')!r}: expected {version}, the one that this release "
            f"reads (written by skvq {header.get('skvq_version', '?')})"
        )
    return header


def take(path: Path | str, values: Mapping[str, Any], name: str) -> Any:
    """`values[name]`. Raises SkvqError if the file `path` lacks it."""
    if name not in values:
        raise SkvqError(f"{path}: {name!r} is missing, expected a complete file")
    return values[name]


def check_tensor(path: Path | str, name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """`tensor` if it has this type and shape, else SkvqError."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        raise SkvqError(f"{path}: {name}: {tensor.dtype} {tuple(tensor.shape)}, expected {dtype} {shape}")
    return tensor
