"""Gradients of processes of torch: means of buckets, reduced in the backward pass."""

import os
import pathlib
import re
import subprocess
import sys

import keras
import pytest

from tests.distribution.test_replicas import free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "torch", reason="others reduce in compiled code"
    ),
]

PROGRAM = pathlib.Path(__file__).with_name("buckets_program.py")
CHECKS = re.findall(r"^def (\w+)\(rank\)", PROGRAM.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def passed():
    """What two processes print, the names of the checks that hold, and their errors."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, PROGRAM, *CHECKS],
            env={
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes(check, passed):
    for output, errors in passed:
        assert check in output.splitlines(), errors[-3000:]
