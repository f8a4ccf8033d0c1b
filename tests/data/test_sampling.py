"""`ClusterSampling` against its reference, and which samples are read with it."""

import itertools
import math
import pickle
import sys

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data import ClusterSampling, image_text_dataset
from keras_cluster_mask.data.parts import hash_of
from keras_cluster_mask.data.sampling import cluster_embeddings, merge_centers
from tests.helpers import FAST, image_mlp, text_bag

pytestmark = [
    pytest.mark.any_backend,
    pytest.mark.filterwarnings("ignore:.*are broken"),
]

# Large clusters are thinned to a quarter; all of the smallest come.
SIZES = [100_000, 10_000, 1_000, 100]


class Keys:
    """What samplers use of an index."""

    def __init__(self, keys):
        self._hashes = np.array([hash_of(key) for key in keys], "uint64")

    def key_hashes(self):
        return self._hashes


def tokenizer(captions):
    return [[1, 2, 3, 4, 5, 29]] * len(captions)


def make(source, sampling, **options):
    arguments = dict(batch_size=4, training=True, format="grain", include_keys=True)
    return image_text_dataset(
        source, tokenizer, 16, sampling=sampling, **{**arguments, **options}
    )


def batches(dataset, first, last):
    """The keys of the batches with these numbers."""
    dataset.start = first
    iterator = iter(dataset)
    read = [
        [key.decode() for key in batch["keys"]]
        for batch in itertools.islice(iterator, last - first)
    ]
    iterator.close()
    return read


@pytest.fixture
def shards(write_pairs):
    broken = [("x.txt", b"no image")]
    return [
        write_pairs("a.tar", 0, 40),
        write_pairs("b.tar", 40, 15, broken),
        write_pairs("c.tar", 55, 5),
    ]


def key_of(number):
    return f"{number:04}"


# The first cluster is large, the next two are small.
CLUSTERS = {key_of(n): 5 if n < 48 else 7 if n < 55 else -1 for n in range(60)}


def epochs_of(sampling, count):
    """The keys of the samples of each epoch, from the copies of each."""
    return [
        sorted(key for key in CLUSTERS for _ in range(sampling.copies(key, epoch)))
        for epoch in range(count)
    ]


# === ClusterSampling ===


def probabilities(counts, target, alpha):
    counts = np.asarray(counts, float)
    return counts**alpha / (counts**alpha).sum() * target / counts


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("repeat", [False, True])
def test_probabilities_equal_the_reference(alpha, share, repeat):
    counts = [300, 70, 20, 3]
    names = np.repeat([4, -2, 9, 0], counts)
    clusters = {f"k{number}": int(name) for number, name in enumerate(names)}
    sampling = ClusterSampling(clusters, alpha, share, repeat)
    expected = probabilities(counts, share * 393, alpha)
    # The official code rounds the number of samples of each cluster.
    rounded = np.round(expected * counts) / counts
    assert (np.abs(rounded - expected) <= 0.5 / np.array(counts) + 1e-12).all()
    expected = expected if repeat else np.minimum(expected, 1)
    ends = np.cumsum(counts)
    for number in (*(ends - counts), *(ends - 1)):
        cluster = np.searchsorted(ends, number, side="right")
        found = sampling.probability(f"k{number}")
        np.testing.assert_allclose(found, expected[cluster], rtol=1e-12)


@pytest.mark.parametrize(("repeat", "share_of_target"), [(True, 1.0), (False, 0.6357)])
def test_an_epoch_has_the_target_length_with_repeat_and_is_shorter_without(
    repeat, share_of_target
):
    keys = [f"{number:06}" for number in range(sum(SIZES))]
    names = np.repeat(np.arange(4), SIZES)
    sampling = ClusterSampling((keys, names), share=0.5, repeat=repeat)
    choose = sampling.of_index(Keys(keys))
    chosen = [choose(len(keys), epoch) for epoch in range(4)]
    for numbers in chosen:
        assert abs(len(numbers) / (0.5 * len(keys)) - share_of_target) < 0.01
        if not repeat:
            assert len({*numbers.tolist()}) == len(numbers)
    per_cluster = np.mean([np.bincount(names[each]) for each in chosen], axis=0)
    expected = np.array(SIZES) * probabilities(SIZES, 0.5 * len(keys), 0.2)
    expected = expected if repeat else np.minimum(expected, SIZES)
    np.testing.assert_allclose(per_cluster, expected, rtol=0.01)


