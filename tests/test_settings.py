"""The reader of settings: rules, kinds that a key names, flags, JSON Schema, tables; all that follows is current."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import jsonschema
import pytest
import yaml

from megatron_detour.commands.main import main
from megatron_detour.config import RunConfig
from megatron_detour.errors import DetourError
from megatron_detour.settings import (
    Choice,
    Entries,
    Faults,
    Flag,
    Pattern,
    Range,
    Tagged,
    add_arguments,
    from_namespace,
    json_schema,
    markdown_table,
    read,
    to_plain,
    validate,
)
from tests.generated import PAGES, SCHEMA, schema, written
from tests.test_config import CHECKS, RECIPES, SMALL


@dataclass(frozen=True)
class Dog:
    weight: Annotated[float, Range(above=0), "in kg"]


@dataclass(frozen=True)
class Fish:
    lengths: Annotated[tuple[Annotated[int, Range(least=1)], ...], Entries(least=1, unique=True), "in mm"] = (30,)


PETS = Tagged({"dog": Dog, "fish": Fish})


@dataclass(frozen=True)
class Pet:
    name: Annotated[str, Pattern("[a-z]+", "a name in small letters"), Flag(group="who")]
    kind: Annotated[Dog | Fish, PETS, "what it is"]
    food: Annotated[str | None, Choice(("meat", "plants")), "what it eats"] = None
    home: Path | None = None
    prices: dict[str, float] = field(default_factory=dict)


def fault(raw) -> str:
    with pytest.raises(DetourError) as caught:
        read(Pet, raw, "pets.yaml")
    return str(caught.value).removeprefix("pets.yaml: ")


def test_a_key_names_a_kind_whose_keys_stand_beside_it():
    raw = {"name": "rex", "kind": "dog", "weight": "2e1", "home": "a/b", "prices": {"bowl": 3}}
    pet = read(Pet, raw, "pets.yaml")
    assert pet == Pet("rex", Dog(20.0), None, Path("a/b"), {"bowl": 3.0})
    assert to_plain(pet) == raw | {"weight": 20.0, "food": None}
    assert read(Pet, to_plain(pet), "") == pet
    assert read(Pet, {"name": "bo", "kind": "fish"}, "").kind == Fish()


def test_the_key_of_a_kind_may_differ_from_the_field():
    @dataclass(frozen=True)
    class Kept:
        animal: Annotated[Dog | Fish, Tagged(PETS.kinds, "species")]

    assert to_plain(read(Kept, {"species": "dog", "weight": 2}, "")) == {"species": "dog", "weight": 2.0}


def test_a_key_of_a_kind_that_is_also_a_key_beside_it_is_a_mistake():
    @dataclass(frozen=True)
    class Weighed:
        animal: Annotated[Dog | Fish, PETS]
        weight: float = 1.0

    with pytest.raises(ValueError, match="Weighed has the key weight twice"):
        read(Weighed, {"animal": "fish"}, "")


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ({"name": "rex", "kind": "dog"}, "weight: this key is required"),
        ({"name": "rex", "kind": "cat", "weight": 1}, "kind: must be one of dog, fish, not 'cat'"),
        ({"name": "rex", "kind": ["dog"]}, "kind: must be one of dog, fish, not ['dog']"),
        ({"name": "bo", "kind": "fish", "weight": 1}, "weight: a key of dog; with kind: fish remove it"),
        ({"name": "bo", "kind": "fish", "lengths": [1, 1]}, "lengths: must be a list without repetitions, not [1, 1]"),
        ({"name": "bo", "kind": "fish", "lengths": [0]}, "lengths.0: must be at least 1, not 0"),
        ({"name": "bo", "kind": "fish", "lengths": [0, 0]}, "2 faults:\n  - lengths.0: must be at least 1, not 0"),
        ({"name": "bo", "kind": "fish", "wieght": 1}, "wieght: unknown key (did you mean 'weight'?)"),
        ({"name": "Bo", "kind": "fish"}, "name: must be a name in small letters, not 'Bo'"),
        ({"name": "bo", "kind": "fish", "prices": {"a": "x"}}, "prices.a: must be a number, not 'x'"),
        ({"name": "bo", "kind": "fish", "food": "meet"}, "food: must be one of meat, plants, not 'meet' (did you mean"),
        ([], "must be a mapping with name, kind, food, home, prices, not []"),
    ],
)
def test_a_fault_is_one_sentence_with_its_key(raw, says):
    assert fault(raw).startswith(says)


def test_all_faults_are_reported_at_once_and_none_that_follows_from_another():
    def check(pet: Pet, faults: Faults) -> None:
        faults.add("food", "follows from the name", ["name"])
        faults.add("home", "is missing")

    with pytest.raises(DetourError) as caught:
        read(Pet, {"name": 3, "kind": "dog", "weight": -1}, "pets.yaml", check)
    assert str(caught.value).split("\n  - ") == [
        "pets.yaml: 3 faults:",
        "name: must be text, not 3",
        "weight: must be above 0, not -1",
        "home: is missing",
    ]


@dataclass(frozen=True)
class Options:
    out: Annotated[str, "where to write"]
    rate: Annotated[float, Range(above=0, below=1), Flag("R", "numbers"), "100% at most"] = 0.5
    files: Annotated[tuple[Path, ...], "what is read"] = ()
    dry: Annotated[bool, "only look"] = False


def options(*words: str) -> Options:
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    return from_namespace(Options, parser.parse_args(words))


def test_fields_are_flags():
    assert options("--out", "a") == Options("a")
    assert options("--out", "a", "--files", "b", "c", "--dry", "--rate", "0.1") == Options(
        "a", 0.1, (Path("b"), Path("c")), True
    )
    parser = argparse.ArgumentParser()
    add_arguments(parser, Options)
    shown = parser.format_help()
    assert "numbers:" in shown and "--rate R" in shown and "100% at most (0.5)" in shown
    with pytest.raises(DetourError, match=r"^--rate: must be above 0 and below 1, not 1\.0$"):
        validate(Options("a", 1.0))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--rate", "1"], "--rate: must be above 0 and below 1, not 1.0"),
        (["--rate", "x"], "--rate: must be a number, not 'x'"),
        (["--out", ""], "--out: must be non-empty text, not ''"),
    ],
)
def test_a_flag_has_the_rules_of_its_field(words, says, capsys):
    with pytest.raises(SystemExit):
        options("--out", "a", *words)
    assert says in capsys.readouterr().err


def test_a_flag_of_a_list_may_be_given_several_times():
    assert options("--out", "a", "--files", "b", "--files", "c").files == (Path("b"), Path("c"))


def test_the_schema_allows_what_the_reader_allows():
    validator = jsonschema.Draft202012Validator(json_schema(Pet, "pet"))
    validator.check_schema(validator.schema)
    assert validator.is_valid({"name": "rex", "kind": "dog", "weight": 2, "food": None})
    for wrong in (
        {"name": "rex", "kind": "dog"},
        {"name": "bo", "kind": "fish", "weight": 1},
        {"name": "bo", "kind": "fish", "lengths": [1, 1]},
        {"name": "bo", "kind": "fish", "food": "x"},
        {"name": "Bo", "kind": "fish"},
    ):
        assert not validator.is_valid(wrong)


def test_a_table_has_a_row_per_key():
    assert markdown_table(Pet).splitlines()[2:6] == [
        "| `name` | required |  |",
        "| `kind` | required | what it is: `dog`, `fish` |",
        "| `weight` | required | in kg |",
        "| `lengths` | `[30]` | in mm |",
    ]


def test_the_schema_of_run_files_knows_the_rules_of_single_keys():
    validator = jsonschema.Draft202012Validator(json.loads(schema()))
    for path in RECIPES:
        assert path.read_text(encoding="utf-8").startswith(f"# yaml-language-server: $schema={SCHEMA.name}\n")
        assert list(validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))) == []
    small = json.loads(json.dumps(SMALL).replace('"2e-4"', "2e-4"))  # YAML 1.1 makes a string of it
    assert validator.is_valid(small) and not validator.is_valid(small | {"z_los": 1})
    for optimizer, valid in (({"eps": 1e-8}, True), ({"name": "lion", "betas": [0.9, 0.9]}, True),
                             ({"name": "lion", "eps": 1e-8}, False), ({"name": "lion", "betas": [0.9, 1]}, False),
                             ({"betas": [0.9, 1]}, False)):  # fmt: skip
        assert validator.is_valid(small | {"optimizer": optimizer}) == valid
    missed = set()
    for case, (raw, says) in CHECKS.items():
        raw = json.loads(json.dumps(raw).replace('"2e-4"', "2e-4"))
        if ": must be" in says and validator.is_valid(raw):
            missed.add(case)
    assert missed == {"time limit", "frozen range", "rates out of order"}  # what a pattern cannot say


def test_the_command_prints_the_schema(capsys):
    assert main(["schema"]) == 0
    assert capsys.readouterr().out == schema()


def test_every_key_of_the_run_file_has_help():
    rows = [row for row in markdown_table(RunConfig).splitlines() if row.endswith("|  |")]
    assert rows == []


def test_the_stored_schema_and_tables_are_current():
    advice = "run `python -m tests.generated`"
    assert SCHEMA.read_text(encoding="utf-8") == schema(), advice
    for page in PAGES:
        assert page.read_text(encoding="utf-8") == written(page), advice
