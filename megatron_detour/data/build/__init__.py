"""Builds indexed corpora: options, what each worker does (worker), all of them (run), joining (join), the whole (corpus)."""

from megatron_detour.data.build.corpus import build_corpus
from megatron_detour.data.build.options import BuildOptions

__all__ = ["BuildOptions", "build_corpus"]
