"""Two pre-trained encoders as one model: pooling, pixels and padding by family."""

import warnings

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.families import BLOCKS, TEXT_BLOCKS
from keras_cluster_mask.encoders.masked import unmasked
from keras_cluster_mask.encoders.pooled import PooledEncoder
from keras_cluster_mask.training.layers import all_layers
from tests.helpers import (
    FAST,
    TRANSFORMER,
    assert_close,
    assert_same_values,
    deit_encoder,
    dino_3_encoder,
    dino_encoder,
    random_images,
    random_noise,
    random_pairs,
    reloaded,
    to_numpy,
    values,
    vit_encoder,
)

TEXT = dict(TRANSFORMER, vocabulary_size=30, max_sequence_length=8)
HEAD = {"projection_dim": 4}


def bert(**options):
    return keras_hub.models.BertBackbone(**{**TEXT, **options})


def roberta(**options):
    return keras_hub.models.RobertaBackbone(**TEXT | options)


def vit_without_class(**options):
    return vit_encoder(use_class_token=False, **options)


def embedder(pooling="mean", **options):
    return keras_hub.models.BertTextEmbedder(bert(**options), pooling_mode=pooling)


def resnet():
    return keras_hub.models.ResNetBackbone(
        [64], [3], [64], [1], [1], "basic_block", image_shape=(16, 16, 3)
    )


def mobilenet():
    return keras_hub.models.MobileNetBackbone(
        stackwise_expansion=[[8]],
        stackwise_num_blocks=[1],
        stackwise_num_filters=[[8]],
        stackwise_kernel_size=[[3]],
        stackwise_num_strides=[[2]],
        stackwise_se_ratio=[[None]],
        stackwise_activation=[["relu"]],
        stackwise_padding=[[1]],
        output_num_filters=16,
        depthwise_filters=8,
        depthwise_stride=1,
        depthwise_residual=False,
        last_layer_filter=16,
        input_num_filters=8,
        image_shape=(16, 16, 3),
    )


def efficientnet():
    return keras_hub.models.EfficientNetBackbone(
        stackwise_kernel_sizes=[3],
        stackwise_num_repeats=[1],
        stackwise_input_filters=[8],
        stackwise_output_filters=[8],
        stackwise_expansion_ratios=[1],
        stackwise_squeeze_and_excite_ratios=[0.25],
        stackwise_strides=[1],
        stackwise_block_types=["v1"],
        width_coefficient=1.0,
        depth_coefficient=1.0,
        input_shape=(16, 16, 3),
        num_features=16,
    )


# The encoder, its tokens before the patches, and its pooling.
IMAGES = {
    "DINOv2": (dino_encoder, 3, "class_and_mean"),
    "DINOv3": (dino_3_encoder, 3, "class_and_mean"),
    "DeiT": (deit_encoder, 2, "class"),
    "ViT": (vit_encoder, 1, "class"),
}
# Convolutional networks, which return a grid of features.
GRIDS = {"EfficientNet": efficientnet, "MobileNet": mobilenet, "ResNet": resnet}
# ALBERT and ELECTRA embed tokens in a width of their own.
EMBEDDED = dict(TEXT, embedding_dim=8)
TEXTS = {
    "ALBERT": lambda **more: keras_hub.models.AlbertBackbone(**EMBEDDED | more),
    "BERT": bert,
    "DeBERTa-v3": lambda **more: keras_hub.models.DebertaV3Backbone(
        bucket_size=8, **TEXT | more
    ),
    "ELECTRA": lambda **more: keras_hub.models.ElectraBackbone(
        vocab_size=EMBEDDED["vocabulary_size"],
        **{k: v for k, v in EMBEDDED.items() if k != "vocabulary_size"} | more,
    ),
    "DistilBERT": lambda **more: keras_hub.models.DistilBertBackbone(**TEXT | more),
    "RoBERTa": roberta,
    "XLM-R": lambda **more: keras_hub.models.XLMRobertaBackbone(**TEXT | more),
}


# Families whose padding has the id 1, not 0.
WITH_ONE = "RoBERTa", "XLM-R"


