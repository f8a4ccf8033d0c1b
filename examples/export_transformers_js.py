"""Exports a model to transformers.js, which runs it in a browser or in Node.

    python examples/export_transformers_js.py model.keras folder

The folder contains ONNX files of both towers, and files that describe how texts and
images are prepared. `AutoTokenizer`, `CLIPTextModelWithProjection`, `AutoProcessor` and
`CLIPVisionModelWithProjection` read it. Needs torch and onnxscript.

The tokenizer of a CLIP becomes a `tokenizer.json`. Like `CLIPTokenizer`, it replaces
curly quotes, ligatures, full-width letters and common HTML entities, and composes
letters with their accents. It does not repair broken encodings (`schÃ¶n`), and does not
resolve other HTML entities. Texts that contain these get different tokens.
"""

import argparse
import collections
import copy
import json
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

# On torch, Keras exports ONNX for batches of any size.
os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import onnx
import tokenizers
from onnx import TensorProto, helper
from tokenizers import models, normalizers, pre_tokenizers, processors

import keras_cluster_mask as kcm
from keras_cluster_mask.data.clip_tokenizer import clean

# Inputs of the towers, and their names in transformers.js.
NAMES = {
    "images": "pixel_values",
    "token_ids": "input_ids",
    "padding_mask": "attention_mask",
    "segment_ids": "token_type_ids",
}
# Common HTML entities. The first may hide another.
ENTITIES = {
    "&amp;": "&",
    "&lt;": "<",
    "&gt;": ">",
    "&quot;": '"',
    "&#39;": "'",
    "&apos;": "'",
    "&nbsp;": " ",
}
# The words of a lower-case text, as CLIP splits them. U+0345 is a literal character,
# because JavaScript and Rust have different escapes.
WORDS = "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}\u0345]+"
START, END = "<|startoftext|>", "<|endoftext|>"
# The length of texts without a limit.
ANY = 10**9


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="a .keras file")
    parser.add_argument("folder", help="the folder to make")
    parser.add_argument(
        "--tokenizer",
        help="a folder with tokenizer.json and tokenizer_config.json of Hugging Face, "
        "for a model with a tokenizer of keras_hub",
    )
    arguments = parser.parse_args()
    model = keras.saving.load_model(arguments.model)
    export(model, arguments.folder, arguments.tokenizer)
    print(f"Wrote {arguments.folder}")
    if isinstance(model.tokenizer, kcm.data.CLIPTokenizer) and not arguments.tokenizer:
        print(
            "Texts with broken encodings, or HTML entities other than "
            f"{' '.join(ENTITIES)}, get other tokens than in encode_text"
        )


def export(model, folder, tokenizer=None):
    """Writes the files of a `ContrastiveModel`."""
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(
            "`folder` must be new or empty: remove it, or pass another. "
            f"Received: folder={folder}"
        )
    (folder / "onnx").mkdir(parents=True)
    config = write_tokenizer(model.tokenizer, folder, tokenizer)
    write_tower(model.image_tower, folder / "onnx/vision_model.onnx", "image_embeds")
    write_tower(model.text_tower, folder / "onnx/text_model.onnx", "text_embeds")
    height, width = model.image_tower.image_size
    size = {"height": height, "width": width}
    crops = model.resize == "crop"
    files = {
        "config.json": {"model_type": "clip"},
        "tokenizer_config.json": {
            **config,
            "model_max_length": min(
                config["model_max_length"], model.text_tower.context_length or ANY
            ),
        },
        "preprocessor_config.json": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": max(height, width)} if crops else size,
            "resample": 3,  # bicubic
            "do_center_crop": crops,
            "crop_size": size,
            # The tower does both.
            "do_rescale": False,
            "do_normalize": False,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), "utf-8")


def write_tokenizer(tokenizer, folder, source):
    """Writes `tokenizer.json`, and returns the content of its configuration."""
    if source is not None:
        shutil.copy(Path(source) / "tokenizer.json", folder)
    elif isinstance(tokenizer, kcm.data.CLIPTokenizer):
        clip_tokenizer(tokenizer).save(str(folder / "tokenizer.json"))
        return {
            "tokenizer_class": "CLIPTokenizer",
            "pad_token": END,
            "model_max_length": tokenizer.context_length,
        }
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    else:
        raise SystemExit(
            "`--tokenizer` must be given for a tokenizer that writes no tokenizer.json."
            f" Received: a model with {tokenizer}"
        )
    config = Path(source or folder) / "tokenizer_config.json"
    return {"model_max_length": ANY, **json.loads(config.read_text("utf-8"))}


def clip_tokenizer(tokenizer):
    """Converts a `CLIPTokenizer` to Hugging Face's format."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_to_preset(folder)
        assets = Path(folder) / "assets/tokenizer"
        model = models.BPE.from_file(
            str(assets / "vocabulary.json"),
            str(assets / "merges.txt"),
            unk_token=END,
            end_of_word_suffix="</w>",
        )
    found = tokenizers.Tokenizer(model)
    found.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(*pair) for pair in ENTITIES.items()),
            *(normalizers.Replace(*pair) for pair in replaced_characters()),
            normalizers.NFC(),
            normalizers.Lowercase(),
        ]
    )
    found.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    found.add_special_tokens([START, END])
    found.post_processor = processors.BertProcessing(
        (END, tokenizer.end_token_id), (START, tokenizer.start_token_id)
    )
    return found


def replaced_characters():
    """Returns pairs of a pattern of characters and the text that replaces them.

    A `CLIPTokenizer` replaces curly quotes, ligatures and wide letters, and removes
    control characters.
    """
    found = collections.defaultdict(list)
    for character in map(chr, (*range(0xD800), *range(0xE000, 0x10000))):
        text = f"x{character}x"
        cleaned = clean(text, lower=False)
        if cleaned != " ".join(unicodedata.normalize("NFC", text).split()):
            found[cleaned[1:-1]].append(character)
    return [
        (tokenizers.Regex(f"[{''.join(characters)}]"), content)
        for content, characters in found.items()
    ]


def write_tower(tower, path, output):
    """Writes a tower with the inputs and the output of transformers.js."""
    tower.export(path, format="onnx")
    program = onnx.load(path)
    graph = program.graph
    before = [node for given in graph.input for node in converted(given)]
    after = helper.make_node("Identity", [graph.output[0].name], [output])
    graph.output[0].name = output
    nodes = [*before, *graph.node, after]
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.save(program, path)


def converted(given):
    """Renames and retypes an input as transformers.js passes it.

    Returns:
        List of nodes that compute the former input.
    """
    name, kind = given.name, given.type.tensor_type
    given.name, dtype = NAMES[name], kind.elem_type
    if name != "images":
        kind.elem_type = TensorProto.INT64
        return [helper.make_node("Cast", [given.name], [name], to=dtype)]
    kind.elem_type = TensorProto.FLOAT
    sizes = copy.deepcopy([*kind.shape.dim])
    del kind.shape.dim[:]
    kind.shape.dim.extend(sizes[axis] for axis in (0, 3, 1, 2))
    return [
        helper.make_node("Cast", [given.name], ["channels_first"], to=dtype),
        helper.make_node("Transpose", ["channels_first"], [name], perm=[0, 2, 3, 1]),
    ]


if __name__ == "__main__":
    main()
