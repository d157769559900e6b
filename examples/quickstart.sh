#!/usr/bin/env bash
# Text in, encoder out: tokenizer, corpus, MLM -> causal detour -> MLM decay, Hugging Face folder, report.
#
#   examples/quickstart.sh                   on the project's own sample, in minutes on two CPU cores
#   examples/quickstart.sh my_corpus.jsonl   on a corpus of yours: .jsonl (key "text"), .jsonl.gz or .txt
#   examples/quickstart.sh my_corpus.jsonl phases.detour.tokens=2M   with keys of recipes/quickstart.yaml changed
#
# Everything lands in runs/quickstart, or runs/quickstart-NAME for a corpus of yours. Started again, it goes on where it
# stopped. RANKS=N sets the number of processes, VOCABULARY=N the size of the tokenizer.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] && PATH="$root/.venv/bin:$PATH"
corpus=
if [ -f "${1:-}" ] || [[ ${1:-=} != *=* ]]; then corpus=$1 && shift; fi
vocabulary=${VOCABULARY:-2048}
began=$SECONDS

step() { printf '\n== %s (%ds)\n' "$*" $((SECONDS - began)); }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
for override in "$@"; do
  case $override in
    folder=*|model.start=*) fail "$override: this script has its own folders; use examples/pretrain_base.sh instead" ;;
  esac
done
command -v deepspeed >/dev/null || fail "deepspeed is not installed; run make install"

if [ -z "$corpus" ]; then
  work=runs/quickstart
  step "generating the sample: $work/data"
  [ -e "$work/data/probes.jsonl" ] || python "$root/examples/sample/generate.py" --output "$work/data"
  [ -e "$work/data/train.jsonl" ] || cp "$work/data/sample.jsonl" "$work/data/train.jsonl"
  train=$work/data/train.jsonl heldout=$work/data/heldout.jsonl probes=(--probes "$work/data/probes.jsonl")
else
  [ -f "$corpus" ] || fail "$corpus: there is no such input file"
  case $corpus in
    *.jsonl|*.jsonl.gz) kind=jsonl ;;
    *.txt) kind=txt ;;
    *) fail "$corpus: a corpus must end in .jsonl, .jsonl.gz or .txt" ;;
  esac
  name=$(basename "$corpus") && work=runs/quickstart-${name%%.*}
  train=$work/data/train.$kind heldout=$work/data/heldout.$kind probes=(--from-corpus "$heldout" --count 10)
  step "setting every 50th document aside: $heldout"
  mkdir -p "$work/data"
  source="$(cd "$(dirname "$corpus")" && pwd)/$(basename "$corpus") $(cksum < "$corpus")"
  [ "$source" = "$(cat "$work/data/source" 2>/dev/null || printf %s "$source")" ] ||
    fail "$corpus has changed, or $work was made from another file of this name; remove $work to start again"
  read_corpus() { case $corpus in *.gz) gzip -dc "$corpus" ;; *) cat "$corpus" ;; esac; }
  if [ ! -e "$train" ]; then
    read_corpus | awk -v held="$heldout.part" 'NR % 50 == 0 { print > held; next } { print }' > "$train.part"
    [ -e "$heldout.part" ] || fail "$corpus: fewer than 50 documents; a corpus needs more"
    mv "$heldout.part" "$heldout" && mv "$train.part" "$train"
    printf '%s\n' "$source" > "$work/data/source"
  fi
fi

step "training a tokenizer of $vocabulary pieces (VOCABULARY=N for another size): $work/data/tokenizer"
[ "$vocabulary" = "$(cat "$work/data/vocabulary" 2>/dev/null || echo "$vocabulary")" ] ||
  fail "$work has a tokenizer of $(cat "$work/data/vocabulary") pieces; remove $work to start again with $vocabulary"
[ -e "$work/data/tokenizer" ] || python "$root/tools/train_tokenizer.py" \
  --input "$train" --output "$work/data/tokenizer" --vocab-size "$vocabulary"
echo "$vocabulary" > "$work/data/vocabulary"

step "building the corpora: $work/data/train, $work/data/heldout"
for part in train heldout; do
  [ -e "$work/data/$part.manifest.json" ] || python "$root/tools/preprocess_data.py" \
    --input "${!part}" --output-prefix "$work/data/$part" --tokenizer "$work/data/tokenizer" --workers 2 --overwrite
done

step "training under DeepSpeed ZeRO-2: $work/run"
if [ -z "${RANKS:-}" ]; then
  cores=$(getconf _NPROCESSORS_ONLN) && RANKS=$((cores < 2 ? 1 : 2))
  command -v nvidia-smi >/dev/null && RANKS=1
fi
[ -n "$(command -v nvidia-smi)" ] || [ -e /dev/kfd ] || export DS_ACCELERATOR=cpu  # spares a warning
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} deepspeed --log_level warning --num_gpus "$RANKS" --master_port $((20000 + RANDOM % 20000)) \
  "$root/examples/pretrain_base.sh" --run-file "$root/examples/recipes/quickstart.yaml" \
  folder="$work/run" model.tokenizer="$work/data/tokenizer" \
  data.corpora.0.prefix="$work/data/train" validation.corpora.0.prefix="$work/data/heldout" "$@"

step "converting to a Hugging Face folder: $work/model"
[ -e "$work/model" ] || python "$root/tools/convert_to_hf.py" --checkpoint "$work/run" --output "$work/model" --dtype fp32

step "filling masks, before and after"
python "$root/tools/fill_mask.py" "${probes[@]}" \
  --model "$work/run/checkpoints/step-00000000" --label before --model "$work/model" --label after

step "done"
printf 'model    %s\nreport   %s\nmetrics  %s\n' "$work/model" "$work/run/report.html" "$work/run/metrics.jsonl"
