"""A tokenizer that extends another one: every old piece keeps its id, and the new pieces follow."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from megatron_detour.errors import DetourError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


def new_pieces(old: Tokenizer, new: Tokenizer) -> dict[int, list[int]]:
    """Return for each id that `new` adds to `old` the old ids of the same text, at least one.

    Raises DetourError with the reason if `new` does not extend `old`.
    """
    reason = next(_differences(old, new), None)
    if reason:
        raise DetourError(reason)
    known, added, cut = old.get_vocab(), new.get_added_tokens_decoder(), _cutter(old)
    pieces = {}
    for piece, number in sorted(new.get_vocab().items(), key=lambda item: item[1]):
        if piece not in known:
            pieces[number] = old.encode(piece, add_special_tokens=False).ids if number in added else cut(piece)
            if not pieces[number]:
                raise DetourError(f"no old piece stands for its {piece!r}")
    return pieces


def _differences(old: Tokenizer, new: Tokenizer) -> Iterator[str]:
    """Yield reasons why `new` does not extend `old`."""
    before, after = (json.loads(tokenizer.to_str()) for tokenizer in (old, new))
    yield from (f"its {step} differs" for step in STEPS if before[step] != after[step])
    old_model, new_model = before["model"], after["model"]
    if _settings(old_model) != _settings(new_model):
        yield "its model has other settings"
    ids, known = new.get_vocab(), old.get_vocab()
    in_order = sorted(known, key=known.__getitem__)
    yield from (f"its {piece!r} has another id or is missing" for piece in in_order if ids.get(piece) != known[piece])
    if any(token not in after["added_tokens"] for token in before["added_tokens"]):
        yield "its added tokens differ"
    for what in ("merges", "vocab"):  # a Unigram model's vocabulary is a list, with scores
        pieces = old_model.get(what)
        if isinstance(pieces, list) and new_model[what][: len(pieces)] != pieces:
            yield f"its {'merges' if what == 'merges' else 'scores'} do not begin with the old ones"
    size = max(known.values()) + 1
    if sorted(ids[piece] for piece in ids.keys() - known.keys()) != [*range(size, max(ids.values()) + 1)]:
        yield "its new ids do not follow the old ones"


def _settings(model: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in model.items() if key not in ("vocab", "merges")}


def _cutter(old: Tokenizer) -> Callable[[str], list[int]]:
    """Return what cuts a piece into ids of the old model."""
    from tokenizers import models

    model = old.model
    if not isinstance(model, models.WordPiece):
        return lambda piece: [token.id for token in model.tokenize(piece)]
    prefix, unk = model.continuing_subword_prefix, model.unk_token
    inner = {piece.removeprefix(prefix): id_ for piece, id_ in old.get_vocab().items() if piece.startswith(prefix)}
    inside = models.WordPiece(inner | {unk: old.token_to_id(unk)}, unk_token=unk, continuing_subword_prefix="")

    def cut(piece: str) -> list[int]:
        part = inside if piece.startswith(prefix) else model
        return [token.id for token in part.tokenize(piece.removeprefix(prefix))]

    return cut
