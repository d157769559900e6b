"""Slurm: srun's tasks find each other, and a job whose run was interrupted goes back into the queue."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megatron_detour.runtime.slurm import PORTS, first_host, join_slurm
from tests.harness import ROOT, environment, free_port

SCRIPTS = ["one_node", "many_nodes"]
RANK_SCRIPT = """
import os, torch, torch.distributed as dist
from megatron_detour.errors import command_line
from megatron_detour.runtime.slurm import join_slurm
def main():
    assert join_slurm(os.environ)
    dist.init_process_group("gloo")
    places = [None] * dist.get_world_size()
    dist.all_gather_object(places, (dist.get_rank(), int(os.environ["LOCAL_RANK"])))
    print(places)
command_line(main)
"""


def task(number: int = 5, **changes: str) -> dict[str, str]:
    """The environment of one of eight tasks on two nodes, as srun sets it."""
    return {
        "SLURM_JOB_ID": "71234567",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "gpu[07-08]",
        "SLURM_JOB_NODELIST": "gpu[01-08]",
        "SLURM_NTASKS": "8",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number % 4),
    } | changes


def test_a_task_becomes_a_rank():
    environ = task()
    assert join_slurm(environ)
    ranks = {name: value for name, value in environ.items() if not name.startswith("SLURM_")}
    assert ranks == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "34567",
    }


@pytest.mark.parametrize("job", ["1", "19999", "20000", "71234567"])
def test_the_port_is_of_the_job(job):
    environ, other = task(SLURM_JOB_ID=job), task(7, SLURM_JOB_ID=job)
    assert join_slurm(environ) and join_slurm(other)
    assert int(environ["MASTER_PORT"]) in PORTS
    assert environ["MASTER_PORT"] == other["MASTER_PORT"]


def test_an_address_that_is_set_stays():
    environ = task(MASTER_ADDR="10.0.0.1", MASTER_PORT="1234")
    assert join_slurm(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("10.0.0.1", "1234")


@pytest.mark.parametrize(
    ("changes", "local_rank"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "1"}, "1"),
        ({"CUDA_VISIBLE_DEVICES": "0", "SLURM_GPUS_PER_TASK": "1"}, "0"),
        ({"CUDA_VISIBLE_DEVICES": "0"}, "1"),
    ],
)
def test_the_local_rank_is_a_gpu_that_the_task_sees(changes, local_rank):
    environ = task(**changes)
    assert join_slurm(environ)
    assert environ["LOCAL_RANK"] == local_rank


def without(*names: str) -> dict[str, str]:
    return {name: value for name, value in task().items() if name not in names}


@pytest.mark.parametrize(
    "environ",
    [
        {},
        without("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_NODELIST"),  # a batch script: PROCID, NTASKS
        without("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),  # a shell of salloc
        task(RANK="3"),  # a launcher under srun
        without("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"),
    ],
)
def test_what_srun_has_not_started_is_left_alone(environ):
    before = dict(environ)
    assert not join_slurm(environ)
    assert environ == before


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node[003-005,9],gpu-a1", "node003"),
        ("gpu-a1,node[003-005]", "gpu-a1"),
        ("gpu-a1", "gpu-a1"),
        ("node[9,003-005]", "node9"),
        ("rack[2-3]node[08-11]", "rack2node08"),
        ("n[1-2].cluster.org,m1", "n1.cluster.org"),
        ("node[12]-ib,x", "node12-ib"),
    ],
)
def test_the_first_host(nodes, first):
    assert first_host(nodes) == first


def test_two_simulated_nodes_form_a_group(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK_SCRIPT)
    shared = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NODELIST": "localhost,node2", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            ["python", str(script)],
            env=environment() | task(**shared, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank % 2)),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    try:
        for process in processes:
            output, _ = process.communicate(timeout=120)
            assert (process.returncode, output) == (0, "[(0, 0), (1, 1), (2, 0), (3, 1)]\n")
    finally:
        for process in processes:
            process.kill()


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def project(tmp_path):
    """The submission's folder, with stand-ins that write down how they were called."""
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "slurm").symlink_to(ROOT / "examples" / "slurm")
    stand_in(tmp_path, "scontrol", 'echo "scontrol $*" >> calls; exit "${SCONTROL_STATUS:-0}"')
    return tmp_path


