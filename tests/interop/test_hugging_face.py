"""CLIP and SigLIP of transformers, against its own models."""

import json
import sys

import keras_hub
import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.data.tokenizing import tokenize
from keras_cluster_mask.encoders.families import CLIP_MEAN
from keras_cluster_mask.interop import load_hugging_face
from keras_cluster_mask.interop.configs import flatten
from keras_cluster_mask.interop.hugging_face import ENTRIES, PARTS
from tests.helpers import assert_close, assert_same_values, reloaded, to_numpy
from tests.interop.open_clip_models import (
    CONTEXT,
    VOCABULARY,
    batch,
    ended_by,
    our_embeddings,
    randomize,
)
from tests.training.test_model_tokenizer import hugging_face

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.any_backend

TEXT = dict(
    vocab_size=VOCABULARY,
    max_position_embeddings=CONTEXT,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
)
VISION = dict(
    image_size=16,
    patch_size=8,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=3,
)
END = VOCABULARY - 1


def made(kind, text=(), vision=(), **options):
    """A model of transformers with weights of its own."""
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, **dict(text)},
        vision_config={**VISION, **dict(vision)},
        **options,
    )
    return randomize(getattr(transformers, f"{kind}Model")(config))


def clip(text=(), vision=()):
    return made("CLIP", {"eos_token_id": END, **dict(text)}, vision, projection_dim=24)


def siglip(text=(), vision=()):
    return made("Siglip", {"projection_size": 48, **dict(text)}, vision)


def their_embeddings(model, images, ids):
    import torch

    with torch.no_grad():
        found = model(
            pixel_values=torch.tensor(images).permute(0, 3, 1, 2),
            input_ids=torch.tensor(ids).long(),
        )
    return found.image_embeds.numpy(), found.text_embeds.numpy()


def assert_same_embeddings(model, reference):
    images, ids = batch()
    expected = their_embeddings(reference, images, ids)
    assert_close(our_embeddings(model, images, ids), expected, atol=2e-6)


def change_json(path, **changes):
    """Changes entries of a file of JSON; `a__b` is entry b of dictionary a."""
    config = json.loads(path.read_text())
    for key, value in changes.items():
        part, _, name = key.rpartition("__")
        (config[part] if part else config)[name] = value
    path.write_text(json.dumps(config))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(clip_folder, tmp_path):
    """A copy of a CLIP's folder, to change."""
    for path in clip_folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# === Tokenizers ===


def test_a_tokenizer_in_the_folder_is_that_of_the_model(folder, monkeypatch):
    assert load_hugging_face(folder).tokenizer is None
    texts = ["a red dog", "the sea"]
    theirs = hugging_face(29)
    theirs.save_pretrained(folder)
    found = tokenize(load_hugging_face(folder).tokenizer, texts)
    np.testing.assert_array_equal(found, tokenize(theirs, texts, CONTEXT))
    # The files of a CLIP need no further package.
    ours = kcm.data.CLIPTokenizer.train(texts, 516, CONTEXT)
    ours.save_to_preset(folder / "ours")
    assets = folder / "ours" / "assets" / "tokenizer"
    (assets / "vocabulary.json").rename(folder / "vocab.json")
    (assets / "merges.txt").rename(folder / "merges.txt")
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = load_hugging_face(folder).tokenizer
    np.testing.assert_array_equal(found(texts), ours(texts))
    # Weights are read whatever the tokenizer's files are.
    (folder / "vocab.json").write_text("{}")
    with pytest.warns(UserWarning, match=r"`model.tokenizer`.*Received: "):
        assert load_hugging_face(folder).tokenizer is None


# === Embeddings ===


