"""A tiny random model with a tokenizer of single characters, saved as a directory: what `--model PATH` takes in tests.

Its texts are nonsense; it makes the demo and the benchmarks run from end to end in a second.
"""

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tiny_models import build

CHARACTERS = "\n !\"'(),-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz"


def save(folder: Path, family: str = "llama", **changes: Any) -> Path:
    """Saves a model of `family` (see tiny_models) and the tokenizer to `folder`."""
    vocabulary = {"<unk>": 0} | {character: 1 + index for index, character in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    build(family, **changes).save_pretrained(folder)
    return folder
