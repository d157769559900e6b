"""A run directory belongs to one run, the one in its run.yaml. Its files are read like any untrusted input."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import yaml

from megatron_detour.checkpoint import store
from megatron_detour.checkpoint.source import Source
from megatron_detour.checkpoint.store import RUN_STATE
from megatron_detour.config import Model, RunConfig, flatten, from_dict
from megatron_detour.config.deepspeed import read_deepspeed_config
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError
from megatron_detour.files import file_facts, write_whole
from megatron_detour.observe.sinks import read_metrics
from megatron_detour.plan import Plan
from megatron_detour.runtime.lock import LOCK
from megatron_detour.structured import read_json_object, read_yaml
from megatron_detour.tokenizer.vocabulary import load_vocabulary

RUN_FILE, PLAN, DEEPSPEED, METRICS = "run.yaml", "plan.json", "deepspeed.json", "metrics.jsonl"
ENVIRONMENT, CHECKPOINTS = "environment.json", "checkpoints"
LEFT_BY_A_KILL = {LOCK, f".{RUN_FILE}.part"}  # by a run that was killed before it wrote run.yaml
SPARE_BYTES = 64 << 20  # for tokenizer, metrics and report
DEEPSPEED_KEY = "the DeepSpeed file's "
# Keys of the DeepSpeed file about gradients, which parallel/zero.py sums and judges itself.
WITHOUT_EFFECT = {
    "bf16.check_grad_overflow",
    "communication_data_type",
    "data_types.grad_accum_dtype",
    "fp32_allreduce",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.overlap_comm",
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.reduce_scatter",
    "zero_optimization.use_multi_rank_bucket_allreduce",
}
_NOTING = threading.Lock()
PRECISION = ("bf16", "fp16", "amp", "torch_autocast")  # keys of the DeepSpeed file


def refuse_another_run(folder: Path, config: RunConfig) -> None:
    """Raise DetourError if the folder contains another run, other files, or a run without its checkpoints."""
    if not (folder / RUN_FILE).exists():
        if folder.exists() and (
            not folder.is_dir() or any(path.name not in LEFT_BY_A_KILL for path in folder.iterdir())
        ):
            raise DetourError(f"{folder}: contains files but no run; choose another folder=... or empty it")
        return
    if not any((folder / name).exists() for name in (METRICS, CHECKPOINTS, ENVIRONMENT)):
        return  # the run never started
    _environment(folder)  # fail now if it is invalid, not after the libraries have loaded
    before = _run_before(folder)
    moved = _moved(folder, before, config)
    there = {key: moved.get((key.rpartition(".")[2], value), value) for key, value in before.trajectory().items()}
    here = config.trajectory()
    content = read_deepspeed_config(config.deepspeed)
    there |= _precision(_deepspeed_before(folder) or content)
    here |= _precision(content)
    for key in [*here, *there]:
        if here.get(key) != there.get(key):
            raise DetourError(
                f"{folder}: belongs to another run: {_display_key(key, config)} is {_shown(there, key)} there and "
                f"{_shown(here, key)} here; use the same settings to resume, or choose another folder=..."
            )
    if not store.find_checkpoints(folder / CHECKPOINTS):
        _refuse_restart(folder, config)


def newest_checkpoint(folder: Path, config: RunConfig) -> Path | None:
    """Return the newest intact checkpoint. Raises DetourError if starting without one would lose work."""
    checkpoints = folder / CHECKPOINTS
    newest = store.latest(checkpoints)
    if newest is None or store.step_of(newest) == 0:
        broken = [path for path in store.find_checkpoints(checkpoints) if store.step_of(path)]
        if broken and not config.restart:
            raise DetourError(
                f"{checkpoints}: all {len(broken)} checkpoints after step 0 are damaged; restore {broken[-1].name} "
                "from a copy, or set restart=true to start from scratch and replace them"
            )
        _refuse_restart(folder, config)
    return newest


def is_finished(folder: Path, plan: Plan) -> bool:
    """Return whether the last session recorded that it finished `plan`, and the last checkpoint is intact."""
    final = store.checkpoint_folder(folder / CHECKPOINTS, plan.total_steps)
    sessions = _environment(folder)["sessions"]
    if not sessions or sessions[-1].get("ended") != "finished" or not (folder / METRICS).exists():
        return False
    try:
        store.verify(final)
    except store.Broken:
        return False
    return _state(final).get("tokens") == plan.total_tokens


def stand_in(folder: Path, model: Model) -> Model | None:
    """Return the newest checkpoint as a substitute for a missing start model or tokenizer."""
    if all(Path(path).exists() for path in (model.start, model.tokenizer) if path):
        return None
    checkpoint = store.latest(folder / CHECKPOINTS)
    return Model(start=str(checkpoint)) if checkpoint else None


def free_bytes(folder: Path) -> int | None:
    """Free for a folder that may not be there yet; None where that cannot be told."""
    there = next((place for place in (folder, *folder.absolute().parents) if place.exists()), None)
    try:
        return shutil.disk_usage(there).free if there else None
    except OSError:
        return None


def refuse_full_disk(folder: Path, plan: Plan, checkpoint_bytes: int) -> None:
    """Raises DetourError where the disk has no room for one more checkpoint of a run that is not finished."""
    checkpoints, free = folder / CHECKPOINTS, free_bytes(folder)
    if free is None or store.checkpoint_folder(checkpoints, plan.total_steps).exists():
        return
    needed = checkpoint_bytes + SPARE_BYTES
    free += sum(path.stat().st_size for left in store.leftovers(checkpoints) for path in left.glob("*"))  # will go
    if free < needed:
        raise DetourError(
            f"{folder}: the disk has {free / 1e9:.2f} GB left and a checkpoint takes {needed / 1e9:.2f} GB; free some "
            "space and run the same command again"
        )


def start_hash(start: str | None) -> str | None:
    """Return the hash of a start model's configuration and weights, or None if it is not a local folder."""
    if not start or not Path(start).is_dir():
        return None
    try:
        source, tensors = Source(start), sorted(Path(start).glob("*.safetensors"))
        files = [source.config_file(), *(tensors or source.weight_files())]
    except DetourError:  # said where the model is read
        return None
    return "-".join(file_facts(file)["sha256"] for file in files)


