"""The cost of choosing patches: 64 images of 224 pixels, 196 patches each.

    KERAS_BACKEND=jax python benchmarks/masking_cost.py
    KERAS_BACKEND=jax python benchmarks/masking_cost.py --image-size 448 --no-step
    KERAS_BACKEND=jax python benchmarks/masking_cost.py --batch-size 8 --teacher

The table has the time of the `select` of every masking, and its share of a training
step of CLIP ViT-B/16 with half of the patches masked.

`--teacher` adds `AttentiveMasking`, whose teacher is a ViT-B/16 too, the update of the
teacher, which each step makes once whatever the batch, and a training step without
masking.
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
    "cluster": kcm.ClusterMasking(PATCH_SIZE, 0.5),
    "centered": kcm.CenteredMasking(0.5, num_prefix_tokens=0),
    "grid": kcm.GridMasking(num_prefix_tokens=0),
    "block": kcm.BlockMasking(0.5, num_prefix_tokens=0),
    "k-means": kcm.KMeansMasking(PATCH_SIZE, 0.5),
    "edge": kcm.EdgeMasking(PATCH_SIZE, 0.5),
}


def ways(images, noise):
    """Functions without arguments that wait for their result."""
    tokens = ops.zeros((*noise.shape, 8))

    def call(masking):
        select = compiled(lambda images, noise: masking.select(images, tokens, noise))
        return lambda: [*map(ops.convert_to_numpy, select(images, noise))]

    return {name: call(masking) for name, masking in MASKINGS.items()}


def ways_with_teacher(images, noise):
    """As `ways`, with a teacher at the size of the images and at half of it."""
    side = images.shape[1]
    encoder = kcm.models.clip_backbone("vit_b_16", image_size=side).vision_encoder
    found = {}
    for name, size in (("attentive", None), ("attentive, half size", side // 2)):
        teacher = kcm.models.MomentumEncoder(encoder, image_size=size)
        teacher.follow(encoder)
        masking = kcm.AttentiveMasking(teacher)
        weights = [*teacher.variables, *encoder.variables]
        found[name] = stateless(
            lambda images, noise, x=masking: x.select(images, None, noise),
            weights,
            [],
            images,
            noise,
        )
        found[f"{name}: update"] = stateless(
            lambda x=teacher: x.update(), weights, [*teacher.weights, teacher.step]
        )
    return found


def stateless(function, variables, changed, *arguments):
    """A compiled call that takes all weights, rather than holding them as constants."""

    def call(values, *arguments):
        with keras.StatelessScope(list(zip(variables, values))) as scope:
            result = function(*arguments)
            return result or (), [scope.get_current_value(v) for v in changed]

    call, values = compiled(call), [ops.convert_to_tensor(v) for v in variables]

    def run():
        result, new_values = call(values, *arguments)
        return [ops.convert_to_numpy(part) for part in (*result, *new_values[-1:])]

    return run


def main():
    parsed = parser(__doc__)
    add = parsed.add_argument
    add("--batch-size", type=int, default=64)
    add("--image-size", type=int, default=224, help="side in pixels")
    add("--rounds", type=int, default=15)
    add("--dtype", default="float32", help="of the training step")
    add("--no-step", action="store_true", help="skip the training step")
    add("--teacher", action="store_true", help="measure AttentiveMasking too")
    add("--results", default="results", help="folder for the JSON file")
    options = parsed.parse_args()

    pixels = photographs(options.batch_size, options.image_size).astype("float32")
    images = ops.convert_to_tensor(pixels / 127.5 - 1.0)
    patches = (options.image_size // PATCH_SIZE) ** 2
    noise = keras.random.uniform((options.batch_size, patches), seed=0)
    functions = ways(images, noise)
    if options.teacher:
        functions |= ways_with_teacher(images, noise)
    seconds = interleaved(functions, options.rounds, repeats=3)
    if not options.no_step:
        setting = Setting(
            image_size=options.image_size,
            batch_size=options.batch_size,
            dtype=options.dtype,
        )
        names = ["random", *(["none"] if options.teacher else [])]
        steps = interleaved(training_steps(names, setting), 2)
        step = min(steps["random"])
        whole = min(steps.get("none", steps["random"]))

    rows = []
    for name in functions:
        # The fastest, as for the step: other load on the machine only adds.
        milliseconds = 1000 * min(seconds[name])
        row = {"what": name, "time (ms)": f"{milliseconds:.2f}"}
        if not options.no_step:
            row["share of a step"] = f"{0.1 * milliseconds / step:.2f} %"
        if options.teacher and not options.no_step:
            row["of an unmasked step"] = f"{0.1 * milliseconds / whole:.2f} %"
        rows.append(row)
    backend = keras.backend.backend()
    title = f"{backend}, {options.batch_size} images of {options.image_size} px"
    if not options.no_step:
        title += f"; one ViT-B/16 step, {options.dtype}: {1000 * step:.0f} ms"
        title += f", unmasked {1000 * whole:.0f} ms" if options.teacher else ""
    publish(
        f"{options.results}/masking_cost-{backend}-{options.image_size}.json",
        title,
        rows,
        options=vars(options),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
