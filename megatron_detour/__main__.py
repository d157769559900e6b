"""`python -m megatron_detour`."""

from megatron_detour.commands.main import entry

if __name__ == "__main__":
    entry()