def changed_settings(folder: Path, config: RunConfig) -> list[str]:
    """Return a line for each setting that has changed since the last session and does not affect the trajectory."""
    if not (folder / ENVIRONMENT).exists():
        return []  # no session has started
    try:
        before = _run_before(folder)
    except (OSError, DetourError):
        return []
    old, now = dict(flatten(before.to_dict())), dict(flatten(config.to_dict()))
    content = read_deepspeed_config(config.deepspeed)
    old |= _deepspeed_keys(_deepspeed_before(folder) or content)
    now |= _deepspeed_keys(content)
    same = dict.fromkeys(_moved(folder, before, config).values(), "; same content by hash")
    return [
        f"changed since the last session: {_display_key(key, config)} was {_shown(old, key)} and is {_shown(now, key)}"
        f"{same.get(now.get(key)) or _remark(key)}"
        for key in dict.fromkeys([*old, *now])
        if old.get(key) != now.get(key) and key != "folder"
    ]


def _remark(key: str) -> str:
    if key.startswith("validation.") and key != "validation.every":
        return "; validation metrics before and after are not comparable"
    return "; rounding may differ" if key.startswith(DEEPSPEED_KEY) else ""


def claim(folder: Path, config: RunConfig, plan: Plan) -> None:
    """Write the run's files into the folder, after everything that the run needs has been checked."""
    write_whole(folder / RUN_FILE, yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True))
    write_whole(folder / DEEPSPEED, json.dumps(read_deepspeed_config(config.deepspeed), indent=1) + "\n")
    write_whole(folder / PLAN, json.dumps(plan.to_dict(), indent=1) + "\n")


def add_session(folder: Path, session: dict[str, Any], facts: dict[str, Any]) -> None:
    """Append a session to environment.json and update its facts."""
    _write_environment(folder, {"sessions": [*_environment(folder)["sessions"], session], **facts})


def last_session(folder: Path) -> dict[str, Any]:
    """Return the record of the last session; {} before the first."""
    return next(reversed(_environment(folder)["sessions"]), {})


def note(folder: Path, **facts: Any) -> None:
    """Record facts about the last session, such as how it ended or the step it saved. Thread-safe."""
    with _NOTING:
        environment = _environment(folder)
        if environment["sessions"]:
            environment["sessions"][-1] |= facts
            _write_environment(folder, environment)


def _environment(folder: Path) -> dict[str, Any]:
    path = folder / ENVIRONMENT
    try:
        content = read_json_object(path)
        sessions = content.get("sessions")
        if not isinstance(sessions, list) or not all(isinstance(session, dict) for session in sessions):
            raise DetourError(f"{path}: no list of sessions")
    except FileNotFoundError:
        return {"sessions": []}
    except DetourError as fault:
        raise DetourError(f"{fault}; restore the file, or remove it to continue without the earlier sessions") from None
    return content


