"""The model card tells the true phases, tokens and corpora, and has no field without a value."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from megatron_detour.checkpoint.huggingface import NEW_HEAD
from megatron_detour.data.manifest import manifest_path
from megatron_detour.errors import DetourError
from megatron_detour.model.families import FAMILIES
from megatron_detour.release.card_metadata import CardMetadata, CorpusFacts, read_card_metadata
from megatron_detour.release.checkpoint_info import CheckpointInfo
from megatron_detour.release.export import Exported, export
from megatron_detour.settings import validate
from tests.observe.test_report import WRONG, places, with_other
from tests.release.made import PHASES, STEP_TOKENS, make_run
from tests.release.test_export import relist

GIVEN = CardMetadata(
    name="Notes-BERT | large",
    languages=("en", "fr"),
    license="cc-by-4.0",
    base_model="answerdotai/ModernBERT-base",
    description="An encoder of clinical notes.",
    contact="nlp@hospital.example",
    tags=("clinical",),
    corpora={"corpus": CorpusFacts("Notes", "not public", "invented notes")},
)
ROWS = [
    {"task": "bc5cdr", "title": "BC5CDR", "metric": "entity_f1", "mean": 0.8125, "sd": 0.0042, "seeds": 3},
    {"task": "hoc", "title": "Hallmarks of Cancer", "metric": "micro_f1", "mean": 0.5, "sd": None, "seeds": 1},
]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """Interrupted after the third step and resumed on other ranks; checkpoints of every kind of moment."""
    return make_run(tmp_path_factory.mktemp("card") / "run", corpus, steps=(0, 2, 4, 5, 6), sessions=(0, 3))


def card_of(run: Path, step: int, output: Path, **options: Any) -> tuple[str, Exported]:
    exported = export(str(run / "checkpoints" / f"step-{step:08d}"), str(output), "fp32", **options)
    return (output / "README.md").read_text(encoding="utf-8"), exported


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def table(card: str, heading: str) -> list[dict[str, str]]:
    """The first table under a heading, its rows by column."""
    lines = card.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def family_card(family: str, corpus, folder: Path) -> str:
    """The card of a released model of a family, as an encoder, after a causal detour."""
    run = make_run(folder / "run", corpus, steps=(6,), changes={"model_type": family})
    return card_of(run, 6, folder / "model")[0]


def refuse_empty_fields(card: str) -> None:
    words = re.sub(r"```.*?```", "", card, flags=re.S)
    assert not re.search(r"\b(None|nan|NaN|inf|null|TODO|undefined|Undefined)\b|\{\{|\{%|\[\]|\(\)|: *\.|, *\.", words)
    for line in words.splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert cells and all(cells), line
    assert all(front_matter(card).values())
    headings = re.findall(r"^## (.*)$", card, flags=re.M)
    assert {"How to use it", "Training", "Corpora", "Limits", "Machines", "Citation"} <= set(headings)
    assert not re.search(r"\n\n\n", card)


@pytest.mark.parametrize("step", [0, 2, 4, 5, 6])
@pytest.mark.parametrize("kind", ["plain", "given", "decoder", "moved"])
def test_no_field_is_empty(run, tmp_path, step, kind):
    options: dict[str, Any] = {"given": {"given": GIVEN, "evaluation": ROWS}, "decoder": {"as_decoder": True}}.get(
        kind, {}
    )
    if kind == "moved":  # away from its run
        shutil.copytree(run / "checkpoints" / f"step-{step:08d}", tmp_path / "checkpoints" / f"step-{step:08d}")
    card, _ = card_of(tmp_path if kind == "moved" else run, step, tmp_path / "model", **options)
    refuse_empty_fields(card)
    assert str(tmp_path) not in card and str(run.parent) not in card
    front = front_matter(card)
    assert front["library_name"] == "transformers" and "modernbert" in front["tags"]
    assert front["pipeline_tag"] == ("text-generation" if kind == "decoder" else "fill-mask")
    assert ("\n## Evaluation\n" in card) == (kind == "given")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_card_describes_a_model_of_its_family(corpus, tmp_path, name):
    family, card = FAMILIES[name], family_card(name, corpus, tmp_path)
    refuse_empty_fields(card)
    assert name in front_matter(card)["tags"] and "# model" in card
    assert f"An encoder of the {family.label} family, trained with a causal detour.\n" in card
    prose = re.sub(r"```.*?```|http\S+", "", card, flags=re.S)
    labels = {other.label for other in FAMILIES.values()}
    assert {found for found in re.findall(r"[\w-]+", prose) if found in labels} == {family.label}
    local = "layer_types" in family.transformers_classes()[0]().to_dict()
    assert ("local" in prose.split("## Training")[0]) == ("attends to" in prose) == local
    assert ("ModernBertDecoder" in prose) == family.has_decoder
    assert f"| Layers | {4 if not local else '4, 2 of them with global attention; local ones'}" in prose


@pytest.mark.parametrize("new", [True, False])
def test_a_new_head_is_told(corpus, run, tmp_path, new):
    start = run / "checkpoints" / "step-00000004"
    later = make_run(tmp_path / "later", corpus, steps=(6,), model={"start": str(start)})
    checkpoint = later / "checkpoints" / "step-00000006"
    state = json.loads((checkpoint / "run_state.json").read_text())
    (checkpoint / "run_state.json").write_text(json.dumps(state | {NEW_HEAD: new}))
    relist(checkpoint)
    card, _ = card_of(later, 6, tmp_path / "model")
    head = ", with a new head for masked language modeling" if new else ""
    assert f"run, after {4 * STEP_TOKENS:,} tokens{head}. Recipe:" in card


def test_the_hub_reads_the_front_matter(run, tmp_path):
    from huggingface_hub import ModelCard

    card_of(run, 6, tmp_path / "model", given=GIVEN)
    data = ModelCard.load(tmp_path / "model" / "README.md").data
    assert (data.language, data.license, data.base_model) == (["en", "fr"], "cc-by-4.0", None)
    assert "continued-pretraining" not in data.tags  # the run started from nothing, whatever base model was given
    assert data.pipeline_tag == "fill-mask" and {"causal-detour", "clinical"} <= set(data.tags)


def test_a_resumed_run_that_is_done(run, tmp_path):
    card, exported = card_of(run, 6, tmp_path / "model")
    detour, decay = table(card, "Training")
    assert (detour["Phase"], detour["Objective"], detour["Input"]) == ("detour", "CLM", "unchanged")
    assert (detour["Tokens"], detour["Steps"]) == (f"{4 * STEP_TOKENS:,}", "4")
    assert detour["Frozen"] == "embeddings" and "0.0002" in detour["Learning rate"]
    assert (decay["Phase"], decay["Objective"], decay["Input"]) == ("decay", "MLM", "15% masked")
    assert (decay["Tokens"], decay["Steps"], decay["Frozen"]) == (f"{2 * STEP_TOKENS:,}", "2", "nothing")
    assert f"The run is complete: 6 steps, {6 * STEP_TOKENS:,} tokens." in card
    assert "interrupted and resumed after step 3;" in card and "padding included (5.00%)" in card
    first, second = table(card, "Machines")
    assert (first["Devices"], first["Steps"]) == ("2 x NVIDIA H100 80GB HBM3", "3")
    assert (second["Devices"], second["Steps"]) == ("4 x NVIDIA H100 80GB HBM3", "3")
    assert first["Training time"] == "1h30m" and "In total 9 device hours" in card
    loss = table(card, "Held-out text")[0]
    assert list(loss.values()) == ["MLM loss", "6.000", "5.000", "4.500"]
    assert list(loss)[1:] == ["before", "after detour", "after decay"]
    assert not any("unfinished" in warning for warning in exported.warnings)


@pytest.mark.parametrize(
    ("step", "where"), [(2, "in phase 'detour'"), (5, "in phase 'decay'"), (0, "before the first")]
)
def test_a_part_of_a_run_says_so(run, tmp_path, step, where):
    card, exported = card_of(run, step, tmp_path / "model")
    detour, decay = table(card, "Training")
    done = (min(step, 4), max(step - 4, 0))
    for row, count, planned in zip((detour, decay), done, (4, 2), strict=True):
        whole = count == planned
        assert row["Steps"] == (f"{planned}" if whole else f"{count} of {planned}")
        tokens = f"{planned * STEP_TOKENS:,}"
        assert row["Tokens"] == (tokens if whole else f"{count * STEP_TOKENS:,} of {tokens}")
    assert f"step {step} of 6, {step * STEP_TOKENS:,} of {6 * STEP_TOKENS:,} tokens" in card
    assert ("Not started: decay." in card) == (step == 2)
    assert ("interrupted and resumed" in card) == (step > 3)
    assert any(where in warning for warning in exported.warnings)
    later = "after decay" if step < 6 else "nothing"
    assert later not in card and ("after detour" in card) == (step >= 4)


def test_a_checkpoint_without_its_run_knows_its_phases_and_corpora(run, tmp_path):
    shutil.copytree(run / "checkpoints" / "step-00000005", tmp_path / "step-00000005")
    exported = export(str(tmp_path / "step-00000005"), str(tmp_path / "model"), "fp32")
    card = (tmp_path / "model" / "README.md").read_text()
    assert [row["Steps"] for row in table(card, "Training")] == ["4", "1 of 2"]
    assert table(card, "Corpora")[0]["Corpus"] == "corpus"
    assert "the run directory was not available" in card and "Held-out" not in card
    assert any("not in a run directory" in warning for warning in exported.warnings)


def test_the_files_of_another_run_are_not_told_as_this_ones(corpus, run, tmp_path):
    longer = [*PHASES, {**PHASES[1], "name": "more"}]
    other = make_run(tmp_path / "other", corpus, steps=(6,), phases=longer)
    shutil.copytree(run, tmp_path / "run")
    shutil.copy(other / "plan.json", tmp_path / "run" / "plan.json")
    with pytest.raises(DetourError, match=r"plan\.json: belongs to another run than step-00000006"):
        card_of(tmp_path / "run", 6, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_corpora_with_what_is_given_and_without(run, corpus, tmp_path):
    plain, given = (card_of(run, 6, tmp_path / n, given=g)[0] for n, g in (("a", CardMetadata()), ("b", GIVEN)))
    documents = json.loads(manifest_path(corpus.prefix).read_text())["documents"]
    (row,) = table(plain, "Corpora")
    assert (row["Corpus"], row["Documents"], row["Share"]) == ("corpus", f"{documents:,}", "100%")
    assert row["License"] == "not stated" and re.match(r"about [\d.]+ times", row["Read"])
    (row,) = table(given, "Corpora")
    assert (row["Corpus"], row["Description"], row["License"]) == ("Notes", "invented notes", "not public")
    assert "license: unknown" in plain and "| License | not stated |" in plain
    assert given.splitlines()[given.splitlines().index("---", 1) + 2] == "# Notes-BERT \\| large"


def test_scores_of_an_evaluation(run, tmp_path):
    card, _ = card_of(run, 6, tmp_path / "model", evaluation=ROWS)
    first, second = table(card, "Evaluation")
    assert list(first.values()) == ["BC5CDR", "entity f1", "81.2", "0.4", "3"]
    assert list(second.values()) == ["Hallmarks of Cancer", "micro f1", "50.0", "one seed", "1"]
    assert "not been evaluated" not in card


def test_languages_come_from_manifests_or_are_given_and_never_guessed(run, corpus, tmp_path):
    card, exported = card_of(run, 6, tmp_path / "none")
    assert "language" not in front_matter(card)
    assert "| Languages | not stated |" in card
    assert any("--language" in warning for warning in exported.warnings)
    path = manifest_path(corpus.prefix)
    content = path.read_text()
    manifest = json.loads(content)
    try:
        path.write_text(json.dumps(manifest | {"options": {**manifest["options"], "language": ["fr"]}}))
        card, exported = card_of(run, 6, tmp_path / "filtered")
        assert front_matter(card)["language"] == ["fr"] and "La patiente prend" in card
        assert not any("--language" in warning for warning in exported.warnings)
        changed = {**manifest["files"], "bin": {**manifest["files"]["bin"], "sha256": "0" * 64}}
        path.write_text(json.dumps(manifest | {"options": {"language": ["fr"]}, "files": changed}))
        assert "language" not in front_matter(card_of(run, 6, tmp_path / "changed")[0])  # not the text that was read
    finally:
        path.write_text(content)


def start_model(corpus, folder: Path, tmp_path: Path, **options: Any) -> tuple[str, Exported]:
    """The card of a run that started from `folder`."""
    run = make_run(tmp_path / "later", corpus, steps=(6,), model={"start": str(folder)})
    return card_of(run, 6, tmp_path / "model", **options)


def test_a_local_start_model_is_no_name_on_the_hub(corpus, run, tmp_path):
    card, exported = start_model(corpus, run / "checkpoints" / "step-00000004", tmp_path)
    assert "base_model" not in front_matter(card)
    assert f"from step 4 of an earlier megatron-detour run, after {4 * STEP_TOKENS:,} tokens." in card
    assert any("--base-model" in warning for warning in exported.warnings)


def test_a_folder_that_is_gone_is_no_name_on_the_hub_either(corpus, tmp_path):
    card, _ = start_model(corpus, Path("models/ModernBERT-base"), tmp_path)
    assert "base_model" not in front_matter(card)
    assert "It was initialized from a local folder, ModernBERT-base, whose hub id is not stated." in card


def test_a_hub_id_that_the_cache_knows_is_the_base_model(corpus, tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    asked = []

    def hub_file(name: str, file: str, download: bool, what: str) -> Path:
        asked.append(download)
        return tmp_path / file

    monkeypatch.setattr("megatron_detour.checkpoint.source.hub_file", hub_file)
    card, exported = start_model(corpus, Path("org/model"), tmp_path)
    assert front_matter(card)["base_model"] == "org/model" and asked and not any(asked)
    assert not any("--base-model" in warning for warning in exported.warnings)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["decoder", *FAMILIES])
def test_the_code_of_the_card_runs(run, corpus, tmp_path, monkeypatch, kind, capsys):
    decoder = kind == "decoder"
    if decoder:
        card, _ = card_of(run, 4, tmp_path / "model", as_decoder=True)
    else:
        card = family_card(kind, corpus, tmp_path)
    monkeypatch.chdir(tmp_path)  # the code says "model", the folder's name
    blocks = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(blocks) == (1 if decoder else 3)
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        if "vectors" in names:
            assert names["vectors"].shape == (2, 32) and names["vectors"].isfinite().all()
    if not decoder:
        assert len(capsys.readouterr().out.splitlines()) >= 5  # the masks' fillings


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("languages: [english]", r"languages\.0: must be a language code of ISO 639 .*, not 'english'"),
        ("languages: [xx]", r"languages\.0: must be a language code .*, not 'xx'"),
        ("languages: [no]", r"languages\.0: must be non-empty text, not False"),
        ("licens: mit", r"licens: unknown key \(did you mean 'license'\?\)"),
        ("license: ''", "license: must be non-empty text, not ''"),
        ("base_model: ModernBERT", "base_model: must be a hub id OWNER/NAME such as .*, not 'ModernBERT'"),
        ("corpora: [a]", r"corpora: must be a mapping, not \['a'\]"),
        ("corpora: {corpus: mit}", r"corpora\.corpus: must be a mapping with title, license"),
        ("corpora: {corpus: {licens: mit}}", r"corpora\.corpus\.licens: unknown key \(did you mean 'license'"),
        ("- a", "must be a mapping with name, languages"),
        ("a: [", "invalid YAML: "),
    ],
)
def test_facts_that_cannot_be_read_are_told(tmp_path, content, expected):
    (tmp_path / "facts.yaml").write_text(content)
    with pytest.raises(DetourError, match=rf"^--card-facts .*facts\.yaml: {expected}|^--card-facts .*{expected}"):
        read_card_metadata(str(tmp_path / "facts.yaml"))
    with pytest.raises(DetourError, match=r"no\.yaml: cannot be read: No such file"):
        read_card_metadata(str(tmp_path / "no.yaml"))


@pytest.mark.parametrize("key", ["license", "licence"])
def test_license_has_two_spellings(tmp_path, key):
    (tmp_path / "facts.yaml").write_text(f"{key}: mit\ncorpora: {{licence: {{{key}: odbl}}}}")
    facts = read_card_metadata(str(tmp_path / "facts.yaml"))
    assert (facts.license, facts.corpora) == ("mit", {"licence": CorpusFacts(license="odbl")})


def test_facts_of_a_corpus_that_is_not_there_are_refused(run, tmp_path):
    with pytest.raises(DetourError, match=r"corpora\.corpse: the run reads no corpus of this name .*'corpus'"):
        card_of(run, 6, tmp_path / "model", given=CardMetadata(corpora={"corpse": CorpusFacts(license="mit")}))
    assert not (tmp_path / "model").exists()


def test_what_is_said_on_the_command_line_goes_over_the_file():
    said = CardMetadata(name="a", languages=("fr",)).over(GIVEN)
    assert (said.name, said.languages, said.license) == ("a", ("fr",), "cc-by-4.0")
    with pytest.raises(DetourError, match=r"^languages\.0: must be a language code .*, not 'french'$"):
        validate(CardMetadata(languages=("french",)), shown=str)


def test_a_license_of_ones_own_is_other(run, tmp_path):
    card, _ = card_of(run, 6, tmp_path / "model", given=CardMetadata(license="For the hospital only"))
    assert (front_matter(card)["license"], front_matter(card)["license_name"]) == ("other", "For the hospital only")


HOSTILE = "mit\n---\nlicense: apache-2.0\n---\n# <script>alert(1)</script>\n\n# Not a heading | [x](y)\u202e"


def test_text_that_is_given_stays_text(run, tmp_path):
    corpora = {"corpus": CorpusFacts(HOSTILE, HOSTILE, HOSTILE, "https://a.example/b")}
    texts = dict.fromkeys(("name", "license", "description", "contact", "domain"), HOSTILE)
    given = CardMetadata(**texts, tags=(HOSTILE,), corpora=corpora)
    card, _ = card_of(run, 6, tmp_path / "model", given=given, evaluation=[
        {"task": "a", "title": HOSTILE, "metric": HOSTILE, "mean": 0.5, "sd": None, "seeds": 1, "protocol": HOSTILE}
    ])  # fmt: skip
    plain, _ = card_of(run, 6, tmp_path / "plain")
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    assert front_matter(card)["license"] == "other" and yaml.safe_load(front)["pipeline_tag"] == "fill-mask"
    lines = body.splitlines()
    assert "---" not in lines and not any(re.search(r"(?<!\\)<script", line) for line in lines) and "\u202e" not in card
    headings = [line for line in lines if line.startswith("#") and line.lstrip("# ") not in plain]
    assert len(headings) == 2 and headings[1] == "## Evaluation"  # the name, in one line, and the scores
    assert all(len(row) > 3 for heading in ("Corpora", "Evaluation") for row in table(card, heading))


@pytest.mark.parametrize(
    ("domain", "expected"), [(None, False), ("legal", False), ("Medical", True), ("clinical", True)]
)
def test_only_a_medical_model_is_said_not_to_be_a_medical_device(run, tmp_path, domain, expected):
    card, _ = card_of(run, 6, tmp_path / "model", given=CardMetadata(domain=domain))
    assert ("not a medical device" in card) == expected


def test_filters_duplicates_and_the_held_out_share_are_told(run, corpus, tmp_path):
    path = manifest_path(corpus.prefix)
    content = path.read_text()
    manifest = json.loads(content)
    assert table(card_of(run, 6, tmp_path / "none")[0], "Corpora")[0]["Filters"] == "none"
    options = {"min_chars": 200, "language": ["fr"], "deduplicate": "near", "similarity": 0.8, "held_out": 0.01}
    options |= {"exclude_words": 13}
    made = {"records": 1000, "removed": {"short": 40, "excluded": 3, "duplicate": 7, "long": 0}, "held_out": 9}
    try:
        path.write_text(json.dumps(manifest | made | {"options": manifest["options"] | options}))
        row = table(card_of(run, 6, tmp_path / "filtered")[0], "Corpora")[0]
        for unfit in ({"removed": []}, {"options": None}, {"held_out": "x"}, {"files": []}, {"records": None}):
            path.write_text(json.dumps(manifest | made | unfit))
            assert "Filters" not in table(card_of(run, 6, tmp_path / str(unfit))[0], "Corpora")[0], unfit
    finally:
        path.write_text(content)
    assert row["Filters"] == (
        "200 characters or more; in fr; near duplicates removed (similarity 0.8); "
        "without 13 words in a row of excluded texts; "
        "removed from 1,000: 40 too short, 3 with excluded text, 7 duplicates"
    )
    assert row["Held out"] == "9 documents (1%)"


def test_a_checkpoints_state_of_any_type_is_read_or_refused(run, tmp_path):
    whole = run / "checkpoints" / "step-00000006"
    folder = tmp_path / whole.name
    folder.mkdir()
    state = json.loads((whole / "run_state.json").read_text())
    refused = 0
    for way in places(state):
        for value in WRONG:
            (folder / "run_state.json").write_text(json.dumps(with_other(state, way, value)))
            try:
                facts = CheckpointInfo.read(folder)
                assert facts.corpora and facts.sessions == [] and facts.run_settings == {}
            except DetourError as fault:
                refused += 1
                assert "run_state.json" in str(fault)
    assert refused > 100
