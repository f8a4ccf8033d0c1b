"""The random state outside of Keras: torch's global generators."""

import keras
import numpy as np


def read_rng_state() -> dict[str, np.ndarray]:
    """Returns the state of the generators that layers without a seed draw from."""
    if keras.backend.backend() != "torch":
        return {}
    import torch

    state = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"generators/{name}": value.numpy() for name, value in state.items()}


def write_rng_state(state: dict[str, np.ndarray]) -> None:
    """Restores the arrays of `read_rng_state`."""
    for name, value in state.items():
        import torch

        write = {"torch": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
        write[name.removeprefix("generators/")](torch.from_numpy(value.copy()))