def make_model(images=vit_encoder, texts=bert, **options):
    return kcm.ContrastiveModel.from_encoders(images(), texts(), **{**HEAD, **options})


def pairs():
    """Pairs of which two texts end in padding."""
    found = random_pairs(4)
    found["token_ids"] = found["token_ids"].clip(3)
    found["token_ids"][:2, 4:] = 0
    return found


@pytest.mark.any_backend
@pytest.mark.parametrize("family", IMAGES)
def test_images_are_pooled_as_their_family_is(family):
    make, prefix, pooling = IMAGES[family]
    backbone = make()
    images = random_images(2)
    tokens = to_numpy(backbone(images, training=False))
    first, mean = tokens[:, 0], tokens[:, prefix:].mean(axis=1)
    expected = {
        "class": first,
        "mean": mean,
        "class_and_mean": np.concatenate([first, mean], -1),
    }
    encoder = make_model(lambda: backbone).image_encoder
    assert_close(encoder(images, training=False), expected[pooling])
    for given, value in expected.items():
        assert_close(PooledEncoder(backbone, given)(images, training=False), value)


@pytest.mark.any_backend
@pytest.mark.parametrize("family", GRIDS)
def test_grids_of_features_are_averaged_and_not_masked(family):
    backbone, images = GRIDS[family](), random_images(2)
    model = make_model(lambda: backbone)
    found = model.image_encoder(images, training=False)
    expected = ops.mean(backbone(images, training=False), axis=(1, 2))
    assert_close(found, expected, 1e-6, 1e-5)
    assert model.pixel_mean == [0.485, 0.456, 0.406]
    for make in (
        lambda masking: make_model(lambda: backbone, masking=masking),
        lambda masking: kcm.with_masking(backbone, masking),
    ):
        with pytest.raises(ValueError, match=r"(?s)patch tokens"):
            make(kcm.RandomMasking(0.5))


@pytest.mark.any_backend
@pytest.mark.parametrize("family", TEXTS)
def test_texts_are_the_mean_of_their_tokens(family):
    backbone = TEXTS[family]()
    model = make_model(texts=lambda: backbone)
    ids = pairs()["token_ids"]
    inputs = model.text_tower.prepare(np.where(ids == 0, family in WITH_ONE, ids))
    tokens = backbone(inputs, training=False)
    tokens = to_numpy(tokens["sequence_output"] if isinstance(tokens, dict) else tokens)
    words = to_numpy(inputs["padding_mask"])[:, :, None]
    assert words.min() == 0
    expected = (tokens * words).sum(1) / words.sum(1)
    assert_close(model.text_encoder(inputs, training=False), expected, 1e-5)


@pytest.mark.any_backend
def test_a_subclass_of_an_encoder_has_the_family_of_its_base():
    class Own(keras_hub.models.RobertaBackbone):
        pass

    model = make_model(texts=lambda: Own(**TEXT))
    assert model.text_tower.family == make_model(texts=roberta).text_tower.family


@pytest.mark.any_backend
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_text_embedder_has_its_own_pooling(pooling):
    texts = embedder(pooling)
    model = make_model(texts=lambda: texts)
    ids = pairs()["token_ids"]
    given = {
        "token_ids": ids,
        "segment_ids": np.zeros_like(ids),
        "padding_mask": ids != 0,
    }
    expected = texts(given, training=False)
    found = to_numpy(model.text_encoder(given, training=False))
    found /= np.linalg.norm(found, axis=-1, keepdims=True)
    assert_close(found, expected, 1e-5)


def tokens_after_blocks(monkeypatch, backbone):
    """Records the tokens after each block of a backbone, as they are computed."""
    names, seen = {*BLOCKS, *TEXT_BLOCKS}, []
    (kind,) = {type(x) for x in all_layers(backbone) if type(x).__name__ in names}
    call = kind.call

    def recorded(*args, **kwargs):
        output = call(*args, **kwargs)
        tokens = output[0] if isinstance(output, tuple) else output
        seen.append(to_numpy(tokens))
        return output

    monkeypatch.setattr(kind, "call", recorded)
    return seen


