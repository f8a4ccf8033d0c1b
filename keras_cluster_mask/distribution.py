"""What differs between backends: chunks of a batch, and batches over many devices.

The rest of the library is written once, in `keras.ops`. JAX sees the global batch
whatever the number of devices, so there is one replica there; TensorFlow and torch run
the same step on every replica, each with its own rows of the batch. No backend is
imported but the one that runs.
"""

import contextlib
import datetime
import functools
import os

import keras
from keras import ops, tree

# Seconds that a process waits for the others before it gives up.
TIMEOUT = 50


# === Chunks of a batch ===


def in_chunks(function, num_chunks, weights, state, rows):
    """Runs a function on one chunk of rows after another, forgetting what it can.

    The activations of a chunk are thrown away and computed again when its gradients
    are, so that only one chunk's are held at a time. Chunk `i` of `n` consists of the
    rows `i, i + n, i + 2 n, ...`: if consecutive rows lie on different devices, every
    chunk occupies all of them.

    Args:
        function: `function(weights, state, index, rows) -> (outputs, state)`. It must
            take all that it differentiates from its arguments, and its first output
            must be a float.
        num_chunks: Integer that divides the number of rows.
        weights: Structure of tensors, the same for all chunks.
        state: Structure of tensors handed on from chunk to chunk. No gradients pass.
        rows: Structure of tensors `(batch, ...)`, of which each chunk gets its part.

    Returns:
        A tuple: the outputs, stacked over chunks along a new first axis, and the last
        state. `merge_chunks` brings rows back into their order.
    """

    weights, state, rows = tree.map_structure(_as_tensor, (weights, state, rows))
    state = tree.map_structure(ops.stop_gradient, state)
    remat = _remat_in_turn()

    def one(state, index):
        chunk = tree.map_structure(lambda x: take_chunk(x, index, num_chunks), rows)
        outputs, state = run_again(function, weights, state, index, chunk, remat=remat)
        return tree.map_structure(ops.stop_gradient, state), outputs

    if keras.backend.backend() == "jax":
        # Compiled, a loop that is written out holds the activations of all chunks.
        state, outputs = ops.scan(one, state, ops.arange(num_chunks))
        return outputs, state
    # A loop of the graph holds what `recompute_grad` is there to forget.
    columns = []
    for index in range(num_chunks):
        state, outputs = one(state, ops.convert_to_tensor(index, "int32"))
        columns.append(outputs)
    return tree.map_structure(lambda *column: ops.stack(column), *columns), state


def run_again(function, *arguments, remat=keras.remat):
    """Runs a function, and again for its gradients, holding nothing in between.

    Args:
        function: `function(*arguments)`. It must take all that it differentiates from
            its arguments, and its first output must be a float.
        *arguments: Structures of tensors or variables; it is passed tensors.
        remat: `keras.remat`, or a function like it.

    Returns:
        What the function returns, a structure of tensors.
    """
    arguments = tree.map_structure(_as_tensor, arguments)
    bools = [
        keras.backend.standardize_dtype(x.dtype) == "bool"
        for x in tree.flatten(arguments)
    ]
    structure = []

    # Flat lists of tensors, since `tf.recompute_grad` takes nothing else; nor bools.
    def flat_function(*flat):
        flat = [ops.cast(x, "bool") if y else x for x, y in zip(flat, bools)]
        outputs = function(*tree.pack_sequence_as(arguments, flat))
        structure[:] = [tree.map_structure(lambda x: None, outputs)]
        return tuple(tree.flatten(outputs))

    flat = tree.flatten(arguments)
    flat = [ops.cast(x, "int32") if y else x for x, y in zip(flat, bools)]
    flat = remat(flat_function)(*flat)
    return tree.pack_sequence_as(structure[0], list(flat))


def merge_chunks(x):
    """`(chunks, rows of a chunk, ...)` to `(batch, ...)`, in the order of the batch."""
    x = ops.swapaxes(x, 0, 1)
    return ops.reshape(x, (x.shape[0] * x.shape[1], *x.shape[2:]))


