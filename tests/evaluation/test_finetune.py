"""Fine-tuning: every type of task is learned, shuffled labels are not; losses, rates, and the state that is kept."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import transformers

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.examples import read_dataset
from megatron_detour.evaluation.finetuning.finetune import finetune
from megatron_detour.evaluation.finetuning.heads import build_optimizer, open_model
from megatron_detour.evaluation.finetuning.protocol import load_protocol
from megatron_detour.evaluation.report.random_baseline import random_baseline
from megatron_detour.evaluation.task import load_task
from megatron_detour.evaluation.task_types import METRICS, TASK_TYPES
from megatron_detour.evaluation.task_types.encode import IGNORED
from megatron_detour.model.families import FAMILIES
from tests.evaluation.small_tasks import write_small_tasks

pytestmark = pytest.mark.integration

SHARED = Path(__file__).parents[3] / "shared" / "data" / "tasks"


@pytest.fixture(scope="module")
def model(tokenizer_folder, tmp_path_factory):
    """An untrained ModernBERT of two layers as a folder."""
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", tokenizer_folder)


def write_tiny_model(folder, tokenizer_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        cls_token_id=tokenizer.cls_token_id,
        sep_token_id=tokenizer.sep_token_id,
    )
    transformers.set_seed(1)
    transformers.ModernBertForMaskedLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Data sets of tiny tasks, by type."""
    folder = tmp_path_factory.mktemp("tasks")
    return {
        kind: read_dataset(load_task(str(folder / f"{name}.yaml")), folder)
        for kind, name in write_small_tasks(folder).items()
    }


def settings_of(kind: str, *overrides: str):
    settings = dict(override.split("=", 1) for override in ("learning_rate=3e-3", "batch=8", *overrides))
    return load_protocol("quick", [f"{key}={value}" for key, value in settings.items()]).by_type[kind]


@pytest.mark.parametrize("kind", TASK_TYPES)
def test_a_type_is_learned_and_its_test_split_scored(kind, small, model, tmp_path):
    """Batches hold texts of like length here, which must not mix up whose prediction is whose."""
    dataset, shares = small[kind], []
    settings = settings_of(kind, "epochs=12")
    outcome = finetune(model, dataset, settings, 42, scratch=tmp_path, report=shares.append)
    metric = dataset.task.metric
    assert outcome.scores[metric] > random_baseline(METRICS[metric], dataset.labels, outcome.gold).score + 0.1
    own = {name: METRICS[name].score(dataset.labels, outcome.gold, outcome.predicted) for name in dataset.task.metrics}
    assert outcome.scores == own and list(own) == list(dataset.task.metrics)
    assert outcome.examples == {"train": 60, "dev": 20, "test": 20} and len(outcome.predicted) == 20
    assert shares == sorted(shares) and shares[-1] == 1 and outcome.steps == 12 * 8
    assert 0 < outcome.best_step <= outcome.steps and outcome.best_step % 8 == 0
    assert list(tmp_path.iterdir()) == []


def test_the_same_seed_gives_the_same_numbers_and_another_does_not(small, model, tmp_path):
    first, again, other = (
        finetune(model, small["classification"], settings_of("classification", "epochs=2"), seed, scratch=tmp_path)
        for seed in (42, 42, 43)
    )
    assert first.predicted == again.predicted and first.dev_score == again.dev_score
    assert (first.predicted, first.dev_score) != (other.predicted, other.dev_score)


@pytest.mark.parametrize("kind", ["classification", "token-classification"])
@pytest.mark.slow
def test_shuffled_labels_score_at_chance(kind, small, model, tmp_path):
    dataset, settings = small[kind], settings_of(kind, "epochs=12")
    true, shuffled = (
        finetune(model, dataset, settings, 42, scratch=tmp_path, shuffled=shuffle).scores[dataset.task.metric]
        for shuffle in (False, True)
    )
    assert true > 0.9
    assert shuffled < {"classification": 0.75, "token-classification": 0.3}[kind]


def test_shuffling_moves_the_labels_and_nothing_else(small):
    for kind, dataset in small.items():
        shuffled, again = (TASK_TYPES[kind].shuffle(dataset.train, random.Random(7)) for _ in range(2))
        assert shuffled != dataset.train and shuffled == again
        key = {"token-classification": "tags", "classification": "label", "multi-label": "labels"}.get(kind)
        key = key or ("score" if kind == "similarity" else "answers")
        for before, after in zip(dataset.train, shuffled, strict=True):
            assert {**before, key: None} == {**after, key: None}
            if kind in ("token-classification", "multiple-choice", "multiple-answer"):
                assert len(before[key]) == len(after[key])
        if kind not in ("multiple-choice", "multiple-answer"):

            def labels(examples, key=key):
                values = [example[key] for example in examples]
                return sorted(json.dumps(v) for value in values for v in (value if key == "tags" else [value]))

            assert labels(shuffled) == labels(dataset.train)


def test_the_span_head_is_one_of_the_heads(small, model, tmp_path):
    dataset = small["token-classification"]
    settings = settings_of("token-classification", "ner_head=span", "steps=40", "validate_every=20")
    settings = dataclasses.replace(settings, head_learning_rate=5e-3)
    outcome = finetune(model, dataset, settings, 42, scratch=tmp_path)
    assert outcome.steps == 40 and outcome.best_step in (20, 40)
    assert outcome.scores["entity_f1"] > 0.8
    assert [len(tags) for tags in outcome.predicted] == [len(example["tokens"]) for example in dataset.test]


