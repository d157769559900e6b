# For the batch scripts beside it: a job whose run was interrupted goes back into the queue.

# folder_of FOLDER ARGUMENT...: where a run with these arguments writes.
folder_of() {
  local folder=$1 control= argument
  shift
  for argument in "$@"; do
    case $argument in
      folder=*) folder=${argument#folder=} ;;
      --control*) control=-control ;;
    esac
  done
  echo "${folder%/}$control"
}

newest_checkpoint() { (cd "$1/checkpoints" 2>/dev/null && ls -d step-[0-9]* 2>/dev/null | tail -n 1) || true; }

# last_session FOLDER: "NUMBER WORD": how many sessions environment.json tells of, and how the last one ended, in a word:
# finished, error or interrupted; no word where it was killed.
last_session() {
  awk -F'"' '/^ *"started":/ { n++; how = "" }
    /^ *"ended":/ { how = $4 ~ /^error: / ? "error" : $4 == "finished" ? "finished" : "interrupted" }
    END { print n + 0, how }' "$1/environment.json" 2>/dev/null || echo 0
}

# run_and_requeue FOLDER COMMAND...: runs COMMAND, which trains in FOLDER, and ends the job with its status. Where the run
# says that it was interrupted and saved, by status 75 or by what it wrote down (tasks that end apart get another status
# from srun), the job is requeued, unless this start has brought no checkpoint: the next one would do no better.
run_and_requeue() {
  local folder=$1 status=0 before session
  shift
  before=$(newest_checkpoint "$folder") session=$(last_session "$folder")
  "$@" || status=$?
  [ "$status" -ne 0 ] || exit 0
  if [ "$status" -ne 75 ]; then
    case $(last_session "$folder") in
      "$session") exit "$status" ;;
      *" interrupted") ;;
      *) exit "$status" ;;
    esac
  fi
  if [ "$(newest_checkpoint "$folder")" = "$before" ]; then
    echo "error: interrupted without a new checkpoint in $folder: not requeued; give the job more time" >&2
    exit 1
  fi
  echo "interrupted at $(newest_checkpoint "$folder"): job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || { echo "error: not requeued; sbatch the same again" >&2; exit 75; }
  exit 0
}
