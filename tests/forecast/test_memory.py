"""Memory against what is really there: parameters of models, tensors kept for a backward pass, ZeRO-2's partitions."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.forecast import memory
from megatron_detour.forecast.forecast import memory_setting
from megatron_detour.forecast.memory import Load, Setting, activations, parameters, partition, peak_memory
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import FAMILIES, PUBLISHED, Family, read_shape
from megatron_detour.optimizers import KINDS
from megatron_detour.parallel.state import ParallelState
from tests.harness import run_ranks, slow
from tests.models import CONFIG, config_of, microbatch, tiny
from tests.training.test_zero2 import run_config

BASE, LARGE = (read_shape(PUBLISHED[f"answerdotai/ModernBERT-{size}"], size) for size in ("base", "large"))
BF16, FP32 = True, False
# As wide as base and large in proportion to the hidden size, with windows far shorter than the documents.
PROPORTIONS = {"base": 96, "large": 164}


def elements_of(model: torch.nn.Module) -> tuple[int, int]:
    by_kind = [sum(p.numel() for p in model.parameters() if (p.dim() > 1) is matrix) for matrix in (True, False)]
    return by_kind[0], by_kind[1]


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("shape", [BASE, LARGE], ids=["base", "large"])
def test_parameters_are_the_models(shape, tensor):
    with torch.device("meta"):
        model = shape.build(ParallelState(tensor_size=tensor))
    assert parameters(shape, tensor) == elements_of(model)


def test_parameters_of_a_vocabulary_that_no_size_divides():
    for tensor in (1, 2, 4):
        assert parameters(read_shape(CONFIG, "tiny"), tensor) == elements_of(tiny(ParallelState(tensor_size=tensor)))


def test_the_published_models():
    """In millions, as their authors and transformers count them."""
    counts = {name.partition("/")[2]: sum(parameters(read_shape(c, name))) / 1e6 for name, c in PUBLISHED.items()}
    assert {name: round(count, 2) for name, count in counts.items()} == {
        "ModernBERT-base": 149.66,
        "ModernBERT-large": 395.88,
        "moderncamembert-base": 136.12,
        "moderncamembert-large": 377.84,
        "ettin-encoder-150m": 149.66,
        "mmBERT-base": 307.79,
        "bert-base-uncased": 109.51,
        "bert-base-multilingual-cased": 177.97,
        "camembert-base": 110.66,
        "roberta-base": 124.7,
        "roberta-large": 355.41,
        "xlm-roberta-base": 278.3,
        "xlm-roberta-large": 560.14,
    }


@pytest.mark.parametrize(
    ("shape", "tensor", "data", "weights", "optimizer"),
    [
        # 149,655,232 parameters: 2 bytes each, and 12 bytes of a rank's share.
        (BASE, 1, 1, 299_310_464, 1_795_862_784),
        (BASE, 1, 4, 299_310_464, 448_965_696),
        (BASE, 1, 8, 299_310_464, 224_482_848),
        # 395,881,664 parameters.
        (LARGE, 1, 1, 791_763_328, 4_750_579_968),
        (LARGE, 1, 8, 791_763_328, 593_822_496),
        # All but the norms (46 x 768) and head.dense (768 x 768) is halved: 75,140,192 a rank.
        (BASE, 2, 4, 150_280_384, 225_420_576),
    ],
)
def test_weights_and_optimizer_by_hand(shape, tensor, data, weights, optimizer):
    peak = peak_memory(shape, Setting(BF16, tensor=tensor, data=data), Load(8192, 1000, False))
    assert peak.parts["weights"] == weights
    assert peak.parts["optimizer"] == optimizer
    assert peak.parts["gradients"] == (weights // 2 + (optimizer // 12 if data > 1 else 0)) * 4
    assert peak.counted == sum(peak.parts.values()) < peak.needed


def test_the_states_of_the_chosen_optimizer_are_counted():
    config, load, parts = run_config(1), Load(8192, 1000, False), {}
    for name, kind in KINDS.items():
        chosen = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, kind=kind()))
        parts[name] = peak_memory(BASE, memory_setting(chosen, BF16, 1, "h100"), load).parts["optimizer"]
        averaged = dataclasses.replace(chosen, optimizer=dataclasses.replace(chosen.optimizer, ema=0.999))
        with_average = peak_memory(BASE, memory_setting(averaged, BF16, 1, "h100"), load).parts["optimizer"]
        assert with_average - parts[name] == 4 * 149_655_232
    assert parts == {name: size * 149_655_232 for name, size in (("adamw", 12), ("lion", 8), ("stable_adamw", 12))}


def small(model_type: str, width: int) -> Family:
    sizes = {"hidden_size": 64, "intermediate_size": width, "num_attention_heads": 1, "num_key_value_heads": 1}
    return read_shape(config_of(model_type, **sizes), "tests")


def kept_bytes(shape: Family, recompute: str, causal: bool, lengths: tuple[int, ...]) -> int:
    """Of storages that the body of a small model keeps for its backward pass, its weights left out."""
    model = shape.build(ParallelState(), Compute(recompute=recompute))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    batch, kept = microbatch(lengths, causal), {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other takes its place
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model.hidden(batch.input_ids, batch.positions, lengths, causal)
        hidden.index_select(0, batch.labeled).sum()
    # The last norm's result waits for the head, and under "full" the rotary tables wait for their layers, though no
    # function saved them.
    waiting = hidden.numel() * hidden.element_size() + (
        4 * shape.position_values * sum(lengths) if recompute == "full" else 0
    )
    return sum(size for size, _ in kept.values()) + waiting


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("size", PROPORTIONS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_activations_are_what_a_model_keeps(model_type, size, recompute, causal):
    """SDPA and plain kernels on a CPU; what FlashAttention and Triton's kernels keep is counted by hand below."""
    lengths = (160, 96, 256)  # together a whole number of windows, as in training
    shape = small(model_type, PROPORTIONS[size])
    found = kept_bytes(shape, recompute, causal, lengths)
    setting = Setting(FP32, recompute=recompute, flash=False, fused=False, on_gpu=False)
    load = Load(sum(lengths), 100, causal)
    assert activations(shape, setting, load) == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "recompute", "tensor", "sequence", "values"),
    [
        # Two sums, two normed inputs, q, k, v and the output of attention, the output of Wi (twice the width), product.
        (BASE, "none", 1, False, 8 * 768 + 3 * 1152),
        (LARGE, "none", 1, False, 8 * 1024 + 3 * 2624),
        (BASE, "selective", 1, False, 6 * 768 + 2 * 1152),
        (LARGE, "selective", 1, False, 6 * 1024 + 2 * 2624),
        (LARGE, "full", 1, False, 2 * 1024),
        (BASE, "none", 2, False, 4 * 768 + (4 * 768 + 3 * 1152) // 2),
        (BASE, "none", 2, True, (8 * 768 + 3 * 1152) // 2),
        (LARGE, "full", 4, True, 2 * 1024 // 4),
    ],
)
def test_a_layer_on_a_gpu_by_hand(shape, recompute, tensor, sequence, values):
    """In bf16; the statistics of norms and attention come on top: 16 bytes for the norms, 4 a head."""
    setting = Setting(BF16, tensor=tensor, sequence_parallel=sequence, recompute=recompute)
    more = dataclasses.replace(shape, layer_types=(*shape.layer_types, "sliding_attention"))
    load = Load(8192, 1000, True)
    a_layer = activations(more, setting, load) - activations(shape, setting, load)
    statistics = {"none": 16, "selective": 0}.get(recompute, 0)
    statistics += 0 if recompute == "full" else 4 * shape.heads // tensor
    assert a_layer == 8192 * (2 * values + statistics)


def test_frozen_layers_at_the_bottom_keep_nothing():
    whole = activations(BASE, Setting(BF16), Load(8192, 1000, True))
    frozen = activations(BASE, Setting(BF16), Load(8192, 1000, True, frozen_below=11))
    assert frozen == pytest.approx(whole / 2, rel=0.02)


def test_a_step_says_when_it_holds_most():
    many = peak_memory(BASE, Setting(BF16), Load(65_536, 65_536, True))
    assert many.moment == "loss"
    assert peak_memory(BASE, Setting(BF16), Load(2048, 300, False)).moment == "start of the backward pass"
    assert peak_memory(BASE, Setting(BF16, recompute="full"), Load(16_384, 4000, False)).moment.endswith("of a layer")
    # Little is left but the weights of all ranks, gathered for a checkpoint.
    few = peak_memory(LARGE, Setting(BF16, recompute="full", data=8), Load(512, 100, False))
    assert (few.moment, few.parts["gathered weights"]) == ("checkpoint", 4 * 395_881_664)
    cpu = peak_memory(BASE, Setting(FP32, flash=False, fused=False, on_gpu=False), Load(65_536, 1000, False))
    assert cpu.needed == round(1.1 * cpu.counted)
    assert not many.fits(24) and many.fits(80)


def test_the_gradient_of_the_embedding_is_summed_in_fp32_over_chunks():
    short = peak_memory(BASE, Setting(BF16), Load(32_768, 2_000, False)).parts["head and loss"]
    long = peak_memory(BASE, Setting(BF16), Load(32_768, 32_768, True)).parts["head and loss"]
    rows = 50_368 * 768
    assert long - short > 4 * rows


def partitions(tensor: int):
    """On every rank: elements of the fp32 partitions and of the flat weights that ZeRO-2 made."""
    from megatron_detour.training.engine import create_engine, start_distributed

    config = run_config(tensor)
    state, _ = start_distributed(config)
    zero = create_engine(tiny(state), config, read_deepspeed_config(config.deepspeed), state).engine.optimizer
    masters = sum(p.numel() for p in zero.single_partition_of_fp32_groups)
    return masters, zero.nccl_start_alignment_factor


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), (4, 2), slow(4, 1)])
def test_partitions_are_zero2s(tmp_path, ranks, tensor):
    shape = read_shape(CONFIG, "tiny")
    expected = partition(parameters(shape, tensor), ranks // tensor)
    for masters, alignment in run_ranks(ranks, "tests.forecast.test_memory:partitions", tmp_path, tensor):
        assert masters == expected
        assert alignment == memory.ALIGNMENT
