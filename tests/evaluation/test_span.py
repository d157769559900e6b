"""The span head: its CRF against all paths, decoding, padding, missing words, and that it learns."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from transformers import ModernBertConfig, ModernBertModel

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.task_types.span.crf import FORBIDDEN, BoundaryCrf, best_spans, legal_moves, path_tags
from megatron_detour.evaluation.task_types.span.head import LONGEST_SPAN, SpanTagger

PAD, CLS, SEP = 0, 1, 2
TYPES = ("Drug", "Illness")


def tagger(dropout: float = 0.0, seed: int = 0) -> SpanTagger:
    torch.manual_seed(seed)
    config = ModernBertConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=PAD,
        bos_token_id=CLS,
        cls_token_id=CLS,
        eos_token_id=SEP,
        sep_token_id=SEP,
    )
    return SpanTagger(ModernBertModel(config), TYPES, hidden=32, layers=2, biaffine=8, dropout=dropout)


def random_crf(types: int, seed: int = 0) -> BoundaryCrf:
    torch.manual_seed(seed)
    crf = BoundaryCrf(types)
    with torch.no_grad():
        for parameter in crf.parameters():
            parameter.normal_()
    return crf


def all_paths(crf: BoundaryCrf, emissions: torch.Tensor) -> dict[tuple[int, ...], float]:
    """Every path of one sentence and its score, legal or not."""
    transitions, first, final = (scores.tolist() for scores in crf.scores())
    seen, found = emissions.tolist(), {}
    for path in itertools.product(range(emissions.shape[1]), repeat=len(emissions)):
        moved = sum(transitions[a][b] for a, b in itertools.pairwise(path))
        found[path] = first[path[0]] + moved + final[path[-1]] + sum(seen[at][tag] for at, tag in enumerate(path))
    return found


def spans_of(path: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """The entities of a legal path, read off its B, L and U."""
    spans, begun = [], 0
    for at, tag in enumerate(path):
        kind, part = divmod(tag - 1, 4)
        begun = at if tag and part in (0, 3) else begun
        if tag and part in (2, 3):
            spans.append((begun, at, kind))
    return spans


@pytest.mark.parametrize(("types", "lengths"), [(1, (5, 1, 3)), (2, (3, 2, 1))])
def test_partition_and_likelihood_are_those_of_all_paths(types, lengths):
    crf = random_crf(types)
    emissions = torch.randn(len(lengths), max(lengths), 1 + 4 * types)
    partition = crf.log_partition(emissions, torch.tensor(lengths))
    for row, length in enumerate(lengths):
        paths = all_paths(crf, emissions[row, :length])
        expected = torch.tensor(list(paths.values()), dtype=torch.float64).logsumexp(0)
        assert partition[row].item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_likelihood_that_is_a_distribution_over_sets_of_entities():
    crf, words = random_crf(1), 4
    emissions = torch.randn(1, words, 5)
    legal = {path for path, score in all_paths(crf, emissions[0]).items() if score > FORBIDDEN / 2}
    assert len({tuple(spans_of(path)) for path in legal}) == len(legal)
    total = 0.0
    for path in legal:
        assert path_tags(spans_of(path), words) == list(path)
        total += (-crf.loss(emissions, torch.tensor([words]), torch.tensor([path]))).exp().item()
    assert total == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(("types", "words"), [(1, 5), (2, 3), (1, 1)])
@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_decoding_finds_the_best_of_all_paths(types, words, weight):
    for seed in range(5):
        crf = random_crf(types, seed)
        emissions = torch.randn(words, 1 + 4 * types)
        extra = weight * torch.randn(types, words, words)
        paths = {
            path: score + sum(extra[kind, first, last].item() for first, last, kind in spans_of(path))
            for path, score in all_paths(crf, emissions).items()
            if score > FORBIDDEN / 2
        }
        best = max(paths, key=paths.get)
        assert best_spans(crf, emissions.numpy(), extra.numpy(), words) == spans_of(best)


def test_decoding_keeps_to_the_longest_span():
    crf = BoundaryCrf(1)
    emissions, extra = torch.zeros(6, 5).numpy(), torch.zeros(1, 6, 6).numpy()
    extra[0, 0, 5] = 100
    assert best_spans(crf, emissions, extra, 6) == [(0, 5, 0)]
    assert (0, 5, 0) not in best_spans(crf, emissions, extra, 5)


def test_moves_that_no_set_of_entities_has_are_excluded():
    moves, begins, ends = legal_moves(2)
    names = ["O", *(f"{part}{kind}" for kind in "xy" for part in "BILU")]
    allowed = {(a, b) for a in names for b in names if moves[names.index(a), names.index(b)]}
    for pair in (("O", "Ix"), ("O", "Lx"), ("Bx", "Iy"), ("Bx", "O"), ("Bx", "Bx"), ("Lx", "Ix"), ("Ux", "Lx")):
        assert pair not in allowed
    for pair in (("O", "O"), ("O", "Bx"), ("Bx", "Lx"), ("Bx", "Ix"), ("Ix", "Lx"), ("Lx", "By"), ("Ux", "Ux")):
        assert pair in allowed
    assert [name for name, legal in zip(names, begins, strict=True) if legal] == ["O", "Bx", "Ux", "By", "Uy"]
    assert [name for name, legal in zip(names, ends, strict=True) if legal] == ["O", "Lx", "Ux", "Ly", "Uy"]


# Words of one or two sub-tokens. An illness may have a word before it that is outside where it stands alone.
DRUGS, ILLNESSES, MODIFIERS, OTHERS = range(10, 20), range(20, 30), range(30, 34), range(34, 50)
SUFFIX = 50


def sentence(rng: random.Random) -> tuple[list[int], list[str]]:
    words, tags = [], []
    for _ in range(rng.randint(1, 6)):
        kind = rng.randrange(5)
        if kind == 0:
            words, tags = [*words, rng.choice(DRUGS)], [*tags, "B-Drug"]
        elif kind == 1:
            words, tags = [*words, rng.choice(ILLNESSES)], [*tags, "B-Illness"]
        elif kind == 2:
            new = [rng.choice(MODIFIERS), rng.choice(MODIFIERS), rng.choice(ILLNESSES)]
            words, tags = [*words, *new], [*tags, "B-Illness", "I-Illness", "I-Illness"]
        else:
            new = [rng.choice(OTHERS), rng.choice(MODIFIERS), rng.choice(OTHERS)]
            words, tags = [*words, *new], [*tags, "O", "O", "O"]
    return words, tags


def batch(model: SpanTagger, sentences: list[tuple[list[int], list[str]]], tokens: int = 0, words: int = 0) -> dict:
    """Pads to at least `tokens` and `words`. Every third word has a second sub-token."""
    rows = []
    for sentence_words, tags in sentences:
        ids, starts = [CLS], []
        for word in sentence_words:
            starts.append(len(ids))
            ids += [word, SUFFIX] if word % 3 == 0 else [word]
        rows.append(([*ids, SEP], starts, [model.tags.index(tag) for tag in tags]))
    tokens = max(tokens, *(len(ids) for ids, _, _ in rows), 0)
    words = max(words, *(len(starts) for _, starts, _ in rows), 0)
    return {
        "input_ids": torch.tensor([ids + [PAD] * (tokens - len(ids)) for ids, _, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (tokens - len(ids)) for ids, _, _ in rows]),
        "word_starts": torch.tensor([starts + [-1] * (words - len(starts)) for _, starts, _ in rows]),
        "labels": torch.tensor([tags + [-100] * (words - len(tags)) for _, _, tags in rows]),
    }


SENTENCES = [
    ([34], ["O"]),
    ([11], ["B-Drug"]),
    ([35, 36, 37, 12], ["O", "O", "O", "B-Drug"]),
    ([30, 31, 21, 15, 40, 22], ["B-Illness", "I-Illness", "I-Illness", "B-Drug", "O", "B-Illness"]),
]


def test_an_example_alone_and_in_a_padded_batch_scores_the_same():
    model = tagger().eval()
    together = batch(model, SENTENCES, tokens=30, words=20)
    out = model(**together)
    losses = []
    for row, (words, tags) in enumerate(SENTENCES):
        alone = model(**batch(model, [(words, tags)]))
        torch.testing.assert_close(out.logits[row, : len(words)], alone.logits[0], rtol=1e-4, atol=1e-5)
        assert not out.logits[row, len(words) :].any()
        assert out.tags[row, : len(words)].tolist() == alone.tags[0].tolist()
        losses.append(alone.loss.item() * len(words))
    assert out.loss.item() == pytest.approx(sum(losses) / sum(len(words) for words, _ in SENTENCES), rel=1e-4)


def test_tags_of_every_sentence_are_well_formed_and_of_its_length():
    model = tagger(dropout=0.5, seed=4)
    inputs = {key: value for key, value in batch(model, SENTENCES).items() if key != "labels"}
    counts = [len(words) for words, _ in SENTENCES]
    decoded = model.decode(**inputs, words=counts)
    assert model.training and [len(tags) for tags in decoded] == counts
    assert decoded == model.decode(**inputs, words=counts)  # without dropout
    assert {len(tags) for tags in model.decode(**inputs)} == {max(counts)}
    for tags in decoded:
        for before, tag in zip(["O", *tags], tags, strict=False):
            assert not tag.startswith("I-") or before[2:] == tag[2:]


def force(model: SpanTagger, spans: list[tuple[int, int, int]], words: int) -> None:
    """Makes the model decode these spans of the words that are there, whatever it reads."""
    tags = path_tags(spans, words)
    model.eval()
    model.emit.forward = lambda context: torch.eye(len(model.tags) * 2 - 1)[tags][None] * 100


def test_words_that_are_not_there_are_outside_or_inside_an_entity():
    model = tagger()
    inputs = batch(model, [SENTENCES[3]])
    inputs["word_starts"][0, 4:] = -1  # cut off
    force(model, [(0, 2, 1), (3, 3, 0)], 4)
    assert model(**inputs).tags.tolist() == [[3, 4, 4, 1, 0, 0]]
    inputs["word_starts"][0, 1] = -1  # a word without a token, inside an entity
    force(model, [(0, 1, 1), (2, 2, 0)], 3)
    assert model(**inputs).tags.tolist() == [[3, 4, 4, 1, 0, 0]]
    assert model(**inputs).loss < 10  # another path would have cost 100 a word


def test_a_batch_without_any_word_has_no_loss():
    model = tagger()
    inputs = batch(model, SENTENCES[:2])
    inputs["word_starts"][:] = -1
    model(**inputs).loss.backward()
    assert model.decode(**{key: inputs[key] for key in ("input_ids", "attention_mask", "word_starts")}) == [["O"]] * 2
    inputs = batch(model, SENTENCES)
    inputs["word_starts"][0] = -1  # one sentence of several
    assert model(**inputs).loss.isfinite()


def test_words_are_means_of_their_sub_tokens():
    model = tagger().eval()
    inputs = batch(model, [([12, 35], ["B-Drug", "O"])])  # [CLS] 12 suffix 35 [SEP]
    states = model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state[0]
    seen = []
    model.context.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(**inputs)
    torch.testing.assert_close(seen[0][0], torch.stack([states[1:3].mean(0), states[3]]))


def test_gradients_reach_every_part_and_both_groups_have_all_parameters():
    model = tagger(dropout=0.1)
    model(**batch(model, SENTENCES)).loss.backward()
    for part in (model.encoder, model.context, model.emit, model.crf, model.spans):
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in part.parameters()), part


def test_it_learns_under_the_trainer(tmp_path):
    from seqeval.metrics import f1_score
    from transformers import Trainer, TrainingArguments

    model, rng = tagger(dropout=0.1), random.Random(0)
    training, held_out = ([sentence(rng) for _ in range(count)] for count in (400, 60))
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=120,
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        remove_unused_columns=False,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=lambda sentences: batch(model, sentences),
        optimizers=(torch.optim.AdamW(model.parameters(), 3e-3), None),
    )
    gold = [tags for _, tags in held_out]
    before = trainer.predict(held_out)
    trainer.train()
    after = trainer.predict(held_out)
    decoded = [
        [model.tags[tag] for tag in row[: len(tags)]] for row, tags in zip(after.predictions[1], gold, strict=True)
    ]
    assert f1_score(gold, decoded) > 0.9
    assert after.metrics["test_loss"] < before.metrics["test_loss"] / 2
    inputs = {key: value for key, value in batch(model, held_out[:16]).items() if key != "labels"}
    assert model.decode(**inputs, words=[len(tags) for tags in gold[:16]]) == decoded[:16]


def test_wrong_shapes_are_told():
    encoder = tagger().encoder
    with pytest.raises(DetourError, match="got none"):
        SpanTagger(encoder, ())
    with pytest.raises(DetourError, match="distinct entity types, got A, A"):
        SpanTagger(encoder, ("A", "A"))
    with pytest.raises(DetourError, match="hidden 5: give an even number"):
        SpanTagger(encoder, ("A",), hidden=5)
    assert SpanTagger(encoder, ("B", "A")).tags == ("O", "B-A", "I-A", "B-B", "I-B")
    assert LONGEST_SPAN == 40
