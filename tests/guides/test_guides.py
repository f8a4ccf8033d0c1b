"""The guides: their form, and that each runs, with little training, to its results."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.any_backend
slow = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
GUIDES = sorted({*ROOT.glob("guides/*.py")} - {ROOT / "guides" / "render.py"})
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in GUIDES}


@pytest.fixture(params=TEXTS)
def guide(request):
    return TEXTS[request.param]


def test_it_is_a_notebook_that_begins_with_a_title(guide):
    assert re.match(r"# %% \[markdown\]\n# # [A-Z]", guide)
    cells = re.split(r"^# %%.*\n", guide, flags=re.MULTILINE)[1:]
    assert len(cells) >= 6


def test_it_is_short(guide):
    assert len(guide.splitlines()) < 200


def test_its_links_to_files_lead_somewhere(guide):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", guide)
    assert all((ROOT / "guides" / link).exists() for link in links)


def test_ci_renders_it(guide):
    name = next(name for name, text in TEXTS.items() if text == guide)
    assert name.removesuffix(".py") in (ROOT / ".ci" / "run").read_text()


def plots(folder):
    """The plots in a folder that are more than an empty page."""
    return {x.stem for x in folder.glob("*.png") if x.stat().st_size > 5_000}


@slow
def test_pre_training_reports_recall_and_saves_the_model(pretrained):
    folder, printed = pretrained
    assert len(re.findall(r"recall@\d+ +[\d.]+%   chance", printed)) == 6
    assert {"masks", "training", "search"} <= plots(folder)
    assert (folder / "model.keras").exists()


@slow
def test_evaluation_reports_all_metrics(pretrained, run_guide):
    pytest.importorskip("faiss")
    folder, _ = pretrained
    printed = run_guide("evaluate_zero_shot.py", folder)
    for line in ("image_to_text_recall@1 ", "top_1 ", "mean_per_class ", "val_text"):
        assert line in printed
    assert {"confusion", "similar"} <= plots(folder)


@slow
def test_fine_tuning_reports_recall_before_and_after(pretrained, run_guide):
    folder, _ = pretrained
    printed = run_guide("fine_tune_clip.py", folder)
    for name in ("before", "after, no masking", "after, random half"):
        assert re.search(rf"^{name} +[\d.]+% +[\d.]+%", printed, re.MULTILINE)
    assert {"archive", "fine_tuned"} <= plots(folder)
    assert (folder / "fine_tuned").is_dir()


@slow
def test_the_comparison_of_maskings_covers_each(run_guide, tmp_path):
    printed = run_guide("compare_maskings.py", tmp_path)
    for name in ("none", "random", "cluster"):
        assert re.search(rf"^{name} +\d+ +[\d.]+% +[\d.]+%", printed, re.MULTILINE)
    assert {"compared_masks", "cluster_statistics", "compared_recall"} <= plots(
        tmp_path
    )


@slow
def test_the_masking_of_ones_own_leaves_out_blank_patches_first(run_guide, tmp_path):
    printed = run_guide("write_your_own_masking.py", tmp_path)
    shares = re.findall(r"^(\w+Masking) +([\d.]+)% of the kept", printed, re.MULTILINE)
    shares = {name: float(share) for name, share in shares}
    assert shares["ContentMasking"] > shares["RandomMasking"] + 10
    assert "ContentMasking {'mask_ratio': 0.5, 'contrast': 0.2}" in printed
    assert "largest difference of an embedding: 0.0e+00" in printed
    assert {"own_masks", "own_statistics"} <= plots(tmp_path)


@slow
def test_the_classifier_and_the_autoencoder_train(run_guide, tmp_path):
    printed = run_guide("masking_in_a_vit_and_an_mae.py", tmp_path)
    accuracies = re.findall(r"test accuracy ([\d.]+)%", printed)
    assert len(accuracies) == 3
    assert "mae" in plots(tmp_path)


@slow
def test_training_in_stages_trains_both_models_and_evaluates_them(run_guide, tmp_path):
    printed = run_guide("train_in_stages.py", tmp_path)
    assert len(re.findall(r"image_to_text +[\d.]+ % @10", printed)) == 2
    # The second stage masks 40 % of the patches, and the model at full size none.
    assert printed.count("mask ratio 0.4") == 1
    assert printed.count("mask ratio 0.0") == 2
    assert "stages" in plots(tmp_path)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders")
def test_two_encoders_are_tuned_in_both_ways(run_guide, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGE_SIZE", "84")
    printed = run_guide("connect_two_encoders.py", tmp_path)
    assert "120 images, 120 captions" in printed
    for name in ("projections", "whole images", "random half"):
        # Of 46, chance finds 22 %.
        line = re.search(rf"^{name} +([\d.]+)% +([\d.]+)%", printed, re.MULTILINE)
        assert min(map(float, line.groups())) > 35
    assert "own_photographs" in plots(tmp_path)
    assert (tmp_path / "connected.keras").exists()


def test_the_recipe_of_stages_is_ten_lines():
    text = TEXTS["train_in_stages.py"]
    recipe = text[text.index("def train(") : text.index("# ## Compare with")]
    assert len(recipe.partition("# %%")[0].strip().splitlines()) <= 10
