"""The ranks of a group as Ray actors, one process each, in the replica's placement group."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from .engine_process import LinkAddress, RankProgram, run_rank
from .errors import GroupFailed

# Read by OpenMP and the BLAS libraries when torch is imported, so they must be in the environment
# of the process before it starts.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class RankPlacement:
    """Where the ranks run and with what.

    Args:
        ranks: how many.
        cpus, gpus: Ray resources of one rank, at most those of its bundle.
        threads: threads of torch in one rank.
        bundles: placement group of one bundle for the front and then one for each rank; None
            leaves the choice of the node to Ray.
    """

    ranks: int
    cpus: float
    gpus: float
    threads: int
    bundles: PlacementGroup | None = None


class RankActor:
    """One rank's process. Its link to the front carries all there is to say after `start`."""

    def __init__(self, program: RankProgram, rank: int, link: LinkAddress):
        self._program = program
        self._rank = rank
        self._link = link

    def start(self, rendezvous: str) -> int:
        """Runs the rank in a thread and returns the process id. The process ends with the rank."""
        threading.Thread(target=self._run, args=(rendezvous,), name="rank", daemon=True).start()
        return os.getpid()

    def _run(self, rendezvous: str) -> None:
        # To the worker's log file: Python drops what is less than a warning unless told otherwise.
        # A program may do better, for it knows the settings.
        logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        logging.getLogger(__package__).setLevel(logging.INFO)
        # The actor has no use without its rank, and a clean exit of the interpreter could wait
        # for ever for threads that hang in a collective.
        os._exit(run_rank(self._program, self._rank, rendezvous, self._link))


class GroupRanks:
    """The rank actors of one group. They end with their front, with Ray, or by `kill`."""

    def __init__(self, actors: list[Any]):
        self._actors = actors
        self.pids: list[int] = []

    @classmethod
    async def start(
        cls, program: RankProgram, link: LinkAddress, placement: RankPlacement
    ) -> GroupRanks:
        """Creates the actors and starts the ranks; they report to the front at `link`.

        Raises:
            GroupFailed: an actor could not be created; none is left.
        """
        ranks = cls([_create(program, link, placement, r) for r in range(placement.ranks)])
        rendezvous = f"tcp://127.0.0.1:{free_port()}"
        try:
            starts: list[Any] = [actor.start.remote(rendezvous) for actor in ranks._actors]
            ranks.pids = list(await asyncio.gather(*starts))
        except RayError as e:
            ranks.kill()
            raise GroupFailed(f"a rank's process could not be started: {e}") from e
        except BaseException:
            ranks.kill()
            raise
        return ranks

    def kill(self) -> None:
        """Ends every rank's process that is still there."""
        for actor in self._actors:
            with contextlib.suppress(RayError, ValueError):  # gone already, or Ray is
                ray.kill(actor, no_restart=True)


def _create(program: RankProgram, link: LinkAddress, placement: RankPlacement, rank: int) -> Any:
    strategy = "DEFAULT"
    if placement.bundles is not None:
        strategy = PlacementGroupSchedulingStrategy(
            placement.bundles, placement_group_bundle_index=1 + rank
        )
    variables = {name: str(placement.threads) for name in _THREAD_VARIABLES}
    actor = ray.remote(RankActor).options(
        num_cpus=placement.cpus,
        num_gpus=placement.gpus,
        max_restarts=0,  # the front restarts a group as a whole
        scheduling_strategy=strategy,
        runtime_env={"env_vars": variables},
    )
    return actor.remote(program, rank, link)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
