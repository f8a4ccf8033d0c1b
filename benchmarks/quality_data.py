"""The data of `quality.py`, and the scores of a model on it."""

import dataclasses
import itertools
from pathlib import Path

import keras
import numpy as np

import keras_cluster_mask as kcm

IMAGES = Path(__file__).resolve().parent.parent / "datasets" / "images"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Where the data lies and how it is trained on; the same for every method."""

    data: str
    image_size: int
    patch_size: int
    batch_size: int
    steps: int
    learning_rate: float
    context_length: int = 12
    vocabulary_size: int = 3000
    crop_scale: tuple = (0.6, 1.0)
    horizontal_flip: bool = False
    train_shards: int | None = None

    @property
    def name(self):
        """The name of the data set, as in folders of results."""
        folder = Path(self.data).resolve()
        # As the stored runs name the default images.
        stored = "pictures"  # codespell:ignore pictures
        return stored if folder == IMAGES else folder.name

    def splits(self):
        """Shards to train on, to choose by, and to test on once."""
        folder = Path(self.data)
        train = sorted(map(str, folder.glob("train-*.tar")))
        test = sorted(map(str, folder.glob("test-*.tar")))
        validation = sorted(map(str, folder.glob("validation-*.tar")))
        if not train or not test or (not validation and len(train) < 2):
            raise ValueError(
                "`--data` must be a folder of train-*.tar and test-*.tar, and of "
                "validation-*.tar or a second train-*.tar to take in its place. "
                f"Received: {self.data} with {len(train)} train-*.tar, "
                f"{len(validation)} validation-*.tar and {len(test)} test-*.tar"
            )
        if not validation:
            train, validation = train[:-1], train[-1:]
        return {
            "train": train[: self.train_shards],
            "validation": validation,
            "test": test,
        }


class Data:
    """One data set, read with one tokenizer at one size.

    Captions that stand for classes (few distinct ones) are judged by zero-shot
    classification and a linear probe, others by retrieval.
    """

    def __init__(self, recipe, image_size):
        self.recipe, self.image_size = recipe, image_size
        self.shards = recipe.splits()
        captions = kcm.data.read_captions(self.shards["train"])
        self.tokenizer = kcm.data.CLIPTokenizer.train(
            captions,
            vocabulary_size=recipe.vocabulary_size,
            context_length=recipe.context_length,
        )
        distinct = sorted(set(captions))
        self.classes = distinct if 10 * len(distinct) < len(captions) else None
        self._read = {}

    def training_batches(self, seed, steps, background):
        """`steps` batches as a dataset; other seeds give other crops and orders."""
        recipe = self.recipe
        dataset = kcm.data.image_text_dataset(
            self.shards["train"],
            self.tokenizer,
            image_size=self.image_size,
            batch_size=recipe.batch_size,
            training=True,
            crop_scale=recipe.crop_scale,
            horizontal_flip=recipe.horizontal_flip,
            background=background,
            seed=seed,
            format="tf",
        )
        return dataset.take(steps)

    def read(self, split, limit=None, background="white"):
        """Images and captions of a split as arrays, the first `limit` of them."""
        if (split, limit, background) not in self._read:
            dataset = kcm.data.image_text_dataset(
                self.shards[split],
                self.tokenizer,
                image_size=self.image_size,
                batch_size=100,
                training=False,
                background=background,
                include_captions=True,
                format="grain",
            )
            batches = list(
                itertools.islice(dataset, None if limit is None else limit // 100)
            )
            images = np.concatenate([batch["images"] for batch in batches])
            captions = np.concatenate([batch["captions"] for batch in batches])
            self._read[split, limit, background] = images, captions.astype(str)
        return self._read[split, limit, background]

    def scores(self, model, split, limit=None, background="white", probe=False):
        """Percentages: recall@10 both ways, or zero-shot accuracy and linear probe."""
        images, captions = self.read(split, limit, background)
        embeddings = self.embeddings(model, images, captions)
        found = self.judge(model, embeddings, captions)
        if probe and self.classes is not None:
            classify = self.linear_probe(model)
            guesses = classify(embeddings["image_embeddings"])
            found["linear probe"] = percent_equal(guesses, captions)
        return found

    def judge(self, model, embeddings, captions):
        """Scores, in percent, of embeddings of images and of their captions."""
        images, texts = embeddings["image_embeddings"], embeddings["text_embeddings"]
        if self.classes is not None:
            classes = model.encode_text(self.tokenizer(self.classes))
            best = np.argmax(images @ keras.ops.convert_to_numpy(classes).T, axis=1)
            return {"score": percent_equal(np.asarray(self.classes)[best], captions)}
        recall = kcm.evaluation.retrieval_recall(images, texts, captions, ks=(10,))
        recall = {name: 100 * value for name, value in recall.items()}
        return {"score": sum(recall.values()) / len(recall), **recall}

    def linear_probe(self, model, limit=5000):
        """A logistic regression, from image embeddings to captions, as a function."""
        from sklearn.linear_model import LogisticRegression

        images, captions = self.read("train", limit)
        embeddings = self.embeddings(model, images, captions)["image_embeddings"]
        probe = LogisticRegression(max_iter=1000, C=10.0)
        return probe.fit(embeddings, captions).predict

    def embeddings(self, model, images, captions):
        batch = {"images": images, "token_ids": self.tokenizer(list(captions))}
        return model.predict(batch, batch_size=100, verbose=0)


def percent_equal(found, wanted):
    return 100 * float(np.mean(found == wanted))
