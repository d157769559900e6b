"""The run file: amounts, overrides, every fault with its key, the control twin, and the recipes that ship."""

from __future__ import annotations

import copy
import dataclasses
import json
import typing
from pathlib import Path

import pytest
import yaml

from megatron_detour.config import Corpus, RunConfig, as_control, from_dict, load, parse_tokens
from megatron_detour.config.deepspeed import TYPES, read_deepspeed_config
from megatron_detour.errors import DetourError, nearest
from megatron_detour.forecast import forecast
from megatron_detour.objectives import CausalLM, MaskedLM
from megatron_detour.optimizers import AdamW, Lion
from megatron_detour.plan import Plan
from megatron_detour.preflight import look

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "examples/recipes").glob("*.yaml"))
PAPER = {  # name: (start, detour, decay)
    "english_base_10b": ("answerdotai/ModernBERT-base", 10 * 10**9, 10**9),
    "english_base_50b": ("answerdotai/ModernBERT-base", 50 * 10**9, 5 * 10**9),
    "english_large_50b": ("answerdotai/ModernBERT-large", 50 * 10**9, 5 * 10**9),
    "french_base_10b": ("almanach/moderncamembert-base", 10 * 10**9, 10**9),
    "french_large_25b": ("almanach/moderncamembert-large", 25 * 10**9, 25 * 10**8),
}
MIXTURES = {"english_base_10b": [0.8, 0.2], "english": [0.6, 0.2, 0.2], "french": [0.7, 0.2, 0.06, 0.04]}

SMALL = {
    "name": "small",
    "folder": "runs/small",
    "model": {"start": "somewhere/encoder"},
    "data": {"corpora": [{"prefix": "a", "weight": 0.75}, {"prefix": "b", "weight": 0.25}], "sequence_length": 128},
    "batch": {"sequences": 8, "micro_sequences": 2},
    "phases": [
        {"name": "detour", "objective": "clm", "tokens": "4k", "learning_rate": {"peak": "2e-4", "warmup": "1 step"}},
        {
            "name": "decay",
            "objective": "mlm",
            "mask_rate": 0.15,
            "tokens": "2 steps",
            "learning_rate": {"peak": 2.0e-4, "shape": "1-sqrt", "end": 2.0e-5},
        },
    ],
    "deepspeed": "zero2.json",
}


def small(**changes) -> dict:
    """SMALL with changes at dotted keys, ``__`` for the dot."""
    raw = copy.deepcopy(SMALL)
    for key, value in changes.items():
        here = raw
        *way, last = [int(part) if part.isdigit() else part for part in key.split("__")]
        for part in way:
            here = here[part] if isinstance(here, list) else here.setdefault(part, {})
        here[last] = value
    return raw


def without(*keys: str) -> dict:
    return {key: value for key, value in copy.deepcopy(SMALL).items() if key not in keys}


def written(folder: Path, raw: dict) -> Path:
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return path


def fault(raw: dict) -> str:
    with pytest.raises(DetourError) as caught:
        from_dict(raw)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (3_145_728, 3_145_728),
        ("3_145_728", 3_145_728),
        ("3,145,728", 3_145_728),
        ("200k", 200_000),
        ("100M", 10**8),
        ("50B", 50 * 10**9),
        ("2.5B", 25 * 10**8),
        (".5M", 500_000),
        ("1T", 10**12),
        (" 7 B ", 7 * 10**9),
        ("1e9", 10**9),
        (2.5e9, 25 * 10**8),
        ("1 step", 1_024),
        ("3 steps", 3_072),
        ("0.5 steps", 512),
    ],
)
def test_amounts_of_tokens(text, tokens):
    assert parse_tokens(text, 1_024) == tokens


@pytest.mark.parametrize(
    "text",
    ["", "B", "50 G", "50b", "-5", "1.5", "0.0001k", "ten", True, None, [1], float("inf"), "1,5B", "1,50M", "1.5,000"],
)
def test_what_is_no_amount_of_tokens(text):
    with pytest.raises(ValueError, match="amount of tokens"):
        parse_tokens(text, 1_024)


def test_steps_need_the_batch():
    with pytest.raises(ValueError, match=r"batch\.sequences and data\.sequence_length"):
        parse_tokens("3 steps")
    message = fault(small(batch={}))
    assert "batch.sequences: this key is required" in message
    assert message.count("\n") == 0  # nor is anything said of the amounts in steps


