"""Masking cost and data pipeline, at the smallest size."""

import json

import data_pipeline
import keras
import masking_cost
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.any_backend]


def test_masking_cost_times_every_masking(run, tmp_path):
    options = ("--batch-size", 2, "--image-size", 64, "--rounds", 2, "--no-step")
    run(masking_cost, *options, "--results", tmp_path)
    backend = keras.backend.backend()
    written = json.loads((tmp_path / f"masking_cost-{backend}-64.json").read_text())
    found = {row["what"]: float(row["time (ms)"]) for row in written["rows"]}
    assert set(found) == {*masking_cost.MASKINGS}
    assert all(milliseconds > 0 for milliseconds in found.values())


@pytest.mark.parametrize("row", [data_pipeline.LIMIT, data_pipeline.ONE])
def test_a_pipeline_reads_what_it_counts(row, run, tmp_path, capsys):
    from made_shards import write_shards

    data = write_shards(tmp_path, samples=32, short_side=32, per_shard=16)
    options = ("--data", data, "--samples", 32, "--image-size", 16)
    options += ("--batch-size", 8, "--epochs", 1, "--row", row)
    run(data_pipeline, *options)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["images/s"] > 0
    assert found[data_pipeline.PARENT] > 0
    assert (found[data_pipeline.PSS] > 0) == (row != data_pipeline.LIMIT)


def test_speed_of_other_machines_follows_from_the_time_of_processors():
    measured = {data_pipeline.PARENT: 0.1, data_pipeline.CHILDREN: 0.9}
    row = data_pipeline.derive(measured, cores=4, processes=1)
    assert (row["images/s"], row["limited by"]) == (4000, "cores")
    row = data_pipeline.derive(measured, cores=16, processes=1)
    assert (row["images/s"], row["limited by"]) == (10_000, "parents")
