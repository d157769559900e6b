"""A study's jobs for a cluster: one command per line, or Slurm arrays that follow each other."""

from __future__ import annotations

import shlex
from pathlib import Path

from megatron_detour.files import write_whole
from megatron_detour.study.jobs import Job, levels
from megatron_detour.study.plan import Study

ARRAY = """#!/usr/bin/env bash
# One job of the study: line $SLURM_ARRAY_TASK_ID of the file $1. Set partition, account and time for your cluster.
#SBATCH --job-name=study
#SBATCH --gpus-per-node={ranks}
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --output={folder}/logs/slurm-%A-%a.log
set -uo pipefail
[ ! -e .venv/bin/activate ] || . .venv/bin/activate
command=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" "$1")
# In a step, as only its processes get the signal before the time limit.
srun --ntasks=1 --cpus-per-task="${{SLURM_CPUS_PER_TASK:-1}}" bash -c "exec $command"
status=$?
[ "$status" -ne 75 ] || scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"  # stopped in time, to go on
exit "$status"
"""


def write_jobs(study: Study, jobs: list[Job], kind: str) -> str:
    """Return the commands, in order, or write Slurm scripts and return how to submit them."""
    stages = [[_command(study, job.name) for job in stage] for stage in levels(jobs)]
    collect = f"megatron-detour study {shlex.quote(str(study.path))}"  # everything is done: it writes the page
    if kind == "list":
        return "\n".join([*(command for stage in stages for command in stage), collect])
    folder = study.folder / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "array.sbatch", ARRAY.format(ranks=study.config.ranks, folder=study.folder))
    (study.folder / "logs").mkdir(exist_ok=True)
    submit = [
        "#!/usr/bin/env bash",
        "# Submits the study: each stage starts when the one before has ended.",
        "set -euo pipefail",
    ]
    submit.append("previous=")
    for number, stage in enumerate([*stages, [collect]]):
        write_whole(folder / f"stage-{number}.txt", "\n".join(stage) + "\n")
        submit.append(_submit(folder, number, len(stage)))
    write_whole(folder / "submit.sh", "\n".join(submit) + "\n")
    return f"submit   bash {folder / 'submit.sh'}   (set partition and time in {folder / 'array.sbatch'})"


def _command(study: Study, job: str) -> str:
    return f"megatron-detour study {shlex.quote(str(study.path))} --job {shlex.quote(job)}"


def _submit(folder: Path, number: int, count: int) -> str:
    script, stage = (shlex.quote(str(folder / name)) for name in ("array.sbatch", f"stage-{number}.txt"))
    after = "${previous:+--dependency=afterany:$previous}"
    return f"previous=$(sbatch --parsable --array=1-{count} {after} {script} {stage})"
