"""The nodes of a Ray cluster: on each an actor that measures, one trial at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sparsec import __version__
from sparsec.codegen import tir
from sparsec.codegen.kernels import FAMILIES
from sparsec.codegen.kernels.revision import revision
from sparsec.errors import CompilerError, InvalidInput, MissingPackage
from sparsec.ir.schedule import Schedule
from sparsec.target import Target
from sparsec.tuning.cluster import NodeLost
from sparsec.tuning.harness import build_harness
from sparsec.tuning.measure import START_SECONDS, TRIAL_SECONDS, Measurer
from sparsec.tuning.record import Machine, Trial
from sparsec.tuning.tuner import Job, open_measurer

Limit = Callable[[Target], Target]
LOCAL = "local"
END_SECONDS = 5.0  # a trial that runs is not waited for any longer
SLACK_SECONDS = 60.0  # for the network, and a child that starts again


@dataclass(frozen=True, slots=True)
class Description:
    """What an actor says of its machine, and of the code that it measures with."""

    machine: Machine
    target: Target
    code: Mapping[str, str]


def code() -> dict[str, str]:
    """What must be the same on all machines for their trials to mean the same."""
    revisions = {op: revision(op) or "" for op in sorted(FAMILIES)}
    return {"sparsec": __version__, "tvm": tir.VERSION, **revisions}


class Worker:
    """What runs on a node. Errors come back as text: they may be of classes nobody else has."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sparsec-tune-")
        self._harness = build_harness(Path(self._folder.name))
        self._measurer: Measurer | None = None

    def describe(self) -> Description:
        target = Target.host()
        return Description(Machine.of(target), target, code())

    def open(self, job: Job, target: Target) -> None:
        self.close()
        self._measurer = open_measurer(job, target, Path(self._folder.name), self._harness)

    def measure(self, schedule: Schedule) -> Trial | str:
        assert self._measurer is not None
        try:
            return self._measurer.measure(schedule)
        except CompilerError as error:
            return str(error)

    def close(self) -> None:
        if self._measurer is not None:
            self._measurer.__exit__(None, None, None)
            self._measurer = None

    def end(self) -> None:
        """Removes its files: Ray ends the process without asking it."""
        self.close()
        self._folder.cleanup()


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node of the cluster, by its actor."""

    name: str
    machine: Machine
    target: Target
    actor: Any

    @contextlib.contextmanager
    def open(self, job: Job) -> Iterator[RayNode]:
        _get(self.actor.open.remote(job, self.target))
        yield self
        _get(self.actor.close.remote())

    def measure(self, schedule: Schedule) -> Trial:
        """Raises CompilerError when the task cannot be set up, NodeLost without an answer."""
        answer = _get(self.actor.measure.remote(schedule))
        if isinstance(answer, str):
            raise CompilerError(answer)
        assert isinstance(answer, Trial)
        return answer


def _get(reference: Any) -> Any:
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RaySystemError

    try:
        return ray.get(reference, timeout=START_SECONDS + TRIAL_SECONDS + SLACK_SECONDS)
    except (RayActorError, RaySystemError, GetTimeoutError) as error:
        raise NodeLost(str(error).partition("\n")[0]) from None


@contextlib.contextmanager
def ray_nodes(address: str, limit: Limit) -> Iterator[list[RayNode]]:
    """The nodes of the cluster at `address`; "local" starts one of this machine alone.

    `limit` leaves of each node's target what is to be used.

    Raises MissingPackage without Ray, and InvalidInput when there is no such cluster or a node
    has other code.
    """
    try:
        import ray
    except ModuleNotFoundError:
        raise MissingPackage("ray", "scale") from None
    options = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address=address, logging_level="ERROR", log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise InvalidInput(
            f"--ray {address}: no cluster answers there ({reason}); "
            "start one with `ray start --head`, or give `local`"
        ) from None
    nodes: list[RayNode] = []
    try:
        nodes = _found_nodes(limit)
        yield nodes
    finally:
        if ending := [node.actor.end.remote() for node in nodes]:
            ray.wait(ending, num_returns=len(ending), timeout=END_SECONDS)
        ray.shutdown()


def _found_nodes(limit: Limit) -> list[RayNode]:
    """An actor on each node that lives; those that are lost at once are left out."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    actors = {}
    for info in ray.nodes():
        if info["Alive"]:
            place = NodeAffinitySchedulingStrategy(info["NodeID"], soft=False)
            made = ray.remote(Worker).options(scheduling_strategy=place, num_cpus=0)
            actors[f"{info['NodeManagerAddress']} ({info['NodeID'][:8]})"] = made.remote()
    nodes, ours = [], code()
    for name, actor in actors.items():
        with contextlib.suppress(NodeLost):
            found = _get(actor.describe.remote())
            if found.code != ours:
                other = [key for key in ours if found.code.get(key) != ours[key]]
                raise InvalidInput(
                    f"{name}: another version of {', '.join(other[:3])} than here; "
                    "install the same sparsec and TVM on all nodes"
                )
            target = limit(found.target)
            machine = replace(found.machine, isas=tuple(isa.value for isa in target.isas))
            nodes.append(RayNode(name, machine, target, actor))
    if not nodes:
        raise InvalidInput("the cluster has no node that answers")
    return nodes
