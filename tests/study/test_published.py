"""docs/study.md is what the results kept in the repository give."""

from __future__ import annotations

import shutil

from megatron_detour.commands.main import main
from tests.harness import ROOT

RESULTS = ROOT / "examples" / "studies" / "cpu" / "results"


def test_every_figure_of_the_page_is_rebuilt_from_the_kept_results(tmp_path, capsys):
    kept = shutil.copytree(RESULTS, tmp_path / "results")
    assert main(["study", "report", str(kept), "--output", str(tmp_path)]) == 0
    capsys.readouterr()
    page, expected = ((folder / "study.md").read_text(encoding="utf-8") for folder in (tmp_path, ROOT / "docs"))
    assert page == expected
    made, published = (sorted((folder / "study").glob("*.*")) for folder in (tmp_path, ROOT / "docs"))
    assert [path.name for path in made] == [path.name for path in published]
    for path, other in zip(made, published, strict=True):
        if path.suffix in (".csv", ".txt", ".tex"):
            assert path.read_text() == other.read_text(), path.name
