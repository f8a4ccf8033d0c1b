"""Folders of a model with its card."""

import keras
import numpy as np
import pytest
from PIL import Image

import keras_cluster_mask as kcm
from tests.helpers import reloaded

pytestmark = pytest.mark.any_backend


@pytest.fixture
def model():
    tokenizer = kcm.data.CLIPTokenizer.train(["a red boat", "a blue car"] * 9, 600, 12)
    backbone = kcm.models.clip_backbone("tiny", 32, tokenizer.vocabulary_size, 12)
    return kcm.ContrastiveModel.from_backbone(
        backbone, kcm.RandomMasking(0.5), tokenizer=tokenizer
    )


def test_the_code_of_a_card_embeds_as_the_model_does(
    model, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "boats"
    kcm.models.save_with_card(model, folder)
    Image.new("RGB", (40, 30), "red").save(folder / "photo.jpg")
    monkeypatch.chdir(folder)
    card = (folder / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0]
    found = {}
    exec(code, found)
    expected = model.encode_image(["photo.jpg"]) @ found["texts"].T
    np.testing.assert_allclose(found["images"] @ found["texts"].T, expected, atol=1e-5)
    assert str(expected[0, 0])[:5] in capsys.readouterr().out


def test_a_card_says_how_a_model_was_trained_and_what_it_finds(model, tmp_path):
    recipe = kcm.small_data_recipe(2, 4, learning_rate=3e-4)
    model.compile(recipe.optimizer)
    images = np.zeros((16, 32, 32, 3), "uint8")
    texts = ["a red boat", "a blue car"] * 8
    pairs = {"images": images, "token_ids": model.tokenizer(texts)}
    model.fit(pairs, batch_size=4, verbose=0)
    recall = kcm.evaluation.evaluate_retrieval(model, pairs, ks=(1, 5), verbose=0)
    kcm.models.save_with_card(model, tmp_path / "boats", "Sixteen boats.", recall)
    card = (tmp_path / "boats" / "README.md").read_text()
    for said in (
        "# boats",
        "32 x 32 pixels",
        "at most 12 tokens",
        "RandomMasking(mask_ratio=0.5)",
        "initial_learning_rate",
        "weight_decay=0.1",
        "4 steps",
        "Sixteen boats.",
        f"keras {keras.__version__}",
    ):
        assert said in card
    chance = f"{recall['chance']['text_to_image_recall@5']:.1%}"
    found = f"{recall['text_to_image_recall@5']:.1%}"
    assert f"| text to image recall@5 | {found} | {chance} |" in card
    # Others get no optimizer, and no masking.
    shared = keras.saving.load_model(tmp_path / "boats" / "model.keras")
    assert not shared.compiled
    assert not shared.maskings


def test_a_card_names_each_of_several_optimizers(model, tmp_path):
    rates = keras.optimizers.OptimizerMap(
        keras.optimizers.AdamW(1e-3), {"vision.*": keras.optimizers.SGD(0.25)}
    )
    model.compile(keras.optimizers.MultiOptimizer(rates))
    kcm.models.save_with_card(model, tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert all(said in card for said in ("AdamW", "SGD", "0.25"))


def test_a_card_is_not_overwritten(model, tmp_path):
    kcm.models.save_with_card(model, tmp_path)
    (tmp_path / "README.md").write_text("edited")
    with pytest.raises(ValueError, match=r"`folder` must have no README.*Received:"):
        kcm.models.save_with_card(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "edited"


def test_a_model_without_a_tokenizer_has_no_card(model, tmp_path):
    model = reloaded(model, tmp_path)
    model.tokenizer = None
    with pytest.raises(ValueError, match=r"`tokenizer` must be given.*Received:"):
        kcm.models.save_with_card(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