@pytest.mark.filterwarnings("ignore:The model was trained on images resized")
@pytest.mark.parametrize(
    ("make", "backbone", "activation"),
    [
        (clip, "CLIPBackbone", "quick_gelu"),
        (clip, "CLIPBackbone", "gelu"),
        (siglip, "SigLIPBackbone", "gelu_pytorch_tanh"),
        (siglip, "SigLIPBackbone", "gelu"),
    ],
)
def test_embeddings_are_those_of_transformers(tmp_path, make, backbone, activation):
    act = {"hidden_act": activation}
    reference = make(act, act)
    reference.save_pretrained(tmp_path)
    model = load_hugging_face(tmp_path, pixel_mean=(0.1, 0.2, 0.3))
    assert isinstance(model.backbone, getattr(keras_hub.models, backbone))
    for each in (model, reloaded(model, tmp_path)):
        assert_same_embeddings(each, reference)
        assert each.pixel_mean == [0.1, 0.2, 0.3]
        scale = reference.logit_scale.exp().item()
        assert to_numpy(each.head.scale) == pytest.approx(scale)
        assert each.head.loss == ("sigmoid" if make is siglip else "softmax")
        if make is siglip:
            bias = reference.logit_bias.item()
            assert to_numpy(each.head.logit_bias) == pytest.approx(bias)


def test_weights_of_torch_and_those_in_several_files_are_read(folder):
    import torch

    expected = load_hugging_face(folder).get_weights()
    reference = transformers.CLIPModel.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(reference.state_dict(), folder / "pytorch_model.bin")
    assert_same_values(load_hugging_face(folder).get_weights(), expected)
    reference.save_pretrained(folder, max_shard_size="50KB")
    assert len([*folder.glob("model-*.safetensors")]) > 1
    (folder / "pytorch_model.bin").unlink()
    for source in (folder, folder / "model.safetensors.index.json"):
        assert_same_values(load_hugging_face(source).get_weights(), expected)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`source` cannot be read.*index.json"):
        load_hugging_face(folder)


def test_old_configs_pool_at_the_highest_id_and_have_second_dictionaries_that_win(
    folder,
):
    config = json.loads((folder / "config.json").read_text())
    change_json(
        folder / "config.json",
        # As OpenAI's own on the Hugging Face hub have it.
        text_config_dict={**config["text_config"], "eos_token_id": 2},
        vision_config_dict=config["vision_config"],
        text_config__hidden_act="gelu",
        vision_config__hidden_act="gelu",
    )
    reference = transformers.CLIPModel.from_pretrained(folder).eval()
    assert reference.text_model.eos_token_id == 2
    assert_same_embeddings(load_hugging_face(folder), reference)


def test_what_a_config_leaves_out_has_the_default_of_transformers():
    for family, config in (
        ("CLIP", transformers.CLIPConfig()),
        ("SigLIP", transformers.SiglipConfig()),
    ):
        theirs = flatten(config.to_dict(), PARTS)
        for key, entry in ENTRIES[family].items():
            assert theirs[key] == entry.default, key
        assert theirs.get("text_config.eos_token_id", 49407) == 49407


def test_options_of_from_backbone_take_precedence_over_the_files(folder):
    config = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.1]}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    model = load_hugging_face(
        folder,
        dtype="mixed_bfloat16",
        masking=kcm.ClusterMasking(patch_size=8),
        pixel_mean=(0.1, 0.2, 0.3),
        loss="sigmoid",
    )
    block = model.backbone.vision_encoder.encoder_layers[0]
    assert block.compute_dtype == "bfloat16"
    assert isinstance(model.masking, kcm.ClusterMasking)
    assert model.pixel_mean == [0.1, 0.2, 0.3]
    assert model.pixel_std == [0.3, 0.2, 0.1]
    assert model.head.loss == "sigmoid"


