"""What a run's folder holds decides whether a start goes on, begins anew or is refused, never in a traceback."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_detour.checkpoint import store
from megatron_detour.config import RunConfig, from_dict
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.model.families import read_shape
from megatron_detour.optimizers import Lion
from megatron_detour.plan import Plan
from megatron_detour.run_directory import (
    add_session,
    changed_settings,
    claim,
    is_finished,
    newest_checkpoint,
    note,
    refuse_another_run,
    stand_in,
    start_hash,
)
from megatron_detour.training.checkpoints import RUN_STATE_FORMAT, _read_state, refuse_another_shape
from megatron_detour.training.guards import Guard
from tests.harness import ROOT
from tests.release.made import PHASES, SIZES, tiny_config

END = 6
WRONG = ["", "{", "[]", "null", "3", '"text"', "[" * 100_000, '{"a": 1, "a": 2}', b"\xff\xfe"]


@pytest.fixture
def config(corpus, tmp_path) -> RunConfig:
    for kind in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{corpus.prefix}.{kind}", tmp_path / f"corpus.{kind}")
    shutil.copytree(corpus.tokenizer, tmp_path / "tokenizer")
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text("{}")
    (tmp_path / "start" / "model.safetensors").write_bytes(b"weights")
    shutil.copy(ROOT / "ds_configs" / "zero2_bf16.json", tmp_path / "deepspeed.json")
    (tmp_path / "words.txt").write_text("metformin\n")
    phases = [PHASES[0], PHASES[1] | {"entities": str(tmp_path / "words.txt")}]
    return from_dict(
        {
            "name": "tiny",
            "folder": str(tmp_path / "run"),
            "model": {"start": str(tmp_path / "start"), "tokenizer": str(tmp_path / "tokenizer")},
            "data": {"corpora": [{"prefix": str(tmp_path / "corpus")}], "sequence_length": 64},
            "batch": {"sequences": 8},
            "phases": phases,
            "deepspeed": str(tmp_path / "deepspeed.json"),
        }
    )


@pytest.fixture
def run(config) -> Path:
    """The folder of a run that has saved steps 0, 4 and 6, and has come to its end."""
    folder, plan = Path(config.folder), Plan.from_config(config)
    folder.mkdir()
    claim(folder, config, plan)
    add_session(folder, {"step": 0}, {})
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in range(END + 1)))
    for step in (0, 4, END):
        save(folder, config, plan.step(step).tokens if step else 0, step)
        note(folder, saved=step)
    note(folder, ended="finished")
    return folder


def save(folder: Path, config: RunConfig, tokens: int, step: int) -> None:
    corpora = {c.prefix: read_manifest(c.prefix).files["bin"]["sha256"] for c in config.data.corpora}
    state = {"format": RUN_STATE_FORMAT, "step": step, "tokens": tokens, "guard": Guard(config.guards).to_dict()}
    state |= {"corpora": corpora, "start": start_hash(config.model.start)}
    files = {phase.objective.entities for phase in config.phases} - {None}
    state["entities"] = {file: store.file_facts(Path(file))["sha256"] for file in files}

    def write(aside: Path) -> None:
        (aside / "run_state.json").write_text(json.dumps(state))
        (aside / "weights").write_text(str(step))
        shutil.copy(Path(config.model.tokenizer) / "tokenizer.json", aside)

    store.publish(store.checkpoint_folder(folder / "checkpoints", step), write)


def again(config: RunConfig, **changes: Any) -> RunConfig:
    return dataclasses.replace(config, **changes)


def break_checkpoint(folder: Path, step: int) -> None:
    (store.checkpoint_folder(folder / "checkpoints", step) / "weights").write_text("?")


def checkpoints_gone(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def an_empty_mount_point(folder: Path) -> None:
    checkpoints_gone(folder)
    (folder / "checkpoints").mkdir()


def sessions_gone_as_well(folder: Path) -> None:
    checkpoints_gone(folder)
    (folder / "environment.json").unlink()


def metrics_gone_as_well(folder: Path) -> None:
    checkpoints_gone(folder)
    (folder / "metrics.jsonl").unlink()


def all_damaged_but_the_start(folder: Path) -> None:
    break_checkpoint(folder, 4)
    break_checkpoint(folder, END)


def all_damaged(folder: Path) -> None:
    all_damaged_but_the_start(folder)
    break_checkpoint(folder, 0)


def only_the_start_left(folder: Path) -> None:
    for step in (4, END):
        shutil.rmtree(store.checkpoint_folder(folder / "checkpoints", step))


@pytest.mark.parametrize(
    "harm",
    [
        checkpoints_gone,
        an_empty_mount_point,
        sessions_gone_as_well,
        metrics_gone_as_well,
        all_damaged_but_the_start,
        all_damaged,
        only_the_start_left,
    ],
)
def test_a_run_that_has_lost_its_work_is_not_begun_anew_unless_asked_to(run, config, harm):
    harm(run)
    with pytest.raises(DetourError, match="restart=true to start from scratch"):
        go_on(run, config)
    found = go_on(run, again(config, restart=True))
    assert found is None or store.step_of(found) == 0


def go_on(folder: Path, config: RunConfig) -> Path | None:
    refuse_another_run(folder, config)
    return newest_checkpoint(folder, config)


def test_restart_does_not_begin_anew_what_can_go_on(run, config):
    """It may stay in the run file of a job that is put back into the queue."""
    break_checkpoint(run, END)
    assert store.step_of(go_on(run, again(config, restart=True))) == 4


def test_a_run_that_has_saved_nothing_begins_anew(run, config):
    checkpoints_gone(run)
    (run / "environment.json").write_text(json.dumps({"sessions": [{"step": 0, "saved": 0, "ended": "error: x"}]}))
    assert go_on(run, config) is None
    (run / "environment.json").write_text(json.dumps({"sessions": [{"step": 0, "saved": 6}, {"step": 0}]}))
    assert go_on(run, config) is None  # begun anew on purpose


@pytest.mark.parametrize("stray", ["README.md", ".DS_Store"])
def test_a_finished_run_is_known_by_its_folder_and_a_stray_file_makes_it_no_other(run, config, stray):
    plan, final = Plan.from_config(config), store.checkpoint_folder(run / "checkpoints", END)
    (final / stray).write_text("")
    assert is_finished(run, plan) and go_on(run, config) == final
    assert (final / stray).exists()


def not_told(folder: Path) -> None:
    note(folder, ended="SIGTERM")


def a_longer_plan(folder: Path) -> None:
    shutil.move(
        store.checkpoint_folder(folder / "checkpoints", END), store.checkpoint_folder(folder / "checkpoints", END + 1)
    )


@pytest.mark.parametrize("harm", [checkpoints_gone, all_damaged, not_told, a_longer_plan, metrics_gone_as_well])
def test_what_is_not_finished_is_not_called_so(run, config, harm):
    harm(run)
    assert not is_finished(run, Plan.from_config(config))


def moved(config: RunConfig, folder: Path) -> RunConfig:
    """The same run with all that it reads under other paths."""
    folder.mkdir()
    for name in ("start", "tokenizer"):
        shutil.move(folder.parent / name, folder / name)
    for file in folder.parent.glob("corpus.*"):
        shutil.move(file, folder / file.name)
    shutil.move(config.deepspeed, folder / "deepspeed.json")
    words = shutil.move(folder.parent / "words.txt", folder / "words.txt")
    masked = dataclasses.replace(config.phases[1].objective, entities=str(words))
    corpora = (dataclasses.replace(config.data.corpora[0], prefix=str(folder / "corpus")),)
    return again(
        config,
        data=dataclasses.replace(config.data, corpora=corpora),
        model=dataclasses.replace(config.model, start=str(folder / "start"), tokenizer=str(folder / "tokenizer")),
        phases=(config.phases[0], dataclasses.replace(config.phases[1], objective=masked)),
        deepspeed=str(folder / "deepspeed.json"),
    )


def test_a_run_goes_on_with_what_it_reads_under_other_paths(run, config, tmp_path):
    there = moved(config, tmp_path / "scratch")
    assert store.step_of(go_on(run, there)) == END
    changes = changed_settings(run, there)
    assert len(changes) == 5
    assert all("same content by hash" in line for line in changes if "deepspeed" not in line)
    assert not any("rounding" in line for line in changes)
    claim(run, there, Plan.from_config(there))
    assert store.step_of(go_on(run, there)) == END  # the session after it


@pytest.mark.parametrize(
    ("file", "key"),
    [
        ("start/model.safetensors", "model.start"),
        ("start/config.json", "model.start"),
        ("tokenizer/tokenizer.json", "model.tokenizer"),
        ("corpus.manifest.json", "data.corpora.0.prefix"),
        ("words.txt", "phases.decay.entities"),
    ],
)
def test_other_content_under_another_path_is_another_run(run, config, tmp_path, file, key):
    there = moved(config, tmp_path / "scratch")
    path = tmp_path / "scratch" / file
    text = path.read_text()
    if key.startswith("data"):
        text = text.replace(read_manifest(there.data.corpora[0].prefix).files["bin"]["sha256"], "0" * 64)
    if key == "model.tokenizer":
        text = json.dumps(json.loads(text) | {"normalizer": {"type": "Lowercase"}})
    path.write_text(text if text != path.read_text() else text + " ")
    with pytest.raises(DetourError, match=f"belongs to another run: {key} is"):
        go_on(run, there)


def test_a_tokenizer_in_another_form_is_the_same(run, config, tmp_path):
    """Checkpoints hold a tokenizer.json, also of a vocab.txt or a SentencePiece model."""
    there = moved(config, tmp_path / "scratch")
    path = tmp_path / "scratch" / "tokenizer" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=7))
    assert store.step_of(go_on(run, there)) == END


def test_a_start_model_that_is_gone_is_not_needed_once_there_is_a_checkpoint(run, config):
    assert stand_in(run, config.model) is None
    shutil.rmtree(config.model.start)
    assert stand_in(run, config.model).start == str(store.checkpoint_folder(run / "checkpoints", END))
    checkpoints_gone(run)
    assert stand_in(run, config.model) is None


def edit(path: str, **changes: Any) -> None:
    content = json.loads(Path(path).read_text()) | changes
    Path(path).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_another_optimizer_is_another_run(run, config):
    lion = again(config, optimizer=dataclasses.replace(config.optimizer, kind=Lion()))
    with pytest.raises(
        DetourError, match=r"another run: optimizer\.name is 'adamw' there and 'lion' here; use the same"
    ):
        go_on(run, lion)


def test_a_run_of_before_optimizers_had_names_goes_on(run, config):
    path = run / "run.yaml"
    content = yaml.safe_load(path.read_text())
    assert content["optimizer"].pop("name") == "adamw"
    path.write_text(yaml.safe_dump(content))
    assert store.step_of(go_on(run, config)) == END
    assert changed_settings(run, config) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"bf16": None},
        {"bf16": {"enabled": False}},
        {"torch_autocast": {"enabled": True}},
    ],
)
def test_another_precision_in_the_same_file_is_another_run(run, config, changes):
    edit(config.deepspeed, **changes)
    with pytest.raises(DetourError, match="belongs to another run: the DeepSpeed file's "):
        go_on(run, config)


def test_a_run_from_when_deepspeed_summed_gradients_goes_on(run, config):
    sums = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
    zero = {"stage": 2, "contiguous_gradients": True, "reduce_scatter": True, "overlap_comm": False}
    before = {"bf16": {"enabled": True, "check_grad_overflow": True}, "zero_optimization": zero, **sums}
    edit(run / "deepspeed.json", **before)
    refuse_another_run(run, config)
    assert changed_settings(run, config) == []


def test_what_else_changes_in_the_deepspeed_file_is_told(run, config):
    edit(config.deepspeed, zero_optimization={"stage": 2, "allgather_bucket_size": 1000})
    assert store.step_of(go_on(run, config)) == END
    changes = changed_settings(run, config)
    assert (
        "changed since the last session: the DeepSpeed file's zero_optimization.allgather_bucket_size was not set and "
        "is 1000; rounding may differ"
    ) in changes


def put(path: Path, content: str | bytes) -> None:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content", [*WRONG, "{}", '{"sessions": 3}', '{"sessions": {}}', '{"sessions": [3, null]}'])
def test_an_environment_that_is_none_is_told_in_a_sentence(run, config, content):
    put(run / "environment.json", content)
    uses = [
        lambda: add_session(run, {"step": 0}, {}),
        lambda: note(run, ended="x"),
        lambda: is_finished(run, Plan.from_config(config)),
        lambda: refuse_another_run(run, config),
    ]
    for use in uses:
        with pytest.raises(DetourError, match=r"environment\.json: .*; restore the file, or remove it"):
            use()
    assert (run / "environment.json").read_bytes() == (content if isinstance(content, bytes) else content.encode())


@pytest.mark.parametrize("content", ['{"sessions": [{"step": [], "saved": {}}]}', '{"sessions": [{"ended": 3}]}'])
def test_odd_facts_of_sessions_harm_nothing(run, config, content):
    put(run / "environment.json", content)
    assert not is_finished(run, Plan.from_config(config))
    assert store.step_of(go_on(run, config)) == END


@pytest.mark.parametrize("name", ["run.yaml", "deepspeed.json"])
@pytest.mark.parametrize("content", WRONG)
def test_a_run_file_or_deepspeed_file_that_is_none_is_told_in_a_sentence(run, config, name, content):
    put(run / name, content)
    with pytest.raises(DetourError, match=name.replace(".", r"\.")):
        go_on(run, config)


WRONG_STATES = [
    {key: value}
    for key in ("format", "step", "tokens", "guard", "corpora", "entities")
    for value in (None, [], "text", 2.5, True, {"recent": None, "skipped_in_row": 0})
    if not (key in ("corpora", "entities") and type(value) is dict)
]
WRONG_STATES += [
    {"guard": {"skipped_in_row": 0, "recent": recent}}
    for recent in ([], {}, {"loss": [], "x": []}, {"loss": 3, "gradient norm": []}, {"loss": [""], "gradient norm": []})
]


def test_a_state_of_before_there_were_entities_is_read(run):
    final = store.checkpoint_folder(run / "checkpoints", END)
    good = json.loads((final / "run_state.json").read_text())
    put(final / "run_state.json", json.dumps({key: value for key, value in good.items() if key != "entities"}))
    assert _read_state(final) == good | {"entities": {}}


@pytest.mark.parametrize("content", [*WRONG, "{}", *map(json.dumps, WRONG_STATES)])
def test_a_state_that_is_none_is_told_in_a_sentence(run, config, content):
    """Even where files.json agrees with it."""
    final = store.checkpoint_folder(run / "checkpoints", END)
    good = json.loads((final / "run_state.json").read_text())
    assert _read_state(final) == good
    if content in map(json.dumps, WRONG_STATES):
        content = json.dumps(good | json.loads(content))
    put(final / "run_state.json", content)
    with pytest.raises(DetourError, match=r"run_state\.json|saved by another version"):
        _read_state(final)
    listing = json.loads((final / store.LISTING).read_text())
    listing["run_state.json"] = store.file_facts(final / "run_state.json")
    (final / store.LISTING).write_text(json.dumps(listing))
    go_on(run, config)
    is_finished(run, Plan.from_config(config))
    changed_settings(run, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"local_attention": 64},
        {"num_attention_heads": 4},
        {"norm_eps": 1e-3},
        {"global_attn_every_n_layers": 2},
    ],
    ids=str,
)
def test_a_start_model_that_has_changed_its_shape_is_told(run, corpus, changes):
    final = store.checkpoint_folder(run / "checkpoints", END)
    shape = read_shape(tiny_config(corpus.tokenizer), "tests")
    (final / "config.json").write_text(json.dumps(tiny_config(corpus.tokenizer)))
    refuse_another_shape(final, shape)
    with pytest.raises(DetourError, match=r"saved with .*, but the start model now has"):
        refuse_another_shape(final, read_shape(tiny_config(corpus.tokenizer, changes), "tests"))


def test_a_model_of_a_run_file_needs_no_start(run, config, corpus):
    fresh = dataclasses.replace(config.model, start=None, config=SIZES, tokenizer=str(corpus.tokenizer))
    assert stand_in(run, fresh) is None
