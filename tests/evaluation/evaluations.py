"""Made-up evaluations: results and predictions of models whose skill is known."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour.evaluation.task_types import METRICS as KNOWN_METRICS

METRICS = {
    "classification": "macro_f1",
    "token-classification": "entity_f1",
    "multi-label": "micro_f1",
    "similarity": "pearson",
    "multiple-choice": "accuracy",
    "multiple-answer": "hamming",
}
CLASSES = ["background", "methods", "result"]
TAGS = ["O", "B-Chemical", "I-Chemical", "B-Disease", "I-Disease"]
LABELS = {"classification": CLASSES, "token-classification": TAGS, "multi-label": CLASSES}


@dataclass(frozen=True)
class MadeUp:
    """A task of `examples` test examples. `tasks` of the packaged names get their titles."""

    name: str
    kind: str = "classification"
    examples: int = 60

    @property
    def metric(self) -> str:
        return METRICS[self.kind]

    def gold(self) -> list[Any]:
        rng = random.Random(self.name)
        return [_answer(self.kind, rng) for _ in range(self.examples)]

    def predicted(self, gold: list[Any], skill: float, model: str, seed: int) -> list[Any]:
        """Right where a draw is below the skill, else anything, which may be right too."""
        rng = random.Random(f"{self.name} {model} {seed}")
        found = []
        for answer in gold:
            draw, guess = rng.random(), _answer(self.kind, rng, len(answer) if isinstance(answer, list) else 0)
            if self.kind == "similarity":
                found.append(skill * answer + (1 - skill) * guess)
            else:
                found.append(answer if draw < skill else guess)
        return found


def _answer(kind: str, rng: random.Random, length: int = 0) -> Any:
    if kind == "classification":
        return rng.choice(CLASSES)
    if kind == "multi-label":
        return sorted(rng.sample(CLASSES, rng.randint(1, 2)))
    if kind == "similarity":
        return round(rng.uniform(0, 4), 2)
    if kind == "multiple-choice":
        return rng.randrange(5)
    if kind == "multiple-answer":
        return sorted(rng.sample(range(5), rng.randint(1, 3)))
    tags = ["O"] * (length or rng.randint(4, 12))
    for place in range(0, len(tags) - 1, 2):
        if rng.random() < 0.4:
            entity = rng.choice(["Chemical", "Disease"])
            tags[place : place + 2] = [f"B-{entity}", f"I-{entity}"]
    return tags


def make_evaluation(
    output: Path,
    tasks: Sequence[MadeUp],
    skills: dict[str, float],
    seeds: Sequence[int] = (42, 43, 44),
    *,
    shuffled: bool = False,
    luck: float = 0.01,
    **changes: Any,
) -> Path:
    """Writes results.jsonl (added to what is there) and predictions. `luck` is the standard deviation of a skill."""
    output.mkdir(parents=True, exist_ok=True)
    lines = []
    for seed in seeds:
        for task in tasks:
            gold, labels = task.gold(), LABELS.get(task.kind, [])
            for model, skill in skills.items():
                own = skill + luck * random.Random(f"{model}{task.name}{seed}").gauss(0, 1)
                predicted = task.predicted(gold, 0.0 if shuffled else min(1.0, own), model, seed)
                value = KNOWN_METRICS[task.metric].score(labels, gold, predicted)
                line = {
                    "model": model,
                    "task": task.name,
                    "seed": seed,
                    "shuffled": shuffled,
                    "path": f"/models/{model}",
                    "protocol": "quick",
                    "ner_head": "tokens" if task.kind == "token-classification" else None,
                    "metric": task.metric,
                    "score": value,
                    "scores": {task.metric: value},
                    "dev_score": value,
                    "best_step": 3,
                    "steps": 100,
                    "examples": {"train": 100, "dev": 20, "test": task.examples},
                    "seconds": 12.5,
                    "device": "cpu (2 threads)",
                    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
                    "identity": {"format": "1", "task": task.name, "data": "d", "protocol": "p", "model": model},
                }
                lines.append(json.dumps(line | changes) + "\n")
                path = output / "predictions" / model / task.name / f"{seed}{'-shuffled' * shuffled}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"labels": labels, "gold": gold, "predicted": predicted}))
    with (output / "results.jsonl").open("a") as file:
        file.writelines(lines)
    return output