def test_values_arrive():
    config = from_dict(SMALL)
    detour, decay = config.phases
    assert (detour.tokens, detour.learning_rate.peak, detour.learning_rate.warmup) == (4_000, 2e-4, 1_024)
    assert (decay.tokens, decay.objective, decay.learning_rate.end) == (2_048, MaskedLM(0.15), 2e-5)
    assert config.data.corpora == (Corpus("a", 0.75), Corpus("b", 0.25))


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("phases.0.tokens=1M", lambda c: c.phases[0].tokens == 10**6),
        ("phases.decay.tokens=1M", lambda c: c.phases[1].tokens == 10**6),
        ("phases.detour.learning_rate.peak=1e-5", lambda c: c.phases[0].learning_rate.peak == 1e-5),
        ("data.corpora.b.weight=3", lambda c: c.data.corpora[1].weight == 3.0),
        ("checkpoint.every=5 steps", lambda c: c.checkpoint.every == 5_120),
        ("validation.corpora=[{prefix: h}]", lambda c: c.validation.corpora == (Corpus("h"),)),
        ("model={config: {hidden_size: 8}, tokenizer: t}", lambda c: c.model.config == {"hidden_size": 8}),
        ("optimizer.name=lion", lambda c: c.optimizer.kind == Lion((0.9, 0.99))),
        ("optimizer.betas=[0.8, 0.9]", lambda c: c.optimizer.kind.betas == (0.8, 0.9)),
        ("tensorboard=false", lambda c: c.tensorboard is False),
        ("name=a=b", lambda c: c.name == "a=b"),
    ],
)
def test_overrides(tmp_path, override, read):
    path = written(tmp_path, SMALL)
    assert not read(load(path))
    assert read(load(path, [override]))


@pytest.mark.parametrize(
    ("text", "seconds"), [("23h30m", 84_600), ("90m", 5_400), ("2d", 172_800), ("45s", 45), ("1h 1s", 3_601), (7, 7)]
)
def test_times(text, seconds):
    assert from_dict(small(time_limit=text)).time_limit == seconds


def test_skipped_spikes_are_part_of_the_trajectory():
    skipping = from_dict(small(guards={"spikes": "skip"})).trajectory()
    assert skipping.keys() - from_dict(SMALL).trajectory().keys() == {
        f"guards.{k}" for k in ("spikes", "sigma", "window")
    }
    assert from_dict(small(guards={"spikes": "skip", "patience": 3})).trajectory() == skipping


def test_steps_of_a_phase_are_of_its_own_size():
    config = from_dict(small(phases__1__sequences=4, phases__1__sequence_length=32))
    assert config.phases[1].tokens == 2 * 4 * 32


def test_what_follows_from_an_unreadable_value_is_not_told():
    assert fault(small(batch__sequences="8")) == "run file: batch.sequences: must be an integer, not '8'"
    assert fault(small(phases__1__sequences="8")).endswith("phases.1.sequences: must be an integer, not '8'")
    assert fault(small(batch__sequences=0)).endswith("batch.sequences: must be above 0 and at most 1,048,576, not 0")
    assert "faults" not in fault(small(phases__1__learning_rate__peak="x"))


def test_later_overrides_win(tmp_path):
    assert load(written(tmp_path, SMALL), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("phases.detour.tokens", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("phases.2.tokens=1B", "'2' is none of detour, decay"),
        ("phases.detuor.tokens=1B", "'detuor' is none of"),
        ("phases.²=1", "'²' is none of"),
        ("name.first=x", "name has no keys of its own"),
        ("name=[", "invalid YAML"),
        ("batch.sequence=9", "batch.sequence: unknown key (did you mean 'sequences'?)"),
        ("checkpoint.evry=9", "checkpoint.evry: unknown key (did you mean 'every'?)"),
    ],
)
def test_bad_overrides(tmp_path, override, says):
    with pytest.raises(DetourError) as caught:
        load(written(tmp_path, SMALL), [override])
    assert says in str(caught.value)


def test_an_unknown_key_names_the_nearest():
    raw = small(phases__0__learning_rate__warm_up="1k")
    assert "phases.0.learning_rate.warm_up: unknown key (did you mean 'warmup'?)" in fault(raw)
    assert "did you mean" not in fault(small(zzzzzz=1))


