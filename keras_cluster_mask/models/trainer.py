"""How a pair of towers is compiled, trained, evaluated and saved with its optimizer."""

import functools
import os
import warnings
from collections.abc import Container, Sequence
from typing import Any

import keras
import numpy as np

from keras_cluster_mask.batches import num_batches
from keras_cluster_mask.distribution import gradients, replicas
from keras_cluster_mask.distribution.backends import keeping_weights
from keras_cluster_mask.encoders.projections import set_scaling
from keras_cluster_mask.encoders.surgery import freeze_mask_tokens
from keras_cluster_mask.encoders.text_lengths import cut_texts
from keras_cluster_mask.models.dual_encoder import DualEncoder
from keras_cluster_mask.training import layers, optimizers
from keras_cluster_mask.training.features import TowerFeatures
from keras_cluster_mask.training.fitting import fit
from keras_cluster_mask.training.input_rules import check_unused
from keras_cluster_mask.training.training_data import evaluation_data, until_the_end
from keras_cluster_mask.types import Data, Tensor

# Options that a step is compiled with, which may change between two calls of `fit`.
OPTIONS = "micro_batch_size", "duplicates"


class StepMean(keras.metrics.Mean):
    """A mean over steps, which the logs omit if no step updates it."""

    is_updated = False

    def update_state(self, values, sample_weight=None):
        self.is_updated = True
        super().update_state(values, sample_weight)

    def result(self):
        return super().result() if self.is_updated else {}


