import pytest

from keras_cluster_mask.data.formats import format_of

# What the fixture `shard` holds.
ROWS = [
    {"key": "k0", "image": "0.png", "caption": 'He said: "Hi, you\nthere"'},
    {"key": "k1", "image": "1.png", "caption": "zwei\tÄpfel"},
    {"key": "k2", "image": "2.png", "caption": "three"},
]


def read_all_of(path):
    """Reads all samples of a shard as an index does; returns them and their faults.

    Also checks that `scan`, which finds a sample, and `parse`, which reads it, agree.
    """
    path = str(path)
    format = format_of(path)
    context = format.context(path)
    entries = list(format.scan(path))
    if format.in_index:
        contents = [entry.content for entry in entries]
    else:
        places = [(path, entry.offset, entry.size) for entry in entries]
        contents = format.read(places)
    samples, faults = [], []
    for number, (entry, content) in enumerate(zip(entries, contents)):
        if entry.fault:
            faults.append((entry.key, entry.fault))
            continue
        key, fields = format.parse(content, number, context)
        assert key == entry.key
        empty = ("", b"", None, [])
        assert {n for n in fields if fields[n] not in empty} <= {*entry.fields}
        samples.append((key, fields))
    return samples, faults


@pytest.fixture
def read_all():
    return read_all_of


@pytest.fixture
def scan():
    """Yields the keys of a shard, until its damage is raised."""

    def scan(path):
        for entry in format_of(str(path)).scan(str(path)):
            yield entry.key

    return scan


@pytest.fixture
def write(tmp_path):
    """Writes a file of str or bytes; returns its path."""

    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def record(**features):
    """A `tf.train.Example` of bytes, ints and floats, or lists of them."""
    tf = pytest.importorskip("tensorflow")

    def feature(value):
        values = value if isinstance(value, list) else [value]
        if values and isinstance(values[0], int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=values))
        if values and isinstance(values[0], float):
            return tf.train.Feature(float_list=tf.train.FloatList(value=values))
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

    made = {name: feature(value) for name, value in features.items()}
    example = tf.train.Example(features=tf.train.Features(feature=made))
    return example.SerializeToString()


@pytest.fixture
def write_records(tmp_path):
    tf = pytest.importorskip("tensorflow")

    def write_records(name, records):
        path = tmp_path / name
        options = "GZIP" if name.endswith(".gz") else None
        with tf.io.TFRecordWriter(str(path), options) as writer:
            for each in records:
                writer.write(each)
        return path

    return write_records


@pytest.fixture(
    params=["x.tar", "x.tfrecord", "x.csv", "x.tsv", "x.jsonl", "x.parquet"]
)
def shard(request, write_rows, write_tar):
    """A shard of `ROWS` in each format."""
    name = request.param
    if name == "x.tar":
        return write_tar(
            name,
            [
                (f"{row['key']}.{field}", row[field].encode())
                for row in ROWS
                for field in ("image", "caption")
            ],
        )
    if name == "x.tfrecord":
        rows = [{k: v.encode() for k, v in row.items()} for row in ROWS]
        write_records = request.getfixturevalue("write_records")
        return write_records(name, [record(**row) for row in rows])
    return write_rows(name, ROWS)
