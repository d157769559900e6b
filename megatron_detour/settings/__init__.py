"""Settings as frozen dataclasses. The annotation of a field has its rules and one line of help.

    clip: Annotated[float, Range(above=0), "largest gradient norm"] = 1.0

`read` builds an instance from plain mappings (YAML, JSON) and reports all faults at once. `add_arguments`,
`from_namespace` and `validate` make the fields flags of a command. `json_schema` and `markdown_table` describe them.
A field is an int, float, bool, str, Path, dict, tuple or another such dataclass, and may be optional.
"""

from megatron_detour.settings.description import json_schema, markdown_table
from megatron_detour.settings.fields import (
    AnyText,
    Choice,
    Enclosing,
    Entries,
    FaultElsewhere,
    Flag,
    Parsed,
    Pattern,
    Range,
    Tagged,
    join_key,
    settings_of,
)
from megatron_detour.settings.flags import add_arguments, flag, flag_type, from_namespace, validate
from megatron_detour.settings.overrides import apply_override
from megatron_detour.settings.reader import Faults, read, to_plain
