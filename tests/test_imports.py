"""Imports point one way. ALLOWED is the architecture; any arrow that it does not name is a fault."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, BENCHMARKS = "megatron_detour", "benchmarks"

# A module or a package -> what of the package it may import; then which libraries. The longest name that fits rules.
ALLOWED = {
    "": ("", ""),
    "text": ("", ""),
    "errors": ("text", ""),
    "log": ("text", ""),
    "structured": ("errors", "yaml"),
    "settings": ("settings errors", ""),
    "model_parts": ("settings", ""),
    "files": ("", ""),
    "registry": ("", ""),
    "counter_rng": ("", "numpy"),
    "amounts": ("settings", ""),
    "ui": ("ui objectives errors files", "rich jinja2 matplotlib"),
    "config": ("config amounts settings objectives optimizers model_parts errors", "yaml"),
    "config.deepspeed": ("errors", "deepspeed"),
    "plan": ("config objectives errors", ""),
    "runtime": ("runtime ui errors files", "psutil torch"),
    "tokenizer": ("tokenizer errors files", "numpy"),
    "tokenizer.vocabulary": ("tokenizer errors files", "numpy tokenizers huggingface_hub"),
    "tokenizer.sentencepiece_model": ("errors", "tokenizers sentencepiece google"),
    "tokenizer.bert_vocabulary": ("errors", "tokenizers"),
    "tokenizer.extension": ("errors", "tokenizers"),
    "objectives": ("objectives amounts registry settings tokenizer counter_rng", "numpy"),
    "optimizers": ("optimizers registry settings", "torch"),
    "parallel": ("parallel", "torch"),
    "kernels": ("kernels errors", "torch"),
    "kernels.fused": ("kernels.plain", "torch triton"),
    "model": ("parallel kernels model model_parts errors", "torch"),
    "model.families": ("parallel model model_parts registry errors", "torch transformers"),
    "data": ("data tokenizer counter_rng config plan errors files", "numpy"),
    "data.manifest": ("tokenizer errors", "msgspec"),
    "data.batches": ("data tokenizer objectives config errors files", "numpy torch"),
    "corpus": ("corpus data tokenizer ui settings errors files", "numpy msgspec"),
    "corpus.ngrams": ("counter_rng", "numpy"),
    "corpus.sources": ("errors", "pyarrow datasets huggingface_hub"),
    "corpus.records": ("errors", "msgspec numpy"),
    "corpus.texts": ("corpus data.manifest tokenizer errors", "pyarrow"),
    "corpus.lines": ("corpus errors", "numpy pyarrow"),
    "corpus.documents": ("corpus errors", "msgspec pyarrow"),
    "corpus.examine": ("corpus data tokenizer errors files", "numpy matplotlib"),
    "corpus.engines": ("tokenizer data errors", "numpy tokenizers fastokens sentencepiece"),
    "corpus.filters": ("corpus errors", "numpy rensa py3langid"),
    "corpus.ray_workers": ("corpus errors", "ray"),
    "corpus.train_tokenizer": ("corpus errors files", "tokenizers"),
    "corpus.extend_tokenizer": ("corpus tokenizer errors", "tokenizers"),
    "checkpoint": ("parallel model checkpoint tokenizer errors files", "torch safetensors"),
    "checkpoint.huggingface": (
        "parallel model checkpoint tokenizer errors files",
        "torch safetensors tokenizers transformers",
    ),
    "checkpoint.pickled": ("errors", "numpy torch"),
    "checkpoint.source": (
        "checkpoint.flexbert checkpoint.pickled model.families tokenizer.vocabulary errors structured",
        "",
    ),
    "release": (
        "release checkpoint model tokenizer objectives data.manifest observe.run_files observe.run_folder "
        "observe.steps ui settings config plan errors",
        "torch yaml jinja2 huggingface_hub",
    ),
    "observe": ("observe ui objectives errors files", "numpy matplotlib"),
    "observe.meter": ("observe model.peaks errors files", "torch"),
    "observe.run_files": ("objectives settings errors", "msgspec"),
    "observe.sinks": ("observe errors files", "tensorboard wandb"),
    "evaluation": ("evaluation settings errors files", "numpy msgspec"),
    "evaluation.metrics": ("errors", "numpy sklearn scipy seqeval"),
    "evaluation.task_types": ("evaluation.task_types evaluation.metrics registry errors", "numpy torch transformers"),
    "evaluation.task": ("evaluation.task_types settings errors", ""),
    "evaluation.examples": ("evaluation.task evaluation.task_types errors", ""),
    "evaluation.probes": ("corpus.documents evaluation.models errors", "torch transformers rich"),
    "evaluation.finetuning": (
        "evaluation.finetuning evaluation.task evaluation.task_types evaluation.examples "
        "evaluation.models evaluation.results settings ui errors",
        "numpy torch transformers msgspec",
    ),
    "evaluation.report": (
        "evaluation.report evaluation.task evaluation.task_types evaluation.metrics evaluation.models "
        "evaluation.results ui errors files",
        "numpy msgspec scipy matplotlib rich",
    ),
    "evaluation.masked_words": (
        "evaluation.masked_words evaluation.models evaluation.probes corpus.documents counter_rng settings ui "
        "errors files",
        "numpy torch transformers rich",
    ),
    "analysis": (
        "analysis evaluation corpus.documents checkpoint model.families model_parts counter_rng settings ui "
        "files errors",
        "numpy torch transformers safetensors sklearn",
    ),
    "analysis.held_out_loss": (
        "checkpoint config evaluation.models model parallel.state tokenizer.vocabulary training.validation errors",
        "torch",
    ),
    "analysis.gradients": (
        "checkpoint data.batches model objectives tokenizer.vocabulary errors",
        "numpy torch",
    ),
    "run_directory": (
        "checkpoint.source checkpoint.store config data.manifest observe.sinks plan runtime.lock "
        "tokenizer.vocabulary errors files",
        "yaml",
    ),
    "preflight": (
        "run_directory objectives config plan model_parts model.families kernels.requirements "
        "data.integrity tokenizer checkpoint.source checkpoint.huggingface errors",
        "",
    ),
    "forecast": (
        "forecast preflight run_directory objectives optimizers config plan model.families model.flops model.peaks "
        "model.roofline parallel.shard_spec data.manifest data.indexed data.order ui errors",
        "numpy",
    ),
    "study": (
        "study analysis config plan preflight run_directory checkpoint.store data.manifest model.families model_parts "
        "observe.sinks evaluation settings forecast.storage structured ui errors files",
        "numpy scipy yaml msgspec",
    ),
    "study.records": ("errors", "msgspec"),
    "study.page": (
        "study.page study.data study.records study.power study.statistics analysis.drift analysis.layer_choice "
        "evaluation.report objectives ui errors files",
        "numpy matplotlib",
    ),
    "__main__": ("commands", ""),
    "commands": (
        "commands log forecast preflight run_directory training checkpoint corpus settings config plan data model "
        "kernels parallel observe runtime release evaluation analysis ui errors",
        "torch psutil packaging rich transformers",
    ),
    "commands.analyze": (
        "commands.parser analysis evaluation config settings ui files errors",
        "rich yaml",
    ),
    "commands.init": (
        "commands.parser config settings plan corpus.texts forecast preflight model.families errors",
        "psutil torch yaml",
    ),
    "commands.batches": (
        "commands.parser config data plan objectives tokenizer preflight errors",
        "numpy tokenizers",
    ),
    "commands.main": ("commands.parser errors", ""),
    "commands.study": ("commands.parser study errors", ""),
    "commands.parser": ("config settings errors", ""),
    "commands.plan": ("commands.parser forecast config plan ui errors", ""),
    "training": (
        "training log run_directory preflight runtime checkpoint data tokenizer model observe parallel "
        "kernels config errors files forecast objectives plan",
        "numpy torch",
    ),
    "training.engine": ("training parallel config plan errors files", "torch deepspeed"),
    "benchmarks": (
        "benchmarks data corpus tokenizer model observe parallel kernels ui errors files objectives settings config",
        "numpy torch transformers",
    ),
    "benchmarks.checkpoints": (
        "benchmarks checkpoint config model parallel plan training settings ui errors",
        "torch psutil transformers",
    ),
    "benchmarks.read": ("benchmarks data tokenizer config settings ui errors files objectives", "numpy"),
    "benchmarks.builders": (
        "benchmarks corpus data tokenizer errors",
        "numpy tokenizers fastokens sentencepiece datasets datatrove",
    ),
    "benchmarks.process": ("benchmarks errors", "psutil"),
    "benchmarks.gpu_day": ("benchmarks structured errors files", "torch"),
    "benchmarks.gpu_parts": (
        "benchmarks commands.machine corpus model observe parallel errors files",
        "torch transformers yaml",
    ),
}
# These load only when a function needs them, so that the rest of the module works fast and without them.
LAZY = {
    "benchmarks.builders": "numpy tokenizers fastokens sentencepiece datasets datatrove",
    "benchmarks.checkpoints": "transformers",
    "benchmarks.contenders": "transformers",
    "benchmarks.gpu_parts": "transformers",
    "tokenizer.vocabulary": "tokenizers huggingface_hub",
    "tokenizer.sentencepiece_model": "tokenizers sentencepiece google",
    "tokenizer.bert_vocabulary": "tokenizers",
    "tokenizer.extension": "tokenizers",
    "corpus.sources": "pyarrow datasets huggingface_hub",
    "corpus.lines": "pyarrow",
    "corpus.documents": "pyarrow",
    "corpus.examine": "matplotlib",
    "corpus.engines": "tokenizers fastokens sentencepiece",
    "corpus.filters": "rensa py3langid",
    "corpus.ray_workers": "ray",
    "checkpoint.huggingface": "tokenizers transformers",
    "model.families.base": "torch transformers",
    "model.families.modernbert": "torch transformers",
    "model.families.bert": "torch transformers",
    "model.families.eurobert": "torch transformers",
    "model.activations": "torch",
    "training.engine": "deepspeed",
    "config.deepspeed": "deepspeed",
    "optimizers.adamw": "torch",
    "optimizers.base": "torch",
    "optimizers.lion": "torch",
    "optimizers.stable_adamw": "torch",
    "observe.sinks": "tensorboard wandb",
    "analysis.hidden_states": "torch transformers",
    "analysis.linear_probe": "sklearn",
    "release.card": "jinja2",
    "release.hub": "huggingface_hub",
    "evaluation.finetuning.suite": "torch",
    "commands.init": "torch",
    "corpus.texts": "pyarrow",
    "evaluation.metrics": "sklearn scipy seqeval",
    "evaluation.finetuning.worker": "torch",
    "evaluation.report.statistics": "scipy",
    "study.power": "scipy",
    "study.page.plots": "matplotlib",
    "study.page.drift_plots": "matplotlib",
    "evaluation.report.plots": "matplotlib",
    "evaluation.masked_words.measure": "torch transformers",
}
TYPES_ONLY = {
    "parallel.zero": "deepspeed",
    "ui": "matplotlib",
}  # under TYPE_CHECKING, beyond what ALLOWED names


@dataclass(frozen=True)
class Import:
    module: str  # absolute, for instance megatron_detour.data.stream or torch.nn
    line: int
    at_load: bool
    for_types: bool


def imports_of(source: str, modules: set[str], module: str = "") -> list[Import]:
    """All imports of a module; `modules` are those of the package, to tell a submodule from a name."""
    return list(_walk(ast.parse(source), modules, module, at_load=True, for_types=False))


def _walk(node: ast.AST, modules: set[str], module: str, at_load: bool, for_types: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, node.lineno, at_load, for_types) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            # One dot is the module's package; the caller gives a package its own name with ".__init__".
            parents = [PACKAGE, *module.split(".")][: -node.level]
            base = ".".join([*parents, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield Import(inner if inner in modules else base, node.lineno, at_load, for_types)
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        for child in node.body:
            yield from _walk(child, modules, module, at_load=False, for_types=True)
        for child in node.orelse:
            yield from _walk(child, modules, module, at_load, for_types)
    else:
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from _walk(child, modules, module, at_load and not inside, for_types)


def within(name: str, places: str) -> bool:
    """Whether a dotted name is one of these places or lies in one."""
    return any(name == place or name.startswith(f"{place}.") for place in places.split())


def rule_for(module: str) -> tuple[str, str]:
    """The row of the longest name that fits; a new top-level module needs a row of its own."""
    fitting = [place for place in ALLOWED if place and within(module, place)]
    if not fitting and module:
        raise KeyError(f"{module}: ALLOWED has no row for it")
    own, libraries = ALLOWED[max(fitting, key=len, default="")]
    # Whoever may raise a DetourError may read a file from outside with it, and show what stood there.
    return (f"{own} structured text" if "errors" in own.split() and module != "structured" else own), libraries


def forbidden(module: str, found: Import) -> str | None:
    """Why `module`, without the package's name, must not have this import; None if it may."""
    own, libraries = rule_for(module)
    top, _, rest = found.module.partition(".")
    if top in sys.stdlib_module_names:
        return None
    where = f"{module or PACKAGE}, line {found.line}: "
    if top in (PACKAGE, BENCHMARKS):
        place = found.module if top == BENCHMARKS else rest
        return None if not place or within(place, own) else f"{where}may not import {found.module}"
    types = " ".join(names for place, names in TYPES_ONLY.items() if within(module, place))
    if found.for_types and top in types.split():
        return None
    if top not in libraries.split():
        return f"{where}may not import {found.module}"
    if found.at_load and top in LAZY.get(module, "").split():
        return f"{where}may import {found.module} inside functions only"
    return None


