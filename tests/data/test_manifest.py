"""A manifest is a file from outside: whatever stands in it is a manifest or one sentence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_detour.corpus.examine import verify
from megatron_detour.data.manifest import read_manifest
from megatron_detour.errors import DetourError

ODD = [None, True, -1, 1.5, "x", "", [], [None], [{}], {}, {"x": None}, {"bin": None}, 10**30]


@pytest.fixture
def copied(corpus, tmp_path) -> Path:
    for suffix in (".bin", ".idx", ".manifest.json"):
        (tmp_path / f"c{suffix}").write_bytes(Path(f"{corpus.prefix}{suffix}").read_bytes())
    return tmp_path / "c"


def written(prefix: Path) -> dict[str, Any]:
    return json.loads(Path(f"{prefix}.manifest.json").read_text(encoding="utf-8"))


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Where a value stands in a tree of mappings and lists, for each value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    return (
        [path, *(place for key, one in inner for place in places(one, (*path, key)))]
        if path
        else [place for key, one in inner for place in places(one, (key,))]
    )


def put(tree: Any, path: tuple, value: Any) -> None:
    for key in path[:-1]:
        tree = tree[key]
    if value is ...:
        del tree[path[-1]]
    else:
        tree[path[-1]] = value


def test_a_manifest_with_any_value_replaced_is_read_or_refused_in_a_sentence(copied):
    """Every place of the manifest, with every odd value or none; whoever reads it must not meet a surprise."""
    whole = written(copied)
    refused = 0
    for path in places(whole):
        for value in (*ODD, ...):
            tree = json.loads(json.dumps(whole))
            put(tree, path, value)
            Path(f"{copied}.manifest.json").write_text(json.dumps(tree))
            try:
                verify(str(copied))
            except DetourError as error:
                refused += 1
                assert "\n" not in str(error)
                assert len(str(error)) < len(str(copied)) + 700
    assert refused > 300


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("files",), {}, "files: Expected `object` of length >= 2"),
        (("files",), None, "files: Expected `object`, got `null`"),
        (("files", "bin"), ..., "files: Expected `object` of length >= 2"),
        (("files", "idx"), "x", "files: Expected `object`, got `str`"),
        (("files", "bin", "sha256"), "", "files: Expected `str` matching regex"),
        (("files", "bin", "bytes"), True, "files: Expected `int`, got `bool`"),
        (("tokenizer", "size"), -1, "tokenizer: Expected `int` >= 1 - at `tokenizer.size`"),
        (("tokenizer", "special_ids"), [5000], "tokenizer: a special id is not below size"),
        (("tokenizer",), ..., "missing keys: tokenizer"),
        (("sources",), [None], "sources: Expected `object`, got `null`"),
        (("removed",), {"short": "many"}, "removed: Expected `int`, got `str`"),
        (("tokens",), "many", "tokens: Expected `int`, got `str`"),
        (("more",), 1, "unknown keys: more"),
    ],
)
def test_what_is_wrong_in_a_manifest_is_named(copied, path, value, says):
    tree = written(copied)
    put(tree, path, value)
    Path(f"{copied}.manifest.json").write_text(json.dumps(tree))
    with pytest.raises(DetourError) as caught:
        read_manifest(copied)
    assert str(caught.value).startswith(f"{copied}.manifest.json: {says}")


def test_all_faults_of_a_manifest_are_told_at_once(copied):
    tree = written(copied) | {"documents": "many", "plan": 3, "engine": []}
    Path(f"{copied}.manifest.json").write_text(json.dumps(tree))
    with pytest.raises(DetourError, match=r"documents: Expected.*; engine: Expected.*; plan: Expected"):
        read_manifest(copied)


def test_many_sources_are_told_by_counts_and_the_first(copied):
    manifest = read_manifest(copied)
    many = dataclasses.replace(
        manifest, sources=[{"path": f"{i}.txt", "bytes": 2, "state": "s"} for i in range(100_000)]
    )
    summary = many.input_summary()
    assert (summary["source_files"], summary["source_bytes"]) == (100_000, 200_000)
    assert len(json.dumps(summary)) < 400
