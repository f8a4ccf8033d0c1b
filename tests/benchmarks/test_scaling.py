"""What a step needs on several devices, read from compiled programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from collectives import by_kind, collectives

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
pytestmark = pytest.mark.slow
on_jax = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="compiles with JAX"
)

WIDTH, PER_DEVICE, DEVICES = 96, 4, 6
ARGUMENTS = ["--size=tiny", "--image-size=32", "--dtype=float32"]

COMPILE = """
import json
import sys

import scaling

options = scaling.arguments()
print(json.dumps([scaling.measure(options, **row) for row in options.rows]))
"""

FIT = """
import json
import pathlib
import sys

import jax
import keras
import numpy as np
import scaling
from collectives import collectives

options, (row,) = scaling.arguments(), scaling.arguments().rows
found = scaling.distribution(jax.devices(), row["shards"])
batch = scaling.make_batch(options, row["batch"])
model = scaling.make_model(options, row.get("micro"))
lowered = scaling.lowered_step(model, found, batch).compile().as_text()

rng = np.random.default_rng(0)
data = {key: rng.integers(1, 99, x.shape).astype(x.dtype) for key, x in batch.items()}
keras.distribution.set_distribution(found)
model = scaling.make_model(options, row.get("micro"))
model.fit(data, batch_size=row["batch"], verbose=0)
programs = pathlib.Path(options.results).glob("*train_step*after_optimizations.txt")
*_, fitted = sorted(programs)
for text in (lowered, fitted.read_text()):
    print(json.dumps(sorted(map(list, collectives(text, 6).items()))))
"""


def run(program, rows, *arguments, flags=""):
    """Runs a program where JAX has six devices; returns its lines of JSON."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)]),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + f" --xla_force_host_platform_device_count={DEVICES} {flags}",
        # What comes out of the cache is not dumped.
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, "-c", program, *ARGUMENTS, *arguments]
    command += ["--rows", *map(json.dumps, rows)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.fail(done.stderr[-3000:])
    lines = done.stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("[")]


@on_jax
def test_with_more_devices_only_the_gathered_embeddings_grow():
    counts = 1, 2, 4
    (rows,) = run(COMPILE, [dict(devices=n, batch=PER_DEVICE * n) for n in counts])
    sent = [sum(row["by kind"].values()) for row in rows]
    assert sent[0] == 0
    # Embeddings of images and of texts and two numbers a caption, gathered, and the
    # gradients of the embeddings.
    pair = 4 * (2 * 2 * WIDTH + 2)
    growth = sent[2] - sent[1]
    assert 0 < growth <= pair * PER_DEVICE * (4 - 2)
    weights = rows[0]["memory"]["arguments"] / 3
    # Gradients are reduced once.
    assert sent[1] - growth == pytest.approx(weights, rel=0.02)
    for name in ("temporaries", "arguments"):
        first, last = rows[1]["memory"][name], rows[2]["memory"][name]
        assert last - first < 0.05 * first, name
    assert rows[2]["flops"] == pytest.approx(rows[1]["flops"], rel=0.02)


@on_jax
@pytest.mark.parametrize("options", [dict(shards=1), dict(shards=3)], ids=str)
def test_the_program_without_data_is_that_of_fit(options, tmp_path):
    flags = f"--xla_dump_to={tmp_path} --xla_dump_hlo_module_re=.*train_step.*"
    row = dict(devices=DEVICES, batch=12, **options)
    lowered, fitted = run(FIT, [row], f"--results={tmp_path}", flags=flags)
    assert lowered == fitted
    assert len(lowered) > 1


PROGRAM = """HloModule jit_step, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%body (p: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %p = (s32[], bf16[8,4]{1,0}) parameter(0)
  %x = bf16[8,4]{1,0:T(8,128)(2,1)} get-tuple-element(%p), index=1
  %y = bf16[2,4]{1,0} reduce-scatter(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %r = (s32[], bf16[8,4]{1,0}) tuple(%y)
}

ENTRY %main (a: f32[3,5]) -> f32[3,5] {
  %a = f32[3,5]{1,0} parameter(0)
  %one = (f32[3,5]{1,0}, /*index=1*/pred[7]{0}) all-reduce(%a, %b), replica_groups=[1,4]<=[4], to_apply=%add
  %alone = f32[3,5]{1,0} all-reduce(%a), replica_groups={{0},{1},{2},{3}}, to_apply=%add
  %start = (f32[3]{0}, f32[12]{0}) all-gather-start(%c), replica_groups=[1,4]<=[4]
  %done = f32[12]{0} all-gather-done(%start)
  %loop = (s32[], bf16[8,4]{1,0}) while(%t), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  ROOT %out = f32[3,5]{1,0} collective-permute(%a), source_target_pairs={{0,1}}
}
"""  # noqa: E501


@pytest.mark.any_backend
def test_collectives_are_counted_as_often_as_they_run():
    found = collectives(PROGRAM, 4)
    assert found == {
        ("all-reduce", "f32[3,5]"): 60,
        ("all-reduce", "pred[7]"): 7,
        ("all-gather", "f32[12]"): 48,
        # The larger side, four parts of 16 bytes, three times.
        ("reduce-scatter", "bf16[2,4]"): 3 * 4 * 16,
        ("collective-permute", "f32[3,5]"): 60,
    }
    assert by_kind(found)["all-reduce"] == 67


OVERLAPPED = """HloModule jit_step, num_partitions=4

%begin (p: f32[2]) -> f32[8] {
  %x = f32[8]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=1] {'a'}
}

%more (p: f32[2]) -> f32[8] {
  %x = f32[8]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=1] {'a'}
  %y = f32[8]{0} all-gather(%p), channel_id=2, replica_groups=mesh['a'=4,'b'=1] {'a'}
  %z = f32[8]{0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=4,'b'=1] {'b'}
}

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %x = f32[8]{0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%s
}

ENTRY %main (a: f32[2]) -> f32[8] {
  %three = f32[8]{0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %one = f32[8]{0} fusion(%a), kind=kCustom, calls=%begin
  ROOT %two = f32[8]{0} fusion(%a), kind=kCustom, calls=%more
}
"""


@pytest.mark.any_backend
def test_what_overlaps_with_several_computations_is_counted_once():
    # The group of the last one has a single device.
    assert collectives(OVERLAPPED, 4) == {
        ("all-gather", "f32[8]"): 2 * 32,
        ("reduce-scatter", "f32[8]"): 32,
    }


@pytest.mark.any_backend
def test_a_loop_of_unknown_length_with_collectives_is_an_error():
    with pytest.raises(ValueError, match=r"Received: .*reduce-scatter"):
        collectives(PROGRAM.replace("known_trip_count", "other"), 4)


@pytest.mark.any_backend
def test_hours_and_cost_follow_from_the_arithmetic():
    command = [sys.executable, "-c", DERIVE]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), str(BENCHMARKS.parent)]),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    # 3 x 41.09 GFLOP a pair on 10 devices of 100 TFLOP/s at a half.
    speed = 10 * 100e12 * 0.5 / (3 * 41.09e9)
    assert found["images/s"] == pytest.approx(speed, rel=1e-3)
    hours = 1e6 * 36 / speed / 3600
    assert float(found["hours"]) == pytest.approx(hours, abs=0.06)
    assert found["cost"] == pytest.approx(hours * 10 * 2.0, abs=1)


DERIVE = """
import json
import scaling

print(json.dumps(scaling.derive("none", 10, 100, 2.0, 0.5, pairs=10**6, epochs=36)))
"""
