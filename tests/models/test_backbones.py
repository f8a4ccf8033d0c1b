"""ContrastiveModel.from_backbone: it trains the backbone itself."""

import functools
import io
import math
from types import SimpleNamespace

import keras
import numpy as np
import pytest
from keras import ops

import keras_cluster_mask as kcm
from keras_cluster_mask.data.tokenizing import tokenize
from keras_cluster_mask.distribution.backends import import_keras_hub
from keras_cluster_mask.encoders.families import CLIP_MEAN, CLIP_STD, SIGLIP_MEAN
from keras_cluster_mask.models import ContrastiveHead
from tests.helpers import (
    FAST,
    MASKINGS,
    VOCABULARY,
    assert_close,
    assert_same_values,
    ids_of,
    options_of,
    random_images,
    random_pairs,
    reloaded,
    tiny_clip,
    tiny_metaclip,
    tiny_siglip,
    to_numpy,
    values,
)

# The end token of MetaCLIP 2.
END = 2


def metaclip_pairs(count):
    """Texts of several lengths: words, the end token, padding by 1."""
    pairs = random_pairs(count)
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCABULARY, size=pairs["token_ids"].shape).astype("int32")
    ids[:, 0] = 0
    for row, length in enumerate(2 + np.arange(count) % (ids.shape[1] - 2)):
        ids[row, length] = END
        ids[row, length + 1 :] = 1
    return {**pairs, "token_ids": ids}


# Maker, layer that has the temperature, pixel mean and deviation, and pairs.
KINDS = {
    "clip": (
        tiny_clip,
        "clip_head",
        (CLIP_MEAN, CLIP_STD),
        random_pairs,
    ),
    "metaclip": (
        tiny_metaclip,
        "metaclip_2_head",
        (CLIP_MEAN, CLIP_STD),
        metaclip_pairs,
    ),
    "siglip": (
        tiny_siglip,
        "siglip_head",
        (SIGLIP_MEAN, SIGLIP_MEAN),
        random_pairs,
    ),
}


def scale_and_bias(model):
    weights = model.head.scale, model.head.logit_bias
    return [float(x) for x in weights if x is not None]


def embeddings_of(backbone, inputs):
    images = backbone.get_vision_embeddings(inputs["images"])
    return [*map(to_numpy, (images, backbone.get_text_embeddings(inputs["token_ids"])))]


