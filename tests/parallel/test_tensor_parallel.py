"""Tensor-parallel sizes 1, 2 and 4 compute the same function: real processes, fp64."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from megatron_detour.model.compute import Compute
from megatron_detour.model.families import FAMILIES
from megatron_detour.parallel.shard import ShardSpec, shard, spec_of, unshard
from megatron_detour.parallel.state import ParallelState
from tests.harness import run_ranks, slow, start_gloo
from tests.models import loss_of, microbatch, tiny

pytestmark = pytest.mark.integration

CASES = [  # vocabulary, causal, recompute, z-loss
    *itertools.product([50_368, 32_768, 301], [False, True], ["none"], [0.0]),
    (301, False, "selective", 1e-2),
    (304, True, "full", 1e-2),
]
LENGTHS = (30, 49, 1)  # 80 positions
BIASED = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)


def compare_with_one_rank() -> int:
    """On every rank: the function of all ranks together against that of one; the number of cases compared."""
    import torch.distributed as dist

    start_gloo()
    for sequence in (False, True):
        state = ParallelState.create(dist.get_world_size(), sequence)
        assert state.sequence_parallel == sequence
        for vocabulary, causal, recompute, z_loss in CASES:
            # A large vocabulary is the same in all families.
            for model_type in FAMILIES if vocabulary < 400 else ("modernbert",):
                _compare(state, causal, z_loss, recompute, {"vocab_size": vocabulary, "model_type": model_type})
        _compare(state, False, 0.0, "none", BIASED | {"vocab_size": 301})
    return 2 * len(CASES)


def _compare(state: ParallelState, causal: bool, z_loss: float, recompute: str, changes: dict) -> None:
    import torch.distributed as dist

    batch = microbatch(LENGTHS, causal)
    reference = tiny(dtype=torch.float64, z_loss=z_loss, **changes)
    expected = loss_of(reference, batch)
    expected.loss.backward()
    model = tiny(state, torch.float64, compute=Compute(recompute=recompute), z_loss=z_loss, **changes)
    logits = model.logits(batch.input_ids, batch.positions, batch.lengths, causal)[:, : len(model.output_weight)]
    rows = [torch.empty_like(logits) for _ in range(state.tensor_size)]
    dist.all_gather(rows, logits.detach().contiguous())
    whole = torch.cat(rows, 1)[:, : changes["vocab_size"]]
    torch.testing.assert_close(
        whole, reference.logits(batch.input_ids, batch.positions, batch.lengths, causal), rtol=1e-10, atol=1e-10
    )
    found = loss_of(model, batch)
    found.loss.backward()
    for kind in ("loss", "cross_entropy", "right"):
        torch.testing.assert_close(getattr(found, kind), getattr(expected, kind), rtol=1e-10, atol=0, msg=kind)
    for (name, parameter), whole in zip(model.named_parameters(), reference.parameters(), strict=True):
        shards = [torch.empty_like(parameter.grad) for _ in range(state.tensor_size)]
        dist.all_gather(shards, parameter.grad)
        spec = spec_of(parameter)
        for copy in [unshard(shards, spec)] if spec else shards:
            torch.testing.assert_close(copy, whole.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("ranks", [2, slow(4)])
def test_outputs_loss_and_gradients_agree(tmp_path, ranks):
    results = run_ranks(ranks, "tests.parallel.test_tensor_parallel:compare_with_one_rank", tmp_path)
    assert results == [2 * len(CASES)] * ranks


def collectives_per_layer() -> dict[str, dict[str, int]]:
    """By family and parallelism: the collectives of a forward and backward pass that one more layer adds."""
    import torch.distributed as dist

    start_gloo()
    counts = {}
    for sequence, model_type in itertools.product((False, True), FAMILIES):
        state = ParallelState.create(dist.get_world_size(), sequence)
        fewer, more = (_counted(state, model_type, layers) for layers in (3, 6))  # as many of each kind of layer
        added = {name: more[name] - fewer[name] for name in more}
        assert all(number % 3 == 0 for number in added.values())
        counts[f"{model_type} {sequence}"] = {name: number // 3 for name, number in added.items() if number}
    return counts


def _counted(state: ParallelState, model_type: str, layers: int) -> Counter[str]:
    import torch.distributed as dist

    from megatron_detour.parallel import collectives

    model, counts = tiny(state, model_type=model_type, num_hidden_layers=layers), Counter()
    places = ((dist, "all_reduce"), (collectives, "_all_gather"), (collectives, "reduce_scatter_tensor"))
    with pytest.MonkeyPatch.context() as patch:
        for module, name in places:
            patch.setattr(module, name, _counting(getattr(module, name), counts, name.strip("_")))
        loss_of(model, microbatch(LENGTHS, False)).loss.backward()
    return counts


def _counting(honest: Callable, counts: Counter[str], name: str) -> Callable:
    def collective(x: torch.Tensor, *arguments, **options):
        counts[name] += x.dim() > 1  # sums of the gradients of norms and biases are of vectors
        return honest(x, *arguments, **options)

    return collective


def test_a_layer_gathers_and_reduces_what_enters_attention_and_mlp_once_each(tmp_path):
    """Megatron's numbers: a reduction out of each half of a layer and one of the gradient into it; as gathers and
    scatters, and another gather of the input for the weight gradients, with sequence parallelism."""
    (counts, _) = run_ranks(2, "tests.parallel.test_tensor_parallel:collectives_per_layer", tmp_path)
    for kind, found in counts.items():
        sequence = kind.endswith("True")
        assert found == ({"all_gather": 6, "reduce_scatter_tensor": 4} if sequence else {"all_reduce": 4}), kind


def find_unequal_replicas() -> list[list[str]]:
    import torch.distributed as dist

    from megatron_detour.parallel.collectives import unequal_replicas

    start_gloo()
    state = ParallelState.create(dist.get_world_size())
    replicated = {name: p.detach() for name, p in tiny(state).named_parameters() if spec_of(p) is None}
    before = unequal_replicas(replicated, state)
    value = replicated["head.norm.weight"]
    if state.tensor_rank == 1:
        value[3] = torch.nextafter(value[3], torch.tensor(2.0))
    return [before, unequal_replicas(replicated, state)]


def test_copies_that_differ_by_a_bit_are_found(tmp_path):
    results = run_ranks(2, "tests.parallel.test_tensor_parallel:find_unequal_replicas", tmp_path)
    assert results == [[[], ["head.norm.weight"]]] * 2


def bf16_loss_and_gradients() -> list[float]:
    """Of two ranks: how far loss and gradients of the head in bf16 are from one rank's in fp32, as shares."""
    from megatron_detour.kernels.plain import softmax_
    from megatron_detour.parallel.loss import linear_cross_entropy

    start_gloo()
    state = ParallelState.create(2)
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(s, generator=generator).bfloat16() for s in ((60, 16), (100, 16), (100,)))
    labels = torch.randint(100, (60,), generator=generator)
    whole = [x.float().requires_grad_() for x in (hidden, weight, bias)]
    linear_cross_entropy(*whole, labels, 100, ParallelState(), softmax_, 0.1).loss.backward()
    rows = slice(50 * state.tensor_rank, 50 * (state.tensor_rank + 1))
    mine = [x.clone().requires_grad_() for x in (hidden, weight[rows], bias[rows])]
    linear_cross_entropy(*mine, labels, 100, state, softmax_, 0.1).loss.backward()
    expected = [whole[0].grad, whole[1].grad[rows], whole[2].grad[rows]]
    return [float((x.grad.float() - y).norm() / y.norm()) for x, y in zip(mine, expected, strict=True)]