@pytest.mark.any_backend
@pytest.mark.parametrize("family", ["ViT without a class", *IMAGES, *TEXTS])
def test_blocks_are_pooled_as_they_are_and_the_last_after_its_norm(family, monkeypatch):
    make, prefix, _ = IMAGES.get(family, (vit_without_class, 0, None))
    make = TEXTS.get(family, make)
    backbone = make(num_layers=3)
    inputs, mask = random_images(2), None
    if family in TEXTS:
        given = pairs()["token_ids"]
        mask = np.arange(given.shape[1]) < np.array([[3], [6], [5], [6]])
        inputs = {name: np.zeros_like(given) for name in backbone.input}
        inputs |= {"token_ids": given, "padding_mask": mask.astype("int32")}
    last = backbone(inputs, training=False)
    last = to_numpy(last["sequence_output"] if isinstance(last, dict) else last)
    encoders = [PooledEncoder(backbone, None, x) for x in ([1, 3], 3, [2])]
    seen = tokens_after_blocks(monkeypatch, backbone)
    found = [to_numpy(encoder(inputs, training=False)) for encoder in encoders]

    def pooled(tokens):
        if mask is None:
            mean = tokens[:, prefix:].mean(1)
        else:
            mean = [x[shown].mean(0) for x, shown in zip(tokens, mask)]
        has_class = prefix or mask is not None
        return np.concatenate([tokens[:, 0], mean] if has_class else [mean], -1)

    one, two, _ = map(pooled, seen[:3])
    last = pooled(last)
    assert_close(found[0], np.concatenate([one, last], -1))
    assert_close(found[1], np.concatenate([one, two, last], -1))
    assert_close(found[2], two)
    assert [x.block_numbers for x in encoders] == [[1, 3], [1, 2, 3], [2]]


@pytest.mark.one_case
@pytest.mark.parametrize("family", IMAGES)
def test_the_patches_that_are_kept_alone_are_pooled_after_each_block(
    family, monkeypatch
):
    make, prefix, _ = IMAGES[family]
    backbone = make(num_layers=2)
    encoder = PooledEncoder(backbone, "mean", 2)
    images, noise = random_images(2), random_noise(2)
    whole = kcm.with_masking(encoder, kcm.RandomMasking(0.0))
    assert_close(whole(images, training=True), encoder(images, training=False), 1e-5)
    masking = kcm.RandomMasking(0.5)
    last = kcm.with_masking(backbone, masking)(images, training=True, noise=noise)
    masked = kcm.with_masking(encoder, masking)
    found = to_numpy(masked(images, training=True, noise=noise))
    assert_close(found[:, 16:], to_numpy(last)[:, prefix:].mean(1))
    if family == "DINOv3":
        # Its blocks see one image at a time.
        return
    seen = tokens_after_blocks(monkeypatch, backbone)
    masked(images, training=True, noise=noise)
    assert seen[0].shape[1] == prefix + 8
    assert_close(found[:, :16], seen[0][:, prefix:].mean(1))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    "make", [*(make for make, _, _ in IMAGES.values()), vit_without_class]
)
def test_hidden_patches_are_not_pooled_after_any_block(make):
    masking = kcm.ClusterMasking(
        0.6, patch_size=4, min_mask_ratio=0.25, threshold=0.2, anchor_ratio=0.2
    )
    encoder = PooledEncoder(make(num_layers=2), None, [1, 2])
    images, noise = random_images(1), random_noise(1)
    indices, visible = map(to_numpy, masking.select(images=images, noise=noise))
    kept = indices[0][visible[0].astype(bool)]
    assert len(kept) < indices.shape[1]
    # A random masking that keeps the same patches, and hides none.
    same = kcm.RandomMasking(1 - len(kept) / 16)
    highest = np.isin(np.arange(16), kept)[None] * 0.5 + 0.25
    expected = kcm.with_masking(encoder, same)(images, training=True, noise=highest)
    found = kcm.with_masking(encoder, masking)(images, training=True, noise=noise)
    assert_close(found, expected, 1e-5)


