"""`megatron-detour doctor` on this machine, and with stand-ins for what it has not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import resource
import shutil
from collections import namedtuple

import pytest
import torch
import yaml

from megatron_detour.checkpoint.huggingface import Source, write_model
from megatron_detour.commands import doctor, machine
from megatron_detour.commands.machine import FAULT, NOTE, OK, CheckResult
from megatron_detour.commands.main import main
from megatron_detour.errors import DetourError
from megatron_detour.model import compute
from megatron_detour.tokenizer.vocabulary import load_vocabulary
from tests.harness import ROOT
from tests.models import CONFIG, tiny

Usage = namedtuple("Usage", "total used free")


def by_what(items) -> dict[str, list[CheckResult]]:
    found: dict[str, list[CheckResult]] = {}
    for item in items:
        found.setdefault(item.what, []).append(item)
    return found


@pytest.fixture
def run_file(tokenizer_folder, corpus, tmp_path):
    """A run file whose model and corpus are there and whole."""
    size = load_vocabulary(tokenizer_folder).size
    folder = tmp_path / "model"
    folder.mkdir()
    config = CONFIG | {"vocab_size": size}
    write_model(
        folder,
        config,
        Source(str(tokenizer_folder)),
        load_vocabulary(tokenizer_folder),
        {name: p.detach() for name, p in tiny(vocab_size=size).named_parameters()},
    )
    raw = {
        "name": "small",
        "folder": str(tmp_path / "run"),
        "model": {"start": str(folder)},
        "data": {"corpora": [{"prefix": corpus.prefix}], "sequence_length": 128},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "phases": [
            {"name": "a", "objective": "mlm", "mask_rate": 0.2, "tokens": "4 steps", "learning_rate": {"peak": 1}}
        ],
        "deepspeed": str(ROOT / "ds_configs/zero2_fp32_cpu.json"),
        "validation": {"corpora": [{"prefix": corpus.prefix}], "sequences": 4},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_this_machine(capsys):
    """Whatever it is: every item is there, and the status follows the faults."""
    status = main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    whats = {line[7:20].strip() for line in lines[:-2]}
    expected = "python packages optional GPU bf16 collectives cores memory launcher Slurm attention kernels disk"
    assert set(expected.split()) <= whats
    assert {line.split()[0] for line in lines[:-2]} <= {OK, NOTE, FAULT}
    assert status == any(line.startswith(FAULT) for line in lines)
    assert lines[-1].startswith(f"{len(lines) - 2} checks: ")


def test_a_run_that_can_start(run_file):
    found = by_what(doctor.items(str(run_file), []))
    assert found["run file"][0].text.endswith("run.yaml: small")
    assert "weights match config.json" in found["model"][0].text
    assert found["corpus"][0].text.split(": ", 1)[1].startswith("intact, 300 documents")
    assert len(found["corpus"]) == 1  # used twice, read once
    assert "plan" not in found
    for what in ("run file", "model", "attention", "kernels", "fit", "corpus"):
        assert {item.state for item in found[what]} == {OK}


def test_what_a_run_lacks_is_told(run_file, capsys):
    assert main(["doctor", str(run_file), "data.sequence_length=512", "compute.attention=flash2"]) == 1
    out = capsys.readouterr().out
    assert "fault  plan          data.sequence_length: 512 exceeds the model's 256 positions" in out
    assert "fault  attention     compute.attention: flash2 requires a GPU and bf16; use auto or sdpa" in out
    assert main(["doctor", str(run_file), "data.corpora=[{prefix: nowhere}]"]) == 1
    assert "fault  plan          data.corpora: nowhere.manifest.json: no such corpus" in capsys.readouterr().out


def test_weights_of_other_sizes(run_file, tmp_path):
    path = tmp_path / "model/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 64}))
    (model,) = by_what(doctor.items(str(run_file), []))["model"]
    assert model.state == FAULT
    assert "mlp.Wi.weight has size (96, 32), but config.json implies (128, 32)" in model.text


def test_a_damaged_corpus(run_file, corpus, tmp_path):
    for kind in ("bin", "idx", "manifest.json"):
        shutil.copyfile(f"{corpus.prefix}.{kind}", tmp_path / f"copy.{kind}")
    content = bytearray((tmp_path / "copy.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "copy.bin").write_bytes(content)
    found = by_what(doctor.items(str(run_file), [f"data.corpora=[{{prefix: {tmp_path}/copy}}]"]))
    assert [(item.state, "SHA-256" in item.text) for item in found["corpus"]] == [(FAULT, True), (OK, False)]


def test_all_faults_of_a_run_file(run_file):
    found = by_what(doctor.items(str(run_file), ["seed=-1", "optimizer.clip=0"]))
    assert [item.text.split(":")[0] for item in found["run file"]] == ["seed", "optimizer.clip"]
    assert "attention" in found


def test_overrides_need_a_run_file():
    with pytest.raises(DetourError, match="give the run file before its overrides"):
        main(["doctor", "seed=3"])


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch would tell on a machine of two H100s, one of them half in use."""
    free = {0: 78 << 30, 1: 40 << 30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (free[number], 79 << 30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 27, 3))
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    asked = []

    def choice(*chosen):
        return lambda name, device, dtype, sizes: asked.append((name, str(device), dtype)) or chosen

    monkeypatch.setattr(machine, "choose_attention", choice("flash2", None, ["flash4 is not installed"]))
    monkeypatch.setattr(machine, "choose_kernels", choice("triton", None, None))
    return asked


