"""Task types and their metrics. A `TaskType` with a name of its own, in a module of this package, is registered."""

from __future__ import annotations

import importlib
import pkgutil

from megatron_detour.evaluation.metrics import Metric
from megatron_detour.evaluation.task_types.base import TaskType

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def _types(cls: type[TaskType]) -> dict[str, TaskType]:
    found: dict[str, TaskType] = {}
    for sub in cls.__subclasses__():
        found |= {sub.name: sub()} if "name" in vars(sub) else {}  # another head of a type inherits its name
        found |= _types(sub)
    return found


TASK_TYPES = dict(sorted(_types(TaskType).items()))
METRICS: dict[str, Metric] = {metric.name: metric for kind in TASK_TYPES.values() for metric in kind.metrics}