@pytest.mark.slow_to_compile
@pytest.mark.one_case
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("DINOv3", {"micro_batch_size": 2, "image_blocks": 2}),
        ("DINOv2", {"head": "mlp"}),
        ("DINOv2", {"head": "mlp", "image_blocks": [1, 2], "text_blocks": 2}),
        ("DeiT", {"head": "mlp", "image_blocks": [1, 2]}),
        ("ViT", {"image_blocks": 2, "text_blocks": [1]}),
        *((family, {"masking": None}) for family in GRIDS),
    ],
)
def test_a_model_trains_without_a_warning_and_reloads(family, options, tmp_path):
    options = {"masking": kcm.RandomMasking(0.5), **options}

    def make_images():
        if family in GRIDS:
            return GRIDS[family]()
        return IMAGES[family][0](num_layers=2)

    model = make_model(make_images, lambda: embedder(num_layers=2), **options)
    model.text_encoder.backbone.trainable = False
    # As for a model that is tuned after its projections.
    unmasked(model.image_encoder).backbone.trainable = True
    model.compile("adam", **FAST)
    frozen = values(model.text_encoder.weights)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # torch's attention over the positions of DINOv3's kept patches.
        warnings.filterwarnings("ignore", ".*performance drop")
        model.fit(pairs(), batch_size=4, validation_data=pairs(), verbose=0)
        kcm.evaluation.embed(model, pairs(), verbose=0)
    assert_same_values(values(model.text_encoder.weights), frozen)
    loaded = reloaded(model, tmp_path)
    assert len(loaded.trainable_variables) == len(model.trainable_variables)
    assert_close(*(x.predict(pairs(), verbose=0) for x in (loaded, model)))
    before = values(unmasked(loaded.image_encoder).backbone.trainable_variables)
    loaded.fit(pairs(), batch_size=4, verbose=0)
    after = values(unmasked(loaded.image_encoder).backbone.trainable_variables)
    assert any(np.any(one != other) for one, other in zip(before, after))


@pytest.mark.any_backend
def test_pixels_are_those_of_the_family():
    assert make_model().pixel_mean == [0.5, 0.5, 0.5]
    assert make_model(deit_encoder).pixel_mean == [0.485, 0.456, 0.406]
    assert make_model(pixel_mean=None).pixel_mean is None


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"images": bert}, "`image` must be one of these.* ViT"),
        ({"texts": vit_encoder}, "`text` must be one of these.* Albert"),
        ({"pooling": ("sum", None)}, "`pooling` must be one of"),
        ({"pooling": "mean"}, "`pooling` must be a pair of values"),
        ({"images": vit_without_class}, "`pooling` must be 'mean'"),
        ({"head": "deep"}, "`head` must be 'linear'"),
        *(
            ({name: blocks}, f"`{name}` must be None, a number of last blocks")
            for name in ("image_blocks", "text_blocks")
            for blocks in (0, 2, True, [], [2], [1, 1], "last", 1.0)
        ),
        *(
            ({"images": grid, "image_blocks": 1}, "`image_blocks` .* 0 transformer")
            for grid in GRIDS.values()
        ),
    ],
)
def test_unsupported_encoders_are_refused(change, match):
    with pytest.raises(ValueError, match=rf"{match}.*Received: "):
        make_model(**change)


@pytest.mark.any_backend
@pytest.mark.parametrize("head", ["linear", "mlp", None])
def test_projections_have_512_columns_unless_told_otherwise(head):
    head = head or kcm.models.ContrastiveHead(initial_temperature=0.5)
    model = kcm.ContrastiveModel.from_encoders(vit_encoder(), bert(), head=head)
    assert model.predict(pairs(), verbose=0)["text_embeddings"].shape == (4, 512)


@pytest.mark.one_case
def test_a_model_reloads_exactly_under_another_global_policy(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = make_model()
    model.save(tmp_path / "model.keras")
    expected = model.predict(pairs(), verbose=0)
    keras.config.set_dtype_policy("float32")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert_same_values(loaded.predict(pairs(), verbose=0), expected)
