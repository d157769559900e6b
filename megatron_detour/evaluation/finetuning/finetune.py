"""Fine-tunes one model on one task with one seed, and scores the test split with the best state by validation."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import Dataset
from megatron_detour.evaluation.finetuning.encode import Encoder, Example, Scale, collator, length_of, was_cut
from megatron_detour.evaluation.finetuning.heads import loss_of, open_model, optimizer_of, pretrained_part
from megatron_detour.evaluation.finetuning.protocol import Settings
from megatron_detour.evaluation.metrics import scores
from megatron_detour.evaluation.models import most_positions, opening

SUBSET_SEED = 0  # of the examples that a protocol's train_examples and dev_examples leave: the same for all seeds
Report = Callable[[float], None]  # gets the share of the steps that are done


@dataclass(frozen=True)
class Outcome:
    """What a fine-tuned model scored, and its predictions on the test split beside the right answers."""

    scores: dict[str, float]
    dev_score: float
    best_step: int
    steps: int
    examples: dict[str, int]
    cut: int  # test texts that filled the length
    gold: list[Any]
    predicted: list[Any]
    seconds: float
    device: str


def finetune(
    model: Path,
    dataset: Dataset,
    settings: Settings,
    seed: int,
    *,
    shuffled: bool = False,
    scratch: Path,
    report: Report = lambda share: None,
) -> Outcome:
    """`shuffled` trains on labels in random order: what comes out is chance. `scratch` holds checkpoints meanwhile.

    Raises DetourError for a model or a tokenizer that does not fit the task.
    """
    began = time.monotonic()
    train = _subset(dataset.train, settings.train_examples)
    dev = _subset(dataset.dev, settings.dev_examples)
    if shuffled:
        train = shuffle_labels(train, seed)
    transformers.set_seed(seed)
    network = open_model(model, dataset, settings)
    encoder = encoder_of(model, network, dataset, settings, train)
    features = {name: encoder(split) for name, split in (("train", train), ("dev", dev), ("test", dataset.test))}
    with TemporaryDirectory(dir=scratch, prefix="finetune-") as folder:
        trainer = _trainer(network, encoder, settings, seed, features, dev, Path(folder), train, report)
        trainer.train()
        predicted = _predict(trainer, encoder, features["test"])
    gold = encoder.gold(dataset.test)
    task = dataset.task
    return Outcome(
        scores=scores(task, dataset.labels, gold, predicted),
        dev_score=float(trainer.state.best_metric),
        best_step=int(trainer.state.best_global_step),
        steps=int(trainer.state.global_step),
        examples={name: len(of_split) for name, of_split in features.items()},
        cut=sum(was_cut(feature, encoder.max_length) for feature in features["test"]),
        gold=gold,
        predicted=predicted,
        seconds=time.monotonic() - began,
        device=_device_name(),
    )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def shuffle_labels(examples: list[Example], seed: int) -> list[Example]:
    """The same texts with each other's labels; the tags of all words change places, so that no entity stays whole."""
    rng = random.Random(seed)
    if "tags" in examples[0]:
        tags = [tag for example in examples for tag in example["tags"]]
        rng.shuffle(tags)
        left = iter(tags)
        return [example | {"tags": [next(left) for _ in example["tags"]]} for example in examples]
    if "answers" in examples[0]:  # an option's number means nothing in another question
        return [example | {"answers": _other_answers(example, rng)} for example in examples]
    key = next(key for key in ("label", "labels", "score") if key in examples[0])
    labels = [example[key] for example in examples]
    rng.shuffle(labels)
    return [example | {key: label} for example, label in zip(examples, labels, strict=True)]


def _other_answers(example: Example, rng: random.Random) -> list[int]:
    return sorted(rng.sample(range(len(example["options"])), len(example["answers"])))


def _subset(examples: list[Example], most: int | None) -> list[Example]:
    if most is None or len(examples) <= most:
        return examples
    kept = sorted(random.Random(SUBSET_SEED).sample(range(len(examples)), most))
    return [examples[i] for i in kept]


