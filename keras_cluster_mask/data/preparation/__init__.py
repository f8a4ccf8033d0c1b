"""Data sets looked through, converted and freed of duplicates, before training.

Each command of `python -m keras_cluster_mask.data` is a function here, in a file of its
own.
"""

from keras_cluster_mask.data.preparation.checking import check
from keras_cluster_mask.data.preparation.contact_sheets import contact_sheet
from keras_cluster_mask.data.preparation.converting import convert
from keras_cluster_mask.data.preparation.counting import count
from keras_cluster_mask.data.preparation.deduplication import deduplicate
from keras_cluster_mask.data.preparation.reporting import report

__all__ = ["check", "contact_sheet", "convert", "count", "deduplicate", "report"]
