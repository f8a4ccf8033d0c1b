"""The training program: the maskings it names, and a whole run."""

import re
import runpy

import keras
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from tests.helpers import ROOT, run_program

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

TINY = "--model=tiny --image-size=32 --batch-size=32 --epochs=1 --whole-epochs=1"


@pytest.mark.parametrize(
    ("name", "num_kept"),
    [("random", 98), ("cluster", 98), ("threshold", 137), ("embedding", 137)],
)
def test_maskings_are_those_of_the_paper(name, num_kept):
    names = dict(keras=keras, kcm=kcm)
    program = runpy.run_path(str(ROOT / "examples" / "train.py"), init_globals=names)
    masking = program["make_masking"](name)
    assert (masking.mask_ratio, masking.num_kept(196)) == (0.5, num_kept)
    if name != "random":
        assert masking.num_anchors(196) == 6  # 3 % are 5.88.


def test_a_run_trains_evaluates_and_saves(shard, encode, tmp_path):
    tokenizer = tmp_path / "of_captions.json"
    captions = kcm.data.read_captions(shard)
    kcm.data.CLIPTokenizer.train(captions, 600, 16).save(tokenizer)
    for name in ("red", "blue"):
        image = tmp_path / "classes" / name / "1.png"
        image.parent.mkdir(parents=True)
        image.write_bytes(encode(Image.new("RGB", (32, 32), name)))
    printed = run_program(
        "examples/train.py",
        *TINY.split(),
        *("--masking=threshold", "--num-workers=1", f"--classes={tmp_path}/classes"),
        *(f"--train={shard}", f"--validation={shard}", f"--tokenizer={tokenizer}"),
        f"--results={tmp_path}/results",
    )
    measured = re.findall(r"^val_(\S+) +[01]\.\d+$", printed, re.MULTILINE)
    assert len(measured) == 6 + 2
    assert "zero_shot_top_1" in measured
    found = {path.name for path in (tmp_path / "results").iterdir()}
    assert found == {"main", "whole", "model.keras"}