def test_samples_are_drawn_anew_in_each_epoch_and_by_themselves():
    keys = [f"{number}" for number in range(20_000)]
    sampling = ClusterSampling((keys, np.zeros(20_000, int)), share=0.3)
    choose = sampling.of_index(Keys(keys))
    other = ClusterSampling((keys, np.zeros(20_000, int)), share=0.3, seed=1)
    masks = np.zeros((7, 20_000))
    for epoch in range(6):
        masks[epoch, choose(20_000, epoch)] = 1
    masks[6, other.of_index(Keys(keys))(20_000, 0)] = 1
    # Between epochs, between seeds, and between neighbors.
    np.testing.assert_allclose(np.corrcoef(masks), np.eye(7), atol=0.03)
    for mask in masks:
        assert abs(np.corrcoef(mask[1:], mask[:-1])[0, 1]) < 0.03


def test_copies_are_the_probability_rounded_up_or_down_at_random():
    sampling = ClusterSampling(CLUSTERS, share=1.0, repeat=True)
    for key in (key_of(0), key_of(50), key_of(59)):
        mean = sampling.probability(key)
        copies = [sampling.copies(key, epoch) for epoch in range(2000)]
        assert {*copies} == {math.floor(mean), math.floor(mean) + 1}
        assert abs(np.mean(copies) - mean) < 4 * 0.5 / math.sqrt(2000)
    assert sampling.probability(key_of(59)) > 2


def test_clusters_of_a_file_are_those_of_the_dict(tmp_path):
    expected = ClusterSampling(CLUSTERS, seed=3)
    expected.save(tmp_path / "saved")
    names = [*CLUSTERS.values()]
    np.savez(tmp_path / "str.npz", keys=[*CLUSTERS], clusters=names)
    as_bytes = [key.encode() for key in CLUSTERS]
    np.savez(tmp_path / "bytes.npz", keys=as_bytes, clusters=names)
    for name in ("saved", "str.npz", "bytes.npz"):
        found = ClusterSampling(str(tmp_path / name), seed=3)
        assert epochs_of(found, 3) == epochs_of(expected, 3)
        assert found.probability(b"0050") == expected.probability("0050")


def test_a_file_stays_whole_if_it_cannot_be_replaced(tmp_path, monkeypatch):
    path = tmp_path / "clusters.npz"
    ClusterSampling(CLUSTERS, seed=3).save(path)

    def fill_the_disk(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as full:
        full.setattr(np, "savez", fill_the_disk)
        with pytest.raises(OSError, match="no space"):
            ClusterSampling({"a": 1}).save(path)
    assert [*tmp_path.iterdir()] == [path]
    found = ClusterSampling(path, seed=3)
    assert epochs_of(found, 3) == epochs_of(ClusterSampling(CLUSTERS, seed=3), 3)


@pytest.mark.parametrize("threshold", [0.3, 0.7, 1.0])
def test_centers_are_merged_as_in_the_reference(threshold):
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(200, 6)).astype("float32")
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    kept = []
    for center in centers:
        if not kept or np.max(np.stack(kept) @ center) < threshold:
            kept.append(center)
    assert 1 < len(kept) <= 200
    np.testing.assert_array_equal(merge_centers(centers, threshold), np.stack(kept))


@pytest.fixture
def planted():
    """Embeddings around directions of their own, of any length, and their clusters."""
    generator = np.random.default_rng(0)
    names = generator.permutation(np.repeat(np.arange(5), [1500, 700, 400, 300, 100]))
    embeddings = generator.normal(size=(5, 64))[names]
    embeddings += 0.2 * generator.normal(size=embeddings.shape)
    return embeddings * generator.uniform(0.1, 10, (3000, 1)), names


def same_clusters(found, expected):
    return len({*zip(found, expected)}) == len({*found}) == len({*expected})


def test_planted_clusters_are_found(planted, tmp_path):
    pytest.importorskip("faiss")
    embeddings, names = planted
    assert same_clusters(cluster_embeddings(embeddings, 16, 10, 0.7, 0), names)
    # Fewer centers are made from 1,000 embeddings each; all embeddings get a cluster.
    np.save(tmp_path / "e.npy", embeddings.astype("float16"))
    on_disk = np.load(tmp_path / "e.npy", mmap_mode="r")
    found = cluster_embeddings(on_disk, 2, 10, 0.7, 0)
    assert found.shape == (3000,)
    assert {*found} == {0, 1}

    keys = [str(number) for number in range(3000)]
    found = ClusterSampling.from_embeddings(embeddings, keys, share=0.2, repeat=True)
    expected = ClusterSampling((keys, names), share=0.2, repeat=True)
    chosen = [each.of_index(Keys(keys))(3000, 0) for each in (found, expected)]
    np.testing.assert_array_equal(*chosen)
    assert len(chosen[0]) > 100


def test_faiss_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match="pip install faiss-cpu"):
        ClusterSampling.from_embeddings(np.eye(4), list("abcd"))


# === In a dataset ===


