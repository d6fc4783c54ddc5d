"""`loraplex up` and `loraplex serve`: the whole service on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..adapter_store import BaseModel, Catalogue, ObjectStore
from . import up_checks
from .cli_tables import print_table
from .local_run import LocalRun, Stopped
from .model import model_source
from .rank_program import DTYPE_BYTES, dtype_of
from .settings import DEFAULT_KV_TOKENS, Settings
from .up_demo import Demo, DemoAdapter, DemoTenant, seed
from .up_steps import Steps


def up(settings: Settings, console: Console) -> None:
    """Serves the demo: embedded store, demo model, three tenants with their adapters.

    Returns when asked to stop.

    Raises:
        ClusterError, StoreError: something is missing or didn't start; nothing is left running.
    """
    demo = Demo.find(settings.demo_dir)
    given = settings.model_fields_set  # every field counts as given in a changed copy
    settings = up_checks.choose_device(settings.changed(model_path=demo.model))
    steps = Steps(console)
    values: dict[str, Any] = {"served_model_name": settings.served_model_name or demo.base_name}
    if "pool_bytes" not in given:
        values["pool_bytes"] = demo.pool_bytes(DTYPE_BYTES[dtype_of(settings)], settings.groups)
    if "kv_tokens" not in given:
        values["kv_tokens"] = DEFAULT_KV_TOKENS  # as on a CPU: the demo doesn't need a whole GPU
    settings = settings.changed(**values)
    with _Run(settings, steps, demo.model) as run:
        run.start_store()
        admin_key = _admin_key(run, keep=True)
        assert admin_key is not None
        run.start_ray()
        run.start_service()
        with run.steps.step("demo tenants") as note:
            facts = seed(demo, run.url, admin_key, note)
        run.data.write_demo(facts)
        _show_demo(console, run, demo, facts)
        run.wait()


def serve(settings: Settings, console: Console, rotate_admin_key: bool = False) -> None:
    """Serves a model of one's own; the store is the settings' or, by default, the embedded one.

    Returns when asked to stop.

    Raises:
        ClusterError, StoreError: something is missing or didn't start; nothing is left running.
    """
    if settings.model_path is None:
        raise up_checks.CheckError(
            "no model is given: --model or LORAPLEX_MODEL_PATH names the folder of a Hugging Face "
            "model, its s3:// URL, or a repository in the Hugging Face cache. `loraplex up` serves "
            "the demo"
        )
    own_store = not settings.model_fields_set & {"store_url", "store_endpoint"}
    steps = Steps(console)
    settings, model = _fetch_model(settings, steps)
    settings = up_checks.choose_device(settings)
    with _Run(settings, steps, model) as run:
        if own_store:
            run.start_store()
        else:
            _check_store(run)
        admin_key = _admin_key(run, keep=own_store, rotate=rotate_admin_key)
        run.start_ray()
        run.start_service()
        name = settings.served_model_name
        console.print(f"\n[bold]Loraplex serves {escape(str(name))} at {run.url}[/bold]")
        _show_admin_key(console, run, admin_key, kept=own_store)
        console.print("Ctrl-C stops it.", highlight=False)
        run.wait()


class _Run(LocalRun):
    """A LocalRun that has made its checks, and for which being asked to stop is no error."""

    def __init__(self, settings: Settings, steps: Steps, model: Path):
        super().__init__(settings, steps)
        up_checks.check_port(settings.host, settings.port)
        dummy = settings.load_format == "dummy"
        up_checks.check_model_folder(model, weights=not dummy)
        BaseModel.from_folder(model, settings.served_model_name, dummy_weights=dummy)
        up_checks.check_memory(settings, up_checks.model_bytes(model))

    def __enter__(self) -> _Run:
        try:
            super().__enter__()
            up_checks.check_disk(self.data.root)
        except Stopped:
            raise SystemExit(0) from None
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> bool:
        super().__exit__(kind, *rest)
        return kind is Stopped


def _fetch_model(settings: Settings, steps: Steps) -> tuple[Settings, Path]:
    """Brings the model to this machine; the settings that name it exactly, and its folder."""
    settings = settings.changed(data_dir=Path(os.path.abspath(settings.data_dir)))
    source = model_source(settings)
    with steps.step("model") as note:
        seen = 0

        def show(done: int, total: int) -> None:
            nonlocal seen
            seen = total
            note(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB")

        folder = source.folder(show)
        note(f"{seen / 1e9:.1f} GB from {source.name}" if seen else str(folder))
    version = source.pinned(folder)
    values: dict[str, Any] = {
        "model_path": source.name if version else folder,
        "served_model_name": settings.served_model_name or source.base_name,
    }
    if version:
        values["model_version"] = version
    return settings.changed(**values), folder


def _check_store(run: LocalRun) -> None:
    with run.steps.step("object store") as note:
        ObjectStore(**run.settings.store_options()).check()
        note(run.settings.store_url)


def _admin_key(run: LocalRun, keep: bool, rotate: bool = False) -> str | None:
    """The admin key, made at the first start; None when only its hash is known here.

    With `keep` its text stays in the data folder, readable by this user alone; a lost file is
    answered by a new key.
    """
    catalogue = Catalogue(ObjectStore(**run.settings.store_options()))
    path = run.data.admin_key
    kept = path.read_text().strip() if keep and path.is_file() else None
    if kept is not None and not rotate and catalogue.find_key(kept) is not None:
        return kept
    made = catalogue.ensure_admin_key(rotate=rotate or keep)
    if keep and made is not None:
        run.data.write_private(path, made + "\n")
    return made


def _show_admin_key(console: Console, run: LocalRun, key: str | None, kept: bool) -> None:
    if key is None:
        text = "as it was; if it is lost, start with --rotate-admin-key"
    elif kept:
        text = f"{key}  (kept in {run.data.admin_key})"
    else:
        text = f"{key}  (shown this once: keep it)"
    console.print(f"admin key: {text}", highlight=False, soft_wrap=True)


def _show_demo(console: Console, run: LocalRun, demo: Demo, facts: dict[str, Any]) -> None:
    def line(text: str = "") -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    console.print(
        f"\n[bold]Loraplex is ready at {run.url}[/bold]  ({run.steps.elapsed:.0f} s)\n",
        highlight=False,
    )
    keys = {tenant["name"]: tenant["key"] for tenant in facts["tenants"]}
    rows = [
        (tenant.name, keys[tenant.name], adapter.name, adapter.style)
        for tenant in demo.tenants
        for adapter in tenant.adapters
    ]
    print_table(console, ("tenant", "key", "model", "writes like"), rows)
    tenant, adapter = demo.tenants[0], demo.tenants[0].adapters[0]
    line()
    line(curl_snippet(run.url, keys[tenant.name], tenant, adapter))
    line()
    line(python_snippet(run.url, keys[tenant.name], tenant, adapter))
    line()
    line(f"Every tenant may also ask for the base model, {demo.base_name!r}.")
    line(f"Facts for scripts, with the admin key: {_short(run.data.demo_json, run)}")
    line(f"Ctrl-C stops everything; data stays in {_short(run.data.root, run)}.")


def curl_snippet(url: str, key: str, tenant: DemoTenant, adapter: DemoAdapter) -> str:
    body = (
        f'{{"model": "{adapter.name}", "max_tokens": 60,'
        f' "messages": [{{"role": "user", "content": "{adapter.chat}"}}]}}'
    )
    return (
        f"# {tenant.name} asks its adapter\n"
        f"curl {url}/v1/chat/completions \\\n"
        f"  -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}"
    )


def python_snippet(url: str, key: str, tenant: DemoTenant, adapter: DemoAdapter) -> str:
    return (
        "# the same with the official client: pip install openai\n"
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="{key}")\n'
        "answer = client.chat.completions.create(\n"
        f'    model="{adapter.name}", max_tokens=60,\n'
        f'    messages=[{{"role": "user", "content": "{adapter.chat}"}}],\n'
        ")\n"
        "print(answer.choices[0].message.content)"
    )


def _short(path: Path, run: LocalRun) -> str:
    relative = os.path.relpath(path, run.home)
    return str(path) if relative.startswith("..") else relative
