"""An exported model, run by onnxruntime."""

import keras
import numpy as np
import pytest
from onnxruntime.quantization import quantize_dynamic

from keras_cluster_mask.search.exported import ExportedModel
from tests.helpers import assert_close, run_program

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "torch",
        reason="Keras writes ONNX for batches of any size with torch.",
    ),
]


def test_it_embeds_files_and_texts_as_the_model_does(model, exported, photos):
    found, files = ExportedModel(exported), sorted(photos.rglob("*.*"))
    assert_close(found.encode_image(files), model.encode_image(files), 1e-5)
    for text in ("a red boat", "It's 3 cars, " * 9):
        assert_close(found.encode_text(text), model.encode_text(text), 1e-5)


def test_int8_files_are_used_where_there_are_any(model, exported, photos):
    files = sorted(photos.rglob("*.*"))
    before = ExportedModel(exported).encode_image(files)
    path = exported / "onnx/vision_model.onnx"
    int8 = path.with_name("vision_model_quantized.onnx")
    quantize_dynamic(path, int8, op_types_to_quantize=["MatMul"])
    path.unlink()
    after = ExportedModel(exported).encode_image(files)
    assert not np.array_equal(before, after)
    assert np.sum(before * after, 1).min() > 0.95


def test_it_needs_no_keras(exported, photos):
    program = (
        "import sys\n"
        "sys.orig_argv = ['python', '-m', 'keras_cluster_mask.search']\n"
        "from keras_cluster_mask.search.__main__ import load\n"
        f"model, _ = load({str(exported)!r})\n"
        "model.encode_text('a red boat')\n"
        f"model.encode_image([{str(min(photos.glob('*.*')))!r}])\n"
        "print('keras' in sys.modules)"
    )
    assert run_program("-c", program).split()[-1] == "False"
