"""Prints whether a worker process has imported Keras or a backend.

python modules_program.py SOURCE
"""

import sys

from keras_cluster_mask.data import image_text_dataset


def loaded(texts):
    return [[int(x in sys.modules) for x in ("keras", "torch", "tensorflow")]] * 2


if __name__ == "__main__":
    options = dict(training=True, format="grain", num_workers=1)
    dataset = image_text_dataset(sys.argv[1], loaded, 8, 2, **options)
    print(next(iter(dataset))["token_ids"].tolist())
