"""Operations, hours, sessions, epochs and disk."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_detour.config import Corpus, from_dict, load
from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.data.indexed import IndexedCorpus
from megatron_detour.forecast import costs, forecast, headline, render
from megatron_detour.forecast.costs import PhaseCost, Sample, Speed, sample_lengths
from megatron_detour.forecast.micro_batches import Search, memory_setting
from megatron_detour.forecast.storage import disk, readings
from megatron_detour.forecast.warnings import warnings
from megatron_detour.model import roofline
from megatron_detour.model.families import PUBLISHED, Family, read_shape
from megatron_detour.model.flops import Frozen, training_flops
from megatron_detour.model.peaks import Chip, chip, peak_flops
from megatron_detour.plan import Plan, PlannedPhase
from megatron_detour.preflight import Preflight, preflight
from tests.harness import ROOT, environment
from tests.models import CONFIG

RECIPES = ROOT / "examples/recipes"
TINY = read_shape(CONFIG, "tests")


def run_file(**changes) -> dict:
    detour = {"name": "detour", "objective": "clm", "tokens": "40 steps", "learning_rate": {"peak": 1e-3}}
    rate = {"peak": 1e-3, "shape": "1-sqrt", "end": 0.0}
    decay = {"name": "decay", "objective": "mlm", "mask_rate": 0.2, "tokens": "10 steps", "learning_rate": rate}
    return {
        "name": "small",
        "folder": "runs/small",
        "model": {"start": "somewhere/encoder"},
        "data": {"corpora": [{"prefix": "a", "weight": 3}, {"prefix": "b", "weight": 1}], "sequence_length": 128},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "phases": [detour, decay],
        "deepspeed": str(ROOT / "ds_configs/zero2_bf16.json"),
    } | changes


def planned(**changes):
    config = from_dict(run_file(**changes))
    return config, Plan.from_config(config)


def cost_of(phase: PlannedPhase, recompute: str, speed: Speed, gpus: int, shape: Family = TINY) -> PhaseCost:
    return costs.phase_cost(shape, phase, Sample.from_phase(phase), recompute, speed, gpus)


def test_the_papers_run():
    """French base on 4 x H100: 10B of CLM took 3h25, at 203k tokens/s a GPU; 1B of MLM about 20 minutes. Packs of
    whole 8,192-token documents are taken for granted here, as the lengths of the paper's documents are not known."""
    config = load(RECIPES / "french_base_10b.yaml")
    plan = Plan.from_config(config)
    measured = forecast(config, plan, 4, rate=203_000)
    detour, decay = measured.costs
    assert detour.seconds == pytest.approx(3.42 * 3600, rel=0.01)
    assert detour.flops / detour.tokens == pytest.approx(1.13e9, rel=0.01)
    implied = detour.flops / detour.tokens * 203_000 / peak_flops("NVIDIA H100 80GB HBM3", bf16=True)
    assert implied == pytest.approx(0.232, abs=0.002)
    result = forecast(config, plan, 4, mfu=implied, device="NVIDIA H100 80GB HBM3")
    assert [round(cost.seconds / 60) for cost in result.costs] == [205, 24]
    assert result.costs[0].roofline is None
    modeled = forecast(config, plan, 4).costs[0]  # 67% of the roofline is what this run reached
    assert modeled.seconds == pytest.approx(3.42 * 3600, rel=0.02)
    assert modeled.roofline == pytest.approx(0.67 * modeled.seconds)
    assert decay.flops / decay.tokens == pytest.approx(1.31e9, rel=0.01)
    assert result.sessions == 1


