"""The guides: their form, and that each runs, with little training, to its results."""

import pathlib
import re

import pytest

pytestmark = pytest.mark.any_backend
slow = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]
GUIDES = sorted({*ROOT.glob("guides/*.py")} - {ROOT / "guides" / "render.py"})


@pytest.fixture(params=GUIDES, ids=lambda path: path.stem)
def guide(request):
    return request.param.read_text(encoding="utf-8")


def test_it_is_a_notebook_that_begins_with_a_title(guide):
    assert re.match(r"# %% \[markdown\]\n# # [A-Z]", guide)
    cells = re.split(r"^# %%.*\n", guide, flags=re.MULTILINE)[1:]
    assert len(cells) >= 6


def test_it_is_short(guide):
    assert len(guide.splitlines()) < 200


def test_its_links_to_files_lead_somewhere(guide):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", guide)
    assert all((ROOT / "guides" / link).exists() for link in links)


def test_ci_renders_each():
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(f" {path.stem}\n" in steps for path in GUIDES)


def plots(folder):
    """The plots in a folder that are more than an empty page."""
    return {x.stem for x in folder.glob("*.png") if x.stat().st_size > 5_000}


def has_shares(printed, name, unit=""):
    """Whether there is a line of this name with two percentages."""
    pattern = rf"^{name} +{unit}[\d.]+% +[\d.]+%"
    return re.search(pattern, printed, re.MULTILINE) is not None


@slow
def test_a_model_is_pre_trained_evaluated_and_fine_tuned(run_guides, tmp_path):
    pytest.importorskip("faiss")
    pretrained, evaluated, tuned = run_guides(
        "pretrain_clip", "evaluate_zero_shot", "fine_tune_clip"
    )
    assert len(re.findall(r"recall@\d+ +[\d.]+%   chance", pretrained)) == 6
    assert (tmp_path / "model.keras").exists()
    for line in ("image_to_text_recall@1 ", "top_1 ", "mean_per_class ", "val_text"):
        assert line in evaluated
    for name in ("before", "after, no masking", "after, random masking"):
        assert has_shares(tuned, name)
    assert (tmp_path / "fine_tuned").is_dir()
    shown = {"masks", "training", "search", "confusion", "similar"}
    assert shown | {"archive", "fine_tuned"} <= plots(tmp_path)


@slow
def test_other_guides_print_what_they_measure(run_guides, tmp_path):
    compared, own, classified, staged = run_guides(
        *("compare_maskings", "write_your_own_masking"),
        *("masking_in_a_vit_and_an_mae", "train_in_stages"),
    )
    for name in ("none", "random", "cluster"):
        assert has_shares(compared, name, r"\d+ +")
    # A masking of one's own leaves out blank patches first.
    shares = re.findall(r"^(\w+Masking) +([\d.]+)% of the kept", own, re.MULTILINE)
    shares = {name: float(share) for name, share in shares}
    assert shares["ContentMasking"] > shares["RandomMasking"] + 10
    assert "ContentMasking {'mask_ratio': 0.5, 'contrast': 0.2}" in own
    assert "largest difference of an embedding: 0.0e+00" in own
    assert len(re.findall(r"test accuracy ([\d.]+)%", classified)) == 3
    assert len(re.findall(r"image_to_text +[\d.]+ % @10", staged)) == 2
    # The second stage masks 40 % of the patches, and in its last epoch none.
    assert staged.count("mask ratios [0.4, 0.0]") == 1
    assert staged.count("mask ratios [0.0]") == 2
    shown = {"compared_masks", "kept_positions", "compared_recall"}
    shown |= {"own_masks", "stages", "mae"}
    assert shown <= plots(tmp_path)


@slow
def test_two_devices_train_as_one(run_guides):
    (printed,) = run_guides("train_on_eight_gpus")
    difference = re.search(r"largest difference of a loss: (\S+)", printed)[1]
    assert float(difference) < 1e-3
    assert "the same history: True" in printed


@slow
def test_records_are_read_by_tf_data(run_guides, tmp_path):
    pytest.importorskip("tensorflow_text")
    (printed,) = run_guides("train_from_tf_data")
    assert "0 of 192 captions have other token ids" in printed
    assert re.search(r"\b3/3 - .*loss: [\d.]+", printed)
    # The model that is evaluated was saved with its tokenizer.
    assert len(re.findall(r"recall@\d+ +[\d.]+%   chance", printed)) == 6
    assert (tmp_path / "tf_data.keras").exists()
    for pipeline in ("image_text_dataset", "tf.data"):
        assert re.search(rf"^{re.escape(pipeline)} +[1-9]\d*$", printed, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.usefixtures("encoders")
def test_two_encoders_are_tuned_in_both_ways(run_guides, tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGE_SIZE", "84")
    (printed,) = run_guides("connect_two_encoders")
    assert printed.count("Features: 120 photographs, ") == 3
    for name in ("projections", "whole images", "random masking"):
        # Of 46, chance finds 22 %.
        line = re.search(rf"^{name} +([\d.]+)% +([\d.]+)%", printed, re.MULTILINE)
        assert min(map(float, line.groups())) > 35
    assert "own_photographs" in plots(tmp_path)
    assert (tmp_path / "connected.keras").exists()


def test_the_recipe_of_stages_is_ten_lines():
    text = (ROOT / "guides" / "train_in_stages.py").read_text(encoding="utf-8")
    recipe = text[text.index("def train(") : text.index("# ## Compare with")]
    assert len(recipe.partition("# %%")[0].strip().splitlines()) <= 10
