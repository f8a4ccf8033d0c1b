"""Imported by pytest before any test."""

import contextlib
import importlib
import importlib.metadata
import io
import os
import pathlib
import shutil
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

if "PYTEST_XDIST_WORKER" in os.environ:
    # A worker a core: threads of one would only keep those of another waiting.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# On JAX most of the time goes into compiling. Models of a few thousand weights need no
# optimized code, and what one process has compiled serves the others, and the next run.
FLAGS = [
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
]
with contextlib.suppress(importlib.metadata.PackageNotFoundError):
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        # Later versions do not know this flag, and end the program for it.
        FLAGS.append("--xla_cpu_use_fusion_emitters=false")
ROOT = pathlib.Path(__file__).parents[1]
DATASETS = ROOT / "keras_cluster_mask" / "datasets"
CACHE = ROOT / ".pytest_cache" / "jax"
for name, value in {
    "XLA_FLAGS": " ".join(FLAGS),
    "JAX_COMPILATION_CACHE_DIR": CACHE,
    # For the indexes of shards.
    "XDG_CACHE_HOME": CACHE.parent,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0,
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": -1,
}.items():
    os.environ.setdefault(name, str(value))

# Both crash if tensorflow came first: torch under pytest, and triton, which torchvision
# imports, with TensorFlow 2.20 and later (its issue 124205).
for package in ("torch", "triton"):
    with contextlib.suppress(ImportError):
        importlib.import_module(package)

if importlib.import_module("keras").backend.backend() == "tensorflow":
    # A second device, for the tests of strategies; none comes once the first is used.
    from tensorflow import config

    config.set_logical_device_configuration(
        config.list_physical_devices("CPU")[0],
        [config.LogicalDeviceConfiguration()] * 2,
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Applies `one_case` and `slow_to_compile`, before `-m` selects."""
    compiles = importlib.import_module("keras").backend.backend() != "torch"
    seen = set()
    for item in items:
        if compiles and item.get_closest_marker("slow_to_compile"):
            item.add_marker("slow")
        if item.get_closest_marker("one_case"):
            test = item.parent.nodeid, item.originalname
            if test in seen:
                item.add_marker("any_backend")
            seen.add(test)


FEW_IMAGES = {
    "train-00000": 160,
    "train-00001": 32,
    "validation-00000": 64,
    "test-00000": 346,
}


# Made by `tests/pretrained/make_encoders.py`.
ENCODERS = "KERAS_CLUSTER_MASK_ENCODERS"


@pytest.fixture(scope="session")
def encoders():
    """The folder of pre-trained encoders."""
    if not os.environ.get(ENCODERS):
        pytest.skip(f"{ENCODERS} is not set to a folder of pre-trained encoders")
    return pathlib.Path(os.environ[ENCODERS])


@pytest.fixture(scope="session")
def encode():
    def encode(array_or_image, format="PNG", **options):
        if isinstance(array_or_image, np.ndarray):
            array_or_image = Image.fromarray(array_or_image)
        file = io.BytesIO()
        array_or_image.save(file, format, **options)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_tar_to():
    """Writes files, pairs of name and content, into a tar; returns its path."""

    def write_tar_to(path, files, mode="w"):
        with tarfile.open(path, mode) as archive:
            for name, content in files:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        return path

    return write_tar_to


@pytest.fixture(params=["channels_last", "channels_first"])
def data_format(request):
    """Sets the order of the axes of images, and resets it after the test."""
    config = importlib.import_module("keras").config
    config.set_image_data_format(request.param)
    yield request.param
    config.set_image_data_format("channels_last")


@pytest.fixture
def write_tar(tmp_path, write_tar_to):
    def write_tar(name, files, mode="w"):
        return write_tar_to(tmp_path / name, files, mode)

    return write_tar


@pytest.fixture
def write_pairs(tmp_path, write_pairs_to):
    """Writes a shard of `count` plain images; the gray level is the index."""

    def write_pairs(name, start, count, broken=()):
        return write_pairs_to(tmp_path / name, start, count, broken)

    return write_pairs


@pytest.fixture(scope="session")
def write_pairs_to(encode, write_tar_to):
    def write_pairs_to(path, start, count, broken=()):
        files = []
        for index in range(start, start + count):
            image = encode(np.full((20, 24, 3), index, "uint8"))
            files += [
                (f"{index:04}.png", image),
                (f"{index:04}.txt", b"no %d" % index),
            ]
        return write_tar_to(path, [*files, *broken])

    return write_pairs_to


@pytest.fixture(scope="session")
def copy_pairs(write_tar_to):
    """Copies the first pairs of a shard of the repository; returns the path."""
    from keras_cluster_mask.data.paths import open_source

    def copy_pairs(shard, path, count):
        files = []
        source = open_source(DATASETS / "images" / f"{shard}.tar")
        for number in range(count):
            item = source[number]
            for field in ("webp", "txt"):
                files.append((f"{item['__key__']}.{field}", item[field]))
        return write_tar_to(path, files)

    return copy_pairs


@pytest.fixture(scope="session")
def copy_datasets(copy_pairs):
    """Makes the folders of `datasets` with some images of each shard."""

    def copy_datasets(folder, counts):
        (folder / "images").mkdir(parents=True)
        (folder / "photographs").symlink_to(DATASETS / "photographs")
        for shard, count in counts.items():
            copy_pairs(shard, folder / "images" / f"{shard}.tar", count)
        return folder

    return copy_datasets


@pytest.fixture(scope="session")
def few_images(tmp_path_factory, copy_datasets):
    """The folders of `datasets` with few images in place of all."""
    return copy_datasets(tmp_path_factory.mktemp("datasets"), FEW_IMAGES)


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """The cache of Hugging Face, read without a network, in place of the hub.

    Returns:
        Function of the name of a repository: the folder of its files.
    """
    cache, version = tmp_path_factory.mktemp("hub"), "0" * 40
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def files_of(repo_id):
        return cache / f"models--{repo_id.replace('/', '--')}" / "snapshots" / version

    def create(repo_id, exist_ok):
        files_of(repo_id).mkdir(parents=True, exist_ok=exist_ok)
        reference = files_of(repo_id).parents[1] / "refs" / "main"
        reference.parent.mkdir(exist_ok=exist_ok)
        reference.write_text(version)
        return types.SimpleNamespace(repo_id=repo_id)

    def upload(repo_id, folder_path, commit_message=None):
        shutil.copytree(folder_path, files_of(repo_id), dirs_exist_ok=True)

    def exists(repo_id, filename):
        return (files_of(repo_id) / filename).is_file()

    # keras_hub calls functions, and Keras methods.
    for name, function in (
        ("create_repo", create),
        ("upload_folder", upload),
        ("file_exists", exists),
    ):
        monkeypatch.setattr(f"huggingface_hub.{name}", function)
        method = staticmethod(function)
        monkeypatch.setattr(f"huggingface_hub.HfApi.{name}", method)
    return files_of
