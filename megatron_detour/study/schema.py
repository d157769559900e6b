"""The study file as frozen dataclasses: arms, seeds, evaluation, analyses and criteria."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_detour.analysis.drift import COUNT, DRAWS
from megatron_detour.analysis.layer_choice import THRESHOLD
from megatron_detour.analysis.needle_examples import DOCUMENTS, NeedleOptions
from megatron_detour.settings import AnyText, Entries, Range

SEED = Range(least=0, below=2**31)
SHARE = Range(above=0, below=1)
AT_LEAST_ONE = Range(least=1)


@dataclass(frozen=True)
class Arm:
    """A way of pretraining: the base run file with some keys changed."""

    about: Annotated[AnyText, "what the arm is, for the page"] = ""
    control: Annotated[float | None, SHARE, "detour phases become MLM at this mask rate"] = None
    set: Annotated[
        dict[str, Any],
        "dotted keys of the run file and their values; in `freeze`, `low`, `mid` and `deep` are thirds of the layers",
    ] = field(default_factory=dict)
    seed_offset: Annotated[
        int, SEED, "added to the seed of the masks, not to that of the data order: a second run of the same recipe"
    ] = 0
    evaluate: Annotated[bool, "false for an arm that only serves an analysis"] = True


@dataclass(frozen=True)
class Evaluation:
    """Fine-tuning of every arm and training seed on downstream tasks."""

    data: Annotated[str, "directory with one folder per task"]
    tasks: Annotated[tuple[str, ...], Entries(least=1, unique=True), "task names, or YAML files"]
    protocol: Annotated[str, "a packaged protocol, or a YAML file"] = "quick"
    set: Annotated[dict[str, Any], "keys of the protocol and their values"] = field(default_factory=dict)
    seeds: Annotated[int | None, AT_LEAST_ONE, "seeds of fine-tuning per task; those of the protocol unless set"] = None


@dataclass(frozen=True)
class Texts:
    files: Annotated[tuple[str, ...], Entries(least=1), "held-out texts: .jsonl[.gz] or .txt"]
    count: Annotated[int, Range(least=2), "texts per draw"] = COUNT
    draws: Annotated[tuple[Annotated[int, SEED], ...], Entries(least=1, unique=True), "seeds of the draws"] = DRAWS
    max_tokens: Annotated[int, AT_LEAST_ONE, "tokens of a text; longer ones are cut"] = 512


@dataclass(frozen=True)
class DriftAnalysis:
    """1 - CKA of two arms per layer, relative to that of two runs of one recipe with different seeds."""

    texts: Texts
    of: Annotated[tuple[str, ...], Entries(least=1, unique=True), "arms to compare with `reference`"] = ("detour",)
    reference: Annotated[str, "arm that they are compared with"] = "control"
    noise: Annotated[str | None, "arm that differs from `reference` by its seed only"] = None


@dataclass(frozen=True)
class PersistenceAnalysis:
    """Drift along the checkpoints of a phase from the reference before its own last phase."""

    texts: Texts
    arm: Annotated[str, "arm whose checkpoints are followed; set its `checkpoint.keep_every`"] = "detour"
    phase: Annotated[str, "phase whose checkpoints are followed"] = "decay"
    reference: Annotated[str, "arm whose checkpoint before this phase is the reference"] = "control"


@dataclass(frozen=True)
class TransplantAnalysis:
    """Parts of one arm's model copied into another's, judged by the run's validation loss and by a linear probe."""

    task: Annotated[str | None, "classification task of the probe; without one the loss alone judges"] = None
    donor: Annotated[str, "arm that gives the parts"] = "detour"
    recipient: Annotated[str, "arm that receives them"] = "control"


@dataclass(frozen=True)
class NeedleAnalysis:
    """Whether a frozen model's [CLS] tells that a fact is in a long document."""

    files: Annotated[tuple[str, ...], Entries(least=1), "documents in which facts are hidden: .jsonl[.gz] or .txt"]
    of: Annotated[tuple[str, ...], Entries(least=1, unique=True), "arms to test"] = ("detour", "control")
    documents: Annotated[int, AT_LEAST_ONE, "documents that are drawn"] = DOCUMENTS
    options: Annotated[NeedleOptions, "flags of megatron-detour analyze needle"] = field(default_factory=NeedleOptions)


@dataclass(frozen=True)
class LayerAnalysis:
    """Which layers the detour needs, proposed from the drift of this study: the pilot of a further one."""

    arm: Annotated[str, "arm of the drift analysis whose drift decides"] = "detour"
    threshold: Annotated[float, Range(above=0), "of the drift ratio"] = THRESHOLD


@dataclass(frozen=True)
class Analyses:
    drift: Annotated[DriftAnalysis | None, "drift per layer and its ratio to the noise of seeds"] = None
    persistence: Annotated[PersistenceAnalysis | None, "whether the drift outlasts the decay"] = None
    transplants: Annotated[TransplantAnalysis | None, "which layers carry the difference"] = None
    needle: Annotated[NeedleAnalysis | None, "whether facts in long documents are found"] = None
    layers: Annotated[LayerAnalysis | None, "which layers could be frozen in a further study"] = None


@dataclass(frozen=True)
class Power:
    """Standard deviations, in points, from which the study says beforehand what it could find."""

    training_sd: Annotated[float, Range(least=0), "of an arm's mean over training seeds"]
    finetuning_sd: Annotated[float, Range(least=0), "of a task's score over seeds of fine-tuning"]
    source: Annotated[str, "where the two come from"] = "assumed"


@dataclass(frozen=True)
class StudyConfig:
    name: Annotated[str, "name of the study"]
    folder: Annotated[str, "directory of the study, relative to the current one"]
    run: Annotated[str, "the base run file, relative to the study file; or a packaged recipe"]
    arms: Annotated[dict[str, Arm], "ways of pretraining, by name"]
    seeds: Annotated[
        tuple[Annotated[int, SEED], ...], Entries(least=1, unique=True), "training seeds: of masks and of data order"
    ]
    criteria: Annotated[dict[str, str], "what the study tests, by name; see docs/studies.md for the language"]
    about: Annotated[AnyText, "the question, in a sentence or two"] = ""
    evaluation: Annotated[Evaluation | None, "fine-tuning on downstream tasks"] = None
    analyses: Analyses = field(default_factory=Analyses)
    power: Annotated[Power | None, "for the forecast of what the study could find"] = None
    ranks: Annotated[int, AT_LEAST_ONE, "ranks of a training run"] = 1
