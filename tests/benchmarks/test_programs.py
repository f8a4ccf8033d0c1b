"""Masking cost, data pipeline and weight parity, at the smallest size."""

import json

import data_pipeline
import keras
import masking_cost
import pytest

import keras_cluster_mask as kcm

pytestmark = [pytest.mark.slow, pytest.mark.any_backend]


def test_masking_cost_times_every_masking(run, tmp_path):
    # On TensorFlow `--teacher` fails, as XLA cannot resize images on a CPU there.
    options = ("--batch-size", 2, "--image-size", 64, "--rounds", 2, "--no-step")
    run(masking_cost, *options, "--teacher", "--results", tmp_path)
    backend = keras.backend.backend()
    written = json.loads((tmp_path / f"masking_cost-{backend}-64.json").read_text())
    found = {row["what"]: float(row["time (ms)"]) for row in written["rows"]}
    teacher = {"attentive", "attentive, half size"}
    teacher |= {f"{name}: update" for name in teacher}
    assert set(found) == {*masking_cost.MASKINGS, *teacher}
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


def test_embeddings_and_weights_are_open_clips(run, tmp_path):
    pytest.importorskip("open_clip")
    import weight_parity

    options = ("--models", "ViT-S-32-alt", "--batch-size", 2, "--results", tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(weight_parity, *options)
    assert not ended.value.code
    (path,) = tmp_path.glob("weight_parity-*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["changed on the way to Keras and back"] == 0
    assert 0 < float(row["images: largest difference"]) < weight_parity.LIMIT


def test_onnx_embeds_as_keras_does_and_int8_almost(run, tmp_path, write_pairs):
    import onnx_int8

    write_pairs("validation-0.tar", 0, 20)
    captions = [str(i) for i in range(20)]
    tokenizer = kcm.data.CLIPTokenizer.train(captions, 600, context_length=8)
    backbone = kcm.models.clip_backbone("tiny", 24, tokenizer.vocabulary_size, 8)
    model = kcm.ContrastiveModel.from_backbone(backbone, tokenizer=tokenizer)
    model.save(tmp_path / "model.keras")
    options = ("--data", tmp_path, "--caption-key", "txt", "--rounds", 1)
    run(onnx_int8, tmp_path / "model.keras", *options, "--results", tmp_path)
    rows = json.loads((tmp_path / "onnx_int8.json").read_text())["rows"]
    for side in ("image", "text"):
        of_keras, single, small = (float(row[f"{side}, difference"]) for row in rows)
        assert of_keras == 0
        assert single < 1e-5 < small < 0.2
        assert rows[1][f"{side}, MB"] > rows[2][f"{side}, MB"]
