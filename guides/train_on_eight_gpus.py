# %% [markdown]
# # Train on eight GPUs
#
# In data parallel training, every device has all the weights and a part of the batch. A contrastive
# loss must compare every image with the texts of *all* devices. A program that trains on eight
# separate small batches trains a different model, without a warning. Here, the eight devices train
# on one batch: losses, gradients and masks are the same as on a single device.
#
# This guide writes a training program, runs it on several devices, and checks the result. Without
# GPUs, it uses two virtual CPU devices or two processes. We tested it this way, and not on GPUs.

# %%
import os

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np

import keras_cluster_mask as kcm

BACKEND = keras.backend.backend()
RESULTS = Path(os.environ.get("RESULTS", "results"))
FOLDER = RESULTS / "eight_gpus"
DEVICES = 2  # 8 on a machine with eight GPUs.

shutil.rmtree(FOLDER, ignore_errors=True)
FOLDER.mkdir(parents=True)

# %% [markdown]
# ## The program
#
# Only the function `devices` differs from training on one device. On torch, it connects the
# processes. On JAX and TensorFlow, it returns the scope in which the model is created. `batch_size`
# counts the pairs of all devices, so nothing else depends on their number. `image_text_dataset`
# gives every process its own samples.
#
# `Checkpoint` and `resume_from` resume the run after a crash, even on a different number of devices.
# `if __name__ == "__main__"` lets `num_workers` start processes that decode images.

# %%
PROGRAM = """
import contextlib
import json
import sys


def devices(count):
    backend = keras.backend.backend()
    if backend == "torch":
        kcm.distribution.initialize()  # torchrun has started a process for each device.
        return contextlib.nullcontext()
    if backend == "jax":
        return keras.distribution.DataParallel(auto_shard_dataset=False).scope()
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):  # Virtual devices of the CPU.
        virtual = [tf.config.LogicalDeviceConfiguration()] * count
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, virtual)
    kind = "GPU" if tf.config.list_physical_devices("GPU") else "CPU"
    names = [device.name for device in tf.config.list_logical_devices(kind)]
    return tf.distribute.MirroredStrategy(names).scope()


def main(count, folder, images):
    with devices(count):
        shards = images + "/train-*.tar"
        tokenizer = kcm.data.CLIPTokenizer.train(kcm.data.read_captions(shards), 1000, 12)
        data = kcm.data.image_text_dataset(
            shards, tokenizer, image_size=48, batch_size=64, training=True, seed=1
        )
        keras.utils.set_random_seed(1)
        backbone = kcm.models.clip_backbone("tiny", 48, tokenizer.vocabulary_size, 12)
        masking = kcm.ClusterMasking(patch_size=8, mask_ratio=0.5, seed=1)
        model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
        model.compile(keras.optimizers.AdamW(1e-3))
        logs = model.fit(
            data,
            steps_per_epoch=5,
            epochs=3,
            resume_from=folder,
            callbacks=[kcm.callbacks.Checkpoint(folder)],
            verbose=0,
        ).history
    if kcm.distribution.is_main_process():
        with open(folder + ".json", "w") as file:
            json.dump(logs, file)


if __name__ == "__main__":
    import keras

    import keras_cluster_mask as kcm

    main(int(sys.argv[1]), *sys.argv[2:])
"""
(FOLDER / "train.py").write_text(PROGRAM)

# %% [markdown]
# ## Run the program
#
# The arguments are the number of devices, a folder for checkpoints, and the folder with the shards.
#
# | backend | one machine | several machines |
# | --- | --- | --- |
# | torch | `torchrun --nproc-per-node=8 train.py 8 run keras_cluster_mask/datasets/images` | the same on each, with `--nnodes`, `--node-rank` and `--rdzv-endpoint` |
# | JAX | `python train.py 8 run keras_cluster_mask/datasets/images` | the same on each, with `KERAS_DISTRIBUTION_JOB_ADDRESSES`, `_NUM_PROCESSES` and `_PROCESS_ID` set, and `kcm.distribution.initialize()` at the top of `main` |
# | TensorFlow | `python train.py 8 run keras_cluster_mask/datasets/images` | not supported by Keras 3 |
#
# `kcm.data.check(SOURCE, num_workers=16)` indexes large shards beforehand, and counts broken samples.


# %%
def start(count, name):
    """Runs the program on `count` devices, and returns its logs."""
    launch = []
    if BACKEND == "torch":
        launch = ["-m", "torch.distributed.run", f"--nproc-per-node={count}"]
    virtual = f"--xla_force_host_platform_device_count={count}"
    images = kcm.data.example_images()
    program = [FOLDER / "train.py", str(count), FOLDER / name, images]
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(count))),
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {virtual}".strip(),
        # Threads of two processes on one CPU would wait for each other.
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(kcm.__file__).parents[1]),
    }
    command = [sys.executable, *launch, *program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads((FOLDER / f"{name}.json").read_text())


one, several = start(1, "one"), start(DEVICES, "several")

# %% [markdown]
# ## What to check
#
# **The losses match a single device** up to rounding, with the same seed. If each device compared
# only its own half of the batch, the loss would start near log(32) = 3.5. Here, it is above 4.2.

# %%
for name in ("loss", "accuracy", "mask_ratio"):
    print(f"{name:12}", *(np.round(logs[name], 4) for logs in (one, several)))
difference = np.abs(np.subtract(one["loss"], several["loss"])).max()
print(f"largest difference of a loss: {difference:.1e}")
if difference > 1e-2:
    raise RuntimeError("the devices do not train as one")

# %% [markdown]
# **The run resumes.** If you run the program again, it finds that all steps are done, and returns
# the same history. Kill a real run once in its first hour, and check that the loss continues.

# %%
again = start(DEVICES, "several")
print("the same history:", again["loss"] == several["loss"])

# %% [markdown]
# **The devices are busy.** With `verbose=2`, Keras shows the time of a step. A step on eight devices
# should take little longer than a step on one device with an eighth of the batch. If `data.waited`,
# the time in seconds spent waiting for data, is large, set `num_workers` of `image_text_dataset`. The
# threads of one process decode at most about 2,200 images per second, on any number of cores.
#
# **The memory is sufficient.** If it is not, `micro_batch_size` trains on parts of the batch and
# still compares all pairs. On JAX, weights that do not fit on one device can be sharded over several
# devices. Set the distribution before you create the model. Here, two devices share one model: its
# attention heads and hidden units are divided between them.
#
# ```python
# devices = keras.distribution.list_devices()
# mesh = keras.distribution.DeviceMesh((len(devices) // 2, 2), ["batch", "model"], devices)
# layouts = keras.distribution.LayoutMap(mesh)
# # The first matrix of an attention or MLP is split along its outputs, the last along its inputs.
# for path, layout in {
#     r"(attention|self_attn)/(query|key|value)/kernel": (None, "model", None),
#     r"(attention|self_attn)/(query|key|value)/bias": ("model", None),
#     r"(attention|self_attn)/attention_output/kernel": ("model", None, None),
#     r"(dense_1|mlp/fc1)/kernel": (None, "model"),
#     r"(dense_1|mlp/fc1)/bias": ("model",),
#     r"(dense_2|mlp/fc2)/kernel": ("model", None),
# }.items():
#     layouts[rf".*encoder_(block_\d+|head)/{path}"] = layout
# distribution = keras.distribution.ModelParallel(
#     layout_map=layouts, batch_dim_name="batch", auto_shard_dataset=False
# )
# keras.distribution.set_distribution(distribution)
# ```
#
# [`examples/train.py`](../examples/train.py) is a complete program with options.
