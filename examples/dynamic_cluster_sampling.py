"""Trains CLIP on fewer samples of large clusters, new ones in each epoch (DynamiCS).

The images are clustered by their embeddings, and similar clusters are merged. A cluster
of `n` samples gives `r = T * n**alpha / sum(n**alpha)` samples to an epoch of `T`. So
large clusters are thinned out most, but still give more samples than small clusters.

`--embeddings` is a file from `np.savez(path, keys=keys, embeddings=embeddings)`, with a
row for each sample. Any model can compute the embeddings; the paper uses DINOv2.
`examples/README.md` shows how to create the file. Samples without a row, such as broken
samples, are not used. Needs faiss: `pip install faiss-cpu`.

Each epoch is a separate `fit`, and saves a file in `--output`. The program resumes
after the last of these files.

Dynamic Cluster Data Sampling for Efficient and Long-Tail-Aware Vision-Language
Pre-training: https://arxiv.org/abs/2604.27932
"""

import argparse
import os
import pathlib

os.environ.setdefault("KERAS_BACKEND", "torch")  # or "jax", "tensorflow"
import keras
import numpy as np

import keras_cluster_mask as kcm


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description="Trains CLIP on fewer samples of large clusters (DynamiCS).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    images = kcm.data.example_images() / "train-*.tar"
    add("--train", default=images, help="shards to train on")
    add("--embeddings", required=True, help="a file of keys and embeddings")
    add("--output", type=pathlib.Path, default="dynamics", help="folder of the models")

    add("--num-clusters", type=int, help="default: one for each 4,000 samples")
    add("--iterations", type=int, default=10, help="of k-means")
    add("--merge-threshold", type=float, default=0.7, help="a cosine similarity")
    add("--alpha", type=float, default=0.2, help="0: as many samples of each cluster")
    add("--share", type=float, default=0.5, help="length of an epoch, of all samples")
    add("--repeat", action="store_true", help="samples of small clusters, in an epoch")

    add("--image-size", type=int, default=48, help="in pixels")
    add("--batch-size", type=int, default=64, help="over all devices together")
    add("--epochs", type=int, default=9, help="passes over a share of the samples")
    add("--seed", type=int, default=0, help="of all that is random")
    return parser.parse_args(arguments)


def normalized(vectors):
    vectors = np.asarray(vectors, "float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def merge(centers, threshold):
    """Returns the centers that are not similar to an earlier kept center."""
    kept, number = np.empty_like(centers), 0
    for center in centers:
        if not number or np.max(kept[:number] @ center) < threshold:
            kept[number] = center
            number += 1
    return kept[:number]


def cluster(embeddings, num_clusters, iterations, merge_threshold, seed):
    """Returns the cluster of each embedding, by spherical k-means."""
    import faiss

    kmeans = faiss.Kmeans(
        embeddings.shape[1],
        num_clusters,
        niter=iterations,
        spherical=True,
        seed=seed,
        # More embeddings do not improve the centers.
        max_points_per_centroid=1000,
        min_points_per_centroid=1,
    )
    kmeans.train(embeddings)
    nearest = faiss.IndexFlatIP(embeddings.shape[1])
    nearest.add(merge(normalized(kmeans.centroids), merge_threshold))
    return nearest.search(embeddings, 1)[1][:, 0]


def probabilities(clusters, alpha, share, repeat=False):
    """Returns the expected number of copies of each sample in an epoch.

    For a small cluster, the formula can ask for more samples than there are. As in the
    official code, each sample then occurs once, and the epoch is shorter. With
    `repeat`, samples occur several times.
    """
    _, places, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    sizes = counts**alpha
    copies = share * len(clusters) * sizes / sizes.sum() / counts
    return (copies if repeat else np.minimum(copies, 1.0))[places]


def numbers_of(source, keys):
    """Returns the index in the source of the sample of each key."""
    dataset = kcm.data.image_text_dataset(source, None, 8, training=False)
    every = kcm.data.subset(source, range(dataset.num_samples))
    numbers = {str(item["__key__"]): number for number, item in enumerate(every)}
    if len(numbers) < len(every) or {*keys} - {*numbers}:
        raise SystemExit("--train must have all keys of --embeddings, each once.")
    return np.array([numbers[key] for key in keys])


def choose(copies, seed, epoch):
    """Returns the sample indices of an epoch; 2.3 copies are two or three."""
    draws = np.random.default_rng([seed, epoch]).random(len(copies))
    return np.repeat(np.arange(len(copies)), np.floor(copies + draws).astype(int))


def make_model(args):
    keras.utils.set_random_seed(args.seed)
    captions = kcm.data.read_captions(args.train)
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, context_length=16)
    backbone = kcm.models.clip_backbone(
        "tiny", args.image_size, tokenizer.vocabulary_size, tokenizer.context_length
    )
    masking = kcm.ClusterMasking(patch_size=8, seed=args.seed)
    model = kcm.ContrastiveModel.from_backbone(
        backbone, masking=masking, tokenizer=tokenizer
    )
    model.compile(keras.optimizers.AdamW(1e-3))
    return model


def dataset_of(args, copies, model, epoch):
    part = kcm.data.subset(args.train, choose(copies, args.seed, epoch))
    # With one seed, samples at the same index would have the same crop in each epoch.
    return kcm.data.image_text_dataset(
        part, model, batch_size=args.batch_size, seed=args.seed + epoch
    )


def train(args, copies):
    args.output.mkdir(parents=True, exist_ok=True)
    new = args.output / "new.keras"
    *_, last = [None, *sorted(args.output.glob("epoch_*.keras"))]
    model = keras.saving.load_model(last) if last else make_model(args)
    first = int(last.stem.removeprefix("epoch_")) if last else 0
    print(f"Training starts after {first} epochs.")
    for epoch in range(first, args.epochs):
        dataset = dataset_of(args, copies, model, epoch)
        model.fit(dataset, initial_epoch=epoch, epochs=epoch + 1)
        # If the run is killed while saving, this epoch has no broken file.
        model.save(new)
        new.replace(args.output / f"epoch_{epoch + 1:04}.keras")
    return model


def main(args):
    content = np.load(args.embeddings)
    embeddings = normalized(content["embeddings"])
    num_clusters = args.num_clusters or max(len(embeddings) // 4000, 16)
    clusters = cluster(
        embeddings, num_clusters, args.iterations, args.merge_threshold, args.seed
    )
    numbers = numbers_of(args.train, content["keys"])
    copies = np.zeros(numbers.max() + 1)
    copies[numbers] = probabilities(clusters, args.alpha, args.share, args.repeat)
    print(
        f"{len({*clusters.tolist()})} clusters. An epoch has {copies.sum():.0f} of "
        f"{len(numbers)} samples on average."
    )
    return train(args, copies)


if __name__ == "__main__":
    main(parse())
