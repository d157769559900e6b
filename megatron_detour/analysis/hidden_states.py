"""Hidden states of frozen encoders, layer by layer, from Hugging Face folders: checkpoints, exports, other models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_detour.errors import DetourError
from megatron_detour.evaluation.models import check_model, most_positions, opening

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Feature = dict[str, list[int]]  # input_ids, attention_mask and what else the tokenizer gives
Report = Callable[[int], None]  # receives the number of texts done since its last call
Pool = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]  # states [b, t, h], mask [b, t] -> [b, h]


def mean_states(
    model: Path,
    texts: Sequence[str],
    *,
    max_tokens: int = 512,
    batch: int = 16,
    dtype: str = "float32",
    report: Report = lambda texts: None,
) -> np.ndarray:
    """Return the mean over tokens of each layer's hidden states, float64 [layers, texts, hidden].

    Entry i is the output of layer i; the embeddings are not included. All layers are taken from the residual stream,
    the last one *before* the final norm, as `hidden_states[1:]` of transformers 4 has them; transformers 5 gives the
    last one after the final norm. The mean is over the positions of the attention mask, [CLS] and [SEP] included, in
    float64. Texts are cut at `max_tokens`, or at the model's longest input. Runs on a GPU if there is one.

    Raises DetourError for folders that are not encoders with a tokenizer, and for states that are not finite.
    """
    encoder = Encoder.open(model, dtype)
    return encoder.states(encoder.tokenize(texts, max_tokens), mean_pool, batch=batch, report=report)


def mean_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean over the positions of the mask, float64."""
    weight = mask.double() / mask.sum(1, keepdim=True)
    return (weight[:, None] @ states.double())[:, 0]


def first_pool(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the states of the first token, [CLS]."""
    return states[:, 0]


POOLS: dict[str, Pool] = {"mean": mean_pool, "cls": first_pool}


class Encoder:
    """A frozen encoder and its tokenizer."""

    def __init__(self, folder: Path, network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.folder, self.network, self.tokenizer = folder, network, tokenizer
        self.longest = most_positions(network, tokenizer)
        self.layers = layers_of(network, folder)

    @classmethod
    def open(cls, folder: Path, dtype: str = "float32") -> Encoder:
        """Load a folder with transformers' AutoModel, onto the GPU if there is one. Raises DetourError."""
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        check_model(folder, flag="")
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # it would list the weights of the head, which no analysis reads
        options = {"local_files_only": True, "dtype": getattr(torch, dtype), "output_loading_info": True}
        with opening(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            network, loading = AutoModel.from_pretrained(folder, **options)
        # transformers initializes missing weights randomly, which would make the states meaningless
        if missing := sorted(name for name in loading["missing_keys"] if "pooler" not in name):
            raise DetourError(f"{folder}: {len(missing)} encoder weights are missing, {missing[0]} first")
        if tokenizer.pad_token_id is None:
            raise DetourError(f"{folder}: the tokenizer has no padding token; set pad_token in tokenizer_config.json")
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every shape, and texts have many
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(folder, network.to(device).eval().requires_grad_(False), tokenizer)

    def tokenize(self, texts: Sequence[str], max_tokens: int, second: Sequence[str] | None = None) -> list[Feature]:
        """Return the model's arguments for each text or pair, cut at `max_tokens` or the model's longest input."""
        if not texts:
            raise DetourError("no texts to measure hidden states on")
        pairs = None if second is None else list(second)
        encoded = self.tokenizer(list(texts), pairs, truncation=True, max_length=min(max_tokens, self.longest))
        return [{key: encoded[key][i] for key in encoded} for i in range(len(texts))]

    def states(
        self,
        features: Sequence[Feature],
        pool: Pool,
        *,
        batch: int = 16,
        layers: Sequence[int] | None = None,
        dtype: type[np.floating] = np.float64,
        report: Report = lambda texts: None,
    ) -> np.ndarray:
        """Return the pooled states of all layers or of some, [layers, features, hidden]. Raises DetourError if any of
        them is not finite."""
        chosen = range(len(self.layers)) if layers is None else layers
        states = np.empty((len(chosen), len(features), self.network.config.hidden_size), dtype)
        for numbers in by_length(features, batch):
            pooled = self._pooled([features[i] for i in numbers], pool, chosen)
            for place, each in enumerate(pooled):
                states[place, numbers] = each.double().cpu().numpy()
            report(len(numbers))
        if not np.isfinite(states).all():
            layer = chosen[int(np.flatnonzero(~np.isfinite(states).all((1, 2)))[0])]
            raise DetourError(
                f"{self.folder}: hidden states of layer {layer} are not finite; use float32, or the model has diverged"
            )
        return states

    def first_outputs(
        self, ids: Sequence[list[int]], batch_tokens: int, report: Report = lambda texts: None
    ) -> torch.Tensor:
        """Return the encoder's output at the first token of each sequence, fp32 [sequences, hidden] on the CPU.

        Unlike `states`, this is after the final norm. A batch has at most `batch_tokens` tokens, or one sequence.
        """
        import torch

        outputs = torch.empty(len(ids), self.network.config.hidden_size)
        features: list[Feature] = [{"input_ids": each, "attention_mask": [1] * len(each)} for each in ids]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        while order:
            count = max(1, batch_tokens // len(ids[order[0]]))
            numbers, order = order[:count], order[count:]
            with torch.inference_mode():
                states = self.network(**self.padded([features[i] for i in numbers])).last_hidden_state[:, 0]
            outputs[numbers] = states.float().cpu()
            report(len(numbers))
        if not torch.isfinite(outputs).all():
            raise DetourError(f"{self.folder}: outputs are not finite; the model has diverged")
        return outputs

    def padded(self, features: Sequence[Feature]) -> dict[str, torch.Tensor]:
        """Return a batch on the encoder's device, each [texts, longest]."""
        padded = self.tokenizer.pad({key: [f[key] for f in features] for key in features[0]}, return_tensors="pt")
        return {key: tensor.to(self.network.device) for key, tensor in padded.items()}

    def _pooled(self, features: Sequence[Feature], pool: Pool, layers: Sequence[int]) -> list[torch.Tensor]:
        """Return pooled states [texts, hidden] of layers, in their order; only these are kept in memory."""
        import torch

        batch, found = self.padded(features), {}

        def keep(number: int, module: Any, given: Any, output: Any) -> None:
            found[number] = pool(output[0] if isinstance(output, tuple) else output, batch["attention_mask"])

        hooks = [self.layers[number].register_forward_hook(partial(keep, number)) for number in layers]
        try:
            with torch.inference_mode():
                self.network(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        return [found[number] for number in layers]


def layers_of(network: Any, folder: Path) -> list[Any]:
    """Return the modules of an encoder's layers: its only list of as many modules as its configuration has layers."""
    from torch import nn

    count = getattr(network.config, "num_hidden_layers", None)
    lists = [each for each in network.modules() if isinstance(each, nn.ModuleList) and len(each) == count]
    if not lists:
        raise DetourError(f"{folder}: cannot find the layers of a {network.config.model_type}; give an encoder")
    return list(lists[0])


def by_length(features: Sequence[Feature], batch: int) -> Iterator[list[int]]:
    """Yield the numbers of texts of similar length, longest first, so that little is padded."""
    order = sorted(range(len(features)), key=lambda i: -len(features[i]["input_ids"]))
    yield from (order[at : at + batch] for at in range(0, len(order), batch))
