"""Whole runs of a tiny model through the launchers: what they write, how they resume, what they refuse."""

from __future__ import annotations

import itertools
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_detour.checkpoint import store
from megatron_detour.config import load
from megatron_detour.errors import EXIT_INTERRUPTED, DetourError
from megatron_detour.files import file_facts
from megatron_detour.forecast import forecast
from megatron_detour.observe.sinks import read_metrics
from megatron_detour.plan import Plan
from megatron_detour.release.export import export
from tests.harness import ROOT, environment, free_port, slow
from tests.model.test_compiled import has_compiler

pytestmark = pytest.mark.integration

SCRIPT = ROOT / "examples" / "pretrain_large.sh"
BIN = Path(sys.executable).parent
STEPS = (3, 3)


@pytest.fixture(scope="module")
def run_file(corpus, tmp_path_factory) -> Path:
    """A run file of two phases for a model of three layers."""
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    content = {
        "name": "tiny",
        "folder": "set by the test",
        "model": {
            "config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "local_attention": 32,
                "max_position_embeddings": 128,
            },
            "tokenizer": str(corpus.tokenizer),
        },
        "data": {"corpora": [{"prefix": corpus.prefix}], "sequence_length": 64},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "phases": [
            {"name": "detour", "objective": "clm", "tokens": f"{STEPS[0]} steps", "learning_rate": {"peak": 1e-2}},
            {
                "name": "decay",
                "objective": "mlm",
                "mask_rate": 0.15,
                "whole_word_masking": True,
                "freeze": ["embeddings", "layers.0"],
                "tokens": f"{STEPS[1]} steps",
                "learning_rate": {"peak": 1e-2, "shape": "1-sqrt", "end": 1e-3},
            },
        ],
        "deepspeed": str(ROOT / "ds_configs" / "zero2_fp32_cpu.json"),
        "validation": {"corpora": [{"prefix": corpus.prefix}], "sequences": 4},
        "checkpoint": {"every": "1 step", "keep": 2},
        "tensorboard": False,
    }
    path.write_text(yaml.safe_dump(content))
    return path


def command(ranks: int, *arguments: str, launcher: str = "torchrun") -> list[str]:
    port = str(free_port())
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", port, str(SCRIPT), *arguments]
    return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port, str(SCRIPT), *arguments]


def start(ranks: int, *arguments: str, launcher: str = "torchrun", cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(ranks, *arguments, launcher=launcher),
        env=environment(),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
    )


def finished(result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result


@pytest.fixture(scope="module")
def unbroken(run_file, tmp_path_factory) -> Path:
    """The folder of a run of two data-parallel ranks under DeepSpeed's launcher."""
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    result = finished(start(2, "--run-file", str(run_file), f"folder={folder}", launcher="deepspeed"))
    for name in ("step-00000006", "report.html", "metrics.jsonl"):
        assert str(folder) in result.stdout and name in result.stdout
    loss = read_metrics(folder / "metrics.jsonl")[-1]["val_mlm_loss"]
    learned = loss < json.loads((folder / "environment.json").read_text())["unigram_loss"]
    assert ("is not below the unigram baseline" in result.stdout + result.stderr) != learned
    return folder


def losses(folder: Path) -> list[tuple]:
    return [(r["step"], r["loss"], r["grad_norm"], r["data_crc"]) for r in read_metrics(folder / "metrics.jsonl")[1:]]


def test_a_run_writes_what_it_promises(unbroken):
    records = read_metrics(unbroken / "metrics.jsonl")
    assert [r["step"] for r in records] == list(range(sum(STEPS) + 1))
    assert [r["objective"] for r in records[1:]] == ["clm"] * STEPS[0] + ["mlm"] * STEPS[1]
    assert records[-1]["tokens"] == sum(STEPS) * 8 * 64
    assert records[-1]["lr"] == pytest.approx(1e-3)
    for record in records[1:]:
        keys = {"step", "tokens", "phase", "objective", "loss", "lr", "grad_norm", "tokens_per_second"}
        assert keys <= record.keys()
    assert [r["step"] for r in records if "val_mlm_loss" in r] == [0, 3, 6]
    assert records[3]["val_clm_loss"] < records[0]["val_clm_loss"]
    assert (unbroken / "report.html").stat().st_size > 10_000
    assert len(list((unbroken / "plots").glob("*.png"))) >= 3
    assert json.loads((unbroken / "environment.json").read_text())["sessions"][0]["ranks"] == 2
    names = [path.name for path in store.find_checkpoints(unbroken / "checkpoints")]
    assert names == ["step-00000000", "step-00000003", "step-00000005", "step-00000006"]
    for path in store.find_checkpoints(unbroken / "checkpoints"):
        store.verify(path)


def test_the_loop_counts_the_operations_that_the_forecast_counts(unbroken, run_file):
    """In the phase with frozen layers too: MFU and model TFLOP/s rest on them."""
    config = load(run_file)
    costs = forecast(config, Plan.from_config(config), 2).costs
    for cost in costs:
        records = [r for r in read_metrics(unbroken / "metrics.jsonl")[1:] if r["phase"] == cost.name]
        counted = sum(r["model_tflops"] * 1e12 * r["seconds"] for r in records)
        assert counted == pytest.approx(cost.flops, rel=0.08), cost.name  # which documents come, which are masked


def test_a_checkpoint_opens_in_transformers_with_equal_logits(unbroken, tmp_path):
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    checkpoint = unbroken / "checkpoints" / "step-00000006"
    exported = export(str(checkpoint), str(tmp_path / "fp32"), "fp32")
    assert exported.difference < 1e-5 and exported.run_state["step"] == exported.run_state["total_steps"] == 6
    assert export(str(unbroken), str(tmp_path / "bf16"), "bf16").difference < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "fp32")
    assert tokenizer.mask_token == "[MASK]"
    inputs = tokenizer("The patient takes [MASK] since Monday.", return_tensors="pt")
    with torch.no_grad():
        logits = [
            AutoModelForMaskedLM.from_pretrained(folder, dtype=torch.float32).eval()(**inputs).logits
            for folder in (checkpoint, tmp_path / "fp32")
        ]
    assert torch.equal(*logits)
    assert load_file(tmp_path / "bf16" / "model.safetensors")["head.dense.weight"].dtype == torch.bfloat16


