"""What the jobs of a study do: train, fine-tune, analyze. Each can be killed and called again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from megatron_detour.analysis.drift import Measurement, draw_texts, rows
from megatron_detour.analysis.persistence import measure_persistence
from megatron_detour.checkpoint import store
from megatron_detour.run_directory import CHECKPOINTS
from megatron_detour.study.fork import prepare
from megatron_detour.study.plan import Study, StudyRun
from megatron_detour.study.records import PARTS
from megatron_detour.study.schema import Texts


def final_model(run: StudyRun) -> Path:
    return _checkpoint(run, run.plan.total_steps)


def _checkpoint(run: StudyRun, step: int) -> Path:
    return store.checkpoint_folder(run.folder / CHECKPOINTS, step)


def train(run: StudyRun, ranks: int) -> int:
    """Train a run to its end in a process of its own; return the exit status."""
    command = [sys.executable, "-m", "megatron_detour", "train", str(prepare(run))]
    launch, environment = (["--launch"], {"RANKS": str(ranks)}) if ranks > 1 else ([], {})
    # A signal reaches the whole group: wait for the training process, which saves a checkpoint first.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        # It inherits the job's lock, and keeps it should this process be killed.
        return subprocess.call([*command, *launch], env=os.environ | environment, close_fds=False)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def evaluate(study: Study, name: str, model: Path) -> int:
    """Fine-tune a model on every task with every seed; only what is missing."""
    from megatron_detour.evaluation.finetuning.suite import Suite, run_suite, visible_gpus

    devices = visible_gpus()
    run_suite(
        Suite(
            models={name: model},
            tasks=study.tasks,
            data=Path(study.config.evaluation.data),
            protocol=study.protocol,
            seeds=study.finetuning_seeds,
            output=study.folder / "evaluation",
            jobs=max(1, len(devices)),
            devices=devices,
        )
    )
    return 0


def drift(study: Study, seed: int) -> list[dict[str, Any]]:
    """Compare each arm with the reference, and the reference with its second run, on the same texts."""
    analysis = study.config.analyses.drift
    draws, measurement = _draws(analysis.texts)

    def states(arm: str) -> np.ndarray:
        return measurement.states(final_model(study.run(arm, seed)), draws)

    reference = states(analysis.reference)
    noise = rows(measurement.divergence(states(analysis.noise), reference)) if analysis.noise else None
    lines = []
    for arm in analysis.of:
        of = {"kind": "drift", "arm": arm, "reference": analysis.reference, "seed": seed}
        lines.append(of | {"divergence": rows(measurement.divergence(states(arm), reference)), "noise": noise})
    return lines


def persistence(study: Study, seed: int) -> list[dict[str, Any]]:
    """Compare the checkpoints of an arm's phase, from its start, with the reference as it was at this start."""
    analysis = study.config.analyses.persistence
    run, reference = study.run(analysis.arm, seed), study.run(analysis.reference, seed)
    begin = _phase(run, analysis.phase)
    end, start = begin.last_step, begin.first_step - 1
    steps = {store.step_of(path): path for path in store.find_checkpoints(run.folder / CHECKPOINTS)}
    inside = [(step, path) for step, path in sorted(steps.items()) if start <= step <= end]
    points = [((step - start) * begin.tokens // begin.steps, path) for step, path in inside]
    draws, measurement = _draws(analysis.texts)
    before = _checkpoint(reference, _phase(reference, analysis.phase).first_step - 1)
    found = measure_persistence(before, points, draws, measurement)
    of = {"kind": "persistence", "arm": analysis.arm, "reference": analysis.reference, "seed": seed}
    return [of | {"points": list(zip(found.tokens, found.divergence, strict=True))}]


def _phase(run: StudyRun, name: str) -> Any:
    return next(phase for phase in run.plan.phases[1:] if phase.name == name)


def transplants(study: Study, seed: int) -> list[dict[str, Any]]:
    """Judge the recipient, the donor, and the recipient with parts of the donor."""
    from megatron_detour.analysis.transplants import transplant

    analysis = study.config.analyses.transplants
    donor, recipient = (final_model(study.run(arm, seed)) for arm in (analysis.donor, analysis.recipient))
    folder = study.folder / "transplants" / f"s{seed}"
    of = {"kind": "transplant", "donor": analysis.donor, "recipient": analysis.recipient, "seed": seed}
    lines = []
    for parts in PARTS:
        if parts in ("none", "all"):
            figures = _judged(study, recipient if parts == "none" else donor)
        else:
            output = folder / parts
            shutil.rmtree(output, ignore_errors=True)
            transplant(donor, recipient, [parts], output)
            figures = _judged(study, output)
            shutil.rmtree(output)
        lines.append(of | {"task": analysis.task or "", "parts": parts} | figures)
    return lines


def _judged(study: Study, model: Path) -> dict[str, float]:
    """Return a model's score by linear probe and its loss under the fixed masks, as far as the study has them."""
    from megatron_detour.analysis.held_out_loss import MLM_LOSS, held_out_figures
    from megatron_detour.analysis.linear_probe import probe

    figures = {}
    if name := study.config.analyses.transplants.task:
        task = next(task for task in study.tasks if task.name == name)
        figures["score"] = probe(model, task, Path(study.config.evaluation.data))
    run = study.runs[0].config  # all have the same validation
    if run.validation.corpora:
        figures["loss"] = held_out_figures(model, run)[MLM_LOSS]
    return figures


def needle(study: Study, seed: int) -> list[dict[str, Any]]:
    """Ask each arm about the same facts in the same documents."""
    from megatron_detour.analysis.needle import measure_needle

    analysis = study.config.analyses.needle
    files, options = [Path(file) for file in analysis.files], analysis.options
    (documents,) = draw_texts(files, analysis.documents, (options.seed,), fewer=True)
    lines = []
    for arm in analysis.of:
        found = measure_needle(final_model(study.run(arm, seed)), documents, options)
        figures: dict[str, Any] = {"accuracy": found.all.accuracy, "examples": found.all.examples}
        for key, rates in (("by_length", found.by_length), ("by_place", found.by_place)):
            figures[key] = [[part, rate.accuracy] for part, rate in rates.items()]
        lines.append({"kind": "needle", "arm": arm, "seed": seed} | figures)
    return lines


def _draws(texts: Texts) -> tuple[list[list[str]], Measurement]:
    files = [Path(file) for file in texts.files]
    return draw_texts(files, texts.count, texts.draws), Measurement(max_tokens=texts.max_tokens)
