"""config.json and tokenizer_config.json as transformers 4.48 and later, and 5, read them alike.

transformers 4 has global_attn_every_n_layers and two rope thetas where 5 has layer_types and rope_parameters: both are
written, and each version passes over what it does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.huggingface import known_config_keys
from megatron_detour.model.shape import FULL, SLIDING, Shape
from megatron_detour.structured import read_json_object

# What transformers 5 writes beside the model's own keys: defaults, of which id2label even brings a warning where a
# classifier with other labels is put on top, and _name_or_path tells where the model lay.
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
    """The config.json of a ModernBertForMaskedLM. `dtype` is that of the weights, as in "bfloat16"."""
    known = {*known_config_keys()} - {*GENERAL}
    own = {key: value for key, value in config.items() if key in known}
    return own | {
        "architectures": ["ModernBertForMaskedLM"],
        "local_attention": 2 * shape.window,
        "tie_word_embeddings": True,
        "layer_types": list(shape.layer_types),
        # None where no number says it: transformers 4 then stops, where its default would be another function.
        "global_attn_every_n_layers": every_n_layers(shape),
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": shape.global_theta},
            SLIDING: {"rope_type": "default", "rope_theta": shape.local_theta},
        },
        "global_rope_theta": shape.global_theta,
        "local_rope_theta": shape.local_theta,
        # Otherwise 4 compiles parts of the model where it finds triton: minutes at first use, for the same function.
        "reference_compile": False,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def every_n_layers(shape: Shape) -> int | None:
    """The n of transformers 4 with which every n-th layer from the first is global; None where there is none."""
    fitting = (
        n
        for n in range(1, shape.layers + 1)
        if all((kind == FULL) == (i % n == 0) for i, kind in enumerate(shape.layer_types))
    )
    return next(fitting, None)


def first_version(shape: Shape) -> str:
    """Of transformers, that opens the encoder. (4.54.0 turns the local layers by the global theta: its own mistake.)"""
    return "5.0" if every_n_layers(shape) is None else "4.48"


def make_tokenizer_portable(folder: Path, shape: Shape) -> None:
    """Rewrites the folder's tokenizer_config.json: the class that both know, and the model's length."""
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    added = read_json_object(folder / "tokenizer.json").get("added_tokens") or []
    extra = config.pop("extra_special_tokens", None)  # a list, which 4.48 takes for a mapping
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
