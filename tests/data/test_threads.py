"""Threads that do not keep a program from ending."""

import threading
import time

import pytest

from keras_cluster_mask.data.threads import Threads

pytestmark = pytest.mark.any_backend


def test_closing_waits_for_a_call_in_progress():
    begun, ended = threading.Event(), threading.Event()

    def call():
        begun.set()
        time.sleep(0.2)
        ended.set()

    threads = Threads(2)
    threads.submit(call)
    begun.wait()
    threads.close()
    assert ended.is_set()


def test_closing_waits_a_second_at_most_for_calls_that_do_not_end():
    release = threading.Event()
    threads = Threads(8)
    for _ in range(8):
        threads.submit(release.wait)
    closing = threading.Thread(target=threads.close, daemon=True)
    closing.start()
    closing.join(4.0)
    assert not closing.is_alive()
    release.set()
