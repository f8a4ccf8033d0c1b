"""Search of one's own pictures, by words or by a picture."""

from keras_cluster_mask.search.image_index import ImageIndex, Match
from keras_cluster_mask.search.result_sheets import result_sheet
from keras_cluster_mask.search.searcher import Searcher, SearchResult

__all__ = ["ImageIndex", "Match", "SearchResult", "Searcher", "result_sheet"]
