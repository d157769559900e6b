"""`micro_sequences: auto`: aims, memory, equal shares, the choice of an earlier session; the same on all ranks."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_detour.config import from_dict
from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.data.order import rank_micro_batches
from megatron_detour.forecast.costs import Sample
from megatron_detour.forecast.micro_batches import CPU_AIM, GPU_AIM, Search, memory_setting
from megatron_detour.parallel.state import ParallelState
from megatron_detour.plan import Plan
from megatron_detour.preflight import Preflight
from megatron_detour.training import micro_batches
from tests.forecast.test_costs import run_file
from tests.forecast.test_memory import BASE, LARGE
from tests.harness import run_ranks


def search(shape=BASE, sequences=384, length=8192, ranks=4, gigabytes=80.0, on_gpu=True, **changes) -> Search:
    changes = {"batch": {"sequences": sequences}} | changes
    data = {"corpora": [{"prefix": "nowhere"}], "sequence_length": length}
    config = from_dict(run_file(data=data, **changes))
    plan = Plan.from_config(config)
    samples = {phase.name: Sample.from_phase(phase) for phase in plan.phases}
    return Search(plan, shape, memory_setting(config, on_gpu, ranks, on_gpu), samples, gigabytes)


def chosen(**settings) -> dict[str, int]:
    return {name: batch.sequences for name, batch in search(**settings).choose().items()}


@pytest.mark.parametrize(
    ("settings", "expected", "why"),
    [
        ({}, 8, "close to 65,536 tokens"),
        ({"shape": LARGE}, 8, "close to 65,536 tokens"),
        ({"length": 1024, "sequences": 4096}, 64, "close to 65,536 tokens"),
        ({"length": 1024, "sequences": 128}, 32, "a rank's whole share of a step"),
        ({"sequences": 36, "ranks": 4}, 5, "close to 65,536 tokens"),  # 9 per rank: 5 and 4, not 8 and 1
        ({"length": 131_072, "sequences": 8, "gigabytes": math.inf}, 1, "close to 65,536 tokens"),
        ({"gigabytes": 24.0}, 5, "the most that fits 24 GB"),
        ({"shape": LARGE, "gigabytes": 4.0}, 1, "no more than 1 where 4 GB are too few"),
        ({"length": 256, "on_gpu": False, "gigabytes": math.inf}, 8, "close to 2,048 tokens"),
    ],
)
def test_what_auto_chooses(settings, expected, why):
    for batch in search(**settings).choose().values():
        assert (batch.sequences, batch.why) == (expected, why)
        assert batch.tokens == expected * settings.get("length", 8192)


@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
@pytest.mark.parametrize("ranks", [1, 3, 4])
@pytest.mark.parametrize("length", [512, 8192])
def test_it_fits_and_is_as_large_as_that_allows(shape, ranks, length):
    sizes = []
    for gigabytes in (20.0, 24.0, 40.0, 80.0):
        made = search(shape, 96, length, ranks, gigabytes)
        batches = made.choose()
        assert made.with_micro_batches(batches).fits() and made.with_micro_batches(batches).advice() is None
        for phase in made.plan.phases:
            size, per_rank = batches[phase.name].sequences, math.ceil(96 / ranks)
            count = len(rank_micro_batches(96 * length, size * length, 0, ranks)[0])
            assert size == math.ceil(per_rank / count)  # equal micro-batches
            assert size * length <= GPU_AIM
            larger = math.ceil(per_rank / (count - 1)) if count > 1 else None
            if larger and larger * length <= GPU_AIM:
                assert not made._fits(phase, larger)
        sizes.append(min(batch.sequences for batch in batches.values()))
    assert sizes == sorted(sizes)


def test_a_number_in_the_run_file_is_kept_and_better_ones_are_advised():
    made = search(batch={"sequences": 384, "micro_sequences": 2})
    assert {str(batch) for batch in made.choose().values()} == {"2 x 8,192 tokens"}
    made = made.with_micro_batches(made.choose())
    assert made.advice() == (
        "batch.micro_sequences=auto would choose 8 in detour, which fits as well and may be faster"
    )
    assert search(batch={"sequences": 384, "micro_sequences": 16}).advice() is None  # more than the aim is no fault
    phases = run_file()["phases"]
    phases[1]["micro_sequences"] = 3
    assert chosen(phases=phases) == {"detour": 8, "decay": 3}
    phases[1]["micro_sequences"] = "auto"
    batch = {"sequences": 384, "micro_sequences": 3}
    assert chosen(phases=phases, batch=batch) == {"detour": 3, "decay": 8}


def test_what_an_earlier_session_chose_is_kept_where_it_fits():
    before = {"detour": 6, "decay": 6}
    for gigabytes, expected in ((80.0, [6, 6]), (24.0, [5, 5])):
        batches = search(gigabytes=gigabytes).choose(before)
        assert [batch.sequences for batch in batches.values()] == expected
    assert {batch.why for batch in search().choose(before).values()} == {"as in the session before"}
    batch = {"sequences": 384, "micro_sequences": 2}
    assert [one.sequences for one in search(batch=batch).choose(before).values()] == [2, 2]


def setup(folder: Path, gigabytes: float, session: dict, device: str = "cpu", backends=("sdpa", "plain")):
    """Return what choose_sizes chooses for base, with these free gigabytes and a choice of backends."""
    config = from_dict(run_file(batch={"sequences": 384}, data={"corpora": [{"prefix": "x"}], "sequence_length": 512}))
    checked = Preflight(shape=BASE, deepspeed=read_deepspeed_config(config.deepspeed))
    initial = SimpleNamespace(shape=BASE, checked=checked)
    checks = []

    def choose(attention, kernels, recompute, sizes, device, dtype, compiled):
        checks.append(sizes.tokens)
        return SimpleNamespace(attention=backends[0], kernels=backends[1])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batches, "free_gigabytes", lambda device: gigabytes)
        patch.setattr(micro_batches, "choose_compute", choose)
        patch.setattr(micro_batches, "last_session", lambda folder: session)
        patch.setattr(micro_batches, "device_name", lambda device: "a device")
        state = ParallelState.create(1) if torch.distributed.is_initialized() else ParallelState()
        plan, sizes, _ = micro_batches.choose_sizes(
            config, Plan.from_config(config), folder, initial, state, torch.device(device)
        )
    assert [phase.micro_sequences for phase in plan.phases] == [size.sequences for size in sizes.values()]
    return [size.sequences for size in sizes.values()], checks


def on_two_ranks(session: dict) -> list[int]:
    from tests.harness import start_gloo

    start_gloo()
    rank = torch.distributed.get_rank()
    return setup(Path("unused"), (80.0, 14.0)[rank], session if rank == 0 else {}, "cuda", ("varlen", "triton"))[0]


SESSION = {
    "ranks": 2,
    "tensor_parallel": 1,
    "device": "a device",
    "recompute": "none",
    "micro_sequences": {"detour": 7, "decay": 9},
    "chosen_by_auto": {"detour": "it was free"},
}


def test_all_ranks_choose_by_the_least_memory_and_keep_what_the_first_rank_finds(tmp_path):
    alone = search(length=512, ranks=2, gigabytes=14.0).choose()
    first, second = run_ranks(2, "tests.forecast.test_micro_batches:on_two_ranks", tmp_path, {})
    assert first == second == [batch.sequences for batch in alone.values()]
    first, second = run_ranks(2, "tests.forecast.test_micro_batches:on_two_ranks", tmp_path, SESSION)
    assert first == second == [7, first[1]] and first[1] != 9  # the decay's number was the run file's


def test_a_session_on_another_machine_does_not_count(tmp_path):
    mine = SESSION | {"ranks": 1}
    assert setup(tmp_path, math.inf, mine)[0] == [7, 4]
    strange = {"micro_sequences": {"detour": "7"}}, {"chosen_by_auto": None}, {"micro_sequences": {"detour": -1}}
    for change in ({"device": "another"}, {"ranks": 2}, {"recompute": "full"}, *strange):
        assert setup(tmp_path, math.inf, mine | change)[0] == [CPU_AIM // 512] * 2


def test_slow_backends_get_what_fits_them(tmp_path):
    """They keep more, so the sizes at which backends are checked are an upper bound."""
    fast, checked = setup(tmp_path, 14.0, {}, "cuda", ("varlen", "triton"))
    slow, same = setup(tmp_path, 14.0, {}, "cuda", ("sdpa", "plain"))
    assert max(slow) < min(fast)
    assert checked == same == [512 * max(fast)]
