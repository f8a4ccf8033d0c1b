import os
import subprocess
import sys

import pytest


@pytest.mark.any_backend
def test_triton_is_imported_before_tensorflow(tmp_path):
    # The other way around, the real one ends the program.
    stand_in = "import sys; print('tensorflow' in sys.modules, end='')"
    (tmp_path / "triton.py").write_text(stand_in)
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    module = "keras_cluster_mask.distribution.tensorflow_import"
    done = subprocess.run(
        [sys.executable, "-c", f"import {module} as first; first.import_keras_hub()"],
        env={**os.environ, "KERAS_BACKEND": "jax", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "False"
