#!/usr/bin/env python3
"""Exports a checkpoint: `megatron-detour convert`, from a clone."""

try:
    from megatron_detour.commands.main import entry
except ModuleNotFoundError as missing:
    raise SystemExit(f"error: {missing}: run `make install` and start this with .venv/bin/python") from None

if __name__ == "__main__":
    entry("convert")
