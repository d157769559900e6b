"""What holds for every family of encoders: its declared parameters are the module's, its keys transformers'."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_detour.checkpoint.huggingface import COMPARED_TOKENS, _compared_lengths
from megatron_detour.errors import DetourError
from megatron_detour.model.choose import run_sizes
from megatron_detour.model.families import FAMILIES, read_shape
from megatron_detour.model.families.base import FULL, INERT_KEYS, SLIDING, TOKEN_IDS, Family
from megatron_detour.model_parts import SINGLE_PARTS
from megatron_detour.parallel.shard import spec_of
from megatron_detour.parallel.state import ParallelState
from megatron_detour.release.decoder import decoder_config
from tests.models import CONFIG, config_of

families = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def small(family: type[Family]) -> Family:
    return read_shape(config_of(family.model_type), "tests")


def test_an_unknown_model_type_is_refused_with_those_that_are_known():
    with pytest.raises(DetourError, match=r"config.json: model_type 't5' is not supported; known: .*modernbert"):
        read_shape(CONFIG | {"model_type": "t5"}, "config.json")


@families
def test_a_window_is_that_of_local_layers(family):
    shape = small(family)
    assert shape.window == (CONFIG["local_attention"] // 2 if SLIDING in shape.layer_types else None)
    assert run_sizes(shape, 1, [(64, 2, False)]).window == shape.window


def test_a_modernbert_without_local_layers_has_no_window():
    shape = read_shape(config_of(layer_types=[FULL] * 5), "tests")
    assert shape.window is None and "local_attention" not in shape.release_keys()
    assert "local_attention" not in decoder_config({}, shape, "float32")
    assert shape == read_shape(config_of(layer_types=[FULL] * 5, local_attention=64), "tests")


@families
def test_what_is_compared_with_transformers_is_on_either_side_of_a_window_and_short_without_one(family):
    long = read_shape(config_of(family.model_type, max_position_embeddings=8194), "tests")
    lengths = sorted(_compared_lengths(long))
    assert lengths == ([2, 5, 39] if long.window else [2, COMPARED_TOKENS // 2 + 1, COMPARED_TOKENS])
    assert max(_compared_lengths(small(family))) <= small(family).max_positions


@families
def test_parameters_with_a_row_per_id_are_those_of_the_vocabularys_length(family):
    shape = small(family)
    assert shape.by_vocabulary == {name for name, size in shape.sizes.items() if size[0] == CONFIG["vocab_size"]}
    assert len(shape.by_vocabulary) == 2  # the embedding, and the output layer's bias or weight


@families
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_declared_weights_are_the_modules(family, tensor):
    shape = small(family)
    with torch.device("meta"):
        parameters = dict(shape.build(ParallelState(tensor_size=tensor)).named_parameters())
    assert {name: weight.shard for name, weight in shape.weights.items()} == {
        name: spec_of(parameter) for name, parameter in parameters.items()
    }
    for name, weight in shape.weights.items():
        local = list(weight.size)
        if weight.shard:
            local[weight.shard.dim] = weight.shard.local(tensor)
        assert tuple(parameters[name].shape) == tuple(local)
        assert weight.elements(tensor) == math.prod(local)


@pytest.mark.parametrize(
    ("config", "possible"),
    [
        (config_of("eurobert", num_key_value_heads=2), "1, 2"),
        (config_of("eurobert", intermediate_size=50), "1, 2"),
        (config_of("bert", hidden_size=64, intermediate_size=64, num_attention_heads=32), "1, 2, 4, 8, 16"),
    ],
)
def test_the_tensor_sizes_that_a_refusal_proposes_are_accepted(config, possible):
    shape = read_shape(config, "tests")
    fault, *_ = shape.tensor_parallel_faults(3)
    assert fault.endswith(f"; possible: {possible}")
    sizes = {n for n in range(1, 40) if not shape.tensor_parallel_faults(n)}
    assert sizes == {int(size) for size in possible.split(", ")}


@families
def test_every_parameter_belongs_to_one_part(family):
    shape = small(family)
    assert shape.part_prefixes.keys() == {*SINGLE_PARTS}
    prefixes = [*(f"{shape.layer_prefix}{n}." for n in range(shape.layers)), *shape.part_prefixes.values()]
    for name in shape.weights:
        assert [name.startswith(prefix) for prefix in prefixes].count(True) == 1, name


@families
def test_first_values_are_as_declared(family):
    model = small(family).build(ParallelState())
    for name, weight in model.shape.weights.items():
        values = model.initial_weight(name, 3)
        assert values.shape == weight.size and torch.equal(values, model.initial_weight(name, 3))
        if weight.std:
            assert not torch.equal(values, model.initial_weight(name, 4))
            assert values.abs().max() <= 2 * weight.std
            assert values.std() == pytest.approx(0.88 * weight.std, rel=0.1)  # of a normal cut at 2 sigma
        else:
            assert (values == weight.fill).all()


@families
def test_keys_and_defaults_are_those_of_transformers(family):
    config_class, _ = family.transformers_classes()
    theirs = config_class().to_dict()
    assert {key: theirs[key] for key in family.defaults} == family.defaults
    assert theirs["model_type"] == family.model_type
    family.refuse_unknown_keys(theirs)
    known = {*theirs, *family.old_keys, *TOKEN_IDS, "torch_dtype"}  # which version 4 writes
    assert {*family.checked_keys, *family.other_keys, *family.fixed, *INERT_KEYS} <= known
