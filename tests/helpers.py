"""Minuscule models and data, and the one thing each backend does its own way."""

import gc
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops
from packaging.version import Version

import keras_cluster_mask as kcm

ROOT = pathlib.Path(__file__).resolve().parents[1]
VOCABULARY = 30
CONTEXT = 6
# Compiling one step takes JAX less time than compiling its operations one by one.
FAST = {"run_eagerly": keras.backend.backend() != "jax"}


def options_of(model):
    """The configuration of a model without those of its parts."""
    return {k: v for k, v in model.get_config().items() if not isinstance(v, dict)}


def run_program(*command, **environment):
    """Runs a program in a process of its own; returns what it prints.

    Args:
        *command: The path of the program from the root of the repository, or `"-c"` and
            its code; and its arguments.
        **environment: Variables. The backend is that of the tests.
    """
    program, *arguments = command
    done = subprocess.run(
        [sys.executable, program if program == "-c" else ROOT / program, *arguments],
        env={
            **os.environ,
            "KERAS_BACKEND": keras.backend.backend(),
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# === Data ===


def random_images(count, height=16, width=16, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(count, height, width, 3)).astype("float32")


def random_noise(count, num_patches=16, seed=0):
    return np.random.default_rng(seed).random((count, num_patches), dtype="float32")


def random_pairs(count, seed=0):
    """Pairs of noise, all texts different."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, VOCABULARY - 1, size=(count, CONTEXT)).astype("int32")
    ids[:, 0] = np.arange(count) % VOCABULARY
    ids[:, -1] = VOCABULARY - 1
    images = rng.integers(0, 256, size=(count, 16, 16, 3)).astype("uint8")
    return {"images": images, "token_ids": ids}


def split(pairs, size=4):
    """The pairs in batches."""
    starts = range(0, len(pairs["images"]), size)
    return [{k: v[i : i + size] for k, v in pairs.items()} for i in starts]


def class_pairs(count, num_classes=4, seed=0):
    """Pairs of one pattern and one text a class, with a little noise."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(30, 226, size=(num_classes, 16, 16, 3))
    classes = np.arange(count) % num_classes
    images = patterns[classes] + rng.integers(-20, 21, size=(count, 16, 16, 3))
    ids = np.ones((count, CONTEXT), "int32")
    ids[:, 1] = 2 + classes
    ids[:, -1] = VOCABULARY - 1
    return {"images": images.astype("uint8"), "token_ids": ids}


def number_as_token(captions):
    """A tokenizer of the captions of `write_pairs`: their numbers."""
    return np.array([[int(x.split()[1])] * CONTEXT for x in captions], "int32")


def letters_as_tokens(texts):
    """A tokenizer of any texts: letters between a start and an end, then padding."""
    ids = np.zeros((len(texts), CONTEXT), "int32")
    for row, text in zip(ids, texts):
        letters = [1 + ord(x) % (VOCABULARY - 3) for x in text[: CONTEXT - 2]]
        row[: len(letters) + 2] = [VOCABULARY - 2, *letters, VOCABULARY - 1]
    return ids


def stream(shard, tokenizer=number_as_token, training=True, **options):
    """Batches of 4 of a shard of `write_pairs`."""
    return kcm.data.image_text_dataset(shard, tokenizer, 16, 4, training, **options)


class Batches(keras.utils.PyDataset):
    def __init__(self, batches):
        super().__init__()
        self.batches, self.begun = batches, 0

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return (self.batches[index],)

    def on_epoch_begin(self):
        self.begun += 1


# === Maskings ===


def moving_weight(highest=0.8):
    return keras.optimizers.schedules.PolynomialDecay(0.2, 10, highest)


# One of each kind, for patches of 4 x 4 pixels; with state that training changes, where
# it can have any.
MASKINGS = {
    "random": kcm.RandomMasking,
    "cluster": lambda **options: kcm.ClusterMasking(
        patch_size=4, softness=0.1, **options
    ),
    "threshold": lambda highest=0.8, **options: kcm.ClusterMasking(
        patch_size=4,
        min_mask_ratio=0.25,
        threshold=0.1,
        embedding_weight=moving_weight(highest),
        hide_padding=False,
        **options,
    ),
    "centered": kcm.CenteredMasking,
    "grid": kcm.GridMasking,
    "block": kcm.BlockMasking,
    "kmeans": lambda **options: kcm.KMeansMasking(
        patch_size=4, num_clusters=4, embedding_weight=moving_weight(), **options
    ),
    "edge": lambda **options: kcm.EdgeMasking(
        patch_size=4, embedding_weight=moving_weight(), **options
    ),
}


# === Encoders ===


@keras.saving.register_keras_serializable(package="tests")
class AddPositions(keras.layers.Layer):
    def build(self, shape):
        self.positions = self.add_weight(
            shape=shape[1:], initializer="random_normal", name="positions"
        )

    def call(self, tokens):
        return tokens + self.positions


def functional_vit(width=16, num_layers=1, mix=None, pool=True, name="own_vit"):
    """A vision transformer of plain Keras layers; `mix` is put between its blocks."""
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(width, 4, strides=4, name="patches")(images)
    x = keras.layers.Reshape((16, width))(x)
    x = AddPositions(name="positions")(x)
    for _ in range(num_layers):
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.MultiHeadAttention(num_heads=2, key_dim=8)(y, y)
        x = keras.layers.Add()([x, y])
        if mix is not None:
            x = mix(x)
        y = keras.layers.LayerNormalization()(x)
        y = keras.layers.Dense(width, activation="gelu")(y)
        x = keras.layers.Add()([x, y])
    x = keras.layers.LayerNormalization()(x)
    if pool:
        x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(images, x, name=name)


def masked_vit(masking, **options):
    """The smallest encoder that a masking of `MASKINGS` fits, with it.

    Args:
        masking: A `PatchMasking`.
        **options: Those of `functional_vit`, which is the encoder.
    """
    return kcm.with_masking(functional_vit(**options), masking, "positions")


def patch_mlp():
    """Patches that never meet but in their average: the cheapest thing to mask."""
    images = keras.Input((16, 16, 3))
    x = keras.layers.Conv2D(16, 4, strides=4)(images)
    x = keras.layers.Reshape((16, 16))(x)
    x = AddPositions(name="positions")(x)
    x = keras.layers.Dense(16, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling1D()(x)
    return keras.Model(images, keras.layers.Dense(16)(x), name="patch_mlp")


def image_mlp(width=16):
    images = keras.Input((16, 16, 3))
    x = keras.layers.AveragePooling2D(4)(images)
    x = keras.layers.Flatten()(x)
    x = keras.layers.Dense(width)(x)
    return keras.Model(images, x, name="image_mlp")


def text_bag(width=16):
    ids = keras.Input((CONTEXT,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, width)(ids)
    x = keras.layers.GlobalAveragePooling1D()(x)
    x = keras.layers.Dense(width)(x)
    return keras.Model(ids, x, name="text_bag")


def small_model(**kwargs):
    return kcm.ContrastiveModel(image_mlp(), text_bag(), **kwargs)


def compiled_model(optimizer="sgd", **options):
    model = small_model(**options)
    model.compile(optimizer, **FAST)
    return model


# The smallest transformer, and the towers of keras_hub that are made of it.
TRANSFORMER = dict(num_layers=1, num_heads=2, hidden_dim=16, intermediate_dim=32)
VIT = dict(TRANSFORMER, patch_size=4)


def vision_encoder(family, **options):
    """An encoder of keras_hub for images of 16 x 16 pixels, in patches of 4 x 4."""
    options = {**VIT, "image_shape": (16, 16, 3), **options}
    if family == "ViT":
        options["mlp_dim"] = options.pop("intermediate_dim")
    if family.startswith("DINO"):
        options["num_register_tokens"] = 2
    models = keras_hub.models
    make = getattr(models, f"{family}VisionEncoder", None)
    return (make or getattr(models, f"{family}Backbone"))(**options)


def make_backbone(family, dtype=None, **kwargs):
    make_text = getattr(keras_hub.models, f"{family}TextEncoder")
    return getattr(keras_hub.models, f"{family}Backbone")(
        vision_encoder=vision_encoder(family, dtype=dtype, name="vision_encoder"),
        text_encoder=make_text(
            **TRANSFORMER,
            vocabulary_size=VOCABULARY,
            embedding_dim=16,
            max_sequence_length=CONTEXT,
            dtype=dtype,
            name="text_encoder",
        ),
        dtype=dtype,
        **kwargs,
    )


def clip_vision_encoder(dtype=None):
    return vision_encoder("CLIP", dtype=dtype, name="vision_encoder")


def siglip_encoder():
    return vision_encoder("SigLIP")


def tiny_clip(dtype=None):
    return make_backbone("CLIP", dtype, projection_dim=16)


def clip_with_lora():
    backbone = tiny_clip()
    backbone.enable_lora(2)
    return backbone


def tiny_siglip(dtype=None):
    return make_backbone("SigLIP", dtype)


def tiny_metaclip():
    return make_backbone("MetaCLIP2", projection_dim=16)


def vit_encoder(height=16, width=16, **options):
    return vision_encoder("ViT", image_shape=(height, width, 3), **options)


def deit_encoder(height=16, width=16, **options):
    return vision_encoder("DeiT", image_shape=(height, width, 3), **options)


def dino_encoder(**options):
    return vision_encoder("DINOV2", **options)


def dino_3_encoder(num_layers=1, **options):
    return vision_encoder("DINOV3", num_layers=num_layers, **options)


def as_trained(model):
    """The model with weights that no initializer gives."""
    rng = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign(rng.normal(size=weight.shape).astype("float32"))
    return model


# === Logs ===


class TokenLog(keras.layers.Layer):
    """Passes token ids on, and remembers the first of each row that is trained on.

    Args:
        steps: int. The number of batches for which there is space.
        rows: int. The number of rows of a batch, on all devices together.
    """

    def __init__(self, steps, rows):
        super().__init__()
        self.steps, self.rows = steps, rows

    def build(self, shape):
        options = dict(
            initializer="zeros",
            dtype="int32",
            trainable=False,
            aggregation="only_first_replica",
        )
        self.seen = self.add_weight(shape=(self.steps, self.rows), **options)
        self.count = self.add_weight(shape=(), **options)

    def call(self, ids, training=False):
        if training:
            rows = kcm.distribution.replicas.all_gather(ids)[:, 0]
            is_next = ops.arange(self.steps)[:, None] == self.count
            self.seen.assign(ops.where(is_next, rows[None], self.seen.value))
            self.count.assign_add(1)
        return ids

    def seen_tokens(self):
        """int array (batches, rows)."""
        count = int(ops.convert_to_numpy(self.count))
        assert count <= self.steps
        return ops.convert_to_numpy(self.seen)[:count]


def model_with_log(steps):
    """A model, and the `TokenLog` of its text encoder."""
    log, ids = TokenLog(steps, rows=4), keras.Input((CONTEXT,), dtype="int32")
    text_encoder = keras.Model(ids, text_bag()(log(ids)))
    return kcm.ContrastiveModel(image_mlp(), text_encoder), log


# === Backends ===


def to_numpy(x):
    return np.array(ops.convert_to_numpy(ops.cast(x, "float32")))


def reloaded(model, folder, **options):
    """The model after it was saved and loaded."""
    path = folder / "model.keras"
    model.save(path)
    return keras.saving.load_model(path, **options)


def by_tower(model, default, **towers):
    """A `MultiOptimizer` with an optimizer for each tower, by `image` and `text`."""
    optimizers = {}
    for name, optimizer in towers.items():
        weights = getattr(model, f"{name}_encoder").weights
        layers = {re.escape(v.path[: v.path.rfind("/") + 1]) for v in weights}
        optimizers[f"(?:{'|'.join(sorted(layers))})[^/]+"] = optimizer
    default = keras.optimizers.get(default)
    rates = keras.optimizers.OptimizerMap(default, optimizers)
    return keras.optimizers.MultiOptimizer(rates)


def ids_of(variables):
    return {id(variable) for variable in variables}


def values(variables):
    return [np.array(ops.convert_to_numpy(v)) for v in variables]


def assert_close(found, expected, atol=1e-6, rtol=1e-7):
    """Compares variables or arrays, in order or by name."""
    if not isinstance(expected, dict):
        found, expected = dict(enumerate(found)), dict(enumerate(expected))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        pair = values([found[name], value])
        np.testing.assert_allclose(*pair, rtol=rtol, atol=atol, err_msg=str(name))


def assert_same_values(found, expected):
    """Compares variables or arrays to the last bit, in order or by name."""
    assert_close(found, expected, atol=0.0, rtol=0.0)


def compiled(fn):
    """A function without state, on JAX compiled whole, not operation by operation."""
    if keras.backend.backend() != "jax":
        return fn
    import jax

    return jax.jit(fn)


def value_and_gradients(fn, variables):
    """`fn() -> (scalar, output)`: the output and the scalar's gradients, in NumPy."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            loss, output = fn()
        found = tape.gradient(
            loss,
            [v.value for v in variables],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        found = [tf.convert_to_tensor(g) for g in found]
    elif backend == "torch":
        import torch

        loss, output = fn()
        weights = [v.value for v in variables]
        found = torch.autograd.grad(loss, weights, allow_unused=True)
        found = [
            torch.zeros_like(w) if g is None else g for g, w in zip(found, weights)
        ]
    else:
        import jax

        def stateless(weights):
            with keras.StatelessScope(state_mapping=list(zip(variables, weights))):
                return fn()

        # Compiled whole, which is faster than compiling its operations one by one.
        step = jax.jit(jax.grad(stateless, has_aux=True))
        found, output = step([v.value for v in variables])
    return to_numpy(output), [to_numpy(g) for g in found]


# === Steps of a contrastive model ===


def loss_of(model, pairs, embeddings):
    return model.compute_loss(x=pairs, y_pred=embeddings, training=True)


def loss_and_gradients(model, pairs, embed=None):
    """The loss of a batch and the gradients of the weights; the state advances."""
    return GradientSteps(model, embed)(pairs)


class GradientSteps:
    """Losses and gradients of batch after batch, of one program on JAX.

    Weights, state and pairs are its arguments. As constants they would have it compiled
    for each batch.
    """

    def __init__(self, model, embed=None):
        self.model = model
        self.embed = embed or (lambda pairs: model(pairs, training=True))
        self._step = None

    def __call__(self, pairs):
        weights = self.model.trainable_variables
        if keras.backend.backend() != "jax":

            def fn():
                loss = loss_of(self.model, pairs, self.embed(pairs))
                return loss, loss

            return value_and_gradients(fn, weights)
        import jax

        state = self.model.non_trainable_variables

        def stateless(weight_values, state_values, pairs):
            mapping = [*zip(weights, weight_values), *zip(state, state_values)]
            with keras.StatelessScope(state_mapping=mapping) as scope:
                loss = loss_of(self.model, pairs, self.embed(pairs))
            return loss, [scope.get_current_value(v) for v in state]

        if self._step is None:
            self._step = jax.jit(jax.value_and_grad(stateless, has_aux=True))
        values = [v.value for v in weights], [v.value for v in state]
        (loss, new_state), found = self._step(*values, pairs)
        for variable, value in zip(state, new_state):
            variable.assign(value)
        return to_numpy(loss), [to_numpy(g) for g in found]


def largest_error(found, expected):
    """Relative to the largest entry of all."""
    scale = max(np.abs(x).max() for x in expected)
    return max(np.abs(x - y).max() for x, y in zip(found, expected)) / scale


def memory_of_gradients(model, pairs):
    """Bytes that the gradients of a batch take at a time, on JAX and torch."""
    torch = keras.backend.backend() == "torch"
    return (_live_bytes_torch if torch else _temporary_bytes_jax)(model, pairs)


def _live_bytes_torch(model, pairs):
    """The most that tensors made in a step hold at a time."""
    import weakref

    import torch
    from torch.utils import _pytree
    from torch.utils._python_dispatch import TorchDispatchMode

    live = {}
    most = calls = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most, calls
            calls += 1
            if calls % 20 == 0:
                gc.collect()
            outputs = func(*args, **(kwargs or {}))
            for x in _pytree.tree_leaves(outputs):
                if isinstance(x, torch.Tensor):
                    storage = x.untyped_storage()
                    if storage._cdata not in live:
                        live[storage._cdata] = storage.nbytes()
                        weakref.finalize(storage, live.pop, storage._cdata)
            most = max(most, sum(live.values()))
            return outputs

    pairs = {key: ops.convert_to_tensor(value) for key, value in pairs.items()}
    # Walking through arguments leaves cycles behind that hold tensors. With all else
    # frozen, looking for them is quick.
    gc.freeze()
    try:
        with Watch():
            loss_of(model, pairs, model(pairs, training=True)).backward()
    finally:
        gc.unfreeze()
    return most


def _temporary_bytes_jax(model, pairs):
    import jax

    def loss(weights, state, pairs):
        embeddings, _ = model.stateless_call(weights, state, pairs, training=True)
        with keras.StatelessScope(list(zip(model.trainable_variables, weights))):
            return loss_of(model, pairs, embeddings)

    weights = [v.value for v in model.trainable_variables]
    state = [v.value for v in model.non_trainable_variables]
    compiled = jax.jit(jax.grad(loss)).lower(weights, state, pairs).compile()
    # The chunks of a batch are cut from a copy of it.
    batch = sum(x.nbytes for x in pairs.values())
    return compiled.memory_analysis().temp_size_in_bytes - batch


def exported(tower, folder, **options):
    """A function from arrays to arrays, of the tower written and read without Keras."""
    if keras.backend.backend() == "torch":
        import torch

        path = str(folder / "tower.pt2")
        tower.export(path, format="torch", verbose=False, **options)
        module = torch.export.load(path).module()

        def serve(inputs):
            found = module(keras.tree.map_structure(torch.tensor, inputs))
            return keras.tree.map_structure(lambda x: x.detach().numpy(), found)

        return serve
    # Kept, as its functions do not keep its variables.
    loaded = _exported_for_tensorflow(tower, str(folder / "tower"), **options)
    return lambda inputs: keras.tree.map_structure(np.array, loaded.serve(inputs))


def _exported_for_tensorflow(tower, path, **options):
    """The tower, written as a SavedModel and read by TensorFlow."""
    tf = pytest.importorskip("tensorflow")
    if keras.backend.backend() == "jax":
        # What these versions of JAX write, TensorFlow 2.21 cannot run.
        jax_version = Version(importlib.metadata.version("jax"))
        if jax_version >= Version("0.11.2") and tf.__version__.startswith("2.21."):
            pytest.skip("TensorFlow is too old for JAX.")
    tower.export(path, verbose=False, **options)
    return tf.saved_model.load(path)
