"""Tiny random models of the families that the cache must serve, built in memory from their configurations.

Is: one constructor for each family, seeded, on the CPU in float32. Is not: anything that speaks; tokens only compare
caches. Head sizes are small multiples of 16 and window sizes smaller than the prompts of the tests.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicSlidingWindowLayer

VOCABULARY = 211
LAYERS = 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    # wide enough that a random model has opinions: ties between tokens would compare rounding errors
    "initializer_range": 0.2,
}
_MIXED = ["sliding_attention", "full_attention", "full_attention"]


def _config(name: str, **options: Any) -> Any:
    return getattr(transformers, name)(**(_COMMON | options))


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: _config("LlamaConfig"),
    "qwen3": lambda: _config("Qwen3Config", head_dim=32),
    "mistral": lambda: _config("MistralConfig", sliding_window=None, num_key_value_heads=1),
    "mistral-window": lambda: _config("MistralConfig", sliding_window=24),
    "phi3": lambda: _config("Phi3Config"),
    "gemma2": lambda: _config(
        "Gemma2Config",
        head_dim=16,
        sliding_window=24,
        layer_types=_MIXED,
        attn_logit_softcapping=5.0,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    ),
    "gemma3": lambda: _config(
        "Gemma3TextConfig",
        head_dim=16,
        sliding_window=24,
        layer_types=_MIXED,
        query_pre_attn_scalar=16,
        tie_word_embeddings=False,
    ),
    "gpt-oss": lambda: _config(
        "GptOssConfig",
        head_dim=16,
        sliding_window=24,
        layer_types=_MIXED,
        num_local_experts=2,
        num_experts_per_tok=1,
    ),
    # its last two layers take the keys and values of layers 0 and 1
    "kv-shared": lambda: _config(
        "Gemma3nTextConfig",
        vocab_size_per_layer_input=VOCABULARY,
        hidden_size_per_layer_input=8,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention"] * 2,
        laurel_rank=8,
        altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * 4,
        intermediate_size=[96] * 4,
        tie_word_embeddings=False,
    ),
}
FAMILIES = tuple(CONFIGS)
# Families whose attention torch's sdpa cannot compute: logit softcap and attention-sink logits.
WITHOUT_SDPA = ("gemma2", "gpt-oss")
# The number of layers with full attention that have a cache of their own.
PACKED_LAYERS = dict.fromkeys(FAMILIES, LAYERS) | {
    "mistral-window": 0,
    "gemma2": 2,
    "gemma3": 2,
    "gpt-oss": 2,
    "kv-shared": 1,
}


def build(family: str, attention: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A model of the family with random weights; `changes` are set on its configuration first."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(seed)
    attention = attention or ("eager" if family in WITHOUT_SDPA else "sdpa")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.eval()


def _seeing_text() -> dict[str, Any]:
    """A Llama's options, for a text model of another name."""
    return {name: value for name, value in CONFIGS["llama"]().to_dict().items() if name != "model_type"}


_VISION: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
_VISION |= {"image_size": 28, "patch_size": 14}
# Models that see images, whose text decoder lies deeper, and not in all of them by the same name.
SEEING: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=CONFIGS["gemma3"]().to_dict() | {"head_dim": 32}, vision_config=_VISION)
    ),
    "idefics3": lambda: transformers.Idefics3ForConditionalGeneration(
        transformers.Idefics3Config(text_config=CONFIGS["llama"]().to_dict(), vision_config=_VISION)
    ),
    "qwen2-vl": lambda: transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(
            text_config=_seeing_text()
            | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
            vision_config={"embed_dim": 32, "hidden_size": 64, "depth": 1, "num_heads": 2, "patch_size": 14},
        )
    ),
}


def build_seeing(family: str, seed: int = 0) -> Any:
    """A model that sees images, with random weights."""
    torch.manual_seed(seed)
    return SEEING[family]().eval()


def prompts(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token numbers [batch, length], none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def cannot_roll_back(family: str) -> bool:
    """Whether this transformers cannot take drafted tokens back from the family's sliding layers, with any cache."""
    sliding = getattr(CONFIGS[family](), "sliding_window", None) is not None
    return sliding and not hasattr(DynamicSlidingWindowLayer, "activate_past_recording")
