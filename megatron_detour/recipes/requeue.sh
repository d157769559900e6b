# Sourced by batch scripts: requeues a job whose run was interrupted.

# folder_of FOLDER ARGUMENT...: prints the run directory of a run with these arguments.
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

# last_session FOLDER: prints "NUMBER STATE STEP": the number of sessions in environment.json, how the last one ended
# (finished, error or interrupted; killed if no end was recorded), and the last step that it saved (0 if none).
last_session() {
  awk -F'"' 'BEGIN { how = "none" }
    /^ ]/ { exit }
    /^  {/ { number++; how = "killed"; began = saved = 0 }
    /^   "step":/ { began = substr($3, 3) + 0 }
    /^   "saved":/ { saved = substr($3, 3) + 0 }
    /^   "ended":/ { how = $4 ~ /^error: / ? "error" : $4 == "finished" ? "finished" : "interrupted" }
    END { print number + 0, how, (saved > began ? saved : 0) }' "$1/environment.json" 2>/dev/null || echo 0 none 0
}

# run_and_requeue FOLDER COMMAND...: runs COMMAND, which trains in FOLDER, and exits with its status. If the run was
# interrupted (status 75, or recorded in environment.json, as srun replaces the status when tasks exit separately), the
# job is requeued, unless this session saved no step: the next would do no better. Checkpoint names cannot tell: a run
# that skipped a damaged checkpoint saves earlier steps again.
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
  echo "interrupted at step $saved: requeueing job $SLURM_JOB_ID"
  scontrol requeue "$SLURM_JOB_ID" || { echo "error: requeueing failed; submit the same job again" >&2; exit 75; }
  exit 0
}
