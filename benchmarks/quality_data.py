"""The data of `quality.py`, and the scores of a model on it."""

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import scipy.optimize
from keras import ops
from sklearn.linear_model import LogisticRegression

import keras_cluster_mask as kcm

IMAGES = kcm.data.example_images()
# As many batches of validation data as a point of a learning curve takes.
CURVE_BATCHES = 20
# As many batches as a loss takes.
LOSS_BATCHES = 10


def flip(image, generator):
    """Flips half of the images."""
    return image[:, ::-1] if generator.random() < 0.5 else image


class Data:
    """One dataset, read with one tokenizer at one size.

    Captions that stand for classes (few distinct ones) are judged by zero-shot
    classification and a linear probe, others by retrieval.

    Args:
        recipe: The options of `quality.py`.
        image_size: Integer, the side of the images in pixels.
    """

    def __init__(self, recipe, image_size):
        self.recipe, self.image_size = recipe, image_size
        self.shards = splits(recipe.data)
        self.captions = kcm.data.read_captions(self.shards["train"], recipe.caption_key)
        self.tokenizer = kcm.data.CLIPTokenizer.train(
            self.captions, recipe.vocabulary_size, recipe.context_length
        )
        self.evaluation = functools.cache(self._evaluation)
        distinct = sorted(set(self.captions))
        self.classes = distinct if 10 * len(distinct) < len(self.captions) else None

    def training(self, seed, method, whole_texts):
        """An endless dataset; other seeds give other crops and another order."""
        recipe, options = self.recipe, {}
        tokenizer, shards = self.tokenizer, self.shards["train"]
        if method.text_masking and not whole_texts:
            length = method.short_context or recipe.short_context
            tokenizer = tokenizer.with_context_length(length)
            options["text_masking"] = method.text_masking(self.captions)
        if recipe.half is not None:
            shards = shards[recipe.half :: 2]
        return kcm.data.image_text_dataset(
            shards,
            tokenizer,
            image_size=self.image_size,
            batch_size=recipe.batch_size,
            training=True,
            caption_key=recipe.caption_key,
            crop_scale=(0.6, 1.0),
            image_transform=flip if recipe.horizontal_flip else None,
            seed=seed,
            **options,
        )

    def _evaluation(self, split, limit=None):
        """Batches of images and all their captions, or their classes."""
        options = {"include_captions": True}
        if self.classes is not None:
            options = {"label_key": self.recipe.caption_key}
            options["class_names"] = self.classes
        dataset = kcm.data.image_text_dataset(
            self.shards[split],
            None,
            image_size=self.image_size,
            batch_size=100,
            training=False,
            caption_key=self.recipe.caption_key,
            **options,
        )
        return list(itertools.islice(dataset, limit))

    def pairs(self, split):
        """1,000 pairs as a list of batches, each image with its first caption."""
        pairs = []
        for batch in self.evaluation(split, LOSS_BATCHES):
            if self.classes is None:
                captions = [texts[0] for texts in batch["captions"]]
            else:
                captions = [self.classes[label] for label in batch["labels"]]
            token_ids = self.tokenizer(captions)
            pairs.append({"images": batch["images"], "token_ids": token_ids})
        return pairs

    def callback(self):
        """Writes the scores of the first validation images into the logs of `fit`."""
        batches = self.evaluation("validation", CURVE_BATCHES)
        if self.classes is not None:
            return kcm.callbacks.ZeroShot(
                batches, self.classes, self.tokenizer, ["{}"], ks=(1,)
            )
        return kcm.callbacks.Retrieval(
            self._texts(batches), self.tokenizer, ks=(10,), duplicates=self.duplicates
        )

    def scores(self, model, split):
        """Percentages: recall@10 both ways, or zero-shot accuracy and linear probe.

        `"loss"` is the contrastive loss at the best temperature.
        """
        batches = self.evaluation(split)
        loss = loss_of_pairs(model, self.pairs(split))
        if self.classes is None:
            recall = kcm.evaluation.evaluate_retrieval(
                model,
                self._texts(batches),
                self.tokenizer,
                ks=(1, 5, 10),
                duplicates=self.duplicates,
                verbose=0,
            )
            del recall["chance"]
            found = {name: 100 * value for name, value in recall.items()}
            at_10 = [value for name, value in found.items() if name.endswith("@10")]
            return {"score": float(np.mean(at_10)), **found, "loss": loss}
        accuracy = kcm.evaluation.evaluate_zero_shot(
            model, batches, self.classes, self.tokenizer, ["{}"], ks=(1,), verbose=0
        )
        train, test = (
            kcm.evaluation.embed(model, x, verbose=0)
            for x in (self.evaluation("train", 50), batches)
        )
        probe = LogisticRegression(C=10, tol=1e-6, max_iter=1000)
        probe.fit(train["image_embeddings"].astype("float64"), train["labels"])
        top_1 = probe.score(test["image_embeddings"], test["labels"])
        return {
            "score": 100 * accuracy["top_1"],
            "linear probe": 100 * top_1,
            "loss": loss,
        }

    @functools.cached_property
    def duplicates(self):
        """Whether images with equal captions count as each other's partners."""
        captions = (
            texts
            for batch in self.evaluation("validation", CURVE_BATCHES)
            for texts in batch["captions"]
        )
        return "negative" if any(len(texts) > 1 for texts in captions) else "positive"

    def _texts(self, batches):
        if self.duplicates == "negative":
            return batches
        return [
            {**batch, "captions": [text for (text,) in batch["captions"]]}
            for batch in batches
        ]


def loss_of_pairs(model, pairs):
    """The contrastive loss of a model at the best temperature.

    Args:
        model: A `ContrastiveModel`.
        pairs: List of batches of pairs.
    """
    batches = []
    for batch in pairs:
        found = model(batch, training=False)
        embeddings = found["image_embeddings"], found["text_embeddings"]
        embeddings = [ops.convert_to_numpy(ops.stop_gradient(x)) for x in embeddings]
        batches.append((*embeddings, kcm.losses.caption_labels(batch["token_ids"])))
    return loss_at_best_temperature(batches)


def loss_at_best_temperature(batches):
    """The contrastive loss of normalized embeddings, whatever their temperature.

    Long trainings lower the temperature too far for data that is not trained on, so
    their loss says little about the embeddings. This one does, and differs less between
    seeds than a recall does.

    Args:
        batches: List of tuples of image embeddings, text embeddings and labels.
    """

    def loss(log_scale):
        scale = math.exp(log_scale)
        losses = [
            kcm.losses.softmax_contrastive_loss(images, texts, scale, labels)
            for images, texts, labels in batches
        ]
        return float(np.mean([ops.convert_to_numpy(each) for each in losses]))

    found = scipy.optimize.minimize_scalar(
        loss, bounds=(0.0, math.log(100.0)), method="bounded"
    )
    return float(found.fun)


def splits(folder):
    """Shards to train on, to choose by, and to test on once."""
    train, validation, test = (
        sorted(map(str, Path(folder).glob(f"{split}-*.tar")))
        for split in ("train", "validation", "test")
    )
    if not train or not test or (not validation and len(train) < 2):
        raise ValueError(
            "`--data` must be a folder of train-*.tar and test-*.tar, and of "
            "validation-*.tar or a second train-*.tar to take in its place. "
            f"Received: {folder} with {len(train)} train-*.tar, {len(validation)} "
            f"validation-*.tar and {len(test)} test-*.tar"
        )
    if not validation:
        train, validation = train[:-1], train[-1:]
    return {"train": train, "validation": validation, "test": test}
