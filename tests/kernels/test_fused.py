"""The Triton kernels against their plain forms, and which of both a run uses."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import types
from dataclasses import fields, replace

import pytest
import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels import choose
from megatron_detour.kernels.check import Sizes, check
from megatron_detour.kernels.choose import PLAIN, Kernels, choose_kernels, triton_kernels
from tests.harness import ROOT, environment
from tests.kernels.compare import SHAPES, TYPES, Comparison

pytestmark = pytest.mark.integration

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SIZES = Sizes()
NAMES = [field.name for field in fields(Kernels)]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def in_fp32(kernel):
    """As the fused kernels compute: rounded at the end alone."""

    @functools.wraps(kernel)
    def accurate(*arguments):
        dtype = arguments[0].dtype
        out = kernel(*(x.float() if isinstance(x, torch.Tensor) else x for x in arguments))
        return tuple(x.to(dtype) for x in out) if isinstance(out, tuple) else out.to(dtype)

    return accurate


# On a CPU torch sums a norm's bf16 gradients in bf16, which is more than the check lets pass.
RIGHT = replace(PLAIN, layer_norm=in_fp32(PLAIN.layer_norm), add_layer_norm=in_fp32(PLAIN.add_layer_norm))


def printed_by(module: str, *arguments: str, **changes: str) -> dict:
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"} | changes
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@functools.cache
def interpreted() -> dict[str, list[str]]:
    return printed_by("tests.kernels.compare", TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_computes_what_its_plain_form_does(name, dtype):
    expected = [f"{shape}: equal" for shape in SHAPES[name]]
    if name == "softmax_":
        expected += ["extremes 301: equal", "extremes 5003: equal"]
    assert interpreted()[f"{name} {dtype}"] == expected


@pytest.mark.parametrize("dtype", TYPES)
def test_the_kernels_pass_the_check_before_use(dtype):
    assert interpreted()[f"check {dtype}"] == ["equal"]


# ModernBERT-base's sizes and ones that divide by nothing: T, E, I, H, V.
@pytest.mark.parametrize("sizes", [(32, 768, 1152, 12, 50_368), (1, 96, 33, 1, 301)], ids=["base", "odd"])
def test_every_kernel_compiles_for_gpus(sizes, tmp_path):
    compiled = printed_by("tests.kernels.compile_all", *map(str, sizes), TRITON_CACHE_DIR=str(tmp_path))
    assert list(compiled) == ["sm_80 fp32", "sm_80 bf16", "sm_90 fp32", "sm_90 bf16"]
    # Norm, sum and norm, gated unit: each way. Then rotation and its inverse, twice, and the softmax.
    launched = [*["_forward", "_backward", "_sum_rows"] * 2, "_forward", "_backward", *["_turn"] * 4, "_softmax"]
    for target, kernels in compiled.items():
        assert [name for name, *_ in kernels] == launched, target
        assert all(size > 0 for _, size, *_ in kernels), target
        if sizes[1] == 768:
            assert {name for name, _, load, store in kernels if load < 16 or store < 16} <= {"_sum_rows"}, target


@pytest.mark.parametrize("name", ["plain", "auto"])
def test_a_cpu_gets_the_plain_kernels(name):
    assert choose_kernels(name, CPU, torch.bfloat16, SIZES) == ("plain", PLAIN, None)


def test_plain_is_plain_on_a_gpu_too(monkeypatch):
    monkeypatch.setattr(choose, "triton_kernels", lambda: pytest.fail("asked for Triton"))
    assert choose_kernels("plain", CUDA, torch.bfloat16, SIZES) == ("plain", PLAIN, None)


def test_triton_on_a_cpu_is_refused():
    for name in ("triton", "apex"):
        with pytest.raises(DetourError, match=rf"^compute\.kernels: {name} requires a GPU; use auto or plain$"):
            choose_kernels(name, CPU, torch.bfloat16, SIZES)


def test_triton_that_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr(choose.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DetourError, match="triton is not installed"):
        choose_kernels("triton", CUDA, torch.bfloat16, SIZES)
    name, kernels, fault = choose_kernels("auto", CUDA, torch.bfloat16, SIZES)
    assert (name, kernels) == ("plain", PLAIN) and "not installed" in fault


@pytest.mark.parametrize("name", ["auto", "triton"])
def test_kernels_that_pass_the_check_are_used(monkeypatch, name):
    checked = []
    monkeypatch.setattr(choose, "triton_kernels", lambda: RIGHT)
    monkeypatch.setattr(choose, "check", lambda *arguments: checked.append(arguments))
    assert choose_kernels(name, CUDA, torch.bfloat16, SIZES) == ("triton", RIGHT, None)
    assert checked == [(RIGHT.by_name(), CUDA, torch.bfloat16, SIZES)]


def test_kernels_that_fail_the_check_are_not_used(monkeypatch):
    wrong = replace(RIGHT, geglu=wrong_output(RIGHT.geglu))
    monkeypatch.setattr(choose, "triton_kernels", lambda: wrong)
    monkeypatch.setattr(choose, "check", lambda kernels, device, *rest: check(kernels, CPU, *rest))
    name, kernels, fault = choose_kernels("auto", CUDA, torch.bfloat16, SIZES)
    assert (name, kernels) == ("plain", PLAIN)
    assert fault.startswith("compute.kernels: geglu")
    with pytest.raises(DetourError, match=r"^compute\.kernels: geglu"):
        choose_kernels("triton", CUDA, torch.bfloat16, SIZES)


def wrong_output(kernel):
    """Off by 5 % in a single column of what the kernel returns, or writes where it returns row sums."""

    @functools.wraps(kernel)
    def wrong(*arguments):
        out = kernel(*arguments)
        last = out[-1] if isinstance(out, tuple) else out
        worst = arguments[0] if last.dim() == 1 else last
        factor = torch.ones_like(worst)
        factor[..., worst.detach().abs().flatten(0, -2).amax(0).argmax()] = 1.05
        if last.dim() == 1:
            arguments[0].mul_(factor)
            return out
        return (*out[:-1], last * factor) if isinstance(out, tuple) else last * factor

    return wrong


def wrong_gradient(kernel):
    @functools.wraps(kernel)
    def wrong(*arguments):
        out = kernel(*arguments)
        last = out[-1] if isinstance(out, tuple) else out
        if last.requires_grad:
            last.register_hook(lambda gradient: gradient * 1.05)
        return out

    return wrong


def gradient_of_the_first_row(kernel):
    @functools.wraps(kernel)
    def wrong(*arguments):
        out = kernel(*arguments)
        last = out[-1] if isinstance(out, tuple) else out
        if last.requires_grad:
            last.register_hook(lambda gradient: gradient[:1].expand_as(gradient))
        return out

    return wrong


def wrong_sums(kernel):
    """Right probabilities, but for their log-sum-exp."""

    @functools.wraps(kernel)
    def wrong(logits, bias):
        log_sum, greatest = kernel(logits, bias)
        return log_sum * 1.05, greatest

    return wrong


def not_a_number(kernel):
    @functools.wraps(kernel)
    def wrong(*arguments):
        out = kernel(*arguments)
        return tuple(x * float("nan") for x in out) if isinstance(out, tuple) else out * float("nan")

    return wrong


def failing(kernel):
    @functools.wraps(kernel)
    def wrong(*arguments):
        raise RuntimeError("no such instruction")

    return wrong


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_right_kernels_pass_the_check(dtype):
    check(RIGHT.by_name(), CPU, dtype, SIZES)


@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spoil", [wrong_output, wrong_gradient, gradient_of_the_first_row, not_a_number, failing])
def test_the_check_names_the_kernel_that_is_wrong(name, spoil, dtype):
    if name == "softmax_" and spoil in (wrong_gradient, gradient_of_the_first_row):  # it has none
        spoil = wrong_sums
    told = "fails on this device: no such instruction" if spoil is failing else "plain kernel"
    with pytest.raises(DetourError, match=rf"^compute\.kernels: {name} .*{told}"):
        check(RIGHT.by_name() | {name: spoil(getattr(RIGHT, name))}, CPU, dtype, SIZES)


def test_another_type_and_a_copy_are_found():
    in_double = RIGHT.by_name() | {"geglu": lambda ab: RIGHT.geglu(ab).double()}
    with pytest.raises(
        DetourError, match=r"geglu fails on this device: expected an output of torch\.float32, not torch\.float64"
    ):
        check(in_double, CPU, torch.float32, SIZES)
    copying = RIGHT.by_name() | {"rotate_": lambda qkv, cos, sin: RIGHT.rotate_(qkv.clone(), cos, sin)}
    with pytest.raises(DetourError, match=r"rotate_ differs from the plain kernel"):
        check(copying, CPU, torch.float32, SIZES)


def test_a_triton_that_cannot_be_loaded_is_passed_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_detour.kernels.fused", None)
    name, kernels, fault = choose_kernels("auto", CUDA, torch.bfloat16, SIZES)
    assert (name, kernels) == ("plain", PLAIN)
    assert fault.startswith("compute.kernels: cannot load triton: import of megatron_detour.kernels.fused halted")


class FastLayerNormFN:
    """As apex's: with a bias, computed in fp32."""

    @staticmethod
    def apply(x, gamma, beta, epsilon):
        assert beta.shape == gamma.shape and beta.dtype == gamma.dtype and not beta.any()
        return in_fp32(PLAIN.layer_norm)(x, gamma, epsilon) + beta


