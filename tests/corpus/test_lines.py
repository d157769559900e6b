"""Text in another encoding than UTF-8 is told from text, in whatever file and wherever a shard begins."""

from __future__ import annotations

import gzip
from pathlib import Path

import pyarrow
import pytest

from megatron_detour.corpus import lines, sources
from megatron_detour.corpus.documents import read_shard
from megatron_detour.corpus.records import TextKeys
from megatron_detour.corpus.sources import plan_shards
from megatron_detour.errors import DetourError

TEXTS = {
    "English": "The patient takes metformin twice a day.\nBP 120/80, seen by the doctor.\n",
    "French": "La patiente est traitée depuis l'été.\nŒdème à 38,5 °C.\n",
    "Russian": "Пациент принимает метформин два раза в день.\nДавление в норме.\n",
    "JSON": '{"text": "The patient takes metformin."}\n{"text": "No fever."}\n',
}
ENCODINGS = ("UTF-16LE", "UTF-16BE", "UTF-16", "UTF-32LE", "UTF-32BE", "UTF-32")
PACKED = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True)}


def read(path: Path, whole_files: bool = False) -> list[str]:
    blocks = [b for s in plan_shards([str(path)], whole_files) for b in read_shard(s, TextKeys())]
    assert not [reject for block in blocks for reject in block.rejects]
    return [text for block in blocks for text in block.texts]


@pytest.mark.parametrize("packed", PACKED)
@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_wide_text_is_refused_with_the_remedy(tmp_path, encoding, language, packed):
    path = tmp_path / f"a.{'jsonl' if language == 'JSON' else 'txt'}{packed}"
    for content in (TEXTS[language], TEXTS[language] * 300):
        path.write_bytes(PACKED[packed](content.encode(encoding)))
        for whole_files in (False, True):
            with pytest.raises(DetourError) as caught:
                read(path, whole_files)
            assert str(caught.value).startswith(f"{path}: its text is in {encoding}; ")
            assert str(caught.value).endswith(f"iconv -f {encoding} -t UTF-8")
            assert ("decompress it" in str(caught.value)) == bool(packed)


@pytest.mark.parametrize("stride", [500, 501, 502, 503])
@pytest.mark.parametrize("encoding", ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"])
def test_any_shard_of_wide_text_tells_its_encoding(tmp_path, monkeypatch, encoding, stride):
    monkeypatch.setattr(sources, "SHARD_BYTES", stride)
    monkeypatch.setattr(lines, "BLOCK_BYTES", 333)
    path = tmp_path / "a.txt"
    path.write_bytes((TEXTS["English"] * 30).encode(encoding))
    refused = 0
    for shard in plan_shards([str(path)]):
        try:
            texts = [text for block in read_shard(shard, TextKeys()) for text in block.texts]
            assert not "".join(texts).strip("\x00")  # no line begins in it
        except DetourError as error:
            assert f"its text is in {encoding}; " in str(error)
            refused += 1
    assert refused > 5


@pytest.mark.parametrize("language", TEXTS)
def test_utf_8_is_read_with_a_mark_and_without(tmp_path, language):
    name = "a.jsonl" if language == "JSON" else "a.txt"
    (tmp_path / name).write_text(TEXTS[language] * 40, encoding="utf-8")
    plain = read(tmp_path / name)
    assert len(plain) == 80
    (tmp_path / name).write_text(TEXTS[language] * 40, encoding="utf-8-sig")
    assert read(tmp_path / name) == plain


@pytest.mark.parametrize(
    "text",
    ["a\x00b", "a\x00b\x00" + "word " * 100, "record\x00\x00\x00\x00\x00of\x00\x00fixed width " * 30, "\x00" * 50],
)
def test_a_few_nuls_are_no_other_encoding(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == [text]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
@pytest.mark.parametrize("language", ["French", "JSON"])
def test_latin_1_is_a_reject_with_the_remedy(tmp_path, encoding, language):
    content = TEXTS[language].replace("No", "Né").replace("Œ", "é")
    path = tmp_path / ("a.jsonl" if language == "JSON" else "a.txt")
    path.write_bytes(content.encode(encoding))
    (block,) = (block for shard in plan_shards([str(path)]) for block in read_shard(shard, TextKeys()))
    assert block.rejects[-1] == (1, "not UTF-8; if it is Latin-1: iconv -f WINDOWS-1252 -t UTF-8")
