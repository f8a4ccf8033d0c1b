"""Training steps of CLIP models with different maskings."""

import dataclasses
import functools

import keras
import numpy as np
from flops import training_flops

import keras_cluster_mask as kcm
from keras_cluster_mask.encoders.architecture import SIZES
from keras_cluster_mask.encoders.text_lengths import rounded_up

VOCABULARY_SIZE, CONTEXT_LENGTH = 49408, 77
# After the name of a method: texts are padded to `CONTEXT_LENGTH`, and not cut to the
# longest of their batch.
PADDED = ", 77 tokens"


def threshold(beta):
    # Any threshold does: shapes, and so the cost, depend on `min_mask_ratio` alone.
    return lambda patch_size: kcm.ClusterMasking(
        0.6, patch_size=patch_size, min_mask_ratio=beta, threshold=0.5
    )


# From a patch size to a masking.
MASKINGS = {
    "none": lambda patch_size: None,
    "random": lambda patch_size: kcm.RandomMasking(0.5),
    "cluster": lambda patch_size: kcm.ClusterMasking(0.5, patch_size=patch_size),
    "threshold, beta 0.5": threshold(0.5),
    "threshold, beta 0.3": threshold(0.3),
    "resized": lambda patch_size: None,
    f"none{PADDED}": lambda patch_size: None,
    f"random{PADDED}": lambda patch_size: kcm.RandomMasking(0.5),
}
OPEN_CLIP = {"open_clip, none": 0.0, "open_clip, patch dropout 0.5": 0.5}