def encoder_of(model: Path, network: nn.Module, dataset: Dataset, settings: Settings, train: list[Example]) -> Encoder:
    """Texts are cut to the protocol's length, or to what the model reads where that is less. Raises DetourError."""
    with opening(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    if tokenizer.pad_token_id is None:
        raise DetourError(f"{model}: the tokenizer has no padding token; name one in its tokenizer_config.json")
    longest = min(settings.max_length, most_positions(pretrained_part(network), tokenizer))
    scale = Scale.of(train) if dataset.task.type == "similarity" else None
    return Encoder(dataset.task, dataset.labels, tokenizer, longest, settings.ner_head, scale)


class _Trainer(transformers.Trainer):
    """Evaluates in the given order: grouping by length would change that of the evaluation too, without a word."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._in_order(self.eval_dataset if eval_dataset is None else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self._in_order(test_dataset)

    def _in_order(self, dataset: Any) -> DataLoader:
        loader = DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)  # which counts its batches: without that some outputs are dropped


class _Progress(transformers.TrainerCallback):
    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(state.global_step / max(state.max_steps, 1))


def _trainer(
    network: nn.Module,
    encoder: Encoder,
    settings: Settings,
    seed: int,
    features: dict[str, list[dict[str, Any]]],
    dev: list[Example],
    folder: Path,
    train: list[Example],
    report: Report,
) -> transformers.Trainer:
    gold, selected = encoder.gold(dev), settings.select_by or encoder.task.metric
    judged = replace(encoder.task, metric=selected, metrics=(selected,))

    def judge(evaluated: Any) -> dict[str, float]:
        predicted = encoder.decode(features["dev"], _unsorted(evaluated.predictions, features["dev"]))
        return {"selected": scores(judged, encoder.labels, gold, predicted)[selected]}

    trainer = _Trainer(
        model=network,
        args=_arguments(settings, seed, folder),
        data_collator=collator(encoder.tokenizer.pad_token_id, encoder.ner_head),
        train_dataset=features["train"],
        eval_dataset=_sorted(features["dev"]),
        compute_metrics=judge,
        compute_loss_func=loss_of(encoder.task.type, encoder.labels, train),
        preprocess_logits_for_metrics=_answers(encoder),
        optimizers=(optimizer_of(network, settings), None),
        callbacks=[_Progress(report)],
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _arguments(settings: Settings, seed: int, folder: Path) -> Any:
    cuda = torch.cuda.is_available()
    rhythm = "steps" if settings.validate_every else "epoch"
    return transformers.TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        data_seed=seed,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=max(16, settings.batch),
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        warmup_steps=settings.warmup,  # below 1: a share
        max_grad_norm=settings.clip,
        train_sampling_strategy="group_by_length" if settings.by_length else "random",
        bf16=cuda and torch.cuda.is_bf16_supported(),
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        eval_strategy=rhythm,
        eval_steps=settings.validate_every,
        save_strategy=rhythm,
        save_steps=settings.validate_every or 500,
        save_total_limit=1,
        save_only_model=True,
        load_best_model_at_end=True,
        metric_for_best_model="selected",
        greater_is_better=True,
        logging_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )


def _answers(encoder: Encoder) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """What is kept of a batch's outputs: tag ids of tokens or, from the span head, of words; else the logits."""
    of_tags = encoder.task.type == "token-classification"

    def kept(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        if not torch.isfinite(outputs[0] if isinstance(outputs, tuple) else outputs).all():
            raise DetourError("the model has diverged: its outputs are NaN or infinite; try a smaller learning_rate")
        if of_tags and encoder.ner_head == "span":
            return outputs[1]  # SpanOutput.tags
        logits = outputs[0] if isinstance(outputs, tuple) else outputs
        return logits.argmax(-1) if of_tags else logits

    return kept


def _predict(trainer: transformers.Trainer, encoder: Encoder, features: list[dict[str, Any]]) -> list[Any]:
    trainer.compute_metrics = None
    outputs = trainer.predict(_sorted(features)).predictions
    return encoder.decode(features, _unsorted(outputs, features))


def _order(features: list[dict[str, Any]]) -> np.ndarray:
    return np.argsort([-length_of(feature) for feature in features], kind="stable")


def _sorted(features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Longest first, so that batches hold little padding; evaluation does not depend on the order."""
    return [features[i] for i in _order(features)]


def _unsorted(outputs: np.ndarray, features: list[dict[str, Any]]) -> np.ndarray:
    restored = np.empty_like(outputs)
    restored[_order(features)] = outputs
    return restored
