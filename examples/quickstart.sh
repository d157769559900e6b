#!/usr/bin/env bash
# Text in, encoder out: tokenizer, corpus, MLM -> causal detour -> MLM decay, Hugging Face folder, report.
#
#   examples/quickstart.sh                   on a generated sample, in minutes on two CPU cores
#   examples/quickstart.sh my_corpus.jsonl   on your corpus: .jsonl (key "text"), .jsonl.gz or .txt
#   examples/quickstart.sh my_corpus.jsonl phases.detour.tokens=2M   with keys of recipes/quickstart.yaml overridden
#
# Everything is written to runs/quickstart, or runs/quickstart-NAME for your corpus. Run it again to resume from the last
# checkpoint. RANKS=N sets the number of processes, VOCABULARY=N the size of the tokenizer, TEXT_KEY=key the JSON key of
# the text.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ -x "$root/.venv/bin/python" ] && PATH="$root/.venv/bin:$PATH"
vocabulary=${VOCABULARY:-2048} text_key=${TEXT_KEY:-text}
began=$SECONDS

step() { printf '\n== %s (%ds)\n' "$*" $((SECONDS - began)); }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }

case ${1:-} in
  --control*) fail "train the control of a finished run with: bash examples/pretrain_base.sh --run-file runs/quickstart/run/run.yaml --control" ;;
  -?*) [ "$1" = -h ] || [ "$1" = --help ] || fail "$1: this script takes a corpus and key=value arguments" ;;
esac
case ${1:-} in -h|--help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit ;; esac
corpus=
if [ -f "${1:-}" ] || [[ ${1:-=} != *=* ]]; then corpus=$1 && shift; fi
name=
[ -z "$corpus" ] || name=-$(basename "$corpus" | sed 's/\..*//')
work=runs/quickstart$name
for override in "$@"; do
  case $override in
    folder=*|model.start=*) fail "$override: this script writes into $work; examples/pretrain_base.sh takes any folder" ;;
    *=*) ;;
    *) fail "$override: the corpus comes first, then key=value arguments" ;;
  esac
done
command -v deepspeed >/dev/null || fail "deepspeed is not installed; run make install"
recipe=(--run-file "$root/examples/recipes/quickstart.yaml"
  folder="$work/run" model.tokenizer="$work/data/tokenizer"
  data.corpora.0.prefix="$work/data/train" validation.corpora.0.prefix="$work/data/heldout" "$@")
python "$root/examples/pretrain_base.sh" --plan "${recipe[@]}" >/dev/null  # reports a misspelled key first

if [ -z "$corpus" ]; then
  step "generating the sample: $work/data"
  [ -e "$work/data/probes.jsonl" ] || python "$root/examples/sample/generate.py" --output "$work/data"
  corpus=$work/data/sample.jsonl train=$work/data/sample.jsonl heldout=$work/data/heldout.jsonl
  probes=(--probes "$work/data/probes.jsonl")
else
  [ ! -d "$corpus" ] || fail "$corpus is a folder, but this script takes one file; for folders use megatron-detour preprocess (--whole-files: one document per file)"
  [ -f "$corpus" ] || fail "$corpus: no such file"
  case $corpus in
    *.jsonl|*.jsonl.gz) kind=jsonl ;;
    *.txt) kind=txt ;;
    *) fail "$corpus: a corpus must end in .jsonl, .jsonl.gz or .txt" ;;
  esac
  train=$work/data/train.$kind heldout=$work/data/heldout.$kind
  probes=(--from-corpus "$heldout" --count 10 --text-key "$text_key")
  source="$(cd "$(dirname "$corpus")" && pwd)/$(basename "$corpus") $(cksum < "$corpus")"
  [ "$source" = "$(cat "$work/data/source" 2>/dev/null || printf %s "$source")" ] ||
    fail "$corpus has changed, or $work belongs to another file of this name; remove $work to start over"
fi

step "training a tokenizer with $vocabulary entries: $work/data/tokenizer"
[ "$vocabulary" = "$(cat "$work/data/vocabulary" 2>/dev/null || echo "$vocabulary")" ] ||
  fail "the tokenizer in $work has $(cat "$work/data/vocabulary") entries; remove $work to start over with $vocabulary"
[ -e "$work/data/tokenizer" ] || python "$root/tools/train_tokenizer.py" --input "$corpus" \
  --output "$work/data/tokenizer" --vocab-size "$vocabulary" --text-key "$text_key" ||
  fail "tokenizer training failed; set VOCABULARY=N (entries) or TEXT_KEY=key (JSON key of the text) before this command"
echo "$vocabulary" > "$work/data/vocabulary"

if [ "$train" != "$corpus" ]; then
  step "holding out every 50th document: $heldout"
  read_corpus() { case $corpus in *.gz) gzip -dc "$corpus" ;; *) cat "$corpus" ;; esac; }
  if [ ! -e "$train" ]; then
    rm -f "$heldout.part"
    read_corpus | awk -v held="$heldout.part" 'NR % 50 == 0 { print > held; next } { print }' > "$train.part"
    [ -e "$heldout.part" ] || { rm -r "$work/data"; fail "$corpus: a corpus needs at least 50 documents"; }
    mv "$heldout.part" "$heldout" && mv "$train.part" "$train"
  fi
  printf '%s\n' "$source" > "$work/data/source"
fi

step "building the corpora: $work/data/train, $work/data/heldout"
for part in train heldout; do
  [ -e "$work/data/$part.manifest.json" ] || python "$root/tools/preprocess_data.py" --input "${!part}" \
    --output-prefix "$work/data/$part" --tokenizer "$work/data/tokenizer" --text-key "$text_key" --workers 2 --overwrite
done

step "training under DeepSpeed ZeRO-2: $work/run"
if [ -z "${RANKS:-}" ]; then
  cores=$(getconf _NPROCESSORS_ONLN) && RANKS=$((cores < 2 ? 1 : 2))
  command -v nvidia-smi >/dev/null && RANKS=1
fi
status=0
OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} RANKS=$RANKS bash "$root/examples/pretrain_base.sh" "${recipe[@]}" || status=$?
case $status in
  0) ;;
  75|130) exit "$status" ;;  # Ctrl-C: the run has reported what it saved
  *) fail "training stopped, see above; run this command again to resume from the last checkpoint, or remove $work to start over" ;;
esac

step "converting to a Hugging Face folder: $work/model"
if [ ! -e "$work/model" ] || [ "$work/run/checkpoints" -nt "$work/model" ]; then
  rm -rf "$work/model"
  python "$root/tools/convert_to_hf.py" --checkpoint "$work/run" --output "$work/model" --dtype fp32
fi

step "filling masks, before and after"
python "$root/tools/fill_mask.py" "${probes[@]}" \
  --model "$work/run/checkpoints/step-00000000" --label before --model "$work/model" --label after

step "done"
printf 'model    %s\nreport   %s\nmetrics  %s\n' "$work/model" "$work/run/report.html" "$work/run/metrics.jsonl"
