"""Compiled layers compute what plain ones do, and are compiled once: for no micro-batch, document or phase anew."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder, exc

from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import Sizes
from megatron_detour.model import compute as compute_module
from megatron_detour.model.choose import choose_compute
from megatron_detour.model.compiled import check_compiled
from megatron_detour.model.compute import Compute
from megatron_detour.model.families import read_shape
from tests.harness import run_ranks, slow, start_gloo
from tests.models import CONFIG, loss_of, microbatch, tiny

DOCUMENTS = ((50, 60, 30), (7,), (100, 3, 3, 90, 1), (64,) * 6, (2,))
CPU = torch.device("cpu")
SIZES = Sizes(tokens=300, longest=100)
SHAPE = read_shape(CONFIG, "tests")


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()


@pytest.fixture
def traced(monkeypatch):
    """Layers are traced as for inductor, but not translated: no compiler is needed."""
    monkeypatch.setattr(compute_module, "COMPILER", {"backend": "eager"})


@pytest.fixture
def differentiated(monkeypatch):
    """And differentiated."""
    monkeypatch.setattr(compute_module, "COMPILER", {"backend": "aot_eager"})


def graphs() -> int:
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def assert_same(compiled, plain, batch) -> None:
    """In fp64, where both differ by the order of sums alone."""
    for model in (compiled, plain):
        model.zero_grad()
    found, expected = loss_of(compiled, batch), loss_of(plain, batch)
    found.loss.backward()
    expected.loss.backward()
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-10, atol=0)
    for (name, parameter), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("recompute", ["none", "selective", slow("full")])
def test_a_layer_is_compiled_once_for_all_micro_batches(differentiated, recompute):
    models = [
        tiny(dtype=torch.float64, compute=Compute(recompute=recompute, compile=compile)) for compile in (True, False)
    ]
    for lengths in DOCUMENTS:
        for causal in (False, True):
            assert_same(*models, microbatch(lengths, causal))
    assert graphs() == 3  # both parts of a layer, and the first layer's, which has no norm


def test_freezing_compiles_once_more_and_back_not_at_all(traced):
    models = [tiny(dtype=torch.float64, compute=Compute(compile=compile)) for compile in (True, False)]
    counts = []
    for frozen in ((), ("layers.0.", "layers.1."), ("layers.1.", "layers.3."), ("embeddings", "layers.0."), ()):
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(not any(part in name for part in frozen))
        for lengths, causal in (((40, 30), False), ((9, 50, 3), True)):
            assert_same(*models, microbatch(lengths, causal))
        counts.append(graphs())
    assert counts[1] == counts[2] and counts[-1] == counts[-2] and counts[-1] <= 12


def test_validation_has_forms_of_its_own(traced):
    model = tiny(compute=Compute(compile=True))
    with torch.no_grad():
        for lengths in DOCUMENTS:
            loss_of(model, microbatch(lengths, causal=False))
    assert graphs() == 3


def on_two_ranks() -> list[int]:
    """The number of compiled forms after each micro-batch, per layout."""
    from megatron_detour.parallel.state import ParallelState

    start_gloo()
    compute_module.COMPILER = {"backend": "eager"}
    counts = []
    for sequence in (False, True):
        state = ParallelState.create(2, sequence)
        models = [tiny(state, torch.float64, compute=Compute(compile=compile)) for compile in (True, False)]
        for lengths, causal in (((50, 60, 30), False), ((50, 60, 30), True), ((8,), True), ((64,) * 6, False)):
            assert_same(*models, microbatch(lengths, causal))
            counts.append(counters["stats"]["unique_graphs"])
    return counts


@pytest.mark.integration
def test_tensor_parallel_layers_are_compiled_once_between_their_collectives(tmp_path):
    for counts in run_ranks(2, "tests.model.test_compiled:on_two_ranks", tmp_path):
        assert counts == [counts[0]] * 4 + [counts[4]] * 4


def test_a_compiler_that_fails_or_is_wrong_is_refused(monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no compiler\nand more")

    def wrong(graph, inputs):
        return lambda *values: [x * 1.01 if x.is_floating_point() else x for x in graph(*values)]

    for backend, told in ((fails, "a layer cannot be compiled on this device: "), (wrong, "differs by ")):
        monkeypatch.setattr(compute_module, "COMPILER", {"backend": backend})
        torch._dynamo.reset()
        with pytest.raises(DetourError, match=rf"^compute\.compile: .*{told}"):
            choose_compute("auto", "auto", "none", SIZES, CPU, torch.float32, SHAPE)


def test_the_check_compiles_what_a_run_uses(traced):
    compute = choose_compute("auto", "auto", "none", SIZES, CPU, torch.bfloat16, SHAPE).compute
    assert compute.compile and graphs() == 2
    loss_of(tiny(dtype=torch.bfloat16, compute=compute), microbatch((30, 40), causal=True)).loss.backward()
    assert graphs() == 3  # the first layer's


@pytest.mark.slow
@pytest.mark.integration
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_torchs_own_compiler(recompute):
    if not has_compiler():
        with pytest.raises(DetourError, match=r"compute\.compile: a layer cannot be compiled"):
            check_compiled(SHAPE, SIZES, recompute, CPU, torch.float32)
        return
    check_compiled(SHAPE, SIZES, recompute, CPU, torch.float32)
    check_compiled(SHAPE, SIZES, recompute, CPU, torch.bfloat16)
    models = [
        tiny(dtype=torch.float64, compute=Compute(recompute=recompute, compile=compile)) for compile in (True, False)
    ]
    for lengths in DOCUMENTS:
        assert_same(*models, microbatch(lengths, causal=len(lengths) == 1))


def has_compiler() -> bool:
    """Whether inductor can compile for a CPU here."""
    try:
        return bool(cpp_builder.get_cpp_compiler())
    except exc.InvalidCxxCompiler:
        return False
