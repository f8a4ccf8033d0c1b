"""Models of open_clip whose every weight counts, and what they make of a batch."""

import numpy as np
import pytest

import keras_cluster_mask as kcm
from keras_cluster_mask.interop import load_open_clip

CONTEXT, VOCABULARY = 7, 40


def tiny_config(quick_gelu=False):
    """The config of a CLIP with towers of different widths and depths."""
    vision = dict(layers=2, width=128, head_width=64, patch_size=8, image_size=16)
    text = dict(
        context_length=CONTEXT, vocab_size=VOCABULARY, width=64, heads=1, layers=3
    )
    return {
        "embed_dim": 24,
        "quick_gelu": quick_gelu,
        "vision_cfg": vision,
        "text_cfg": text,
    }


def open_clip_model(config):
    """A model of open_clip's, as `create_model` makes it, with weights of its own."""
    model = pytest.importorskip("open_clip.model")
    config = dict(config)
    kind = model.CustomTextCLIP if config.pop("custom_text", False) else model.CLIP
    return randomize(kind(**config))


def tiny(**options):
    """The CLIP of open_clip with that config, and other options."""
    return open_clip_model({**tiny_config(), **options})


def randomize(model):
    """Moves all weights off where they start.

    Some start at 0 or at 1, so that two of them could be exchanged unseen.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    return model.eval()


def batch(image_size=16, context=CONTEXT, vocabulary=VOCABULARY, rows=3):
    """Normalized images, channels last, and token ids that end in the highest."""
    rng = np.random.default_rng(0)
    images = rng.normal(size=(rows, image_size, image_size, 3)).astype("float32")
    ids = rng.integers(1, vocabulary - 1, (rows, context)).astype("int32")
    for row, end in zip(ids, np.linspace(2, context - 1, rows).astype(int)):
        row[end], row[end + 1 :] = vocabulary - 1, 0
    return images, ids


def ended_by(ids, end=2, highest=VOCABULARY - 1):
    """The same texts with another end token, and other words where it stood."""
    return np.where(ids == highest, end, np.where(ids == end, end + 1, ids))


def embeddings(model, images, ids):
    """What a model of open_clip makes of a batch: two L2-normalized arrays."""
    import torch

    with torch.no_grad():
        pixels = torch.tensor(images).permute(0, 3, 1, 2)
        return (
            model.encode_image(pixels, normalize=True).numpy(),
            model.encode_text(torch.tensor(ids).long(), normalize=True).numpy(),
        )


def our_embeddings(model, images, ids):
    """What a model of Keras makes of the same batch."""
    return [*model.predict({"images": images, "token_ids": ids}, verbose=0).values()]


def tiny_backbone(**options):
    """A CLIP of keras_hub."""
    return kcm.models.clip_backbone("tiny", 16, VOCABULARY, CONTEXT, **options)


def load(source, **options):
    """Loads weights of `tiny()`."""
    return load_open_clip(source, tiny_config(), **options)


def arrays(model):
    return {name: x.numpy().copy() for name, x in model.state_dict().items()}