def take_chunk(x, index, num_chunks):
    split = ops.reshape(x, (x.shape[0] // num_chunks, num_chunks, *x.shape[1:]))
    return split[:, index]


def _remat_in_turn():
    """A `keras.remat`; of its functions only one at a time computes again."""
    if keras.backend.backend() != "tensorflow":
        return keras.remat
    import tensorflow as tf

    # A graph would compute all of them at once: each waits for the gradient of the
    # `turn` that it hands on, which comes when the next one has all its gradients.
    turn = tf.zeros(())

    @tf.custom_gradient
    def take(turn, *values):
        def give_back(gradient, *gradients):
            with tf.control_dependencies([x for x in gradients if x is not None]):
                # Not its own, a constant, of which the graph would know that nothing
                # has to be waited for.
                any_element = tf.reshape(gradients[0], [-1])[0]
                return tf.cast(any_element, "float32"), *gradients

        with tf.control_dependencies([turn]):
            return (tf.identity(turn), *map(tf.identity, values)), give_back

    def remat(function):
        @keras.remat
        def once_more(turn, *values):
            results = function(*values)
            with tf.control_dependencies(tree.flatten(results)):
                return tf.identity(turn), results

        def call(*values):
            nonlocal turn
            turn, results = once_more(*take(turn, *values))
            return results

        return call

    return remat


def _as_tensor(x):
    x = x.value if isinstance(x, keras.Variable) else ops.convert_to_tensor(x)
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # Of a variable in an argument `recompute_grad` counts the gradient twice.
        x = tf.convert_to_tensor(x)
    return x


# === Replicas ===


def initialize():
    """Joins the processes of one training run. Call it first thing in the program.

    On torch the program is started by `torchrun` on every GPU; each process takes the
    GPU of its local rank, or the CPU where there is none. On JAX it is
    `keras.distribution.initialize`, which reads the environment variables
    `KERAS_DISTRIBUTION_JOB_ADDRESSES`, `_NUM_PROCESSES` and `_PROCESS_ID`; afterwards
    choose a `keras.distribution.DataParallel(auto_shard_dataset=False)`. If a process
    dies, the others end with an error within a minute.

    Raises:
        RuntimeError: On TensorFlow, or on torch outside of `torchrun`.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        import jax

        # Keras hands on no limits of time; JAX's own let the others wait longer.
        join = jax.distributed.initialize
        jax.distributed.initialize = functools.partial(
            join, heartbeat_timeout_seconds=TIMEOUT // 2
        )
        try:
            keras.distribution.initialize()
        finally:
            jax.distributed.initialize = join
        return
    if backend != "torch":
        raise RuntimeError(
            "`initialize` is for processes of JAX or torch; TensorFlow trains on the "
            "devices of one: `tf.distribute.MirroredStrategy`. "
            f"Received: backend={backend!r}"
        )
    if "WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            "`initialize` needs what `torchrun` says about the processes: start the "
            "program by `torchrun --nproc-per-node=NUMBER program.py`. "
            "Received: no environment variable WORLD_SIZE"
        )
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group(
        "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=TIMEOUT)
    )


def num_replicas():
    """How many replicas train together, each with its rows of the batch."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        context = _tensorflow_replica()
        return 1 if context is None else context.num_replicas_in_sync
    if backend == "torch" and _torch_distributed() is not None:
        return _torch_distributed().get_world_size()
    return 1


def replica_index():
    """The number of this replica, from 0."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        context = _tensorflow_replica()
        return 0 if context is None else context.replica_id_in_sync_group
    if backend == "torch" and _torch_distributed() is not None:
        return _torch_distributed().get_rank()
    return 0


def is_main_process():
    """Whether this process is the one that prints and writes files."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_index() == 0
    return keras.backend.backend() != "torch" or replica_index() == 0


def process(training):
    """The number of this process and how many share the data, as a tuple of ints.

    In evaluation each process of torch reads everything: shares of different sizes
    would leave some waiting for the others.
    """
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_index(), jax.process_count()
    if keras.backend.backend() == "torch" and training:
        return replica_index(), num_replicas()
    return 0, 1


def global_shapes(*tensors):
    """The shapes of the global batch's tensors, from those of this replica."""
    replicas = num_replicas()
    return tuple(
        (None if x.shape[0] is None else x.shape[0] * replicas, *x.shape[1:])
        for x in tensors
    )


def once_there(data):
    """A context in which nothing runs before the data is there.

    In a step of TensorFlow's that finds a dataset at its end, what does not depend on
    the batch would still run: counters of steps and metrics would go on by one.
    """
    if keras.backend.backend() != "tensorflow":
        return contextlib.nullcontext()
    import tensorflow as tf

    return tf.control_dependencies([x for x in tree.flatten(data) if x is not None])


def replicas_share(training):
    """Whether replicas have different rows of one batch, and more than one has any."""
    alone = keras.backend.backend() == "torch" and not training
    return num_replicas() > 1 and not alone


def gather(x):
    """The rows of all replicas, in their order, from those of this one.

    Gradients flow back to the replica that a row came from.

    Args:
        x: `(rows, ...)` tensor, of the same shape on every replica.

    Returns:
        `(replicas * rows, ...)` tensor.
    """
    if num_replicas() == 1:
        return x
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        rows = None if x.shape[0] is None else num_replicas() * x.shape[0]
        gathered = _tensorflow_replica().all_gather(x, axis=0)
        return tf.ensure_shape(gathered, (rows, *x.shape[1:]))
    return _torch_gather()(x)


def check_batch_size(model, batch_size, pairs=None):
    """Raises if the replicas cannot share batches of a size.

    Args:
        model: A compiled model.
        batch_size: Integer or `None`, the rows of this process.
        pairs: Integer or `None`, the number of pairs in this process's arrays.
    """
    if keras.backend.backend() == "torch":
        sizes = values_of_all((batch_size, pairs))
        if len({*sizes}) > 1:
            raise ValueError(
                "All processes must train on batches of the same size and, if on "
                "arrays, on equally many pairs. Received: (batch_size, pairs) "
                f"{sizes} by process"
            )
    if keras.backend.backend() != "tensorflow":
        return
    replicas = model.distribute_strategy.num_replicas_in_sync
    if replicas > 1 and (batch_size is None or batch_size % replicas):
        raise ValueError(
            "The number of replicas must divide the batch size, which must be known: "
            "use a dataset with full batches, `dataset.batch(batch_size, "
            f"drop_remainder=True)`. Received: batch_size={batch_size}, {replicas} "
            "replicas"
        )


def values_of_all(value):
    """What each process says, as a list; waits until all have said it."""
    if keras.backend.backend() == "torch" and num_replicas() > 1:
        values = [None] * num_replicas()
        _torch_distributed().all_gather_object(values, value)
        return values
    if keras.backend.backend() == "jax":
        import jax

        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(value).tolist()
    return [value]


def to_numpy(variable):
    """A variable's value, whole even if devices share it."""
    if keras.backend.backend() == "jax" and not variable.value.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(variable.value, tiled=True)
    return ops.convert_to_numpy(variable)


def own_rows(x):
    """The rows of this replica, from those of the global batch."""
    replicas = num_replicas()
    if replicas == 1:
        return x
    rows = x.shape[0] // replicas
    start = [replica_index() * rows] + [0] * (len(x.shape) - 1)
    return ops.slice(x, start, (rows, *x.shape[1:]))


def share_of_loss(loss):
    """A replica's loss so that its gradients and its report are the global ones.

    Keras expects replicas' losses to add up on TensorFlow, where it averages what it
    reports; on torch gradients are averaged here, and what is reported is left alone.
    """
    replicas = num_replicas()
    if replicas == 1:
        return loss
    if keras.backend.backend() == "tensorflow":
        return loss / replicas
    return loss + (of_all_replicas(loss) - loss).detach()


def of_all_replicas(x):
    """The mean over all replicas, where Keras's metrics see one replica alone."""
    if keras.backend.backend() != "torch" or num_replicas() == 1:
        return x
    return ops.mean(gather(ops.stop_gradient(x)[None]), axis=0)


def prepare(model):
    """Makes a compiled model ready to train on all replicas. Called by `fit`.

    Raises:
        ValueError: For a way of distribution under which Keras's `fit` does not work.
    """
    backend = keras.backend.backend()
    reduce, see = None, model.gradient_norm and model.gradient_norm.see
    if backend == "tensorflow":
        import tensorflow as tf

        strategy = model.distribute_strategy
        if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError(
                "On TensorFlow, training on several machines does not work with Keras "
                "3. Use `tf.distribute.MirroredStrategy` on one machine, or the JAX "
                "backend: `keras.distribution.initialize()`, then `keras.distribution."
                "set_distribution(keras.distribution.DataParallel())`. "
                f"Received: strategy={type(strategy).__name__}"
            )
        # Keras squares what a token gets from its several places before it has added it
        # up: norms, and the second moments of Adam, would come out wrong.
        reduce = _tensorflow_dense
        if strategy.num_replicas_in_sync > 1:
            reduce = _tensorflow_sums
            # They are added up already.
            inner_optimizer(model.optimizer)._all_reduce_sum_gradients = list
    elif backend == "torch" and num_replicas() > 1:
        for variable in [*model.variables, *model.optimizer.variables]:
            _torch_distributed().broadcast(variable.value.data, src=0)
        reduce = _torch_means
    _give_global_gradients(model.optimizer, reduce, see)


def inner_optimizer(optimizer):
    """The one that updates weights, where another scales the loss around it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def _give_global_gradients(optimizer, reduce, see):
    # Before gradients are clipped, which must come out alike on all replicas. Keras
    # lets TensorFlow add up what was clipped on each, and torch nothing at all.
    name = "stateless_apply" if keras.backend.backend() == "jax" else "apply"
    vars(optimizer).pop(name, None)
    apply = getattr(optimizer, name)

    def reduce_and_apply(gradients, *args):
        gradients = list(gradients)
        if reduce:
            reduced = iter(reduce([x for x in gradients if x is not None]))
            gradients = [x if x is None else next(reduced) for x in gradients]
        if see:
            see(gradients)
        return apply(gradients, *args)

    def see_and_apply(variables, gradients, *args):
        with keras.StatelessScope(list(zip(optimizer.variables, variables))):
            see(gradients)
        return apply(variables, gradients, *args)

    if reduce or see:
        stateless = name == "stateless_apply"
        setattr(optimizer, name, see_and_apply if stateless else reduce_and_apply)


def average(variables):
    """Gives all replicas the mean of what float variables have become on each.

    Only torch needs it: TensorFlow's variables do so when they are written to.
    """
    if keras.backend.backend() == "torch" and num_replicas() > 1:
        for variable in variables:
            _torch_distributed().all_reduce(variable.value.data)
            variable.value.data /= num_replicas()


def _tensorflow_replica():
    """The context of a replica of several, or `None`."""
    import tensorflow as tf

    if not tf.distribute.has_strategy() or tf.distribute.in_cross_replica_context():
        return None
    context = tf.distribute.get_replica_context()
    return context if context.num_replicas_in_sync > 1 else None


@functools.cache
def _torch_gather():
    """An `all_gather` with gradients: torch deprecates its own, without an heir."""
    import torch

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            parts = [torch.empty_like(x) for _ in range(num_replicas())]
            torch.distributed.all_gather(parts, x.contiguous())
            return torch.cat(parts)

        @staticmethod
        def backward(context, gradient):
            gradient = gradient.contiguous()
            torch.distributed.all_reduce(gradient)
            return own_rows(gradient)

    return Gather.apply


def _tensorflow_sums(gradients):
    import tensorflow as tf

    replica, total = _tensorflow_replica(), tf.distribute.ReduceOp.SUM
    return replica.all_reduce(total, _tensorflow_dense(gradients))


def _tensorflow_dense(gradients):
    import tensorflow as tf

    return [tf.convert_to_tensor(x) for x in gradients]


def _torch_means(gradients):
    reduce = _torch_distributed().all_reduce
    for work in [reduce(x, async_op=True) for x in gradients]:
        work.wait()
    return [x / num_replicas() for x in gradients]


def _torch_distributed():
    """`torch.distributed` if processes train together, or `None`."""
    import torch

    distributed = torch.distributed
    ready = distributed.is_available() and distributed.is_initialized()
    return distributed if ready else None


# === Generators of random numbers outside of Keras ===


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
