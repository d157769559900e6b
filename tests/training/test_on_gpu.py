"""What a CPU cannot show: the fused AdamW, copies, synchronizations, the allocator, and kernels at real sizes."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.forecast.memory import Load, Setting, peak_memory
from megatron_detour.kernels.check import Sizes
from megatron_detour.model.choose import choose_compute
from megatron_detour.model.families import FAMILIES, PUBLISHED, Family, read_shape
from megatron_detour.parallel import loss
from megatron_detour.parallel.shard_spec import CHUNK_ELEMENTS
from megatron_detour.training.engine import create_engine, start_distributed
from tests.forecast.test_memory import BASE, LARGE
from tests.harness import run_ranks
from tests.injections.campaign import Victim
from tests.injections.runs import Setup, write_run_file
from tests.models import config_of, microbatch
from tests.parallel.test_loss import VOCABULARY, operands, ours, reference
from tests.training import test_freezing, test_zero2
from tests.training.counting import ONLY_COUNTS, counted, uncompared_compute
from tests.training.test_zero2 import run_config, step_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]

CUDA = torch.device("cuda")
# Most launches in a micro-batch, per layer, per chunk of the loss and besides, and those of the optimizer's step.
LAUNCHES_PER_LAYER, LAUNCHES_PER_CHUNK, OTHER_LAUNCHES, STEP_LAUNCHES = 40, 65, 60, 100
NARROW = read_shape(PUBLISHED["answerdotai/ModernBERT-base"] | {"num_hidden_layers": 4}, "four layers of base")


def test_a_step_equals_plain_torch(tmp_path):
    test_zero2.test_steps_equal_plain_torch_for_every_split(tmp_path, 1, 1, False, 1)


def test_a_frozen_block_stays_to_the_bit(tmp_path):
    test_freezing.test_a_frozen_block_stays_to_the_bit_and_the_rest_trains_as_in_plain_torch(tmp_path, 1, 1)


@pytest.mark.parametrize("file", ["zero2_fp32_cpu.json", "zero2_bf16.json"])
def test_a_skipped_step_leaves_weights_and_moments(tmp_path, file):
    ((_, figures, moved),) = run_ranks(1, "tests.training.test_step:a_step", tmp_path, float("nan"), file)
    assert not any(moved) and all("skipped" in one for one in figures)
    ((waits, _, moved),) = run_ranks(1, "tests.training.test_step:a_step", tmp_path, 1.0, file)
    assert any(moved) and waits["cpu in trainer.py"] == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_killed_run_resumes_to_the_bit(corpus, tmp_path, precision):
    run_file = write_run_file(tmp_path / "run.yaml", corpus.prefix, corpus.tokenizer)
    outcome = Victim(tmp_path / "victim", run_file, Setup(1, 1, precision), seed=5).strike(
        ["SIGKILL of all", "SIGTERM"]
    )
    assert outcome.struck.total() == 2


def engine_of(shape: Family):
    """A model of this shape under ZeRO-2 in bf16, on this process's GPU."""
    config = run_config(1)
    state, device = start_distributed(config)
    if ONLY_COUNTS:
        compute = uncompared_compute()
    else:
        compute = choose_compute("auto", "auto", "none", Sizes(), device, torch.bfloat16).compute
    model = shape.build(state, compute)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(model.initial_weight(name, 0))
    return create_engine(model, config, read_deepspeed_config("ds_configs/zero2_bf16.json"), state)


