"""Small differences between the backends, each behind one function."""

import contextlib
import functools
import os
import sys
from collections.abc import Iterator

import keras
import numpy as np
from keras import ops

# What ONNX is written with. For most towers, jax2onnx 0.17 fails, or writes a file that
# does not run.
ONNX_PACKAGES = {"tensorflow": "tf2onnx", "torch": "onnxscript"}


@functools.cache
def print_backend() -> None:
    """Prints the backend, once in a process: Keras may have chosen it."""
    print(f"Keras backend: {keras.backend.backend()}", flush=True)


# === Operations ===


def in_full_precision(function):
    """Decorates a function to compute float32 matrix products in full precision.

    By default JAX computes them in bfloat16 on TPUs and in TF32 on GPUs. That is too
    imprecise for similarities that are scaled by up to 100, or that decide which of two
    patches is kept. The gradients of the products use the same precision. torch uses
    full precision by default. TensorFlow has a single setting for the whole program,
    which the user must change:
    `tf.config.experimental.enable_tensor_float_32_execution(False)` for GPUs.
    """
    if keras.backend.backend() != "jax":
        return function
    import jax

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.default_matmul_precision("highest"):
            return function(*args, **kwargs)

    return wrapped


def is_traced(value) -> bool:
    """Returns whether a variable, tensor or array is symbolic, as in a traced step."""
    if isinstance(value, keras.KerasTensor):
        return True
    value = getattr(value, "value", value)
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        return isinstance(value, jax.core.Tracer)
    if backend == "tensorflow":
        import tensorflow as tf

        return tf.inside_function()
    import torch

    if torch.compiler.is_compiling():
        return True
    if not isinstance(value, torch.Tensor):
        return False
    try:
        # In a transform of `torch.func` a tensor has no memory.
        value.data_ptr()
    except RuntimeError:
        return True
    return value.is_meta


def compiles_steps() -> bool:
    """Returns whether a step is compiled for each shape of a batch: not on torch."""
    return keras.backend.backend() != "torch"


def steps_are_stateless() -> bool:
    """Returns whether a step takes and returns the values of all weights: on JAX.

    Keras then compares the numbers of weights of the model and of its optimizer.
    """
    return keras.backend.backend() == "jax"


def fixes_shapes() -> bool:
    """Returns whether Keras takes the shapes of all batches of a generator from two.

    On TensorFlow, the first two batches must show which sizes differ. Only a
    `tf.data.Dataset` can have free sizes.
    """
    return keras.backend.backend() == "tensorflow"


def needs_xla(data_format: str | None) -> bool:
    """Returns whether only XLA convolves images of a data format on every CPU.

    Without XLA, TensorFlow convolves channels-first images only in oneDNN, which it
    does not use on all CPUs, nor for float16.
    """
    return keras.backend.backend() == "tensorflow" and data_format == "channels_first"


# === Exported models ===


def exports_by_torch() -> bool:
    """Returns whether torch exports models.

    It exports for the size of one batch, unless it is told which sizes may vary.
    """
    return keras.backend.backend() == "torch"


def exports_one_length() -> bool:
    """Returns whether a text encoder is exported for one length of texts: on JAX.

    There, keras_hub compares the length with the position embeddings.
    """
    return keras.backend.backend() == "jax"


def onnx_package() -> str:
    """Returns the name of the package that writes ONNX."""
    backend = keras.backend.backend()
    if backend not in ONNX_PACKAGES:
        raise ValueError(
            "`format='onnx'` needs the backend torch or TensorFlow. Save the model as "
            "a `.keras` file, load it with `KERAS_BACKEND=torch`, and export it there. "
            f"Received: format='onnx' with the backend {backend}"
        )
    return ONNX_PACKAGES[backend]


# === State of a program ===


def read_rng_state() -> dict[str, np.ndarray]:
    """Returns the state of the generators that layers without a seed draw from."""
    if keras.backend.backend() != "torch":
        return {}
    import torch

    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"generators/{name}": value.numpy() for name, value in state.items()}


def write_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restores the arrays of `read_rng_state`."""
    for name, value in state.items():
        import torch

        write = {"torch": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
        write[name.removeprefix("generators/")](torch.from_numpy(value.copy()))


def start_values(model: keras.Model) -> list[tuple]:
    """Returns the variables of a model and their values before Keras removes them.

    On JAX, Keras removes the values of variables while it trains or evaluates. If the
    first step fails, it does not restore them, and the variables would get new random
    values.

    Args:
        model: A built `keras.Model`.
    """
    if keras.backend.backend() != "jax":
        return []
    variables = [*model.variables, *model.metrics_variables]
    if (optimizer := getattr(model, "optimizer", None)) is not None:
        variables += optimizer.variables
    return [(variable, variable.value) for variable in variables]


def put_back(values: list[tuple]) -> None:
    """Restores the values of `start_values`."""
    for variable, value in values:
        # A step that started to run may have reused the memory of its inputs.
        if not value.is_deleted():
            variable.assign(value)


@contextlib.contextmanager
def keeping_weights(model: keras.Model) -> Iterator[None]:
    """A context in which a model keeps its weights if its evaluation fails.

    Keras's `fit` restores the values of the last step that ended, and needs
    `start_values` only for its first step. Its `evaluate` and `predict` restore none.
    """
    values = start_values(model)
    try:
        yield
    except BaseException as error:
        if keras.backend.backend() == "jax":
            model.jax_state_sync()
        put_back(values)
        if type(error).__name__ == "IndivisibleError":
            raise ValueError(
                "Every batch, including the last one, must be divisible by the number "
                "of devices: pass another `batch_size`, or another number of pairs. "
                f"Received: {error}"
            ) from error
        raise


def copy_values(variables) -> None:
    """Copies the values of variables, so that no other variable shares their memory.

    On JAX, prediction and training overwrite weights in-place. After averages were
    assigned to weights, these may be the same arrays as the averages.
    """
    for variable in variables:
        variable.assign(ops.copy(variable))


# === Imports ===


def import_triton_first():
    """Imports triton, if it is installed, before TensorFlow is imported.

    TensorFlow 2.20 and 2.21 crash a program that imports triton after them, as
    torchvision does (github.com/tensorflow/tensorflow/issues/124205).
    """
    if "tensorflow" not in sys.modules:
        # A broken triton must not affect programs that do not use it.
        with contextlib.suppress(Exception):
            import triton  # noqa: F401


def import_keras_hub():
    """Returns the package keras_hub, which imports TensorFlow on every backend."""
    import_triton_first()
    import keras_hub

    return keras_hub


def preset_of(preset):
    """Returns a preset for keras_hub: the full path of a folder, or a name.

    For a name alone, keras_hub would prefer its own preset to the folder.
    """
    preset = str(preset)
    folder = os.path.abspath(os.path.expanduser(preset))
    if os.path.isfile(os.path.join(folder, "config.json")):
        return folder
    if "://" not in preset and os.path.basename(preset) != preset:
        raise ValueError(
            f"There is no preset in {folder}. A preset must be the path of a folder "
            "with a config.json, a name such as 'clip_vit_base_patch16', or an address "
            f"such as 'hf://USER/NAME'. Received: {preset!r}"
        )
    return preset
