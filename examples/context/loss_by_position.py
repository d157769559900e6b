"""MLM loss by position in a document: loss_by_position.py TEXTS.jsonl.gz MODEL...

Windows of LONGEST tokens of the texts, 15% of whose tokens are masked, the same for all models.
"""

from __future__ import annotations

import gzip
import json
import sys
from itertools import pairwise

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, logging

LONGEST, WINDOWS, SHARE = 1024, 64, 0.15
BOUNDS = (0, 128, 256, 512, 1024)


@torch.no_grad()
def losses(folder: str, texts: list[str]) -> list[float]:
    """Return the mean loss in nats of masked tokens between each pair of BOUNDS."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForMaskedLM.from_pretrained(folder).eval()
    generator, summed, counts = torch.Generator().manual_seed(0), torch.zeros(LONGEST), torch.zeros(LONGEST)
    documents = (tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in texts)
    windows = [ids for document in documents for ids in document.split(LONGEST) if len(ids) == LONGEST]
    for ids in windows[:WINDOWS]:
        masked = torch.rand(LONGEST, generator=generator) < SHARE
        logits = model(input_ids=ids.masked_fill(masked, tokenizer.mask_token_id)[None]).logits[0]
        summed += torch.nn.functional.cross_entropy(logits, ids, reduction="none") * masked
        counts += masked
    return [float(summed[a:b].sum() / counts[a:b].sum()) for a, b in pairwise(BOUNDS)]


def main(path: str, *models: str) -> None:
    logging.set_verbosity_error()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    print("positions", *(f"{a}-{b - 1}" for a, b in pairwise(BOUNDS)), sep="\t")
    for folder in models:
        print(folder, *(f"{loss:.3f}" for loss in losses(folder, texts)), sep="\t")


if __name__ == "__main__":
    main(*sys.argv[1:])