def test_all_faults_of_form_are_told_at_once():
    raw = small(nam="x", seed="one", batch__sequences=None, phases__0__tokens="many", optimizer__betas=[0.9])
    raw.pop("name")
    message = fault(raw)
    for line in (
        "nam: unknown key (did you mean 'name'?)",
        "name: this key is required",
        "seed: must be an integer, not 'one'",
        "batch.sequences: must be an integer, not None",
        "phases.0.tokens: must be an amount of tokens",
        "optimizer.betas: must be a list of 2 values, not [0.9]",
    ):
        assert f"\n  - {line}" in message
    assert "6 faults" in message  # of the two amounts in steps nothing can be said


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (small(data=None), "data: must be a mapping with corpora, sequence_length, order_seed, not None"),
        (small(phases={}), "phases: must be a list, not {}"),
        (small(phases__0="x"), "phases.0: must be a mapping with name, objective"),
        (small(model__config=3), "model.config: must be a mapping, not 3"),
        (small(name=3), "name: must be text, not 3"),
        (small(tensorboard="yes"), "tensorboard: must be true or false, not 'yes'"),
        (small(seed=True), "seed: must be an integer, not True"),
        (small(seed=1.0), "seed: must be an integer, not 1.0"),
        (small(optimizer__eps="tiny"), "optimizer.eps: must be a number, not 'tiny'"),
        (small(optimizer__eps=True), "optimizer.eps: must be a number, not True"),
        (small(optimizer__clip=float("nan")), "optimizer.clip: must be a finite number, not nan"),
        (small(data__corpora__0__weight=float("inf")), "data.corpora.0.weight: must be a finite number, not inf"),
    ],
)
def test_values_of_the_wrong_kind(raw, says):
    assert says in fault(raw)


