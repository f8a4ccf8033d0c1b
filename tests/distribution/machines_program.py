"""Prints the error of `fit` in TensorFlow's strategy for several machines."""

import tensorflow as tf

import keras_cluster_mask as kcm
from tests.helpers import image_mlp, random_pairs, text_bag

# Of a program that has not computed anything.
strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    model = kcm.ContrastiveModel(image_mlp(), text_bag())
    model.compile("sgd")
try:
    model.fit(random_pairs(4), verbose=0)
except ValueError as error:
    print(error)
