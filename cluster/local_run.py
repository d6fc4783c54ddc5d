"""One run of the service on this machine: starts its parts in order and ends them all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import httpx
import psutil
from pydantic import SecretStr

from . import local_ray
from .errors import ClusterError
from .local_dir import DataDir, make_run_dir, ray_dir
from .local_watchdog import Watchdog
from .ports import free_port
from .settings import Settings
from .up_checks import gpu_count
from .up_steps import Note, Steps

_READY_S = 600.0
_POLL_S = 0.1
_WATCH_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Serve's controller, proxy and the plain actors; replicas and ranks are counted one by one.
_SPARE_CPUS = 2


class StartFailed(ClusterError):
    """A part of the service didn't come up; the message says which, why, and where its log is."""


class Stopped(BaseException):
    """Somebody asked for the end: Ctrl-C, SIGTERM or SIGHUP."""


class LocalRun:
    """Use as a context manager: leaving it ends everything that was started, also after an error.

    Args:
        settings: as the user gave them; `settings` of the object has what the run adds.
        steps: shows the progress.
    """

    def __init__(self, settings: Settings, steps: Steps):
        self.data = DataDir(settings.data_dir)
        self.settings = settings.changed(data_dir=self.data.root)
        self.steps = steps
        self._run_dir: Path | None = None
        self._watchdog: Watchdog | None = None
        self._store: Any = None
        self._stopping = False
        self._outputs: list[Any] = []
        self.home = os.getcwd()

    def __enter__(self) -> LocalRun:
        from ..adapter_store import host_folder

        self._saved = {n: signal.getsignal(n) for n in _SIGNALS}
        self._listen_to_signals()
        try:
            self.data.open()
            self._run_dir = make_run_dir()
            self._watchdog = Watchdog(
                self._run_dir,
                ray_dir(self._run_dir),
                self.data.ray_logs,
                self.data.demo_json,
                self.data.lock_fd,
                host_folder(self.settings.disk_dir),
            )
            self._redirect_output()
            # All processes of the run inherit it: by this the watchdog knows them, and it keeps
            # the repository's folders from being importable under their bare names.
            os.chdir(self._run_dir)
            self._link_ray_logs()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop()

    def start_store(self) -> None:
        """Starts the embedded S3 server on the data folder and points the settings at it."""
        from ..adapter_store import EmbeddedS3

        with self.steps.step("object store") as note:
            self._store = EmbeddedS3(self.data.store).start()
            self.settings = self.settings.changed(
                store_url=self._store.url,
                store_endpoint=self._store.endpoint,
                store_access_key=self._store.access_key,
                store_secret_key=SecretStr(self._store.secret_key),
            )
            note(f"SeaweedFS, {self._store.endpoint}")
        self.check_stop()

    def start_ray(self) -> None:
        assert self._run_dir is not None
        with self.steps.step("Ray") as note:
            local_ray.make_token(self.data.ray_token)
            os.environ.update(local_ray.ray_environment(self.settings, self.data.ray_token))
            gpus = gpu_count() if self.settings.device == "cuda" else 0
            ranks = (self.settings.max_groups or self.settings.groups) * self.settings.tp
            cpus = max(os.cpu_count() or 1, _SPARE_CPUS + ranks)
            try:
                local_ray.start_ray(ray_dir(self._run_dir), cpus, gpus, self.data.ray_logs)
            except SystemExit:
                raise Stopped from None  # what Ray's own handler of SIGTERM makes of it
            finally:
                self._listen_to_signals()  # instead of that handler
            note(f"{cpus} CPUs, {gpus} GPUs")
        self.check_stop()

    def start_service(self) -> None:
        """Deploys the actors and Serve's applications and waits until requests are answered."""
        from . import serve_app

        with self.steps.step("Ray Serve"):
            if self.settings.port == 0:
                self.settings = self.settings.changed(port=free_port(self.settings.host))
            self.settings = self.settings.with_cluster_secret()
            local_ray.start_serve(self.settings, self.data.ray_logs)
        self.check_stop()
        with self.steps.step("controller"):
            serve_app.start_actors(self.settings)
        self.check_stop()
        with self.steps.step("gateway, worker groups") as note:
            serve_app.deploy(self.settings)
            self._await_ready(note)

    def check_stop(self) -> None:
        """Raises Stopped if a signal has come, for what it raised may have been swallowed: an
        extension module that is being imported, or a finalizer, drops any exception."""
        if self._stopping:
            raise Stopped

    @property
    def url(self) -> str:
        host = self.settings.host
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1"
        if ":" in host:
            host = f"[{host}]"
        return f"http://{host}:{self.settings.port}"

    def wait(self) -> NoReturn:
        """Ends by `Stopped` only.

        Raises:
            StartFailed: the object store or Ray has ended by itself.
        """
        daemons = local_ray.daemons()
        while True:
            time.sleep(_WATCH_S)
            self.check_stop()
            if self._store is not None and self._store.pid is None:
                raise StartFailed(f"the object store has ended; its log is {self._store.log}")
            for daemon in daemons:
                if not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE:
                    raise StartFailed(
                        f"Ray's process {daemon.pid} has ended; its logs are in "
                        f"{self.data.ray_logs}"
                    )

    def _await_ready(self, note: Note) -> None:
        from . import serve_app

        deadline = time.monotonic() + _READY_S
        answers = False
        with httpx.Client(trust_env=False, timeout=5.0) as client:
            while not answers or not serve_app.all_running():
                self.check_stop()
                note(serve_app.progress())
                failure = serve_app.failure()
                if failure is not None:
                    raise StartFailed(f"{failure}\nAll logs are in {self.data.ray_logs}")
                if time.monotonic() > deadline:
                    raise StartFailed(
                        f"not ready after {_READY_S:.0f} s ({serve_app.progress()}). Logs are in "
                        f"{self.data.ray_logs}"
                    )
                time.sleep(_POLL_S)
                with contextlib.suppress(httpx.HTTPError):
                    answers = client.get(f"{self.url}/ready").status_code == 200
        note(serve_app.progress())

    def _listen_to_signals(self) -> None:
        for number in _SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stopping:
            # The second one: no more patience. The watchdog kills what is left.
            os._exit(130)
        self._stopping = True
        raise Stopped

    def _redirect_output(self) -> None:
        # What Ray and Serve print goes to the log; the steps' console keeps the terminal.
        log = open(self.data.logs / "loraplex.log", "a", buffering=1)  # noqa: SIM115
        self._outputs = [log, sys.stdout, sys.stderr]
        sys.stdout = sys.stderr = log

    def _link_ray_logs(self) -> None:
        assert self._run_dir is not None
        link = self.data.ray_logs
        if link.is_dir() and not link.is_symlink():
            shutil.rmtree(link, ignore_errors=True)
        link.unlink(missing_ok=True)
        link.symlink_to(ray_dir(self._run_dir) / "session_latest" / "logs")

    def _stop(self) -> None:
        self._stopping = True
        self.data.demo_json.unlink(missing_ok=True)
        with self._stopping_step():
            local_ray.stop_ray()
            if self._store is not None:
                self._store.stop()
            if self._outputs:
                log, sys.stdout, sys.stderr = self._outputs
                log.close()
                self._outputs = []
            if self._watchdog is not None:
                os.chdir(self.home if os.path.isdir(self.home) else "/")
                self._watchdog.finish()
            self.data.close()
        for number, handler in self._saved.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def _stopping_step(self) -> Iterator[None]:
        if self._watchdog is None:
            yield
            return
        with self.steps.step("stopping"):
            yield
