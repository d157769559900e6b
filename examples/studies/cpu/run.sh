#!/usr/bin/env bash
# The study of docs/study.md: a small encoder on general text, then six arms on biomedical text, on two CPU cores.
#   examples/studies/cpu/run.sh DATA [FOLDER]
# DATA has corpora/ and tasks/: the JSON Lines files that docs/study.md lists. Everything is written into FOLDER
# (runs/cpu-study). Run it again to resume.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../../.." && pwd)
[ -x "$root/.venv/bin/python" ] && PATH="$root/.venv/bin:$PATH"
[ -d "${1:-}/corpora" ] && [ -d "$1/tasks" ] || { echo "error: give the folder that has corpora/ and tasks/" >&2; exit 2; }
data=$(cd "$1" && pwd)
mkdir -p "${2:-runs/cpu-study}/texts" && cd "${2:-runs/cpu-study}"
ln -sfn "$data/tasks" tasks && ln -sfn "$root/ds_configs" ds_configs
ln -sf "$data"/corpora/en_biomed*.heldout.jsonl.gz texts/
cp "$here"/*.yaml .
export OMP_NUM_THREADS=1

build() { [ -e "$1.manifest.json" ] || megatron-detour preprocess --output-prefix "$@" --tokenizer tokenizer; }
[ -e tokenizer ] || megatron-detour train-tokenizer --input "$data/corpora/en_generic.00.jsonl.gz" --output tokenizer --vocab-size 8192
build corpora/generic --input "$data/corpora/en_generic.00.jsonl.gz"
build corpora/generic_heldout --input "$data/corpora/en_generic.heldout.jsonl.gz"
build corpora/biomed --input "$data"/corpora/en_biomed{,_pmc_rct}.00.jsonl.gz --exclude "$data/tasks" --deduplicate exact
build corpora/biomed_heldout --input "$data"/corpora/en_biomed{,_pmc_rct}.heldout.jsonl.gz
RANKS=2 megatron-detour train theta0.yaml --launch
megatron-detour study cpu.yaml --parallel 2
