"""The towers of an exported model in onnxruntime, without Keras."""

import concurrent.futures
import json
import os
from pathlib import Path

import numpy as np

from keras_cluster_mask.data.images import Images


class ExportedModel:
    """A folder of `examples/export_transformers_js.py`.

    int8 files, whose names end in `_quantized`, are used where there are any.

    Args:
        folder: Path.
    """

    def __init__(self, folder):
        import tokenizers

        folder = Path(folder)
        settings, texts = (
            json.loads((folder / f"{name}_config.json").read_text("utf-8"))
            for name in ("preprocessor", "tokenizer")
        )
        size = settings["crop_size"]
        resize = "crop" if settings["do_center_crop"] else "squash"
        self.decode = Images((size["height"], size["width"]), False, resize=resize)
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.tokenizer.enable_truncation(int(texts["model_max_length"]))
        self.images, self.texts = (_program(folder, x) for x in ("vision", "text"))

    def encode_image(self, paths):
        """Embeds image files: `(batch, d)` float32."""
        with concurrent.futures.ThreadPoolExecutor() as threads:
            read = threads.map(lambda x: self.decode(Path(x).read_bytes(), None), paths)
            pixels = np.stack([*read]).transpose(0, 3, 1, 2)
        (found,) = self.images.run(None, {"pixel_values": pixels.astype("float32")})
        return found

    def encode_text(self, text):
        """Embeds a text: `(1, d)` float32."""
        found = self.tokenizer.encode(text)
        inputs = {
            "input_ids": found.ids,
            "attention_mask": found.attention_mask,
            "token_type_ids": found.type_ids,
        }
        names = [given.name for given in self.texts.get_inputs()]
        (row,) = self.texts.run(None, {x: np.array([inputs[x]]) for x in names})
        return row


def _program(folder, tower):
    # Read when onnxruntime is imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    path = folder / "onnx" / f"{tower}_model.onnx"
    int8 = path.with_stem(f"{path.stem}_quantized")
    return onnxruntime.InferenceSession(int8 if int8.exists() else path)