def submit(project: Path, script: str, srun: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
    """Runs a batch script as Slurm does: from a copy elsewhere, in the folder of the submission."""
    stand_in(project, "srun", f'echo "srun $*" >> calls\n{srun}')
    copy = project / "slurm_script"
    copy.write_bytes((ROOT / "examples" / "slurm" / f"{script}.sbatch").read_bytes())
    own = {"PATH": f"{project / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "8"}
    return subprocess.run(
        ["bash", str(copy), *arguments],
        env=os.environ | own | {"FOLDER": "runs/x"} | more,
        cwd=project,
        capture_output=True,
        text=True,
    )


def calls(project: Path) -> list[str]:
    return (project / "calls").read_text().splitlines()


def ended(*sessions: tuple[str | None, int, int | None], folder: str = "x") -> str:
    """Writes environment.json as a run does: of each session how it ended, and the steps it began with and saved."""
    records = [
        {"started": "2026-01-01T00:00:00Z", "step": step, "passed_over": []}
        | ({} if saved is None else {"saved": saved})
        | ({"ended": how} if how else {})
        for how, step, saved in sessions
    ]
    facts = {"versions": {"torch": "2"}, "corpora": [{"prefix": "x", "step": 9, "saved": 9}]}
    content = json.dumps({"sessions": records} | facts, indent=1)
    return f"mkdir -p runs/{folder}\ncat > runs/{folder}/environment.json <<'END'\n{content}\nEND\n"


EARLIER = ("SIGUSR1", 0, 1)


def before(project: Path, *sessions: tuple[str | None, int, int | None], folder: str = "x") -> None:
    subprocess.run(["bash", "-c", ended(*sessions, folder=folder)], cwd=project, check=True)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("earlier", [[], [EARLIER]])
@pytest.mark.parametrize(
    ("argument", "folder"),
    [("seed=1", "x"), ("--control", "x-control"), ("--control=mlm=0.4", "x-control"), ("folder=runs/y/", "y")],
)
def test_an_interrupted_run_is_requeued(project, script, earlier, argument, folder):
    if earlier:
        before(project, *earlier, folder=folder)
    run = ended(*earlier, ("SIGUSR1", len(earlier), 2), folder=folder) + "exit 75"
    output = submit(project, script, run, "phases.detour.tokens=2B", argument)
    assert (output.returncode, output.stderr) == (0, "")
    started, requeued = calls(project)
    assert started == (
        "srun --kill-on-bad-exit=1 --cpus-per-task=8 --gpu-bind=none python -u examples/pretrain_large.sh "
        f"folder=runs/x phases.detour.tokens=2B {argument}"
    )
    assert requeued == "scontrol requeue 12"
    assert "interrupted at step 2:" in output.stdout


@pytest.mark.parametrize(
    ("earlier", "after"),
    [
        ([], []),  # not so much as a session
        ([EARLIER], [EARLIER]),
        ([], [("SIGUSR1", 0, None)]),
        ([], [("SIGUSR1", 0, 0)]),  # the start alone
        ([EARLIER], [EARLIER, ("SIGUSR1", 1, None)]),
        ([EARLIER], [EARLIER, ("SIGUSR1", 1, 1)]),
    ],
)
def test_an_interrupted_run_without_progress_is_not_requeued(project, earlier, after):
    if earlier:
        before(project, *earlier)
    output = submit(project, "one_node", (ended(*after) if after else "") + "exit 75")
    assert output.returncode == 1
    assert "interrupted without a new checkpoint in runs/x: not requeued" in output.stderr
    assert len(calls(project)) == 1


def test_a_run_that_passed_over_a_damaged_checkpoint_is_requeued(project):
    """The greatest name stays the damaged one's."""
    (project / "runs/x/checkpoints/step-00000500").mkdir(parents=True)
    before(project, ("SIGUSR1", 0, 500))
    output = submit(project, "one_node", ended(("SIGUSR1", 0, 500), ("SIGUSR1", 400, 450)) + "exit 75")
    assert (output.returncode, output.stderr) == (0, "")
    assert "interrupted at step 450:" in output.stdout


@pytest.mark.parametrize("status", [0, 1, 137])
def test_another_end_is_the_job_s(project, status):
    output = submit(project, "many_nodes", ended((None, 0, 2)) + f"exit {status}")
    assert (output.returncode, output.stderr) == (status, "")
    assert len(calls(project)) == 1


@pytest.mark.parametrize(
    ("earlier", "after", "requeued"),
    [
        ([], ["SIGUSR1"], True),
        (["SIGUSR1"], ["SIGUSR1", "SIGTERM"], True),
        (["SIGUSR1"], ["SIGUSR1", "the end of the Slurm job at 12:00"], True),
        (["SIGUSR1"], ["SIGUSR1"], False),  # this start came to nothing
        (["SIGUSR1"], ["SIGUSR1", None], False),  # killed
        ([], ["error: SIGUSR1"], False),
        ([], ["finished"], False),
    ],
)
def test_what_the_run_wrote_down_decides_where_tasks_end_apart(project, earlier, after, requeued):
    """srun tells 143 where one task was still being ended when another had saved."""
    if earlier:
        before(project, *((how, 0, 1) for how in earlier))
    output = submit(project, "one_node", ended(*((how, 0, 1) for how in after)) + "exit 143")
    assert output.returncode == (0 if requeued else 143)
    assert [call.startswith("scontrol requeue") for call in calls(project)] == [False, True][: 1 + requeued]


@pytest.mark.parametrize("script", SCRIPTS)
def test_lines_of_the_site_come_first(project, script):
    (project / "examples" / "slurm").unlink()
    shutil.copytree(ROOT / "examples" / "slurm", project / "examples" / "slurm")
    (project / "examples" / "slurm" / "site.sh").write_text("export TRAIN=examples/pretrain_base.sh\n")
    assert submit(project, script, "exit 0").returncode == 0
    assert "examples/pretrain_base.sh" in calls(project)[0]


def test_a_requeue_that_slurm_refuses_is_told(project):
    output = submit(project, "one_node", ended(("SIGUSR1", 0, 2)) + "exit 75", SCONTROL_STATUS="1")
    assert output.returncode == 75
    assert "submit the same job again" in output.stderr


def test_another_run_can_be_trained(project):
    assert submit(project, "one_node", "exit 0", TRAIN="examples/pretrain_base.sh").returncode == 0
    assert calls(project)[0].endswith("python -u examples/pretrain_base.sh folder=runs/x")


@pytest.mark.parametrize("script", sorted((ROOT / "examples" / "slurm").iterdir()), ids=lambda path: path.name)
def test_the_scripts_are_bash(script):
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_jobs_are_warned_and_requeueable(script):
    text = (ROOT / "examples" / "slurm" / f"{script}.sbatch").read_text()
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert {"--signal=USR1@300", "--requeue", "--open-mode=append"} <= set(options)
    sizes = dict(option.removeprefix("--").split("=") for option in options if "=" in option)
    assert sizes["ntasks-per-node"] == sizes["gpus-per-node"]  # a rank a GPU
    assert (int(sizes["nodes"]) == 1) == (script == "one_node")


def test_the_hostfile_is_one_of_deepspeed():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "examples" / "hostfile")) == {"node1": 8, "node2": 8}
