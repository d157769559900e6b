#!/usr/bin/env bash
''':'
# ModernBERT base with a causal detour: recipes/english_base_10b.yaml, or another recipe with --run-file.
#
#   bash examples/pretrain_base.sh [--run-file RUN.yaml] [--control] [--plan] [key=value ...]
#   deepspeed [--num_gpus N] examples/pretrain_base.sh ...
#   torchrun --nproc_per_node N examples/pretrain_base.sh ...
#
# This file is both bash and Python: bash starts the Python part, which checks the run file and starts the DeepSpeed
# launcher, which runs the Python part on every rank. Under bash, RANKS=N sets the number of ranks (default: one per
# GPU), and Ctrl-C lets the ranks save before the prompt returns.
set -euo pipefail
beside="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin"
[ -x "$beside/deepspeed" ] && PATH="$beside:$PATH"
exec "$(command -v python || command -v python3)" "$0" --launch "$@"
: <<'# end of the Python part'
'''
import sys

from megatron_detour.commands.main import main
from megatron_detour.errors import command_line

if __name__ == "__main__":
    command_line(lambda: main(["train", "--run-file", "english_base_10b", *sys.argv[1:]]))
# end of the Python part