def modules_of(folder: Path) -> dict[str, Path]:
    """Modules by their names without the package's, which is itself ""."""
    result = {}
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        result[".".join(part for part in parts if part != "__init__")] = path
    return result


MODULES = modules_of(ROOT / PACKAGE)
FULL_NAMES = {f"{PACKAGE}.{name}" if name else PACKAGE for name in MODULES}
MODULES |= {
    f"{BENCHMARKS}.{name}" if name else BENCHMARKS: path for name, path in modules_of(ROOT / BENCHMARKS).items()
}
FULL_NAMES |= {name for name in MODULES if within(name, BENCHMARKS)}


def check(module: str, source: str, package: bool = False) -> list[str]:
    here = f"{module}.__init__" if package else module
    reasons = (forbidden(module, found) for found in imports_of(source, FULL_NAMES, here))
    return [reason for reason in reasons if reason]


@pytest.mark.parametrize("module", MODULES, ids=lambda name: name or PACKAGE)
def test_every_arrow_is_allowed(module):
    path = MODULES[module]
    assert check(module, path.read_text(encoding="utf-8"), path.name == "__init__.py") == []


def test_the_table_names_what_exists():
    for place in [*ALLOWED, *LAZY, *TYPES_ONLY]:
        assert place in MODULES, f"ALLOWED names {place}, which is no module"


