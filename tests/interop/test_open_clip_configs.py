"""Configs of open_clip: followed, or refused for what CLIP cannot hold."""

import copy
import dataclasses
import json
import math

import keras
import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders import families
from keras_cluster_mask.encoders.architecture import TOWER
from keras_cluster_mask.interop import (
    load_open_clip,
    open_clip_state_dict,
    save_open_clip,
)
from keras_cluster_mask.interop.open_clip_configs import (
    FIXED,
    IGNORED,
    READ,
    read_config,
    write_config,
)
from tests.helpers import assert_close, assert_same_values, to_numpy
from tests.interop.open_clip_models import (
    arrays,
    batch,
    embeddings,
    ended_by,
    open_clip_model,
    our_embeddings,
    tiny_backbone,
    tiny_config,
)

pytestmark = pytest.mark.any_backend

CONFIG = tiny_config(quick_gelu=True)
CONFIG["vision_cfg"].update(width=96, head_width=24, mlp_ratio=3.3, patch_dropout=0.5)
CONFIG["text_cfg"].update(heads=4, hf_tokenizer_name="anything")
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "size": [16, 16]}


def preprocessed(**preprocessing):
    return {"model_cfg": CONFIG, "preprocess_cfg": preprocessing}


WHOLE = preprocessed(**PREPROCESSING)


def changed(**changes):
    """`CONFIG` with entries of its two towers, or of itself, changed."""
    config = copy.deepcopy(CONFIG)
    for key, value in changes.items():
        part, _, name = key.partition("__")
        if name:
            config[part][name] = value
        else:
            config[part] = value
    return config


def assert_same_embeddings(model, reference):
    images, ids = batch()
    if reference.text_pool_type == "eos":
        ids = ended_by(ids, reference.text_eos_id)
    expected = embeddings(reference, images, ids)
    assert_close(our_embeddings(model, images, ids), expected, atol=1e-5)


def assert_pixels(model, preprocessing):
    assert model.pixel_mean == preprocessing["mean"]
    assert model.pixel_std == preprocessing["std"]


# === Where a config comes from ===


def test_a_config_says_heads_activation_and_pixels(tmp_path):
    import torch

    reference = open_clip_model(CONFIG)
    state, path = reference.state_dict(), tmp_path / "open_clip_config.json"
    torch.save(state, tmp_path / "open_clip_pytorch_model.bin")
    path.write_text(json.dumps(WHOLE))
    of_clip = {"mean": [*families.CLIP_MEAN], "std": [*families.CLIP_STD]}
    for source, config, preprocessing in (
        (state, WHOLE, PREPROCESSING),
        (state, path, PREPROCESSING),
        (tmp_path, None, PREPROCESSING),
        (state, CONFIG, of_clip),
    ):
        model = load_open_clip(source, config)
        assert model.backbone.vision_encoder.num_heads == 4
        assert model.backbone.text_encoder.num_heads == 4
        assert_pixels(model, preprocessing)
        assert_same_embeddings(model, reference)


def test_a_named_config_is_that_of_the_installed_open_clip():
    pytest.importorskip("open_clip")
    for name in ("ViT-B-32-quickgelu", "ViT-L/14"):
        assert read_config(name).image_layers in (12, 24)


def test_a_named_config_needs_open_clip(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install open_clip_torch.*config='ViT"):
        load_open_clip({}, "ViT-B-32")


def test_a_model_resizes_images_as_its_config_says(recwarn, tmp_path):
    state = open_clip_model(CONFIG).state_dict()
    with pytest.warns(UserWarning, match="'longest'.*resize='squash'"):
        model = load_open_clip(state, preprocessed(resize_mode="longest"))
    assert model.resize == "crop"
    recwarn.clear()
    load_open_clip(state, preprocessed(interpolation="bicubic", resize_mode=None))
    model = load_open_clip(state, preprocessed(resize_mode="squash"))
    assert model.resize == "squash"
    save_open_clip(model, tmp_path / "clip.safetensors")
    assert load_open_clip(tmp_path / "clip.safetensors").resize == "squash"
    assert not [x for x in recwarn if x.category is UserWarning]


# === What is refused ===


CANNOT_BE_HELD = [
    ("vision_cfg__timm_model_name", "vit_base_patch16_siglip_256"),
    ("vision_cfg__layers", [3, 4, 6, 3]),
    ("vision_cfg__pool_type", "avg"),
    ("vision_cfg__ls_init_value", 0.0),
    ("vision_cfg__norm_kwargs", {"eps": 1e-6}),
    ("vision_cfg__image_size", [16, 24]),
    ("vision_cfg__mlp_ratio", float("inf")),
    ("vision_cfg__unheard_of", None),
    ("text_cfg__pool_type", "last"),
    ("text_cfg__proj_type", "none"),
    ("text_cfg__vocab_size", "many"),
    ("multimodal_cfg", {}),
    ("unheard_of", 1),
    ("embed_dim", None),
]


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("config", 3),
        ("config", "ViT-B-32-quick"),
        ("embed_dim", {}),
        ("load_hugging_face", {"text_config": {}, "vision_config": {}}),
        *((key.rpartition("__")[2], changed(**{key: x})) for key, x in CANNOT_BE_HELD),
        # keras_hub pools texts of MetaCLIP 2 at the id 2.
        ("eos_id", changed(text_cfg__pool_type="eos", text_cfg__eos_id=1)),
        ("size", preprocessed(size=32)),
        ("mode", preprocessed(mode="L")),
        ("mean", preprocessed(mean=[0.5, 0.5])),
        ("mean", preprocessed(mean=[0.5, 0.5, float("nan")])),
        ("mean", preprocessed(mean="0.5")),
        ("mean", preprocessed(mean=0.5)),
        ("std", preprocessed(std=[0.2, 0.2, -0.2])),
        ("std", preprocessed(std=0)),
        ("unheard_of", preprocessed(unheard_of=1)),
        # All reasons are listed.
        (
            "text_cfg.proj_bias.*vision_cfg.pool_type",
            changed(vision_cfg__pool_type="avg", text_cfg__proj_bias=True),
        ),
    ],
)
def test_bad_configs_are_refused_by_name(name, config):
    with pytest.raises(ValueError, match=rf"\b{name}\b.*Received: config"):
        load_open_clip({}, config)


