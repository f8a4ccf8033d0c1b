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


def test_it_runs_in_a_tiny_setting(shard, tmp_path, capsys):
    pytest.importorskip("faiss")
    keys = [
        key
        for batch in kcm.data.image_text_dataset(
            shard, None, 8, 64, False, include_keys=True
        )
        for key in batch["keys"]
    ]
    embeddings = np.eye(2)[np.arange(64) // 60]
    np.savez(tmp_path / "e.npz", keys=np.array(keys), embeddings=embeddings)
    flags = f"""--train={shard} --embeddings={tmp_path}/e.npz --num-clusters=2
        --output={tmp_path}/p.npz --image-size=16 --batch-size=8 --epochs=1"""
    model = dynamics.main(dynamics.parse(flags.split()))
    assert isinstance(model, keras.Model)
    content = np.load(tmp_path / "p.npz")
    assert content["keys"].tolist() == keys
    expected = np.minimum(reference([60, 4], 32, 0.2), 1)[np.arange(64) // 60]
    np.testing.assert_allclose(content["probability"], expected)
    assert "2 clusters. An epoch has 24 of 64" in capsys.readouterr().out