def test_keras_hub_reads_a_metaclip_2(tmp_path):
    reference = made("MetaClip2", {"eos_token_id": 2}, projection_dim=24)
    reference.save_pretrained(tmp_path)
    hugging_face(2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"For a MetaCLIP 2.*from_preset.*Received: "):
        load_hugging_face(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = kcm.ContrastiveModel.from_preset(tmp_path, tokenizer=tokenizer)
    assert model.pixel_mean == [*CLIP_MEAN]
    images, ids = batch()
    ids = ended_by(ids)
    expected = their_embeddings(reference, images, ids)
    assert_close(our_embeddings(model, images, ids), expected, atol=2e-6)


# === Pixels ===


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_those_of_the_image_processor(folder, name):
    assert load_hugging_face(folder).pixel_mean == [*CLIP_MEAN]
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_mean=[0.1, 0.2, 0.3],
    )
    config = processor.to_dict()
    if name == "processor_config.json":
        config = {"image_processor": config}
    (folder / name).write_text(json.dumps(config))
    pixels = np.arange(16 * 16 * 3).reshape(16, 16, 3).astype("uint8")
    expected = processor(pixels, return_tensors="np")["pixel_values"][0]
    (found,) = load_hugging_face(folder).image_tower.prepare(pixels[None])
    assert_close([found], [expected.transpose(1, 2, 0)], atol=1e-5)


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        ({"do_normalize": False, "rescale_factor": 1 / 255}, 0.0, 1.0),
        ({"do_normalize": None}, 0.0, 1.0),
        ({"image_mean": 0, "image_std": 0.25}, 0.0, 0.25),
    ],
)
def test_pixels_may_be_scaled_only_or_alike_in_all_channels(folder, config, mean, std):
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    model = load_hugging_face(folder)
    assert (model.pixel_mean, model.pixel_std) == ([mean] * 3, [std] * 3)


def test_a_model_resizes_images_as_its_files_say(folder, tmp_path, recwarn):
    path = folder / "preprocessor_config.json"
    path.write_text(json.dumps({"size": {"shortest_edge": 16}}))
    assert load_hugging_face(folder).resize == "crop"
    path.write_text(json.dumps({"size": {"height": 16, "width": 16}}))
    assert load_hugging_face(folder).resize == "squash"
    siglip().save_pretrained(tmp_path / "siglip")
    assert load_hugging_face(tmp_path / "siglip").resize == "squash"
    assert not [x for x in recwarn if x.category is UserWarning]
    path.write_text(json.dumps({"size": 24, "crop_size": 16}))
    with pytest.warns(UserWarning, match="resized by 'size=24'.*resize='squash'"):
        load_hugging_face(folder)
    assert load_hugging_face(folder, resize="squash").resize == "squash"
    path = tmp_path / "siglip" / "preprocessor_config.json"
    path.write_text(json.dumps({"size": {"height": 24, "width": 24}}))
    with pytest.raises(ValueError, match=r"size=.*24.* is not the image size 16"):
        load_hugging_face(tmp_path / "siglip")


# === Errors ===


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text_config__eos_token_id", 5),
        ("text_config__hidden_act", "gelu"),
        ("text_config__hidden_act", "relu"),
        ("text_config__layer_norm_eps", 1e-6),
        ("vision_config__layer_norm_eps", 1e-6),
        ("vision_config__num_channels", 1),
        ("vision_config__image_size", [16, 24]),
        ("text_config__num_hidden_layers", 0),
        ("text_config__vocab_size", "40"),
        ("projection_dim", None),
        ("model_type", "siglip2"),
        # Of SigLIP.
        ("text_config__projection_size", 24),
        ("vision_config__vision_use_head", False),
    ],
)
def test_what_a_model_cannot_hold_is_refused_by_name(folder, key, value):
    name = key.rpartition("__")[2].removesuffix("_dim")
    kind = "siglip" if name in ("projection_size", "vision_use_head") else "clip"
    change_json(folder / "config.json", **{"model_type": kind, key: value})
    with pytest.raises(ValueError, match=rf"{name}.*Received: source="):
        load_hugging_face(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("do_rescale", False),
        ("do_rescale", None),
        ("rescale_factor", 1.0),
        ("image_mean", [0.5]),
        ("image_mean", ["0.5"] * 3),
        ("image_std", 0),
        ("image_std", [0.5, 0.5, float("nan")]),
        ("crop_size", 24),
        ("crop_size", {"height": 16, "width": 24}),
    ],
)
def test_preprocessing_that_cannot_be_followed_is_refused(folder, key, value):
    (folder / "preprocessor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match=rf"config.json: {key}.*Received: source"):
        load_hugging_face(folder)


def test_what_is_not_there_is_said(folder, tmp_path_factory):
    with pytest.raises(FileNotFoundError, match=r"snapshot_download.*source='none'"):
        load_hugging_face("none")
    with pytest.raises(FileNotFoundError, match=r"`source`.*model.safetensors"):
        load_hugging_face(tmp_path_factory.mktemp("empty"))
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_hugging_face(folder)