def test_libraries_are_kept_to_their_places():
    """The promises of the design, read off the table itself, so that a row is not widened by mistake."""

    def places(library: str) -> set[str]:
        return {place for place, (_, libraries) in ALLOWED.items() if library in libraries.split()}

    assert places("deepspeed") == {"training.engine", "config.deepspeed"}
    packages = {place.split(".")[0] for place in places("transformers")}
    assert packages == {"analysis", "checkpoint", "commands", "evaluation", "benchmarks", "model"}
    assert places("triton") == {"kernels.fused"}
    assert {place for place in places("torch") if within(place, "data corpus tokenizer")} == {"data.batches"}
    assert {place for place in places("tokenizers") if within(place, "data corpus tokenizer")} == {
        "tokenizer.vocabulary",
        "tokenizer.sentencepiece_model",
        "tokenizer.bert_vocabulary",
        "tokenizer.extension",
        "corpus.train_tokenizer",
        "corpus.extend_tokenizer",
        "corpus.engines",
    }
    assert ALLOWED["parallel"] == ("parallel", "torch")
    assert {place.split(".")[0] for place, (own, _) in ALLOWED.items() if within("training", own)} == {
        "training",
        "commands",
        "benchmarks",
    }


@pytest.mark.parametrize(
    ("module", "source", "why"),
    [
        ("config", "from megatron_detour.plan import Plan", "may not import megatron_detour.plan"),
        ("config", "from megatron_detour import plan", "may not import megatron_detour.plan"),
        ("config", "from . import plan", "may not import megatron_detour.plan"),
        ("config", "from .plan import Plan", "may not import megatron_detour.plan"),
        ("plan", "def f():\n    import megatron_detour.data.stream", "may not import megatron_detour.data.stream"),
        ("errors", "from megatron_detour.files import flush", "may not import megatron_detour.files"),
        ("parallel.state", "import numpy", "may not import numpy"),
        ("parallel.state", "from ..model import flops", "may not import megatron_detour.model.flops"),
        ("model.flops", "from megatron_detour.config import load", "may not import megatron_detour.config"),
        ("objectives", "from megatron_detour.data.stream import Pieces", "may not import megatron_detour.data.stream"),
        ("objectives", "from megatron_detour.data import stream", "may not import megatron_detour.data.stream"),
        ("data.stream", "def f():\n    import torch", "may not import torch"),
        ("data.stream", "from megatron_detour.model import flops", "may not import megatron_detour.model.flops"),
        ("data.indexed", "from tokenizers import Tokenizer", "may not import tokenizers"),
        ("corpus.engines", "from tokenizers import Tokenizer", "inside functions only"),
        ("corpus.engines", "if x:\n    import tokenizers", "inside functions only"),
        ("data.batches", "import megatron_detour.model.flops", "may not import megatron_detour.model.flops"),
        ("checkpoint.store", "import megatron_detour.corpus", "may not import megatron_detour.corpus"),
        ("checkpoint.store", "import deepspeed", "may not import deepspeed"),
        ("checkpoint.huggingface", "class A:\n    import transformers", "inside functions only"),
        ("observe.report", "import torch", "may not import torch"),
        (
            "evaluation.probes",
            "import megatron_detour.training.trainer",
            "may not import megatron_detour.training.trainer",
        ),
        ("training.trainer", "def f():\n    import deepspeed", "may not import deepspeed"),
        ("training.trainer", "if not TYPE_CHECKING:\n    pass\nelse:\n    pass\nimport transformers", "transformers"),
    ],
)
def test_a_forbidden_arrow_is_found(module, source, why):
    (reason,) = check(module, source)
    assert reason.startswith(f"{module}, line ")
    assert why in reason


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("config", "import json, os.path\nfrom megatron_detour.errors import DetourError\nfrom .errors import nearest"),
        ("corpus.build", "from megatron_detour import __version__\nfrom . import join\nfrom ..files import flush"),
        (
            "corpus.engines",
            "if TYPE_CHECKING:\n    from tokenizers import Tokenizer\ndef f():\n    import tokenizers",
        ),
        ("parallel.zero", "if TYPE_CHECKING:\n    from deepspeed import DeepSpeedEngine"),
        ("parallel.state", "import torch.distributed as dist"),
    ],
)
def test_an_allowed_arrow_is_left_alone(module, source):
    assert check(module, source) == []


def test_a_package_may_import_its_own_modules():
    assert check("data", "from .pack import Packs", package=True) == []
    assert check("data", "from ..training import trainer", package=True) != []


def test_a_new_package_needs_a_row():
    with pytest.raises(KeyError, match="laboratory: ALLOWED has no row"):
        check("laboratory", "import torch")
