"""BERT (Devlin et al., 2019) and RoBERTa-style models: RoBERTa (Liu et al., 2019), CamemBERT and XLM-R."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from megatron_detour.errors import DetourError
from megatron_detour.model import activations
from megatron_detour.model.config_json import ConfigJson
from megatron_detour.model.families.base import (
    FULL,
    MAX_LAYERS,
    SIZE_KEYS,
    Family,
    Weight,
    column,
    norm,
    read_heads,
    row,
)
from megatron_detour.parallel.shard_spec import ShardSpec

if TYPE_CHECKING:
    from torch import Tensor

    from megatron_detour.model.compute import Compute
    from megatron_detour.model.language_model import LanguageModel
    from megatron_detour.parallel.state import ParallelState

BASE = {
    "vocab_size": 30_522,
    "hidden_size": 768,
    "intermediate_size": 3_072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
LARGE = {"hidden_size": 1_024, "intermediate_size": 4_096, "num_hidden_layers": 24, "num_attention_heads": 16}
ROBERTA_KEYS = {"max_position_embeddings": 514, "type_vocab_size": 1, "pad_token_id": 1}  # of RoBERTa-style models


@dataclass(frozen=True)
class Bert(Family):
    model_type = "bert"
    label = "BERT"
    citation = r"""@inproceedings{devlin2019bert,
  title = {{BERT}: Pre-training of Deep Bidirectional Transformers for Language Understanding},
  author = {Devlin, Jacob and Chang, Ming-Wei and Lee, Kenton and Toutanova, Kristina},
  booktitle = {Proceedings of NAACL-HLT},
  year = {2019}
}"""
    defaults = BASE
    published: ClassVar = {
        "google-bert/bert-base-uncased": BASE | {"model_type": "bert"},
        "google-bert/bert-base-multilingual-cased": BASE | {"model_type": "bert", "vocab_size": 119_547},
    }
    fixed: ClassVar = {
        "position_embedding_type": "absolute",
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    }
    checked_keys = frozenset({"model_type", *SIZE_KEYS, "max_position_embeddings", "type_vocab_size"})
    other_keys = (
        *("hidden_act", "layer_norm_eps", "initializer_range", "use_cache", "classifier_dropout"),
        *("hidden_dropout_prob", "attention_probs_dropout_prob"),  # fine-tuning's; pretraining drops nothing
    )
    old_keys = ("position_embedding_type",)
    encoder: ClassVar[str] = "bert"
    has_pooler = True
    part_prefixes: ClassVar = {
        "embeddings": ("bert.embeddings.",),
        "final_norm": (),  # the last layer's own
        "head": ("cls.predictions.",),
    }
    layer_prefix = "bert.encoder.layer."
    block_prefixes: ClassVar = {"attention": ("attention.",), "mlp": ("intermediate.", "output.")}

    renames = (
        (r"\.gamma$", ".weight"),  # of norms, in weights converted from TensorFlow
        (r"\.beta$", ".bias"),
        (r"^(embeddings|encoder)\.", r"bert.\1."),
    )

    token_types: int
    activation: str
    first_position: int  # in the table of positions

    @classmethod
    def adjusted(cls, config: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
        changed, stored = super().adjusted(config, given), config.get("max_position_embeddings", 512)
        positions = changed.get("max_position_embeddings")
        if isinstance(positions, int) and isinstance(stored, int) and positions < stored:
            raise DetourError(
                f"model.config.max_position_embeddings: the model has {stored:,} positions; give no fewer"
            )
        return changed

    @classmethod
    def read_fields(cls, read: ConfigJson) -> dict[str, Any]:
        hidden, heads = read_heads(read, rotary=False)
        first, positions = cls._first_position(read), read.size("max_position_embeddings", 512)
        if positions <= first:
            read.refuse("max_position_embeddings", f"above {first}, the number of the first position")
        return {
            "vocabulary": read.size("vocab_size"),
            "hidden": hidden,
            "intermediate": read.size("intermediate_size"),
            "heads": heads,
            "layer_types": (FULL,) * read.size("num_hidden_layers", most=MAX_LAYERS),
            "window": None,
            "norm_eps": read.number("layer_norm_eps", 1e-12),
            "max_positions": positions - first,
            "initializer_range": read.number("initializer_range", 0.02),
            "token_types": read.size("type_vocab_size", 2),
            "activation": read.choice("hidden_act", activations.NAMES, "gelu"),
            "first_position": first,
        }

    @classmethod
    def _first_position(cls, read: ConfigJson) -> int:
        return 0

    @classmethod
    def transformers_classes(cls) -> tuple[type, type]:
        from transformers import BertConfig, BertForMaskedLM

        return BertConfig, BertForMaskedLM

    def build(self, state: ParallelState, compute: Compute | None = None, z_loss: float = 0.0) -> LanguageModel:
        from megatron_detour.model.bert import BertModel

        return BertModel(self, state, compute, z_loss)

    def outer_weights(self) -> dict[str, Weight]:
        E, std, table = self.hidden, self.initializer_range, f"{self.encoder}.embeddings"
        by_row = ShardSpec(0, self.vocabulary)
        return {
            f"{table}.word_embeddings.weight": Weight((self.vocabulary, E), by_row, std),
            f"{table}.position_embeddings.weight": Weight((self.first_position + self.max_positions, E), std=std),
            f"{table}.token_type_embeddings.weight": Weight((self.token_types, E), std=std),
            **norm(f"{table}.LayerNorm", E, bias=True),
            **self.head_weights(Weight((E, E), std=std), Weight((E,)), Weight((self.vocabulary,), by_row)),
        }

    def head_weights(self, dense: Weight, bias: Weight, output_bias: Weight) -> dict[str, Weight]:
        return {
            "cls.predictions.bias": output_bias,
            "cls.predictions.transform.dense.weight": dense,
            "cls.predictions.transform.dense.bias": bias,
            **norm("cls.predictions.transform.LayerNorm", self.hidden, bias=True),
        }

    def layer_weights(self, number: int) -> dict[str, Weight]:
        E, std = self.hidden, self.initializer_range
        weights: dict[str, Weight] = {}
        for name in ("query", "key", "value"):
            weights |= column(f"attention.self.{name}", E, E, std, bias=True)
        return {
            **weights,
            **row("attention.output.dense", E, E, std, bias=True),
            **norm("attention.output.LayerNorm", E, bias=True),
            **column("intermediate.dense", self.intermediate, E, std, bias=True),
            **row("output.dense", E, self.intermediate, std, bias=True),
            **norm("output.LayerNorm", E, bias=True),
        }

    def fitted(self, name: str, weight: Tensor) -> Tensor:
        """A table of positions is repeated, as Longformer's (Beltagy et al., 2020): near positions stay near."""
        if weight.shape == self.sizes[name]:
            return weight
        from torch import cat

        unused, table = weight[: self.first_position], weight[self.first_position :]
        return cat([unused, table.repeat(-(-self.max_positions // len(table)), 1)[: self.max_positions]])

    def kept_by_layer(self, recompute: str, fused: bool) -> tuple[int, int]:
        if recompute == "full":
            return self.hidden, 0
        attention = 4 * self.hidden  # q, k, v and the output
        inner = self.intermediate * (1 if recompute == "selective" else 2)  # before and after the activation
        return 4 * self.hidden, attention + inner  # two sums and their norms

    def at_work_in_layer(self) -> tuple[int, int]:
        return 3 * self.hidden, 2 * self.intermediate

    def kept_by_head(self) -> int:
        return 5 * self.hidden  # chosen rows, dense, activation, norm, and the gradient of the last

    @property
    def tokenizer_outputs(self) -> tuple[str, ...]:
        types = ("token_type_ids",) if self.token_types > 1 else ()  # they tell the second text of a pair
        return *super().tokenizer_outputs, *types

    @property
    def opens_in(self) -> str:
        return "4.48 and later"


@dataclass(frozen=True)
class Roberta(Bert):
    model_type = "roberta"
    label = "RoBERTa"
    citation = r"""@misc{liu2019roberta,
  title = {{RoBERTa}: A Robustly Optimized {BERT} Pretraining Approach},
  author = {Liu, Yinhan and Ott, Myle and Goyal, Naman and Du, Jingfei and Joshi, Mandar and Chen, Danqi and
            Levy, Omer and Lewis, Mike and Zettlemoyer, Luke and Stoyanov, Veselin},
  year = {2019},
  eprint = {1907.11692},
  archivePrefix = {arXiv}
}"""
    defaults = BASE | {"vocab_size": 50_265}
    published: ClassVar = {
        "FacebookAI/roberta-base": BASE | ROBERTA_KEYS | {"model_type": "roberta", "vocab_size": 50_265},
        "FacebookAI/roberta-large": BASE | LARGE | ROBERTA_KEYS | {"model_type": "roberta", "vocab_size": 50_265},
    }
    encoder = "roberta"
    part_prefixes: ClassVar = {
        "embeddings": ("roberta.embeddings.",),
        "final_norm": (),
        "head": ("lm_head.",),
    }
    layer_prefix = "roberta.encoder.layer."
    renames = ((r"^(embeddings|encoder)\.", r"roberta.\1."),)

    @classmethod
    def _first_position(cls, read: ConfigJson) -> int:
        """transformers numbers positions from the one after the padding token's id."""
        return read.size("pad_token_id", 1, least=0) + 1

    def padding_fault(self, pad: int) -> str | None:
        expected = self.first_position - 1
        if pad == expected:
            return None
        return (
            f"positions begin after pad_token_id, {expected}, but the tokenizer's padding token has id {pad}; use the "
            "model's own tokenizer"
        )

    @classmethod
    def transformers_classes(cls) -> tuple[type, type]:
        from transformers import RobertaConfig, RobertaForMaskedLM

        return RobertaConfig, RobertaForMaskedLM

    def build(self, state: ParallelState, compute: Compute | None = None, z_loss: float = 0.0) -> LanguageModel:
        from megatron_detour.model.bert import RobertaModel

        return RobertaModel(self, state, compute, z_loss)

    @property
    def opens_in(self) -> str:
        """4.48 to 4.50 lose the output layer's bias where weights are opened in the dtype that they are stored in."""
        return "4.51 and later"

    def head_weights(self, dense: Weight, bias: Weight, output_bias: Weight) -> dict[str, Weight]:
        return {
            "lm_head.bias": output_bias,
            "lm_head.dense.weight": dense,
            "lm_head.dense.bias": bias,
            **norm("lm_head.layer_norm", self.hidden, bias=True),
        }


@dataclass(frozen=True)
class Camembert(Roberta):
    model_type = "camembert"
    label = "CamemBERT"
    citation = r"""@inproceedings{martin2020camembert,
  title = {{CamemBERT}: a Tasty {French} Language Model},
  author = {Martin, Louis and Muller, Benjamin and Ortiz Su{\'a}rez, Pedro Javier and Dupont, Yoann and
            Romary, Laurent and de la Clergerie, {\'E}ric and Seddah, Djam{\'e} and Sagot, Beno{\^i}t},
  booktitle = {Proceedings of ACL},
  year = {2020}
}"""
    defaults = BASE
    published: ClassVar = {
        "almanach/camembert-base": BASE | ROBERTA_KEYS | {"model_type": "camembert", "vocab_size": 32_005},
    }

    @classmethod
    def transformers_classes(cls) -> tuple[type, type]:
        from transformers import CamembertConfig, CamembertForMaskedLM

        return CamembertConfig, CamembertForMaskedLM


@dataclass(frozen=True)
class XlmRoberta(Roberta):
    model_type = "xlm-roberta"
    label = "XLM-R"
    citation = r"""@inproceedings{conneau2020xlmr,
  title = {Unsupervised Cross-lingual Representation Learning at Scale},
  author = {Conneau, Alexis and Khandelwal, Kartikay and Goyal, Naman and Chaudhary, Vishrav and Wenzek, Guillaume and
            Guzm{\'a}n, Francisco and Grave, Edouard and Ott, Myle and Zettlemoyer, Luke and Stoyanov, Veselin},
  booktitle = {Proceedings of ACL},
  year = {2020}
}"""
    defaults = BASE
    published: ClassVar = {
        "FacebookAI/xlm-roberta-base": BASE | ROBERTA_KEYS | {"model_type": "xlm-roberta", "vocab_size": 250_002},
        "FacebookAI/xlm-roberta-large": BASE
        | LARGE
        | ROBERTA_KEYS
        | {"model_type": "xlm-roberta", "vocab_size": 250_002},
    }

    @classmethod
    def transformers_classes(cls) -> tuple[type, type]:
        from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

        return XLMRobertaConfig, XLMRobertaForMaskedLM
