#!/usr/bin/env bash
''':'
# ModernBERT base with a causal detour: recipes/english_base_10b.yaml, or another recipe with --run-file.
#
#   bash examples/pretrain_base.sh [--run-file RUN.yaml] [--control] [--plan] [key=value ...]
#   deepspeed [--num_gpus N] examples/pretrain_base.sh ...
#   torchrun --nproc_per_node N examples/pretrain_base.sh ...
#
# This file is bash and Python at once: bash starts the Python part, which looks at the run file and starts DeepSpeed's
# launcher, which runs the Python part on every rank. Started by bash, RANKS=N sets the number of ranks (default: one a
# GPU), and a Ctrl-C lets the ranks save before the prompt comes back.
set -euo pipefail
beside="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin"
[ -x "$beside/deepspeed" ] && PATH="$beside:$PATH"
exec "$(command -v python || command -v python3)" "$0" --launch "$@"
: <<'# end of the Python part'
'''
from pathlib import Path

from megatron_detour.errors import command_line
from megatron_detour.training.run import main

if __name__ == "__main__":
    command_line(lambda: main(Path(__file__).parent / "recipes" / "english_base_10b.yaml"))
# end of the Python part
