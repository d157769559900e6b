"""The graph of packages in docs/architecture.md: `python -m tests.architecture` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_imports import BENCHMARKS, FULL_NAMES, MODULES, PACKAGE, imports_of

PAGE = Path(__file__).parents[1] / "docs/architecture.md"
GRAPH = re.compile(r"(?<=<!-- graph -->\n).*(?=<!-- /graph -->)", re.DOTALL)
BASE = ("errors", "files", "settings", "structured", "text")  # imported nearly everywhere
Graph = dict[str, set[str]]


def packages() -> Graph:
    """What each top-level package or module of the project imports of the others."""
    graph: Graph = {}
    for module, path in MODULES.items():
        package = module.split(".")[0]
        if package and package not in BASE and package not in ("__main__", BENCHMARKS):
            own = f"{module}.__init__" if path.name == "__init__.py" else module
            for each in imports_of(path.read_text(encoding="utf-8"), FULL_NAMES, own):
                other = each.module.removeprefix(f"{PACKAGE}.").split(".")[0]
                if each.module in FULL_NAMES and other not in (package, PACKAGE, *BASE):
                    graph.setdefault(package, set()).add(other)
            graph.setdefault(package, set())
    return graph


def reachable(graph: Graph, package: str) -> set[str]:
    """Everything that a package imports, directly or through others."""
    seen: set[str] = set()
    waiting = list(graph[package])
    while waiting:
        other = waiting.pop()
        if other not in seen:
            seen.add(other)
            waiting.extend(graph[other])
    return seen


def reduced(graph: Graph) -> Graph:
    """The graph without arrows that follow from others."""
    behind = {package: reachable(graph, package) for package in graph}
    return {
        package: {other for other in others if not any(other in behind[third] for third in others)}
        for package, others in graph.items()
    }


def mermaid(graph: Graph) -> str:
    arrows = [f"  {package} --> {other}" for package in sorted(graph) for other in sorted(graph[package])]
    return "\n".join(["```mermaid", "graph TD", *arrows, "```"]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(GRAPH.sub(mermaid(reduced(packages())), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
