"""ViT-B/16 CLIP models that differ in what their image tower reads, and their steps."""

import keras
import numpy as np

import keras_cluster_mask as kcm

IMAGE_SIZE, PATCH_SIZE, VOCABULARY_SIZE, CONTEXT_LENGTH = 224, 16, 49408, 77
# 10 x 10 patches, the nearest square to half of 14 x 14.
RESIZED = 160


def threshold(beta):
    # Any threshold does: shapes, and so the cost, depend on `min_mask_ratio` alone.
    return lambda: kcm.ClusterMasking(
        PATCH_SIZE, 0.6, min_mask_ratio=beta, threshold=0.5
    )


MASKINGS = {
    "none": lambda: None,
    "random": lambda: kcm.RandomMasking(0.5),
    "cluster": lambda: kcm.ClusterMasking(PATCH_SIZE, 0.5),
    "threshold, beta 0.5": threshold(0.5),
    "threshold, beta 0.3": threshold(0.3),
    "resized to 160 px": lambda: None,
}
OPEN_CLIP = {"open_clip, none": 0.0, "open_clip, patch dropout 0.5": 0.5}


def add_step_arguments(parsed):
    """The command-line arguments that say which steps to take, and how."""
    names = [*MASKINGS, *OPEN_CLIP]
    add = parsed.add_argument
    add("--methods", nargs="+", metavar="METHOD", choices=names, help=f"of {names}")
    add("--batch-size", type=int, default=8)
    add("--dtype", default="float32", help="Keras dtype policy")
    add("--optimizer", choices=("adamw", "sgd"), default="adamw")
    add("--jit", action="store_true", help="compile on torch too")


def step_methods(options):
    """The methods asked for, or else all that the running backend has."""
    on_torch = keras.backend.backend() == "torch"
    return options.methods or [*MASKINGS, *(OPEN_CLIP if on_torch else ())]


def image_tokens(name):
    """How many patch tokens the image tower reads in training."""
    patches = (IMAGE_SIZE // PATCH_SIZE) ** 2
    if name.startswith("resized"):
        return (RESIZED // PATCH_SIZE) ** 2
    if name in OPEN_CLIP:
        return round(patches * (1 - OPEN_CLIP[name]))
    masking = MASKINGS[name]()
    return patches if masking is None else masking.num_kept(patches)


def arithmetic(name):
    """Floating-point operations to train on one pair."""
    side = RESIZED if name.startswith("resized") else IMAGE_SIZE
    if name in OPEN_CLIP:
        masking = kcm.RandomMasking(OPEN_CLIP[name])
    else:
        masking = MASKINGS[name]()
    return kcm.models.training_flops("vit_b_16", side, CONTEXT_LENGTH, masking=masking)


def photographs(batch_size, side):
    """Blurred noise as uint8: smooth surfaces, as photographs have them."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (batch_size, 8, 8, 3))
    images = np.repeat(np.repeat(coarse, side // 8, 1), side // 8, 2)
    noisy = images + rng.integers(-20, 20, images.shape)
    return np.clip(noisy, 0, 255).astype("uint8")


def batch(batch_size, side=IMAGE_SIZE):
    rng = np.random.default_rng(1)
    token_ids = rng.integers(1, VOCABULARY_SIZE - 1, (batch_size, CONTEXT_LENGTH))
    token_ids[:, -1] = VOCABULARY_SIZE - 1
    return {"images": photographs(batch_size, side), "token_ids": token_ids}


def training_steps(names, batch_size, dtype, jit_compile="auto", optimizer="adamw"):
    """Functions that run one training step each.

    Models of one image size share their weights and their optimizer's state, which
    has no influence on time and lets all of them fit into memory side by side.

    Args:
        names: Keys of `MASKINGS` and `OPEN_CLIP`.
        batch_size: Integer.
        dtype: A Keras dtype policy.
        jit_compile: As for `keras.Model.compile`; torch's compiler for open_clip.
        optimizer: `"adamw"`, or `"sgd"` without momentum, which costs next to nothing
            and so leaves the models alone to be compared.

    Returns:
        Dictionary from name to function.
    """
    shared, steps = {}, {}
    for name in names:
        if name in OPEN_CLIP:
            steps[name] = open_clip_step(
                OPEN_CLIP[name],
                batch(batch_size),
                dtype,
                jit_compile is True,
                optimizer,
            )
            continue
        side = RESIZED if name.startswith("resized") else IMAGE_SIZE
        if side not in shared:
            backbone = kcm.models.clip_backbone(
                "vit_b_16", image_size=side, dtype=dtype
            )
            shared[side] = backbone, keras_optimizer(optimizer), batch(batch_size, side)
        backbone, shared_optimizer, data = shared[side]
        model = kcm.ContrastiveModel.from_clip(backbone, masking=MASKINGS[name]())
        model.compile(shared_optimizer, jit_compile=jit_compile)
        steps[name] = lambda model=model, data=data: model.train_on_batch(data)
    return steps


def keras_optimizer(name):
    if name == "sgd":
        return keras.optimizers.SGD(1e-5)
    return keras.optimizers.AdamW(1e-5, weight_decay=0.2)


def open_clip_step(patch_dropout, data, dtype, compile_model, optimizer):
    """One training step of open_clip's own ViT-B-16 and loss, on torch's optimizer."""
    import open_clip
    import torch
    from open_clip.loss import ClipLoss

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = open_clip.create_model(
        "ViT-B-16", force_patch_dropout=patch_dropout, device=device
    ).train()
    run = torch.compile(model) if compile_model else model
    if optimizer == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.2)
    loss_of = ClipLoss()
    mean = torch.tensor(open_clip.OPENAI_DATASET_MEAN, device=device)[:, None, None]
    std = torch.tensor(open_clip.OPENAI_DATASET_STD, device=device)[:, None, None]

    def step():
        images = torch.tensor(data["images"], device=device).permute(0, 3, 1, 2)
        texts = torch.tensor(data["token_ids"], device=device)
        images = (images / 255.0 - mean) / std
        with torch.autocast(device, torch.bfloat16, enabled="bfloat16" in dtype):
            loss = loss_of(*run(images, texts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, np.log(100))
        return loss.item()

    return step
