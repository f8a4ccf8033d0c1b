"""The cost of choosing patches: 64 images of 224 pixels, 196 patches each.

    KERAS_BACKEND=jax python benchmarks/masking_cost.py
    KERAS_BACKEND=jax python benchmarks/masking_cost.py --image-size 448 --no-step

The table has the time of the `select` of every masking, and its share of a training
step of CLIP ViT-B/16 with half of the patches masked.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from clip_steps import Setting, photographs, training_steps
from keras import ops
from reporting import parser, publish
from timing import compiled, interleaved

import keras_cluster_mask as kcm

PATCH_SIZE = 16
MASKINGS = {
    "random": kcm.RandomMasking(0.5, num_prefix_tokens=0),
    "cluster": kcm.ClusterMasking(0.5, patch_size=PATCH_SIZE),
    "centered": kcm.CenteredMasking(0.5, num_prefix_tokens=0),
    "grid": kcm.GridMasking(num_prefix_tokens=0),
    "block": kcm.BlockMasking(0.5, num_prefix_tokens=0),
    "k-means": kcm.KMeansMasking(0.5, patch_size=PATCH_SIZE),
    "edge": kcm.EdgeMasking(0.5, patch_size=PATCH_SIZE),
}


def ways(images, noise):
    """Functions without arguments that wait for their result."""
    tokens = ops.zeros((*noise.shape, 8))

    def call(masking):
        select = compiled(lambda images, noise: masking.select(images, tokens, noise))
        return lambda: [*map(ops.convert_to_numpy, select(images, noise))]

    return {name: call(masking) for name, masking in MASKINGS.items()}


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--batch-size", type=int, default=64)
    add("--image-size", type=int, default=224, help="side in pixels")
    add("--rounds", type=int, default=15)
    add("--dtype", default="float32", help="of the training step")
    add("--no-step", action="store_true", help="skip the training step")
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    pixels = photographs(options.batch_size, options.image_size).astype("float32")
    images = ops.convert_to_tensor(pixels / 127.5 - 1.0)
    patches = (options.image_size // PATCH_SIZE) ** 2
    noise = keras.random.uniform((options.batch_size, patches), seed=0)
    functions = ways(images, noise)
    seconds = interleaved(functions, options.rounds, repeats=3)
    if not options.no_step:
        setting = Setting(
            image_size=options.image_size,
            batch_size=options.batch_size,
            dtype=options.dtype,
        )
        steps = interleaved(training_steps(["random"], setting), 2)
        step = min(steps["random"])

    rows = []
    for name in functions:
        # The fastest, as for the step: other load on the machine only adds.
        milliseconds = 1000 * min(seconds[name])
        row = {"what": name, "time (ms)": f"{milliseconds:.2f}"}
        if not options.no_step:
            row["share of a step"] = f"{0.1 * milliseconds / step:.2f} %"
        rows.append(row)
    backend = keras.backend.backend()
    title = f"{backend}, {options.batch_size} images of {options.image_size} px"
    if not options.no_step:
        title += f"; one ViT-B/16 step, {options.dtype}: {1000 * step:.0f} ms"
    publish(
        f"{options.results}/masking_cost-{backend}-{options.image_size}.json",
        title,
        rows,
        options=vars(options),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
