"""What a study's jobs are given."""

from __future__ import annotations

import pytest

from megatron_detour.study import runner
from megatron_detour.study.plan import read_study
from tests.study.studies import write_study


@pytest.mark.parametrize(
    ("gpus", "parallel", "expected"),
    [
        (("0", "1", "2", "3"), 2, ["0,2", "1,3"]),
        (("4", "7"), 3, ["4", "7", "4"]),  # a third job shares a GPU
        ((), 2, [None, None]),
        (("0", "1"), 1, [None]),  # all of them, as they are
    ],
)
def test_jobs_that_run_at_once_have_gpus_of_their_own(corpus, tmp_path, monkeypatch, gpus, parallel, expected):
    monkeypatch.setattr(runner, "visible_gpus", lambda: gpus)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    study = read_study(write_study(tmp_path, corpus, evaluation=None, criteria={}))
    jobs = runner.Runner(study, [], parallel)
    assert [jobs._environment(slot).get("CUDA_VISIBLE_DEVICES") for slot in range(parallel)] == expected