CHECKS = {
    "no model": (small(model={}), "model: set start"),
    "no tokenizer": (small(model={"config": {}}), "model.tokenizer: required with model.config"),
    "no corpus": (small(data__corpora=[]), "data.corpora: must be a list with at least 1 entry, not []"),
    "weight": (small(data__corpora__1__weight=0), "data.corpora.1.weight: must be above 0, not 0"),
    "held-out weight": (
        small(validation__corpora=[{"prefix": "h", "weight": -1}]),
        "validation.corpora.0.weight: must be above 0, not -1",
    ),
    "sequence length": (
        small(data__sequence_length=0, phases__1__tokens=2_048),
        "data.sequence_length: must be above 0 and at most 1,048,576, not 0",
    ),
    "sequences": (
        small(batch__sequences=0, phases__1__tokens=2_048),
        "batch.sequences: must be above 0 and at most 1,048,576, not 0",
    ),
    "micro": (small(batch__micro_sequences=0), "batch.micro_sequences: must be above 0 and at most 1,048,576, not 0"),
    "tensor": (small(parallel__tensor=0), "parallel.tensor: must be above 0 and at most 1,048,576, not 0"),
    "attention": (
        small(compute__attention="flash"),
        "compute.attention: must be one of auto, flash4, flash3, flash2, varlen, sdpa, not 'flash' "
        "(did you mean 'flash4'?)",
    ),
    "kernels": (
        small(compute__kernels="cuda"),
        "compute.kernels: must be one of auto, triton, apex, plain, not 'cuda'",
    ),
    "recompute": (
        small(compute__recompute="all"),
        "compute.recompute: must be one of none, selective, full, not 'all' (did you mean 'full'?)",
    ),
    "z-loss": (small(z_loss=-1e-4), "z_loss: must be at least 0, not -0.0001"),
    "keep": (small(checkpoint__keep=0), "checkpoint.keep: must be above 0 and at most 1,048,576, not 0"),
    "checkpoint.every": (small(checkpoint__every=0), "checkpoint.every: must be above 0, not 0"),
    "validation.every": (small(validation__every=-1), "validation.every: must be above 0, not -1"),
    "validation.sequences": (
        small(validation__sequences=0),
        "validation.sequences: must be above 0 and at most 1,048,576, not 0",
    ),
    "clip": (small(optimizer__clip=0), "optimizer.clip: must be above 0, not 0"),
    "seed": (small(seed=-1), "seed: must be at least 0 and below 2,147,483,648, not -1"),
    "order seed": (
        small(data__order_seed=2**31),
        "data.order_seed: must be at least 0 and below 2,147,483,648, not 2147483648",
    ),
    "validation seed": (
        small(validation__seed=2**40),
        "validation.seed: must be at least 0 and below 2,147,483,648, not 1099511627776",
    ),
    "moving average": (small(optimizer__ema=1), "optimizer.ema: must be above 0 and below 1, not 1"),
    "weight decay": (small(optimizer__weight_decay=-0.1), "optimizer.weight_decay: must be at least 0, not -0.1"),
    "held-out mask rate": (small(validation__mask_rate=1), "validation.mask_rate: must be above 0 and below 1, not 1"),
    "betas": (small(optimizer__betas=[0.9, 1.0]), "optimizer.betas.1: must be at least 0 and below 1, not 1.0"),
    "optimizer": (
        small(optimizer__name="adam"),
        "optimizer.name: must be one of adamw, lion, stable_adamw, not 'adam' (did you mean 'adamw'?)",
    ),
    "another optimizer's key": (
        small(optimizer__name="lion", optimizer__eps=1e-8),
        "optimizer.eps: a key of adamw or stable_adamw; with name: lion remove it",
    ),
    "no phase": (small(phases=[]), "phases: must be a list with at least 1 entry, not []"),
    "same name": (small(phases__1__name="detour"), "phases.1.name: the name 'detour' is used twice"),
    "zero tokens": (
        small(phases__1__tokens=0),
        "phases.1.tokens: must be above 0, not 0",
    ),
    "objective": (
        small(phases__0__objective="clmm"),
        "phases.0.objective: must be one of mlm, clm, hybrid, mntp, not 'clmm' (did you mean 'clm'?)",
    ),
    "no mask rate": (
        small(phases__1__mask_rate=None),
        "phases.1.mask_rate: must be a number, not None",
    ),
    "mask rate": (small(phases__1__mask_rate=1.0), "phases.1.mask_rate: must be above 0 and below 1, not 1.0"),
    "clm of words": (
        small(phases__0__whole_word_masking=True),
        "phases.0.whole_word_masking: a key of mlm or hybrid or mntp; with objective: clm remove it",
    ),
    "masked clm": (
        small(phases__0__mask_rate=0.3),
        "phases.0.mask_rate: a key of mlm or hybrid or mntp; with objective: clm remove it",
    ),
    "causal MLM": (small(phases__1__causal=True), "phases.1.causal: a key of mntp; with objective: mlm remove it"),
    "rates without tokens": (
        small(phases__1__mask_rate_steps={"500M": 1.5}),
        "phases.1.mask_rate_steps: must be a mapping of tokens, ascending and above 0, to mask rates above 0",
    ),
    "rates out of order": (
        small(phases__1__mask_rate_steps={"1 step": 0.2, 512: 0.1}),
        "phases.1.mask_rate_steps: must be a mapping of tokens, ascending",
    ),
    "rates that are a list": (
        small(phases__1__mask_rate_steps=[0.3, 0.2]),
        "phases.1.mask_rate_steps: must be a mapping of tokens",
    ),
    "rates of what": (
        small(phases__1__mask_rate_steps={"soon": 0.2}),
        "phases.1.mask_rate_steps: must be an amount of tokens such as 50B",
    ),
    "rates after the phase": (
        small(phases__1__mask_rate_steps={"1 step": 0.2, "2 steps": 0.1}),
        "phases.1.mask_rate_steps: 2048 tokens are not before the end of the phase, at 2048",
    ),
    "two schedules": (
        small(phases__1__mask_rate_steps={"1 step": 0.2}, phases__1__mask_rate_end=0.1),
        "phases.1.mask_rate_end: set either mask_rate_end or mask_rate_steps",
    ),
    "a span of one": (
        small(phases__1__longest_span=1),
        "phases.1.longest_span: must be at least 2 and at most 100, not 1",
    ),
    "peak": (small(phases__0__learning_rate__peak=0), "phases.0.learning_rate.peak: must be above 0, not 0"),
    "warm-up": (
        small(phases__0__learning_rate__warmup="4001"),
        "phases.0.learning_rate.warmup: 4001 tokens exceed the phase's 4000",
    ),
    "shape": (
        small(phases__1__learning_rate__shape="1-sqr"),
        "phases.1.learning_rate.shape: must be one of constant, linear, cosine, 1-sqrt, not '1-sqr' "
        "(did you mean '1-sqrt'?)",
    ),
    "no end": (
        small(phases__1__learning_rate__end=None),
        "phases.1.learning_rate.end: 1-sqrt needs an end between 0 and the peak (or end_ratio), not None",
    ),
    "end above peak": (small(phases__1__learning_rate__end=1), "phases.1.learning_rate.end: 1-sqrt needs an end"),
    "two ends": (
        small(phases__1__learning_rate__end_ratio=0.1),
        "phases.1.learning_rate.end_ratio: set either end or end_ratio",
    ),
    "end ratio": (
        small(phases__1__learning_rate={"peak": 1, "shape": "cosine", "end_ratio": 2}),
        "phases.1.learning_rate.end_ratio: must be at least 0 and at most 1, not 2",
    ),
    "mask rate's end": (
        small(phases__1__mask_rate_end=0),
        "phases.1.mask_rate_end: must be above 0 and below 1, not 0",
    ),
    "frozen part": (
        small(phases__0__freeze=["layers.0-2", "layer.3"]),
        "phases.0.freeze.1: must be one of embeddings, layers.N, layers.N-M, final_norm, head, "
        "not 'layer.3' (did you mean 'layers.0-7'?)",
    ),
    "frozen range": (
        small(phases__0__freeze=["layers.7-2"]),
        "phases.0.freeze.0: must be one of embeddings, layers.N, layers.N-M, final_norm, head, "
        "not 'layers.7-2' (did you mean 'layers.0-7'?)",
    ),
    "optimiser's state": (
        small(phases__0__optimizer_state="rest"),
        "phases.0.optimizer_state: must be one of keep, reset, not 'rest' (did you mean 'reset'?)",
    ),
    "phase's length": (
        small(phases__0__sequence_length=-1),
        "phases.0.sequence_length: must be above 0 and at most 1,048,576, not -1",
    ),
    "batch warm-up": (
        small(phases__0__batch_warmup={"start": 2, "increment": 4, "tokens": "1k"}),
        "phases.0.batch_warmup: increment 4 does not divide 8 - 2",
    ),
    "batch warm-up's tokens": (
        small(phases__0__batch_warmup={"start": 2, "increment": 2, "tokens": "5k"}),
        "phases.0.batch_warmup.tokens: 5000 tokens exceed the phase's 4000",
    ),
    "phase without corpora": (
        small(phases__0__corpora=[]),
        "phases.0.corpora: must be a list with at least 1 entry, not []",
    ),
    "corpus twice": (
        small(data__corpora=[{"prefix": "a"}, {"prefix": "a"}]),
        "data.corpora: the corpus 'a' is listed twice; list it once, with the sum of its weights",
    ),
    "phase's name": (
        small(phases__0__name="a.b"),
        "phases.0.name: must be a name of letters, digits, spaces, - and _ that is not a number, not 'a.b'",
    ),
    "number as a name": (
        small(phases__0__name="12"),
        "phases.0.name: must be a name of letters, digits, spaces, - and _ that is not a number, not '12'",
    ),
    "empty folder": (small(folder=""), "folder: must be non-empty text, not ''"),
    "spikes": (
        small(guards__spikes="skipp"),
        "guards.spikes: must be one of report, skip, ignore, not 'skipp' (did you mean 'skip'?)",
    ),
    "window": (small(guards__window=3), "guards.window: must be at least 16 and at most 1,048,576, not 3"),
    "time limit": (small(time_limit="0s"), "time_limit: must be above 0, not '0s'"),
    "no time": (small(time_limit="1 week"), "time_limit: must be a time such as 23h30m, 90m or 3600, not '1 week'"),
    "wandb": (
        small(wandb={"project": "p", "mode": "off"}),
        "wandb.mode: must be one of online, offline, not 'off' (did you mean 'offline'?)",
    ),
    "profile": (small(profile={"steps": [3, 2]}), "profile.steps: the first step, 3, comes after the last one, 2"),
    "end of a constant": (
        small(phases__0__learning_rate__end=1.0e-5),
        "phases.0.learning_rate.end: a constant rate has no end",
    ),
}


