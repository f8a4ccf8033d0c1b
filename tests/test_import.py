"""What `import keras_cluster_mask` brings with it."""

import os
import pathlib
import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest

import keras_cluster_mask as kcm
from tests.helpers import options_of, random_pairs, tiny_clip, to_numpy

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(path, code=None, *arguments):
    """Runs a program in a process of its own, and returns what it prints."""
    if code is not None:
        path.write_text(textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, path, *arguments],
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_it_brings_nothing_that_keras_does_not(tmp_path):
    printed = run(
        tmp_path / "program.py",
        """
        import sys
        import keras
        before = {name.partition(".")[0] for name in sys.modules}
        import keras_cluster_mask
        after = {name.partition(".")[0] for name in sys.modules}
        new = after - before - {"keras_cluster_mask"} - set(sys.stdlib_module_names)
        print("new:", sorted(new))
        print("keras_cluster_mask.masking" in sys.modules)
        """,
    )
    assert printed.splitlines()[-2:] == ["new: []", "True"]


def test_training_retrieval_and_plots_need_no_extra(tmp_path, write_pairs):
    program = pathlib.Path(__file__).with_name("without_extras.py")
    printed = run(program, None, write_pairs("a.tar", 0, 16))
    assert printed.split()[-1] == "done"


def test_a_saved_model_loads_in_a_program_that_imports_only_the_package(tmp_path):
    model = kcm.ContrastiveModel.from_backbone(tiny_clip(), kcm.ClusterMasking(4))
    pairs = random_pairs(3)
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "pairs.npz", **pairs)
    printed = run(
        tmp_path / "program.py",
        f"""
        import keras_cluster_mask as kcm
        import keras
        import numpy as np
        model = keras.saving.load_model({str(tmp_path / "model.keras")!r})
        pairs = dict(np.load({str(tmp_path / "pairs.npz")!r}))
        found = model.predict(pairs, verbose=0)
        np.savez({str(tmp_path / "found.npz")!r}, **found)
        print(type(model).__name__, model.duplicates)
        """,
    )
    assert printed.split()[-2:] == [
        type(model).__name__,
        options_of(model)["duplicates"],
    ]
    with np.load(tmp_path / "found.npz") as found:
        for key, value in model(pairs).items():
            np.testing.assert_allclose(found[key], to_numpy(value), atol=1e-6)


def test_a_spawned_worker_that_has_not_imported_keras_imports_it_not_here(tmp_path):
    printed = run(
        tmp_path / "program.py",
        """
        import multiprocessing
        import sys

        def work(queue):
            import keras_cluster_mask
            queue.put("keras" in sys.modules)
            # All public names are there when they are asked for.
            queue.put(keras_cluster_mask.ClusterMasking.__name__)

        if __name__ == "__main__":
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=work, args=(queue,))
            process.start()
            print(queue.get(), queue.get())
            process.join()
        """,
    )
    assert printed.split() == ["False", "ClusterMasking"]


def test_a_program_started_as_a_module_imports_as_any_other(tmp_path):
    package = tmp_path / "project"
    package.mkdir()
    (package / "__init__.py").write_text("import keras_cluster_mask")
    (package / "train.py").write_text("import sys; print('keras' in sys.modules)")
    done = subprocess.run(
        [sys.executable, "-m", "project.train", "keras_cluster_mask/file.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.stdout.split() == ["True"], done.stderr[-3000:]
