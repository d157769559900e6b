"""Optimizers, one per file. Every `Optimizer` subclass in a module of this package is registered."""

from megatron_detour.optimizers.adamw import AdamW
from megatron_detour.optimizers.base import Optimizer
from megatron_detour.optimizers.lion import Lion
from megatron_detour.registry import registry

DEFAULT = AdamW  # of run files that name none, as those of before there was a choice
KINDS = registry(__name__, Optimizer, DEFAULT)
