"""What only the author of a release knows: the model's name, languages, license, the origin of the corpora."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

from megatron_detour.errors import DetourError
from megatron_detour.settings import Enclosing, Parsed, Pattern, read
from megatron_detour.structured import read_facts

# ISO 639-1
_CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv "
    "ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne "
    "ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st "
    "su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
LANGUAGES = frozenset(_CODES.split())
LANGUAGE = Pattern(
    "|".join(sorted(LANGUAGES)) + "|[a-z]{3}",
    "a language code of ISO 639 such as en or fr (two letters, or three where a language has no two)",
)


def _stripped(raw: Any, _: Enclosing) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError("non-empty text")
    return raw.strip()


Text = Annotated[str, Parsed(_stripped, {"type": "string", "minLength": 1})]  # one or more lines


@dataclass(frozen=True)
class CorpusFacts:
    title: Text | None = None
    license: Text | None = None
    description: Text | None = None
    url: Annotated[Text | None, Pattern(r"https?://[^\s()<>]+", "a URL that begins with http:// or https://")] = None


@dataclass(frozen=True)
class CardMetadata:
    """Values from the command line or a --card-facts file; none is guessed."""

    name: Text | None = None
    languages: Annotated[tuple[Annotated[Text, LANGUAGE], ...], "ISO 639 codes"] = ()
    license: Annotated[Text | None, "of the weights: an identifier such as apache-2.0, or a license's name"] = None
    base_model: Annotated[
        Text | None,
        Pattern(r"[\w.-]+/[\w.-]+", "a hub id OWNER/NAME such as answerdotai/ModernBERT-base"),
        "hub id of the model that the training started from",
    ] = None
    description: Text | None = None
    contact: Text | None = None
    domain: Annotated[Text | None, "such as medical or legal: the card states some limits only for some domains"] = None
    tags: tuple[Text, ...] = ()
    corpora: Annotated[dict[str, CorpusFacts], "by name"] = field(default_factory=dict)

    def over(self, other: CardMetadata) -> CardMetadata:
        """Return these facts, completed with the other's."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(other, **{name: value for name, value in own.items() if value})


def read_card_metadata(file: str) -> CardMetadata:
    """Read a YAML file with keys of CardMetadata, all of them optional. Raises DetourError."""
    try:
        raw = read_facts(file)
    except OSError as error:
        raise DetourError(f"--card-facts {file}: cannot be read: {error.strerror}") from None
    except DetourError as fault:
        raise DetourError(f"--card-facts {fault}") from None
    return read(CardMetadata, raw, f"--card-facts {file}")
