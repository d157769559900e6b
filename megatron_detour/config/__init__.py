"""The run file: one YAML file with all settings of a run, checked as a whole."""

from megatron_detour.amounts import parse_tokens
from megatron_detour.config.control import as_control, parse_control
from megatron_detour.config.reader import from_dict, load, recipes
from megatron_detour.config.schema import (
    ATTENTION,
    AUTO,
    KERNELS,
    RECOMPUTE,
    Corpus,
    LearningRate,
    Model,
    Phase,
    RunConfig,
    flatten,
)
