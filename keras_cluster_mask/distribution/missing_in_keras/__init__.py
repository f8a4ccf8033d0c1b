"""Training features that Keras lacks on torch.

Each file names the feature of Keras that makes it unnecessary. Nothing here is imported
on other backends.
"""
