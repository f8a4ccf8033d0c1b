"""The recipe for CC12M: its presets, the costs its text states, and that it runs."""

import re
import sys

import pytest

import keras_cluster_mask as kcm
from tests.helpers import ROOT, run_program

sys.path.insert(0, str(ROOT / "benchmarks"))

import pretrain_on_cc12m as recipe
from flops import training_flops

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]

TEXT = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
TEXT = TEXT.partition("\n## pretrain_on_cc12m.py\n")[2]
TINY = """--model=tiny --image-size=32 --patch-size=8 --context-length=16 --pairs=64
    --batch-size=32 --epochs=2 --saves=1 --warmup-steps=2"""


def test_defaults_are_the_papers():
    args = recipe.parse([])
    assert args.pairs == 10_968_539
    assert args.batch_size == 2048
    assert args.epochs == 32
    assert args.steps == 32 * (10_968_539 // 2048)
    assert args.learning_rate == 5e-4
    assert args.warmup_steps == 2000
    assert args.weight_decay == 0.2
    assert args.model == "vit_b_16"
    assert (args.image_size, args.patch_size) == (224, 16)
    # The authors' published command has a beta of 0.3.
    assert recipe.make_masking(args).min_mask_ratio == 0.3


def test_presets_are_the_papers():
    args = {name: recipe.parse(["--preset", name]) for name in recipe.PRESETS}
    made = {name: recipe.make_masking(args[name]) for name in recipe.PRESETS}
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
    weight, steps = made["embedding"].embedding_weight, args["embedding"].steps
    found = [float(weight(step)) for step in (0, steps // 2, steps)]
    assert found == pytest.approx([0.0, 0.5, 1.0], abs=1e-5)


def test_costs_in_the_text_are_those_of_the_presets():
    rows = tuple(f"| {name} |" for name in recipe.PRESETS)
    written = [x for x in TEXT.splitlines() if x.startswith(rows)]
    expected = []
    for name in recipe.PRESETS:
        args = recipe.parse(["--preset", name])
        masking = recipe.make_masking(args)
        flops = training_flops("vit_b_16", 224, 77, 16, masking)
        total = flops * 2048 * args.steps
        kept = 196 if masking is None else masking.num_kept(196)
        cells = [name, kept, f"{flops / 1e9:.1f}", f"{args.steps:,}"]
        cells.append(f"{total:.2e}")
        expected.append(f"| {' | '.join(map(str, cells))} |")
    assert written == expected


def test_flags_in_the_text_exist():
    command = re.search(r"python examples/pretrain_on_cc12m.py (.*?)```", TEXT, re.S)
    flags = command[1].replace("\\\n", " ").replace('"', "").split()
    args = recipe.parse(flags)
    assert (args.preset, args.dtype, args.steps) == ("budget", "float32", 100)
    known = {*vars(args)}
    mentioned = re.findall(r"`--([a-z][a-z-]+)`", TEXT)
    assert len(mentioned) >= 6
    assert {name.replace("-", "_") for name in mentioned} <= known


def test_a_warm_up_longer_than_the_run_is_refused(capsys):
    with pytest.raises(SystemExit):
        recipe.parse(["--pairs=2048", "--epochs=3", "--saves=1"])
    assert "less than the 3 steps" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "num_workers"), [("rgb_0.3", 0), ("budget", 1)])
def test_it_runs_in_a_tiny_setting(preset, num_workers, shard, tmp_path):
    tokenizer = tmp_path / "tokenizer.json"
    captions = kcm.data.read_captions(shard)
    kcm.data.CLIPTokenizer.train(captions, 600).save(tokenizer)
    results = tmp_path / "results"
    flags = (
        f"{TINY} --num-workers={num_workers} --preset={preset} --train={shard} "
        f"--held-out={shard} --tokenizer={tokenizer} --results={results}"
    )
    printed = run_program("examples/pretrain_on_cc12m.py", *flags.split())
    ratios = [float(x) for x in re.findall(r"mask_ratio: ([\d.]+)", printed)]
    # The ratio of a budget is constant.
    assert ratios[-1:] == ([] if preset == "budget" else [pytest.approx(0.5, abs=0.05)])
    assert len(re.findall(r"recall@\d+ +[\d.]+%", printed)) == 6
    found = {path.name for path in results.iterdir()}
    assert found == {"checkpoints", "model.keras", "tokenizer.json", "training.png"}