def test_a_hybrid_costs_what_its_parts_cost():
    """A quarter of the documents as in CLM, the others as in MNTP; memory and backends for the dearer of both."""
    phase = {"tokens": "40 steps", "learning_rate": {"peak": 1e-3}}
    kinds = [
        {"objective": "hybrid", "mask_rate": 0.3, "causal_share": 0.25},
        {"objective": "clm"},
        {"objective": "mntp", "mask_rate": 0.3},
    ]
    config, plan = planned(phases=[{"name": kind["objective"], **kind, **phase} for kind in kinds])
    speed = Speed(chip=chip("NVIDIA H100 80GB HBM3"))
    hybrid, clm, mntp = (cost_of(phase, "none", speed, 4) for phase in plan.phases)
    assert clm.flops != pytest.approx(mntp.flops, rel=0.02)  # more labels, fewer visible pairs
    assert hybrid.flops == pytest.approx(0.25 * clm.flops + 0.75 * mntp.flops)
    # Twice as many micro-batches, whose gradients are summed.
    assert 1 < hybrid.roofline / (0.25 * clm.roofline + 0.75 * mntp.roofline) < 1.5
    samples = {phase.name: Sample.from_phase(phase) for phase in plan.phases}
    setting = memory_setting(config, bf16=True, ranks=4, on_gpu=True)
    peaks = Search(plan, TINY, setting, samples, 80.0).memory()
    assert peaks["hybrid"].counted == max(peaks["clm"].counted, peaks["mntp"].counted)
    assert [causal for *_, causal in plan.micro_batches] == [True, False, True, False]


def test_the_twins_differ_by_attention_and_head():
    """In the decay the head sees 15% of the positions, and attention both sides."""
    _, plan = planned(data={"corpora": [{"prefix": "a"}], "sequence_length": 128})
    speed = Speed(tokens_per_second=100.0)
    detour, decay = (cost_of(phase, "none", speed, 2) for phase in plan.phases)
    assert detour.flops == 40 * 8 * training_flops(TINY, (128,), True, 127)
    assert decay.flops == 10 * 8 * training_flops(TINY, (128,), False, round(0.2 * 128))
    assert (detour.sampled, detour.mean_document) == (False, 128)
    assert detour.seconds == 40 * 8 * 128 / 200


def test_time_follows_peak_share_and_what_is_computed_again():
    _, plan = planned()
    speed = Speed(mfu=0.5, chip=Chip(1e9, 1e9))
    once, again = (cost_of(plan.phases[0], r, speed, 1) for r in ("none", "full"))
    assert once.seconds == pytest.approx(once.flops / 5e8)
    assert again.seconds == pytest.approx(once.seconds * 4 / 3)
    assert again.flops == once.flops
    unknown = cost_of(plan.phases[0], "none", Speed(mfu=0.5), 1)
    assert unknown.seconds is None


def test_time_at_the_roofline():
    """A phase is its steps: micro-batches at the roofline, each with its sum of gradients, and an update."""
    _, plan = planned(data={"corpora": [{"prefix": "a"}], "sequence_length": 128})
    phase, sheet = plan.phases[0], chip("h100")
    cost = cost_of(phase, "none", Speed(chip=sheet), 2)
    a_micro_batch = roofline.seconds(TINY, (128, 128), True, 2 * 127, sheet, "varlen")
    update = roofline.update_seconds(TINY.parameters, sheet, micro_batches=2, ranks=2)
    assert cost.roofline == pytest.approx(40 * (2 * a_micro_batch + update))
    assert cost.seconds == pytest.approx(cost.roofline / costs.ASSUMED_SHARE)
    slower = {
        "full": cost_of(phase, "full", Speed(chip=sheet), 2),
        "half": cost_of(phase, "none", Speed(chip=sheet), 1),
    }
    assert all(one.roofline > cost.roofline for one in slower.values())
    config, plan = planned()
    text = render(forecast(config, plan, 1, checked=known(config, TINY), device="h100"))
    assert "at 67% of the roofline of each (assumed: a model, not a measurement)" in text
    assert "roofline: tokens/s per GPU at most, with varlen attention, without communication" in text