@pytest.fixture
def pretended_apex(monkeypatch):
    """Returns a function that installs an apex with these norms, beside Triton, on a GPU that is the CPU."""
    monkeypatch.setattr(choose, "triton_kernels", lambda: RIGHT)
    monkeypatch.setattr(choose, "check", lambda kernels, device, *rest: check(kernels, CPU, *rest))

    def install(norm) -> None:
        module = types.SimpleNamespace(FastLayerNormFN=norm)
        for name in ("apex", "apex.contrib", "apex.contrib.layer_norm", "apex.contrib.layer_norm.layer_norm"):
            monkeypatch.setitem(sys.modules, name, module)

    return install


def test_apexs_norms_beside_the_triton_kernels(pretended_apex):
    pretended_apex(FastLayerNormFN)
    name, kernels, skipped = choose_kernels("apex", CUDA, torch.bfloat16, SIZES)
    assert (name, skipped, kernels.geglu) == ("apex", None, RIGHT.geglu)
    assert kernels.layer_norm is not RIGHT.layer_norm
    nothing = torch.zeros(0, 8)
    assert kernels.layer_norm(nothing, torch.ones(8), 1e-5).shape == (0, 8)
    assert choose_kernels("auto", CUDA, torch.bfloat16, SIZES)[0] == "triton"