@pytest.mark.parametrize("case", CHECKS)
def test_checks(case):
    raw, says = CHECKS[case]
    message = fault(raw)
    assert message.startswith(f"run file: {says}"), message  # the only fault, or the text would begin with a number


def test_all_faults_of_sense_are_told_at_once():
    message = fault(small(seed=-1, data__corpora=[], phases__0__objective="x", phases__1__tokens=0))
    assert message.startswith("run file: 4 faults:")
    assert message.count("\n  - ") == 4


def test_edges_that_are_allowed():
    config = from_dict(small(seed=2**31 - 1, phases__0__learning_rate__warmup="4k", phases__1__learning_rate__end=0))
    assert config.phases[0].learning_rate.warmup == config.phases[0].tokens


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [", "invalid YAML"),
        (b"name: \xff", "invalid YAML: not UTF-8"),
        (b"- a\n", "a run file is a YAML mapping"),
        (b"", "a run file is a YAML mapping"),
    ],
)
def test_files_that_are_no_run_file(tmp_path, content, says):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(DetourError, match=says) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_missing_run_file_and_a_folder(tmp_path):
    with pytest.raises(DetourError, match="no such run file"):
        load(tmp_path / "none.yaml")
    with pytest.raises(DetourError, match="cannot be read"):
        load(tmp_path)


def test_the_deepspeed_file_is_found_beside_the_run_file(tmp_path, monkeypatch):
    path = written(tmp_path, SMALL)
    assert load(path).deepspeed == "zero2.json"  # nowhere: left as it was written
    (tmp_path / "zero2.json").write_text("{}", encoding="utf-8")
    assert load(path).deepspeed == str(tmp_path / "zero2.json")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "zero2.json").write_text("{}", encoding="utf-8")
    monkeypatch.chdir(elsewhere)
    assert load(path).deepspeed == "zero2.json"  # the current folder comes first


def test_the_control_twin_changes_causal_phases_only():
    config = from_dict(small(folder="runs/small/"))
    twin = as_control(config, 0.3)
    assert (twin.name, twin.folder) == ("small-control", "runs/small-control")
    assert twin.phases[0].objective == MaskedLM(0.3)
    back = dataclasses.replace(twin.phases[0], objective=CausalLM())
    assert dataclasses.replace(twin, name=config.name, folder=config.folder, phases=(back, twin.phases[1])) == config
    assert from_dict(twin.to_dict()) == twin