@pytest.mark.parametrize("repeat", [False, True])
@pytest.mark.parametrize("block_size", [1, 2])
def test_epochs_are_the_same_for_all_processes_and_after_a_stop(
    shards, repeat, block_size
):
    sampling = ClusterSampling(CLUSTERS, share=0.9, repeat=repeat, seed=5)
    epochs = epochs_of(sampling, 4)
    assert len({len(epoch) for epoch in epochs}) > 1
    steps = sum(map(len, epochs)) // 8
    streams = []
    for processes in (1, 2, 4):
        parts = []
        for number in range(processes):
            options = dict(
                process=(number, processes), batch_size=8, block_size=block_size
            )
            # As another program would make it, which then resumes.
            first, second = (
                make(shards, ClusterSampling(CLUSTERS, 0.2, 0.9, repeat, 5), **options)
                for _ in range(2)
            )
            assert len(first) == len(epochs[0]) // 8
            stop = steps // 2
            parts.append(batches(first, 0, stop) + batches(second, stop, steps))
        streams.append([key for batch in zip(*parts) for keys in batch for key in keys])
    assert streams[0] == streams[1] == streams[2]
    first = 0
    for epoch in epochs[:3]:
        assert sorted(streams[0][first : first + len(epoch)]) == epoch
        assert streams[0][first : first + len(epoch)] != epoch
        first += len(epoch)


def test_workers_choose_the_same_samples(shards):
    order = make(shards, ClusterSampling(CLUSTERS, repeat=True))._samples.order
    # What a worker process gets, which may begin anywhere.
    copy = pickle.loads(pickle.dumps(order))
    for position in (120, 0, 7):
        assert copy[position] == order[position]
    assert [copy[n] for n in range(90)] == [order[n] for n in range(90)]


class Counted(list):
    """Samples that record which of them are read."""

    read = ()

    def __getitem__(self, number):
        self.read = {*self.read, number}
        return super().__getitem__(number)