@dataclasses.dataclass
class Setting:
    """What is trained, and how; the same for every method.

    Args:
        size: Of the model, as for `kcm.models.clip_backbone`.
        image_size: Integer. The side of whole images in pixels.
        batch_size: Integer.
        dtype: A Keras dtype policy.
        optimizer: `"adamw"`, or `"sgd"` without momentum, which costs next to nothing
            and so leaves the models alone to be compared.
        jit: Whether to compile on torch too, open_clip's model as well.
        captions: A source of captions, which `kcm.data.read_captions` takes; or `None`
            for texts of random ids that fill the context.
        caption_key: The field of the captions.
    """

    size: str = "vit_b_16"
    image_size: int = 224
    batch_size: int = 8
    dtype: str = "float32"
    optimizer: str = "adamw"
    jit: bool = False
    captions: str | None = None
    caption_key: str = "json.captions"

    @classmethod
    def of(cls, options, **others):
        """The setting that command-line arguments ask for, and other fields."""
        fields = {field.name for field in dataclasses.fields(cls)} - {*others}
        return cls(**{name: getattr(options, name) for name in fields}, **others)

    def __str__(self):
        model = f"{self.size} at {self.image_size} px, batch {self.batch_size}"
        return f"{keras.backend.backend()}, {model}, {self.dtype}, {self.optimizer}"

    @property
    def patch_size(self):
        return SIZES[self.size].patch

    def side(self, name):
        """The side of the images that a method reads, in pixels."""
        if name != "resized":
            return self.image_size
        # The square nearest to half as many patches.
        half = (self.image_size // self.patch_size) ** 2 / 2
        return round(half**0.5) * self.patch_size

    @functools.cached_property
    def token_ids(self):
        """The ids of the first captions of the source, or random ones."""
        if self.captions is None:
            rng = np.random.default_rng(1)
            shape = self.batch_size, CONTEXT_LENGTH
            token_ids = rng.integers(1, VOCABULARY_SIZE - 1, shape)
            token_ids[:, -1] = VOCABULARY_SIZE - 1
            return token_ids
        captions = kcm.data.read_captions(self.captions, self.caption_key)
        # One caption of each photograph, which has five.
        captions = captions[:: len(captions) // self.batch_size][: self.batch_size]
        return kcm.data.CLIPTokenizer.from_open_clip(CONTEXT_LENGTH)(captions)

    def text_tokens(self, name):
        """How many tokens of each text the text tower reads."""
        if name in OPEN_CLIP or name.endswith(PADDED):
            return CONTEXT_LENGTH
        longest = 1 + self.token_ids.argmax(axis=1).max()
        return min(rounded_up(int(longest)), CONTEXT_LENGTH)

    def batch(self, name):
        """A batch of a method."""
        images = photographs(self.batch_size, self.side(name))
        ids = self.token_ids[:, : self.text_tokens(name)]
        return {"images": images, "token_ids": ids}

    def masking(self, name):
        """A method's masking, or `None`."""
        if name in OPEN_CLIP:
            return kcm.RandomMasking(OPEN_CLIP[name])
        return MASKINGS[name](self.patch_size)

    def image_tokens(self, name):
        """How many patch tokens the image tower reads in training."""
        patches = (self.side(name) // self.patch_size) ** 2
        masking = self.masking(name)
        return patches if masking is None else masking.num_kept(patches)

    def arithmetic(self, name):
        """Floating-point operations to train on one pair."""
        return training_flops(
            self.size,
            self.side(name),
            self.text_tokens(name),
            masking=self.masking(name),
        )


def add_step_arguments(parsed):
    """The command-line arguments that say which steps to take, and how."""
    names = [*MASKINGS, *OPEN_CLIP]
    add = parsed.add_argument
    add("--size", default="vit_b_16", choices=SIZES, help="of the model")
    add("--image-size", type=int, default=224, help="side in pixels")
    add("--methods", nargs="+", metavar="METHOD", choices=names, help=f"of {names}")
    add("--dtype", default="float32", help="Keras dtype policy")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--jit", action="store_true", help="compile on torch too")
    add("--captions", help="source of captions; else random ids fill the context")
    add("--caption-key", default="json.captions", help="field of the captions")


def step_methods(options):
    """The methods asked for, or else all that there are of the backend and size."""
    both = keras.backend.backend() == "torch" and options.size != "tiny"
    return options.methods or [*MASKINGS, *(OPEN_CLIP if both else ())]


def photographs(batch_size, side):
    """Blurred noise as uint8: smooth surfaces, as photographs have them."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (batch_size, 8, 8, 3))
    images = np.repeat(np.repeat(coarse, side // 8, 1), side // 8, 2)
    noisy = images + rng.integers(-20, 20, images.shape)
    return np.clip(noisy, 0, 255).astype("uint8")


def training_steps(names, setting):
    """Functions that run one training step each.

    Models of one image size share their weights and their optimizer's state, which
    has no influence on time and lets all of them fit into memory side by side.

    Args:
        names: Keys of `MASKINGS` and `OPEN_CLIP`.
        setting: A `Setting`.

    Returns:
        Dictionary from name to function.
    """
    shared, steps = {}, {}
    for name in names:
        if name in OPEN_CLIP:
            steps[name] = open_clip_step(OPEN_CLIP[name], setting)
            continue
        side = setting.side(name)
        if side not in shared:
            backbone = kcm.models.clip_backbone(
                setting.size, image_size=side, dtype=setting.dtype
            )
            optimizer = keras_optimizer(setting.optimizer)
            shared[side] = backbone, optimizer
        backbone, optimizer = shared[side]
        data = setting.batch(name)
        model = kcm.ContrastiveModel.from_backbone(
            backbone, masking=setting.masking(name)
        )
        model.compile(optimizer, jit_compile=True if setting.jit else "auto")
        steps[name] = lambda model=model, data=data: model.train_on_batch(data)
    return steps


def keras_optimizer(name):
    if name == "sgd":
        return keras.optimizers.SGD(1e-5)
    return keras.optimizers.AdamW(1e-5, weight_decay=0.2)


def open_clip_step(patch_dropout, setting):
    """One training step of open_clip's own model and loss, on torch's optimizer."""
    import open_clip
    import torch
    from open_clip.loss import ClipLoss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _, letter, patch = setting.size.split("_")
    model = open_clip.create_model(
        f"ViT-{letter.upper()}-{patch}",
        force_patch_dropout=patch_dropout,
        force_image_size=setting.image_size,
        device=device,
    ).train()
    run = torch.compile(model) if setting.jit else model
    if setting.optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.2)
    loss_of = ClipLoss()
    half = "bfloat16" in setting.dtype
    data = setting.batch("open_clip, none")
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device)[:, None, None]

    def step():
        images = torch.as_tensor(data["images"], device=device).permute(0, 3, 1, 2)
        texts = torch.as_tensor(data["token_ids"], device=device)
        images = (images / 255.0 - mean) / std
        with torch.autocast(device, torch.bfloat16, enabled=half):
            loss = loss_of(*run(images, texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss.item()

    return step
