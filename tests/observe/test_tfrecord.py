from __future__ import annotations

import random

import pytest

from megatron_detour.observe.tfrecord import crc32c, masked_crc


def test_the_known_checksum() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C


@pytest.mark.parametrize("length", [4, 5, 8, 255, 256, 257, 3000])
def test_the_mask_is_tensorboards(length: int) -> None:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    content = random.Random(length).randbytes(length)
    assert masked_crc(content) == masked_crc32c(content)
