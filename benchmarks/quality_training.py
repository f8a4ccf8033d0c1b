"""One training run of `quality.py`, saved in parts so that it can resume."""

import dataclasses
import functools
import json
import shutil
import time

import keras
from quality_methods import OWN_MASKINGS
from reporting import write_json
from timing import interleaved

import keras_cluster_mask as kcm

# A run is cut into so many parts; after each the model is scored and saved.
PARTS = 8
CURVE_IMAGES = 2000


def steps_of(method, recipe, costs):
    """How many steps a method trains for, so that times are equal if it asks for it."""
    if not method.equal_time:
        return recipe.steps
    return round(recipe.steps * costs["random"] / costs["none"])


def new_model(method, recipe, data, seed, steps):
    """A model with fresh weights, compiled."""
    keras.utils.set_random_seed(seed)
    backbone = kcm.models.clip_backbone(
        "tiny",
        image_size=data.image_size,
        patch_size=recipe.patch_size,
        vocabulary_size=data.tokenizer.vocabulary_size,
        context_length=recipe.context_length,
    )
    masking = new_masking(method, recipe, data)
    model = kcm.ContrastiveModel.from_backbone(backbone, masking=masking)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        decay_steps=steps - steps // 10,
        warmup_target=recipe.learning_rate,
        warmup_steps=steps // 10,
    )
    model.compile(keras.optimizers.AdamW(schedule, weight_decay=0.1, beta_2=0.98))
    return model


def new_masking(method, recipe, data):
    """A method's masking, with its threshold where it has one, or `None`."""
    masking = method.masking and method.masking(recipe.patch_size)
    if getattr(masking, "threshold", None) is not None:
        masking.adapt(data.read("train", CURVE_IMAGES)[0])
    return masking


def train(name, method, recipe, data, seed, costs, folder):
    """Trains one model, or the rest of an interrupted run, and scores it.

    Returns:
        The finished run as a dictionary, also written to `folder/result.json`: the
        validation scores after every part (`curve`) and at the end.
    """
    finished = folder / "result.json"
    setting = json.loads(json.dumps({"method": name, "seed": seed, **_plain(recipe)}))
    if finished.exists():
        result = json.loads(finished.read_text())
        _check_same(result["setting"], setting, folder)
        return result

    steps = steps_of(method, recipe, costs)
    model, state = _load(folder, setting)
    if model is None:
        model = new_model(method, recipe, data, seed, steps)
        state = {"setting": setting, "steps": steps, "part": 0, "curve": []}
    while state["part"] < PARTS:
        part = state["part"]
        # Cut by rounding, so that the parts add up to the steps.
        share = round(steps * (part + 1) / PARTS) - round(steps * part / PARTS)
        for attribute, values in method.over_training.items():
            setattr(model.masking, attribute, values[part])
        if method.over_training:
            model.make_train_function(force=True)
        # A run that is resumed must read the same crops in the same order.
        keras.utils.set_random_seed(seed)
        batches = data.training_batches(
            1000 * seed + part, share, background=method.background
        )
        start = time.perf_counter()
        history = model.fit(batches, steps_per_epoch=share, verbose=0).history
        state["curve"].append(
            {
                "step": round(steps * (part + 1) / PARTS),
                "loss": history["loss"][-1],
                "seconds": time.perf_counter() - start,
                **data.scores(model, "validation", CURVE_IMAGES),
            }
        )
        state["part"] += 1
        last = state["curve"][-1]
        print(
            f"{name}, seed {seed}: step {last['step']}/{steps}, "
            f"loss {last['loss']:.2f}, validation {last['score']:.1f} %, "
            f"{last['seconds']:.0f} s",
            flush=True,
        )
        _save(folder, model, state)

    state["validation"] = data.scores(model, "validation", probe=True)
    if data.classes is None:
        found = data.scores(model, "validation", background="random")
        # The key of the stored runs.
        state["validation"]["random ground"] = found["score"]  # codespell:ignore ground
    write_json(finished, **state)
    return state


def test(result, data, folder):
    """Scores a finished run on the test split, once."""
    if "test" not in result:
        model = load_finished(folder)
        result["test"] = data.scores(model, "test", probe=True)
        write_json(folder / "result.json", **result)
    return result


def load_finished(folder):
    """The model of a finished run."""
    return _load_model(folder / "checkpoint")


def measure_costs(methods, recipe, data_of, rounds=8):
    """Milliseconds per training step of each method, taken in turn.

    The machine may be busy with other things: methods alternate, and the fastest round
    of each counts.
    """
    steps = {}
    for name, method in methods.items():
        data = data_of(method)
        model = new_model(method, recipe, data, 0, 100)
        (batch,) = data.training_batches(0, 1, "white").as_numpy_iterator()
        steps[name] = functools.partial(model.train_on_batch, batch)
    seconds = interleaved(steps, rounds, repeats=4)
    return {name: round(1000 * min(found), 1) for name, found in seconds.items()}


def _plain(recipe):
    # The data by its name alone: a folder of results may move with its runs.
    setting = dataclasses.asdict(recipe) | {"backend": keras.backend.backend()}
    return setting | {"data": recipe.name}


def _save(folder, model, state):
    """Writes model and state into a new folder and puts it in the old one's place."""
    folder.mkdir(parents=True, exist_ok=True)
    draft, checkpoint = folder / "draft", folder / "checkpoint"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir()
    model.save(draft / "model.keras")
    write_json(draft / "state.json", **state)
    # One of the two is always complete, whenever the run is interrupted.
    shutil.rmtree(folder / "old", ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(folder / "old")
    draft.rename(checkpoint)


def _load(folder, setting):
    for name in ("checkpoint", "old"):
        if (folder / name / "state.json").exists():
            state = json.loads((folder / name / "state.json").read_text())
            _check_same(state["setting"], setting, folder)
            return _load_model(folder / name), state
    return None, None


def _load_model(checkpoint):
    path = checkpoint / "model.keras"
    return keras.saving.load_model(path, custom_objects=OWN_MASKINGS)


def _check_same(found, wanted, folder):
    different = [key for key in wanted if found.get(key) != wanted[key]]
    if different:
        raise ValueError(
            f"{folder} holds a run of other settings. Name another folder with "
            f"`--results`. Received: {', '.join(different)} = "
            f"{[wanted[key] for key in different]}, found "
            f"{[found.get(key) for key in different]}"
        )
