import itertools
import json

import pytest

from keras_cluster_mask.data.preparation import check, report
from keras_cluster_mask.data.preparation import survey as module
from keras_cluster_mask.data.preparation.samples import Samples
from keras_cluster_mask.data.preparation.survey import survey


@pytest.fixture(autouse=True)
def short_lines(monkeypatch):
    monkeypatch.setattr(module, "LINE", 4)


@pytest.fixture
def shards(write_pairs, noise):
    broken = [("cut.png", noise(0)[:200]), ("cut.txt", b"cut"), ("none.txt", b"none")]
    return [write_pairs("a.tar", 0, 9, broken), write_pairs("b.tar", 20, 8)]


def looked(shards, resume, seen):
    def look(pair):
        seen.append(pair.key)
        return {"captions": list(pair.captions)}

    return survey("test", Samples(shards), look, {}, resume, 1, False)


@pytest.mark.parametrize("stop", [1, 6, 12, 18])
def test_a_stopped_survey_goes_on_where_it_was(shards, tmp_path, stop):
    resume = tmp_path / "found.jsonl"
    whole = list(looked(shards, None, []))
    stopped = looked(shards, resume, [])
    assert list(itertools.islice(stopped, stop)) == whole[:stop]
    stopped.close()
    seen = []
    assert list(looked(shards, resume, seen)) == whole
    # The whole lines of four were not looked at again.
    assert len(seen) == sum(
        "reason" not in each for each in whole[(stop - 1) // 4 * 4 :]
    )
    seen.clear()
    assert list(looked(shards, resume, seen)) == whole
    assert seen == []


def test_a_line_that_was_cut_off_is_looked_at_again(shards, tmp_path):
    resume = tmp_path / "found.jsonl"
    whole = list(looked(shards, resume, []))
    content = resume.read_bytes()
    for length in (len(content) - 1, len(content) - 50):
        resume.write_bytes(content[:length])
        assert list(looked(shards, resume, [])) == whole
        assert resume.read_bytes() == content


def test_commands_keep_what_they_found(shards, tmp_path):
    assert check(shards, resume=tmp_path / "check") == check(shards)
    assert check(shards, resume=tmp_path / "check") == check(shards)
    assert report(shards, resume=tmp_path / "report") == report(shards)
    lines = (tmp_path / "check").read_text().splitlines()
    found = [each for line in lines[1:] for each in json.loads(line)["findings"]]
    assert len(found) == 19


def test_findings_on_something_else_are_refused(shards, tmp_path):
    resume = tmp_path / "found"
    check(shards, resume=resume)
    with pytest.raises(ValueError, match=r"`resume` .*sources differ.* Received: "):
        check(shards[:1], resume=resume)
    with pytest.raises(ValueError, match=r"`resume` .*command"):
        report(shards, resume=resume)
    with pytest.raises(ValueError, match=r"`resume` .*caption_key"):
        check(shards, caption_key="txt", resume=resume)
    (tmp_path / "other").write_text("a letter\n")
    with pytest.raises(ValueError, match=r"`resume` "):
        check(shards, resume=tmp_path / "other")
    assert (tmp_path / "other").read_text() == "a letter\n"