def test_a_model_that_diverges_gets_no_score(small, model, tmp_path):
    with pytest.raises(DetourError, match="the model has diverged"):
        finetune(
            model, small["classification"], settings_of("classification", "learning_rate=1e9"), 42, scratch=tmp_path
        )


def test_a_part_of_the_examples_is_the_same_for_every_seed(small, model, tmp_path):
    settings = settings_of("classification", "epochs=1", "train_examples=16", "dev_examples=5")
    outcome = finetune(model, small["classification"], settings, 42, scratch=tmp_path)
    assert outcome.examples == {"train": 16, "dev": 5, "test": 20} and outcome.steps == 2


def test_the_losses_by_hand():
    train = [{"labels": ["a"]}, {"labels": ["a", "b"]}, {"labels": ["a"]}, {"labels": []}]
    logits = torch.tensor([[0.3, -1.0, 2.0], [1.0, 0.5, -0.5]])
    outputs = transformers.modeling_outputs.SequenceClassifierOutput(logits=logits)
    wanted = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, IGNORED]])
    weights = torch.tensor([1 / 3, 3.0, 4.0])  # negatives over positives; c has none
    probability = torch.sigmoid(logits)
    full = wanted.clamp(min=0)
    by_hand = -(weights * full * probability.log() + (1 - full) * (1 - probability).log()).mean()
    assert TASK_TYPES["multi-label"].loss(("a", "b", "c"), train)(outputs, full).item() == pytest.approx(by_hand.item())
    one = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, IGNORED]])
    by_hand = -(logits[0].log_softmax(-1)[2] + logits[1, :2].log_softmax(-1)[1]) / 2
    assert TASK_TYPES["multiple-choice"].loss((), [])(outputs, one).item() == pytest.approx(by_hand.item())
    there = wanted != IGNORED
    by_hand = -torch.where(wanted == 1, probability, 1 - probability)[there].log().mean()
    assert TASK_TYPES["multiple-answer"].loss((), [])(outputs, wanted).item() == pytest.approx(by_hand.item())
    assert TASK_TYPES["classification"].loss(("a", "b"), []) is None  # the model's own


def test_heads_and_rates(small, model):
    dataset = small["classification"]
    network = open_model(model, dataset, settings_of("classification", "head=linear"))
    assert isinstance(network.head, torch.nn.Identity)
    assert network.config.classifier_pooling == "cls"
    assert open_model(model, dataset, settings_of("classification", "pooling=mean")).config.classifier_pooling == "mean"
    kept = open_model(model, dataset, settings_of("classification"))
    pretrained = transformers.AutoModelForMaskedLM.from_pretrained(model)
    assert torch.equal(kept.head.dense.weight, pretrained.head.dense.weight)  # transformers' head goes on from it
    groups = build_optimizer(network, settings_of("classification", "head_learning_rate=1e-2")).param_groups
    rates = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert rates[id(network.classifier.weight)] == (1e-2, 0.01) and rates[id(network.classifier.bias)] == (1e-2, 0)
    assert rates[id(network.model.layers[0].attn.Wqkv.weight)] == (3e-3, 0.01)
    assert rates[id(network.model.final_norm.weight)] == (3e-3, 0)
    assert len(rates) == len(list(network.parameters()))


@pytest.mark.parametrize("kind", ["classification", "multiple-choice"])
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_a_stored_pooler_is_no_advantage(small, tmp_path, family, kind):
    """A start model often has one, a model trained here never: fine-tuning begins with the same new weights."""
    config_class, masked_lm = FAMILIES[family].transformers_classes()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    stored = transformers.AutoModel.from_config(config_class(vocab_size=400, **sizes))
    stored.save_pretrained(tmp_path / "start")
    masked_lm.from_pretrained(tmp_path / "start").save_pretrained(tmp_path / "trained")
    networks = []
    for name in ("start", "trained"):
        transformers.set_seed(42)
        networks.append(open_model(tmp_path / name, small[kind], settings_of(kind)))
    start, trained = (network.state_dict() for network in networks)
    assert start.keys() == trained.keys() and all(torch.equal(start[name], trained[name]) for name in start)
    encoder = networks[0].base_model
    assert torch.equal(encoder.encoder.layer[0].output.dense.weight, stored.encoder.layer[0].output.dense.weight)
    if encoder.pooler is not None:
        assert not torch.equal(encoder.pooler.dense.weight, stored.pooler.dense.weight)


def test_an_encoder_that_is_not_there_is_no_random_one(model, small, tmp_path):
    from safetensors.torch import load_file, save_file

    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.Wo.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DetourError, match=r"1 encoder weights are missing or .* model\.layers\.1\.mlp\.Wo"):
        open_model(tmp_path, small["classification"], settings_of("classification"))
    (tmp_path / "model.safetensors").write_bytes(b"no weights at all")
    with pytest.raises(DetourError, match="cannot load the model"):
        open_model(tmp_path, small["classification"], settings_of("classification"))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in SHARED.glob("*")) or ["none"])
def test_every_task_of_the_shared_folder_trains(name, model, tmp_path):
    if name == "none":
        pytest.skip("../shared/data/tasks is not there; every type is trained on generated text above")
    dataset = read_dataset(load_task(name), SHARED)
    settings = settings_of(dataset.task.type, "steps=4", "validate_every=2", "dev_examples=50", "max_length=64")
    outcome = finetune(model, dataset, settings, 42, scratch=tmp_path)
    assert outcome.steps == 4 and len(outcome.predicted) == len(dataset.test)
    assert set(outcome.scores) == set(dataset.task.metrics)
