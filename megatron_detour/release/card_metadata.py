"""What only whoever releases a model can say of it: name, languages, licence, where the corpora come from."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from megatron_detour.errors import DetourError, nearest
from megatron_detour.structured import read_yaml

# ISO 639-1, two letters a language.
_CODES = (
    "aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en "
    "eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv "
    "ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne "
    "ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st "
    "su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
LANGUAGES = frozenset(_CODES.split())
OF_A_CORPUS = ("title", "licence", "description", "url")


@dataclass(frozen=True)
class CardMetadata:
    """What is said on the command line or in a file of --card-facts; nothing of it is guessed."""

    name: str | None = None
    languages: tuple[str, ...] = ()  # ISO 639 codes
    licence: str | None = None  # of the weights: an identifier such as apache-2.0, or a licence's name
    base_model: str | None = None  # hub id of the model that the training started from
    description: str | None = None
    contact: str | None = None
    domain: str | None = None  # such as medical or legal: some limits are told of some domains only
    tags: tuple[str, ...] = ()
    corpora: dict[str, dict[str, str]] = field(default_factory=dict)  # by name: title, licence, description, url

    def __post_init__(self) -> None:
        for code in self.languages:
            if code not in LANGUAGES and not re.fullmatch(r"[a-z]{3}", code):
                raise DetourError(
                    f"{code!r} is not a language code; give those of ISO 639 such as en or fr (two letters, or three "
                    "where a language has no two)"
                )
        for said in self.corpora.values():
            if "url" in said and not re.fullmatch(r"https?://[^\s()<>]+", said["url"]):
                raise DetourError(f"{said['url']!r} is not a URL; give one that begins with http:// or https://")
        if self.base_model and not re.fullmatch(r"[\w.-]+/[\w.-]+", self.base_model):
            raise DetourError(
                f"{self.base_model!r} is not a hub id; give OWNER/NAME, such as answerdotai/ModernBERT-base"
            )

    def over(self, other: CardMetadata) -> CardMetadata:
        """These facts, and the other's where these say nothing."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return dataclasses.replace(other, **{name: value for name, value in own.items() if value})


def read_card_metadata(file: str) -> CardMetadata:
    """Reads a YAML file with keys of CardMetadata, all of them optional. Raises DetourError."""
    try:
        raw = read_yaml(file)
    except OSError as error:
        raise DetourError(f"--card-facts {file}: cannot be read: {error.strerror}") from None
    except DetourError as fault:
        raise DetourError(f"--card-facts {fault}") from None
    known = [f.name for f in dataclasses.fields(CardMetadata)]
    if not isinstance(raw, dict):
        raise DetourError(f"--card-facts {file}: a mapping with some of {', '.join(known)} is needed")
    values = {}
    for key, value in raw.items():
        if key not in known:
            raise DetourError(f"--card-facts {file}: there is no key {key!r}{nearest(str(key), known)}")
        values[key] = _value(key, value, f"--card-facts {file}: {key}")
    try:
        return CardMetadata(**values)
    except DetourError as fault:
        raise DetourError(f"--card-facts {file}: {fault}") from None


def _value(key: str, value: Any, place: str) -> Any:
    if key in ("languages", "tags"):
        if not isinstance(value, list) or not all(isinstance(item, str) and item.strip() for item in value):
            raise DetourError(f"{place}: a list of texts is needed, it is {value!r}")  # YAML takes a bare no for false
        return tuple(value)
    if key != "corpora":
        return _text(value, place)
    if not isinstance(value, dict):
        raise DetourError(f"{place}: a mapping from the corpora's names to {', '.join(OF_A_CORPUS)} is needed")
    return {str(name): _of_a_corpus(said, f"{place}.{name}") for name, said in value.items()}


def _of_a_corpus(said: Any, place: str) -> dict[str, str]:
    if not isinstance(said, dict):
        raise DetourError(f"{place}: a mapping with some of {', '.join(OF_A_CORPUS)} is needed")
    for key in said:
        if key not in OF_A_CORPUS:
            raise DetourError(f"{place}: there is no key {key!r}{nearest(str(key), list(OF_A_CORPUS))}")
    return {key: _text(value, f"{place}.{key}") for key, value in said.items()}


def _text(value: Any, place: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise DetourError(f"{place}: a text is needed, it is {value!r}")
    return value.strip()
