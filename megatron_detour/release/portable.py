"""config.json and tokenizer_config.json that transformers 4.48 and later, including 5, read the same way.

transformers 4 has global_attn_every_n_layers and two rope thetas instead of 5's layer_types and rope_parameters. Both
are written, and each version ignores unknown keys.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.huggingface import known_config_keys
from megatron_detour.model.shape import FULL, SLIDING, Shape
from megatron_detour.structured import read_json_object

# Keys that transformers 5 writes besides the model's own. They are defaults, except for _name_or_path, the path of the
# model; id2label causes a warning when a classifier with other labels is added.
GENERAL = (
    "_name_or_path",
    "chunk_size_feed_forward",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
)


def encoder_config(config: dict[str, Any], shape: Shape, dtype: str) -> dict[str, Any]:
    """Return the config.json of a ModernBertForMaskedLM. `dtype` is that of the weights, such as "bfloat16"."""
    known = {*known_config_keys()} - {*GENERAL}
    own = {key: value for key, value in config.items() if key in known}
    return own | {
        "architectures": ["ModernBertForMaskedLM"],
        "local_attention": 2 * shape.window,
        "tie_word_embeddings": True,
        "layer_types": list(shape.layer_types),
        # None if no number describes the pattern: transformers 4 then fails instead of computing something else.
        "global_attn_every_n_layers": every_n_layers(shape),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": shape.global_theta},
            SLIDING: {"rope_type": "default", "rope_theta": shape.local_theta},
        },
        "global_rope_theta": shape.global_theta,
        "local_rope_theta": shape.local_theta,
        # By default 4 compiles parts of the model if triton is installed, which takes minutes at first use.
        "reference_compile": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def every_n_layers(shape: Shape) -> int | None:
    """Return n if exactly every n-th layer, counted from the first, is global, as in transformers 4; else None."""
    fitting = (
        n
        for n in range(1, shape.layers + 1)
        if all((kind == FULL) == (i % n == 0) for i, kind in enumerate(shape.layer_types))
    )
    return next(fitting, None)


def first_version(shape: Shape) -> str:
    """Return the oldest transformers that opens the encoder. (4.54.0 has a bug: local layers use the global theta.)"""
    return "5.0" if every_n_layers(shape) is None else "4.48"


def make_tokenizer_portable(folder: Path, shape: Shape) -> None:
    """Rewrite the folder's tokenizer_config.json with a class that both versions know and the maximum length."""
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    added = read_json_object(folder / "tokenizer.json").get("added_tokens") or []
    extra = config.pop("extra_special_tokens", None)  # a list, but 4.48 expects a mapping
    if isinstance(extra, list) and extra:
        config.setdefault("additional_special_tokens", extra)
    config |= {
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "model_max_length": shape.max_positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    config.setdefault("model_input_names", ["input_ids", "attention_mask"])
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
