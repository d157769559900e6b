"""config.json and tokenizer_config.json that every version of transformers in `Family.opens_in` reads the same way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_detour.checkpoint.huggingface import known_config_keys
from megatron_detour.model.families import Family
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


def encoder_config(config: dict[str, Any], shape: Family, dtype: str) -> dict[str, Any]:
    """Return the config.json of an encoder. `dtype` is that of the weights, such as "bfloat16"."""
    known = {*known_config_keys(type(shape))} - {*GENERAL}
    own = {key: value for key, value in config.items() if key in known}
    return own | {
        "architectures": [shape.architecture()],
        **shape.release_keys(),
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def make_tokenizer_portable(folder: Path, shape: Family) -> None:
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
    config.setdefault("model_input_names", [*shape.tokenizer_outputs])
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
