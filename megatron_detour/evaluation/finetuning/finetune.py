"""Fine-tune one model on one task with one seed, and score the test split with the best validated state."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
from megatron_detour.evaluation.finetuning.attention import attention_of
from megatron_detour.evaluation.finetuning.heads import build_optimizer, open_model
from megatron_detour.evaluation.finetuning.protocol import FinetuneSettings
from megatron_detour.evaluation.models import most_positions, opening
from megatron_detour.evaluation.task_types import METRICS
from megatron_detour.evaluation.task_types.encode import Encoder, Example, Feature, token_count, was_cut

SUBSET_SEED = 0  # for the subsets of train_examples and dev_examples; independent of the fine-tuning seed
Report = Callable[[float], None]  # receives the fraction of steps done


@dataclass(frozen=True)
class Outcome:
    """The scores of a fine-tuned model, and its predictions and the gold answers of the test split."""

    scores: dict[str, float]
    dev_score: float
    best_step: int
    steps: int
    examples: dict[str, int]
    cut: int  # test texts truncated at max_length
    gold: list[Any]
    predicted: list[Any]
    seconds: float
    device: str
    attention: str  # transformers' name


def finetune(
    model: Path,
    dataset: Dataset,
    settings: FinetuneSettings,
    seed: int,
    *,
    shuffled: bool = False,
    scratch: Path,
    report: Report = lambda fraction: None,
) -> Outcome:
    """Fine-tune and score. `shuffled` trains on shuffled labels, a sanity check; `scratch` holds temporary checkpoints.

    Raises DetourError if the model or tokenizer does not fit the task.
    """
    began = time.monotonic()
    kind = dataset.task.kind
    train = _subset(dataset.train, settings.train_examples)
    dev = _subset(dataset.dev, settings.dev_examples)
    if shuffled:
        train = kind.shuffle(train, random.Random(seed))
    transformers.set_seed(seed)
    network = open_model(model, dataset, settings)
    encoder = build_encoder(model, network, dataset, settings, train)
    features = {name: encoder(split) for name, split in (("train", train), ("dev", dev), ("test", dataset.test))}
    with TemporaryDirectory(dir=scratch, prefix="finetune-") as folder:
        trainer = _Trainer(
            model=network,
            args=_arguments(settings, seed, Path(folder)),
            data_collator=partial(encoder.kind.collate, pad=encoder.tokenizer.pad_token_id),
            train_dataset=features["train"],
            eval_dataset=_sorted(features["dev"]),
            compute_metrics=_judge(encoder, settings.select_by or dataset.task.metric, dev, features["dev"]),
            compute_loss_func=kind.loss(dataset.labels, train),
            preprocess_logits_for_metrics=_kept_outputs(encoder),
            optimizers=(build_optimizer(network, settings), None),
            callbacks=[_Progress(report)],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        predicted = _predict(trainer, encoder, features["test"])
    gold = encoder.gold(dataset.test)
    return Outcome(
        scores={name: METRICS[name].score(dataset.labels, gold, predicted) for name in dataset.task.metrics},
        dev_score=float(trainer.state.best_metric),
        best_step=int(trainer.state.best_global_step),
        steps=int(trainer.state.global_step),
        examples={name: len(split) for name, split in features.items()},
        cut=sum(was_cut(feature, encoder.max_length) for feature in features["test"]),
        gold=gold,
        predicted=predicted,
        seconds=time.monotonic() - began,
        device=_device_name(),
        attention=attention_of(network),
    )


def _device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"


def _subset(examples: list[Example], most: int | None) -> list[Example]:
    if most is None or len(examples) <= most:
        return examples
    kept = sorted(random.Random(SUBSET_SEED).sample(range(len(examples)), most))
    return [examples[i] for i in kept]


def build_encoder(
    model: Path, network: nn.Module, dataset: Dataset, settings: FinetuneSettings, train: list[Example]
) -> Encoder:
    """Build the encoder; texts are truncated at the protocol's or the model's maximum length. Raises DetourError."""
    with opening(model):
        tokenizer = transformers.AutoTokenizer.from_pretrained(model, local_files_only=True)
    if tokenizer.pad_token_id is None:
        raise DetourError(f"{model}: the tokenizer has no padding token; set pad_token in its tokenizer_config.json")
    longest = min(settings.max_length, most_positions(network.base_model, tokenizer))
    kind = dataset.task.kind.with_head(settings.ner_head)
    return Encoder(kind, dataset.labels, tokenizer, longest, kind.fit(train))


class _Trainer(transformers.Trainer):
    """Evaluates in dataset order: group_by_length would silently reorder the evaluation too."""

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        return self._in_order(self.eval_dataset if eval_dataset is None else eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self._in_order(test_dataset)

    def _in_order(self, dataset: Any) -> DataLoader:
        loader = DataLoader(dataset, batch_size=self.args.eval_batch_size, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)  # it counts batches; without it some outputs are dropped


class _Progress(transformers.TrainerCallback):
    def __init__(self, report: Report) -> None:
        self.report = report

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.report(state.global_step / max(state.max_steps, 1))


def _judge(
    encoder: Encoder, metric: str, dev: list[Example], features: list[Feature]
) -> Callable[[Any], dict[str, float]]:
    """Return compute_metrics: the validation score that selects the best state."""
    gold = encoder.gold(dev)

    def judge(evaluated: Any) -> dict[str, float]:
        predicted = encoder.decode(features, _unsorted(evaluated.predictions, features))
        return {"selected": METRICS[metric].score(encoder.labels, gold, predicted)}

    return judge


def _arguments(settings: FinetuneSettings, seed: int, folder: Path) -> Any:
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
        warmup_steps=settings.warmup,  # below 1: a fraction
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


def _kept_outputs(encoder: Encoder) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Return a function that selects the outputs needed for decoding. It raises DetourError if they are not finite."""

    def kept(outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not torch.isfinite(outputs[0]).all():
            raise DetourError("the model has diverged: its outputs are NaN or infinite; try a smaller learning_rate")
        return encoder.kind.kept_outputs(outputs)

    return kept


def _predict(trainer: transformers.Trainer, encoder: Encoder, features: list[Feature]) -> list[Any]:
    trainer.compute_metrics = None
    outputs = trainer.predict(_sorted(features)).predictions
    return encoder.decode(features, _unsorted(outputs, features))


def _order(features: list[Feature]) -> np.ndarray:
    return np.argsort([-token_count(feature) for feature in features], kind="stable")


def _sorted(features: list[Feature]) -> list[Feature]:
    """Sort by length, longest first, to minimize padding; evaluation does not depend on the order."""
    return [features[i] for i in _order(features)]


def _unsorted(outputs: np.ndarray, features: list[Feature]) -> np.ndarray:
    restored = np.empty_like(outputs)
    restored[_order(features)] = outputs
    return restored
