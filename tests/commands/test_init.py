"""`megatron-detour init` leads from texts to a trained model by the commands that it prints, with no edit."""

from __future__ import annotations

import json
import random
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from safetensors.torch import save_file

from megatron_detour.commands.main import main
from megatron_detour.config import load, recipes
from megatron_detour.errors import DetourError
from megatron_detour.tokenizer.vocabulary import load_vocabulary
from tests.conftest import sentences
from tests.harness import environment
from tests.models import CONFIG, tiny


@pytest.fixture(scope="module")
def model(tokenizer_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("init") / "tiny"
    shutil.copytree(tokenizer_folder, folder)
    size = load_vocabulary(tokenizer_folder).size
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": size}))
    weights = {name: parameter.detach() for name, parameter in tiny(vocab_size=size).named_parameters()}
    save_file(weights, folder / "model.safetensors")
    return folder


def call(folder: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_detour", *words],
        env=environment() | {"CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


def commands_in(printed: str) -> list[list[str]]:
    lines = printed.partition("next:\n")[2].splitlines()
    commands = [shlex.split(line) for line in lines]
    assert [words[0] for words in commands] == ["megatron-detour"] * 3
    return [words[1:] for words in commands]


def texts(count: int = 30) -> list[str]:
    rng = random.Random(7)
    return [sentences(rng, 2) for _ in range(count)]


def folder_of_text_files(folder: Path) -> str:
    (folder / "notes").mkdir()
    for number, text in enumerate(texts()):
        (folder / "notes" / f"{number:03}.txt").write_text(text)
    return "notes"


def parquet_file(folder: Path) -> str:
    table = pyarrow.table({"id": [f"n{i}" for i in range(30)], "report": texts()})
    pyarrow.parquet.write_table(table, folder / "notes.parquet")
    return "notes.parquet"


@pytest.mark.integration
@pytest.mark.parametrize("write", [folder_of_text_files, parquet_file])
def test_the_printed_commands_train_a_model(write, model, tmp_path):
    printed = call(tmp_path, "init", "--texts", write(tmp_path), "--model", str(model), "--gpus", "0")
    build, plan, train = commands_in(printed)
    assert (build[0], plan[0], train[0]) == ("preprocess", "plan", "train")
    assert "held out: " in call(tmp_path, *build)
    assert "nothing here would stop the run" in call(tmp_path, *plan)
    assert "model    runs/notes/checkpoints/step-" in call(tmp_path, *train)
    first = (tmp_path / "notes.yaml").read_text().splitlines()[0]
    assert first.startswith("# yaml-language-server: $schema=")
    subprocess.run(["bash", "-n", "notes.sbatch"], cwd=tmp_path, check=True)


def test_a_built_corpus_is_taken_as_it_is(model, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["init", "--texts", corpus.prefix, "--model", str(model), "--gpus", "0", "--name", "run", "--yes"]
    main([*words, "--account", "abc@v100", "--partition", "gpu"])
    build, *_ = commands_in(capsys.readouterr().out)
    assert build == ["preprocess", "verify", corpus.prefix]
    config = load("run.yaml")
    assert config.data.corpora[0].prefix == corpus.prefix and not config.validation.corpora
    script = Path("run.sbatch").read_text()
    assert "#SBATCH --account=abc@v100\n" in script and "#SBATCH --partition=gpu\n" in script
    with pytest.raises(DetourError, match=r"run\.yaml: already exists"):
        main(words)


def test_gpus_get_auto_and_no_more_recomputation_than_they_need(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ["init", "--texts", corpus.prefix, "--model", "answerdotai/ModernBERT-base", "--tokens", "11B", "--yes"]
    recompute = {}
    for memory in ("6", "80"):
        main([*base, "--gpus", "4", "--gpu", "h100", "--gpu-memory", memory, "--name", f"m{memory}"])
        config = load(f"m{memory}.yaml")
        assert config.deepspeed == "ds_configs/zero2_bf16.json" and config.model.download
        assert (config.phases[0].tokens, config.phases[1].tokens) == (10 * 10**9, 10**9)
        assert config.batch.sequences == 384
        assert config.batch.micro_sequences == "auto"
        recompute[memory] = config.compute.recompute
        assert commands_in(capsys.readouterr().out)[2][-1] == "--launch"
    assert recompute["80"] == "none" != recompute["6"]
    for words, says in (
        (["--tokens", "1,5B"], "--tokens: must be an amount of tokens such as"),
        (["--time", "3x"], "--time: must be a time such as"),
    ):
        with pytest.raises(DetourError, match=says):
            main([*base, *words])
    with pytest.raises(DetourError, match="--gpus: 4 cannot be divided evenly among 3 nodes"):
        main([*base, "--gpus", "4", "--nodes", "3"])


def test_without_texts_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DetourError, match="--texts: give the texts"):
        main(["init", "--yes"])
    with pytest.raises(DetourError, match="nowhere"):
        main(["init", "--texts", "nowhere", "--model", "answerdotai/ModernBERT-base", "--gpus", "0", "--yes"])
    assert not list(tmp_path.iterdir())


def test_recipes_are_listed(capsys):
    main(["init", "--list"])
    assert capsys.readouterr().out.split() == recipes()
