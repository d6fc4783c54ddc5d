"""The demo's tenants: made, given new keys and their adapters through the public REST API."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cli_client import Client, adapter_files
from .errors import ClusterError
from .up_steps import Note

KEY_LABEL = "demo"
# Of what all four adapters together need, in the pools of all groups: they don't hold them all, so
# that serving them in turn really pages.
_POOL_SHARE = 0.9
_REPOSITORY = Path(__file__).resolve().parent.parent


class DemoMissing(ClusterError):
    """The demo's model or adapters aren't where they should be."""


@dataclass(frozen=True)
class DemoAdapter:
    name: str
    folder: Path
    style: str
    chat: str


@dataclass(frozen=True)
class DemoTenant:
    name: str
    adapters: tuple[DemoAdapter, ...]


@dataclass(frozen=True)
class Demo:
    """What demo_tenants.json lists, checked."""

    base_name: str
    model: Path
    tenants: tuple[DemoTenant, ...]

    @classmethod
    def find(cls, folder: Path | None) -> Demo:
        """Reads the demo from `folder`, or from deploy/demo of the checkout.

        Raises:
            DemoMissing: saying what is missing and where it was looked for.
        """
        choices = [folder] if folder else [_REPOSITORY / "deploy/demo", Path("deploy/demo")]
        for choice in choices:
            if (choice / "demo_tenants.json").is_file():
                return cls._read(choice.resolve())
        tried = " or ".join(str(c) for c in choices)
        raise DemoMissing(
            f"there is no demo_tenants.json in {tried}. Run this in a checkout of Loraplex, name "
            "its deploy/demo with --demo-dir or LORAPLEX_DEMO_DIR, or serve a model of your own "
            "with `loraplex serve --model PATH`"
        )

    @classmethod
    def _read(cls, folder: Path) -> Demo:
        path = folder / "demo_tenants.json"
        try:
            raw = json.loads(path.read_text())
            demo = cls(
                raw["base"]["name"],
                folder / raw["base"]["folder"],
                tuple(_tenant(folder, entry) for entry in raw["tenants"]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DemoMissing(f"{path} is damaged: {error!r}") from None
        for tenant in demo.tenants:
            for adapter in tenant.adapters:
                adapter_files(adapter.folder)
        return demo

    def pool_bytes(self, dtype_bytes: int, groups: int) -> int:
        """A group's pool: it holds the largest adapter, but all pools together not all four.

        Args:
            dtype_bytes: of a number in the pool; the files hold bfloat16.
        """
        sizes = [
            (a.folder / "adapter_model.safetensors").stat().st_size * dtype_bytes // 2
            for tenant in self.tenants
            for a in tenant.adapters
        ]
        return max(int(sum(sizes) * _POOL_SHARE / groups), int(max(sizes) * 1.1))


def _tenant(folder: Path, raw: dict[str, Any]) -> DemoTenant:
    return DemoTenant(
        raw["name"],
        tuple(
            DemoAdapter(a["name"], folder / a["folder"], a.get("style", ""), a["samples"]["chat"])
            for a in raw["adapters"]
        ),
    )


def seed(demo: Demo, url: str, admin_key: str, note: Note) -> dict[str, Any]:
    """Makes what is missing; keys of an earlier start stop working. The facts for demo.json."""
    facts: list[dict[str, Any]] = []
    with Client(url, admin_key) as admin:
        known = {t["name"]: t for t in admin.pages("/admin/v1/tenants")}
        for tenant in demo.tenants:
            note(f"tenant {tenant.name}")
            entry = known.get(tenant.name) or admin.call(
                "POST", "/admin/v1/tenants", json={"name": tenant.name}
            )
            key = _rotate_key(admin, entry["id"])
            with Client(url, key) as client:
                for adapter in tenant.adapters:
                    note(f"{tenant.name}: {adapter.name}")
                    client.upload(adapter.name, *adapter_files(adapter.folder))
            facts.append(
                {
                    "name": tenant.name,
                    "key": key,
                    "adapters": [adapter.name for adapter in tenant.adapters],
                }
            )
    count = sum(len(tenant.adapters) for tenant in demo.tenants)
    note(f"{len(facts)} tenants, {count} adapters")
    return {"url": url, "admin_key": admin_key, "tenants": facts}


def _rotate_key(admin: Client, tenant_id: str) -> str:
    path = f"/admin/v1/tenants/{tenant_id}/keys"
    old = [key["id"] for key in admin.pages(path) if key["label"] == KEY_LABEL]
    made = admin.call("POST", path, json={"label": KEY_LABEL})
    for key_id in old:
        admin.call("DELETE", f"{path}/{key_id}")
    return made["key"]
