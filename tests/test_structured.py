"""JSON and YAML from outside: what is accepted, and each kind of refusal."""

import pytest

from megatron_detour.errors import DetourError
from megatron_detour.structured import parse_json, parse_yaml, read_json, read_json_object, read_yaml


def test_what_is_read():
    assert parse_json('{"a": [1, {"a": 2}]}', "f") == {"a": [1, {"a": 2}]}
    assert parse_yaml("a: &x {b: 1}\nc:\n  <<: *x\n  b: 2\n", "f") == {"a": {"b": 1}, "c": {"b": 2}}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "f: duplicate key 'c'"),
        ('{"a": ', "f: invalid JSON: Expecting value"),
        ("[" * 100_000, "f: invalid JSON: nested too deeply"),
        ("1" * 10_000, "f: invalid JSON: Exceeds the limit"),
    ],
)
def test_refused_json(text, sentence):
    with pytest.raises(DetourError) as refused:
        parse_json(text, "f")
    assert str(refused.value).startswith(sentence)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a: 1\nphases: []\nb: {x: 1}\nphases: [1]\n", "f: line 4: duplicate key 'phases', first on line 2"),
        ("a: {x: 1, x: 2}\n", "f: line 1: duplicate key 'x'"),
        ("a: [", "f: invalid YAML: "),
        ("[" * 5_000, "f: invalid YAML: nested too deeply"),
        ("a: 2024-99-99\n", "f: invalid YAML: month must be in 1..12"),
        ("? [1, 2]\n: 3\n", "f: invalid YAML: "),
        ("a: " + "1" * 10_000, "f: invalid YAML: Exceeds the limit"),
    ],
)
def test_refused_yaml(text, sentence):
    with pytest.raises(DetourError) as refused:
        parse_yaml(text, "f")
    assert str(refused.value).startswith(sentence)


def test_files(tmp_path):
    file = tmp_path / "f.json"
    for read in (read_json, read_yaml):
        with pytest.raises(FileNotFoundError):
            read(file)
        with pytest.raises(DetourError, match="cannot be read: Is a directory"):
            read(tmp_path)
    file.write_bytes(b'{"a": "\xff"}')
    for read, kind in ((read_json, "JSON"), (read_yaml, "YAML")):
        with pytest.raises(DetourError, match=rf"f\.json: invalid {kind}: not UTF-8 \(byte 7\)"):
            read(file)
    file.write_text("[1]")
    assert read_json(file) == [1]
    with pytest.raises(DetourError, match=r"f\.json: not a JSON object"):
        read_json_object(file)
