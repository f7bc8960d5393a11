"""Several threads at once, and what a call leaves of the state of the process."""

from __future__ import annotations

import copy
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from support.flow import small_images, small_model, small_result
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import lowering
from custom_quantizer.core.threads import exclusive, interruption_point, tools
from custom_quantizer.reference import integer_reference

EXAMPLE = (small_images(4),)
DATA = small_images(32)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also where a shell ignores it for what it runs in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def process_state() -> dict[str, Any]:
    """What belongs to the whole process and not to a call."""
    known = [name for name in logging.root.manager.loggerDict if name.startswith(("torch", "exec"))]
    return {
        "backends": {
            name: getattr(torch._C, f"_get_{name}_enabled")() for name in ("nnpack", "mkldnn")
        },
        "onednn": (torch.backends.mkldnn.deterministic, torch.backends.mkldnn.allow_tf32),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "threads": torch.get_num_threads(),
        "compiling": (torch.compiler.is_compiling(), torch.compiler.is_exporting()),
        "methods": (nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__),
        "random": (
            torch.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),  # type: ignore[union-attr, index]
        ),
        "warnings": (list(warnings.filters), warnings.showwarning),
        "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
        "loggers": {name: logging.getLogger(name).level for name in known},
        "environment": dict(os.environ),
        "recursion": sys.getrecursionlimit(),
        "signals": {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)},
        "hooks": (sys.excepthook, sys.stdout, sys.stderr, tuple(sys.path)),
    }


