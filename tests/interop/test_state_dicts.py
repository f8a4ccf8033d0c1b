"""Wrapped checkpoints, and errors for those that do not fit."""

import numpy as np
import pytest
from keras import ops

from keras_cluster_mask.interop import open_clip_state_dict
from tests.helpers import assert_same_values
from tests.interop.open_clip_models import arrays, load, tiny


@pytest.fixture(scope="module")
def reference():
    return arrays(tiny())


def assert_returned(source, expected):
    assert_same_values(open_clip_state_dict(load(source)), expected)


# === What fits ===


@pytest.mark.any_backend
@pytest.mark.parametrize("key", ["state_dict", "model"])
@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_checkpoints_of_training_are_unwrapped(reference, key, prefix):
    wrapped = {f"{prefix}{name}": x for name, x in reference.items()}
    checkpoint = {"epoch": 3, "name": "run", key: wrapped, "optimizer": {}}
    assert_returned(checkpoint, reference)


@pytest.mark.any_backend
def test_a_text_tower_of_its_own_is_the_same_one(reference):
    custom = arrays(tiny(custom_text=True))
    assert "text.ln_final.weight" in custom
    expected = {name.removeprefix("text."): x for name, x in custom.items()}
    assert_returned(custom, expected)


@pytest.mark.any_backend
def test_buffers_beside_the_weights_are_left_out(reference):
    buffers = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), 7)
    buffers["attn_mask"] = np.full((7, 7), -np.inf)
    assert_returned({**reference, **buffers}, reference)


@pytest.mark.any_backend
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_weights_of_other_precision_become_float32(reference, dtype):
    import torch

    converted = {
        name: torch.tensor(x).to(getattr(torch, dtype)) for name, x in reference.items()
    }
    expected = {name: x.float().numpy() for name, x in converted.items()}
    assert_returned(converted, expected)
    model = load(converted)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}


def test_tensors_of_the_running_backend_are_taken(reference):
    tensors = {name: ops.convert_to_tensor(x) for name, x in reference.items()}
    assert_returned(tensors, reference)


# === What does not ===


@pytest.mark.any_backend
def test_quantized_weights_are_not_written(reference):
    model = load(reference)
    model.backbone.quantize("int8")
    with pytest.raises(ValueError, match=r"`model` must have float.*Received: .*int8"):
        open_clip_state_dict(model)


@pytest.mark.any_backend
def test_what_holds_no_tensors_is_refused():
    with pytest.raises(ValueError, match=r"`source` must.*Received: .* type int"):
        load(5)


@pytest.mark.any_backend
def test_every_entry_that_does_not_fit_is_listed(reference):
    state = dict(reference)
    del state["visual.ln_pre.weight"], state["transformer.resblocks.1.mlp.c_fc.bias"]
    state["text_projection"] = state["text_projection"].T
    state["ln_final.bias"] = state["ln_final.bias"][:5]
    state["transformer.resblocks.0.attn.in_proj_weight"] = np.zeros((3, 64, 64), "f4")
    state["visual.resblocks.9.ls_1.gamma"] = np.zeros(128, "f4")
    state["positional_embedding"] = np.array(state["positional_embedding"])
    state["positional_embedding"][3, 4] = np.nan
    state["token_embedding.weight"] = "none"
    with pytest.raises(ValueError, match="2 image blocks and 3 text blocks") as error:
        load(state)
    lines = str(error.value).splitlines()
    assert lines[0].endswith("Received: source of type dict, with")
    assert [line.strip() for line in lines[1:]] == [
        "NaN or infinite: positional_embedding",
        "missing: transformer.resblocks.1.mlp.c_fc.bias (256,)",
        "missing: visual.ln_pre.weight (128,)",
        "unexpected: visual.resblocks.9.ls_1.gamma (128,)",
        "wrong shape: ln_final.bias (5,), expected (64,)",
        "wrong shape: text_projection (24, 64), expected (64, 24)",
        "wrong shape: token_embedding.weight (no tensor), expected (40, 64)",
        "wrong shape: transformer.resblocks.0.attn.in_proj_weight (3, 64, 64), "
        "expected (192, 64)",
    ]
