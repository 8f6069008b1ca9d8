"""Work for other processes, its results in the order in which it was given, or as they come.

Workers are fresh interpreters and no forks: a fork of a process that has computed with threads or on a GPU may hang,
and what imports the user's script again needs a guard in it.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

from forcetune.errors import ForcetuneError

Task = TypeVar("Task")
Result = TypeVar("Result")

MOST_WORKERS = 8
"""So many are used where no number was given, and never more than there are cores."""


_START = "import sys; sys.path.append(sys.argv[1]); from forcetune.utils.processes import _serve; _serve()"
"""What a worker runs. Where this package stands comes last: installed, it lies among modules of any name."""


class WorkerDiedError(ForcetuneError):
    """A worker process ended without an answer: killed for its memory, or by a defect in a library.

    Attributes:
        task: what it worked on.
        killed: it did not end by itself, as one does that cannot start.
    """

    def __init__(self, task: object, code: int, option: str = "data.workers") -> None:
        """
        Args:
            task: what it worked on.
            code: exit status.
            option: that sets the number of processes.
        """
        self.task = task
        # Windows has no signals, but large numbers for what is one elsewhere
        self.killed = code < 0 or code > 255
        if self.killed:
            why = f"was killed (exit status {code}), perhaps for want of memory; set {option} lower."
        else:
            why = f"ended without an answer (exit status {code}); what it printed above says why."
        super().__init__(f"a worker process {why}")


def worker_count(asked: int | None) -> int:
    """The number that was asked for, or what this machine has cores for."""
    if asked is not None:
        return asked
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MOST_WORKERS, cores)


def map_in_order(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """What ``function`` gives for each task, in their order; each worker has one task at a time.

    Args:
        function: stands at the top of a module of this package.
        tasks: taken only as fast as they are worked on.
        workers: processes; with 0 everything is done in this one.

    Raises:
        WorkerDiedError: a worker ended without an answer.
        ForcetuneError: a worker could not be started.
        Exception: what ``function`` raises; errors that are not our own come as :class:`ForcetuneError`.
    """
    if workers == 0:
        yield from map(function, tasks)
        return
    processes: list[_Worker] = []
    waiting = iter(tasks)
    try:
        for task in waiting:
            processes.append(_Worker())
            processes[-1].send(function, task)
            if len(processes) == workers:
                break
        turn, left = 0, len(processes)
        while left:
            worker = processes[turn % len(processes)]
            result = worker.receive()
            left -= 1
            for task in waiting:
                worker.send(function, task)
                left += 1
                break
            turn += 1
            yield result
    finally:
        for worker in processes:
            worker.end()


def as_they_end(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int, *, option: str
) -> Iterator[tuple[Task, Result | WorkerDiedError]]:
    """Each task with what ``function`` gives for it, in the order in which they end; every task has a fresh process.

    The processes may use as many threads as this one.

    Args:
        function: stands at the top of a module of this package.
        tasks: long ones, such as whole runs.
        workers: at least 1; so many tasks are worked on at the same time.
        option: that sets this number, for messages.

    Returns:
        for a process that died without an answer its error; the others go on.

    Raises:
        ForcetuneError: a worker could not be started.
        Exception: what ``function`` raises, as in :func:`map_in_order`; the other processes are ended.
    """
    running: set[_Worker] = set()
    ending = Event()

    def run_task(task: Task) -> Any:
        worker = _Worker(threads=None, option=option)
        running.add(worker)
        try:
            if ending.is_set():
                return None
            worker.send(function, task)
            return worker.receive()
        except WorkerDiedError as error:
            return error
        finally:
            running.discard(worker)
            worker.end()

    with ThreadPoolExecutor(workers) as threads:
        futures = {threads.submit(run_task, task): task for task in tasks}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            ending.set()
            for future in futures:
                future.cancel()
            for worker in tuple(running):
                worker.kill()


class _Worker:
    """One process and its pipes."""

    def __init__(self, threads: int | None = 1, option: str = "data.workers") -> None:
        """
        Args:
            threads: of its libraries; None for as many as this process may use.
            option: that sets the number of workers, for messages.
        """
        self._option = option
        # -P: a module that lies beside the data is never imported
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(Path(__file__).parents[2])],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)}),
            )
        except OSError as error:
            raise ForcetuneError(
                f"a worker process could not be started ({error.strerror}); set {option} lower."
            ) from error
        self._task: object = None

    def send(self, function: Callable[[Any], Any], task: object) -> None:
        self._task = task
        assert self._process.stdin is not None
        try:
            pickle.dump((function, task), self._process.stdin, protocol=5)
            self._process.stdin.flush()
        except OSError as error:
            raise WorkerDiedError(task, self._process.wait(), self._option) from error

    def receive(self) -> Any:
        assert self._process.stdout is not None
        try:
            done, result = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise WorkerDiedError(self._task, self._process.wait(), self._option) from error
        if done:
            return result
        raise result

    def kill(self) -> None:
        """End the process; whoever waits for its answer hears of it."""
        self._process.kill()

    def end(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with suppress(OSError):
                pipe.close()
        self._process.kill()
        self._process.wait()


def _serve() -> None:
    """The life of a worker: tasks from standard input, answers to standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears it and closes the pipes
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    while True:
        try:
            function, task = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, function(task))
        except ForcetuneError as error:
            answer = (False, error)
        except Exception as error:
            answer = (False, ForcetuneError(f"a worker process failed ({type(error).__name__}: {str(error)[:200]})."))
        try:
            pickle.dump(answer, answers, protocol=5)
            answers.flush()
        except BrokenPipeError:
            return
