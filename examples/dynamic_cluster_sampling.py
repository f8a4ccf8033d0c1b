"""Trains CLIP on fewer samples of large clusters, new ones in each epoch (DynamiCS).

The images are clustered by their embeddings, and similar clusters are merged. A cluster
of `n` samples gives `r = T * n**alpha / sum(n**alpha)` samples to an epoch of `T`. So
large clusters are thinned most, and still give more samples than small ones.

`--embeddings` is a file of `np.savez(path, keys=keys, embeddings=embeddings)`, with a
row for each sample, of any model; DINOv2 in the paper. `examples/README.md` shows how
to make it. Needs faiss: `pip install faiss-cpu`.

Dynamic Cluster Data Sampling for Efficient and Long-Tail-Aware Vision-Language
Pre-training: https://arxiv.org/abs/2604.27932
"""

import argparse

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
    add("--output", default="probability.npz", help="for the keys and probabilities")

    add("--num-clusters", type=int, help="default: one for each 4,000 samples")
    add("--iterations", type=int, default=10, help="of k-means")
    add("--merge-threshold", type=float, default=0.7, help="a cosine similarity")
    add("--alpha", type=float, default=0.2, help="0: as many samples of each cluster")
    add("--share", type=float, default=0.5, help="length of an epoch, of all samples")
    add("--repeat", action="store_true", help="samples of small clusters, in an epoch")

    add("--image-size", type=int, default=48, help="in pixels")
    add("--batch-size", type=int, default=64, help="over all devices together")
    add("--epochs", type=int, default=9, help="passes over a share of the samples")
    add("--seed", type=int, default=0, help="of the clusters and the samples")
    return parser.parse_args(arguments)


def normalized(vectors):
    vectors = np.asarray(vectors, "float32")
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def merge(centers, threshold):
    """The centers that are not similar to one before them that stays."""
    kept, number = np.empty_like(centers), 0
    for center in centers:
        if not number or np.max(kept[:number] @ center) < threshold:
            kept[number] = center
            number += 1
    return kept[:number]


def cluster(embeddings, num_clusters, iterations, merge_threshold, seed):
    """The number of the cluster of each embedding, by spherical k-means."""
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
    """The expected number of copies of each sample in an epoch.

    In a small cluster, the law can ask for more samples than there are. As in the
    official code, each then occurs once, and the epoch is shorter. With `repeat` they
    occur several times.
    """
    _, places, counts = np.unique(clusters, return_inverse=True, return_counts=True)
    sizes = counts**alpha
    copies = share * len(clusters) * sizes / sizes.sum() / counts
    return (copies if repeat else np.minimum(copies, 1.0))[places]


def train(args, sampling):
    captions = kcm.data.read_captions(args.train)
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 3000, context_length=16)
    dataset = kcm.data.image_text_dataset(
        args.train,
        tokenizer,
        args.image_size,
        args.batch_size,
        training=True,
        sampling=sampling,
    )
    backbone = kcm.models.clip_backbone(
        "tiny", args.image_size, tokenizer.vocabulary_size, tokenizer.context_length
    )
    masking = kcm.ClusterMasking(patch_size=8)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    model.compile(keras.optimizers.AdamW(1e-3))
    model.fit(dataset, epochs=args.epochs)
    return model


def main(args):
    content = np.load(args.embeddings)
    keys, embeddings = content["keys"], normalized(content["embeddings"])
    num_clusters = args.num_clusters or max(len(keys) // 4000, 16)
    clusters = cluster(
        embeddings, num_clusters, args.iterations, args.merge_threshold, args.seed
    )
    copies = probabilities(clusters, args.alpha, args.share, args.repeat)
    np.savez(args.output, keys=keys, probability=copies)
    print(
        f"{len({*clusters.tolist()})} clusters. An epoch has {copies.sum():.0f} of "
        f"{len(keys)} samples on average."
    )
    return train(args, kcm.data.Sampling(dict(zip(keys, copies)), args.seed))


if __name__ == "__main__":
    main(parse())