def test_gpus(two_gpus):
    first, second, *_ = machine.gpus()
    assert (first.state, second.state) == (OK, NOTE)
    assert first.text == "0: NVIDIA H100 80GB HBM3, 78.0 of 79.0 GiB free"
    assert "nvidia-smi" in second.remedy
    assert machine.precision().state == OK
    assert machine.collectives().text == "NCCL 2.27.3"
    assert [(item.state, item.text) for item in machine.compute()] == [
        (OK, "flash2"),
        (NOTE, "skipped: flash4 is not installed"),
        (OK, "triton"),
    ]
    assert two_gpus == [("auto", "cuda:0", torch.bfloat16)] * 2


def test_a_run_on_gpus_is_one_of_their_number_and_memory(two_gpus, run_file, monkeypatch):
    found = by_what(doctor.items(str(run_file), []))
    assert ", 2 ranks" in found["fit"][0].text
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: (1 << 29, 1 << 29))
    (fit,) = by_what(doctor.items(str(run_file), []))["fit"]
    assert fit.state == FAULT and "more than the 0.5 GiB" in fit.text


def test_gpus_without_bf16_or_nccl(two_gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    assert (machine.precision().state, machine.collectives().state) == (NOTE, FAULT)


def test_the_file_that_is_in_use_is_not_advised(run_file, monkeypatch):
    monkeypatch.setattr(machine, "_cpu_flags", set)
    (bf16,) = by_what(doctor.items(str(run_file), []))["bf16"]
    assert (bf16.state, bf16.remedy) == (OK, "")
    other = f"deepspeed={ROOT / 'ds_configs/zero2_bf16.json'}"
    (bf16,) = by_what(doctor.items(str(run_file), [other]))["bf16"]
    assert bf16.state == NOTE and "zero2_fp32_cpu.json" in bf16.remedy


@pytest.mark.parametrize(("flags", "state"), [({"avx2", "avx512_bf16"}, OK), ({"avx2"}, NOTE), (set(), NOTE)])
def test_bf16_of_a_cpu(monkeypatch, flags, state):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_cpu_flags", lambda: flags)
    precision = machine.precision()
    assert precision.state == state
    assert ("zero2_fp32_cpu.json" in precision.remedy) == (state == NOTE)


def test_versions_out_of_range(monkeypatch):
    wanted = ["deepspeed<0.20,>=0.19.8", "nowhere>=1", 'ray>=2; extra == "ray"', "torch>=2.11"]
    versions = {"deepspeed": "0.20.1", "torch": "2.13.0+cpu"}

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(importlib.metadata, "version", version)
    fine, deepspeed, missing = by_what(machine.packages())["packages"]
    assert (fine.state, fine.text) == (OK, "torch 2.13.0+cpu")
    assert (deepspeed.state, deepspeed.remedy) == (FAULT, "pip install 'deepspeed<0.20,>=0.19.8'")
    assert (missing.state, missing.text) == (FAULT, "nowhere is missing")


def test_limits_that_break_runs(monkeypatch, two_gpus):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, 4096))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0})
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_NTASKS", "2")
    found = {item.what: item for item in machine.host()}
    states = {what: found[what].state for what in ("open files", "shared memory", "launcher", "cores")}
    assert states == {"open files": NOTE, "shared memory": FAULT, "launcher": FAULT, "cores": NOTE}
    assert "ulimit -n" in found["open files"].remedy and "--shm-size" in found["shared memory"].remedy
    assert found["Slurm"].text == "JOB_ID 17, NTASKS 2"


def test_disks(tmp_path, monkeypatch):
    told = machine.disk(tmp_path / "not/yet")
    assert told.text.startswith(f"{tmp_path}: ") and "MB/s" in told.text
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**9))
    full = machine.disk(tmp_path, needed=10**10)
    assert (full.state, full.remedy) == (FAULT, "10.0 GB needed: free some space, or set another folder=...")


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(machine.tempfile, "NamedTemporaryFile", refuse)
    told = machine.disk(tmp_path)
    assert (told.state, told.text) == (FAULT, f"{tmp_path}: not writable: Permission denied")


def test_compiled_layers_are_tried(run_file, capsys, monkeypatch):
    monkeypatch.setattr(compute, "COMPILER", {"backend": "eager"})
    main(["doctor", str(run_file), "compute.compile=true"])
    assert "ok     compile       a compiled layer equals a plain one" in capsys.readouterr().out
    monkeypatch.setattr(compute, "COMPILER", {"backend": lambda graph, inputs: 1 / 0})
    torch._dynamo.reset()
    assert main(["doctor", str(run_file), "compute.compile=true"]) == 1
    assert "fault  compile       compute.compile: a layer cannot be compiled" in capsys.readouterr().out
