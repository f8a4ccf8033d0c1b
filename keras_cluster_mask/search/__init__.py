"""A page in the browser that searches a folder of photographs.

`python -m keras_cluster_mask.search MODEL PHOTOS` opens it.
"""
