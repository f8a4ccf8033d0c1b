"""The guide for CC12M: its presets, the costs it states, and that it runs."""

import pathlib
import re
import sys

import pytest

import keras_cluster_mask as kcm

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "benchmarks"))

from flops import training_flops

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

GUIDE = pathlib.Path(__file__).parents[2] / "guides" / "pretrain_on_cc12m.py"
TEXT = GUIDE.read_text(encoding="utf-8")
TINY = dict(
    MODEL="tiny",
    IMAGE_SIZE="32",
    PATCH_SIZE="8",
    CONTEXT_LENGTH="16",
    PAIRS="64",
    BATCH_SIZE="32",
    EPOCHS="2",
    WARMUP_STEPS="2",
)


@pytest.fixture
def guide(monkeypatch):
    """What the guide defines before it reads data, with its defaults."""
    for name in re.findall(r'setting\("(\w+)"', TEXT):
        monkeypatch.delenv(name, raising=False)
    names = {}
    exec(TEXT[: TEXT.index('"""\n## Data')], names)
    return names


def test_defaults_are_the_papers(guide):
    assert guide["PAIRS"] == 10_968_539
    assert guide["BATCH_SIZE"] == 2048
    assert guide["EPOCHS"] == 32
    assert guide["STEPS"] == 32 * (10_968_539 // 2048)
    assert guide["LEARNING_RATE"] == 5e-4
    assert guide["WARMUP_STEPS"] == 2000
    assert guide["WEIGHT_DECAY"] == 0.2
    assert guide["MODEL"] == "vit_b_16"
    assert (guide["IMAGE_SIZE"], guide["PATCH_SIZE"]) == (224, 16)


def test_presets_are_the_papers(guide):
    made = {name: make() for name, make in guide["PRESETS"].items()}
    kept = {name: x.num_kept(196) for name, x in made.items() if x is not None}
    assert kept == {
        "rgb_0.5": 98,
        "rgb_0.3": 137,
        "embedding": 137,
        "budget": 98,
        "flip": 98,
    }
    assert made["none"] is None
    assert isinstance(made["flip"], kcm.RandomMasking)
    clusters = [x for x in made.values() if isinstance(x, kcm.ClusterMasking)]
    assert len(clusters) == 4
    for masking in clusters:
        # 3 % of 196 patches are 5.88.
        assert (masking.mask_ratio, masking.num_anchors(196)) == (0.5, 6)
    assert made["budget"].min_mask_ratio is None
    for name in ("rgb_0.5", "rgb_0.3", "budget"):
        assert made[name].embedding_weight == 0.0
    weight = made["embedding"].embedding_weight
    steps = guide["STEPS"]
    found = [float(weight(step)) for step in (0, steps // 2, steps)]
    assert found == pytest.approx([0.0, 0.5, 1.0], abs=1e-5)


def test_costs_in_the_text_are_those_of_the_presets(guide):
    written = [x for x in TEXT.splitlines() if x.startswith("| ")][2:]
    expected = []
    for name, make in guide["PRESETS"].items():
        masking = make()
        flops = training_flops("vit_b_16", 224, 77, 16, masking)
        total = flops * 2048 * guide["STEPS"]
        hours = [f"{total / 0.4 / peak / 3600:.1f}" for peak in (312e12, 989e12)]
        kept = 196 if masking is None else masking.num_kept(196)
        cells = [name, kept, f"{flops / 1e9:.1f}", f"{guide['STEPS']:,}"]
        cells += [f"{total:.2e}", *hours]
        expected.append(f"| {' | '.join(map(str, cells))} |")
    assert written == expected


@pytest.mark.parametrize(
    ("preset", "num_workers"), [("budget", 0), ("rgb_0.3", 0), ("budget", 1)]
)
def test_it_runs_in_a_tiny_setting(preset, num_workers, shard, run_guide, tmp_path):
    captions = kcm.data.read_captions(shard)
    kcm.data.CLIPTokenizer.train(captions, 600).save(tmp_path / "tokenizer.json")
    program = GUIDE
    if num_workers:
        program = tmp_path / "program.py"
        code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
        program.write_text(code.replace(f"guides/{GUIDE.name}", str(GUIDE)))
    printed = run_guide(
        program,
        **TINY,
        NUM_WORKERS=str(num_workers),
        PRESET=preset,
        TRAIN=str(shard),
        HELD_OUT=str(shard),
        TOKENIZER=str(tmp_path / "tokenizer.json"),
    )
    ratio = float(re.findall(r"mask_ratio: ([\d.]+)", printed)[-1])
    assert ratio == pytest.approx(0.5, abs=0.0 if preset == "budget" else 0.05)
    assert len(re.findall(r"recall@\d+ +[\d.]+%", printed)) == 6
    found = {path.name for path in (tmp_path / "results").iterdir()}
    assert found == {"checkpoints", "model.keras", "tokenizer.json", "training.png"}
