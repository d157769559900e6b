"""The two files that a study's page is made from: registration.json, and results.jsonl, a JSON object per line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import msgspec

from megatron_detour.errors import DetourError
from megatron_detour.structured import read_json_object

REGISTRATION, RESULTS = "registration.json", "results.jsonl"
FORMAT = 1
START = "start"  # the start model, as an arm
DONE = "done"  # the status of a run that reached its end
OUTCOMES = {  # of a criterion, and what each means
    "Met": "the claim is shown at its level",
    "Met by absence": "no gain is shown, which a small study meets too: see what its interval allows",
    "Undecided": "neither the claim nor its opposite is shown",
    "Contradicted": "the interval lies on the other side of the claim",
    "Not met": "the claim does not hold for these results",
    "Not judged": "the results do not suffice",
}
LOSS, NEEDLE = "loss", "needle"  # measures of arms: final validation loss under fixed masks, accuracy on needles
Parts = Literal["none", "low", "mid", "deep", "attention", "mlp", "all"]  # of a transplant
PARTS = get_args(Parts)
Layers = tuple[tuple[float, ...], ...]  # [draws][layers]


class Record(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """A result; `kind` is the tag of its class."""


class RunRecord(Record, frozen=True, kw_only=True, tag="run"):
    """A pretraining run that has ended. `loss` is the final validation loss under fixed masks, None without one.

    The first `shared_tokens` of its `tokens` are those of another run; `seconds` are of the others.
    """

    arm: str
    seed: int
    tokens: int
    seconds: float
    loss: float | None
    status: str = DONE
    shared_tokens: int = 0
    parameters: int | None = None
    curve: tuple[tuple[float, float | None], ...] = ()  # tokens, MLM validation loss
    phases: tuple[tuple[str, float, float, float | None], ...] = ()  # name, first and last token, loss at its end

    @property
    def finished(self) -> bool:
        return self.status == DONE

    @property
    def loss_before_last_phase(self) -> float | None:
        return self.phases[-2][3] if len(self.phases) > 1 else None


class ScoreRecord(Record, frozen=True, kw_only=True, tag="score"):
    """The score (fraction) of one fine-tuning; `seed` is that of pretraining, None for the start model."""

    arm: str
    seed: int | None
    task: str
    metric: str
    finetuning_seed: int
    score: float
    seconds: float | None = None


class DriftRecord(Record, frozen=True, kw_only=True, tag="drift"):
    """1 - CKA of `arm` and `reference`, and of two runs of `reference` that differ by their seed."""

    arm: str
    reference: str
    seed: int
    divergence: Layers
    noise: Layers | None = None


class PersistenceRecord(Record, frozen=True, kw_only=True, tag="persistence"):
    """1 - CKA of the checkpoints of a phase of `arm`, by the tokens since it began, and `reference` before it."""

    arm: str
    reference: str
    seed: int
    points: tuple[tuple[float, Layers], ...]


class TransplantRecord(Record, frozen=True, kw_only=True, tag="transplant"):
    """`recipient` with these parts of `donor`: `none`, `all`, or one between.

    `score` (fraction) is that of a linear probe on `task`, `loss` the validation loss under fixed masks; either may be
    missing.
    """

    donor: str
    recipient: str
    seed: int
    parts: Parts
    task: str = ""
    score: float | None = None
    loss: float | None = None


class NeedleRecord(Record, frozen=True, kw_only=True, tag="needle"):
    """The share of `examples` test questions that a classifier on the frozen [CLS] answers rightly; guessing gives 0.5.

    `by_length` and `by_place` have the shares by tokens and by place in the document.
    """

    arm: str
    seed: int
    accuracy: float
    examples: int
    by_length: tuple[tuple[int, float], ...]
    by_place: tuple[tuple[str, float], ...]


class FailureRecord(Record, frozen=True, kw_only=True, tag="failure"):
    """A job that failed, or was skipped because one that it needs failed."""

    job: str
    status: Literal["failed", "skipped"]
    message: str


class VersionsRecord(Record, frozen=True, kw_only=True, tag="versions"):
    """The versions of each package under which jobs were done."""

    versions: dict[str, tuple[str, ...]]


class VerdictRecord(Record, frozen=True, kw_only=True, tag="verdict"):
    """A judged criterion; `met` is None if it could not be judged. `outcome` is a name of OUTCOMES."""

    criterion: str
    text: str
    met: bool | None
    sentence: str
    outcome: str = ""
    p: float | None = None
    mean: float | None = None
    low: float | None = None
    high: float | None = None


Analyzed = DriftRecord | PersistenceRecord | TransplantRecord | NeedleRecord
Result = RunRecord | ScoreRecord | Analyzed | FailureRecord | VersionsRecord | VerdictRecord


class ArmFacts(msgspec.Struct, frozen=True):
    phases: tuple[dict[str, Any], ...]
    about: str = ""


class Corpus(msgspec.Struct, frozen=True):
    sha256: str
    tokens: int
    documents: int


class Facts(msgspec.Struct, frozen=True):
    """What the results depend on besides the study file."""

    start: str | None = None  # hash of the start model, None if it is not a local folder
    corpora: dict[str, Corpus] = {}
    protocol: dict[str, dict[str, Any]] = {}  # settings of fine-tuning by task
    versions: dict[str, str] = {}


class PowerFacts(msgspec.Struct, frozen=True):
    effect_points: float | None
    level: float
    statement: str


class Amendment(msgspec.Struct, frozen=True):
    when: str
    reason: str
    changes: tuple[str, ...] = ()


class Registration(msgspec.Struct, frozen=True):
    """What was to be run and tested; `study` is the study file as a plain mapping."""

    format: int
    name: str
    registered: str
    sha256: str
    study: dict[str, Any]
    arms: dict[str, ArmFacts]
    depth: int
    facts: Facts = Facts()
    about: str = ""
    power: PowerFacts | None = None
    amendments: tuple[Amendment, ...] = ()


def read_registration(folder: Path) -> Registration:
    """Raises DetourError for a missing or damaged registration."""
    path = Path(folder) / REGISTRATION
    try:
        found = msgspec.convert(read_json_object(path), Registration)
    except FileNotFoundError:
        raise DetourError(f"{path}: no such file; give the folder of a study that has begun") from None
    except msgspec.ValidationError as error:
        raise DetourError(f"{path}: not a registration: {error}") from None
    if found.format != FORMAT:
        raise DetourError(f"{path}: format {found.format}, and this version reads {FORMAT}")
    return found


def read_records(folder: Path) -> list[Record]:
    """Return the results so far, none if there is no file. Raises DetourError, with the line, for damaged ones."""
    path = Path(folder) / RESULTS
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DetourError(f"{path}: cannot be read: {error.strerror}") from None
    decoder, records = msgspec.json.Decoder(Result), []
    for number, line in enumerate(lines, start=1):
        try:
            records += [_checked(decoder.decode(line))] if line.strip() else []
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise DetourError(f"{path}, line {number}: not a result of a study: {error}") from None
    return records


def _checked(record: Record) -> Record:
    """Raises ValueError for figures that are not one table [draws][layers] each."""
    tables: list[Layers | None] = []
    if isinstance(record, DriftRecord):
        tables = [record.divergence, record.noise]
    elif isinstance(record, PersistenceRecord):
        tables = [table for _, table in record.points]
    for table in tables:
        if table is not None and (not table or len({len(row) for row in table}) != 1):
            raise ValueError("draws of different numbers of layers")
    return record
