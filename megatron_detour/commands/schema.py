"""`megatron-detour schema`: the JSON Schema of run files, with which editors complete and check keys."""

from __future__ import annotations

import argparse
import json

from megatron_detour.config import RunConfig
from megatron_detour.settings import json_schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(options: argparse.Namespace) -> None:
    print(json.dumps(json_schema(RunConfig, "run file of megatron-detour"), indent=1))
