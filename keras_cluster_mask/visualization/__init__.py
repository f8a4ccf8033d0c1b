"""Plots of masks, training runs and retrievals, with matplotlib."""

from keras_cluster_mask.visualization.charts import (
    plot_history,
    plot_masking_statistics,
)
from keras_cluster_mask.visualization.images import plot_masks, plot_retrieval

__all__ = ["plot_history", "plot_masking_statistics", "plot_masks", "plot_retrieval"]
