"""Builds indexed corpora: the options, a part (worker), all parts (run), their joining (join), the whole (corpus)."""

from megatron_detour.data.build.corpus import build_corpus
from megatron_detour.data.build.options import BuildOptions

__all__ = ["BuildOptions", "build_corpus"]
