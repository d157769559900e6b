"""Optimizers, one per file. Every `Optimizer` subclass in a module of this package is registered."""

from megatron_detour.optimizers.adamw import AdamW
from megatron_detour.optimizers.base import Optimizer
from megatron_detour.optimizers.lion import Lion
from megatron_detour.registry import registry

DEFAULT = AdamW  # for run files that name no optimizer, including older ones
KINDS = registry(__name__, Optimizer, DEFAULT)
