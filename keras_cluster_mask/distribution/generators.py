"""Generators of random numbers outside of Keras."""

import keras


def read_generators():
    """The state of the generators that layers without a seed draw from, as arrays."""
    if keras.backend.backend() != "torch":
        return {}
    import torch

    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"generators/{name}": value.numpy() for name, value in state.items()}


def write_generators(state):
    """Puts arrays of `read_generators` back."""
    for name, value in state.items():
        import torch

        write = {"torch": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
        write[name.removeprefix("generators/")](torch.from_numpy(value.copy()))
