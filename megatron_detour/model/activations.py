"""Activation functions by their names in config.json; no torch until one is used."""

from __future__ import annotations

from collections.abc import Callable

# As in transformers' ACT2FN: torch.nn.functional's name and arguments.
_KNOWN: dict[str, tuple[str, dict[str, str]]] = {
    "gelu": ("gelu", {}),
    "gelu_new": ("gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("gelu", {"approximate": "tanh"}),
    "relu": ("relu", {}),
    "silu": ("silu", {}),
    "swish": ("silu", {}),
}
NAMES = (*_KNOWN,)


def get_activation(name: str) -> Callable:
    """Return the function of one of NAMES, of tensors of any size."""
    from functools import partial

    from torch.nn import functional

    function, arguments = _KNOWN[name]
    return partial(getattr(functional, function), **arguments) if arguments else getattr(functional, function)
