"""Tensor-parallel sizes 1, 2 and 4 compute the same function: real processes, fp64."""

from __future__ import annotations

import pytest
import torch

from megatron_detour.parallel.shard import ShardSpec, cut, join, spec_of
from tests.harness import run_ranks, start_gloo
from tests.models import loss_of, microbatch, tiny


def loss_and_gradients(vocabulary: int, causal: bool):
    """On every rank: the loss and the full gradient of each parameter, joined from all ranks."""
    import torch.distributed as dist

    from megatron_detour.parallel.replicas import unequal_replicas
    from megatron_detour.parallel.state import ParallelState

    start_gloo()
    state = ParallelState.create(dist.get_world_size())
    model = tiny(state, torch.float64, vocab_size=vocabulary)
    out = loss_of(model, microbatch((30, 50), causal))
    out.loss.backward()
    gradients = {}
    for name, parameter in model.named_parameters():
        shards = [torch.empty_like(parameter.grad) for _ in range(state.tensor_size)]
        dist.all_gather(shards, parameter.grad)
        gradients[name] = join(shards if spec_of(parameter) else shards[:1], spec_of(parameter))
    replicated = {name: p.detach() for name, p in model.named_parameters() if spec_of(p) is None}
    assert unequal_replicas(replicated, state) == []
    replicated["head.norm.weight"][3] += 1e-15 * state.tensor_rank
    assert unequal_replicas(replicated, state) == ["head.norm.weight"]
    return out.loss.item(), int(out.right), gradients


@pytest.mark.parametrize("vocabulary", [301, 304])
@pytest.mark.parametrize("causal", [False, True])
def test_loss_and_gradients_agree(tmp_path, vocabulary, causal):
    model = tiny(dtype=torch.float64, vocab_size=vocabulary)
    out = loss_of(model, microbatch((30, 50), causal))
    out.loss.backward()
    for ranks in (2, 4):
        results = run_ranks(
            ranks, "tests.parallel.test_tensor_parallel:loss_and_gradients", tmp_path / str(ranks), vocabulary, causal
        )
        for loss, right, gradients in results:
            assert loss == pytest.approx(out.loss.item(), rel=1e-10)
            assert right == int(out.right)
            for name, parameter in model.named_parameters():
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("spec", [ShardSpec(0, 12, 3), ShardSpec(1, 8, 2), ShardSpec(0, 7), ShardSpec(0, 301), None])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_shards_join_to_the_whole(spec, ranks):
    size = [5, 5] if spec is None else [spec.size if spec.dim == d else 5 for d in (0, 1)]
    full = torch.randn(size)
    shards = [cut(full, spec, rank, ranks) for rank in range(ranks)]
    assert len({shard.shape for shard in shards}) == 1
    if spec is not None:
        assert shards[0].shape[spec.dim] == spec.local(ranks)
    assert torch.equal(join(shards, spec), full)


def test_fused_parts_are_cut_one_by_one():
    stacked = torch.arange(12)[:, None].float()  # q 0-3, k 4-7, v 8-11
    assert cut(stacked, ShardSpec(0, 12, 3), 1, 2)[:, 0].tolist() == [2, 3, 6, 7, 10, 11]
