"""Every form of attention against its definition, and which one a run uses."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_detour import config
from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import Sizes
from megatron_detour.model import backends
from megatron_detour.model.attention import AttentionPattern, dense_attention, sdpa_attention
from megatron_detour.model.backends import (
    check,
    choose_attention,
    flash_attention,
    packed_flash_attention,
    varlen_attention,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = [(5, 300, 1, 129), (1,), (64,), (65,), (130,), (1,) * 70, (3, 4, 5, 6), (64, 64, 63, 65)]
WINDOWS = [None, 4, 64]
DIRECTIONS = {"bidirectional": False, "causal": True}
HEADS, HEAD_DIM = 2, 8
SIZES = Sizes(heads=3)

lengths_of_all_kinds = pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: "-".join(map(str, x[:5])))
windows = pytest.mark.parametrize("window", WINDOWS)
directions = pytest.mark.parametrize("causal", DIRECTIONS.values(), ids=DIRECTIONS)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def pattern_of(lengths, causal, window) -> AttentionPattern:
    return AttentionPattern(tuple(lengths), causal, window, CPU)


def random_qkv(tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, 3, HEADS, HEAD_DIM, generator=generator, dtype=torch.float64).to(dtype)


def outcome(attention, given: torch.Tensor, pattern: AttentionPattern) -> tuple[torch.Tensor, torch.Tensor]:
    """The output and its gradient by q, k and v."""
    qkv = given.clone().requires_grad_()
    out = attention(*qkv.unbind(1), pattern)
    down = torch.sin(torch.arange(out.numel(), dtype=out.dtype, device=out.device)).view_as(out)
    return out.detach(), torch.autograd.grad(out, qkv, down)[0]


def assert_equal_in_fp64(attention, reference, pattern: AttentionPattern) -> None:
    qkv = random_qkv(sum(pattern.lengths))
    for found, expected in zip(outcome(attention, qkv, pattern), outcome(reference, qkv, pattern), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def seen_by_definition(lengths, causal: bool, window: int | None) -> torch.Tensor:
    """Pair by pair, from the words of the module."""
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    return torch.tensor(
        [
            [
                document[query] == document[key]
                and (window is None or abs(query - key) <= window)
                and (key <= query or not causal)
                for key in range(len(document))
            ]
            for query in range(len(document))
        ]
    )


def einsum_attention(q, k, v, pattern: AttentionPattern) -> torch.Tensor:
    weights = torch.exp(torch.einsum("qhd,khd->hqk", q, k) * HEAD_DIM**-0.5)
    weights = weights * seen_by_definition(pattern.lengths, pattern.causal, pattern.window)
    return torch.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdim=True), v)


@lengths_of_all_kinds
@windows
@directions
def test_sdpa_equals_the_definition(lengths, window, causal):
    assert_equal_in_fp64(sdpa_attention, dense_attention, pattern_of(lengths, causal, window))


@pytest.mark.parametrize("lengths", [(5, 30, 1, 29), (1,), (12, 1, 1)])
@pytest.mark.parametrize("window", [None, 4, 12])
@directions
def test_the_definition_equals_another_one(lengths, window, causal):
    assert_equal_in_fp64(dense_attention, einsum_attention, pattern_of(lengths, causal, window))


@given(
    lengths=st.lists(st.integers(1, 40) | st.sampled_from([7, 8, 9, 63, 64, 65, 129]), min_size=1, max_size=8),
    window=st.none() | st.integers(1, 70),
    causal=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_sdpa_equals_the_definition_for_any_documents(lengths, window, causal):
    assert_equal_in_fp64(sdpa_attention, dense_attention, pattern_of(lengths, causal, window))


@pytest.mark.parametrize("length", [130, 200, 64, 65])
@directions
def test_a_local_query_sees_64_keys_on_each_side_and_its_own(causal, length):
    # Keys that all weigh the same and values that say whose they are: a weight that is not 0 marks a key that is seen.
    qkv = torch.zeros(length, 3, 1, length)
    qkv[:, 2, 0] = torch.eye(length)
    seen = sdpa_attention(*qkv.unbind(1), pattern_of((length,), causal, 64))[:, 0] > 0
    before = [min(i, 64) for i in range(length)]
    after = [0 if causal else min(length - 1 - i, 64) for i in range(length)]
    assert seen.sum(1).tolist() == [left + 1 + right for left, right in zip(before, after, strict=True)]
    assert seen.sum(1).max() == min(length, 65 if causal else 129)
    for i in range(length):
        assert seen[i, i - before[i] : i + after[i] + 1].all()


@windows
@directions
@pytest.mark.parametrize("which", [0, 1, 2], ids=["queries", "keys", "values"])
@pytest.mark.parametrize("changed", range(4))
def test_documents_do_not_leak(changed, which, causal, window):
    lengths = (40, 150, 1, 70)
    pattern = pattern_of(lengths, causal, window)
    before = random_qkv(sum(lengths), dtype=torch.float32)
    after = before.clone()
    start = sum(lengths[:changed])
    inside = torch.zeros(sum(lengths), dtype=torch.bool)
    inside[start : start + lengths[changed]] = True
    after[inside, which] = 100 * random_qkv(lengths[changed], seed=1, dtype=torch.float32)[:, which]
    left, right = (sdpa_attention(*qkv.unbind(1), pattern) for qkv in (before, after))
    assert torch.equal(left[~inside], right[~inside])
    # A document of one token sees its own value whatever its query and key.
    assert torch.equal(left[inside], right[inside]) == (lengths[changed] == 1 and which < 2)


@windows
@pytest.mark.parametrize("changed", [0, 1, 5, 63, 64, 65, 100, 128, 199])
def test_a_causal_query_does_not_see_its_future(changed, window):
    pattern = pattern_of((200,), True, window)
    before = random_qkv(200, dtype=torch.float32)
    after = before.clone()
    after[changed] *= -3
    left, right = (sdpa_attention(*qkv.unbind(1), pattern) for qkv in (before, after))
    assert torch.equal(left[:changed], right[:changed])
    end = None if window is None else changed + window + 1
    for i in range(changed, min(end or 200, 200)):
        assert not torch.equal(left[i], right[i]), i
    if end is not None:
        assert torch.equal(left[end:], right[end:])


def test_what_a_pattern_derives():
    pattern = pattern_of((2, 1, 3), False, 1)
    assert pattern.cu_seqlens.tolist() == [0, 2, 3, 6]
    assert pattern.cu_seqlens.dtype == torch.int32
    assert pattern.longest == 3
    assert pattern.documents.tolist() == [0, 0, 1, 2, 2, 2]
    visible = [
        [1, 1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    assert pattern.visible().int().tolist() == visible
    assert torch.equal(pattern_of((2, 1, 3), True, 1).visible().int(), torch.tensor(visible).tril())
    assert pattern_of((2, 1, 3), False, None).visible()[3:, 3:].all()


@lengths_of_all_kinds
@directions
def test_visible_is_what_the_words_say(lengths, causal):
    for window in WINDOWS:
        assert torch.equal(pattern_of(lengths, causal, window).visible(), seen_by_definition(lengths, causal, window))


class FlashKernel:
    """FlashAttention as its documentation describes it, document by document.

    A query at i of a document sees the keys from i - left to i + right; -1 is no limit; causal is right = 0.
    """

    def __init__(self, returns_tuple: bool = False) -> None:
        self.returns_tuple, self.calls = returns_tuple, 0

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        *,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        causal=False,
        window_size=(-1, -1),
    ):
        return self._compute(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size)

    def flash_attn_varlen_qkvpacked_func(
        self, qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1)
    ):
        assert qkv.is_contiguous() and (dropout_p, softmax_scale) == (0.0, None)
        ends, longest = cu_seqlens, max_seqlen
        return self._compute(*qkv.unbind(1), ends, ends, longest, longest, causal, window_size)

    def varlen_attn(self, query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size=(-1, -1)):
        assert window_size != (-1, -1)  # for which torch 2.14 takes cuDNN
        return self._compute(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, False, window_size)

    def _compute(self, q, k, v, starts_q, starts_k, longest_q, longest_k, causal, window_size):
        self.calls += 1
        for x in (q, k, v):
            assert x.shape == q.shape and x.dim() == 3 and x.stride(-1) == 1
        assert torch.equal(starts_q, starts_k) and starts_q.dtype == starts_k.dtype == torch.int32
        starts = starts_q.tolist()
        assert starts[0] == 0 and starts[-1] == len(q)
        assert type(longest_q) is int and type(causal) is bool
        assert longest_q == longest_k == max(b - a for a, b in itertools.pairwise(starts))
        left, right = window_size
        dtype = q.dtype
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))  # only results are rounded
        outputs, sums = [], []
        for start, end in itertools.pairwise(starts):
            ahead = torch.arange(end - start) - torch.arange(end - start)[:, None]  # of the query is the key
            hidden = torch.zeros_like(ahead, dtype=torch.bool)
            if left >= 0:
                hidden |= ahead < -left
            if right >= 0:
                hidden |= ahead > right
            if causal:
                hidden |= ahead > 0
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * q.shape[-1] ** -0.5
            scores = scores.masked_fill(hidden, float("-inf"))
            outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
            sums.append(scores.logsumexp(-1))
        out = torch.cat(outputs).to(dtype)
        return (out, torch.cat(sums, 1)) if self.returns_tuple else out


@lengths_of_all_kinds
@windows
@directions
def test_bf16_on_a_cpu_is_rounded_only_at_the_end(lengths, window, causal):
    def exact(q, k, v, pattern):
        return dense_attention(q.double(), k.double(), v.double(), pattern).to(q.dtype)

    pattern = pattern_of(lengths, causal, window)
    qkv = random_qkv(sum(lengths), dtype=torch.bfloat16)
    for found, expected in zip(outcome(sdpa_attention, qkv, pattern), outcome(exact, qkv, pattern), strict=True):
        # fp32 may round to the neighbor of what fp64 rounds to.
        torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)


@lengths_of_all_kinds
@windows
@directions
def test_flash_attention_is_asked_for_the_pattern(lengths, window, causal):
    for returns_tuple in (False, True):
        kernel = FlashKernel(returns_tuple)
        attention = flash_attention(kernel.flash_attn_varlen_func)
        assert_equal_in_fp64(attention, dense_attention, pattern_of(lengths, causal, window))
        assert kernel.calls == 1


@lengths_of_all_kinds
@windows
@directions
def test_packed_flash_attention_is_asked_for_the_pattern(lengths, window, causal):
    kernel = FlashKernel()
    attention = packed_flash_attention(kernel.flash_attn_varlen_qkvpacked_func)
    assert_equal_in_fp64(attention, dense_attention, pattern_of(lengths, causal, window))
    apart = lambda q, k, v, pattern: attention(q.clone(), k.clone(), v.clone(), pattern)  # noqa: E731
    assert_equal_in_fp64(apart, dense_attention, pattern_of(lengths, causal, window))
    assert kernel.calls == 2


@lengths_of_all_kinds
@windows
@directions
def test_torchs_varlen_attention_is_asked_for_the_pattern(lengths, window, causal):
    kernel = FlashKernel()
    attention = varlen_attention(kernel.varlen_attn)
    assert_equal_in_fp64(attention, dense_attention, pattern_of(lengths, causal, window))
    assert kernel.calls == 1


@windows
@directions
def test_torchs_varlen_attention_takes_the_arguments(window, causal):
    from torch.nn.attention.varlen import varlen_attn

    bound = []

    def kernel(*arguments, **options):
        bound.append(inspect.signature(varlen_attn).bind(*arguments, **options).arguments)
        return arguments[0]

    pattern = pattern_of((5, 7), causal, window)
    varlen_attention(kernel)(*random_qkv(12).unbind(1), pattern)
    (arguments,) = bound
    assert arguments["cu_seq_q"].tolist() == arguments["cu_seq_k"].tolist() == [0, 5, 12]
    assert arguments["max_q"] == arguments["max_k"] == 7
    # A tuple: torch tells causal attention by comparing with one.
    left, right = (-1 if causal else 7,) * 2 if window is None else (window, window)
    assert arguments["window_size"] == (left, 0 if causal else right)


def wider(lengths, causal, window):
    return lengths, causal, None if window is None else window + 1


def narrower(lengths, causal, window):
    return lengths, causal, None if window is None else window - 1


def without_window(lengths, causal, window):
    return lengths, causal, None


def across_documents(lengths, causal, window):
    return (sum(lengths),), causal, window


def never_causal(lengths, causal, window):
    return lengths, False, window


def always_causal(lengths, causal, window):
    return lengths, True, window


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [8, 64])
@pytest.mark.parametrize("attention", [sdpa_attention, flash_attention(FlashKernel(True).flash_attn_varlen_func)])
def test_the_check_accepts_what_is_right(attention, head_dim, dtype):
    check(attention, CPU, dtype, replace(SIZES, head_dim=head_dim), "probe")


@pytest.mark.parametrize(("window", "calls"), [(64, 16), (None, 8)])
def test_the_check_is_with_the_window_that_there_is(window, calls):
    seen = []

    def attention(q, k, v, pattern):
        seen.append(pattern.window)
        return sdpa_attention(q, k, v, pattern)

    check(attention, CPU, torch.float32, replace(SIZES, window=window), "probe")
    assert set(seen) == {None, window} and len(seen) == calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("misread", "kind"),
    [
        (wider, "bidirectional attention with window 64"),
        (narrower, "bidirectional attention with window 64"),
        (without_window, "bidirectional attention with window 64"),
        (across_documents, "bidirectional attention with window None"),
        (never_causal, "causal attention with window None"),
        (always_causal, "bidirectional attention with window None"),
    ],
)
def test_the_check_refuses_another_pattern(misread, kind, dtype):
    def attention(q, k, v, pattern):
        return sdpa_attention(q, k, v, pattern_of(*misread(pattern.lengths, pattern.causal, pattern.window)))

    with pytest.raises(DetourError, match=rf"^compute\.attention: probe: {kind} differs from its reference by "):
        check(attention, CPU, dtype, SIZES, "probe")


def with_wrong_gradient(q, k, v, pattern):
    out = sdpa_attention(q, k, v, pattern)
    out.register_hook(lambda gradient: gradient * 1.05)
    return out


def without_a_gradient_by_the_keys(q, k, v, pattern):
    return sdpa_attention(q, k.detach(), v, pattern)


def not_a_number(q, k, v, pattern):
    return sdpa_attention(q, k, v, pattern) * float("nan")


@pytest.mark.parametrize("attention", [with_wrong_gradient, without_a_gradient_by_the_keys, not_a_number])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_check_refuses_a_wrong_result(attention, dtype):
    with pytest.raises(DetourError, match="bidirectional attention with window None differs from its reference"):
        check(attention, CPU, dtype, SIZES, "probe")


@pytest.mark.parametrize("window", [None, 64])
@directions
def test_the_check_says_which_kind_fails(window, causal):
    def attention(q, k, v, pattern):
        if (pattern.window, pattern.causal) == (window, causal):
            raise RuntimeError("no kernel image")
        return sdpa_attention(q, k, v, pattern)

    direction = "causal" if causal else "bidirectional"
    told = f"{direction} attention with window {window} fails on this device: no kernel image"
    with pytest.raises(DetourError, match=told):
        check(attention, CPU, torch.float32, SIZES, "probe")


def test_the_run_file_knows_the_names():
    assert ("auto", *backends.FLASH, "sdpa") == config.ATTENTION


@pytest.mark.parametrize("name", ["auto", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpu_gets_sdpa(name, dtype):
    assert choose_attention(name, CPU, dtype, SIZES) == ("sdpa", sdpa_attention, [])


@pytest.mark.parametrize("name", backends.FLASH)
def test_flash_attention_on_a_cpu_is_refused(name):
    with pytest.raises(DetourError, match=rf"^compute\.attention: {name} requires a GPU and bf16; use auto or sdpa$"):
        choose_attention(name, CPU, torch.bfloat16, SIZES)


@pytest.mark.parametrize("name", backends.FLASH)
def test_flash_attention_in_fp32_is_refused(name):
    with pytest.raises(DetourError, match=f"{name} requires a GPU and bf16"):
        choose_attention(name, CUDA, torch.float32, SIZES)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A GPU on which these attentions are installed; the check is the real one, but on the CPU."""
    installed, asked = {}, []

    def load(name, device, dtype):
        asked.append(name)
        if name not in installed:
            raise DetourError(f"compute.attention: {name} is not installed")
        return installed[name]

    monkeypatch.setattr(backends, "_load", load)
    monkeypatch.setattr(backends, "check", lambda attention, device, *rest: check(attention, CPU, *rest))
    return installed, asked


