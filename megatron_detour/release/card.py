"""The model card: a README.md with front matter for the hub, from a checkpoint, its run and the author's metadata.

It contains no paths: a corpus is named by the last part of its prefix. Unknown values are left out or called unknown.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_detour import __version__
from megatron_detour.checkpoint.huggingface import NEW_HEAD, RUN_STATE, Source
from megatron_detour.errors import DetourError, nearest
from megatron_detour.model.families import Family
from megatron_detour.model.families.base import FULL, SLIDING
from megatron_detour.objectives import REFERENCE
from megatron_detour.observe.run_files import read_state
from megatron_detour.observe.run_folder import validation_rows
from megatron_detour.release.average import Averaged
from megatron_detour.release.card_metadata import CardMetadata, CorpusFacts
from megatron_detour.release.checkpoint_info import CheckpointInfo, Corpus
from megatron_detour.text import markdown, visible
from megatron_detour.ui.format import batch_words, compact, duration, format_lr, frozen_words
from megatron_detour.ui.tables import Formatted, Table

TEMPLATE = "card.md.j2"
BY_CORPUS = tuple(
    f"val_{REFERENCE.name}_{end}" for end in ("loss", "accuracy")
)  # the other metrics are shown over all corpora only
MEDICAL = ("medical", "clinical", "biomedical", "health")
NOT_STATED = "not stated"


@dataclass(frozen=True)
class Card:
    """Everything the card is written from: the checkpoint, the author's metadata, and how the folder was exported."""

    facts: CheckpointInfo
    given: CardMetadata
    shape: Family
    parameters: int
    folder: str  # its name, the default name of the model
    repository: str | None  # on the hub
    dtype: str
    difference: float  # relative difference of the logits from transformers'
    decoder: bool
    opens_in: str  # versions of transformers that open the folder
    evaluation: list[dict[str, Any]] | None  # rows: task, title, metric, mean, sd, seeds
    averaged: Averaged | None  # None: the checkpoint's own weights

    def text(self) -> str:
        """Return the whole README.md. Raises DetourError if the metadata names a corpus that the run does not read."""
        import yaml

        refuse_unknown_corpora(self.given, self.facts.corpora)
        front = yaml.safe_dump(self.front_matter(), sort_keys=False, allow_unicode=True, width=1000)
        return f"---\n{front}---\n\n{self._body()}"

    @property
    def name(self) -> str:
        return self.given.name or self.folder

    def front_matter(self) -> dict[str, Any]:
        """Return the YAML front matter, without empty values."""
        license = _line(self.given.license) if self.given.license else None
        named = license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license)
        pipeline = "text-generation" if self.decoder else "fill-mask"
        entries = {
            "language": [_line(code) for code in self.languages] or None,
            "license": "other" if named else license or "unknown",
            "license_name": license if named else None,
            "library_name": "transformers",
            "pipeline_tag": pipeline,
            "base_model": self.base_model,
            "tags": [
                self.shape.model_type,
                *self._start_tag(),
                "megatron-detour",
                *self._detour_tag(),
                *map(_line, self.given.tags),
            ],
        }
        return {key: value for key, value in entries.items() if value}

    @property
    def languages(self) -> tuple[str, ...]:
        """The given languages, else those the corpora were filtered for if all were filtered, else none."""
        if self.given.languages:
            return self.given.languages
        filtered = [corpus.languages for corpus in self.facts.corpora]
        return tuple(dict.fromkeys(code for codes in filtered for code in codes)) if all(filtered) else ()

    @property
    def base_model(self) -> str | None:
        """The given base model, else the start model if it is a hub id."""
        start = self.facts.config.model.start
        if not start:
            return None
        if self.given.base_model or Path(start).exists():
            return self.given.base_model
        return start if Source(start).has("config.json") else None

    @property
    def medical(self) -> bool:
        return (self.given.domain or "").strip().lower() in MEDICAL

    def _start_tag(self) -> list[str]:
        return ["continued-pretraining"] if self.facts.config.model.start else []

    def _detour_tag(self) -> list[str]:
        return ["causal-detour"] if any(phase.objective.causal for phase in self.facts.plan.phases) else []

    def warnings(self) -> list[str]:
        """Return a sentence for each gap of the card, with the option that fills it, and each caveat of the model."""
        facts, warnings = self.facts, []
        last = facts.last_phase
        if not facts.finished:
            where = f"in phase {last.name!r}" if last else "before the first step"
            warnings.append(f"the run is unfinished; {facts.checkpoint} is {where}")
        if last and self.decoder and not last.objective.causal:
            warnings.append(f"the last phase, {last.name!r}, was not causal: the decoder generates text poorly")
        if last and not self.decoder and last.objective.detour:
            warnings.append(
                f"the last phase, {last.name!r}, trained {last.objective.label}: an encoder needs an mlm phase at the "
                "end"
            )
        if not facts.has_run_folder:
            warnings.append("the checkpoint is not in a run directory: the card has no metrics of the run")
        if not self.languages:
            warnings.append("the card states no language; set --language")
        if not self.given.license:
            warnings.append("the card states no license; set --license")
        if self.given.base_model and not facts.config.model.start:
            warnings.append("the run trained from scratch: the card leaves out the given base model")
        if facts.config.model.start and not self.base_model:
            warnings.append("the start model's hub id is unknown; set --base-model")
        return warnings

    def _body(self) -> str:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined

        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters.update(
            count="{:,}".format,
            compact=compact,
            duration=duration,
            shown=markdown,
            paragraphs=_paragraphs,
            quoted=json.dumps,
            batch=batch_words,
        )
        facts, shape = self.facts, self.shape
        return environment.get_template(TEMPLATE).render(
            card=self,
            facts=facts,
            shape=shape,
            run=facts.run,
            model=self.repository or self.folder,
            start=self._start(),
            lengths=" and ".join(f"{length:,}" for length in sorted({p.sequence_length for p in facts.plan.phases})),
            recipe=self._recipe(),
            french=bool(self.languages) and self.languages[0] == "fr",
            causal=[phase for phase in facts.plan.phases if phase.objective.causal and facts.steps_of(phase)],
            pending=[phase.name for phase in facts.plan.phases if not facts.steps_of(phase)],
            global_layers=shape.layer_types.count(FULL),
            has_local_layers=SLIDING in shape.layer_types,
            phases=self._phases(),
            corpora=self._corpora(),
            validation=self._validation(),
            scores=self._scores(),
            protocol=(self.evaluation or [{}])[0].get("protocol"),
            continued=bool(facts.config.model.start),
            hardware=self._hardware(),
            device_hours=sum(session["seconds"] * session["ranks"] for session in facts.sessions) / 3600,
            resumptions=[step for step in facts.run.resumptions if step < facts.step],
            padding=self._padding(),
            mask_rate=_number(facts.run_settings.get("validation"), "mask_rate"),
            settings=facts.config.to_dict(),
            transformers=f"transformers {self.opens_in}",
            software=__version__,
        )

    def _start(self) -> str:
        """Describe the start model without its path."""
        if not self.facts.config.model.start:
            return "random weights"
        new_head = ", with a new head for masked language modeling" if self.facts.state.get(NEW_HEAD) else ""
        return self._start_model() + new_head

    def _start_model(self) -> str:
        start = self.facts.config.model.start
        if self.base_model:
            return f"[{self.base_model}](https://huggingface.co/{self.base_model})"
        folder = Path(start)
        if (folder / RUN_STATE).is_file():
            before = read_state(folder / RUN_STATE)
            return f"step {before['step']:,} of an earlier megatron-detour run, after {before['tokens']:,} tokens"
        return f"a local folder, {markdown(folder.name)}, whose hub id is not stated"

    def _recipe(self) -> str:
        """Return, for instance, CLM on 10B tokens, then MLM (15% masked) on 1B tokens."""
        parts = []
        for phase in self.facts.plan.phases:
            details = phase.objective.details()
            keys = f" ({details})" if details else ""
            parts.append(f"{phase.objective.label}{keys} on {compact(phase.tokens)} tokens")
        return ", then ".join(parts)

    def _phases(self) -> Table:
        header = ["Phase", "Objective", "Tokens", "Steps", "Learning rate", "Input", "Frozen"]
        rows = []
        for phase, said in zip(self.facts.plan.phases, self.facts.plan.to_dict()["phases"], strict=True):
            rows.append(
                [
                    phase.name,
                    phase.objective.label,
                    _of(self.facts.tokens_of(phase), phase.tokens),
                    _of(self.facts.steps_of(phase), phase.steps),
                    format_lr(said["learning_rate"]),
                    phase.objective.details() or "unchanged",
                    frozen_words(said) or "nothing",
                ]
            )
        return Table(header, rows, align="llrrl")

    def _corpora(self) -> Table:
        """Return the table of corpora, without columns that are entirely unknown."""
        corpora = self.facts.corpora
        said = [self.given.corpora.get(corpus.name, CorpusFacts()) for corpus in corpora]
        columns: dict[str, list[str]] = {
            "Corpus": [_linked(more.title or c.name, more.url) for c, more in zip(corpora, said, strict=True)]
        }
        if any(more.description for more in said):
            columns["Description"] = [more.description or "not stated" for more in said]
        if any(corpus.documents is not None for corpus in corpora):
            columns["Documents"] = [_known(corpus.documents) for corpus in corpora]
            columns["Tokens"] = [_known(corpus.tokens) for corpus in corpora]
            columns["Read"] = [self._times_read(corpus) for corpus in corpora]
        columns["Share"] = [_share_words(corpus, len(self.facts.plan.phases)) for corpus in corpora]
        if any(corpus.cleaning for corpus in corpora):
            columns["Filters"] = [corpus.cleaning or "unknown" for corpus in corpora]
            columns["Held out"] = [corpus.held_out or "unknown" for corpus in corpora]
        columns["License"] = [more.license or NOT_STATED for more in said]
        return Table(list(columns), [list(row) for row in zip(*columns.values(), strict=True)], align="l")

    def _times_read(self, corpus: Corpus) -> str:
        if not corpus.tokens:
            return "unknown"
        phases = self.facts.plan.phases
        read = sum(self.facts.tokens_of(phase) * corpus.shares.get(phase.name, 0) for phase in phases)
        return f"about {read / corpus.tokens:.2g} times"

    def _validation(self) -> Table:
        boundaries = self.facts.run.boundaries()
        rows = validation_rows([boundary.record for boundary in boundaries])
        cells = [[row.title, *row.texts("not measured")] for row in rows if not row.corpus or row.key in BY_CORPUS]
        return Table(["Metric", *(boundary.title for boundary in boundaries)], cells)

    def _scores(self) -> Table:
        rows = []
        for row in self.evaluation or []:
            spread = "one seed" if row["sd"] is None else f"{100 * row['sd']:.1f}"
            metric = str(row["metric"]).replace("_", " ")
            rows.append([row["title"], metric, f"{100 * row['mean']:.1f}", spread, str(row["seeds"])])
        return Table(["Task", "Metric", "Mean", "Standard deviation", "Seeds"], rows, align="llr")

    def _hardware(self) -> Table:
        rows: dict[tuple[str, ...], list[float]] = {}
        for session in self.facts.sessions:
            kind = (f"{session['ranks']} x {session['device']}", f"{session['tensor_parallel']}", f"{session['dtype']}")
            counted = rows.setdefault(kind, [0, 0.0])
            counted[0] += session["steps"]
            counted[1] += session["seconds"]
        header = ["Devices", "Tensor-parallel size", "Dtype", "Steps", "Training time"]
        return Table(
            header,
            [
                [*kind, f"{steps:,}", duration(seconds) if seconds else "not recorded"]
                for kind, (steps, seconds) in rows.items()
            ],
        )

    def _padding(self) -> float | None:
        """The fraction of tokens that was padding, or None if not recorded."""
        return self.facts.run.steps.mean("padding_share", "sequences")


