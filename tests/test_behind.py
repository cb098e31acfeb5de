"""Work behind the computing: in order, one at a time, errors not lost."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from verglas.cli.behind import Behind, written
from verglas.core.threads import few_threads
from verglas.errors import OutputError


@pytest.mark.parametrize("most", [0, 1])
def test_work_is_done_in_order_and_before_the_end(most):
    done, threads = [], set()

    def work(number):
        threads.add(threading.get_ident())
        done.append(number)

    with Behind(most) as later:
        for number in range(5):
            later.do(lambda number=number: work(number))
    assert done == list(range(5))
    assert (threading.get_ident() in threads) == (most == 0)


def test_the_caller_goes_on_meanwhile_but_never_two_pieces_ahead():
    first_may_end, second_started = threading.Event(), threading.Event()
    with Behind(1) as later:
        later.do(first_may_end.wait)  # returns although the work is not done
        threading.Timer(0.05, first_may_end.set).start()
        later.do(second_started.set)
        assert first_may_end.is_set()  # the second was taken only after the first had ended
    assert second_started.is_set()


def test_several_pieces_may_wait_but_no_more():
    may_end, done = threading.Event(), []
    with Behind(3) as later:
        later.do(may_end.wait)
        for number in range(2):
            assert later.waiting == number
            later.do(lambda number=number: done.append(number))
        assert not done and not may_end.is_set() and later.waiting == 2
        threading.Timer(0.05, may_end.set).start()
        later.do(lambda: done.append(2))
        assert may_end.is_set()
    assert done == [0, 1, 2]


def test_an_error_is_found_as_soon_as_it_is_there():
    failed = threading.Event()
    with pytest.raises(OSError, match="last"), Behind(3) as later:
        later.do(_fail_last)
        later.do(failed.set)
        failed.wait()
        later.do(lambda: None)
        pytest.fail("the error of the first piece must come up here")


@pytest.mark.parametrize("most", [0, 1])
def test_an_error_reaches_the_caller(most):
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Behind(most) as later:
        later.do(fail)
        later.do(lambda: None)
        pytest.fail("the error of the first piece must come up here")


def test_an_error_of_the_last_piece_comes_at_the_end():
    with pytest.raises(OSError, match="last"), Behind(1) as later:
        later.do(_fail_last)


def test_an_error_of_the_caller_is_kept_and_waits_for_the_work():
    done = []
    with pytest.raises(KeyboardInterrupt), Behind(1) as later:
        later.do(lambda: done.append(1))
        raise KeyboardInterrupt
    assert done == [1]


def _fail_last():
    raise OSError("last")


def test_the_thread_behind_keeps_its_threads_where_the_computing_one_has_fewer() -> None:
    before, found = torch.get_num_threads(), list[int]()
    torch.set_num_threads(3)
    try:
        with Behind(2) as later:
            for _ in range(2):
                with few_threads(1):
                    later.do(lambda: found.append(torch.get_num_threads()))
                    time.sleep(0.1)
                    assert torch.get_num_threads() == 1
        assert found == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_what_goes_wrong_beside_a_file_is_told_by_its_own_name():
    def fail(error):
        raise error

    with ThreadPoolExecutor(1) as pool:
        assert written(pool.submit(lambda: None)) is None
        with pytest.raises(OutputError, match=r"events\.jsonl could not be written: No space"):
            written(pool.submit(fail, OSError(28, "No space left on device", "events.jsonl")))
        with pytest.raises(ValueError, match="other"):
            written(pool.submit(fail, ValueError("other")))