def choose_on_a_gpu(name: str):
    return choose_attention(name, CUDA, torch.bfloat16, SIZES)


def test_auto_takes_the_first_that_is_right(pretended_gpu):
    installed, asked = pretended_gpu
    right = flash_attention(FlashKernel().flash_attn_varlen_func)
    installed |= {"flash3": with_wrong_gradient, "flash2": right, "varlen": sdpa_attention}
    name, attention, skipped = choose_on_a_gpu("auto")
    assert (name, attention) == ("flash2", right)
    assert asked == ["flash4", "flash3", "flash2"]
    assert len(skipped) == 2
    assert "flash4 is not installed" in skipped[0]
    assert "bidirectional attention with window None differs" in skipped[1]


def test_on_hopper_the_third_flash_attention_comes_first(pretended_gpu, monkeypatch):
    installed, asked = pretended_gpu
    installed |= {"flash3": sdpa_attention, "flash4": sdpa_attention}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (((10, 0), "flash4"), ((9, 0), "flash3"), ((8, 0), "flash4")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, value=capability: value)
        assert choose_on_a_gpu("auto")[0] == name
    assert asked == ["flash4", "flash3", "flash4"]


def test_auto_falls_back_to_sdpa_with_all_reasons(pretended_gpu):
    name, attention, skipped = choose_on_a_gpu("auto")
    assert (name, attention) == ("sdpa", sdpa_attention)
    assert [reason.split()[1] for reason in skipped] == ["flash4", "flash3", "flash2", "varlen"]