def test_wrong_norms_of_apex_are_refused(pretended_apex):
    pretended_apex(types.SimpleNamespace(apply=lambda x, gamma, beta, epsilon: x * gamma))
    with pytest.raises(DetourError, match=r"^compute\.kernels: layer_norm differs from the plain kernel"):
        choose_kernels("apex", CUDA, torch.bfloat16, SIZES)


def test_another_package_called_apex_is_not_nvidias(pretended_apex, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    with pytest.raises(DetourError, match=r"^compute\.kernels: apex needs NVIDIA's, .*No module named 'apex\.contrib"):
        choose_kernels("apex", CUDA, torch.bfloat16, SIZES)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_the_kernels_pass_the_check_on_a_gpu(dtype):
    check(triton_kernels().by_name(), CUDA, dtype, SIZES)
    assert choose_kernels("auto", CUDA, dtype, SIZES)[0] == "triton"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("layer_norm", (8_192, 768)),
        ("layer_norm", (4_099, 1024)),
        ("add_layer_norm", (8_192, 768)),
        ("add_layer_norm", (4_099, 1024)),
        ("geglu", (8_192, 1152)),
        ("geglu", (4_099, 2624)),
        ("rotate_", (8_192, 12, 64)),
        ("rotate_", (4_099, 16, 64)),
        ("softmax_", (2_048, 50_368)),
        ("softmax_", (1_023, 32_005)),
    ],
)
def test_sizes_of_real_models_on_a_gpu(name, shape):
    # A GPU rounds to the nearest, and what it rounds is off by its fp32 arithmetic.
    comparison = Comparison(getattr(triton_kernels(), name), torch.bfloat16, "cuda", rounding=1.01 * 2**-8)
    getattr(comparison, name)(*shape)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", TYPES.values(), ids=TYPES)
def test_extreme_logits_on_a_gpu(dtype):
    Comparison(triton_kernels().softmax_, dtype, "cuda").extreme_softmax_(50_368)
