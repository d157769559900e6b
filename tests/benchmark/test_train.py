"""The training benchmark: fair, complete, and clear about what it cannot do. Nothing here is timed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_detour.benchmark import contenders, train
from megatron_detour.benchmark.measure import take_turns
from megatron_detour.benchmark.train import Settings, measure, table, write_json
from megatron_detour.benchmark.workload import Workload, make_workload
from megatron_detour.data.batches import MicroBatch
from megatron_detour.errors import DetourError
from megatron_detour.model.modernbert import Compute
from megatron_detour.objectives import IGNORE
from megatron_detour.parallel.state import ParallelState
from tests.harness import run_ranks
from tests.model.test_against_transformers import as_decoder

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CPU = torch.device("cpu")
SETTINGS = Settings(
    size="tiny",
    layers=None,
    objective="mlm",
    mask_rate=0.3,
    sequence_length=128,
    micro_sequences=2,
    tokens=1000,
    corpus=None,
    full=False,
    dtype="fp32",
    attention="auto",
    kernels="auto",
    recompute="none",
    tensor=1,
    sequence_parallel=False,
    against=None,
    peer_attention="sdpa",
    peer_batch=3,
    rounds=2,
    seed=0,
)


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(train.SIZES, "tiny", TINY)


def workload(objective: str, corpus: str | None = None) -> Workload:
    return make_workload(corpus, objective, 0.3, 128, 1000, full=False, seed=0)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_every_contender_computes_the_same_loss(objective):
    """With the same weights the sum over all labelled positions is the same: padded, packed and flat."""
    work = workload(objective)
    config = {"model_type": "modernbert", "vocab_size": work.vocabulary.size, "local_attention": 16, **TINY}
    config["pad_token_id"] = work.vocabulary.pad
    mine, _ = contenders.ours(config, work, 2, Compute(), ParallelState(), CPU, torch.float32)
    if objective == "clm":
        config["local_attention"] = 18  # their decoder counts the query's own key in its window of half of that
    padded = contenders.transformers_padded(config, work, 3, "sdpa", CPU, torch.float32)
    packed = contenders.transformers_packed(config, work, 2, "sdpa", CPU, torch.float32)
    weights = as_decoder(mine.model) if objective == "clm" else mine.model.state_dict()
    for peer in (padded, packed):
        missing, unexpected = peer.model.load_state_dict(weights, strict=False)
        assert set(missing) <= {"decoder.weight"} and not unexpected
        peer.model.tie_weights()
    sums = [
        sum(float(one.loss(batch).detach()) * labels_of(batch) for batch in one.batches)
        for one in (mine, padded, packed)
    ]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-5)
    assert sum(labels_of(batch) for batch in mine.batches) > 200


def labels_of(batch) -> int:
    return len(batch.labels) if isinstance(batch, MicroBatch) else int((batch["labels"] != IGNORE).sum())


def test_the_mask_rate_and_the_lengths_are_those_asked_for(corpus):
    work = workload("mlm", corpus.prefix)
    labelled = sum(int((d.labels != IGNORE).sum()) for d in work.documents)
    assert labelled / work.tokens == pytest.approx(0.3, abs=0.06)
    assert 1000 <= work.tokens < 1000 + 128
    assert max(len(d.inputs) for d in work.documents) <= 128
    assert sum(len(pack) for pack in work.packs()) == len(work.documents)
    full = make_workload(None, "mlm", 0.3, 128, 1000, full=True, seed=0)
    assert {len(d.inputs) for d in full.documents} == {128}
    again = workload("mlm", corpus.prefix)
    assert all(np.array_equal(a.inputs, b.inputs) for a, b in zip(work.documents, again.documents, strict=True))


def test_contenders_take_turns_and_the_first_round_does_not_count():
    work = workload("mlm")
    config = {"model_type": "modernbert", "vocab_size": work.vocabulary.size, **TINY}
    one, _ = contenders.ours(config, work, 2, Compute(), ParallelState(), CPU, torch.float32)
    said = []
    figures = take_turns([replace(one, name="a"), replace(one, name="b")], 2, CPU, said.append)
    assert [line.split(": ")[1].split()[0] for line in said] == ["a", "b"] * 3
    assert [len(f.seconds) for f in figures] == [2, 2]
    assert all(parameter.grad is None for parameter in one.model.parameters())


def test_the_table_and_the_file(tmp_path):
    result = measure(replace(SETTINGS, against="transformers"), lambda line: None)
    names = ["megatron_detour", "transformers, padded", "transformers, packed"]
    assert [row["name"] for row in result["contenders"]] == names
    mine = result["contenders"][0]
    assert mine["times_as_fast"] == 1.0
    assert mine["tokens_per_second"] == pytest.approx(result["tokens"] / mine["seconds"])
    assert mine["share_of_matrix_rate"] == pytest.approx(mine["flops_per_second"] / result["matrix_flops_per_second"])
    assert (result["attention"], result["kernels"]) == ("sdpa", "plain")
    lines = table([result, result]).splitlines()
    assert len(lines) == 2 + 6
    assert len({line.count("|") for line in lines}) == 1
    write_json(tmp_path / "figures.json", [result])
    assert json.loads((tmp_path / "figures.json").read_text())[0]["settings"]["tokens"] == 1000


def two_ranks(sequence: bool) -> float | None:
    train.SIZES["tiny"] = TINY
    settings = replace(SETTINGS, tensor=2, sequence_parallel=sequence, rounds=1)
    result = measure(settings, lambda line: None)
    return result["contenders"][0]["tokens_per_second"]


def test_tensor_parallel_ranks_are_measured_together(tmp_path):
    assert min(run_ranks(2, "tests.benchmark.test_train:two_ranks", tmp_path, True)) > 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tensor": 2}, "--tensor: 2 ranks are needed and 1 started; use torchrun --nproc_per_node 2"),
        ({"rounds": 0}, "--rounds: must be above 0, it is 0"),
        ({"mask_rate": 1.0}, "--mask-rate"),
        ({"tensor": 2, "against": "transformers"}, "--against"),
        ({"corpus": "nowhere/corpus"}, "nowhere/corpus"),
        ({"attention": "flash2"}, "flash2 needs a GPU"),
        ({"kernels": "triton"}, "triton needs a GPU"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_sentence(changes, told):
    with pytest.raises(DetourError, match=told):
        measure(replace(SETTINGS, **changes), lambda line: None)
