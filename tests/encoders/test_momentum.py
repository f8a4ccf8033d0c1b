"""A teacher sees what its encoder sees, and follows it as a moving average."""

import math

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.training.layers import (
    all_layers,
    averaged_variables,
    state_variables,
)
from tests.helpers import (
    FAST,
    assert_close,
    assert_same_values,
    clip_vision_encoder,
    clip_with_lora,
    deit_encoder,
    functional_vit,
    ids_of,
    random_images,
    random_pairs,
    reloaded,
    siglip_encoder,
    tiny_clip,
    tiny_metaclip,
    to_numpy,
    values,
    vision_encoder,
    vit_encoder,
)

FAMILIES = ("CLIP", "MetaCLIP2", "ViT", "DeiT", "DINOV2")
MomentumEncoder = kcm.models.MomentumEncoder


def moved(encoder, seed):
    """The encoder with other weights, about as large as trained ones."""
    rng = np.random.default_rng(seed)
    for weight in encoder.weights:
        if keras.backend.is_float_dtype(weight.dtype):
            weight.assign(0.3 * rng.normal(size=weight.shape))
    return encoder


def float_values(weights):
    return [to_numpy(v) for v in weights if keras.backend.is_float_dtype(v.dtype)]


def mixed(momentum, before, weights):
    """The weights of a teacher after an update."""
    found = zip(before, float_values(weights), strict=True)
    return [momentum * x + (1 - momentum) * y for x, y in found]


# === Attention ===


def class_attention(encoder, images):
    """The class token's attention to the patches, as Keras's layers return it.

    Returns:
        `(batch, N)` array, the mean over layers and heads.
    """
    call, rows = keras.layers.MultiHeadAttention.call, []

    def recorded(self, *args, **kwargs):
        output, scores = call(self, *args, return_attention_scores=True, **kwargs)
        rows.append(to_numpy(scores)[:, :, 0])
        return output

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.layers.MultiHeadAttention, "call", recorded)
        encoder(images.astype("float32"), training=False)
    assert len(rows) == 3
    patches = (images.shape[1] // 4) * (images.shape[2] // 4)
    return np.mean(rows, axis=(0, 2))[:, -patches:]


@pytest.mark.one_case
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_is_that_of_a_whole_forward_pass(family):
    encoder = moved(vision_encoder(family, num_layers=3), 1)
    images = random_images(3)
    teacher = MomentumEncoder(encoder)
    found = teacher.attention(images)
    assert ops.shape(found) == (3, 16)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"
    if family == "CLIP":
        # keras_hub gives all patches the position 0; the teacher numbers them.
        encoder.embedding.position_ids.assign(np.arange(17)[None])
    expected = class_attention(encoder, images)
    # Prefix tokens are left out, and nothing makes up for them.
    assert (expected.sum(axis=1) < 0.999).all()
    assert_close(found, expected, 1e-5)


@pytest.mark.any_backend
@pytest.mark.parametrize("family", ["CLIP", "ViT", "DINOV2"])
def test_a_teacher_of_another_size_reads_smaller_images(family):
    encoder = moved(vision_encoder(family, num_layers=3), 2)
    teacher = MomentumEncoder(encoder, image_size=8)
    assert teacher.grid == (2, 2)
    images = random_images(3)
    # Bilinear with antialiasing: weights 1, 3, 3, 1 over four pixels, cut at borders.
    weights = np.zeros((8, 16))
    for row in range(8):
        for offset, weight in zip(range(-1, 3), (1, 3, 3, 1)):
            if 0 <= 2 * row + offset < 16:
                weights[row, 2 * row + offset] = weight
    weights /= weights.sum(axis=1, keepdims=True)
    small = np.einsum("ih,jw,bhwc->bijc", weights, weights, images)
    resized = kcm.models.with_image_size(encoder, 8)
    expected = class_attention(resized, small)
    assert_close(teacher.attention(images), expected, 1e-5)


@pytest.mark.any_backend
@pytest.mark.parametrize("is_called_in_training", [True, False])
def test_layers_around_keep_their_mode_and_the_teacher_keeps_its_own(
    is_called_in_training,
):
    class Around(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dropout = keras.layers.Dropout(0.5, seed=1)

        def call(self, images):
            self.attention = teacher.attention(images)
            # Without a `training` of its own, it takes that of the last layer.
            return self.dropout(ops.ones((1, 100)))

    encoder = moved(vit_encoder(dropout_rate=0.5, attention_dropout=0.5), 3)
    teacher = MomentumEncoder(encoder)
    images = random_images(2)
    expected = to_numpy(teacher.attention(images))
    around = Around()
    dropped = to_numpy(around(images, training=is_called_in_training))
    assert (dropped == 0).any() == is_called_in_training
    assert_close(around.attention, expected)


# === Updates ===


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("steps", "last"), [(None, 1.0), (4, 1.0), (4, 0.2)], ids=["constant", "up", "down"]
)
def test_updates_follow_the_closed_form(steps, last):
    encoder = moved(clip_vision_encoder(), 1)
    teacher = MomentumEncoder(encoder, 0.9, last, steps)
    start = float_values(teacher.copied_weights)
    teacher.follow(moved(encoder, 2))
    for _ in range(6):
        teacher.update()
    # How far the schedule has come at each step.
    progress = [min(step / steps, 1.0) if steps else 0.0 for step in range(6)]
    kept = math.prod(
        last - (last - 0.9) * (math.cos(math.pi * x) + 1) / 2 for x in progress
    )
    assert_close(
        float_values(teacher.copied_weights), mixed(kept, start, encoder.weights)
    )
    assert int(teacher.step) == 6


@pytest.mark.any_backend
def test_a_saved_teacher_continues_in_the_middle_of_its_schedule(tmp_path):
    encoder = moved(clip_vision_encoder(), 1)
    teacher = MomentumEncoder(encoder, 0.9, steps=4)
    masked = kcm.with_masking(encoder, kcm.AttentiveMasking(teacher))
    moved(encoder, 2)
    for _ in range(3):
        teacher.update()
    loaded = reloaded(masked, tmp_path)
    for each in (teacher, loaded.masking.teacher):
        for _ in range(3):
            each.update()
    assert_close(values(loaded.masking.teacher.weights), values(teacher.weights), 0)
    for one, other in zip(loaded.encoder.weights, loaded.masking.teacher.weights):
        assert one is not other


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("family", "size"), [("CLIP", 8), ("DINOV2", 8), ("DINOV2", 16)]
)
def test_positions_of_any_size_follow_those_of_the_encoder(family, size):
    encoder = moved(vision_encoder(family, num_layers=3), 1)
    teacher = MomentumEncoder(encoder, 0.75, image_size=size)
    start = float_values(teacher.copied_weights)
    teacher.follow(moved(encoder, 2))
    teacher.update()
    # Resizing is linear, so the average of resized tables is the resized average.
    end = encoder if size == 16 else kcm.models.with_image_size(encoder, size)
    expected = mixed(0.75, start, end.weights)
    assert_close(float_values(teacher.copied_weights), expected, 1e-5)


