"""Builds indexed corpora: the options, a part (worker), all parts (run), their joining (join), the whole (corpus)."""

from megatron_detour.corpus.build import build_corpus
from megatron_detour.corpus.options import BuildOptions

__all__ = ["BuildOptions", "build_corpus"]
