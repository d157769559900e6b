"""Files of a checkpoint: for whom they are, and what a disk's fault looks like."""

from __future__ import annotations

import errno
import os
import resource
from contextlib import ExitStack

import pytest
import torch
from safetensors import SafetensorError

from megatron_detour.checkpoint import huggingface
from megatron_detour.checkpoint.state import TrainingState
from megatron_detour.errors import DetourError


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_every_file_is_for_whom_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        huggingface.save_weights({"a": torch.ones(3)}, tmp_path, torch.float32)
        huggingface.write_checkpoint(tmp_path, TrainingState(), {"step": 1})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("model.safetensors", "optimizer.safetensors", "run_state.json"), 0o666 & ~umask)


def test_states_of_another_optimizer_are_not_loaded(tmp_path):
    """Lion's momentum has the name of AdamW's, and is another quantity."""
    name, tensor = "model.final_norm.weight", torch.ones(3)
    state = TrainingState({}, {"exp_avg": {name: 2 * tensor}, "exp_avg_sq": {name: tensor}}, {name: 4})
    huggingface.write_checkpoint(tmp_path, state, {"step": 4})
    with ExitStack() as stack:
        read, steps = huggingface.open_optimizer(tmp_path, ("exp_avg", "exp_avg_sq"), stack)
        assert steps == {name: 4} and torch.equal(read("exp_avg_sq", name), tensor)
        with pytest.raises(DetourError, match=r"another optimizer's, which keeps exp_avg, exp_avg_sq and not exp_avg;"):
            huggingface.open_optimizer(tmp_path, ("exp_avg",), stack)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOSPC])
def test_a_fault_of_the_disk_under_safetensors_is_one_of_the_disk(tmp_path, monkeypatch, number):
    def fail(*arguments, **options):
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(huggingface, "save_file", fail)
    with pytest.raises(OSError, match=r"model\.safetensors") as fault:
        huggingface.save_weights({"a": torch.ones(3)}, tmp_path, torch.float32)
    assert fault.value.errno == number


def test_safetensors_words_for_a_full_disk_are_understood(tmp_path):
    """By the library itself, whose message is read."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"model\.safetensors") as fault:
            huggingface.save_weights({"a": torch.ones(10_000)}, tmp_path, torch.float32)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert fault.value.errno == errno.EFBIG
