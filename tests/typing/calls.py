"""Typical calls, as a type checker sees them; mypy reads this file and nothing runs it.

A wrong call is marked with the error that it must give: an unused mark is an error too.
"""

import pathlib
from typing import Any, assert_type

import numpy as np

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.towers import ImageTower

# === Data ===

captions = kcm.data.read_captions(pathlib.Path("shards"), caption_key=["txt", "json.a"])
assert_type(captions, list[str])
tokenizer = kcm.data.CLIPTokenizer.train(captions, vocabulary_size=4096)
assert_type(tokenizer, kcm.data.CLIPTokenizer)
assert_type(tokenizer(["a dog", b"a cat"]), np.ndarray)
assert_type(kcm.data.CLIPTokenizer.from_file("a.json"), kcm.data.CLIPTokenizer)
dataset = kcm.data.image_text_dataset(
    {"a/*.tar": 0.7, "b/*.tar": 0.3},
    tokenizer,
    image_size=(224, 224),
    batch_size=256,
    training=True,
    text_masking=kcm.data.FrequencyTextMasking().fit(captions),
    max_skipped=0,
)
found = kcm.data.check(["a.tar", pathlib.Path("b.tar")])
kcm.data.image_text_dataset("a.tar", tokenizer, 224, "256", True)  # type: ignore[arg-type]
kcm.data.image_text_dataset("a.tar")  # type: ignore[call-arg]

# === Maskings ===

masking = kcm.ClusterMasking(patch_size=16, min_mask_ratio=0.3, name="clusters")
masking.adapt(np.zeros((8, 224, 224, 3)))
maskings: list[kcm.PatchMasking] = [
    masking,
    kcm.RandomMasking(0.5),
    kcm.CenteredMasking(grid=(14, 14)),
    kcm.GridMasking(window=2),
    kcm.BlockMasking(0.75, num_prefix_tokens=1),
    kcm.KMeansMasking(patch_size=(16, 16)),
    kcm.EdgeMasking(patch_size=16, edges=None),
]
kcm.RandomMasking(mask_ratio="half")  # type: ignore[arg-type]


class Middle(kcm.PatchMasking):
    """A strategy of a user's own, without hints."""

    def score(self, noise, images=None, tokens=None):
        return noise


# === Models ===

backbone = kcm.models.clip_backbone("vit_b_16", image_size=224, dtype="mixed_bfloat16")
backbone = kcm.models.with_image_size(backbone, 336)
model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
assert_type(model, kcm.ContrastiveModel)
model = kcm.ContrastiveModel.from_backbone(backbone, masking=Middle(0.5))
optimizer = kcm.optimizer_by_block(model, 1e-4, steps=100)
model.compile(optimizer, decay_vectors=True)
history = model.fit(
    dataset,
    epochs=32,
    resume_from=pathlib.Path("run"),
    callbacks=[
        kcm.callbacks.Checkpoint("run", save_every=2),
        kcm.callbacks.Evaluate(lambda model: {"score": 0.5}, every=2),
        kcm.callbacks.Retrieval(dataset, tokenizer, ks=10),
        kcm.callbacks.ZeroShot(dataset, ["cat", "dog"], tokenizer),
    ],
)
assert_type(model.predict(dataset), dict[str, np.ndarray])
assert_type(model.without_masking(), kcm.ContrastiveModel)
assert_type(model.image_tower, ImageTower)
masked = kcm.with_masking(backbone, kcm.RandomMasking(0.5), layer="embedding")
assert_type(masked, kcm.models.MaskedEncoder)
model.fit(dataset, y=np.zeros(3))  # type: ignore[arg-type]
kcm.with_masking(backbone, 0.5)  # type: ignore[arg-type]
kcm.ContrastiveModel.from_backbone(backbone, masking=0.5)  # type: ignore[arg-type]
kcm.callbacks.Checkpoint("run", keep="all")  # type: ignore[arg-type]

# === Evaluation, plots, weights ===

recall = kcm.evaluation.evaluate_retrieval("model.keras", dataset, tokenizer)
assert_type(recall, dict[str, Any])
recall = kcm.evaluation.retrieval_recall(
    np.eye(4), np.eye(4), image_of_text=[0, 1, 2, 3], ks=1
)
kcm.visualization.plot_masks(
    np.zeros((2, 64, 64, 3)), {"random": kcm.RandomMasking(0.5), "clusters": masking}
).savefig("masks.png")
kcm.visualization.plot_history(history, validation_freq=[1, 5]).savefig("curves.png")
loaded = kcm.interop.load_open_clip("a.safetensors", "ViT-B-32", masking=masking)
assert_type(loaded, kcm.ContrastiveModel)
kcm.interop.save_open_clip(loaded, "b.safetensors")
loss = kcm.losses.softmax_contrastive_loss(np.eye(4), np.eye(4), logit_scale=100)
kcm.interop.save_open_clip(loaded)  # type: ignore[call-arg]
kcm.no_such_name  # type: ignore[attr-defined]  # noqa: B018