@pytest.mark.one_case
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_training_updates_once_a_step_before_the_step_changes_the_encoder(dtype):
    keras.utils.set_random_seed(0)
    backbone = tiny_clip(dtype)
    teacher = MomentumEncoder(backbone.vision_encoder, 0.8)
    model = kcm.ContrastiveModel.from_backbone(
        backbone, kcm.AttentiveMasking(teacher, seed=1), micro_batch_size=4
    )
    model.compile(keras.optimizers.SGD(0.1), **FAST)
    expected = float_values(teacher.copied_weights)
    for step in range(3):
        expected = mixed(0.8, expected, backbone.vision_encoder.weights)
        model.train_on_batch(random_pairs(8, seed=step))
        # Half precision would be off by 1e-3.
        assert_close(float_values(teacher.copied_weights), expected)
    online = float_values(backbone.vision_encoder.weights)
    assert max(np.abs(x - y).max() for x, y in zip(expected, online)) > 1e-4
    model.evaluate(random_pairs(8), batch_size=8, verbose=0)
    assert_close(float_values(teacher.copied_weights), expected)


def test_a_layer_used_alone_updates_in_each_call_in_training():
    encoder = moved(clip_vision_encoder(), 1)
    teacher = MomentumEncoder(encoder, 0.5)
    masked = kcm.with_masking(encoder, kcm.AttentiveMasking(teacher))
    start = float_values(teacher.copied_weights)
    moved(encoder, 2)
    masked(random_images(2), training=False)
    assert_close(float_values(teacher.copied_weights), start, 0)
    assert masked(random_images(2), training=True).shape == (2, 9, 16)
    expected = mixed(0.5, start, encoder.weights)
    assert_close(float_values(teacher.copied_weights), expected)


# === A part of a model ===


def make_model():
    backbone = tiny_clip()
    teacher = MomentumEncoder(backbone.vision_encoder, 0.5)
    return kcm.ContrastiveModel.from_backbone(
        backbone, kcm.AttentiveMasking(teacher, seed=1)
    )


@pytest.mark.any_backend
def test_no_optimizer_ever_sees_the_teacher(tmp_path):
    model = make_model()
    teacher = model.masking.teacher
    own = ids_of(teacher.weights)
    assert len(own) == 1 + len(model.backbone.vision_encoder.weights)
    expected = len(tiny_clip().trainable_weights)
    assert len(model.trainable_variables) == expected
    model.trainable = False
    for part in (model, model.image_encoder, model.masking):
        part.trainable = True
    assert len(model.trainable_variables) == expected
    assert not own & ids_of(model.trainable_variables)
    loaded = reloaded(model, tmp_path)
    assert len(loaded.trainable_variables) == expected
    loaded.trainable = True
    assert len(loaded.trainable_variables) == expected