def test_the_loss_in_bf16_over_two_ranks(tmp_path):
    for differences in run_ranks(2, "tests.parallel.test_tensor_parallel:bf16_loss_and_gradients", tmp_path):
        assert max(differences) < 6e-3


def uneven_share() -> str:
    from megatron_detour.parallel.collectives import start_reduce_scatter

    start_gloo()
    with pytest.raises(ValueError) as fault:
        start_reduce_scatter(torch.zeros(5, 2), ParallelState.create(2, sequence_parallel=True))
    return str(fault.value)


def test_positions_that_cannot_be_shared_out_are_refused(tmp_path):
    told = run_ranks(2, "tests.parallel.test_tensor_parallel:uneven_share", tmp_path)
    assert told == ["5 positions are not divisible by 2 tensor ranks"] * 2


@pytest.mark.parametrize("spec", [ShardSpec(0, 12, 3), ShardSpec(1, 8, 2), ShardSpec(0, 7), ShardSpec(0, 301), None])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_join_to_the_whole(spec, ranks):
    size = [5, 5] if spec is None else [spec.size if spec.dim == d else 5 for d in (0, 1)]
    full = torch.randn(size)
    shards = [shard(full, spec, rank, ranks) for rank in range(ranks)]
    assert len({shard.shape for shard in shards}) == 1
    if spec is not None:
        assert shards[0].shape[spec.dim] == spec.local(ranks)
    assert torch.equal(unshard(shards, spec), full)


def test_fused_parts_are_cut_one_by_one():
    stacked = torch.arange(12)[:, None].float()  # q 0-3, k 4-7, v 8-11
    assert shard(stacked, ShardSpec(0, 12, 3), 1, 2)[:, 0].tolist() == [2, 3, 6, 7, 10, 11]