def assert_state(before: dict[str, Any]) -> None:
    after = process_state()
    for name, value in before.items():
        if isinstance(value, dict):  # importing may add a logger
            assert {key: after[name].get(key) for key in value} == value, name
        else:
            assert after[name] == value, name


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of calls that begin at the same time."""
    barrier = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_threads_get_what_each_would_get_alone() -> None:
    """The whole flow, its parts, and looks at a program, all at once."""
    alone = small_result()
    assert alone.lowered is not None
    program = alone.lowered
    want = [program.run(small_images(4, seed)) for seed in range(20)]
    model = small_model()  # not in a thread: the random generator is one for all
    before = process_state()

    def whole() -> bytes:
        made = cq.quantize(model, EXAMPLE, DATA, progress=False)
        assert made.lowered is not None
        return made.lowered.buffer

    def steps() -> bytes:
        with tools():
            captured = torch.export.export(copy.deepcopy(model), EXAMPLE).module()
            prepared = prepare_pt2e(captured, cq.IntegerQuantizer().set_global("a8w8"))
        cq.calibrate(prepared, DATA)
        with tools():
            converted = convert_pt2e(prepared)
        return cq.lower(converted, EXAMPLE).buffer

    def looks() -> list[bool]:
        inputs = [(small_images(4, seed),) for seed in range(20)]
        return [cq.verify(alone.converted, program, inputs).bit_exact for _ in range(3)]

    def runs() -> list[bool]:
        return [
            torch.equal(program.run(small_images(4, seed)), want[seed])
            for _ in range(40)
            for seed in range(20)
        ]

    made = at_once(whole, steps, looks, runs)
    assert [data == program.buffer for data in made[:2]] == [True] * 2
    assert all(all(found) for found in made[2:])
    assert_state(before)


class Stop(Exception):
    pass


@pytest.fixture
def backends_on() -> Iterator[None]:
    """Whatever ran before."""
    before = process_state()["backends"]
    torch._C._set_nnpack_enabled(True)
    torch._C._set_mkldnn_enabled(True)
    yield
    torch._C._set_nnpack_enabled(before["nnpack"])
    torch._C._set_mkldnn_enabled(before["mkldnn"])


@pytest.mark.usefixtures("backends_on")
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_call_that_fails_leaves_the_process_as_it_was(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = small_result().converted
    before = process_state()

    def fail(*_args: object, **_more: object) -> None:
        flags = process_state()["backends"]
        assert flags == {"nnpack": False, "mkldnn": False}
        raise error

    monkeypatch.setattr(lowering, "to_edge", fail)
    wanted = cq.LoweringError if error is Stop else KeyboardInterrupt
    with pytest.raises(wanted):
        cq.lower(converted, EXAMPLE)
    assert_state(before)
    monkeypatch.undo()

    def say(stage: str) -> None:
        if stage == "checking the program":
            raise error

    with pytest.raises(error):
        cq.lower(converted, EXAMPLE, progress=say)
    assert_state(before)
    # The lock is free again.
    assert at_once(lambda: integer_reference(converted)(*EXAMPLE).shape) == [(4, 3)]


@pytest.mark.usefixtures("backends_on")
def test_backends_switched_off_twice_come_back() -> None:
    before = process_state()

    def switch() -> None:
        for _ in range(50):
            with lowering._no_size_guards():
                time.sleep(0.0005)
                with lowering._no_size_guards():
                    assert not torch._C._get_mkldnn_enabled()
                assert not torch._C._get_mkldnn_enabled()

    at_once(*[switch] * 4)
    assert_state(before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_a_thread_it_has_not() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with exclusive():
            inside.set()
            leave.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        with exclusive():
            os._exit(7)
    deadline = time.monotonic() + 30
    done, status = os.waitpid(child, os.WNOHANG)
    while not done and time.monotonic() < deadline:
        time.sleep(0.01)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    leave.set()
    holder.join()
    assert os.waitstatus_to_exitcode(status) == 7


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_waits_until_the_tools_are_done(caplog: pytest.LogCaptureFixture) -> None:
    done = []

    @tools()
    def call() -> None:
        with tools():
            press()
            done.append("inner")
        done.append("outer")  # the end of a block inside of another is no end

    before = process_state()
    with pytest.raises(KeyboardInterrupt):
        call()
    assert done == ["inner", "outer"]
    assert "press it again to stop now" in caplog.text
    assert_state(before)
    with tools():
        pass  # it is not kept for the next one


def test_ctrl_c_takes_effect_where_no_tool_is_at_work() -> None:
    done = []

    @tools()
    def call() -> None:
        interruption_point()
        press()
        done.append("up to the point")
        interruption_point()
        done.append("behind it")

    before = process_state()
    with pytest.raises(KeyboardInterrupt):
        call()
    assert done == ["up to the point"]
    assert_state(before)


def test_a_second_ctrl_c_does_not_wait() -> None:
    done = []

    @tools()
    def call() -> None:
        press()
        done.append("after one")
        press()
        done.append("after two")

    before = process_state()
    with pytest.raises(KeyboardInterrupt) as caught:
        call()
    assert done == ["after one"]
    assert caught.value.__context__ is None  # one, although two were pressed
    assert_state(before)


def test_ctrl_c_comes_before_an_error() -> None:
    """A program that the tools start gets it as well, and fails of it."""

    @tools()
    def call() -> None:
        press()
        raise Stop

    before = process_state()
    with pytest.raises(KeyboardInterrupt) as caught:
        call()
    assert isinstance(caught.value.__context__, Stop)
    assert_state(before)


def test_lowering_stops_between_two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    converted = small_result().converted
    before, stages = process_state(), []
    real = lowering.to_edge

    def pressed(*args: Any, **more: Any) -> Any:
        press()
        edge = real(*args, **more)
        stages.append("partitioned")
        return edge

    monkeypatch.setattr(lowering, "to_edge", pressed)
    with pytest.raises(KeyboardInterrupt):
        cq.lower(converted, EXAMPLE, progress=stages.append)
    assert stages[-2:] == ["partitioning for XNNPACK", "partitioned"]
    assert_state(before)


@pytest.fixture
def handled() -> Iterator[list[int]]:
    """The signals that a handler of somebody else got; it raises nothing."""
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    yield seen
    signal.signal(signal.SIGINT, before)


def test_a_handler_of_somebody_else_is_called_later(handled: list[int]) -> None:
    before = process_state()
    with tools():
        press()
        assert handled == []
    assert handled == [signal.SIGINT]
    assert_state(before)


def test_a_handler_that_is_set_meanwhile_stays(handled: list[int]) -> None:
    with tools():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert handled == []


@pytest.mark.parametrize("kind", [signal.SIG_IGN, signal.SIG_DFL])
def test_what_raises_no_exception_is_not_held_back(
    handled: list[int], kind: signal.Handlers
) -> None:
    signal.signal(signal.SIGINT, kind)
    with tools():
        assert signal.getsignal(signal.SIGINT) is kind
    assert handled == []


def test_other_threads_leave_signals_alone() -> None:
    """Only the main thread may set handlers, and only there do they run."""
    handler = signal.getsignal(signal.SIGINT)

    def inside() -> Any:
        with tools():
            interruption_point()
            return signal.getsignal(signal.SIGINT)

    assert at_once(inside) == [handler]


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_the_process_as_it_was() -> None:
    converted = small_result().converted
    before = process_state()
    generator = random.Random(0)
    interrupted = 0
    for _ in range(30):
        timer = threading.Timer(generator.uniform(0.01, 1.0), signal.raise_signal, [signal.SIGINT])
        timer.start()
        try:
            cq.lower(converted, EXAMPLE)
            timer.join()
            time.sleep(0.01)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        assert_state(before)
    assert interrupted > 20
