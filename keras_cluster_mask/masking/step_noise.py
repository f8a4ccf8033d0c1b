"""The noise of a training step, which a model draws for the maskings in it.

A model passes it to a `MaskedEncoder`. To the maskings inside of any other encoder it
is given by a context, because the layers between the model and a masking forward only
arguments that they know.
"""

import contextlib
import threading

from keras import ops

# Thread-local, because TensorFlow traces the step of each replica in its own thread.
_context = threading.local()


class StepNoise:
    """Draws the noise of a step, for some rows of the whole batch.

    A masking gets its rows of the noise of the whole batch, so a mask does not depend
    on the number of devices or micro-batches.

    Args:
        size: Integer, the number of images in the whole batch.
        views: Integer, the number of masks of each image.
        take: Function from a `(size, ...)` tensor to the rows that are seen. `None`
            takes all.
    """

    def __init__(self, size, views=1, take=None):
        self.size = size
        self.views = views
        self.take = take

    def rows(self, take):
        """Returns the noise of the rows that `take` returns."""
        return StepNoise(self.size, self.views, take)

    def draw(self, masking, num_patches):
        """Draws the noise of a masking, a list of `(rows, N)` tensors, one per view."""
        # `draw`, which a strategy may override, treats each view as an image.
        noise = masking.draw(self.size * self.views, num_patches)
        noise = ops.reshape(noise, (-1, self.views, num_patches))
        return ops.unstack(noise if self.take is None else self.take(noise), axis=1)

    @contextlib.contextmanager
    def given(self):
        """A context in which maskings mask with this noise."""
        before = noise_of_model()
        _context.noise = self
        try:
            yield
        finally:
            _context.noise = before


@contextlib.contextmanager
def step_of(maskings, size, views=1):
    """A context of one training step of maskings, at whose end their state advances.

    Args:
        maskings: List of `PatchMasking` layers.
        size: Integer, the number of images in the whole batch.
        views: Integer, the number of masks of each image.
    """
    yield StepNoise(size, views)
    for masking in maskings:
        masking.advance()


def noise_of_model():
    """Returns the `StepNoise` of the model whose step is running, or `None`."""
    return getattr(_context, "noise", None)
