"""The shape of a ModernBERT, read from a Hugging Face config.json of transformers 4 or 5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_detour.errors import DetourError

FULL, SLIDING = "full_attention", "sliding_attention"
# What the layers here do not have; another value would change the function that the weights stand for.
FIXED = {
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "decoder_bias": True,
    "classifier_bias": False,  # of the prediction head's dense layer
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "tie_word_embeddings": True,
    "attention_dropout": 0.0,
    "embedding_dropout": 0.0,
    "mlp_dropout": 0.0,
}


@dataclass(frozen=True)
class Shape:
    vocabulary: int
    hidden: int
    intermediate: int  # width of the gated unit; Wi has twice as many rows
    heads: int
    layer_types: tuple[str, ...]
    global_theta: float
    local_theta: float
    window: int  # keys on each side that a local layer sees besides the query's own
    norm_eps: float
    max_positions: int
    initializer_range: float

    @property
    def layers(self) -> int:
        return len(self.layer_types)

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def of(cls, config: dict[str, Any], origin: str) -> Shape:
        """Reads a config.json's mapping. Raises DetourError for a model that is not a ModernBERT of the known kind."""
        if config.get("model_type") != "modernbert":
            raise DetourError(f"{origin}: not a ModernBERT but a {config.get('model_type')!r} model")
        for key, value in FIXED.items():
            if config.get(key, value) != value:
                raise DetourError(f"{origin}: {key} is {config[key]!r}; only ModernBERTs with {value!r} are supported")
        try:
            hidden, heads, layers = (
                int(config[f]) for f in ("hidden_size", "num_attention_heads", "num_hidden_layers")
            )
            vocabulary, intermediate = int(config["vocab_size"]), int(config["intermediate_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise DetourError(f"{origin}: hidden_size, num_attention_heads or another size is wrong: {error}") from None
        if hidden % heads or (hidden // heads) % 2:
            raise DetourError(f"{origin}: hidden_size {hidden} does not divide into {heads} heads of an even size")
        return cls(
            vocabulary=vocabulary,
            hidden=hidden,
            intermediate=intermediate,
            heads=heads,
            layer_types=_layer_types(config, layers, origin),
            global_theta=_theta(config, FULL, "global_rope_theta", 160_000.0, origin),
            local_theta=_theta(config, SLIDING, "local_rope_theta", 10_000.0, origin),
            window=int(config.get("local_attention", 128)) // 2,
            norm_eps=float(config.get("norm_eps", 1e-5)),
            max_positions=int(config.get("max_position_embeddings", 8192)),
            initializer_range=float(config.get("initializer_range", 0.02)),
        )

    def check_tensor_parallel(self, size: int) -> None:
        """Raises DetourError when heads or the gated unit do not divide by the tensor-parallel size."""
        for what, count in (("attention heads", self.heads), ("intermediate size", self.intermediate)):
            if count % size:
                raise DetourError(f"parallel.tensor: {size} does not divide the model's {what}, {count}")
        if self.vocabulary < size**2:  # or the last rank's rows might all be padding
            raise DetourError(f"parallel.tensor: {size} is too much for a vocabulary of {self.vocabulary}")


def _layer_types(config: dict[str, Any], layers: int, origin: str) -> tuple[str, ...]:
    types = config.get("layer_types")
    if types is None:
        every = int(config.get("global_attn_every_n_layers", 3))
        types = [SLIDING if i % every else FULL for i in range(layers)]
    if len(types) != layers or not set(types) <= {FULL, SLIDING}:
        raise DetourError(f"{origin}: layer_types must name {FULL} or {SLIDING} for each of the {layers} layers")
    return tuple(types)


def _theta(config: dict[str, Any], layer_type: str, old_key: str, default: float, origin: str) -> float:
    parameters = (config.get("rope_parameters") or {}).get(layer_type) or {}
    if parameters.get("rope_type", "default") != "default":
        raise DetourError(f"{origin}: rope_type {parameters['rope_type']!r} is not supported, only 'default'")
    old = config.get(old_key, default)
    if old is None:  # transformers 4: a local theta of null means the global one
        old = config.get("global_rope_theta") or default
    return float(parameters.get("rope_theta", old))
