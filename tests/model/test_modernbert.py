"""ModernBERT by itself: what a position must not see, what is refused, what recomputing must not change."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import Sizes
from megatron_detour.model.choose import choose_compute
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import read_shape
from tests.models import CONFIG, loss_of, microbatch, tiny


@pytest.mark.parametrize("changed", [0, 37, 90, 150])
def test_causal_positions_never_see_their_future(changed):
    model = tiny()
    batch = microbatch((160,), causal=True)
    other = batch.input_ids.clone()
    other[changed] = 3 + (other[changed] - 2) % 298
    with torch.no_grad():
        before = model.logits(batch.input_ids, batch.positions, batch.lengths, causal=True)
        after = model.logits(other, batch.positions, batch.lengths, causal=True)
    assert torch.equal(before[:changed], after[:changed])
    assert not torch.equal(before[changed:], after[changed:])


@pytest.mark.parametrize("causal", [False, True])
def test_packed_documents_do_not_see_each_other(causal):
    model = tiny()
    batch = microbatch((50, 60), causal)
    other = batch.input_ids.clone()
    other[:50] = other[:50].flip(0)
    with torch.no_grad():
        before = model.logits(batch.input_ids, batch.positions, batch.lengths, causal)
        after = model.logits(other, batch.positions, batch.lengths, causal)
    assert torch.equal(before[50:], after[50:])
    assert not torch.equal(before[:50], after[:50])


def test_a_microbatch_without_labels_has_zero_loss_and_gradients():
    model = tiny()
    loss_of(model, microbatch((20,), causal=False, labeled=0.0)).loss.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_old_and_new_configurations_mean_the_same_shape():
    old = CONFIG | {"global_rope_theta": 1000.0, "local_rope_theta": 500.0, "global_attn_every_n_layers": 2}
    new = CONFIG | {
        "layer_types": ["full_attention", "sliding_attention"] * 2 + ["full_attention"],
        "rope_parameters": {"full_attention": {"rope_theta": 1000.0}, "sliding_attention": {"rope_theta": 500.0}},
    }
    assert read_shape(old, "old") == read_shape(new, "new")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "t5"}, "'t5'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"hidden_activation": "sine"}, "hidden_activation must be one of gelu"),
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn"}}}, '"yarn"'),
        ({"vocab_size": None}, "vocab_size|size is wrong"),
    ],
)
def test_another_kind_of_model_is_refused(change, told):
    with pytest.raises(DetourError, match=told):
        read_shape(CONFIG | change, "somewhere")


SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
OPTIONAL_SIZES = ("local_attention", "max_position_embeddings", "global_attn_every_n_layers")
NUMBERS = ("norm_eps", "initializer_range", "global_rope_theta")
ROPE = ("rope_parameters", "rope_parameters.full_attention", "rope_parameters.full_attention.rope_theta")
WRONG = (None, [], [1], {}, True, False, -1, 0, 0.5, 10**400, float("nan"), float("inf"), "", "768", "\ud800")


@pytest.mark.parametrize("key", [*SIZES, *OPTIONAL_SIZES, *NUMBERS, *ROPE, "layer_types", "pad_token_id", "norm_bias"])
def test_a_wrong_value_of_a_configuration_is_a_sentence(key):
    """With its key. What is accepted makes a shape that operations and memory can be counted of."""
    for value in WRONG:
        config = copy.deepcopy(CONFIG | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})
        here = config
        *way, last = key.split(".")
        for part in way:
            here = here[part]
        here[last] = value
        if key.startswith("global_"):
            del config["rope_parameters"]  # it rules
        try:
            shape = read_shape(config, "config.json")
        except DetourError as error:
            assert str(error).startswith("config.json: ") and last in str(error), (value, str(error))
            continue
        # null and an empty mapping are "not given" where there may be nothing; numbers may be of any size.
        nothing = key in ("layer_types", "pad_token_id", *ROPE[:2]) and value in (None, {}, [], [1], 0)
        a_flag = key == "norm_bias" and isinstance(value, bool)
        assert nothing or (key in (*NUMBERS, ROPE[2]) and value == 0.5) or a_flag
        assert shape.hidden == 32 and shape.window == 8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputing_changes_no_bit_and_keeps_less(recompute, causal):
    batch = microbatch((50, 60, 30), causal)
    kept, results = {}, {}
    for name in ("none", recompute):
        model = tiny(compute=Compute(recompute=name))
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: _note(x, sizes), lambda x: x):
            out = loss_of(model, batch)
        out.loss.backward()
        kept[name] = sum(sizes.values())
        results[name] = [out.loss.detach(), *(p.grad for p in model.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(*results.values(), strict=True))
    assert kept[recompute] < {"selective": 0.8, "full": 0.5}[recompute] * kept["none"]


@pytest.mark.parametrize("causal", [False, True])
def test_bf16_is_as_near_as_its_rounding(causal):
    assert_bf16_is_near(torch.device("cpu"), Compute(), causal)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("attention", ["auto", "varlen", "sdpa"])
@pytest.mark.parametrize("kernels", ["triton", "plain"])
def test_a_gpus_kernels_and_attention_together(kernels, attention, recompute, causal):
    device = torch.device("cuda")
    choice = choose_compute(attention, kernels, recompute, Sizes(), device, torch.bfloat16)
    assert_bf16_is_near(device, choice.compute, causal)


def assert_bf16_is_near(device: torch.device, compute: Compute, causal: bool) -> None:
    """The loss and every gradient, against fp32 with plain kernels on the CPU, as a share of each one's size."""
    shape = {"hidden_size": 256, "intermediate_size": 384, "local_attention": 128}  # heads of 64
    batch = microbatch((3, 170, 40, 1, 300), causal)
    reference = tiny(scale=2.0, **shape)
    model = tiny(compute=compute, scale=2.0, **shape).to(device, torch.bfloat16)
    with torch.no_grad():
        for parameter, rounded in zip(reference.parameters(), model.parameters(), strict=True):
            parameter.copy_(rounded)
    expected, found = loss_of(reference, batch), loss_of(model, batch.to(device))
    expected.loss.backward()
    found.loss.backward()
    assert found.loss.item() == pytest.approx(expected.loss.item(), rel=1e-2)
    for (name, parameter), exact in zip(model.named_parameters(), reference.parameters(), strict=True):
        difference = (parameter.grad.cpu().float() - exact.grad).norm() / exact.grad.norm()
        assert difference < 0.05, f"{name}: {difference:.3f}"


def _note(tensor: torch.Tensor, sizes: dict[int, int]) -> torch.Tensor:
    """Counts the bytes of a tensor that the backward pass will want, once for a storage."""
    sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return tensor
