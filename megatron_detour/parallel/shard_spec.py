"""How tensor ranks cut a parameter, as its family says, and the loss its logits (no torch: plans count with it)."""

from __future__ import annotations

from dataclasses import dataclass

# Logits per chunk. Small chunks spend much of their time on accumulating the weight's gradient, [V, E] in fp32.
CHUNK_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 28}


@dataclass(frozen=True)
class ShardSpec:
    """Shard dimension `dim`, 0 or 1, of total length `size`, of a parameter with `parts` fused blocks."""

    dim: int
    size: int
    parts: int = 1

    def local(self, ranks: int) -> int:
        """Return the length of one rank's shard, with padding."""
        return self.parts * self._per_part(ranks)

    def _per_part(self, ranks: int) -> int:
        return -(-(self.size // self.parts) // ranks)
