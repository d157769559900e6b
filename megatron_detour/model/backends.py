"""Choice of the attention backend: a version of FlashAttention on a GPU, SDPA elsewhere.

Backends other than SDPA are compared with SDPA on the CPU before they are used: releases of these libraries differ in
the meaning of a window and in the hardware that they support.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import CPU, Sizes, device_is_dead, first_line, relative_difference
from megatron_detour.kernels.plain import joined
from megatron_detour.kernels.requirements import attention_fault
from megatron_detour.model.attention import Attention, AttentionPattern, sdpa_attention


def flash_attention(varlen: Callable, unlimited: int | None = -1) -> Attention:
    """Wrap `flash_attn_varlen_func` of FlashAttention 3 or 4; `unlimited` is its value for no window."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        out = varlen(
            q,
            k,
            v,
            cu_seqlens_q=pattern.cu_seqlens,
            cu_seqlens_k=pattern.cu_seqlens,
            max_seqlen_q=pattern.longest,
            max_seqlen_k=pattern.longest,
            causal=pattern.causal,
            window_size=_window(pattern, unlimited),
        )
        return out[0] if isinstance(out, tuple) else out  # 4, and some releases of 3, also return log-sum-exps

    return attention


def packed_flash_attention(varlen: Callable) -> Attention:
    """Wrap `flash_attn_varlen_qkvpacked_func` of FlashAttention 2, which writes the three gradients into one tensor."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        qkv_T3HD = _Join.apply(q, k, v)
        window = _window(pattern, -1)
        return varlen(qkv_T3HD, pattern.cu_seqlens, pattern.longest, causal=pattern.causal, window_size=window)

    return attention


class _Join(torch.autograd.Function):
    """q, k and v as one [T, 3, H, D]: without copies if they are views of one, as is the gradient."""

    @staticmethod
    def forward(ctx, q, k, v):
        whole = joined(q, k, v)
        return torch.stack([q, k, v], 1) if whole is None else whole

    @staticmethod
    def backward(ctx, grad):
        return grad.unbind(1)


def varlen_attention(varlen: Callable) -> Attention:
    """Wrap torch's `varlen_attn`."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        ends, longest = pattern.cu_seqlens, pattern.longest
        # For (-1, -1) torch 2.14 takes cuDNN on some GPUs, which plans anew for every shape, and documents have many.
        left, right = _window(pattern, -1 if pattern.causal else longest)
        return varlen(q, k, v, ends, ends, longest, longest, window_size=(left, 0 if pattern.causal else right))

    return attention


def _window(pattern: AttentionPattern, unlimited: int | None) -> tuple[int | None, int | None]:
    """Return the number of keys to the left and right."""
    if pattern.window is None:
        return unlimited, unlimited
    return pattern.window, 0 if pattern.causal else pattern.window


# In order of preference: name -> module, function, wrapper.
FLASH = {
    "flash4": ("flash_attn.cute", "flash_attn_varlen_func", partial(flash_attention, unlimited=None)),
    "flash3": ("flash_attn_interface", "flash_attn_varlen_func", flash_attention),
    "flash2": ("flash_attn", "flash_attn_varlen_qkvpacked_func", packed_flash_attention),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", varlen_attention),
}


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, sizes: Sizes
) -> tuple[str, Attention, list[str]]:
    """Return name and function for `auto`, a key of FLASH or `sdpa`, and why `auto` skipped preferred backends.

    Raises DetourError if the requested backend is unavailable or wrong.
    """
    skipped = []
    available = _preferred(device) if device.type == "cuda" and dtype == torch.bfloat16 else []
    candidates = {"auto": available, "sdpa": []}.get(name, [name])
    for candidate in candidates:
        try:
            function = _load(candidate, device, dtype)
            check(function, device, dtype, sizes, candidate)
        except DetourError as fault:
            if name != "auto" or device_is_dead(device):
                raise
            skipped.append(str(fault))
            continue
        return candidate, function, skipped
    return "sdpa", sdpa_attention, skipped


def _preferred(device: torch.device) -> list[str]:
    """Return the keys of FLASH in order; on Hopper FlashAttention 3, which is written for it, comes first."""
    hopper = torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9
    return sorted(FLASH, key=lambda name: name != "flash3") if hopper else list(FLASH)


def _load(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    if fault := attention_fault(name, device.type == "cuda", dtype == torch.bfloat16):
        raise DetourError(fault)
    # FlashAttention 4 compiles each kind of call in half a minute; on disk only if this is set before it is imported.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    module, function, wrapper = FLASH[name]
    try:
        return wrapper(getattr(import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise DetourError(f"compute.attention: {name} is not installed: {first_line(error)}") from None
    except Exception as error:  # installed, but broken
        raise DetourError(f"compute.attention: cannot load {name}: {first_line(error)}") from error


def check(attention: Attention, device: torch.device, dtype: torch.dtype, sizes: Sizes, name: str) -> None:
    """Compare output and gradient with SDPA in fp32 on the CPU, in its directions, with and without its window."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for lengths in _documents(sizes):
        size = sum(lengths), 3, sizes.heads, sizes.head_dim
        generator = torch.Generator(device).manual_seed(0)
        qkv = torch.randn(size, generator=generator, device=device).to(dtype)
        incoming = torch.randn(qkv[:, 0].shape, generator=generator, device=device).to(dtype)
        for causal in sizes.directions:
            for window in dict.fromkeys((None, sizes.window)):
                pattern = AttentionPattern(lengths, causal, window, device)
                kind = f"{name}: {'causal' if causal else 'bidirectional'} attention with window {window}"
                try:
                    results = [_judged(x, lengths) for x in _output_and_gradient(attention, qkv, incoming, pattern)]
                except Exception as error:  # of a driver or compiler: whatever it is, the backend cannot be used
                    raise DetourError(f"compute.attention: {kind} fails on this device: {first_line(error)}") from error
                same = AttentionPattern(_some(lengths), causal, window, CPU)
                given = _judged(qkv, lengths), _judged(incoming, lengths)
                for result, reference in zip(results, _output_and_gradient(sdpa_attention, *given, same), strict=True):
                    difference = relative_difference(result, reference)
                    if not difference <= tolerance:
                        raise DetourError(f"compute.attention: {kind} differs from its reference by {difference:.1e}")


def _documents(sizes: Sizes) -> Iterator[tuple[int, ...]]:
    """Yield lengths of documents: at the edges of a window, and what FlashAttention 4 would compile in mid-run: for a
    micro-batch of long documents, for fewer than 128 tokens, and for more than 256 documents."""
    yield 5, 200, 1, 77
    longest = min(sizes.longest, sizes.tokens)
    yield (longest,) * (sizes.tokens // longest)
    yield 100, 27
    mean = max(sizes.tokens // 300, 2)
    yield (mean - 1, mean + 1) * 150


def _some(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The first two and the last two documents: what the CPU computes in a moment."""
    return lengths if len(lengths) <= 4 else lengths[:2] + lengths[-2:]


def _judged(x: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Return x [T, ..., H, D] for these documents and the first and last head, fp32 on the CPU."""
    some = _some(lengths)
    rows = [x[: sum(some[:2])], x[len(x) - sum(some[2:]) :]]
    return torch.cat(rows)[..., [0, -1], :].cpu().float()


def _output_and_gradient(attention: Attention, qkv, incoming, pattern) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = qkv.clone().requires_grad_()
    out = attention(*qkv.unbind(1), pattern)
    return out.detach(), torch.autograd.grad(out, qkv, incoming)[0]