def test_the_one_that_is_named_is_used_or_refused(pretended_gpu):
    installed, asked = pretended_gpu
    installed |= {"flash2": with_wrong_gradient, "varlen": sdpa_attention}
    assert choose_on_a_gpu("varlen") == ("varlen", sdpa_attention, [])
    with pytest.raises(DetourError, match="differs from its reference"):
        choose_on_a_gpu("flash2")
    with pytest.raises(DetourError, match="flash3 is not installed"):
        choose_on_a_gpu("flash3")
    assert asked == ["varlen", "flash2", "flash3"]
    assert choose_on_a_gpu("sdpa") == ("sdpa", sdpa_attention, [])


def test_a_library_that_is_missing_is_told(monkeypatch):
    monkeypatch.setitem(backends.FLASH, "flash2", ("no_such_module", "flash_attn_varlen_func", flash_attention))
    monkeypatch.setitem(backends.FLASH, "flash3", ("math", "flash_attn_varlen_func", flash_attention))
    for name in ("flash2", "flash3"):
        with pytest.raises(DetourError, match=rf"^compute\.attention: {name} is not installed: "):
            choose_on_a_gpu(name)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("name", backends.FLASH)
def test_an_installed_flash_attention_is_right_on_a_gpu(name):
    try:
        attention = backends._load(name, CUDA, torch.bfloat16)
    except DetourError as fault:
        pytest.skip(str(fault))
    check(attention, CUDA, torch.bfloat16, Sizes(), "probe")


@pytest.mark.gpu
@needs_gpu
@lengths_of_all_kinds
@windows
@directions
def test_sdpa_equals_the_definition_on_a_gpu(lengths, window, causal):
    pattern = AttentionPattern(lengths, causal, window, CUDA)
    qkv = random_qkv(sum(lengths), dtype=torch.float32).to(CUDA)
    found, expected = outcome(sdpa_attention, qkv, pattern), outcome(dense_attention, qkv.double(), pattern)
    for mine, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-5)
