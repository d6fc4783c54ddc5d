#!/usr/bin/env python3
"""Carries out a Dockerfile where there is no Docker engine: each stage is a folder, RUN a chroot.

    sudo python3 deploy/docker/build_in_chroot.py --base /path/of/debootstrap --work /tmp/build

It knows what the Dockerfiles beside it use: FROM ... AS, ARG, ENV, WORKDIR, COPY [--from], RUN,
USER, HEALTHCHECK, ENTRYPOINT and CMD (as lists). At the end it starts the image's command as the
image's user, waits until the health check passes, and ends it.

The base of every stage is a folder made by `debootstrap --variant=minbase bookworm FOLDER`. PIP_*
variables of the caller are passed to RUN, as `docker build` passes proxies; --bind makes a folder
or file of this machine (a wheel house, certificates) visible at the same place.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEALTHY_S = 240.0
STOP_S = 40.0


@dataclass
class Stage:
    root: Path
    env: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    user: str = "root"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: str = ""

    def inside(self, command: list[str], extra_env: dict[str, str]) -> list[str]:
        env = [f"{name}={value}" for name, value in {**self.env, **extra_env}.items()]
        home = "/root" if self.user == "root" else f"/home/{self.user}"
        path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        change = f'cd {shlex.quote(self.folder)} && exec "$@"'
        return [
            *("chroot", f"--userspec={self.user}:{self.user}", str(self.root)),
            *("/usr/bin/env", "-i", path, f"HOME={home}", *env, "/bin/sh", "-c", change, "sh"),
            *command,
        ]


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments), with continued lines joined and comments gone."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    parts = (line.strip().split(None, 1) for line in joined.splitlines() if line.strip())
    return [(part[0].upper(), part[1]) for part in parts]


def expand(text: str, values: dict[str, str]) -> str:
    return re.sub(r"\$\{?(\w+)\}?", lambda m: values.get(m[1], m[0]), text)


class Build:
    def __init__(self, base: Path, work: Path, binds: list[Path], build_args: dict[str, str]):
        self.base = base
        self.work = work
        self.binds = binds
        self.build_args = build_args
        self.stages: dict[str, Stage] = {}
        self.args: dict[str, str] = {}
        self.now: Stage | None = None

    def carry_out(self, dockerfile: Path) -> Stage:
        handlers = {
            "FROM": self._from, "ARG": self._arg, "ENV": self._env, "WORKDIR": self._workdir,
            "COPY": self._copy, "RUN": self._run, "USER": self._user,
            "HEALTHCHECK": self._health, "ENTRYPOINT": self._entrypoint, "CMD": self._cmd,
            "VOLUME": lambda _: None, "EXPOSE": lambda _: None,
        }  # fmt: skip
        for number, (name, arguments) in enumerate(instructions(dockerfile.read_text()), 1):
            if name not in handlers:
                sys.exit(f"error: {dockerfile} uses {name}, which this script doesn't know")
            started = time.monotonic()
            print(f"[{number}] {name} {arguments}", flush=True)
            handlers[name](arguments)
            print(f"    {time.monotonic() - started:.1f} s", flush=True)
        return self.stage

    @property
    def stage(self) -> Stage:
        if self.now is None:
            sys.exit("error: the first instruction must be FROM")
        return self.now

    def _from(self, text: str) -> None:
        name = text.split()[2] if " AS " in text.upper() else f"stage-{len(self.stages)}"
        root = self.work / name
        if root.exists():
            sys.exit(f"error: {root} is there already; remove it, or name another --work")
        subprocess.run(["cp", "-a", "--reflink=auto", self.base, root], check=True)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        for kind in ("proc", "dev"):
            subprocess.run(["mount", "--rbind", f"/{kind}", root / kind], check=True)
        for folder in self.binds:
            inside = root / folder.relative_to("/")
            if folder.is_dir():
                inside.mkdir(parents=True, exist_ok=True)
            else:
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.touch()
            subprocess.run(["mount", "--bind", folder, inside], check=True)
        self.now = self.stages[name] = Stage(root)
        self.args = {}

    def _arg(self, text: str) -> None:
        name, _, value = text.partition("=")
        self.args[name] = self.build_args.get(name, value)

    def _env(self, text: str) -> None:
        name, _, value = text.partition("=")
        self.stage.env[name] = expand(value, self.stage.env)

    def _workdir(self, text: str) -> None:
        self.stage.folder = text
        (self.stage.root / text.lstrip("/")).mkdir(parents=True, exist_ok=True)

    def _copy(self, text: str) -> None:
        words = text.split()
        context = ROOT
        if words[0].startswith("--from="):
            context = self.stages[words.pop(0).removeprefix("--from=")].root
        *sources, target = words
        place = Path(os.path.normpath(os.path.join(self.stage.folder, target)))
        into = self.stage.root / place.relative_to("/")
        for source in sources:
            found = context / source.lstrip("/")
            if found.is_dir():  # its content, as Docker copies
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(found, into, symlinks=True, ignore=ignore, dirs_exist_ok=True)
            elif target.endswith("/"):
                shutil.copy2(found, into / found.name)
            else:
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(found, into)

    def _run(self, text: str) -> None:
        passed = {k: v for k, v in os.environ.items() if k.startswith("PIP_")}
        command = ["/bin/sh", "-c", text]
        subprocess.run(self.stage.inside(command, {**passed, **self.args}), check=True)

    def _user(self, text: str) -> None:
        self.stage.user = text

    def _health(self, text: str) -> None:
        self.stage.health = text.partition("CMD ")[2]

    def _entrypoint(self, text: str) -> None:
        self.stage.entrypoint = json.loads(text)

    def _cmd(self, text: str) -> None:
        self.stage.command = json.loads(text)


def try_out(stage: Stage, extra_env: dict[str, str]) -> None:
    """Starts the image's command and waits for its health check, as an engine would."""
    print("[start]", *stage.entrypoint, *stage.command, flush=True)
    started = time.monotonic()
    service = subprocess.Popen(stage.inside([*stage.entrypoint, *stage.command], extra_env))
    check = stage.inside(["/bin/sh", "-c", stage.health], extra_env)
    try:
        while subprocess.run(check, check=False).returncode:
            if service.poll() is not None:
                sys.exit(f"error: the image's command ended with {service.returncode}")
            if time.monotonic() - started > HEALTHY_S:
                sys.exit(f"error: not healthy after {HEALTHY_S:.0f} s")
            time.sleep(1.0)
        print(f"[healthy] after {time.monotonic() - started:.1f} s", flush=True)
    finally:
        if service.poll() is None:
            service.send_signal(signal.SIGTERM)
            service.wait(STOP_S)
    print(f"[stopped] with exit code {service.returncode}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="build a Dockerfile in chroots")
    parser.add_argument("--file", type=Path, default=ROOT / "deploy/docker/Dockerfile.cpu")
    parser.add_argument("--base", type=Path, required=True, help="folder made by debootstrap")
    parser.add_argument("--work", type=Path, required=True, help="new folder for the stages")
    parser.add_argument("--bind", type=Path, action="append", default=[])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for the start")
    arguments = parser.parse_args()
    if os.geteuid():
        sys.exit("error: chroot needs root: run this with sudo")
    if os.environ.get("LORAPLEX_CHROOT_UNSHARED") != "1":
        # The mounts are this process's own, and gone with it.
        os.environ["LORAPLEX_CHROOT_UNSHARED"] = "1"
        os.execvp("unshare", ["unshare", "--mount", sys.executable, *sys.argv])
    build_args = dict(text.split("=", 1) for text in arguments.build_arg)
    arguments.work.mkdir(parents=True, exist_ok=True)
    build = Build(arguments.base, arguments.work, arguments.bind, build_args)
    stage = build.carry_out(arguments.file)
    try_out(stage, dict(text.split("=", 1) for text in arguments.env))


if __name__ == "__main__":
    main()
