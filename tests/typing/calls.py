"""Typical calls, as a type checker sees them; mypy reads this file and nothing runs it.

A wrong call is marked with the error that it must give: an unused mark is an error too.
"""

import pathlib
from collections.abc import Iterator
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
train, test = kcm.data.split("flickr", test=400)
train, test = kcm.data.split([{"image": "a.jpg", "caption": "a dog"}], test=0.2)
kcm.data.image_text_dataset(train, None, image_size=224)
kcm.data.image_text_dataset(kcm.data.subset(train, [0, 1]), tokenizer, 224)
kcm.data.image_text_dataset("a.tar")  # type: ignore[call-arg]
kcm.data.image_text_dataset(42, tokenizer)  # type: ignore[arg-type]
kcm.data.image_text_dataset("a.tar", "clip")  # type: ignore[arg-type]
kcm.data.image_text_dataset("a.tar", tokenizer, 224, 64, True, 7)  # type: ignore[call-arg]
kcm.data.image_text_dataset("a.tar", tokenizer, imagesize=224)  # type: ignore[call-arg]
kcm.data.split("flickr", test="half")  # type: ignore[arg-type]
kcm.data.split("flickr", 0.2, "image", 3)  # type: ignore[call-arg]

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
model = kcm.ContrastiveModel.from_preset("clip_vit_base_patch32", masking=masking)
model = kcm.ContrastiveModel.from_encoders(
    backbone, backbone, projection_dim=256, masking=masking, image_blocks=[1, 2]
)
model.tokenizer = tokenizer
dataset = kcm.data.image_text_dataset("a.tar", model, batch_size=32)
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


def batches() -> Iterator[dict[str, np.ndarray]]:
    yield {"images": np.zeros((2, 8, 8, 3)), "token_ids": np.zeros((2, 8))}


arrays = next(batches())
features = kcm.compute_features(model, "a.tar", "features", tokenizer)
assert_type(features, kcm.TowerFeatures)
model.fit(features, batch_size=32, validation_data=kcm.TowerFeatures("other"))
model.fit(arrays, sample_weight=np.ones(2), validation_data=dataset)
model.fit(batches(), steps_per_epoch=1, validation_freq=[1, 5])
model.evaluate(arrays, batch_size=2)
model.search(["a.jpg", "b.jpg"], "a dog", k=2)
assert_type(model.predict(dataset), dict[str, np.ndarray])
assert_type(model.without_masking(), kcm.ContrastiveModel)
assert_type(model.image_tower, ImageTower)
masked = kcm.with_masking(backbone, kcm.RandomMasking(0.5), layer="embedding")
assert_type(masked, kcm.models.MaskedEncoder)
model.fit(dataset, y=np.zeros(3))  # type: ignore[arg-type]
model.fit("a.tar")  # type: ignore[arg-type]
model.fit(dataset, validation_data="b.tar")  # type: ignore[arg-type]
model.fit(dataset, epoch=3)  # type: ignore[call-arg]
model.fit(dataset, steps_per_epoch="all")  # type: ignore[arg-type]
model.fit(dataset, resume_from=3)  # type: ignore[arg-type]
model.search(["a.jpg"], "a dog", n=2)  # type: ignore[call-arg]
model.search(["a.jpg"], ["a dog"])  # type: ignore[arg-type]
kcm.compute_features(model, "a.tar")  # type: ignore[call-arg]
kcm.compute_features(model, 42, "features")  # type: ignore[arg-type]
kcm.with_masking(backbone, 0.5)  # type: ignore[arg-type]
kcm.ContrastiveModel.from_backbone(backbone, masking=0.5)  # type: ignore[arg-type]
kcm.ContrastiveModel.from_backbone(backbone, masking)  # type: ignore[call-arg]
kcm.ContrastiveModel.from_backbone(backbone, tokenizer="clip")  # type: ignore[arg-type]
kcm.ContrastiveModel.from_encoders(backbone)  # type: ignore[call-arg]
kcm.ContrastiveModel.from_encoders(backbone, backbone, 256)  # type: ignore[call-arg]
kcm.ContrastiveModel.from_preset(7)  # type: ignore[arg-type]
kcm.callbacks.Checkpoint("run", keep="all")  # type: ignore[arg-type]

# === Evaluation, plots, weights ===

recall = kcm.evaluation.evaluate_retrieval("model.keras", dataset, tokenizer)
assert_type(recall, dict[str, Any])
assert_type(kcm.evaluation.embed(model, "photos"), dict[str, np.ndarray])
kcm.evaluation.evaluate_zero_shot(model, (np.zeros((2, 8, 8, 3)), [0, 1]), ["a", "b"])
kcm.evaluation.evaluate_retrieval(model, 42)  # type: ignore[arg-type]
kcm.evaluation.embed_texts(model, ["a"], tokenizer="clip")  # type: ignore[arg-type]
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
