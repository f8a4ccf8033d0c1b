"""DynamiCS against its reference, and that the program runs."""

import dynamic_cluster_sampling as dynamics
import keras
import numpy as np
import pytest
from sklearn.preprocessing import normalize

import keras_cluster_mask as kcm

pytestmark = pytest.mark.any_backend


def reference(counts, target, alpha):
    """Of a sample of each cluster, as in the official code without its rounding."""
    n = np.asarray(counts, float)
    return n**alpha / (n**alpha).sum() * target / n


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("repeat", [False, True])
def test_probabilities_equal_the_reference(alpha, share, repeat):
    counts = [300, 70, 20, 3]
    clusters = np.repeat([9, -2, 4, 0], counts)
    expected = reference(counts, share * 393, alpha)
    expected = np.repeat(expected if repeat else np.minimum(expected, 1), counts)
    mixed = np.random.default_rng(0).permutation(393)
    found = dynamics.probabilities(clusters[mixed], alpha, share, repeat)
    np.testing.assert_allclose(found, expected[mixed], rtol=1e-12)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_centers_are_merged_as_in_the_reference(threshold):
    centers = np.random.default_rng(0).normal(size=(200, 6)).astype("float32")
    centers = normalize(centers)
    kept = []
    for center in centers:
        if not kept or np.max(np.stack(kept) @ center) < threshold:
            kept.append(center)
    assert 1 < len(kept) <= 200
    np.testing.assert_array_equal(dynamics.merge(centers, threshold), np.stack(kept))


def test_planted_clusters_are_found():
    pytest.importorskip("faiss")
    generator = np.random.default_rng(0)
    names = generator.permutation(np.repeat(np.arange(5), [1500, 700, 400, 300, 100]))
    embeddings = generator.normal(size=(5, 64))[names]
    embeddings += 0.2 * generator.normal(size=embeddings.shape)
    embeddings *= generator.uniform(0.1, 10, (3000, 1))
    found = dynamics.cluster(dynamics.normalized(embeddings), 16, 10, 0.7, 0)
    assert len({*zip(found, names)}) == len({*found}) == 5


def test_epochs_choose_samples_as_often_as_expected():
    copies = np.repeat([0.0, 0.2, 0.75, 1.0, 2.3], 40)
    epochs = [dynamics.choose(copies, 5, epoch) for epoch in range(500)]
    counts = np.array([np.bincount(each, minlength=200) for each in epochs])
    np.testing.assert_array_less(np.abs(counts - copies), 1)
    # Five standard deviations of a mean.
    np.testing.assert_allclose(counts.mean(0), copies, atol=5 * (0.25 / 500) ** 0.5)
    assert len(np.unique(counts, axis=0)) == 500
    np.testing.assert_array_equal(dynamics.choose(copies, 5, 7), epochs[7])
    assert not np.array_equal(dynamics.choose(copies, 6, 7), epochs[7])


@pytest.fixture
def tiny(shard):
    def tiny(*flags):
        flags = f"--train={shard} --image-size=16 --batch-size=8", *flags
        return dynamics.parse(f"--embeddings=e.npz {' '.join(flags)}".split())

    return tiny


def test_epochs_crop_differently(tiny):
    args = tiny("--batch-size=1")
    model = dynamics.make_model(args)
    first, again, second = (
        dynamics.dataset_of(args, np.ones(1), model, epoch)[0]["images"]
        for epoch in (0, 0, 1)
    )
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(second, first)


def test_a_killed_run_ends_at_the_weights_of_a_whole_run(tiny, tmp_path):
    copies = np.repeat([0.3, 0.9], 32)
    whole = dynamics.train(tiny(f"--output={tmp_path}/a", "--epochs=3"), copies)
    dynamics.train(tiny(f"--output={tmp_path}/b", "--epochs=1"), copies)
    # The run is killed while it saves its second epoch.
    (tmp_path / "b" / "new.keras").write_bytes(b"PK")
    keras.utils.set_random_seed(99)
    resumed = dynamics.train(tiny(f"--output={tmp_path}/b", "--epochs=3"), copies)
    assert resumed.optimizer.iterations == whole.optimizer.iterations
    for found, expected in zip(resumed.variables, whole.variables, strict=True):
        np.testing.assert_array_equal(found.numpy(), expected.numpy())


def test_it_runs_in_a_tiny_setting(shard, tiny, tmp_path, capsys):
    pytest.importorskip("faiss")
    # Samples without an embedding are not chosen.
    items = [*kcm.data.subset(shard, range(64))]
    keys = [item["__key__"] for item in items[4:]]
    embeddings = np.eye(2)[np.arange(60) // 56]
    np.savez(tmp_path / "e.npz", keys=keys, embeddings=embeddings)
    flags = f"--embeddings={tmp_path}/e.npz", "--num-clusters=2", "--epochs=1"
    dynamics.main(tiny(f"--output={tmp_path}", *flags))
    assert (tmp_path / "epoch_0001.keras").exists()
    assert "2 clusters. An epoch has 23 of 60" in capsys.readouterr().out
    found = dynamics.numbers_of(shard, keys[::-1])
    np.testing.assert_array_equal(found, np.arange(63, 3, -1))
    for source, wrong in ((items, [*keys, "other"]), (items * 2, keys)):
        with pytest.raises(SystemExit, match="all keys"):
            dynamics.numbers_of(source, wrong)
