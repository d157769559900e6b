"""Task types and their metrics. A `TaskType` with a name of its own, in a module of this package, is registered."""

from __future__ import annotations

from megatron_detour.evaluation.metrics import Metric
from megatron_detour.evaluation.task_types.base import TaskType
from megatron_detour.registry import registry

TASK_TYPES = {name: kind() for name, kind in registry(__name__, TaskType).items()}
METRICS: dict[str, Metric] = {metric.name: metric for kind in TASK_TYPES.values() for metric in kind.metrics}