def _write_environment(folder: Path, content: dict[str, Any]) -> None:
    write_whole(folder / ENVIRONMENT, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _refuse_restart(folder: Path, config: RunConfig) -> None:
    """Raise DetourError if the run has saved a checkpoint, unless the run file has restart=true."""
    if _has_saved(folder) and not config.restart:
        raise DetourError(
            f"{folder / CHECKPOINTS}: the run has saved checkpoints, but there are none; restore them (is their "
            f"disk mounted?), or set restart=true to start from scratch and discard {METRICS}"
        )


def _has_saved(folder: Path) -> bool:
    sessions = _environment(folder)["sessions"]
    if not sessions:  # environment.json, written before any metric, was removed as well
        path = folder / METRICS
        return path.exists() and any(record["step"] > 0 for record in read_metrics(path))
    begun = max((i for i, session in enumerate(sessions) if session.get("step") == 0), default=0)
    return any(
        session.get("step") or session.get("saved") or ("saved" not in session and session.get("ended") == "finished")
        for session in sessions[begun:]
    )


def _moved(folder: Path, there: RunConfig, here: RunConfig) -> dict[tuple[str, Any], str]:
    """Map (last part of the key, old path) to the new path, for paths that changed while the content's hash did not."""
    states = ((checkpoint, _state(checkpoint)) for checkpoint in reversed(store.find_checkpoints(folder / CHECKPOINTS)))
    checkpoint, newest = next(((checkpoint, state) for checkpoint, state in states if state), (folder, {}))
    corpora = newest.get("corpora") if isinstance(newest.get("corpora"), dict) else {}
    pairs = [("prefix", old, new, corpora.get(old), _corpus_hash) for old, new in _prefixes(there, here)]
    entities = newest.get("entities") if isinstance(newest.get("entities"), dict) else {}
    files = [tuple(phase.objective.entities for phase in pair) for pair in zip(there.phases, here.phases, strict=False)]
    pairs += [("entities", old, new, entities.get(old), _file_hash) for old, new in files]
    pairs.append(("start", there.model.start, here.model.start, newest.get("start"), start_hash))
    tokenizers = there.model.tokenizer, here.model.tokenizer
    saved = _tokenizer_hash(str(checkpoint)) if len({*tokenizers}) > 1 else None
    pairs.append(("tokenizer", *tokenizers, saved, _tokenizer_hash))
    return {
        (kind, old): new
        for kind, old, new, known, hash_of in pairs
        if old != new and old and new and known is not None and hash_of(new) == known
    }


def _prefixes(*configs: RunConfig) -> list[tuple[str, str]]:
    """Pair the corpora of two run files in the order in which the phases read them."""
    phases = [[phase.corpora or config.data.corpora for phase in config.phases] for config in configs]
    prefixes = [dict.fromkeys(corpus.prefix for corpora in run for corpus in corpora) for run in phases]
    return list(zip(*prefixes, strict=True)) if len({len(own) for own in prefixes}) == 1 else []


def _state(checkpoint: Path) -> dict[str, Any]:
    """Return run_state.json; {} if unreadable, which resuming reports."""
    try:
        return read_json_object(checkpoint / RUN_STATE)
    except (OSError, DetourError):
        return {}


def _corpus_hash(prefix: str) -> str | None:
    try:
        return read_manifest(prefix).files["bin"]["sha256"]
    except (DetourError, KeyError, TypeError):
        return None


def _file_hash(name: str) -> str | None:
    return file_facts(Path(name))["sha256"] if Path(name).is_file() else None


def _tokenizer_hash(name: str) -> str | None:
    """Return the hash of what a tokenizer does, in whatever form its file has it."""
    try:
        return load_vocabulary(name).sha256
    except DetourError:
        return None


def _run_before(folder: Path) -> RunConfig:
    """Return the run file of the last session."""
    path = folder / RUN_FILE
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise DetourError(f"{path}: not a run file; restore it, or choose another folder=...")
    return from_dict(content, str(path))


def _deepspeed_keys(content: dict[str, Any]) -> dict[str, Any]:
    return {f"{DEEPSPEED_KEY}{key}": value for key, value in flatten(content) if key not in WITHOUT_EFFECT}


def _deepspeed_before(folder: Path) -> dict[str, Any] | None:
    """Return the DeepSpeed file of the last session."""
    try:
        return read_json_object(folder / DEEPSPEED)
    except FileNotFoundError:
        return None


def _precision(deepspeed: dict[str, Any]) -> dict[str, Any]:
    chosen = {key: deepspeed[key] for key in PRECISION if key in deepspeed}
    on = {key: value for key, value in chosen.items() if not isinstance(value, dict) or value.get("enabled", True)}
    return _deepspeed_keys(on)


def _shown(settings: dict[str, Any], key: str) -> str:
    value = settings.get(key)
    return "not set" if value is None else repr(value)


def _display_key(key: str, config: RunConfig) -> str:
    """Return a key as users write it: phases.decay.tokens for phases.1.tokens."""
    first, _, rest = key.partition(".")
    number, _, last = rest.partition(".")
    if first == "phases" and int(number) < len(config.phases):
        return f"phases.{config.phases[int(number)].name}.{last}"
    return key