def test_frozen_layers_cost_less():
    _, plan = planned()
    phase, speed = plan.phases[0], Speed()

    def flops(*freeze: str) -> float:
        settings = dataclasses.replace(phase.settings, freeze=freeze)
        frozen = dataclasses.replace(phase, settings=settings)
        return cost_of(frozen, "none", speed, 1).flops

    weights = phase.tokens * 2 * (4 * 32 * 32 + 3 * 32 * 48)  # the gradients of a layer's weights
    assert flops() - flops("layers.0-1") == 2 * weights
    assert flops() - flops("layers.4") == weights
    # With nothing trainable below, the two layers need no gradient at all: two thirds of what they cost.
    layers = dataclasses.replace(TINY, layer_types=TINY.layer_types[:2])
    whole = phase.tokens // 128 * training_flops(layers, (128,), True, 0)
    head = phase.tokens // 128 * 127 * 2 * 32 * 301
    assert flops() - flops("embeddings", "layers.0-1") == pytest.approx(whole * 2 / 3 + head)
    assert flops() - flops("head") == phase.tokens // 128 * 127 * 2 * 32 * 32
    assert Frozen(frozenset({0, 1, 3}), embeddings=True).below == 2
    assert Frozen(frozenset({0, 1, 3})).below == 0


def test_lengths_come_from_all_over_a_corpus(corpus, monkeypatch):
    everything = IndexedCorpus(corpus.prefix).lengths
    lengths = sample_lengths(Corpus(corpus.prefix), 128)
    assert sum(lengths) == everything.sum() and max(lengths) == 128  # the long one is cut
    assert sample_lengths(Corpus("nowhere"), 128) is None
    monkeypatch.setattr(costs, "SPANS", 3)
    monkeypatch.setattr(costs, "DOCUMENTS", 2)
    few = sample_lengths(Corpus(corpus.prefix), 10**6)
    middle = (len(everything) - 2) // 2
    assert few == tuple(everything[[0, 1, middle, middle + 1, -2, -1]])


def test_documents_of_a_corpus_are_what_is_counted(corpus):
    _, plan = planned(data={"corpora": [{"prefix": corpus.prefix}], "sequence_length": 128})
    cost = cost_of(plan.phases[0], "none", Speed(), 1)
    lengths = sample_lengths(Corpus(corpus.prefix), 128)
    expected = training_flops(TINY, lengths, True, sum(lengths) - len(lengths)) / sum(lengths)
    assert cost.sampled
    assert cost.mean_document == pytest.approx(sum(lengths) / len(lengths))
    assert cost.flops / cost.tokens == pytest.approx(expected, rel=1e-6)


def test_epochs_by_weight_and_phase(corpus):
    own = {"corpora": [{"prefix": corpus.prefix}]}
    phases = run_file()["phases"]
    phases[1] |= own
    shared = [{"prefix": corpus.prefix, "weight": 3}, {"prefix": "b", "weight": 1}]
    config, plan = planned(phases=phases, data={"corpora": shared, "sequence_length": 128})
    mine, other = readings(plan)
    tokens = IndexedCorpus(corpus.prefix).token_count
    assert mine.read == {"detour": 0.75 * 40 * 8 * 128, "decay": 10 * 8 * 128}
    assert mine.epochs == pytest.approx(40_960 / tokens)
    assert (other.read, other.tokens, other.epochs) == ({"detour": 0.25 * 40 * 8 * 128}, None, None)
    often = dataclasses.replace(mine, tokens=8_000)
    (result,) = [warning for warning in warnings(config, plan, [often, other], None) if "times" in warning]
    assert "read 5.1 times" in result and corpus.prefix in result