@pytest.mark.any_backend
def test_each_weight_is_saved_once(tmp_path):
    import h5py

    model = make_model()
    for weight in model.masking.teacher.copied_weights:
        weight.assign(ops.ones(weight.shape, weight.dtype))
    path = tmp_path / "model.weights.h5"
    model.save_weights(path)
    sizes = []

    def add(name, entry):
        if "masking" in name and hasattr(entry, "shape"):
            sizes.append(entry.size)

    with h5py.File(path) as file:
        file.visititems(add)
    theirs = [math.prod(v.shape) for v in model.masking.variables]
    assert sorted(sizes) == sorted(theirs)
    other = make_model()
    other.load_weights(path)
    assert_close(values(other.masking.variables), values(model.masking.variables), 0)


@pytest.mark.any_backend
def test_its_weights_have_paths_of_their_own():
    model = make_model()
    paths = [v.path for v in model.variables]
    assert len(set(paths)) == len(paths)


@pytest.mark.any_backend
def test_its_blocks_are_no_blocks_of_the_model():
    model = make_model()
    blocks = [x for x in all_layers(model) if "EncoderLayer" in type(x).__name__]
    assert blocks == model.backbone.vision_encoder.encoder_layers + list(
        model.backbone.text_encoder.encoder_layers
    )


def test_its_state_is_not_averaged_over_replicas():
    model = make_model()
    averaged = ids_of(averaged_variables(model))
    assert not averaged & ids_of(model.masking.teacher.weights)
    assert id(model.masking.last_mask_ratio) in averaged
    # But micro-batches must see the teacher of their own step.
    state = ids_of(state_variables(model))
    assert state >= ids_of(model.masking.teacher.weights)


# === Errors ===


def pooled_vit():
    vit = vit_encoder()
    return keras.Model(vit.input, keras.layers.GlobalAveragePooling1D()(vit.output))


def masked_clip():
    return kcm.with_masking(clip_vision_encoder(), kcm.RandomMasking())


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (siglip_encoder, {}, "`encoder`.*class token"),
        (functional_vit, {}, "`encoder`.*class token"),
        (lambda: vit_encoder(use_class_token=False), {}, "`encoder`.*class token"),
        (masked_clip, {}, "`encoder`.*class token"),
        (lambda: "clip", {}, "`encoder`.*class token"),
        (pooled_vit, {}, r"`encoder`.*teacher\.follow\(backbone\)"),
        (lambda: clip_vision_encoder("bfloat16"), {}, "`encoder`.*float32"),
        (lambda: clip_with_lora().vision_encoder, {}, "`encoder`.*LoRA"),
        (clip_vision_encoder, {"momentum": 1.5}, "`momentum`"),
        (clip_vision_encoder, {"final_momentum": -0.1}, "`final_momentum`"),
        # Without `steps`.
        (clip_vision_encoder, {"final_momentum": 0.9}, "`final_momentum`"),
        (clip_vision_encoder, {"steps": 0}, "`steps`"),
        (clip_vision_encoder, {"image_size": 10}, "`image_size`"),
        (deit_encoder, {"image_size": 8}, "`model` must be a keras_hub"),
    ],
)
def test_what_makes_no_teacher_is_refused(make, options, match):
    with pytest.raises(ValueError, match=rf"(?s){match}.*Received: "):
        MomentumEncoder(make(), **options)


@pytest.mark.any_backend
def test_a_teacher_follows_a_model_around_its_encoder():
    vit = vit_encoder()
    pooled = keras.Model(vit.input, vit.output[:, 0])
    teacher = MomentumEncoder(vit)
    teacher.follow(vit)
    kcm.with_masking(pooled, kcm.AttentiveMasking(teacher))
    teacher.update()
    # With weights after the teacher's: MetaCLIP 2 normalizes what it pools.
    backbone = tiny_metaclip()
    teacher = MomentumEncoder(backbone.vision_encoder, 0.0)
    kcm.ContrastiveModel.from_backbone(backbone, kcm.AttentiveMasking(teacher))
    for weight in backbone.vision_encoder.trainable_weights:
        weight.assign(weight + 1.0)
    teacher.update()
    assert_same_values(teacher.copied_weights, backbone.vision_encoder.weights)


@pytest.mark.any_backend
def test_what_cannot_be_followed_is_refused():
    backbone = tiny_clip()
    teacher = MomentumEncoder(backbone.vision_encoder, 0.5)
    masking = kcm.AttentiveMasking(teacher)
    images = random_images(2)

    def refused(match, call):
        with pytest.raises(ValueError, match=rf"{match}.*Received: "):
            call()

    refused("must follow", teacher.update)
    tokens = np.zeros((2, 17, 16))
    refused("must follow", lambda: masking(tokens, images=images, training=True))
    refused("`teacher`", lambda: teacher.follow(vit_encoder()))
    # The norm after its only block has the shape of the first one in another block.
    deeper = vision_encoder("CLIP", num_layers=2)
    refused("`teacher`", lambda: teacher.follow(deeper))
    teacher.follow(backbone.vision_encoder)
    refused("another encoder", lambda: teacher.follow(clip_vision_encoder()))
