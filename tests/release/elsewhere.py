"""Run by the Python of another environment, with transformers of another version: what an exported folder gives there.

    python elsewhere.py FOLDER OUTPUT.npz [--decoder]

Writes the logits of texts, alone and as a padded batch, and prints a JSON object. Knows nothing of this project.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings

import numpy as np
import torch
import transformers

TEXTS = [
    "The patient takes [MASK] twice a day.",
    "La patiente prend [MASK] depuis hier : 38,5 °C, œdème.",
    " ".join(["the surgeon describes some pain after surgery , and [MASK] today."] * 12),
]


class Kept(logging.Handler):
    """What transformers says at the level of a warning or above."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "GenerationMixin" not in record.getMessage():  # 4.48 on its own classes, such as BertForMaskedLM
            self.lines.append(record.getMessage())


@torch.no_grad()
def logits_of(model, tokenizer) -> dict[str, np.ndarray]:
    alone = [model(**tokenizer(text, return_tensors="pt")).logits[0].numpy() for text in TEXTS]
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    padded = model(**batch).logits
    together = [row[mask.bool()].numpy() for row, mask in zip(padded, batch["attention_mask"], strict=True)]
    return {f"{kind}{i}": x for kind, xs in (("alone", alone), ("padded", together)) for i, x in enumerate(xs)}


@torch.no_grad()
def encoder_facts(folder: str, tokenizer) -> dict:
    fill = transformers.pipeline("fill-mask", model=folder, tokenizer=tokenizer, device="cpu")
    tops = [[found["token_str"] for found in fill(text)] for text in TEXTS[:2]]
    tagger = transformers.AutoModelForTokenClassification.from_pretrained(folder, num_labels=3).eval()
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    encoder = transformers.AutoModel.from_pretrained(folder).eval().float()
    mask = batch["attention_mask"].unsqueeze(-1)
    hidden = encoder(**batch).last_hidden_state
    return {
        "top": tops,
        "tagged": list(tagger(**batch).logits.shape),
        "stored": str(next(transformers.AutoModel.from_pretrained(folder, torch_dtype="auto").parameters()).dtype),
        "mean_pooled": ((hidden * mask).sum(1) / mask.sum(1)).tolist(),
    }


def main(folder: str, output: str, decoder: bool) -> None:
    kept = Kept()
    transformers.utils.logging.get_logger().addHandler(kept)
    warnings.showwarning = lambda message, *_, **__: kept.lines.append(str(message))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    kind = transformers.AutoModelForCausalLM if decoder else transformers.AutoModelForMaskedLM
    model = kind.from_pretrained(folder).eval().float()
    said = list(kept.lines)
    np.savez(output, **logits_of(model, tokenizer))
    facts = {
        "version": transformers.__version__,
        "model": type(model).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "longest": tokenizer.model_max_length,
        "warnings": said,
    }
    if decoder:
        prompt = tokenizer(TEXTS[0], return_tensors="pt").input_ids[:, :-1]
        facts["continued"] = model.generate(prompt, max_new_tokens=5, do_sample=False)[0].tolist()
    else:
        facts |= encoder_facts(folder, tokenizer)
    print(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--decoder" in sys.argv)
