"""Prints whether a spawned worker that imports the library has imported Keras."""

import multiprocessing
import sys


def work(queue):
    import keras_cluster_mask

    queue.put("keras" in sys.modules)
    # All public names are there when they are asked for.
    queue.put(keras_cluster_mask.ClusterMasking.__name__)


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=work, args=(queue,))
    process.start()
    print(queue.get(), queue.get())
    process.join()