def test_rates_by_tokens_are_read_again_as_they_are_stored(tmp_path):
    config = from_dict(small(phases__1__mask_rate_steps={"1 step": 0.2, "1.5k": 0.1}))
    assert config.phases[1].objective.mask_rate_steps == ((1_024, 0.2), (1_500, 0.1))
    assert load(written(tmp_path, config.to_dict())) == config
    changed = load(written(tmp_path, small()), ["phases.decay.mask_rate_steps={1k: 0.1}"])
    differing = {key for key, value in changed.trajectory().items() if from_dict(SMALL).trajectory().get(key) != value}
    assert differing == {"phases.1.mask_rate_steps.0.0", "phases.1.mask_rate_steps.0.1"}


def test_keys_that_are_not_used_leave_the_trajectory_of_earlier_runs_as_it_is():
    """What is compared with runs and studies that were recorded before there were these keys."""
    mine = {key: value for key, value in from_dict(SMALL).trajectory().items() if value is not None}
    assert not [key for key in mine if key.rpartition(".")[2] in ("mask_rate_steps", "longest_span", "entities")]


@pytest.mark.parametrize("whole_words", [False, True])
def test_the_control_twin_masks_words_as_the_run_does(whole_words):
    config = from_dict(small(phases__1__whole_word_masking=whole_words))
    assert [phase.objective.whole_word_masking for phase in as_control(config, 0.3).phases] == [whole_words] * 2


@pytest.mark.parametrize("objective", ["mntp", "hybrid"])
@pytest.mark.parametrize("rates", [{"mask_rate_end": 0.2}, {"mask_rate_steps": {"1k": 0.2}}])
def test_the_control_twin_masks_as_the_phase_that_it_replaces(objective, rates):
    masking = {"whole_word_masking": True, "longest_span": 10, "entities": "words.txt", **rates}
    phases = [SMALL["phases"][0] | {"objective": objective, "mask_rate": 0.15} | masking, SMALL["phases"][1]]
    config = from_dict(small(phases=phases))
    twin = as_control(config, 0.3).phases[0].objective
    assert type(twin) is MaskedLM and twin.mask_rate == 0.3
    given = {field.name: getattr(config.phases[0].objective, field.name) for field in dataclasses.fields(MaskedLM)}
    assert dataclasses.asdict(twin) == given | {"mask_rate": 0.3}


def test_whole_words_of_one_phase_are_not_anothers_that_masks_tokens():
    phases = [SMALL["phases"][0] | {"objective": "mntp", "mask_rate": 0.15}, SMALL["phases"][1]]
    config = from_dict(small(phases=[phases[0], phases[1] | {"whole_word_masking": True}]))
    assert as_control(config, 0.3).phases[0].objective == MaskedLM(0.3)


@pytest.mark.parametrize("mask_rate", [0, 1, -0.1, 1.5])
def test_the_control_twin_needs_a_mask_rate(mask_rate):
    with pytest.raises(DetourError, match="--control: the mask rate must be between 0 and 1"):
        as_control(from_dict(SMALL), mask_rate)


def test_a_run_without_a_detour_has_no_control():
    with pytest.raises(DetourError, match="every phase of the run file already trains mlm"):
        as_control(from_dict(small(phases=SMALL["phases"][1:])), 0.3)


@pytest.mark.parametrize(
    "raw",
    [
        SMALL,
        small(model={"config": {"layers": [1, 2], "nested": {"a": 1}}, "tokenizer": "t"}),
        small(validation__corpora=[{"prefix": "h"}], validation__every="5 steps", checkpoint__every="1M"),
    ],
)
def test_plain_form_reads_back(raw):
    config = from_dict(raw)
    plain = config.to_dict()
    assert from_dict(plain) == config
    assert yaml.safe_load(yaml.safe_dump(plain)) == plain


