"""The guide to training in stages: that it runs, and how long its recipe is."""

import pathlib

import pytest

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

GUIDE = pathlib.Path(__file__).parents[2] / "guides" / "train_in_stages.py"


def test_it_trains_both_models_and_evaluates_them(run_guide):
    printed = run_guide("train_in_stages.py", EPOCHS="1")
    assert printed.count("image_to_text_recall@10 ") == 2
    # The second stage masks 40 % of the patches, and the model at full size none.
    assert printed.count("mask_ratio: 0.40") == 1


def test_the_recipe_is_ten_lines():
    text = GUIDE.read_text(encoding="utf-8")
    recipe = text[text.index("def train(") : text.index("def schedule(")]
    assert len(recipe.strip().splitlines()) <= 10