def test_a_file_without_an_object_of_json_is_refused_by_name(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_open_clip({}, path)
    for content in ("{", "[1]", "null"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a JSON object. Received: .*config\."):
            load_open_clip({}, path)


# === Every config of open_clip ===


def test_every_option_of_open_clip_is_known_with_its_default():
    model = pytest.importorskip("open_clip.model")
    for part, kind in (
        ("vision_cfg", model.CLIPVisionCfg),
        ("text_cfg", model.CLIPTextCfg),
    ):
        defaults = {field.name: field.default for field in dataclasses.fields(kind)}
        defaults = {f"{part}.{name}": value for name, value in defaults.items()}
        known = {k: x for k, x in (READ | FIXED).items() if k in defaults}
        others = defaults.keys() - known.keys()
        for start in IGNORED:
            ignored = {key for key in others if key.startswith(start)}
            assert ignored or not start.startswith(part), start
            others -= ignored
        assert not others
        for key, entry in known.items():
            if key in FIXED:
                assert defaults[key] in entry.rule, key
            else:
                assert defaults[key] == entry.default, key


def held():
    """The configs that can be followed, and why others cannot, by name."""
    open_clip = pytest.importorskip("open_clip")
    configs, refused = {}, {}
    for name in open_clip.list_models():
        try:
            read_config(name)
        except ValueError as error:
            refused[name] = str(error)
        else:
            configs[name] = open_clip.get_model_config(name)
    return configs, refused


@pytest.mark.slow
def test_configs_of_open_clip_have_the_sizes_heads_and_activations_of_its_models():
    import torch

    configs, refused = held()
    assert {"ViT-B-32-quickgelu", "ViT-L-14", "ViT-H-14-worldwide"} <= configs.keys()
    for name, config in configs.items():
        with torch.device("meta"):
            model = open_clip_model(config)
        found, visual = read_config(name), model.visual
        image, text = visual.transformer.resblocks, model.transformer.resblocks
        for tower, blocks in (("image", image), ("text", text)):
            inner, heads = blocks[0].mlp.c_fc, blocks[0].attn.num_heads
            expected = inner.in_features, len(blocks), heads, inner.out_features
            sizes = [getattr(found, f"{tower}_{x}") for x in TOWER]
            assert sizes == [*expected], name
        width, channels, *patch = visual.conv1.weight.shape
        assert (width, channels) == (found.image_width, 3), name
        activation = type(image[0].mlp.gelu).__name__
        expected = dataclasses.replace(
            found,
            patch=patch[0],
            image_size=math.isqrt(len(visual.positional_embedding)) * patch[1],
            context=len(model.positional_embedding),
            vocabulary=len(model.token_embedding.weight),
            activation={"GELU": "gelu", "QuickGELU": "quick_gelu"}[activation],
            family={"argmax": "CLIP", "eos": "MetaCLIP2"}[model.text_pool_type],
        )
        assert (found, visual.pool_type) == (expected, "tok"), name
    assert all("Not supported: " in reason for reason in refused.values())


# === Configs that are written ===


def test_metaclip_2_comes_and_goes(tmp_path):
    config = changed(text_cfg__pool_type="eos", text_cfg__eos_id=2)
    reference = open_clip_model(config)
    model = load_open_clip(reference.state_dict(), {**WHOLE, "model_cfg": config})
    assert isinstance(model.backbone, keras_hub.models.MetaCLIP2Backbone)
    assert_same_embeddings(model, reference)
    save_open_clip(model, tmp_path / "clip.safetensors")
    back = load_open_clip(tmp_path / "clip.safetensors")
    assert_same_embeddings(back, reference)
    assert_pixels(back, PREPROCESSING)
    beside = tmp_path / "clip.safetensors.open_clip_config.json"
    written = json.loads(beside.read_text())["model_cfg"]
    # Or open_clip would choose CLIP's tokenizer, which has no such end token.
    assert written["text_cfg"]["hf_tokenizer_name"] == "facebook/xlm-v-base"
    again = open_clip_model(written)
    assert again.text_pool_type == "eos"
    assert again.state_dict().keys() == reference.state_dict().keys()
    assert_same_values(open_clip_state_dict(back), arrays(reference))


def test_open_clip_makes_the_same_model_of_what_is_saved(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    model = kcm.ContrastiveModel.from_backbone(
        tiny_backbone(activation="quick_gelu"),
        loss="sigmoid",
        pixel_mean=PREPROCESSING["mean"],
        pixel_std=PREPROCESSING["std"],
    )
    save_open_clip(model, tmp_path / "open_clip_model.safetensors")
    reference, _, preprocess = open_clip.create_model_and_transforms(
        f"local-dir:{tmp_path}"
    )
    reference.eval()
    assert reference.logit_bias.item() == -10.0
    assert preprocess.transforms[-1].mean == PREPROCESSING["mean"]
    assert preprocess.transforms[-1].std == PREPROCESSING["std"]
    assert_same_embeddings(model, reference)


def test_pixels_that_the_model_takes_as_they_are_come_back_as_they_are(tmp_path):
    model = kcm.ContrastiveModel.from_backbone(tiny_backbone(), pixel_mean=None)
    save_open_clip(model, tmp_path / "clip.safetensors")
    back = load_open_clip(tmp_path / "clip.safetensors")
    images = np.arange(2 * 16 * 16 * 3).reshape(2, 16, 16, 3).astype("uint8")
    found = to_numpy(back.image_tower.prepare(images))
    np.testing.assert_allclose(found, images, atol=1e-3)


def test_weights_do_not_take_the_config_of_other_weights_in_their_folder(tmp_path):
    import torch

    for name in ("clip", "open_clip_model"):
        save_open_clip(tiny_backbone(), tmp_path / f"{name}.safetensors")
    reference = open_clip_model(CONFIG)
    torch.save(reference.state_dict(), tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=r"`config` must be.*config=None"):
        load_open_clip(tmp_path / "clip.pt")
    model = load_open_clip(tmp_path / "clip.pt", CONFIG)
    assert_same_embeddings(model, reference)


@pytest.mark.parametrize(
    ("width", "hidden"), [(96, 316), (1792, 15360), (49, 101), (1664, 8192)]
)
def test_open_clip_computes_the_hidden_width_from_the_ratio_written(width, hidden):
    architecture = dataclasses.replace(
        read_config(CONFIG), image_width=width, image_heads=1, image_hidden=hidden
    )
    found = write_config(architecture, None)["model_cfg"]["vision_cfg"]
    assert int(found["width"] * found["mlp_ratio"]) == hidden


def test_a_model_that_open_clip_cannot_hold_is_not_saved(tmp_path):
    backbone = tiny_backbone(activation="relu")
    with pytest.raises(ValueError, match=r"`model`.*activation.*Received: activation"):
        save_open_clip(backbone, tmp_path / "clip.safetensors")


# === Tokenizers ===


def test_a_model_of_openais_vocabulary_has_its_tokenizer(tmp_path):
    backbone = kcm.models.clip_backbone("tiny", 16, 49408, 77, 8)
    path, texts = tmp_path / "clip.safetensors", ["a CAT &amp; a dog"]
    save_open_clip(backbone, path)
    theirs = pytest.importorskip("open_clip").get_tokenizer("ViT-B-32")
    model = load_open_clip(path)
    np.testing.assert_array_equal(model.tokenizer(texts), theirs(texts))
    assert load_open_clip(path, tokenizer=None).tokenizer is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({}, "clip"),
        ({"vocab_size": 600}, None),
        ({"hf_tokenizer_name": "facebook/xlm-v-base"}, "hugging_face"),
        ({"tokenizer_kwargs": {"clean": "canonicalize"}}, None),
    ],
)
def test_the_config_says_which_tokenizer_a_model_has(text, expected):
    config = {"embed_dim": 24, "vision_cfg": {}, "text_cfg": text}
    assert read_config(config).tokenizer == expected


def shrunk(config):
    """The same config with few and narrow blocks, few patches and few tokens."""
    config = copy.deepcopy(config)
    vision, text = config["vision_cfg"], config["text_cfg"]
    config["embed_dim"] = 24
    head = text["width"] // text["heads"]
    vision.update(
        layers=1,
        width=2 * vision.get("head_width", 64),
        patch_size=8,
        image_size=16,
    )
    text.update(layers=1, width=2 * head, heads=2, vocab_size=40, context_length=7)
    return config


@pytest.mark.slow
def test_small_models_of_every_config_compute_what_open_clips_do():
    configs, _ = held()
    texts = {json.dumps(shrunk(config), sort_keys=True) for config in configs.values()}
    assert len(texts) > 4
    for text in sorted(texts):
        config = json.loads(text)
        reference = open_clip_model(config)
        model = load_open_clip(reference.state_dict(), config)
        assert_same_embeddings(model, reference)
        keras.backend.clear_session()
