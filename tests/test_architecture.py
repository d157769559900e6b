"""docs/architecture.md: its graph is that of the code, and its example computes what it says."""

from __future__ import annotations

import doctest

from tests.architecture import GRAPH, PAGE, mermaid, packages, reachable, reduced


def test_packages_import_each_other_in_no_circle():
    graph = packages()
    assert [package for package in graph if package in reachable(graph, package)] == []


def test_an_arrow_that_follows_from_others_is_left_out():
    graph = {"top": {"middle", "bottom"}, "middle": {"bottom"}, "bottom": set()}
    assert reduced(graph) == {"top": {"middle"}, "middle": {"bottom"}, "bottom": set()}


def test_the_graph_is_that_of_the_code():
    assert GRAPH.search(PAGE.read_text(encoding="utf-8"))[0] == mermaid(reduced(packages())), (
        "run `python -m tests.architecture`"
    )


def test_the_worked_example_computes_what_it_says():
    text = PAGE.read_text(encoding="utf-8").replace("```", "")
    example = doctest.DocTestParser().get_doctest(text, {}, PAGE.name, str(PAGE), 0)
    failed, tried = doctest.DocTestRunner().run(example)
    assert (failed, tried > 5) == (0, True)
