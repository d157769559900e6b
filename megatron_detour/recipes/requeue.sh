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

# last_session FOLDER: "NUMBER WORD STEP": how many sessions environment.json tells of, how the last one ended, in a word
# (finished, error or interrupted; killed where it tells of no end), and which step it has saved: 0 for none after the
# one that it began with.
last_session() {
  awk -F'"' 'BEGIN { how = "none" }
    /^ ]/ { exit }
    /^  {/ { number++; how = "killed"; began = saved = 0 }
    /^   "step":/ { began = substr($3, 3) + 0 }
    /^   "saved":/ { saved = substr($3, 3) + 0 }
    /^   "ended":/ { how = $4 ~ /^error: / ? "error" : $4 == "finished" ? "finished" : "interrupted" }
    END { print number + 0, how, (saved > began ? saved : 0) }' "$1/environment.json" 2>/dev/null || echo 0 none 0
}

# run_and_requeue FOLDER COMMAND...: runs COMMAND, which trains in FOLDER, and ends the job with its status. Where the run
# says that it was interrupted and saved, by status 75 or by what it wrote down (tasks that end apart get another status
# from srun), the job is requeued, unless this start has saved no step: the next one would do no better. Names of
# checkpoints do not tell: a run that had to pass over a damaged one saves earlier steps again.
run_and_requeue() {
  local folder=$1 status=0 before number how saved
  shift
  read -r before _ < <(last_session "$folder")
  "$@" || status=$?
  [ "$status" -ne 0 ] || exit 0
  read -r number how saved < <(last_session "$folder")
  [ "$number" != "$before" ] || how=none saved=0
  [ "$status" -eq 75 ] || [ "$how" = interrupted ] || exit "$status"
  if [ "$saved" -eq 0 ]; then
    echo "error: interrupted without a new checkpoint in $folder: not requeued; give the job more time" >&2
    exit 1
  fi
  echo "interrupted at step $saved: job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" || { echo "error: not requeued; sbatch the same again" >&2; exit 75; }
  exit 0
}