@functools.cache
def train(kind):
    """A backbone, the model that trained it, its pairs, and what both make of them."""
    make, head, statistics, make_pairs = KINDS[kind]
    keras.utils.set_random_seed(0)
    backbone = make()
    masking = kcm.ClusterMasking(patch_size=4, mask_ratio=0.5, seed=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    before = values(backbone.weights)
    model.compile(optimizer=keras.optimizers.Adam(0.01), **FAST)
    pairs = make_pairs(8)
    model.fit(pairs, batch_size=8, verbose=0)
    mean, std = (np.array(x, "float32") for x in statistics)
    inputs = {**pairs, "images": (pairs["images"].astype("float32") / 255 - mean) / std}
    return SimpleNamespace(
        kind=kind,
        backbone=backbone,
        head=getattr(backbone, head),
        model=model,
        pairs=pairs,
        before=before,
        predicted=model.predict(pairs, verbose=0),
        inputs=inputs,
        embedded=embeddings_of(backbone, inputs),
    )


@pytest.fixture(params=KINDS)
def trained(request):
    return train(request.param)


@pytest.fixture
def metaclip():
    return train("metaclip")


# === All backbones ===


@pytest.mark.slow_to_compile
def test_embeddings_logits_and_loss_are_the_backbones_own(trained):
    model, found = trained.model, trained.predicted
    is_siglip = trained.kind == "siglip"
    assert model.resize == ("squash" if is_siglip else "crop")
    for one, other in zip(found.values(), trained.embedded):
        other = other / np.linalg.norm(other, axis=1, keepdims=True)
        assert_close(one, other, 1e-5 if is_siglip else 1e-6)
    logits = float(model.head.scale) * np.dot(
        found["image_embeddings"], found["text_embeddings"].T
    )
    expected = to_numpy(trained.backbone(trained.inputs)["vision_logits"])
    if is_siglip:
        logits += float(model.head.logit_bias)
        signs = 2.0 * np.eye(8) - 1.0
        loss = np.logaddexp(0.0, -signs * expected).sum(axis=1).mean()
        logs = model.evaluate(trained.pairs, verbose=0, return_dict=True)
        assert logs["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(logits, expected, 1e-5 if is_siglip else 1e-4)


@pytest.mark.any_backend
def test_a_fit_trains_all_of_the_backbone(trained):
    still = [
        v.path
        for v, old in zip(trained.backbone.weights, trained.before)
        if v.trainable and np.array_equal(ops.convert_to_numpy(v), old)
    ]
    # A key's bias has no influence on a softmax over keys, except by rounding.
    assert all("key" in path and "bias" in path for path in still), still


@pytest.mark.any_backend
def test_the_model_adds_the_weights_of_the_masking_and_nothing_else(trained, tmp_path):
    loaded = reloaded(trained.model, tmp_path)
    assert type(loaded) is kcm.ContrastiveModel
    assert options_of(loaded) == options_of(trained.model)
    assert_same_values(loaded.predict(trained.pairs, verbose=0), trained.predicted)
    for model in (trained.model, loaded):
        assert len(model.weights) == len(ids_of(model.weights))
        own = ids_of(model.backbone.weights) | ids_of(model.masking.weights)
        assert ids_of(model.weights) == own
        head = getattr(model.backbone, KINDS[trained.kind][1])
        assert model.head.logit_scale is head.logit_scale
        if trained.kind == "siglip":
            assert model.head.logit_bias is head.logit_bias


@pytest.mark.any_backend
def test_keras_hub_alone_reads_what_was_trained(trained, tmp_path):
    trained.backbone.save_to_preset(str(tmp_path))
    loaded = type(trained.backbone).from_preset(str(tmp_path))
    assert_same_values(embeddings_of(loaded, trained.inputs), trained.embedded)
    masking = kcm.RandomMasking(0.25)
    again = kcm.ContrastiveModel.from_preset(
        tmp_path, masking=masking, duplicates="negative"
    )
    assert type(again) is type(trained.model)
    assert (again.masking, again.duplicates) == (masking, "negative")
    assert_close(again.predict(trained.pairs, verbose=0), trained.predicted)
    expected = scale_and_bias(trained.model)
    assert scale_and_bias(again) == pytest.approx(expected, rel=1e-6)


@pytest.mark.any_backend
def test_a_preset_has_the_tokenizer_too(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    # As a preset of keras_hub, which would be downloaded.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("kagglehub.model_download", pytest.fail)
    folder = "clip_vit_base_patch16"
    tokenizer = kcm.data.CLIPTokenizer.train(["a red cat, é"] * 4, 600, 9)
    backbone = kcm.models.clip_backbone("tiny", 16, tokenizer.vocabulary_size, 9, 4)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    with pytest.raises(ValueError, match=r"`tokenizer` .*without one.*Received: "):
        model.save_to_preset(folder)
    model.tokenizer = tokenizer
    model.save_to_preset(folder)
    texts = ["a red cat", "a CAT &amp; é"]
    assert kcm.data.CLIPTokenizer.from_preset(folder, 5).context_length == 5
    hub = import_keras_hub().models
    theirs = hub.CLIPTokenizer.from_preset(f"./{folder}")
    theirs = hub.CLIPPreprocessor(theirs, None, 9)
    loaded = kcm.ContrastiveModel.from_preset(folder)
    assert_same_values(loaded.tokenizer(texts), tokenizer(texts))
    given = kcm.ContrastiveModel.from_preset(folder, tokenizer=theirs)
    assert given.tokenizer is theirs
    for each in (folder, given):
        found = kcm.evaluation.embed_texts(each, texts[:1], verbose=0)
        assert_close(found, model.encode_text(tokenizer(texts[:1])))


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("make", "preprocessor"),
    [
        (tiny_siglip, "SigLIPPreprocessor"),
        (tiny_metaclip, "MetaCLIP2CausalLMPreprocessor"),
    ],
)
def test_a_preset_has_the_preprocessor_of_its_family(make, preprocessor, tmp_path):
    pytest.importorskip("tensorflow")
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    hub, backbone, file = import_keras_hub().models, make(), io.BytesIO()
    pieces = {"unk_id": 2, "pad_id": 0, "eos_id": 1, "bos_id": -1}
    pieces.update(pad_piece="<pad>", eos_piece="</s>", unk_piece="<unk>")
    texts = ["a dog runs in the snow", "two cats sit on a mat"] * 20
    trainer.train(
        sentence_iterator=iter(texts), model_writer=file, vocab_size=20, **pieces
    )
    family = preprocessor.split("Pre")[0].removesuffix("CausalLM")
    tokenizer = getattr(hub, f"{family}Tokenizer")(file.getvalue())
    length = backbone.text_encoder.max_sequence_length
    given = getattr(hub, preprocessor)(tokenizer, sequence_length=length)
    backbone.save_to_preset(str(tmp_path))
    assert kcm.ContrastiveModel.from_preset(tmp_path).tokenizer is None
    given.save_to_preset(str(tmp_path))
    model = kcm.ContrastiveModel.from_preset(tmp_path)
    assert type(model.tokenizer) is type(given)
    expected = tokenize(given, texts[:2])
    for each in (model, reloaded(model, tmp_path)):
        assert_same_values(tokenize(each.tokenizer, texts[:2]), expected)


# === Precision ===


@pytest.mark.one_case
@pytest.mark.parametrize(
    ("kind", "by_policy"), [("clip", False), ("clip", True), ("siglip", False)]
)
def test_mixed_precision_gives_float32_unit_vectors_and_a_float32_scale(
    kind, by_policy
):
    if by_policy:
        keras.config.set_dtype_policy("mixed_bfloat16")
    backbone = KINDS[kind][0](None if by_policy else "mixed_bfloat16")
    masking = kcm.ClusterMasking(patch_size=4, seed=1)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    getattr(backbone, KINDS[kind][1]).logit_scale.assign(2.71828)
    pairs = random_pairs(4)
    model.compile(optimizer=keras.optimizers.SGD(0.0), **FAST)
    for embeddings in model.predict(pairs, verbose=0).values():
        assert embeddings.dtype == "float32"
        lengths = np.linalg.norm(embeddings, axis=1)
        np.testing.assert_allclose(lengths, 1.0, atol=1e-5)
    history = model.fit(pairs, batch_size=4, verbose=0).history
    temperature = math.exp(-np.float32(2.71828))
    assert history["temperature"][0] == pytest.approx(temperature, rel=1e-6)
    assert np.isfinite(history["loss"][0])


class SpyMasking(kcm.RandomMasking):
    """Keeps the images that it was given."""

    def score(self, noise, images=None, tokens=None):
        self.seen = keras.backend.standardize_dtype(images.dtype), to_numpy(images)
        return noise


@pytest.mark.any_backend
@pytest.mark.parametrize("by_policy", [False, True])
def test_a_masking_sees_images_in_full_precision_in_mixed_precision(by_policy):
    images, mixed = random_images(4), "mixed_bfloat16"
    if by_policy:
        keras.config.set_dtype_policy(mixed)
    masking = SpyMasking(0.5)
    backbone = tiny_clip(None if by_policy else mixed)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    model.encode_image(images, training=True)
    assert masking.seen[0] == "float32"
    assert_same_values(masking.seen[1], images)


# === Temperature and bias ===


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_temperature_and_bias_are_the_backbones_unless_given(kind):
    backbone = KINDS[kind][0]()
    getattr(backbone, KINDS[kind][1]).logit_scale.assign(1.5)
    bias = [-3.0] if kind == "siglip" else []
    if bias:
        backbone.siglip_head.logit_bias.assign(-3.0)
    kept = kcm.ContrastiveModel.from_backbone(backbone)
    assert scale_and_bias(kept) == pytest.approx([math.exp(1.5), *bias])
    head = ContrastiveHead(kept.head.loss, initial_temperature=0.5)
    given = kcm.ContrastiveModel.from_backbone(backbone, head=head)
    assert float(given.head.scale) == pytest.approx(2.0)
    if keras.backend.backend() == "jax":
        # A Python number would change its type with the first step, and have the
        # second compiled again.
        assert not given.head.logit_scale.value.weak_type


@pytest.mark.any_backend
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize(("temperature", "scale"), [(None, 10.0), (0.05, 20.0)])
def test_a_sigmoid_loss_starts_where_siglip_did(kind, temperature, scale):
    head = ContrastiveHead("sigmoid", initial_temperature=temperature)
    model = kcm.ContrastiveModel.from_backbone(KINDS[kind][0](), head=head)
    found, bias = scale_and_bias(model)
    assert found == pytest.approx(scale, rel=1e-6)
    assert bias == -10.0
    added = len(model.weights) - len(model.backbone.weights)
    assert added == (kind == "clip")


@pytest.mark.one_case
@pytest.mark.parametrize(("kind", "log_scale"), [("clip", 4.6052), ("siglip", 4.77)])
def test_the_scale_of_a_trained_backbone_is_never_lowered_to_a_limit(
    kind, log_scale, tmp_path
):
    backbone = KINDS[kind][0]()
    getattr(backbone, KINDS[kind][1]).logit_scale.assign(log_scale)
    model = kcm.ContrastiveModel.from_backbone(backbone)
    assert float(model.head.scale) == pytest.approx(math.exp(log_scale), rel=1e-6)
    for each in (model, reloaded(model, tmp_path)):
        each.compile(optimizer=keras.optimizers.SGD(0.0), **FAST)
        each.fit(random_pairs(4), batch_size=4, verbose=0)
        assert float(each.head.logit_scale) == np.float32(log_scale)
        # A step lowers it, and nothing raises it above a limit.
        each.head.logit_scale.assign(9.0)
        limit = {"clip": math.exp(log_scale), "siglip": 1000.0}[kind]
        assert float(each.head.scale) == pytest.approx(limit, rel=1e-6)


@pytest.mark.any_backend
def test_the_softmax_loss_leaves_the_bias_of_siglip_alone():
    fresh = kcm.ContrastiveModel.from_backbone(tiny_siglip(), loss="softmax")
    assert float(fresh.head.scale) == pytest.approx(1 / 0.07)
    backbone = tiny_siglip()
    backbone.siglip_head.logit_scale.assign(math.log(14.0))
    model = kcm.ContrastiveModel.from_backbone(backbone, loss="softmax")
    model.compile(optimizer=keras.optimizers.SGD(0.1), **FAST)
    model.fit(random_pairs(4), batch_size=4, verbose=0)
    assert float(backbone.siglip_head.logit_bias) == 0.0
    assert float(model.head.scale) != pytest.approx(14.0, rel=1e-6)


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("saved", "loaded"), [(None, "random"), ("cluster", "random"), ("random", None)]
)
def test_weights_load_into_a_model_with_another_masking(saved, loaded, tmp_path):
    source, target = (
        kcm.ContrastiveModel.from_backbone(
            tiny_clip(), masking=None if kind is None else MASKINGS[kind]()
        )
        for kind in (saved, loaded)
    )
    source.save_weights(tmp_path / "model.weights.h5")
    target.load_weights(tmp_path / "model.weights.h5")
    assert_same_values(target.backbone.weights, source.backbone.weights)


@pytest.mark.any_backend
def test_siglip_says_how_many_tokens_a_text_must_have():
    model = kcm.ContrastiveModel.from_backbone(tiny_siglip())
    model.compile("sgd", run_eagerly=True)
    pairs = random_pairs(4)
    # Keras would repeat a single token.
    for length, embed in ((4, model.fit), (1, model.train_on_batch)):
        texts = {**pairs, "token_ids": pairs["token_ids"][:, :length]}
        message = rf"must have 6 .* pad .*Received: {length} "
        with pytest.raises(ValueError, match=message):
            embed(texts)


# === Positions of CLIP ===


@pytest.mark.any_backend
@pytest.mark.parametrize("is_fresh", [True, False])
def test_a_fresh_clip_gets_its_patches_numbered_and_another_keeps_them(is_fresh):
    backbone = tiny_clip()
    ids = backbone.vision_encoder.embedding.position_ids
    expected = np.arange(17)[None]
    if is_fresh:
        assert not ops.convert_to_numpy(ids).any()
    else:
        expected = expected[:, ::-1].copy()
        ids.assign(expected)
    kcm.ContrastiveModel.from_backbone(backbone)
    assert_same_values(ids, expected)


# === MetaCLIP 2: texts are pooled at the end token ===


def without_end(pairs, row):
    ids = pairs["token_ids"].copy()
    ids[row][ids[row] == END] = 5
    return {**pairs, "token_ids": ids}


@pytest.mark.any_backend
def test_texts_without_the_end_token_are_refused_by_number(metaclip):
    wrong = without_end(metaclip.pairs, row=5)
    with pytest.raises(ValueError, match=r"`token_ids`.*end token, 2.*row 5"):
        metaclip.model.fit(wrong, batch_size=8, verbose=0)


@pytest.mark.slow_to_compile
def test_unchecked_texts_without_the_end_token_have_no_embedding(metaclip):
    ids = without_end(metaclip.pairs, row=5)["token_ids"]
    found = to_numpy(metaclip.model.text_tower(ids))
    assert_same_values(np.isnan(found).any(axis=1), np.arange(8) == 5)


@pytest.mark.any_backend
def test_statistics_of_pixels_that_were_given_are_saved(tmp_path):
    statistics = {"pixel_mean": [0.1, 0.2, 0.3], "pixel_std": [0.5, 0.6, 0.7]}
    model = kcm.ContrastiveModel.from_backbone(tiny_clip(), **statistics)
    for each in (model, reloaded(model, tmp_path)):
        assert {name: getattr(each, name) for name in statistics} == statistics


# === Refusals ===


@pytest.mark.any_backend
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"backbone": "clip_vit_base_patch16"}, "`backbone`"),
        ({"dtype": "mixed_bfloat16", "projection_dim": 8}, "`dtype` and `projection_"),
        ({"head": "mlp"}, "`head`"),
    ],
)
def test_what_fits_no_backbone_is_refused(options, match):
    with pytest.raises(ValueError, match=rf"{match}.*Received: "):
        kcm.ContrastiveModel.from_backbone(**{"backbone": tiny_clip(), **options})


@pytest.mark.any_backend
def test_models_share_a_head_of_the_same_backbone_alone():
    backbone, of_backbone = tiny_clip(), kcm.ContrastiveModel.from_backbone
    head = of_backbone(backbone).head
    assert of_backbone(backbone, head=head).head is head
    with pytest.raises(ValueError, match=r"`head` must be .*Received: "):
        of_backbone(tiny_clip(), head=head)


@pytest.mark.any_backend
def test_an_invalid_option_leaves_the_backbone_as_it_was():
    backbone = tiny_clip()
    before = to_numpy(backbone.clip_head.logit_scale)
    head = ContrastiveHead("softmax", initial_temperature=0.5)
    with pytest.raises(ValueError, match=r"`loss`.*Received: "):
        kcm.ContrastiveModel.from_backbone(backbone, loss="sigmoid", head=head)
    assert to_numpy(backbone.clip_head.logit_scale) == before
