"""What can be mended in an object store without losing anything that was acknowledged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from .blobs import Blobs
from .catalogue import Catalogue
from .errors import AdapterRefused, NotFound, TenantNotFound
from .object_store import ObjectStore
from .publisher import Publisher
from .store_check import Finding
from .sweep import OLDER_THAN_S

Plan = Literal["remake", "remove", "leave"]


@dataclass(frozen=True)
class Repair:
    """What is to be done about a finding, or was; `reason` says why nothing is, or what failed."""

    finding: Finding
    plan: Plan
    reason: str = ""


def plan_repairs(
    findings: Iterable[Finding],
    *,
    can_remake: bool,
    older_than_s: float = OLDER_THAN_S,
    urls_live_s: float = 0.0,
    now: datetime | None = None,
) -> list[Repair]:
    """Decides on each finding. Pure but for the default of `now`.

    Args:
        can_remake: the base model is there, which packs are made for.
        older_than_s: age in seconds from which on an orphan or an upload counts as left behind;
            what is younger may belong to a publish that is under way.
        urls_live_s: how much older uploads must be: the life of the URLs that are handed out.
    """
    now = now or datetime.now(UTC)
    findings = list(findings)
    no_source = {
        (f.tenant_id, f.digest, f.blob)
        for f in findings
        if f.kind in ("missing_source", "damaged_source")
    }

    def decide(f: Finding) -> Repair:
        if f.kind in ("missing_pack", "damaged_pack"):
            if (f.tenant_id, f.digest, f.blob) in no_source:
                return Repair(f, "leave", "its source is lost, too: it must be uploaded again")
            if not can_remake:
                return Repair(f, "leave", "name the base model to remake it from its source")
            return Repair(f, "remake")
        if f.kind in ("orphan_blob", "abandoned_upload"):
            assert f.modified is not None
            least_s = older_than_s + (urls_live_s if f.kind == "abandoned_upload" else 0.0)
            if (now - f.modified).total_seconds() > least_s:
                return Repair(f, "remove")
            return Repair(f, "leave", f"younger than {least_s / 3600:g} h: may be in use")
        if f.kind == "half_deleted":
            return Repair(f, "remove")
        if f.kind in ("missing_source", "damaged_source"):
            return Repair(f, "leave", "nothing it could be made from; a sound pack serves on")
        return Repair(f, "leave", "needs a decision: see the message")

    return [decide(finding) for finding in findings]


def carry_out(
    repairs: Iterable[Repair],
    store: ObjectStore,
    catalogue: Catalogue,
    publisher: Publisher | None,
) -> Iterator[Repair]:
    """Does what was planned; yields each repair, as "leave" with the reason where it failed.

    Args:
        publisher: remakes packs; needed if any repair is to do that.
    """
    for repair in repairs:
        finding = repair.finding
        try:
            if repair.plan == "remake":
                assert publisher is not None
                publisher.repack(finding.tenant_id, finding.digest)
            elif repair.plan == "remove":
                _remove(finding, store, catalogue)
        except (AdapterRefused, NotFound) as error:
            yield Repair(finding, "leave", str(error))
        else:
            yield repair


def _remove(finding: Finding, store: ObjectStore, catalogue: Catalogue) -> None:
    if finding.kind == "half_deleted":
        try:
            catalogue.delete_tenant(finding.tenant_id)
        except TenantNotFound:
            return  # somebody else ended it
    elif finding.kind == "abandoned_upload":
        store.delete_all([item.key for item in store.list(finding.key)])
    elif (finding.digest, finding.blob) not in catalogue.blobs_in_use(finding.tenant_id):
        Blobs(store).remove(finding.tenant_id, finding.digest, finding.blob)
