"""The training benchmark: fair, complete, and clear about what it cannot do. Nothing here is timed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AttentionInterface

from benchmarks import contenders, train
from benchmarks.measure import take_turns
from benchmarks.train import Measurement, measure_all, table, write_json
from benchmarks.workload import Workload, make_workload
from megatron_detour.data.batches import MicroBatch
from megatron_detour.errors import DetourError
from megatron_detour.model import compute as compute_module
from megatron_detour.model.attention import AttentionPattern, dense_attention
from megatron_detour.model.compute import Compute
from megatron_detour.objectives import IGNORE
from megatron_detour.parallel.state import ParallelState
from tests.harness import run_ranks
from tests.model.test_against_transformers import as_decoder

pytestmark = pytest.mark.integration

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CPU = torch.device("cpu")
SDPA = contenders.Peer("sdpa", False, CPU, torch.float32)
SETTINGS = Measurement(sequence_length=128, micro_sequences=2, tokens=1000, dtype="fp32", peer_batch=3, rounds=2)


@pytest.fixture(autouse=True)
def tiny_size(monkeypatch):
    monkeypatch.setitem(train.SIZES, "base", TINY)


def workload(objective: str, corpus: str | None = None) -> Workload:
    return make_workload(corpus, objective, 0.3, 128, 1000, full=False, seed=0)


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_every_contender_computes_the_same_loss(objective):
    """With the same weights the sum over all labeled positions is the same: padded, packed and flat."""
    work = workload(objective)
    config = {"model_type": "modernbert", "vocab_size": work.vocabulary.size, "local_attention": 16, **TINY}
    config["pad_token_id"] = work.vocabulary.pad
    mine, _ = contenders.ours(config, work, 2, Compute(), ParallelState(), CPU, torch.float32)
    if objective == "clm":
        config["local_attention"] = 18  # their decoder counts the query's own key in its window of half of that
    padded = contenders.transformers_padded(config, work, 3, SDPA)
    packed = contenders.transformers_packed(config, work, 2, SDPA)
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


@pytest.mark.parametrize("objective", ["mlm", "clm"])
def test_the_peers_flash_attention_is_told_where_documents_start(objective):
    """A stand-in takes the place of the library, and the same loss comes out as with masks."""
    seen = []

    def flash_stand_in(module, query, key, value, attention_mask, *, cu_seq_lens_q, cu_seq_lens_k, **options):
        assert torch.equal(cu_seq_lens_q, cu_seq_lens_k) and cu_seq_lens_q.dtype == torch.int32
        lengths = tuple(cu_seq_lens_q.diff().tolist())
        assert options["max_length_q"] == options["max_length_k"] == max(lengths)
        sliding = options.get("sliding_window")
        seen.append(lengths)
        window = None if sliding is None else sliding - 1  # FlashAttention is given one less on each side
        pattern = AttentionPattern(lengths, objective == "clm", window, CPU)
        return dense_attention(*(x[0].transpose(0, 1) for x in (query, key, value)), pattern)[None], None

    class StandIn(contenders.Peer):
        def model(self, *arguments):  # by a name that has no "flash" in it, or transformers would look for the library
            model = SDPA.model(*arguments)
            model.config._attn_implementation = "stand_in"
            return model

    AttentionInterface.register("stand_in", flash_stand_in)
    work = workload(objective)
    config = {"vocab_size": work.vocabulary.size, "local_attention": 16, **TINY, "pad_token_id": work.vocabulary.pad}
    config["model_type"] = "modernbert"
    flash = contenders.transformers_packed(config, work, 2, StandIn("flash", False, CPU, torch.float32))
    masked = contenders.transformers_packed(config, work, 2, SDPA)
    masked.model.load_state_dict(flash.model.state_dict())
    sums = [sum(float(one.loss(b).detach()) * labels_of(b) for b in one.batches) for one in (flash, masked)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)
    in_every_layer = sorted(len(d.inputs) for d in work.documents for _ in range(TINY["num_hidden_layers"]))
    assert sorted(length for row in seen for length in row) == in_every_layer


def labels_of(batch) -> int:
    return len(batch.labels) if isinstance(batch, MicroBatch) else int((batch["labels"] != IGNORE).sum())


def test_the_mask_rate_and_the_lengths_are_those_asked_for(corpus):
    work = workload("mlm", corpus.prefix)
    labeled = sum(int((d.labels != IGNORE).sum()) for d in work.documents)
    assert labeled / work.tokens == pytest.approx(0.3, abs=0.06)
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


@pytest.mark.slow
def test_the_table_and_the_file(tmp_path):
    (result,) = measure_all([replace(SETTINGS, against="transformers")], lambda line: None)
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


def test_compiled_layers_are_a_contender(monkeypatch):
    monkeypatch.setattr(compute_module, "COMPILER", {"backend": "eager"})
    (result,) = measure_all([replace(SETTINGS, compile=True, rounds=1)], lambda line: None)
    assert [row["name"] for row in result["contenders"]] == ["megatron_detour", "megatron_detour, compiled"]
    assert result["contenders"][0]["times_as_fast"] == 1.0


def two_ranks() -> int:
    train.SIZES["base"] = TINY
    settings = replace(SETTINGS, tensor=2, sequence_parallel=True, rounds=1)
    results = measure_all([settings, replace(settings, objective="clm"), replace(settings, recompute="full")], print)
    return sum(result["contenders"][0]["tokens_per_second"] > 0 for result in results)


@pytest.mark.slow
def test_tensor_parallel_ranks_make_several_measurements_together(tmp_path):
    assert run_ranks(2, "tests.benchmarks.test_train:two_ranks", tmp_path) == [3, 3]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tensor": 2}, "--tensor: 2 differs from the 1 ranks started: torchrun"),
        ({"rounds": 0}, "--rounds: must be above 0, not 0"),
        ({"mask_rate": 1.0}, "--mask-rate"),
        ({"tensor": 2, "against": "transformers"}, "--against"),
        ({"seed": -1}, "--seed: must be at least 0, not -1"),
        ({"peer_attention": "eager"}, "--peer-attention: requires --against transformers"),
        ({"sequence_parallel": True}, "--sequence-parallel: requires --tensor above 1"),
        ({"layers": 0}, "--layers: must be above 0, not 0"),
        ({"corpus": "data/notes", "full": True}, "--full"),
        (
            {"tensor": 3, "sequence_parallel": True},
            "--sequence-parallel: 128 positions are not divisible by 3 ranks",
        ),
        ({"against": "transformers", "peer_attention": "flash_attention_2"}, "--peer-attention: "),
        ({"corpus": "nowhere/corpus"}, "nowhere/corpus"),
        ({"attention": "flash2"}, "flash2 requires a GPU"),
        ({"kernels": "triton"}, "triton requires a GPU"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_sentence(changes, told):
    with pytest.raises(DetourError, match=told):
        measure_all([replace(SETTINGS, **changes)], lambda line: None)
