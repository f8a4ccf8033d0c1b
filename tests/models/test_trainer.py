"""What a ContrastiveModel changes in the methods of Keras."""

import keras
import pytest

import keras_cluster_mask as kcm
from tests.encoders.test_families import bert, texts
from tests.helpers import (
    FAST,
    assert_close,
    exported,
    image_mlp,
    random_pairs,
    run_program,
    text_bag,
    tiny_clip,
)


class OwnMetrics(kcm.ContrastiveModel):
    """A model whose metrics are its own, as in the examples of keras.io."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.own = keras.metrics.Mean(name="own")

    @property
    def metrics(self):
        return [self.own]

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.own.update_state(loss)
        return loss


def test_a_model_with_metrics_of_its_own_trains_and_is_evaluated():
    model = OwnMetrics(image_mlp(), text_bag())
    model.compile("sgd", **FAST)
    pairs = random_pairs(12)
    fit = dict(batch_size=4, epochs=2, verbose=0, validation_data=pairs)
    assert model.fit(pairs, **fit).history.keys() == {"own", "val_own"}
    assert model.evaluate(pairs, verbose=0, return_dict=True).keys() == {"own"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["clip", "bert"])
def test_a_model_that_was_never_called_is_exported_for_any_batch_size(kind, tmp_path):
    options = {}
    if kind == "clip":
        pairs, masking = random_pairs(4), kcm.RandomMasking(0.5)
        model = kcm.ContrastiveModel.from_backbone(tiny_clip(), masking=masking)
    else:
        pairs, model = texts(4), kcm.ContrastiveModel(image_mlp(), bert())
    if kind == "bert" and keras.backend.backend() == "jax":
        # It needs a length, which this encoder does not define.
        specs = keras.tree.map_structure(
            lambda x: keras.InputSpec(x.dtype, (None, *x.shape[1:])), pairs
        )
        options = {"input_signature": [specs]}
    embed = exported(model, tmp_path, **options)
    expected = model.predict(pairs, verbose=0)
    for size in (1, 4):
        found = embed({name: x[:size] for name, x in pairs.items()})
        assert_close(found, {name: x[:size] for name, x in expected.items()}, 1e-5)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "jax", reason="a setting of JAX")
def test_a_later_program_compiles_no_step_again(tmp_path):
    compiled = []
    for _ in range(2):
        run_program("tests/programs/cached_steps.py", tmp_path)
        compiled.append({x.name for x in tmp_path.iterdir() if "atime" not in x.name})
    assert any("train_step" in name for name in compiled[0])
    assert compiled[1] == compiled[0]
