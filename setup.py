"""Installation of megatron-detour; constraints.txt pins tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "megatron_detour/__init__.py").read_text())[1]

CLEAN = ["rensa>=0.5", "py3langid>=0.4"]  # near duplicates, languages
RAY = ["ray>=2.40"]
WANDB = ["wandb>=0.19"]

setup(
    name="megatron-detour",
    version=version,
    description="Continued pretraining of encoders with a causal language modeling detour",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_detour", "megatron_detour.*"]),
    package_data={
        "megatron_detour": ["recipes/*.yaml", "recipes/*.json", "recipes/*.sh", "ds_configs/*.json"],
        "megatron_detour.observe": ["*.html.j2"],
        "megatron_detour.ui": ["*.html.j2"],
        "megatron_detour.evaluation": ["tasks/*.yaml", "finetuning/protocols/*.yaml", "report/*.html.j2"],
        "megatron_detour.release": ["*.j2"],
        "megatron_detour.study.page": ["*.html.j2"],
    },
    entry_points={"console_scripts": ["megatron-detour = megatron_detour.commands.main:entry"]},
    install_requires=[
        "torch>=2.11",
        # Versions up to 0.19.3 compute wrong ZeRO-2 gradients for tied embeddings, and checkpoint/state.py reads
        # ZeRO-2's partition layout; tests/training/test_zero2.py checks both.
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.2,<6",  # evaluation/finetuning uses train_sampling_strategy; exports open in earlier ones
        "tokenizers>=0.22",
        "safetensors>=0.5",
        "huggingface_hub>=1.0",
        "numpy>=1.26",
        "PyYAML>=6",
        "rich>=13",
        "matplotlib>=3.8",
        "jinja2>=3.1",
        "tensorboard>=2.16",
        "msgspec>=0.19",
        "pyarrow>=17",
        "datasets>=4",
        "sentencepiece>=0.2.1",
        "protobuf>=5",
        "psutil>=5.9",
        "packaging>=23",
        # evaluation
        "accelerate>=1.10",
        "scikit-learn>=1.5",
        "scipy>=1.11",
        "seqeval>=1.2.2",
        # A faster byte-level BPE engine, where wheels exist; tokenizers is the fallback.
        "fastokens>=0.3.5; platform_system == 'Linux' and platform_machine == 'x86_64'",
    ],
    extras_require={
        "clean": CLEAN,
        "ray": RAY,
        "wandb": WANDB,
        # Compiled against the installed torch (docs/parallelism.md). NVIDIA's apex is not on PyPI, so it cannot be an
        # extra.
        "flash-attn": ["flash-attn>=2.7"],
        "test": [
            *CLEAN,
            *RAY,
            "megatron-core>=0.16",
            "pytest>=8",
            "pytest-xdist>=3.7",
            "hypothesis>=6.100",
            "ruff>=0.14",
            # CUDA builds of torch pin their own triton, so constraints.txt pins none; with CPU builds its interpreter
            # runs the fused kernels.
            "triton>=3.6; platform_system == 'Linux'",
        ],
    },
)