@pytest.mark.parametrize("has_keys", [False, True])
def test_samples_that_are_left_out_are_not_read(noise, has_keys):
    source = Counted({"image": noise(0), "caption": "no 1"} for _ in range(300))
    keys = [str(number) for number in range(300)]
    if has_keys:
        keys = [f"key {number}" for number in range(300)]
        source = Counted({**row, "__key__": key} for row, key in zip(source, keys))
    sampling = ClusterSampling((keys, np.zeros(300, int)), share=0.1)
    dataset = make(source, sampling)
    source.read = set()
    count = sum(sampling.copies(key, 0) for key in keys)
    read = [key for batch in batches(dataset, 0, count // 4) for key in batch]
    assert len({*read}) > 10
    # A few batches are read ahead.
    chosen = {
        number
        for number, key in enumerate(keys)
        if any(sampling.copies(key, epoch) for epoch in range(4))
    }
    assert {keys.index(key) for key in read} <= source.read <= chosen
    assert len(chosen) < 150


class CountSteps(keras.callbacks.Callback):
    """Counts the steps of each epoch."""

    steps = ()

    def on_epoch_begin(self, epoch, logs=None):
        self.steps = [*self.steps, 0]

    def on_train_batch_end(self, batch, logs=None):
        self.steps[-1] += 1


def test_fit_trains_for_the_steps_of_an_epoch_of_the_mean_length(shards):
    sampling = ClusterSampling(CLUSTERS, share=0.9, repeat=True)
    dataset = make(shards, sampling, include_keys=False)
    model = kcm.ContrastiveModel(image_mlp(), text_bag())
    model.compile(keras.optimizers.SGD(0.01), **FAST)
    counter = CountSteps()
    model.fit(dataset, epochs=3, verbose=0, callbacks=[counter])
    lengths = [len(epoch) for epoch in epochs_of(sampling, 3)]
    mean = sum(map(sampling.probability, CLUSTERS))
    assert dataset.steps_per_epoch == int(mean) // 4
    assert counter.steps == [dataset.steps_per_epoch] * 3
    assert len({*lengths}) > 1


def test_the_length_of_a_dataset_is_that_of_the_epoch_at_its_start(shards):
    sampling = ClusterSampling(CLUSTERS, share=0.9, repeat=True)
    lengths = [len(epoch) for epoch in epochs_of(sampling, 3)]
    assert len({length // 4 for length in lengths}) > 1
    dataset = make(shards, sampling)
    stream = getattr(dataset, "stream", dataset)
    for epoch, length in enumerate(lengths):
        # The first batch that begins within the epoch.
        stream.start = -(-sum(lengths[:epoch]) // 4)
        assert len(dataset) == length // 4


def test_other_clusters_and_seeds_are_other_data(shards):
    def description(clusters=CLUSTERS, seed=0):
        return make(shards, ClusterSampling(clusters, seed=seed)).description

    name = "data.sampling"
    assert description()[name] == description()[name]
    assert description()[name] != description(seed=1)[name]
    assert description()[name] != description(dict.fromkeys(CLUSTERS, 0))[name]


# === Errors ===


def test_samples_that_a_sampler_does_not_know_are_named(shards):
    clusters = {key: name for key, name in CLUSTERS.items() if key != "0041"}
    message = r"`clusters` must.*Received: .* 1 of 60 samples.*'0041'"
    with pytest.raises(ValueError, match=message):
        make(shards, ClusterSampling(clusters))
    for method in (
        ClusterSampling(clusters).probability,
        lambda key: ClusterSampling(clusters).copies(key, 0),
    ):
        with pytest.raises(ValueError, match=r"`key`.*Received: key='0041'"):
            method("0041")


def test_a_key_in_two_shards_is_named(write_pairs):
    source = [write_pairs("a.tar", 0, 4), write_pairs("b.tar", 3, 4)]
    with pytest.raises(ValueError, match=r"`source`.*Received: .*'0003' twice"):
        make(source, ClusterSampling(CLUSTERS))


def test_an_epoch_of_less_than_a_batch_is_refused(shards):
    sampling = ClusterSampling(CLUSTERS, share=0.1)
    count = len(epochs_of(sampling, 1)[0])
    assert 0 < count < 16
    message = rf"`sampling`.*Received: batch_size=16, {count} samples"
    with pytest.raises(ValueError, match=message):
        make(shards, sampling, batch_size=16)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", "low"),
        ("share", 0),
        ("share", 1.5),
        ("share", True),
        ("share", float("nan")),
        ("seed", -1),
        ("seed", 0.5),
    ],
)
def test_invalid_arguments_of_clusters_are_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*Received: {name}={value!r}"):
        ClusterSampling(CLUSTERS, **{name: value})


@pytest.mark.parametrize(
    "clusters",
    [
        {},
        [("a", 1)],
        {"a": "dogs"},
        {"a": 0.5},
        {"a": True},
        (["a", "b"], [1]),
        (["a"], [[1]]),
    ],
    ids=repr,
)
def test_clusters_must_be_numbers_by_key(clusters):
    with pytest.raises(ValueError, match=r"`clusters` must.*Received"):
        ClusterSampling(clusters)


@pytest.mark.parametrize(
    ("clusters", "message"),
    [
        ({1: 1}, "`keys` must be str.*Received: 1 of type int"),
        ({"a": 1, b"a": 2}, "`keys` must differ.*Received: b?'a' twice"),
    ],
)
def test_keys_must_be_different_strings(clusters, message):
    with pytest.raises(ValueError, match=message):
        ClusterSampling(clusters)


def test_files_without_clusters_are_refused(tmp_path):
    (tmp_path / "c.json").write_text('{"a": 1}')
    (tmp_path / "empty").touch()
    np.save(tmp_path / "c.npy", np.arange(3))
    np.savez(tmp_path / "c.npz", ids=np.arange(3))
    for name in ("c.json", "empty", "c.npy", "c.npz"):
        with pytest.raises(ValueError, match=f"`clusters`.*`save`.*Received.*{name}"):
            ClusterSampling(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        ClusterSampling(tmp_path / "missing.npz")
    with pytest.raises(
        ValueError, match=r"`clusters` must be a path or URL.*nowhere://c.npz"
    ):
        ClusterSampling("nowhere://c.npz")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(embeddings=np.ones(4)), r"`embeddings`.*shape \(4,\)"),
        (dict(embeddings=np.ones((3, 2))), r"`embeddings`.*4 keys, shape \(3, 2\)"),
        (dict(embeddings=np.zeros((4, 2))), "`embeddings`.*length 0.0"),
        (dict(embeddings=np.full((4, 2), np.nan)), "`embeddings`.*length nan"),
        (dict(embeddings=[[1, 0]] * 3 + [[np.inf, 0]]), "`embeddings`.*length inf"),
        (dict(keys=["a", "b", "b", "c"]), "`keys`.*'b' twice"),
        (dict(num_clusters=5), "`num_clusters`.*4 samples"),
        (dict(num_clusters=0), "`num_clusters`.*num_clusters=0"),
        (dict(iterations=0), "`iterations`.*iterations=0"),
        (dict(merge_threshold=2), "`merge_threshold`.*merge_threshold=2"),
        (dict(seed=-1), "`seed`.*seed=-1"),
        (dict(share=2), "`share`.*share=2"),
    ],
)
def test_invalid_arguments_of_embeddings_are_named(options, message):
    pytest.importorskip("faiss")
    arguments = dict(embeddings=np.eye(4), keys=list("abcd"))
    with pytest.raises(ValueError, match=message):
        ClusterSampling.from_embeddings(**{**arguments, **options})