def micro_batches(tokens: int, causal: bool) -> list:
    return [microbatch((tokens // 4,) * 4, causal, seed=seed).pin() for seed in range(2)]


def a_step_without_waits(causal: bool) -> float:
    zero = engine_of(NARROW)
    batches = micro_batches(4096, causal)
    step_of(zero, batches, 1000)
    torch.cuda.set_sync_debug_mode("error")
    scale = torch.full((), 1e-3, dtype=torch.float64, device=CUDA)
    for batch in batches:
        zero.accumulate(batch.to(CUDA).arguments, scale)
    norm = zero.sum_gradients()
    zero.step(norm)
    torch.cuda.set_sync_debug_mode("default")
    return float(norm)


@pytest.mark.parametrize("causal", [False, True])
def test_nothing_in_a_step_waits_for_the_device(tmp_path, causal):
    (norm,) = run_ranks(1, "tests.training.test_on_gpu:a_step_without_waits", tmp_path, causal)
    assert norm > 0


def launches(shape: Family, tokens: int, causal: bool) -> tuple[dict[str, int], dict[str, int]]:
    """What the GPU is asked to do in a micro-batch of documents of 256 tokens, and in a step of two."""
    zero = engine_of(shape)
    batches = [microbatch((256,) * (tokens // 256), causal, 0.3, seed).pin() for seed in range(2)]
    for _ in range(2):
        step_of(zero, batches, 1000)
    scale = torch.full((), 1e-3, device=CUDA)

    def step() -> None:
        for batch in batches:
            zero.accumulate(batch.to(CUDA).arguments, scale)
        zero.step(zero.sum_gradients())

    return counted(lambda: zero.accumulate(batches[0].to(CUDA).arguments, scale)), counted(step)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [16_384, 65_536])
@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_launches_are_few_and_nothing_waits(tmp_path, shape, tokens, causal):
    """A kernel more per layer is a slower step, which no comparison of results shows (docs/performance.md)."""
    ((one, step),) = run_ranks(1, "tests.training.test_on_gpu:launches", tmp_path, shape, tokens, causal)
    print(f"{shape.layers} layers, {tokens:,} tokens, causal {causal}: {one}, a step of two {step}")
    assert one["waits"] == step["waits"] == 0
    chunks = math.ceil(0.3 * tokens * shape.vocabulary / CHUNK_ELEMENTS["cuda"])
    most = LAUNCHES_PER_LAYER * shape.layers + LAUNCHES_PER_CHUNK * chunks + OTHER_LAUNCHES
    assert 0 < one["launches"] <= most
    assert step["launches"] <= 2 * one["launches"] + STEP_LAUNCHES
    assert step["copies"] <= 4


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_waits(tmp_path, family, causal):
    shape = read_shape(config_of(family, hidden_size=256, intermediate_size=512), family)
    ((one, step),) = run_ranks(1, "tests.training.test_on_gpu:launches", tmp_path, shape, 4096, causal)
    print(f"{family}, {shape.layers} layers, causal {causal}: {one}, a step of two {step}")
    assert one["launches"] > 0 and one["waits"] == step["waits"] == 0


def peak_of_a_step(causal: bool) -> tuple[int, int]:
    """Bytes that torch's allocator had at most, and labeled positions of a micro-batch."""
    zero = engine_of(BASE)
    batches = micro_batches(16_384, causal)
    step_of(zero, batches, 1000)
    torch.cuda.reset_peak_memory_stats()
    step_of(zero, batches, 1000)
    return torch.cuda.max_memory_allocated(), len(batches[0].labels)


@pytest.mark.parametrize("causal", [False, True])
def test_memory_is_what_was_forecast(tmp_path, causal):
    ((peak, labeled),) = run_ranks(1, "tests.training.test_on_gpu:peak_of_a_step", tmp_path, causal)
    forecast = peak_memory(BASE, Setting(True), Load(16_384, labeled, causal))
    assert 0.85 * forecast.counted < peak < forecast.needed


@pytest.mark.parametrize("heads", [12, 16])
@pytest.mark.parametrize("lengths", [(8192,), (17,) * 300], ids=["long", "many short"])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_at_real_sizes(heads, lengths, causal):
    from megatron_detour.model.attention import AttentionPattern, sdpa_attention

    attention = choose_compute("auto", "auto", "none", Sizes(), CUDA, torch.bfloat16).compute.attention
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(lengths), 3, heads, 64, generator=generator)
    for window in (None, 64):
        found, expected = (
            function(qkv.to(device, dtype), AttentionPattern(lengths, causal, window, device)).float().cpu()
            for function, device, dtype in (
                (attention, CUDA, torch.bfloat16),
                (sdpa_attention, torch.device("cpu"), torch.float32),
            )
        )
        assert float((found - expected).norm() / expected.norm()) < 2e-2


@pytest.mark.parametrize("labels", [0, 7, 8, 45])
def test_the_loss_at_the_edges_of_chunks(monkeypatch, labels):
    monkeypatch.setitem(loss.CHUNK_ELEMENTS, "cuda", 8 * VOCABULARY)
    *leaves, wanted = operands(torch.float64, labels)
    theirs = [leaf.detach().to(CUDA, torch.float32).requires_grad_() for leaf in leaves]
    out, expected = ours(*theirs, wanted.to(CUDA)), reference(*leaves, wanted)
    torch.testing.assert_close(out.loss.double().cpu(), expected.detach(), rtol=1e-5, atol=1e-5)
    gradients = zip(torch.autograd.grad(out.loss, theirs), torch.autograd.grad(expected, leaves), strict=True)
    for found, exact in gradients:
        torch.testing.assert_close(found.double().cpu(), exact, rtol=1e-4, atol=1e-5)
