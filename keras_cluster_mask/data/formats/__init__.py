"""Formats of shards, one per module."""

import re

from keras_cluster_mask.data.formats.base import DamagedShard, Entry
from keras_cluster_mask.data.formats.folder import ENDINGS, Folder
from keras_cluster_mask.data.formats.parquet import Parquet
from keras_cluster_mask.data.formats.table import Table
from keras_cluster_mask.data.formats.tar import Tar

__all__ = ["DamagedShard", "Entry", "format_of"]

# Formats by file extension. Files with any other name are read as tar files.
FORMATS = {
    r"\.csv": Table(","),
    r"\.tsv": Table("\t"),
    r"\.(jsonl|ndjson)": Table(None),
    r"\.parquet": Parquet(),
    "|".join(map(re.escape, ENDINGS)) + "|/": Folder(),
    "": Tar(),
}


def format_of(path):
    """Returns the `Format` of a shard."""
    return next(
        format
        for ending, format in FORMATS.items()
        if re.search(f"({ending})$", path, re.IGNORECASE)
    )
