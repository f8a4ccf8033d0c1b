import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import mutated_shards

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

# Every mutation of every format.
ALL = len(mutated_shards.MUTATIONS) * len(mutated_shards.FORMATS)


def test_damaged_shards_give_nothing_wrong_and_lose_nothing(tmp_path):
    rows, failures = mutated_shards.run(range(2 * ALL), 1, str(tmp_path))
    assert failures == []
    total = rows[-1]
    assert total["shards"] == 2 * ALL
    # Otherwise nothing was tried.
    for count in ("given", "broken", "damaged", "refused", "changed"):
        assert total[count] >= 10, rows


@pytest.mark.parametrize("name", mutated_shards.FORMATS)
def test_a_shard_as_it_was_has_no_fault(name, tmp_path):
    formats = mutated_shards.bases(0, str(tmp_path))
    base, other = formats[list(mutated_shards.FORMATS).index(name)]
    (tmp_path / "shard").mkdir()
    path = tmp_path / "shard" / f"x.{name}"
    found = mutated_shards.judge(base, other, base.content, path)
    expected = dict.fromkeys(found, 0)
    assert found == {**expected, "errors": [], "given": mutated_shards.SAMPLES}


@pytest.fixture
def table(tmp_path):
    formats = mutated_shards.bases(0, str(tmp_path))
    (tmp_path / "shard").mkdir()
    base, other = formats[list(mutated_shards.FORMATS).index("csv")]

    def judge(content):
        path = tmp_path / "shard" / "x.csv"
        return mutated_shards.judge(base, other, content, path)

    return base, judge


def test_a_changed_caption_is_noticed(table):
    base, judge = table
    assert judge(base.content.replace(b"number 4", b"number 5"))["changed"] == 1


def test_an_exchanged_caption_is_wrong_although_all_bytes_are_there(table, monkeypatch):
    base, judge = table
    read = mutated_shards.read

    def exchanged(*args, **kwargs):
        (first, second, *rows), *others = read(*args, **kwargs)
        second = second._replace(captions=first.captions)
        return [first, second, *rows], *others

    monkeypatch.setattr(mutated_shards, "read", exchanged)
    assert judge(base.content)["wrong"] == 1


def test_a_sample_that_is_there_but_not_given_is_lost(table, monkeypatch):
    base, judge = table
    content = base.content
    # A reader that stops in the middle of the shard.
    (start, _) = base.spans[7]
    read, check = mutated_shards.read, mutated_shards.check

    def shortened(function):
        def wrapped(path, *args, **kwargs):
            if path.suffix == ".csv":
                path.write_bytes(content[:start])
            return function(path, *args, **kwargs)

        return wrapped

    for function in (read, check):
        monkeypatch.setattr(mutated_shards, function.__name__, shortened(function))
    found = judge(content)
    assert (found["lost"], found["errors"]) == (5, [])


def test_a_process_that_ends_is_a_failure_and_the_next_shard_is_read(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(mutated_shards, "one", _one_that_crashes)
    rows, failures = mutated_shards.run([0, 1], 0, str(tmp_path))
    assert [number for number, *_ in failures] == [0]
    assert rows[-1]["shards"] == 1


def _one_that_crashes(number, seed, folder):
    import os

    if number == 0:
        os._exit(1)
    return "tar", "cut", {"errors": [], **dict.fromkeys(mutated_shards.COLUMNS, 0)}
