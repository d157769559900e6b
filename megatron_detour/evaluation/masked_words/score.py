"""Score a masked language model on the masked words of windows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.masked_words.positions import Window
from megatron_detour.evaluation.models import most_positions


@dataclass
class WordScore:
    """One masked word: the negative log-likelihood of its tokens in nats, whether the argmax is right for all of them,
    their number, and whether one is the unknown token or the word has no token."""

    loss: float = 0.0
    right: bool = True
    tokens: int = 0
    unknown: bool = False


@dataclass(frozen=True)
class Masked:
    """A tokenized window: ids with masks, and for each masked position the true id and the indices of the words that
    its token overlaps."""

    ids: list[int]
    positions: list[int]
    answers: list[int]
    words: list[list[int]]


def mask_window(window: Window, tokenizer: PreTrainedTokenizerBase) -> Masked:
    """Mask every token that overlaps a chosen word, and tokens that are only the space before one."""
    encoded = tokenizer(window.text, return_offsets_mapping=True, truncation=False, verbose=False)
    masked = Masked(list(encoded["input_ids"]), [], [], [])
    for at, (start, end) in enumerate(encoded["offset_mapping"]):
        words = [
            word
            for word, (first, past) in enumerate(window.chosen)
            if (start < past and end > first and start < end) or (end == first and window.text[start:end] == " ")
        ]
        if words:
            masked.positions.append(at)
            masked.answers.append(masked.ids[at])
            masked.words.append(words)
            masked.ids[at] = tokenizer.mask_token_id
    return masked


def score_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    batch_tokens: int,
    report: Callable[[int], None] = lambda done: None,
) -> list[list[WordScore]]:
    """Return the scores of each window's chosen words. `report` receives the number of windows newly done.

    A batch has windows of similar length and at most `batch_tokens` positions including padding, or one window.
    Raises DetourError for a window longer than the model's maximum input.
    """
    masked = [mask_window(window, tokenizer) for window in windows]
    longest, limit = max((len(one.ids) for one in masked), default=0), most_positions(model, tokenizer)
    if longest > limit:
        raise DetourError(
            f"a window has {longest:,} tokens, but the model reads {limit:,}; lower --window-words for all models"
        )
    scores: list[list[WordScore]] = [[] for _ in windows]
    for batch in _batches([len(one.ids) for one in masked], batch_tokens):
        losses, right = _score_batch(model, tokenizer.pad_token_id or 0, [masked[at] for at in batch])
        for number in batch:
            count = len(masked[number].positions)
            scores[number] = _word_scores(
                masked[number], len(windows[number].chosen), losses[:count], right[:count], tokenizer.unk_token_id
            )
            losses, right = losses[count:], right[count:]
        report(len(batch))
    return scores


def _word_scores(
    masked: Masked, count: int, losses: list[float], right: list[bool], unknown_id: int | None
) -> list[WordScore]:
    """Sum losses per word. A token that overlaps several words divides its loss evenly, and all need it right."""
    scores = [WordScore() for _ in range(count)]
    for words, answer, loss, guessed in zip(masked.words, masked.answers, losses, right, strict=True):
        for word in words:
            scores[word].loss += loss / len(words)
            scores[word].right &= guessed
            scores[word].tokens += 1
            scores[word].unknown |= answer == unknown_id
    for score in scores:
        if not score.tokens:
            score.right, score.unknown = False, True
    return scores


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        if batch and lengths[batch[0]] * (len(batch) + 1) > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@torch.inference_mode()
def _score_batch(model: PreTrainedModel, padding: int, batch: Sequence[Masked]) -> tuple[list[float], list[bool]]:
    """Return loss and correctness of all masked positions, window by window."""
    width = max(len(one.ids) for one in batch)

    def on_device(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=model.device)

    ids = on_device([one.ids + [padding] * (width - len(one.ids)) for one in batch])
    mask = on_device([[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in batch])
    where = on_device([row * width + at for row, one in enumerate(batch) for at in one.positions])
    answers = on_device([answer for one in batch for answer in one.answers])
    with _decoding_only(model, where):
        logits = model(input_ids=ids, attention_mask=mask).logits
    logits = (logits if logits.dim() == 2 else logits.flatten(0, 1)[where]).float()
    losses = torch.nn.functional.cross_entropy(logits, answers, reduction="none")
    if not losses.isfinite().all():
        raise DetourError("the model's likelihoods are NaN or infinite; its weights are damaged or overflow in bf16")
    return losses.double().tolist(), (logits.argmax(-1) == answers).tolist()


@contextmanager
def _decoding_only(model: PreTrainedModel, where: Tensor) -> Iterator[None]:
    """Pass only these positions of the flattened batch to the output layer, which dominates a small model's time and
    every model's memory. If the model has no such layer, or flattens batches itself, compute all logits."""

    def pick(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0].flatten(0, 1)[where], *inputs[1:]) if inputs[0].dim() == 3 else None

    decoder = model.get_output_embeddings()
    handle = decoder.register_forward_pre_hook(pick) if decoder is not None else None
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()