class Trainer(DualEncoder):
    """Trains, evaluates and predicts. The base class of `ContrastiveModel`."""

    @functools.cached_property
    def _compiled_with(self) -> dict[str, list[Any]]:
        """The options that each compiled function was made with, by its name."""
        return {}

    @property
    def step_means(self) -> dict[str, StepMean]:
        """The metrics of a step, by name."""
        if getattr(self, "_step_means", None) is None:
            names = "accuracy", "temperature", "mask_ratio"
            # As an attribute, which Keras tracks.
            self._step_means = {name: StepMean(name=name) for name in names}
        return self._step_means

    # === Compiled functions ===

    def make_train_function(self, force: bool = False) -> Any:
        # Values can be read here for the last time before the step is compiled.
        parts = optimizers.optimizer_parts(self.optimizer)
        gradients.prepare_replicas(self, parts)
        # TensorFlow cannot create its variables in a step that XLA compiles.
        optimizers.build(self)
        optimizers.check_built(self.optimizer, self.trainable_variables)
        for masking in self.maskings:
            masking.check_ready()
        if self._make("train_function", super().make_train_function, force):
            is_shared = replicas.num_replicas() > 1
            self.train_function = gradients.over_processes(
                self.train_function,
                self,
                layers.averaged_variables(self) if is_shared else (),
            )
        return self.train_function

    def make_test_function(self, force: bool = False) -> Any:
        self._make("test_function", super().make_test_function, force)
        return self.test_function

    def make_predict_function(self, force: bool = False) -> Any:
        self._make("predict_function", super().make_predict_function, force)
        return self.predict_function

    def _make(self, name, make, force):
        """Lets Keras make a function, and returns whether it is a new one."""
        self._forget_outdated(name)
        before = getattr(self, name)
        make(force)
        made = getattr(self, name)
        if made is not before:
            setattr(self, name, cut_texts(made, self.text_tower))
        return made is not before

    def _options(self):
        """Returns the options that a step is compiled with."""
        return [
            *(getattr(self, name) for name in OPTIONS),
            *(x.mask_ratio for x in self.maskings),
            *(getattr(x, name) for x in self.maskings for name in x._settings),
            # TensorFlow would still train weights that are frozen after the first step.
            *(weight.trainable for weight in self.weights),
        ]

    def _forget_outdated(self, name):
        """Deletes a compiled function if an option that it depends on has changed."""
        options = self._options()
        if self._compiled_with.get(name, options) != options:
            # JAX would reuse the steps of a function that was not deleted.
            setattr(self, name, None)
        # An encoder that is built in the first step changes them within it.
        if self.built:
            self._compiled_with[name] = options

    def set_scaling(self, features: TowerFeatures | None) -> list[keras.layers.Layer]:
        """Fixes the scaling of features in projections that have one, once.

        Returns:
            List of the layers whose scaling was not fixed before.
        """
        return [
            layer
            for name in ("image", "text")
            for layer in set_scaling(
                getattr(self, f"{name}_tower").projection,
                features and functools.partial(features.statistics, name),
            )
        ]

    # === Compile, fit, evaluate, predict ===

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer | None = None,
        *,
        decay_vectors: bool = False,
        **kwargs: Any,
    ) -> None:
        """Configures the optimizer and its weight decay.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_backbone(backbone)
        model.compile(
            keras.optimizers.AdamW(1e-3, weight_decay=0.2, global_clipnorm=1.0)
        )
        ```

        Args:
            optimizer: A Keras optimizer, or its name. `kcm.optimizer_by_block`
                has a learning rate for each block. To freeze a tower, set
                `encoder.trainable = False` before compiling. On torch, `Adam` and
                `AdamW` use torch's fused kernel, and `global_clipnorm` clips gradients
                in place.
            decay_vectors: Boolean. Whether weight decay also applies to biases and
                other vectors, such as the scales of normalization layers, class tokens
                and the temperature. By default, weight decay applies only to matrices
                that the optimizer does not exclude.
            **kwargs: Arguments of `keras.Model.compile`, except losses and metrics,
                which are built in. `auto_scale_loss` scales the loss if an encoder
                computes in float16.

        Raises:
            ValueError: If there is no optimizer, if a loss or metrics are passed, if
                the optimizer was built for other weights or compiled with another
                `decay_vectors`, or if it uses weight decay and the model is not built.
        """
        built_in = ("loss", "loss_weights", "metrics", "weighted_metrics")
        check_unused(
            "the loss is set by the argument `loss` of the model, and the metrics are "
            "built in.",
            **{name: kwargs.get(name) for name in built_in},
        )
        if optimizer is None:
            raise ValueError(
                "`optimizer` must be a Keras optimizer or its name, such as 'adamw'. "
                "Received: optimizer=None"
            )
        freeze_mask_tokens(self.image_encoder)
        # In the scope of the model, which may be compiled outside of it.
        with gradients.strategy_scope(self):
            optimizer = keras.optimizers.get(optimizer)
            for metric in self.step_means.values():
                metric.reset_state()
        if kwargs.get("auto_scale_loss", True):
            optimizer = optimizers.with_loss_scaling(optimizer, layers.all_layers(self))
        optimizers.configure(optimizer, self, decay_vectors)
        super().compile(optimizer, **kwargs)
        self._compile_options = {
            "decay_vectors": bool(decay_vectors),
            "auto_scale_loss": kwargs.get("auto_scale_loss", True),
        }

    def fit(
        self,
        x: Data | TowerFeatures | None = None,
        y: None = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: str | int = "auto",
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        validation_split: float = 0.0,
        validation_data: Data | TowerFeatures | None = None,
        shuffle: bool | None = None,
        class_weight: None = None,
        sample_weight: Tensor | None = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Container[int] = 1,
        *,
        resume_from: str | os.PathLike | None = None,
    ) -> keras.callbacks.History:
        """Trains the model, like `keras.Model.fit` with one additional argument.

        To resume a killed run, start the same program again. It must save checkpoints
        and pass their folder as `resume_from`. Training resumes with the epoch after
        the last checkpoint. Pass `steps_per_epoch` for shorter epochs, so that less
        training can be lost. On one machine and in float32, the final weights are
        bit-identical to an uninterrupted run, on data in a known order: arrays, an
        `image_text_dataset`, or a `PyDataset` with `shuffle=False`. Keras shuffles a
        `PyDataset` in an order that is not saved, and the `shuffle` of a
        `tf.data.Dataset` starts over. If you use `CSVLogger`, pass it `append=True`.
        The returned history holds all epochs, including those before the interruption.

        An epoch of arrays, `TowerFeatures` or an `image_text_dataset` has as many steps
        as there are full batches. The remaining pairs are carried over to the next
        epoch. Each epoch of `steps_per_epoch` steps continues where the last one ended.
        On an `image_text_dataset`, so does another call of `fit`. Each process passes
        all arrays, and trains on its rows of every batch.

        All arguments except `resume_from` match `keras.Model.fit`, in the same order.

        Example:

        ```python
        backbone = kcm.models.clip_backbone("tiny", image_size=32, vocabulary_size=100)
        model = kcm.ContrastiveModel.from_backbone(backbone)
        model.compile(optimizer="adam")
        batch = {
            "images": np.random.randint(0, 256, (8, 32, 32, 3)).astype("uint8"),
            "token_ids": np.random.randint(1, 100, (8, 12)).astype("int32"),
        }
        model.fit(
            batch,
            batch_size=4,
            resume_from="run",
            callbacks=[kcm.callbacks.Checkpoint("run")],
        )
        ```

        Args:
            resume_from: str or path. The folder of a `kcm.callbacks.Checkpoint`, local
                or a URL such as `gs://bucket/run`. Training starts from the last
                checkpoint, or from the beginning if there is none, and `fit` prints
                which. `resume_from` can also be the path of one checkpoint, which must
                exist. The options of `compile` may differ from the saved run; the new
                options are used. A learning rate that a callback changed is restored,
                unless you compile with another rate than the saved run started with.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            FileNotFoundError: If `resume_from` is a checkpoint that does not exist.
            ValueError: If the checkpoint is damaged, or from another model, masking,
                optimizer, tokenizer, data or seed (the differences are listed), or if
                the tokenizer of an `image_text_dataset` is not equal to the
                model's tokenizer, or lacks the special tokens that the text encoder
                needs.
        """
        return fit(
            self,
            super().fit,
            resume_from,
            x=x,
            y=y,
            batch_size=batch_size,
            epochs=epochs,
            verbose=verbose,
            callbacks=callbacks,
            validation_split=validation_split,
            validation_data=validation_data,
            # Unless asked for, Keras shuffles no batches, since it cannot shuffle most.
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
        )

    def evaluate(
        self,
        x: Data | TowerFeatures | None = None,
        y: None = None,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        sample_weight: Tensor | None = None,
        steps: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Computes the loss and the accuracy within batches.

        Both are means over all pairs, and depend on the number of negatives in a batch.
        A last batch that is smaller than the others has fewer, and its pairs are
        easier: choose a batch size that divides the number of pairs, and compare only
        values at the same batch size. `fit` evaluates `validation_data` in the same
        way.

        Arguments and results match `keras.Model.evaluate`.
        """
        verbose, steps = replicas.verbosity(verbose), steps or num_batches(x)
        x = evaluation_data(self, x, y, sample_weight, steps)
        with until_the_end(), keeping_weights(self):
            return super().evaluate(x, None, batch_size, verbose, None, steps, **kwargs)

    def predict(
        self,
        x: Data | TowerFeatures,
        batch_size: int | None = None,
        verbose: str | int = "auto",
        steps: int | None = None,
        **kwargs: Any,
    ) -> dict[str, np.ndarray]:
        verbose, steps = replicas.verbosity(verbose), steps or num_batches(x)
        x = evaluation_data(self, x, steps=steps)
        with until_the_end(), keeping_weights(self):
            return super().predict(x, batch_size, verbose, steps, **kwargs)

    # === Saving ===

    def get_compile_config(self) -> dict[str, Any] | None:
        config = super().get_compile_config()
        if not config:
            return config
        if not optimizers.fits_when_reloaded(self.optimizer, self):
            warnings.warn(
                "The optimizer was built for other weights than the loaded model will "
                "train, so the model is saved without the optimizer: compile again "
                "after weights are frozen or unfrozen, or compile the loaded model. "
                f"Received: model={self.name}",
                stacklevel=2,
            )
            return None
        return {**config, **self._compile_options}

    def compile_from_config(self, config: dict[str, Any]) -> None:
        # Keras's own method does not support models that override `compile`.
        self.compile(**keras.saving.deserialize_keras_object(config))
        optimizers.build(self)
