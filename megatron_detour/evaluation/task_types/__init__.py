"""The registry of task types and their metrics. To add a type, add a module here and its class to the list below."""

from megatron_detour.evaluation.metrics import Metric
from megatron_detour.evaluation.task_types.base import TaskType
from megatron_detour.evaluation.task_types.classification import Classification
from megatron_detour.evaluation.task_types.multi_label import MultiLabel
from megatron_detour.evaluation.task_types.multiple_choice import MultipleAnswer, MultipleChoice
from megatron_detour.evaluation.task_types.similarity import Similarity
from megatron_detour.evaluation.task_types.token_classification import TokenClassification

_KINDS = (TokenClassification, Classification, MultiLabel, Similarity, MultipleChoice, MultipleAnswer)

TASK_TYPES: dict[str, TaskType] = {kind.name: kind() for kind in _KINDS}
METRICS: dict[str, Metric] = {metric.name: metric for kind in _KINDS for metric in kind.metrics}
