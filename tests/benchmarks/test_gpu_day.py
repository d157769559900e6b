"""gpu-day survives parts that fail or hang, keeps what they measured, and compares and suggests."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest

from benchmarks import gpu_day, gpu_parts, gpu_summary
from benchmarks.gpu_day import PARTS, Part, run_day
from megatron_detour.errors import DetourError
from tests.harness import environment

ROW = {
    "size": "base",
    "contender": "megatron_detour",
    "objective": "mlm",
    "sequence_length": 1024,
    "micro_tokens": 32_768,
    "attention": "flash3",
    "kernels": "triton",
    "roofline": 400_000.0,
    "tokens_per_second": 200_000.0,
    "bytes": 2**30,
    "share_of_matrix_rate": 0.3,
    "times_as_fast": 1.0,
}


@dataclass(frozen=True)
class Script(Part):
    """Runs Python code, whose first argument is the file of results."""

    code: str = ""

    def command(self, size, results):
        return [sys.executable, "-c", self.code, str(results)]


GOOD = "import json, sys; open(sys.argv[1], 'w').write(json.dumps({'rows': [], 'remark': 'fine'}))"
HANGS = (
    "import subprocess, sys, time; open(sys.argv[1], 'w').write('{\"half\": 1}');"
    "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(1000)']); time.sleep(1000)"
)


def test_a_day_in_which_one_part_fails_and_one_hangs(tmp_path):
    output, seen = tmp_path / "day.json", []

    def say(line):
        if output.exists():
            seen.append(json.loads(output.read_text()))  # whole at any time

    parts = (
        Script("first", 60, "", GOOD),
        Script("second", 60, "", "print('about to'); raise SystemExit('no such kernel')"),
        Script("third", 1, "", HANGS),
        Script("fourth", 60, "", GOOD),
    )
    day = run_day(output, 10, "tiny", say=say, parts=parts)
    assert json.loads(output.read_text()) == day
    assert {name: part["status"] for name, part in day["parts"].items()} == {
        "first": "done",
        "second": "failed",
        "third": "timed out",
        "fourth": "done",
    }
    assert day["parts"]["second"]["output"] == ["about to", "no such kernel"]
    assert day["parts"]["third"]["results"] == {"half": 1}
    assert [len(earlier["parts"]) for earlier in seen] == sorted(len(earlier["parts"]) for earlier in seen)


def test_parts_without_time_left_are_skipped(tmp_path):
    parts = (Script("one", 60, "", GOOD),)
    day = run_day(tmp_path / "day.json", 0.01, "tiny", say=lambda line: None, parts=parts)
    assert day["parts"]["one"] == {"status": "skipped", "why": "no time left"}


def test_bad_paths_are_refused(tmp_path):
    with pytest.raises(DetourError, match="--output: no such folder"):
        run_day(tmp_path / "no" / "day.json", 1, "tiny")
    with pytest.raises(DetourError, match="--only: no part is called 'bass'; the parts are facts, rates,"):
        run_day(tmp_path / "day.json", 1, "tiny", only=["bass"])
    (tmp_path / "old.json").write_text("[]")
    with pytest.raises(DetourError, match="not a JSON object"):
        run_day(tmp_path / "day.json", 1, "tiny", baseline=tmp_path / "old.json")


def test_a_day_of_the_real_size_needs_a_gpu(tmp_path):
    done = gpu_day_command("--output", str(tmp_path / "day.json"))
    assert (done.returncode, done.stderr) == (
        1,
        "error: gpu-day needs a GPU; --size tiny tries the command without one\n",
    )


def test_every_part_has_its_code():
    assert list(gpu_parts.PARTS) == [part.name for part in PARTS]


def gpu_day_command(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "megatron_detour", "gpu-day", *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_the_command_on_a_cpu(tmp_path):
    output = tmp_path / "day.json"
    done = gpu_day_command("--output", str(output), "--size=tiny", "--only", "facts", "base", "--minutes=60")
    assert done.returncode == 0, done.stderr
    day = json.loads(output.read_text())
    assert day["parts"]["facts"]["results"]["versions"]["torch"]
    rows = day["parts"]["base"]["results"]["rows"]
    assert {(row["objective"], row["sequence_length"]) for row in rows} == {
        (objective, length) for objective in ("mlm", "clm") for length in gpu_parts.SCALES["tiny"].lengths
    }
    assert day["summary"]["suggested"]["compute.attention"] == "sdpa"
    assert "| megatron_detour | tiny | clm |" in done.stdout


def test_the_table_has_the_roofline_and_the_baseline():
    day = {"parts": {"base": {"status": "done", "seconds": 3.0, "results": {"rows": [ROW]}}}}
    before = {"parts": {"base": {"status": "done", "results": {"rows": [ROW | {"tokens_per_second": 100_000.0}]}}}}
    lines = gpu_summary.summarize(day, before).markdown.splitlines()
    line = next(line for line in lines if line.startswith("| megatron_detour | base | mlm"))
    assert "| 200,000 | 50% | 30.0% | 1.0 | 2.00 |" in line


def test_the_smallest_micro_batch_that_is_as_fast_is_suggested():
    rows = [
        ROW,
        ROW | {"micro_tokens": 16_384, "tokens_per_second": 150_000.0, "share_of_matrix_rate": 0.2},
        ROW | {"micro_tokens": 131_072, "tokens_per_second": 202_000.0, "share_of_matrix_rate": 0.31},
        ROW | {"attention": "varlen", "share_of_matrix_rate": 0.25},
        ROW | {"contender": "transformers, packed", "share_of_matrix_rate": 0.9},
    ]
    assert gpu_summary.suggest(rows) == {
        "compute.attention": "flash3",
        "compute.kernels": "triton",
        "tokens per micro-batch": 32_768,
    }
    assert gpu_summary.suggest([]) == {}
    compiled = ROW | {"contender": "megatron_detour, compiled", "share_of_matrix_rate": 0.9}
    for slower, suggested in ((0.9, True), (0.99, False), (1.1, False)):
        found = gpu_summary.suggest([*rows, compiled | {"times_as_fast": slower}])
        assert found["compute.compile"] is suggested and found["compute.kernels"] == "triton"


def test_the_summary_says_why_a_part_has_no_figures():
    day = {"parts": {"peers": {"status": "failed", "seconds": 1.0, "results": {}, "output": ["out of memory"]}}}
    assert "| peers | failed | 1 | out of memory |" in gpu_summary.summarize(day).markdown
    assert gpu_day.LAST_LINES > 1
