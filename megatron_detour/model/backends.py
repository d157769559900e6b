"""Which attention a run uses: FlashAttention in one of its forms on a GPU, SDPA elsewhere.

Whatever is not SDPA is compared with the dense reference on this device before it is used: releases of these libraries
differ in what a window means and in which hardware they serve.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch

from megatron_detour.errors import DetourError
from megatron_detour.kernels.check import device_is_dead, first_line, synchronize
from megatron_detour.model.attention import Attention, AttentionPattern, dense_attention, sdpa_attention


def flash_attention(varlen: Callable, unlimited: int | None = -1) -> Attention:
    """From `flash_attn_varlen_func` of FlashAttention 2, 3 or 4; `unlimited` is its word for a window without end."""

    def attention(qkv_T3HD: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        q, k, v = qkv_T3HD.unbind(1)
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
        return out[0] if isinstance(out, tuple) else out  # 4, and some releases of 3, return log-sum-exps as well

    return attention


def varlen_attention(varlen: Callable) -> Attention:
    """From torch's own `varlen_attn`."""

    def attention(qkv_T3HD: torch.Tensor, pattern: AttentionPattern) -> torch.Tensor:
        q, k, v = qkv_T3HD.unbind(1)
        ends, longest = pattern.cu_seqlens, pattern.longest
        left, right = _window(pattern, -1)
        return varlen(q, k, v, ends, ends, longest, longest, window_size=(left, 0 if pattern.causal else right))

    return attention


def _window(pattern: AttentionPattern, unlimited: int | None) -> tuple[int | None, int | None]:
    """Keys to the left and right."""
    if pattern.window is None:
        return unlimited, unlimited
    return pattern.window, 0 if pattern.causal else pattern.window


# In order of preference: name -> module, function, form. FlashAttention 4 is newest where it runs.
FLASH = {
    "flash4": ("flash_attn.cute", "flash_attn_varlen_func", partial(flash_attention, unlimited=None)),
    "flash3": ("flash_attn_interface", "flash_attn_varlen_func", flash_attention),
    "flash2": ("flash_attn", "flash_attn_varlen_func", flash_attention),
    "varlen": ("torch.nn.attention.varlen", "varlen_attn", varlen_attention),
}
TYPES = (torch.bfloat16, torch.float16)
NAMES = ("auto", *FLASH, "sdpa")


def choose_attention(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, Attention, list[str]]:
    """The name and the function for a name of NAMES, and for `auto` why the ones before it were not taken.

    Raises DetourError when the one that was asked for is not there or computes something else.
    """
    passed_over = []
    available = list(FLASH) if device.type == "cuda" and dtype in TYPES else []
    candidates = {"auto": available, "sdpa": []}.get(name, [name])
    for candidate in candidates:
        try:
            function = _load(candidate, device, dtype)
            check(function, device, dtype, head_dim, candidate)
        except DetourError as fault:
            if name != "auto" or device_is_dead(device):
                raise
            passed_over.append(str(fault))
            continue
        return candidate, function, passed_over
    return "sdpa", sdpa_attention, passed_over


def _load(name: str, device: torch.device, dtype: torch.dtype) -> Attention:
    if device.type != "cuda" or dtype not in TYPES:
        raise DetourError(f"compute.attention: {name} needs a GPU and bf16; use auto or sdpa")
    module, function, form = FLASH[name]
    try:
        return form(getattr(import_module(module), function))
    except (ImportError, AttributeError) as error:
        raise DetourError(f"compute.attention: {name} is not installed: {first_line(error)}") from None
    except Exception as error:  # a library that is there and broken
        raise DetourError(f"compute.attention: {name} cannot be loaded: {first_line(error)}") from error


def check(attention: Attention, device: torch.device, dtype: torch.dtype, head_dim: int, name: str) -> None:
    """Compares output and gradient with the dense reference in fp32, both directions, with and without a window."""
    generator = torch.Generator().manual_seed(0)
    lengths = (5, 200, 1, 77)
    given = torch.randn(sum(lengths), 3, 2, head_dim, generator=generator).to(device, dtype)
    down = torch.randn(sum(lengths), 2, head_dim, generator=generator).to(device, dtype)
    allowed = 2e-2 if dtype in TYPES else 1e-4
    for causal in (False, True):
        for window in (None, 64):
            pattern = AttentionPattern(lengths, causal, window, device)
            kind = f"{name}: {'causal' if causal else 'bidirectional'} attention with window {window}"
            try:
                found = _output_and_gradient(attention, given, down, pattern)
                synchronize(device)
            except Exception as error:  # a driver's or a compiler's: whatever it is, it cannot be used
                raise DetourError(f"compute.attention: {kind} fails on this device: {first_line(error)}") from error
            expected = _output_and_gradient(dense_attention, given.float(), down.float(), pattern)
            for mine, reference in zip(found, expected, strict=True):
                difference = float((mine.float() - reference).abs().max() / reference.abs().max())
                if not difference <= allowed:
                    raise DetourError(f"compute.attention: {kind} differs from its definition by {difference:.1e}")


def _output_and_gradient(attention: Attention, given, down, pattern) -> tuple[torch.Tensor, torch.Tensor]:
    qkv = given.clone().requires_grad_()
    out = attention(qkv, pattern)
    return out.detach(), torch.autograd.grad(out, qkv, down)[0]