@pytest.mark.parametrize(
    ("checkpoint", "model", "count"),
    [
        ({}, {"start": "x"}, 2),  # both boundaries
        ({}, {"config": {}, "tokenizer": "t"}, 3),  # and the start of a fresh model
        ({"every": 1024, "keep": 3}, {"start": "x"}, 2 + 3),
        ({"every": 20_480, "keep": 3}, {"start": "x"}, 2),  # 51,200 tokens: two saves, and the boundaries
        ({"every": 1024, "keep": 1, "keep_every": 10_240}, {"start": "x"}, 2 + 5 + 1),
    ],
)
def test_checkpoints_at_a_time(tmp_path, checkpoint, model, count):
    config, plan = planned(checkpoint=checkpoint, model=model, folder=str(tmp_path / "not/yet"))
    result = disk(config, plan, 1_000_000)
    assert result.checkpoints == count
    assert result.checkpoint == 12 * 1_000_000 + 8_000_000
    assert result.needed == count * result.checkpoint + 50 * 600
    assert result.free > 0


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("AMD Instinct MI300X", 1307.4),
        ("h100", 989.4),
        ("Tesla V100-SXM2-32GB", None),
        ("CPU (x86_64)", None),
    ],
)
def test_peaks_by_the_names_that_torch_gives(name, teraflops):
    peak = peak_flops(name, bf16=True)
    assert peak == (None if teraflops is None else pytest.approx(teraflops * 1e12))
    assert peak_flops(name, bf16=False) is None


def known(config, shape: Family) -> Preflight:
    return Preflight(shape=shape, deepspeed=read_deepspeed_config(config.deepspeed))


def test_sessions_of_a_time_limit():
    config, plan = planned(time_limit="2h")
    result = forecast(
        config,
        plan,
        1,
        checked=known(config, TINY),
        rate=51_200 / 7200 / 3.5,
    )
    assert result.sessions == 4
    assert "7h00m on 1 x h100 at 2 tokens/s each (given), 4 sessions of 2h00m" in render(result)
    assert [costs.sessions(seconds, None) for seconds in (1, 86_400, 86_401)] == [1, 1, 2]
    assert costs.sessions(86_400, 6 * 3600) == 4


def test_the_head_of_a_run_is_short_and_survives_what_is_not_known(tmp_path):
    shape = read_shape(PUBLISHED["answerdotai/ModernBERT-base"], "base")
    config, plan = planned(folder=str(tmp_path))
    lines = headline(forecast(config, plan, 2, checked=known(config, shape))).splitlines()
    assert len(lines) <= 8
    assert [line.split()[0] for line in lines] == ["model", "memory", "micro-batch", "work", "time", "disk", "warnings"]
    config, plan = planned(deepspeed="nowhere.json", folder="/proc/nowhere/run")
    result = forecast(config, plan, 3)
    assert (result.memory, result.costs, result.parameters) == (None, None, None)
    assert headline(result).startswith("model       somewhere/encoder: unknown")
    assert "fault: deepspeed: nowhere.json" in render(result)


def test_a_damaged_corpus_does_not_end_a_run(corpus, tmp_path):
    prefix = tmp_path / "damaged"
    for kind in ("bin", "idx"):
        (tmp_path / f"damaged.{kind}").write_bytes(b"no index")
    manifest = json.loads(Path(f"{corpus.prefix}.manifest.json").read_text())
    del manifest["tokenizer"]["sha256"]
    manifest["files"] = {}
    (tmp_path / "damaged.manifest.json").write_text(json.dumps(manifest))
    config, plan = planned(data={"corpora": [{"prefix": str(prefix)}], "sequence_length": 128})
    result = forecast(config, plan, 1, checked=dataclasses.replace(preflight(config, plan), shape=TINY))
    assert len(headline(result).splitlines()) <= 8
    assert any("files: Expected `object` of length >= 2" in fault for fault in result.faults)


def test_a_forecast_needs_no_torch():
    script = (
        "import sys\nfrom megatron_detour.commands.main import main\n"
        f"main(['plan', {str(RECIPES / 'french_base_10b.yaml')!r}])\n"
        "assert not {'torch', 'transformers', 'deepspeed', 'rich'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"136\.12M parameters", done.stdout)