@pytest.mark.parametrize(
    "change",
    [
        {"batch__micro_sequences": 4},
        {"checkpoint__every": "1M", "checkpoint__keep": 5},
        {"phases__0__micro_sequences": 4},
        {"guards__patience": 3, "guards__sigma": 9, "time_limit": "1h"},
        {"tensorboard": False},
        {"profile": {"steps": [2, 3]}},
        {"validation__corpora": [{"prefix": "h"}]},
        {"parallel__tensor": 2},
        {"model__download": True},
        {"deepspeed": "other.json"},
        {"name": "x", "folder": "y"},
        {"phases__1__tokens": 2_048},  # another spelling of 2 steps
    ],
)
def test_trajectory_ignores(change):
    raw = small(**change)
    assert raw != SMALL
    assert from_dict(raw).trajectory() == from_dict(SMALL).trajectory()


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"seed": 18}, {"seed"}),
        ({"model__start": "other/encoder"}, {"model.start"}),
        ({"data__order_seed": 43}, {"data.order_seed"}),
        ({"data__corpora__0__weight": 0.5}, {"data.corpora.0.weight"}),
        ({"data__corpora__1__prefix": "c"}, {"data.corpora.1.prefix"}),
        ({"batch__sequences": 16, "phases__1__tokens": 2_048, "phases__0__learning_rate__warmup": 1_024},
         {"batch.sequences"}),
        ({"phases__0__objective": "mlm", "phases__0__mask_rate": 0.3},
         {f"phases.0.{key}" for key in ("objective", "mask_rate", "whole_word_masking")}),
        ({"phases__0__tokens": "5k"}, {"phases.0.tokens"}),
        ({"phases__1__learning_rate__end": 0}, {"phases.1.learning_rate.end"}),
        ({"optimizer__clip": 2}, {"optimizer.clip"}),
        ({"optimizer__ema": 0.999}, {"optimizer.ema"}),
        ({"optimizer__name": "lion"}, {"optimizer.name", "optimizer.betas.1", "optimizer.eps"}),
        ({"phases__0__optimizer_state": "reset"}, {"phases.0.optimizer_state"}),
        ({"phases__1__sequences": 4, "phases__1__tokens": 2_048}, {"phases.1.sequences"}),
    ],
)  # fmt: skip
def test_trajectory_sees(change, keys):
    before, after = from_dict(SMALL).trajectory(), from_dict(small(**change)).trajectory()
    assert {key for key in before | after if before.get(key) != after.get(key)} == keys


def test_trajectory_sees_phases_and_corpora_that_are_gone():
    whole = from_dict(SMALL).trajectory()
    fewer = from_dict(small(phases=SMALL["phases"][:1], data__corpora=SMALL["data"]["corpora"][:1])).trajectory()
    gone = whole.keys() - fewer.keys()
    assert {"phases.1.tokens", "data.corpora.1.prefix"} <= gone


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_load(path):
    config = load(path)
    assert isinstance(config, RunConfig)
    assert Path(config.deepspeed).resolve().is_file()
    assert all(phase.objective.name == "mlm" for phase in as_control(config, 0.3).phases)


def test_all_of_the_papers_recipes_are_there():
    assert {path.stem for path in RECIPES} >= {*PAPER, "quickstart"}


@pytest.mark.parametrize(
    ("name", "phase", "frozen"),
    [("low", 0, "layers.0-7"), ("middle", 0, "layers.8-14"), ("decay", 1, "layers.0-7")],
)
def test_the_papers_freezing_experiments(name, phase, frozen):
    """Each is the French base recipe, and nothing but what it freezes differs."""
    whole = load(ROOT / "examples/recipes/french_base_10b.yaml").trajectory()
    frozen_run = load(ROOT / f"examples/recipes/french_base_10b_freeze_{name}.yaml").trajectory()
    differing = {key: value for key, value in frozen_run.items() if whole.get(key) != value}
    assert frozen in differing.values()
    assert set(differing.values()) <= {frozen, "embeddings"}
    assert {key.rpartition(".")[0] for key in differing} == {f"phases.{phase}.freeze"}
    assert not whole.keys() - frozen_run.keys()


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_numbers(name):
    start, detour_tokens, decay_tokens = PAPER[name]
    config = load(ROOT / f"examples/recipes/{name}.yaml")
    assert config.model.start == start
    assert config.batch.sequences * config.data.sequence_length == 3_145_728
    assert (config.data.sequence_length, config.seed, config.data.order_seed) == (8_192, 17, 42)
    assert [corpus.weight for corpus in config.data.corpora] == (MIXTURES.get(name) or MIXTURES[name.split("_")[0]])
    assert (config.optimizer.kind, config.optimizer.weight_decay) == (AdamW((0.9, 0.98), 1e-6), 0.05)
    detour, decay = config.phases
    assert (detour.objective, detour.tokens) == (CausalLM(), detour_tokens)
    assert dataclasses.astuple(detour.learning_rate) == (2e-4, 10**8, "constant", None, None)
    assert (decay.objective, decay.tokens) == (MaskedLM(0.15), decay_tokens)
    assert dataclasses.astuple(decay.learning_rate) == (2e-4, 0, "1-sqrt", 2e-5, None)


