"""How a parameter is cut over tensor ranks, as declared by a family (no torch: plans count with it)."""

from __future__ import annotations

from dataclasses import dataclass


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
