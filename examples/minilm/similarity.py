"""Correlation of sentence similarities with human grades, without fine-tuning: similarity.py TASK MODEL...

TASK is a folder of JSON Lines files with pairs {"text_a", "text_b", "score"}; all of its splits are used. Sentences
are as similar as the cosine of the means of their hidden states says. Spearman's correlation, in points.
"""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import torch
from scipy.stats import spearmanr
from transformers import AutoModel, AutoTokenizer, logging


@torch.no_grad()
def embed(folder: str, texts: list[str]) -> torch.Tensor:
    """Return the mean hidden state of each text, [texts, hidden size]."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    inputs = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


def main(task: str, *models: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    files = (gzip.decompress(path.read_bytes()) for path in sorted(Path(task).glob("*.jsonl.gz")))
    pairs = [json.loads(line) for file in files for line in file.splitlines()]
    for folder in models:
        first, second = (embed(folder, [pair[key] for pair in pairs]) for key in ("text_a", "text_b"))
        similarity = torch.cosine_similarity(first, second).tolist()
        correlation = spearmanr(similarity, [pair["score"] for pair in pairs]).statistic
        print(f"{folder}: {100 * correlation:.1f} ({len(pairs)} pairs)")


if __name__ == "__main__":
    main(*sys.argv[1:])