def keys_of(cls: type, key: str = "") -> list[str]:
    """Every key that a run file may have; of a list its first entry."""
    found = []
    for field in dataclasses.fields(cls):
        here = f"{key}.{field.name}".lstrip(".")
        hints = [typing.get_type_hints(cls)[field.name]]
        while hints and not dataclasses.is_dataclass(hints[0]):
            hints = [*typing.get_args(hints[0]), *hints[1:]] if typing.get_args(hints[0]) else hints[1:]
        found.append(here)
        inner = hints[0] if hints else None
        if inner and field.name in ("phases", "corpora"):
            found += [f"{here}.0", *keys_of(inner, f"{here}.0")]
        elif inner:
            found += keys_of(inner, here)
    return found


WRONG = (None, [], [None], {}, {"a": {"b": []}}, True, -1, 0, 0.5, 10**18, 10**400, "", "x", "a\nb", "1e99", "\ud800")


@pytest.mark.parametrize("key", keys_of(RunConfig))
def test_a_wrong_value_is_a_sentence_or_a_plan(key, tmp_path):
    """Whatever stands at a key: all faults in a sentence, or a run that can be planned and forecast."""
    whole = small(
        validation__corpora=[{"prefix": "h"}],
        wandb={"project": "p"},
        profile={"steps": [2, 3]},
        phases__0__corpora=[{"prefix": "c"}],
        phases__0__batch_warmup={"start": 2, "increment": 2, "tokens": 2048},
        folder=str(tmp_path / "run"),
        model__start=str(tmp_path),  # no hub is asked
    )
    for value in WRONG:
        raw = copy.deepcopy(whole)
        *way, last = [int(part) if part.isdigit() else part for part in key.split(".")]
        here = raw
        for part in way:
            here = here[part] if isinstance(here, list) else here.setdefault(part, {})
        here[last] = value
        try:
            config = from_dict(raw)
        except DetourError as error:
            assert "\ud800" not in str(error)
            continue
        result = forecast(config, Plan.from_config(config), config.parallel.tensor)
        assert [note for note in result.notes if "unknown:" in note] == [], (key, value)


@pytest.mark.parametrize("depth", [100, 2_000])
def test_what_is_nested_too_deep_is_a_sentence(tmp_path, depth):
    deep = "[" * depth + "]" * depth
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(SMALL) + f"model.config: {deep}\n")
    with pytest.raises(DetourError):
        load(tmp_path / "run.yaml")
    for override in (f"model.config={deep}", f"seed={deep}"):
        with pytest.raises(DetourError):
            load(written(tmp_path, SMALL), [override])
    shape = ["model.start=null", "model.tokenizer=t", f"model.config={{layer_types: {deep}}}"]
    with pytest.raises(DetourError, match=r"layer_types|too deep"):
        look(load(written(tmp_path, SMALL), shape).model).refuse()


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(SMALL) + "phases: []\n")
    with pytest.raises(DetourError, match=r"line \d+: duplicate key 'phases'"):
        load(path)
    with pytest.raises(DetourError, match="duplicate key 'spikes'"):
        load(written(tmp_path, SMALL), ["guards={spikes: skip, spikes: report}"])


@pytest.mark.parametrize("folder", ["a\nb", "a\tb", "a\x1b[31mb", "a\u202eb", "a\u2028b"])
def test_control_characters_in_names_are_refused(tmp_path, folder):
    with pytest.raises(DetourError, match="holds a line break or a control character"):
        load(written(tmp_path, SMALL), [f"folder={folder}"])
    assert "folder: must be one line of text" in fault(small(folder=folder))


@pytest.mark.parametrize("key", [*TYPES, "zero_optimization.stage"])
def test_a_wrong_value_of_a_deepspeed_file_is_a_sentence(key, tmp_path):
    path = tmp_path / "ds.json"
    section, _, name = key.rpartition(".")
    for value in (None, [], {"a": 1}, True, -1, 0, 0.5, 10**400, "x", "auto"):
        raw = {"zero_optimization": {"stage": 2}}
        (raw.setdefault(section, {}) if section else raw)[name] = value
        path.write_text(json.dumps(raw))
        try:
            read_deepspeed_config(str(path))
        except DetourError as error:
            assert str(error).startswith(f"{path}: ") and key.split(".")[0] in str(error).lower(), value
        else:
            assert value in (True, False, {"a": 1}), (key, value)
    for text in ("[]", "null", "{", "[" * 100_000, '{"bf16": {}, "bf16": {}}'):
        path.write_text(text)
        with pytest.raises(DetourError, match="deepspeed: "):
            read_deepspeed_config(str(path))


@pytest.mark.parametrize(
    ("word", "hint"), [("MLM", "mlm"), ("Clm", "clm"), ("mlm", ""), ("h10", ""), ("mlmm", "mlm"), ("zzz", "")]
)
def test_a_hint_is_never_what_was_typed(word, hint):
    assert nearest(word, ["mlm", "clm"]) == (f" (did you mean {hint!r}?)" if hint else "")
