"""Plots of masks, training runs and retrievals, with matplotlib."""

from keras_cluster_mask.visualization.charts import plot_history
from keras_cluster_mask.visualization.image_plots import plot_masks, plot_retrieval

__all__ = ["plot_history", "plot_masks", "plot_retrieval"]


def __dir__():
    return __all__
