import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import mutated_shards

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]


def test_damaged_shards_give_nothing_wrong_and_lose_nothing(tmp_path):
    rows, failures = mutated_shards.run(135, seed=1, folder=tmp_path)
    assert failures == []
    total = rows[-1]
    assert total["shards"] == 135
    # Otherwise nothing was tried.
    for count in ("given", "skipped", "shards damaged", "shards refused"):
        assert total[count] >= 20, rows


@pytest.fixture(scope="module")
def base():
    base, other = next(mutated_shards.bases(0))
    assert base.name == "tar"
    return base, other


def test_a_shard_as_it_was_has_no_fault(base, tmp_path):
    found = mutated_shards.judge(*base, base[0].content, tmp_path / "x.tar")
    expected = dict.fromkeys(found, 0)
    assert found == {**expected, "errors": [], "given": mutated_shards.SAMPLES}


def test_a_wrong_caption_is_noticed_and_whether_its_own_bytes_were_hit(base):
    samples = base[0].samples
    caption, image, *_ = samples["0003"]
    content = base[0].content

    def verdict(content, caption, image):
        return mutated_shards._verdict(
            base[0], samples, content, "0003", caption.encode(), image, False
        )

    assert verdict(content, caption, image) is None
    other = (mutated_shards.CAPTION % 4).decode()
    assert verdict(content, other, image) == "wrong"
    assert verdict(content, caption, samples["0004"][1]) == "wrong"
    hit = content.replace(b"number 3", b"number 4")
    assert verdict(hit, other, image) == "exchanged"
    assert verdict(hit, other.replace("4", "$"), image) == "changed"


def test_samples_that_are_there_but_not_given_are_lost(base, tmp_path, monkeypatch):
    start = base[0].spans[12][0]
    content = base[0].content
    zeroed = content[:start] + bytes(512) + content[start + 512 :]
    found = mutated_shards.judge(*base, zeroed, tmp_path / "x.tar")
    assert (found["lost"], found["damaged"]) == (0, 1)
    # Taken for the end of the archive, by evaluation and by training.
    monkeypatch.setattr(
        "keras_cluster_mask.data.sources.webdataset._check_end", lambda stream: None
    )
    found = mutated_shards.judge(*base, zeroed, tmp_path / "x.tar")
    assert (found["lost"], found["damaged"]) == (2 * 5, 0)
