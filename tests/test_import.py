"""What `import keras_cluster_mask` brings with it."""

import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import assert_close, options_of, random_pairs, run_program, tiny_clip

pytestmark = [pytest.mark.any_backend, pytest.mark.slow]


def test_it_brings_nothing_that_keras_does_not():
    printed = run_program("tests/programs/new_modules.py")
    assert printed.splitlines()[-2:] == ["keras_cluster_mask", "True"]


def test_a_saved_model_loads_in_a_program_that_imports_only_the_package(tmp_path):
    model = kcm.ContrastiveModel.from_backbone(
        tiny_clip(), masking=kcm.ClusterMasking(patch_size=4)
    )
    pairs = random_pairs(3)
    files = [tmp_path / name for name in ("model.keras", "pairs.npz", "found.npz")]
    model.save(files[0])
    np.savez(files[1], **pairs)
    printed = run_program("tests/programs/predict.py", *files)
    assert printed.split()[-1] == options_of(model)["duplicates"]
    assert_close(dict(np.load(files[2])), model(pairs))


def test_a_worker_imports_keras_when_a_name_needs_it(monkeypatch):
    monkeypatch.setenv("KERAS_CLUSTER_MASK_WORKER", "1")
    names = "'keras' in sys.modules, kcm.ClusterMasking.__name__"
    program = f"import sys, keras_cluster_mask as kcm; print({names})"
    assert run_program("-c", program).split() == ["False", "ClusterMasking"]
