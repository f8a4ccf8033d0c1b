"""The tables of `docs/which_masking.md` name all maskings, by code that runs."""

import pathlib
import re

import keras
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data import TextMasking

pytestmark = pytest.mark.any_backend

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "which_masking.md").read_text(encoding="utf-8")
# The second cell of a row: the code that makes a masking.
CELLS = re.findall(r"^\|[^|]*\| `(kcm\.[^`]*)` \|", PAGE, re.MULTILINE)


@pytest.fixture(scope="module")
def scope():
    """What the code of the tables needs."""
    backbone = kcm.models.clip_backbone("tiny", image_size=32, context_length=16)
    return {
        "kcm": kcm,
        "backbone": backbone,
        "captions": ["a dog runs in the snow", "a red boat on the lake"],
        "schedule": keras.optimizers.schedules.PolynomialDecay(0.0, 100_000, 1.0),
    }


@pytest.mark.parametrize("code", CELLS)
def test_code_of_the_tables_makes_a_masking_tokenizer_or_model(code, scope):
    if "from_open_clip" in code:
        pytest.importorskip("open_clip")
    made = eval(code, scope)
    maskings = kcm.PatchMasking | TextMasking
    assert isinstance(made, maskings | kcm.data.CLIPTokenizer | keras.Model)


def test_every_masking_is_in_a_table():
    made = {re.match(r"kcm\.(?:data\.)?(\w+)", code)[1] for code in CELLS}
    for module, base in ((kcm.masking, kcm.PatchMasking), (kcm.data, TextMasking)):
        classes = [getattr(module, name) for name in module.__all__]
        names = {
            each.__name__
            for each in classes
            if isinstance(each, type) and issubclass(each, base) and each is not base
        }
        assert len(names) >= 3
        assert names <= made
