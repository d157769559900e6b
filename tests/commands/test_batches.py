"""`megatron-detour batches` shows and writes what training reads, bit for bit."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_detour.commands.main import main
from megatron_detour.data.batches import split
from megatron_detour.errors import DetourError
from megatron_detour.objectives import IGNORE
from tests.harness import run_ranks

STEPS = 6
NAMES = ("input_ids", "labels", "document_lengths", "sequence_numbers")


@pytest.fixture(scope="module")
def run_file(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("batches")
    decay = {"name": "decay", "objective": "mlm", "mask_rate": 0.3, "whole_word_masking": True}
    rates = {"tokens": "2 steps", "learning_rate": {"peak": 1e-3}}
    content = {
        "name": "batches",
        "folder": str(folder / "run"),
        "model": {
            "config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
            "tokenizer": str(corpus.tokenizer),
        },
        "data": {"corpora": [{"prefix": corpus.prefix}], "sequence_length": 64},
        "batch": {"sequences": 8, "micro_sequences": 2},
        "phases": [
            {"name": "detour", "objective": "clm"} | rates,
            decay | rates,
            {"name": "both", "objective": "hybrid", "mask_rate": 0.3} | rates,
        ],
        "deepspeed": "ds_configs/zero2_fp32_cpu.json",
        "tensorboard": False,
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


def train_and_record(run_file: str, folder: str) -> list[list[tuple[bytes, bytes]]]:
    """On a rank: trains, and returns each step's documents as the model was given them, with their labels."""
    from megatron_detour.training import trainer

    honest, steps = trainer.rank_batch, []

    def rank_batch(*arguments):
        batch = honest(*arguments)
        documents = []
        for micro in batch.micro_batches:
            labels = np.full(len(micro.input_ids), IGNORE)
            labels[micro.labeled.numpy()] = micro.labels.numpy()
            documents += _documents(micro.input_ids.numpy(), labels, np.array(micro.lengths))
        steps.append(documents)
        return batch

    trainer.rank_batch = rank_batch
    assert main(["train", run_file, f"folder={folder}"]) == 0
    return steps


def _documents(ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray) -> list[tuple[bytes, bytes]]:
    parts = zip(split(ids, lengths), split(labels, lengths), strict=True)
    return [(some.astype(np.int64).tobytes(), theirs.astype(np.int64).tobytes()) for some, theirs in parts]


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_arrays_are_what_training_reads(run_file, tmp_path, ranks):
    function = "tests.commands.test_batches:train_and_record"
    recorded = run_ranks(ranks, function, tmp_path / "ranks", str(run_file), str(tmp_path / "run"))
    main(["batches", str(run_file), "--steps", f"1-{STEPS}", "--output", str(tmp_path / "b.npz")])
    with np.load(tmp_path / "b.npz") as written:
        assert len(written.files) == STEPS * len(NAMES)
        for step in range(STEPS):
            ids, labels, lengths, numbers = (written[f"step-{step + 1:08d}/{name}"] for name in NAMES)
            assert {ids.dtype, labels.dtype, lengths.dtype, numbers.dtype} == {np.dtype(np.int64)}
            assert len(ids) == len(labels) == lengths.sum() and len(set(numbers.tolist())) == len(lengths)
            trained = [document for rank in recorded for document in rank[step]]
            assert sorted(trained) == sorted(_documents(ids, labels, lengths))


def test_the_text_is_shown_with_its_masks(run_file, capsys):
    assert main(["batches", str(run_file), "--steps", "0-3", "--documents", "2"]) == 0
    out = capsys.readouterr().out
    assert main(["batches", str(run_file), "--steps", "6", "--documents", "100"]) == 0
    hybrid = capsys.readouterr().out
    causal = int(re.search(r"phase both \(Hybrid\), (\d+) causal: ", hybrid)[1])
    assert sum("|" not in document for document in hybrid.split("--- document ")[1:]) == causal > 0
    assert out.startswith("step 0 is the state before training")
    causal, masked = out.partition("step 2 ")[0], out.partition("step 3 ")[2]
    assert "phase detour (CLM), causal" in causal and "phase decay (MLM), bidirectional" in masked
    assert causal.count("--- document ") == masked.count("--- document ") == 2
    assert "<[MASK]|" in masked and "|" not in causal


def test_arrays_are_written_whole_or_not_at_all(run_file, tmp_path, monkeypatch):
    from megatron_detour.commands import batches

    output = tmp_path / "b.npz"
    words = ["batches", str(run_file), "--steps", "1-2", "--output", str(output)]

    def broken(source, step):
        raise DetourError("the corpus is gone")

    with monkeypatch.context() as patch:
        patch.setattr(batches.Source, "read", broken)
        with pytest.raises(DetourError, match="gone"):
            main(words)
    assert not [path for path in tmp_path.iterdir() if "b.npz" in path.name]
    assert main(words) == 0
    with pytest.raises(FileExistsError):
        main(words)


@pytest.mark.parametrize(
    ("steps", "says"),
    [("7", "7 is past the run's last step, 6"), ("3-1", "a range such as 1-12"), ("x", "a range such as 1-12")],
)
def test_steps_that_are_not_there(run_file, steps, says):
    with pytest.raises(DetourError, match=says):
        main(["batches", str(run_file), "--steps", steps])
