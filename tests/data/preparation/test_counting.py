import json

from keras_cluster_mask.data.preparation import count


def test_pairs_are_counted_by_shard_and_in_all(write_pairs, noise):
    broken = [("none.txt", b"no picture"), ("no.png", b"nobody decodes this")]
    broken += [("no.txt", b"text")]
    shards = [write_pairs("a.tar", 0, 5, broken), write_pairs("b.tar", 5, 3)]
    found = count(shards, num_threads=2)
    assert found["shards"] == {
        str(shards[0]): {"pairs": 6, "captions": 6, "broken": 1},
        str(shards[1]): {"pairs": 3, "captions": 3, "broken": 0},
    }
    assert (found["pairs"], found["captions"], found["broken"]) == (9, 9, 1)
    assert json.loads(json.dumps(found)) == found


def test_several_captions_are_counted(write_tar, noise):
    captions = json.dumps({"captions": ["one", "two"]}).encode()
    files = [("1.png", noise(1)), ("1.txt", b"one"), ("1.json", captions)]
    found = count(write_tar("a.tar", files))
    assert (found["pairs"], found["captions"]) == (1, 2)


def test_all_rows_of_a_long_manifest_are_counted_for_its_file(tmp_path):
    rows = "".join(f"{i}.png,text\n" for i in range(2500))
    (tmp_path / "metadata.csv").write_text("file_name,caption\n" + rows)
    found = count(tmp_path)
    path = str(tmp_path / "metadata.csv")
    assert found["shards"] == {path: {"pairs": 2500, "captions": 2500, "broken": 0}}
