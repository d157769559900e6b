"""Building indexed corpora: options, one part (worker), all parts (workers), joining (join), the whole (build)."""

from megatron_detour.corpus.build import build_corpus
from megatron_detour.corpus.options import BuildOptions
