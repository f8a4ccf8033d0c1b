"""The processor time that features of captions take, against sentence-transformers.

    pip install sentence-transformers
    taskset -c 0 python benchmarks/text_features.py --encoders FOLDER --data DIR

Both encode the same captions with the same weights of MiniLM, in turn. Each orders the
texts by their length and pads no batch further than its longest text; `padded` pads all
texts to the length of keras_hub's preset.
"""

import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
from reporting import parser, publish
from timing import interleaved, ratio

import keras_cluster_mask as kcm
from keras_cluster_mask.data.tokenizing import tokenize
from keras_cluster_mask.encoders.embedder import Embedder

# keras_hub's presets of sentence encoders pad to this length.
PADDED = 256


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--encoders", required=True, help="folder of encoders")
    add("--data", required=True, help="folder of WebDataset shards by split")
    add("--caption-key", default="json.captions", help="field of captions")
    add("--captions", type=int, default=2000, help="how many are encoded")
    add("--padded-captions", type=int, default=64, help="how many are padded")
    add("--rounds", type=int, default=3, help="how often each is timed")
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    source = f"{options.data}/train-*.tar"
    captions = kcm.data.read_captions(source, options.caption_key)[: options.captions]
    folder = f"{options.encoders}/all_minilm_l6_v2"
    image = keras_hub.models.DINOV2Backbone.from_preset(
        f"{options.encoders}/dinov2_small", image_shape=(28, 28, 3)
    )
    text = keras_hub.models.TextEmbedder.from_preset(folder)
    model = kcm.ContrastiveModel.from_encoders(image, text)
    embedder = Embedder(model, features=True)
    others = sentence_encoder(folder)
    few = captions[: options.padded_captions]

    def ours(texts=captions):
        return embedder.texts(tokenize(text.preprocessor, texts))

    def padded():
        inputs = text.preprocessor(few)
        return text.backbone.predict_on_batch(inputs)

    def theirs():
        return others.encode(captions, batch_size=128, show_progress_bar=False)

    functions = {"ours": ours, "sentence-transformers": theirs, "padded": padded}
    # Of the processor, as other programs may use its cores.
    seconds = interleaved(functions, options.rounds, clock=time.process_time)
    counts = dict.fromkeys(functions, len(captions)) | {"padded": len(few)}
    rows = [
        {
            "encoder": name,
            "captions/s": f"{counts[name] / statistics.median(seconds[name]):.0f}",
        }
        for name in functions
    ]
    rows[0]["/ sentence-transformers"] = (
        f"{ratio(seconds, 'ours', 'sentence-transformers'):.3f}"
    )
    token_ids = tokenize(text.preprocessor, captions)
    lengths = model.text_tower.lengths.of({"token_ids": token_ids})
    title = (
        f"MiniLM on {len(captions)} captions of {lengths.mean():.1f} tokens, at most "
        f"{lengths.max()}; padded to {PADDED}: {len(few)} captions"
    )
    path = f"{options.results}/text_features.json"
    setting = {"data": Path(options.data).name, "captions": options.captions}
    publish(path, title, rows, options=setting, seconds=seconds)


def sentence_encoder(folder):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(folder, device="cpu")


if __name__ == "__main__":
    main()
