"""`Sampling`: sets how often each sample occurs in an epoch, by its key."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from keras_cluster_mask.checks import check_integer
from keras_cluster_mask.data.samples import hash_of, key_of


class Sampling:
    """Trains on a subset of the samples in each epoch, or repeats some of them.

    `probability` gives the expected number of copies of each sample in an epoch. A
    sample with a probability of 0.3 occurs in 30 % of all epochs, and one with 0 is
    never read. One with 2.3 occurs two or three times: `floor(2.3 + u)` times, where
    `u` is uniform in [0, 1). Samples are drawn independently, by `seed` and the epoch,
    so all processes and resumed runs draw the same samples, with any number of workers.
    The length of an epoch is random. `len(dataset)` is the number of batches in the
    epoch that the dataset starts in, and `dataset.steps_per_epoch` is the number in an
    epoch of mean length. `ContrastiveModel.fit` trains for `steps_per_epoch` steps in
    each epoch. No sample is lost between epochs.

    Drawing reads no samples, because the index of the source has the hashes of all
    keys. (Objects with `"__key__"` in their samples are read.) The keys are in the
    metadata that img2dataset writes, or in the batches of a dataset with
    `include_keys=True`.

    A dataset uses 8 bytes of memory per sample, in each process and worker process, and
    8 bytes per sample of two epochs. While drawing an epoch, it uses 32 more.

    `examples/dynamic_cluster_sampling.py` (DynamiCS) and
    `examples/frequency_pruning.py` (WFPP) compute probabilities.

    Example:

    ```python
    source = [
        {"__key__": f"{n:03}", "image": np.zeros((16, 16, 3), "uint8"), "caption": "a"}
        for n in range(100)
    ]
    tokenizer = kcm.data.CLIPTokenizer.train(["a dog", "a cat"], 600)
    # Two copies of the first ten samples, and a random half of the others.
    probability = {f"{n:03}": 2.0 if n < 10 else 0.5 for n in range(100)}
    dataset = kcm.data.image_text_dataset(
        source,
        tokenizer,
        image_size=16,
        batch_size=5,
        training=True,
        sampling=kcm.data.Sampling(probability),
    )
    print(dataset.steps_per_epoch)  # 13: (10 * 2 + 90 * 0.5) / 5
    ```

    Args:
        probability: Dictionary from the key of each sample, a string or bytes, to a
            number of at least 0. It must contain all samples of the dataset, and may
            contain others. Or an iterable of keys, such as a list or an array: these
            samples occur once in each epoch, or as often as they are listed, and other
            samples never occur. Keys match the `"keys"` of batches with `include_keys`.
        seed: Integer. The random seed of the samples that are drawn. Defaults to `0`.

    Raises:
        ValueError: If `probability` is neither a dictionary nor an iterable. In
            `image_text_dataset`, if the probability of a sample is missing or invalid,
            if samples have equal keys, or if no sample is left.
    """

    def __init__(
        self,
        probability: Mapping[str, float]
        | Mapping[bytes, float]
        | Iterable[str | bytes],
        seed: int = 0,
    ):
        self.seed = check_integer("seed", seed, 0)
        # The number of copies of samples with a missing key; NaN means an error.
        self._default = 0.0
        if isinstance(probability, Mapping):
            self._default = np.nan
            self._copies = {
                hash_of(key_of(key)): number for key, number in probability.items()
            }
        elif np.iterable(probability) and not isinstance(probability, str | bytes):
            self._copies = collections.Counter(
                hash_of(key_of(key)) for key in probability
            )
        else:
            raise ValueError(
                "`probability` must be a dictionary from keys to numbers, or keys: "
                "compute them before, such as from the metadata of the samples. "
                f"Received: probability={probability!r}"
            )

    def of_index(self, index: Any) -> Callable[[int], np.ndarray]:
        """Returns a function that draws the samples of an `Index` for an epoch."""

        def key_at(number):
            return next(iter(index.read([int(number)], with_images=False))).key

        hashes = index.key_hashes()
        first = np.unique(hashes, return_index=True)[1]
        if len(first) < len(hashes):
            twice = np.setdiff1d(range(len(hashes)), first)[0]
            raise ValueError(
                "`source` must have each key once, over all files: `Sampling` knows "
                "samples by their keys. Write the files with longer keys. Received: "
                f"the key {key_at(twice)!r} twice"
            )
        copies = [self._copies.get(x, self._default) for x in hashes.tolist()]
        times = [float(x) if hasattr(x, "__float__") else np.nan for x in copies]
        times = np.array(times, "float64")
        wrong = np.flatnonzero(~(np.isfinite(times) & (times >= 0)))
        if wrong.size:
            raise ValueError(
                "`probability` must have a finite number of at least 0 for each sample "
                "of `source`, with 0 for samples that are never read. Received: none "
                f"or an invalid one for {len(wrong)} of {len(copies)} samples, such as "
                f"{copies[wrong[0]]} for the key {key_at(wrong[0])!r}"
            )
        mean_length = float(times.sum())
        if mean_length < 1:
            raise ValueError(
                "`sampling` must choose at least one sample of `source` in an epoch: "
                f"check its keys. Received: {mean_length:.3g} of {len(copies)} samples "
                f"on average, which have keys such as {key_at(0)!r}"
            )
        draw = functools.partial(_draw, times, self.seed)
        draw.mean_length = mean_length
        return draw


def _draw(copies, seed, epoch):
    """Draws the numbers of the samples of an epoch, copies included."""
    uniform = np.random.default_rng([seed, epoch]).random(len(copies))
    times = np.floor(copies + uniform).astype("int64")
    return np.repeat(np.arange(len(copies)), times)