def test_export_refuses_what_differs_and_what_is_there(unbroken, tmp_path, monkeypatch):
    from megatron_detour.checkpoint import huggingface

    (tmp_path / "taken").mkdir()
    with pytest.raises(DetourError, match="already exists"):
        export(str(unbroken), str(tmp_path / "taken"), "fp32")
    with pytest.raises(DetourError, match="neither a checkpoint"):
        export(str(tmp_path), str(tmp_path / "out"), "fp32")
    honest = huggingface.write_model

    def perturbed(folder, config, tokenizer, vocabulary, weights, dtype):
        wrong = weights | {"decoder.bias": weights["decoder.bias"] + 0.5}
        honest(folder, config, tokenizer, vocabulary, wrong, dtype)

    monkeypatch.setattr(huggingface, "write_model", perturbed)
    with pytest.raises(DetourError, match=r"differ from transformers' by [1-9]\.\de-0[12] of"):
        export(str(unbroken), str(tmp_path / "out"), "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_one_rank_and_auto_micro_batches_give_the_same_run(unbroken, run_file, tmp_path):
    """A resumed run keeps what auto chose, to the bit, and says so; another number is no other run."""
    folder = tmp_path / "one"
    words = ("--run-file", str(run_file), f"folder={folder}", "batch.micro_sequences=auto")
    assert "micro-batch 8 x 64 tokens (auto: a rank's whole share of a step)" in finished(start(1, *words)).stdout
    two, one = losses(unbroken), losses(folder)
    assert [record[3] for record in one] == [record[3] for record in two]
    for ours, theirs in zip(one, two, strict=True):
        assert ours[1:3] == pytest.approx(theirs[1:3], rel=1e-4)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    assert "micro-batch 8 x 64 tokens (auto: as in the session before)" in finished(start(1, *words)).stdout
    assert losses(folder) == one
    sessions = json.loads((folder / "environment.json").read_text())["sessions"]
    assert [session["micro_sequences"] for session in sessions] == [{"detour": 8, "decay": 8}] * 2
    assert all(session["chosen_by_auto"].keys() == {"detour", "decay"} for session in sessions)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    changed = finished(start(1, *words[:-1], "batch.micro_sequences=2")).stdout
    assert "batch.micro_sequences was 'auto' and is 2" in changed and "micro-batch 2 x 64 tokens\n" in changed


def test_the_control_sees_the_same_documents(unbroken, run_file, tmp_path):
    finished(start(2, "--run-file", str(run_file), "--control", f"folder={tmp_path / 'twin'}"))
    records = read_metrics(tmp_path / "twin-control" / "metrics.jsonl")
    assert {record["objective"] for record in records[1:]} == {"mlm"}
    assert [record["data_crc"] for record in records[1:]] == [record[3] for record in losses(unbroken)]
    plan = json.loads((tmp_path / "twin-control" / "plan.json").read_text())
    assert [phase["mask_rate"] for phase in plan["phases"]] == [0.3, 0.15]


def test_a_killed_run_resumes_to_the_same_bits(unbroken, run_file, tmp_path):
    for attempt in itertools.count():
        folder = tmp_path / f"killed-{attempt}"
        arguments = ("--run-file", str(run_file), f"folder={folder}")
        process = subprocess.Popen(
            command(2, *arguments, launcher="deepspeed"),  # its ranks are of its process group; torchrun's are not
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        while not (folder / "checkpoints" / "step-00000002").exists() and process.poll() is None:
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left = [path.name for path in store.find_checkpoints(folder / "checkpoints")]
        assert "step-00000002" in left
        if "step-00000006" not in left:  # else it was done before the kill: once more
            break
    time.sleep(2)
    assert [path.name for path in store.find_checkpoints(folder / "checkpoints")] == left  # no orphan goes on
    assert "resuming from" in finished(start(2, *arguments)).stdout
    assert losses(folder) == losses(unbroken)
    for name in ("model.safetensors", "optimizer.safetensors"):
        final = Path("checkpoints") / "step-00000006" / name
        ours, theirs = load_file(folder / final), load_file(unbroken / final)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(json.loads((folder / "environment.json").read_text())["sessions"]) == 2
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.mark.parametrize("how", ["deepspeed", slow("bash"), slow("torchrun")])
def test_one_ctrl_c_in_a_terminal_saves_and_comes_back_when_all_have_ended(run_file, tmp_path, how):
    folder = tmp_path / "run"
    endless = ["phases.decay.tokens=100000 steps", "validation.corpora=[]", "checkpoint.every=null"]
    arguments = ["--run-file", str(run_file), f"folder={folder}", *endless]
    started = ["bash", str(SCRIPT), *arguments] if how == "bash" else command(2, *arguments, launcher=how)
    process, terminal = pty.fork()
    if not process:
        os.chdir(ROOT)
        os.execvpe(started[0], started, environment() | {"RANKS": "2", "DS_ACCELERATOR": "cpu"})
    output, asked, ranks = b"", False, []
    metrics = folder / "metrics.jsonl"
    with suppress(OSError):  # EIO: the last process has closed the terminal
        while True:
            if select.select([terminal], [], [], 0.05)[0]:
                output += os.read(terminal, 65536)
            if not asked and metrics.exists() and len(metrics.read_text().splitlines()) > 2:
                ranks = [p for p in psutil.Process(process).children(recursive=True) if p.environ().get("RANK")]
                os.write(terminal, b"\x03")
                asked = True
    _, status = os.waitpid(process, 0)
    left = [rank for rank in ranks if rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE]
    printed = output.decode(errors="replace")
    assert len(ranks) == 2 and not left, printed
    assert printed.count("stopped by Ctrl-C: saved; run the same command to resume") == 1, printed
    if how != "torchrun":  # which makes 1 of every status, and tells of it at length
        assert os.waitstatus_to_exitcode(status) == EXIT_INTERRUPTED, printed
        assert not [word for word in ("Traceback", "launcher has ended", "SIGTERM") if word in printed], printed
    (checkpoint,) = store.find_checkpoints(folder / "checkpoints")[-1:]
    assert store.step_of(checkpoint) == read_metrics(metrics)[-1]["step"]


WITHOUT_TORCH = """
import sys
from megatron_detour.errors import command_line
from megatron_detour.commands.main import main
def run():
    try:
        return main(["train", *sys.argv[1:]])
    finally:
        assert not {"torch", "deepspeed", "transformers"} & sys.modules.keys()
command_line(run)
"""


def start_without_torch(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("launch", [[], ["--launch"]])
def test_a_finished_run_says_so_before_anything_is_loaded(unbroken, run_file, launch):
    before = sorted(unbroken.rglob("*"))
    process = start_without_torch(str(run_file), *launch, f"folder={unbroken}")
    assert (process.returncode, process.stderr) == (0, "")
    assert f"this run is finished: {sum(STEPS)} steps" in process.stdout
    assert f"megatron-detour convert --checkpoint {unbroken}" in process.stdout
    assert sorted(unbroken.rglob("*")) == before


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.corpora.0.prefix=nowhere", "data.corpora: nowhere.manifest.json: no such corpus"),
        ("model.config.hiden_size=3", "model.config.hiden_size: "),
        ("phases.detour.freeze=[layers.7]", "the model has 3 layers"),
        ("deepspeed=nowhere.json", "deepspeed: "),
        ("phases.detour.objective=CLM", "did you mean 'clm'?"),
    ],
)
def test_faults_are_told_before_a_launcher_is_started(run_file, tmp_path, override, says):
    process = start_without_torch(str(run_file), "--launch", f"folder={tmp_path / 'run'}", override)
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("error: ") and says in process.stderr and len(process.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_changed_corpus_is_not_resumed(unbroken, run_file, corpus, tmp_path):
    prefix = tmp_path / "corpus"
    for kind in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{corpus.prefix}.{kind}", f"{prefix}.{kind}")
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(store.checkpoint_folder(tmp_path / "run" / "checkpoints", 6))
    for file in (tmp_path / "run" / "run.yaml", *(tmp_path / "run" / "checkpoints").glob("*/run_state.json")):
        file.write_text(file.read_text().replace(corpus.prefix, str(prefix)))
    for folder in store.find_checkpoints(tmp_path / "run" / "checkpoints"):
        listing = json.loads((folder / store.LISTING).read_text())
        listing["run_state.json"] = file_facts(folder / "run_state.json")
        (folder / store.LISTING).write_text(json.dumps(listing))
    manifest = json.loads(Path(f"{prefix}.manifest.json").read_text())
    manifest["files"]["bin"]["sha256"] = "0" * 64
    Path(f"{prefix}.manifest.json").write_text(json.dumps(manifest))
    arguments = (f"folder={tmp_path / 'run'}", f"data.corpora.0.prefix={prefix}")
    result = start(1, "--run-file", str(run_file), *arguments)
    assert result.returncode == 1
    assert "the corpus has changed since" in result.stderr


@pytest.mark.parametrize(("ranks", "tensor"), [(1, 1), slow(2, 2)])
def test_a_damaged_checkpoint_is_passed_over_and_another_split_resumes(unbroken, run_file, tmp_path, ranks, tensor):
    folder = tmp_path / "run"
    shutil.copytree(unbroken, folder)
    weights = folder / "checkpoints" / "step-00000006" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    result = finished(start(ranks, "--run-file", str(run_file), f"folder={folder}", f"parallel.tensor={tensor}"))
    assert "skipping " in result.stdout and "step-00000006: " in result.stdout
    assert "resuming from" in result.stdout and "step-00000005" in result.stdout
    for ours, theirs in zip(losses(folder), losses(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    "more",
    [
        slow([], id="plain"),
        pytest.param(["parallel.sequence=true", "compute.recompute=selective"], id="more"),
    ],
)
def test_tensor_parallel_ranks_train_the_same_model(unbroken, run_file, tmp_path, more):
    finished(start(2, "--run-file", str(run_file), f"folder={tmp_path / 'tp'}", "parallel.tensor=2", *more))
    session = json.loads((tmp_path / "tp" / "environment.json").read_text())["sessions"][0]
    assert (session["attention"], session["kernels"]) == ("sdpa", "plain")
    assert session["recompute"] == ("selective" if more else "none")
    for ours, theirs in zip(losses(tmp_path / "tp"), losses(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_start_model_is_continued(unbroken, run_file, tmp_path):
    start_model = tmp_path / "start"
    export(str(unbroken), str(start_model), "fp32")
    arguments = ("model.config=null", "model.tokenizer=null", f"model.start={start_model}", f"folder={tmp_path / 'on'}")
    finished(start(1, "--run-file", str(run_file), *arguments))
    first, last = read_metrics(tmp_path / "on" / "metrics.jsonl")[0], read_metrics(unbroken / "metrics.jsonl")[-1]
    assert first["val_mlm_loss"] == pytest.approx(last["val_mlm_loss"], rel=1e-5)


def refused(run_file: Path, *arguments: str) -> str:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "--run-file", str(run_file), *arguments],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def test_what_cannot_be_run_is_told_in_one_sentence(unbroken, run_file, tmp_path, tokenizer_folder):
    from megatron_detour.corpus.train_tokenizer import train_tokenizer
    from tests.conftest import write_jsonl

    new = f"folder={tmp_path / 'new'}"
    printed = refused(run_file, new, "bacth.sequences=3")
    assert "bacth" in printed and "'batch'" in printed
    assert "phases.0.tokens" in refused(run_file, new, "phases.detour.tokens=0")
    printed = refused(run_file, f"folder={unbroken}", "seed=18")
    assert "another run" in printed and "seed is 17 there and 18 here" in printed
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    printed = refused(run_file, new, "model.config=null", f"model.start={tmp_path / 't5'}")
    assert "model_type 't5' is not supported" in printed
    assert "megatron-detour preprocess" in refused(run_file, new, "data.corpora.0.prefix=nowhere/corpus")
    texts = write_jsonl(tmp_path / "other.jsonl", [f"quite another text, number {i}" for i in range(500)])
    train_tokenizer([texts], tmp_path / "other", 300)
    assert "another tokenizer" in refused(run_file, new, f"model.tokenizer={tmp_path / 'other'}")
    assert "does not divide the number of ranks, 1" in refused(run_file, new, "parallel.tensor=2")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("launcher", ["deepspeed", slow("torchrun")])
def test_two_ranks_tell_a_fault_once(run_file, tmp_path, launcher):
    arguments = ("--run-file", str(run_file), f"folder={tmp_path / 'new'}", "data.corpora.0.prefix=nowhere/corpus")
    result = start(2, *arguments, launcher=launcher)
    assert result.returncode != 0
    printed = [line for line in (result.stdout + result.stderr).splitlines() if "no such corpus" in line]
    assert len(printed) == 1
    assert not (tmp_path / "new").exists()


def test_the_large_recipe_runs_at_a_tiny_size(corpus, tmp_path):
    overrides = [
        "model.start=null",
        f"model.tokenizer={corpus.tokenizer}",
        "model.config={hidden_size: 32, intermediate_size: 48, num_hidden_layers: 3, num_attention_heads: 2}",
        "data.sequence_length=128",
        f"data.corpora=[{{prefix: {corpus.prefix}}}]",
        f"validation.corpora=[{{prefix: {corpus.prefix}}}]",
        "validation.sequences=2",
        "batch={sequences: 4, micro_sequences: 1}",
        "phases.detour.tokens=3 steps",
        "phases.detour.learning_rate.warmup=1 step",
        "phases.decay.tokens=3 steps",
        f"folder={tmp_path / 'large'}",
    ]
    result = finished(start(2, *overrides, launcher="deepspeed"))
    assert "3 + 3 = 6 steps" in result.stdout
    records = read_metrics(tmp_path / "large" / "metrics.jsonl")[1:]
    assert [record["phase"] for record in records] == ["detour"] * 3 + ["decay"] * 3
    assert [record["lr"] for record in records[:3]] == [2e-4] * 3
    assert records[-1]["lr"] == pytest.approx(2e-5)


@pytest.mark.parametrize("way", [["bash"], []])
def test_the_example_runs_as_a_shell_script(way, run_file):
    result = subprocess.run(
        [*way, str(SCRIPT), "--plan"],
        env=environment() | {"RANKS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "15,895 + 1,590 = 17,485 steps, 55,003,054,080 tokens" in result.stdout


def test_the_example_is_valid_bash_and_python():
    for script in sorted((ROOT / "examples").glob("*.sh")):
        subprocess.run(["bash", "-n", str(script)], check=True)
        if script.name.startswith("pretrain"):
            compile(script.read_text(), str(script), "exec")


@pytest.mark.slow
def test_compiled_layers_train_the_same_model_and_resume_to_the_bit(unbroken, run_file, tmp_path):
    """Across the switch of the objective and to frozen layers. A session compiles for another first micro-batch."""
    folder, again = tmp_path / "whole", tmp_path / "again"
    arguments = ("--run-file", str(run_file), "compute.compile=true", "checkpoint.keep=9")
    result = start(1, *arguments, f"folder={folder}")
    if not has_compiler():
        assert result.returncode == 1 and "compute.compile: a layer cannot be compiled" in result.stderr
        return
    finished(result)
    for ours, theirs in zip(losses(folder), losses(unbroken), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert json.loads((folder / "environment.json").read_text())["sessions"][0]["compile"] is True
    shutil.copytree(folder, again)
    for step in range(3, 7):
        shutil.rmtree(store.checkpoint_folder(again / "checkpoints", step))
    finished(start(1, *arguments, f"folder={again}"))
    weights = [
        load_file(store.checkpoint_folder(run / "checkpoints", 6) / "model.safetensors") for run in (folder, again)
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert losses(folder) == losses(again)
