#!/usr/bin/env bash
''':'
# ModernBERT large with a causal detour: recipes/english_large_50b.yaml, or another recipe with --run-file.
#
#   bash examples/pretrain_large.sh [--run-file RUN.yaml] [--control] [--plan] [key=value ...]
#   deepspeed [--num_gpus N] examples/pretrain_large.sh ...
#   torchrun --nproc_per_node N examples/pretrain_large.sh ...
#
# This file is bash and Python at once: bash starts the launcher, the launcher runs the Python part on every rank.
# Started by bash, RANKS=N sets the number of ranks (default: one a GPU).
set -euo pipefail
beside="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin"
[ -x "$beside/deepspeed" ] && PATH="$beside:$PATH"
command -v deepspeed >/dev/null || { echo "error: deepspeed is not installed; run make install" >&2; exit 1; }
exec deepspeed --log_level warning --master_port "${MASTER_PORT:-$((20000 + RANDOM % 20000))}" ${RANKS:+--num_gpus "$RANKS"} "$0" "$@"
: <<'# end of the Python part'
'''
from pathlib import Path

from megatron_detour.errors import command_line
from megatron_detour.training.run import main

if __name__ == "__main__":
    command_line(lambda: main(Path(__file__).parent / "recipes" / "english_large_50b.yaml"))
# end of the Python part
