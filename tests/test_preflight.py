"""Every refusal that can be known before a run starts: plan, the check before the launcher and the start itself say it
in the same sentence."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_detour.commands.main import main
from megatron_detour.config import load
from megatron_detour.errors import DetourError, format_faults
from megatron_detour.plan import Plan
from megatron_detour.preflight import preflight
from megatron_detour.training.trainer import run_training

Run = dict[str, Any]  # a run file's content


def edit(path: Path | str, **changes: Any) -> None:
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def model(run: Run) -> Path:
    return Path(run["model"]["start"])


def fresh(run: Run, **config: Any) -> None:
    """A model of tiny sizes initialized from the seed."""
    tokenizer = str(model(run) / "tokenizer.json")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    run["model"] = {"config": sizes | config, "tokenizer": tokenizer}


def deepspeed(run: Run, content: Any) -> None:
    path = Path(run["folder"]).parent / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    run["deepspeed"] = str(path)


def copied(run: Run) -> str:
    """The prefix of a copy of the corpus, which the phases then read."""
    prefix = f"{Path(run['folder']).parent}/copy"
    for kind in ("bin", "idx", "manifest.json"):
        shutil.copyfile(f"{run['data']['corpora'][0]['prefix']}.{kind}", f"{prefix}.{kind}")
    run["data"]["corpora"] = [{"prefix": prefix}]
    return prefix


def write_over(path: str, place: int, content: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(place)
        file.write(content)


def word_level(run: Run) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[MASK]": 1, "[UNK]": 2, "a": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(f"{model(run)}/tokenizer.json")
    edit(f"{model(run)}/config.json", vocab_size=301)
    run["phases"][1]["whole_word_masking"] = True


def without_mask(run: Run) -> None:
    path = model(run) / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[HIDE]").replace("[PAD]", "[FILL]"))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (model(run) / name).unlink(missing_ok=True)


def another_run(run: Run) -> None:
    folder = Path(run["folder"])
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


def of_phase(number: int, **keys: Any) -> Callable[[Run], None]:
    return lambda run: run["phases"][number].update(keys)


ZERO2 = {"zero_optimization": {"stage": 2}}
ALL = ["embeddings", "final_norm", "head", "layers.0-4"]
OTHER = r"data\.corpora: \S+: built with another tokenizer \(sha256 .*, 400 ids\) than the run's .*; build it again"
REFUSALS: dict[str, tuple[Callable[[Run], Any], str | list[str]]] = {  # what is wrong -> sentences
    "no model": (
        lambda r: r["model"].update(start="/nowhere"),
        r"model\.start: /nowhere: no such model file or folder",
    ),
    "no weights": (
        lambda r: (model(r) / "model.safetensors").unlink(),
        r"model\.start: \S+: the folder has no model\.s",
    ),
    "weights of other sizes": (
        lambda r: edit(model(r) / "config.json", intermediate_size=64),
        r"model\.start: .*Wi\.weight has size \(96, 32\), but config.json implies \(128, 32\)",
    ),
    "weights that are cut": (
        lambda r: (model(r) / "model.safetensors").write_bytes(b"x"),
        r"model\.start: \S+: not a safetensors file, or truncated; download",
    ),
    "another kind of model": (
        lambda r: edit(model(r) / "config.json", model_type="t5"),
        r"model\.start: \S+: model_type 't5' is not supported; known: bert, ",
    ),
    "an output layer of its own": (
        lambda r: edit(model(r) / "config.json", tie_word_embeddings=False),
        r"model\.start: \S+: tie_word_embeddings is False; only ModernBERTs with True are supported",
    ),
    "biases that the weights lack": (
        lambda r: edit(model(r) / "config.json", norm_bias=True),
        r"model\.start: \S+: the weights have no model\.embeddings\.norm\.bias",
    ),
    "an unknown key of a shape": (
        lambda r: fresh(r, hiden_size=64),
        r"model\.config\.hiden_size: .* has no such key \(did you mean 'hidden_size'\?\)",
    ),
    "a wrong size of a shape": (
        lambda r: fresh(r, hidden_size="a"),
        r"model\.config: hidden_size must be an integer from 1 to .*, not \"a\"",
    ),
    "what transformers rejects": (lambda r: fresh(r, classifier_pooling="x"), r"model\.config: .*classifier_pooling"),
    "a value of another type": (lambda r: fresh(r, norm_eps=1), r"model\.config: .*norm_eps"),
    "heads of an odd size": (lambda r: fresh(r, hidden_size=33), r"model\.config: hidden_size 33 cannot be split into"),
    "too small an embedding": (
        lambda r: fresh(r, vocab_size=100),
        r"model\.tokenizer: .* has 400 ids, the model's emb",
    ),
    "no tokenizer": (
        lambda r: (model(r) / "tokenizer.json").unlink(),
        r"model\.start: \S+: no tokenizer.json in this folder",
    ),
    "a tokenizer that is not the model's": (
        lambda r: (
            (Path(r["folder"]).parent / "t.json").write_bytes((model(r) / "tokenizer.json").read_bytes()),
            edit(Path(r["folder"]).parent / "t.json", normalizer=None),
            r["model"].update(tokenizer=str(Path(r["folder"]).parent / "t.json")),
        ),
        [
            r"model\.tokenizer: \S+ is not the tokenizer that \S+ was trained with, .*: its normalizer differs; rem",
            OTHER,
        ],
    ),
    "no mask token": (
        without_mask,
        [r"model\.start: \S+: the tokenizer has no mask token and no pad token, which training requires; name", OTHER],
    ),
    "whole words of a word-level tokenizer": (
        word_level,
        [
            r"whole_word_masking, entities: .*model type WordLevel",
            r"model\.start: .*but config.json implies \(301, 32\)",
            OTHER,
        ],
    ),
    "entities that are not there": (
        of_phase(1, entities="/nowhere.txt"),
        r"phases\.decay\.entities: /nowhere\.txt: cannot be read: No such file or directory",
    ),
    "no entities": (
        lambda r: (
            (Path(r["folder"]).parent / "words.txt").write_text("\n  \n"),
            of_phase(1, entities=str(Path(r["folder"]).parent / "words.txt"))(r),
        ),
        r"phases\.decay\.entities: \S+words\.txt: no words that the tokenizer knows; write one word or phrase per line",
    ),
    "longer than the positions": (
        lambda r: r["data"].update(sequence_length=512),
        r"data\.sequence_length: 512 exceeds the model's 256 positions; set it to 256 or less",
    ),
    "a phase longer than the positions": (
        of_phase(1, sequence_length=512),
        r"phases\.decay\.sequence_length: 512 exceeds the model's 256 positions",
    ),
    "frozen layers that are not there": (
        of_phase(0, freeze=["layers.3-9"]),
        r"phases\.detour\.freeze: 'layers\.3-9': the model has 5 layers, 0 to 4",
    ),
    "a norm that the family does not have": (
        lambda r: (fresh(r, model_type="bert"), r["phases"][0].update(freeze=["final_norm", "layers.0"])),
        r"phases\.detour\.freeze: 'final_norm': this BERT has no such part; its parts are embeddings, head and layers",
    ),
    "a head that is the embedding": (
        lambda r: (
            fresh(r, model_type="eurobert", tie_word_embeddings=True, num_key_value_heads=1),
            r["phases"][0].update(freeze=["head"]),
        ),
        r"phases\.detour\.freeze: 'head': this EuroBERT has no such part; its parts are embeddings, final_norm and la",
    ),
    "nothing left to train": (of_phase(0, freeze=ALL), r"phases\.detour\.freeze: the whole model is frozen; train"),
    "heads that do not divide": (
        lambda r: (fresh(r, intermediate_size=50, num_attention_heads=4), r.update(parallel={"tensor": 4})),
        r"parallel\.tensor: 4 does not divide the model's intermediate size, 50; possible: 1, 2",
    ),
    "a vocabulary that is too small": (
        lambda r: (
            fresh(r, hidden_size=64, intermediate_size=64, num_attention_heads=32),
            r.update(parallel={"tensor": 32}),
        ),
        r"parallel\.tensor: 32 is too large for a vocabulary of 400; set 1",
    ),
    "no DeepSpeed file": (lambda r: r.update(deepspeed="no.json"), r"deepspeed: no\.json: no such file"),
    "a DeepSpeed file that is no JSON": (lambda r: deepspeed(r, "no JSON"), r"deepspeed: \S+"),
    "a DeepSpeed file that is a list": (lambda r: deepspeed(r, []), r"deepspeed: \S+"),
    "ZeRO-3": (
        lambda r: deepspeed(r, {"zero_optimization": {"stage": 3}}),
        r"\S+ zero_optimization\.stage is 3; set 2",
    ),
    "a key that the run file has": (
        lambda r: deepspeed(r, {"zero_optimization": {"stage": 2}, "train_batch_size": 8}),
        r"\S+ remove train_batch_size; batch\.sequences",
    ),
    "overlapping sums": (
        lambda r: deepspeed(r, {"zero_optimization": {"stage": 2, "overlap_comm": True}}),
        r"\S+ remove zero_optimization\.overlap_comm",
    ),
    "fp16": (
        lambda r: deepspeed(r, {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}),
        r"\S+ fp16 is not supported; use bf16 or fp32",
    ),
    "a key that DeepSpeed does not have": (
        lambda r: deepspeed(r, {"zero_optimization": {"stage": 2, "stagee": 2}}),
        r"\S+ DeepSpeed rejects it: ValidationError: .*stagee",
    ),
    "a value that DeepSpeed refuses": (
        lambda r: deepspeed(r, ZERO2 | {"bf16": {"enabled": True, "immediate_grad_update": "x"}}),
        r"\S+ DeepSpeed rejects it: .*immediate_grad_update",
    ),
    "no section where DeepSpeed has one": (
        lambda r: deepspeed(r, ZERO2 | {"flops_profiler": 3}),
        r"\S+ DeepSpeed rejects it: AttributeError",
    ),
    "an empty section": (
        lambda r: deepspeed(r, ZERO2 | {"tensorboard": None}),
        r"\S+ DeepSpeed rejects it: .*tensorboard",
    ),
    "flash attention in fp32": (
        lambda r: (deepspeed(r, ZERO2), r.update(compute={"attention": "flash2"})),
        r"compute\.attention: flash2 requires a GPU and bf16; use auto or sdpa",
    ),
    "no corpus": (
        lambda r: r["data"].update(corpora=[{"prefix": "nowhere"}]),
        r"data\.corpora: nowhere\.manifest\.json: ",
    ),
    "no corpus of a phase": (
        of_phase(0, corpora=[{"prefix": "no"}]),
        r"phases\.detour\.corpora: no\.manifest\.json: no such corpus",
    ),
    "no held-out corpus": (
        lambda r: r["validation"].update(corpora=[{"prefix": "no"}]),
        r"validation\.corpora: no\.manifest\.json: no such corpus; build it",
    ),
    "a corpus of another tokenizer": (lambda r: edit(model(r) / "tokenizer.json", normalizer=None), OTHER),
    "a corpus without its text": (
        lambda r: Path(f"{copied(r)}.bin").unlink(),
        r"data\.corpora: \S+\.bin: missing; rebuild",
    ),
    "a corpus that is cut": (
        lambda r: Path(f"{copied(r)}.idx").write_bytes(b"MMIDIDX"),
        r"data\.corpora: \S+\.idx: 7 bytes instead of 6,042",
    ),
    "an index of another format": (
        lambda r: write_over(f"{copied(r)}.idx", 0, b"nonsense"),
        r"data\.corpora: \S+\.idx: not an index in Megatron's format, version 1",
    ),
    "an index that has changed": (
        lambda r: write_over(f"{copied(r)}.idx", 34, struct.pack("<i", 5)),
        r"data\.corpora: \S+\.idx: does not match the manifest, so it has changed",
    ),
    "text that has changed": (
        lambda r: write_over(f"{copied(r)}.bin", 0, b"\7\0\7\0"),
        r"data\.corpora: \S+\.bin: does not match the manifest",
    ),
    "a folder of something else": (another_run, r"\S+/run: contains files but no run; choose another folder"),
}


@pytest.mark.parametrize("wrong", REFUSALS)
def test_plan_and_start_refuse_with_the_same_sentence(good_run, write_run, capsys, monkeypatch, wrong):
    spoil, expected = REFUSALS[wrong]
    spoil(good_run)
    faults = refused_everywhere(write_run(good_run), capsys, monkeypatch)
    patterns = [expected] if isinstance(expected, str) else expected
    assert len(faults) == len(patterns), faults
    for fault, pattern in zip(faults, patterns, strict=True):
        assert re.match(pattern, fault), fault


def refused_everywhere(path: str, capsys, monkeypatch, *flags: str) -> list[str]:
    """The faults of a run file, which plan, the early check and the start say in the same words."""
    assert main(["plan", path, "--json", *flags]) == 1
    faults = json.loads(capsys.readouterr().out)["faults"]
    assert main(["plan", path, *flags]) == 1
    out = capsys.readouterr().out
    assert all(f"fault: {fault}" in out for fault in faults)

    config = load(path)
    plan = Plan.from_config(config)
    monkeypatch.setenv("WORLD_SIZE", str(config.parallel.tensor))
    before_the_launcher = lambda: preflight(config, plan, gpu=False if flags else None).refuse()  # noqa: E731
    start = lambda: run_training(config, plan, Path(config.folder), preemption=None)  # noqa: E731
    for refuses in (before_the_launcher, start):
        with pytest.raises(DetourError) as refusal:
            refuses()
        assert str(refusal.value) == format_faults(faults)
    return faults


def test_kernels_that_need_a_gpu_where_there_is_none(good_run, write_run, capsys, monkeypatch):
    path = write_run(good_run | {"compute": {"attention": "flash3", "kernels": "triton"}})
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert refused_everywhere(path, capsys, monkeypatch, "--gpu", "cpu") == [
        "compute.attention: flash3 requires a GPU and bf16; use auto or sdpa",
        "compute.kernels: triton requires a GPU; use auto or plain",
    ]
    assert main(["plan", path]) == 0  # for a machine that may have GPUs


def test_a_disk_without_room_for_a_checkpoint(good_run, write_run, capsys, monkeypatch):
    monkeypatch.setattr("megatron_detour.run_directory.free_bytes", lambda folder: 10**7)
    path, folder = write_run(good_run), good_run["folder"]
    (fault,) = refused_everywhere(path, capsys, monkeypatch)
    assert re.match(rf"{folder}: the disk has 0\.01 GB left and a checkpoint takes 0\.07 GB; free some space", fault)
    for left in (".step-00000004.writing-host-1", "step-00000010"):  # what a start removes; and the last checkpoint
        Path(folder, "checkpoints", left).mkdir(parents=True)
        with Path(folder, "checkpoints", left, "model").open("wb") as file:
            file.truncate(10**8)
        found = preflight(load(path), Plan.from_config(load(path)))
        assert not any("the disk has" in fault for fault in found.faults)
        shutil.rmtree(Path(folder, "checkpoints", left))


def test_nothing_is_wrong_with_a_good_run(good_run, write_run):
    config = load(write_run(good_run))
    found = preflight(config, Plan.from_config(config), 3)
    assert found.refuse() is found
    assert (found.shape.layers, found.vocabulary.size, found.words) == (5, 400, None)
    assert found.deepspeed["bf16"]["enabled"]


def test_ranks_have_to_fill_tensor_parallel_groups(good_run, write_run, capsys, monkeypatch):
    path = write_run(good_run | {"parallel": {"tensor": 2}})
    assert main(["plan", path, "--gpus", "3", "--json"]) == 1
    (fault,) = json.loads(capsys.readouterr().out)["faults"]
    assert fault.startswith("parallel.tensor: 2 does not divide the number of ranks, 3; start a multiple of 2 ranks (")
    config = load(path)
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(DetourError) as refusal:
        run_training(config, Plan.from_config(config), Path(config.folder), preemption=None)
    assert str(refusal.value) == fault


def test_libraries_that_are_missing(good_run, write_run, monkeypatch):
    absent, find = ("wandb", "tensorboard"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else find(name))
    config = load(write_run(good_run | {"wandb": {"project": "p"}}))
    assert preflight(config, Plan.from_config(config)).faults == tuple(
        f"{package}: the package {package} is not installed: pip install {package}, or set {package}: {off}"
        for package, off in (("tensorboard", "false"), ("wandb", "null"))
    )


def test_only_the_process_that_owns_the_folder_answers_for_it(good_run, write_run):
    another_run(good_run)
    config = load(write_run(good_run))
    assert len(preflight(config, Plan.from_config(config)).faults) == 1
    assert preflight(config, Plan.from_config(config), owns_folder=False).faults == ()