def refuse_unknown_corpora(given: CardMetadata, corpora: list[Corpus]) -> None:
    """Raise DetourError for a corpus of --card-facts that no phase reads."""
    names = [corpus.name for corpus in corpora]
    for name in given.corpora:
        if name not in names:
            hint = nearest(name, names) or f"; it has {', '.join(names)}"
            raise DetourError(f"--card-facts: corpora.{name}: the run reads no corpus of this name{hint}")


def _paragraphs(text: str) -> str:
    return "\n\n".join(markdown(part) for part in re.split(r"\n\s*\n", text) if part.strip())


def _line(text: str) -> str:
    return visible(" ".join(text.split()))


def _number(settings: Any, key: str) -> float | None:
    value = settings.get(key) if isinstance(settings, dict) else None
    return value if type(value) in (int, float) else None


def _of(done: int, planned: int) -> str:
    return f"{planned:,}" if done == planned else f"{done:,} of {planned:,}"


def _known(count: int | None) -> str:
    return "unknown" if count is None else f"{count:,}"


def _linked(title: str, url: str | None) -> str:
    return Formatted(f"[{markdown(title)}]({url})") if url else title


def _share_words(corpus: Corpus, phases: int) -> str:
    shares = {phase: f"{100 * share:.3g}%" for phase, share in corpus.shares.items()}
    if len(shares) == phases and len(set(shares.values())) == 1:
        return next(iter(shares.values()))
    return ", ".join(f"{phase}: {share}" for phase, share in shares.items())
