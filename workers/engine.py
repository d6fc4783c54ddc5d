"""The engine of a worker group: rank 0's loop body over scheduler, model runner and sampler.

A step is planned (`planning`), launched (`flight`) and collected. With overlap the next one is
launched before: a decoding sequence's token is then taken on the device from the step before, and
what turns out to have ended has one token computed in vain, which nobody sees.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from .admission import wrong_with
from .comm import Comm
from .config import EngineConfig
from .engine_account import EngineAccount
from .errors import AdapterTooLarge, DeadlinePassed, GrammarInvalid
from .flight import StepResult, launch
from .host_state import HostState
from .kv_blocks import KVBlocks
from .model_runner import ModelRunner
from .planning import Plan, plan_step
from .pool.host_keeper import HostKeeper
from .pool.packs import PackFetcher, PackSource
from .pool.residency import Residency
from .report import EngineReport
from .request import AdapterRef, ErrorCode, GenerationRequest, TokenOutput
from .sampling.compile_queue import CompileQueue
from .sampling.grammar import Grammars
from .scheduler import Refusal, Scheduler
from .sequence import Sequence
from .step import Step

log = logging.getLogger(__name__)

# Of a step that has nothing to do until a grammar is compiled or an adapter has come.
_REST_S = 0.002
# Python's threads take turns: opening and planning packs beside the steps mustn't hold one up for
# Python's usual 5 ms, which is as long as a step.
_SWITCH_S = 0.0005


@dataclass(frozen=True)
class _Flight:
    """A launched step."""

    plan: Plan
    wait: Callable[[], StepResult]
    overlaps: bool  # the next step may be launched before it is read


class Engine:
    """Serves requests on rank 0 and leads the other ranks. One thread makes all calls."""

    def __init__(self, config: EngineConfig, packs: PackSource, comm: Comm | None = None):
        """
        Args:
            packs: where the packs of adapters come from.
            comm: rank 0's; made from the config when None.
        """
        sys.setswitchinterval(_SWITCH_S)
        self._comm = comm or Comm(0, config.tp_size, config.rendezvous, config.device)
        self._runner = ModelRunner(config, self._comm)
        self.config = config = self._runner.config  # with the sizes that were derived
        self._packs = packs
        self._fetcher = PackFetcher(packs, config.load_threads)
        self._keeper = HostKeeper(packs)
        self._kv = KVBlocks(self._runner.kv_blocks, config.block_size)
        self._residency = Residency(
            self._runner.pool,
            self._fetcher,
            config.base_fingerprint,
            config.model.num_layers,
        )
        self._scheduler = Scheduler(
            self._kv,
            self._residency,
            config.max_batch_tokens,
            config.max_running,
            config.overtake_slack,
            config.step_adapter_bytes,
        )
        model = config.model
        self._grammars = Grammars(config.model_path, model.vocab_size, model.eos_token_ids)
        self._compiling = CompileQueue(self._grammars)
        self._sequences: dict[str, Sequence] = {}
        self._flight: _Flight | None = None  # launched, not read
        self._early: list[TokenOutput] = []  # refusals made outside a step
        self._arrivals = 0
        self._account = EngineAccount(
            self._runner, self._scheduler, self._residency, self._kv, packs
        )

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request. What is wrong with it comes as its output of the next step."""
        id_ = request.request_id
        if id_ in self._sequences or id_ in self._compiling:
            text = f"request id {id_!r} is in use"
            self._early.append(_failed(id_, "duplicate_request", text))
            return
        wrong = wrong_with(request, self.config)
        if wrong is not None:
            self._early.append(_failed(id_, *wrong))
            return
        now = time.monotonic()
        if not self._compiling.hold(request, now):
            self._accept(request, now)

    def _accept(self, request: GenerationRequest, submitted: float) -> None:
        limit = len(request.prompt_ids) + request.sampling.max_tokens
        seq = Sequence(request, self._arrivals, min(limit, self.config.context_length))
        if request.timeout_s is not None:
            seq.deadline = submitted + request.timeout_s
        if request.output_ids and len(seq.tokens) >= seq.limit:
            # A continuation that is whole, or longer than this group's cache can hold.
            self._early.append(TokenOutput(request.request_id, finish_reason="length"))
            return
        if request.sampling.host_state:
            try:
                seq.host = HostState(request, self._grammars)
            except GrammarInvalid as e:
                self._early.append(_failed(request.request_id, "invalid_grammar", str(e)))
                return
            if seq.host.finished:
                self._early.append(TokenOutput(request.request_id, finish_reason="stop"))
                return
        self._arrivals += 1
        self._sequences[request.request_id] = seq
        self._scheduler.add(seq)

    def abort(self, request_id: str) -> None:
        """Drops a request and frees what it holds. One that has ended already is no error."""
        self._compiling.drop(request_id)
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self._scheduler.remove(seq)
            self._give_up_adapter(seq)

    def has_work(self) -> bool:
        return bool(
            self._sequences
            or self._compiling
            or self._flight
            or self._early
            or self._residency.prefetch_ready
        )

    def step(self) -> list[TokenOutput]:
        """Launches one model step and returns what came of the last one that was launched.

        Without overlap that is the same step. Empty when everything still loads.
        """
        self._accept_compiled()
        outputs, self._early = self._early, []
        idle = self._flight is None
        outputs += self._advance()
        if idle and self._flight is not None:
            # Nothing was read yet: go on at once, or the caller would take this for an idle step.
            outputs += self._advance()
        return outputs

    def _accept_compiled(self) -> None:
        if self._compiling and not (self._sequences or self._flight):
            self._compiling.rest(_REST_S)
        for request, submitted, error in self._compiling.take(time.monotonic()):
            if error is None:
                self._accept(request, submitted)
            else:
                self._early.append(_failed(request.request_id, *error))

    def _advance(self) -> list[TokenOutput]:
        """Launches a step if there is one, and collects the one before it."""
        started = time.perf_counter()
        self._residency.settle()
        self._residency.prefetch()
        outputs: list[TokenOutput] = []
        before, self._flight = self._flight, None
        read = before  # whose end this call waits for, with overlap
        if before is not None and self._scheduler.may_preempt():
            outputs += self._collect(before)
            before = None
        flight, refused = self._launch(before)
        outputs += refused
        if before is not None:
            outputs += self._collect(before)
        if flight is not None:
            if flight.overlaps:
                self._flight = flight
            else:
                outputs += self._collect(flight)
        if flight is not None or before is not None:
            seconds = time.perf_counter() - started
            timed = read or flight
            work = [] if timed is None else timed.plan.work
            self._account.stepped(seconds, sum(w.count for w in work if w.count > 1))
        elif not outputs:
            self._residency.rest(_REST_S)
        return outputs

    def set_desired(self, adapters: list[AdapterRef]) -> None:
        """The controller's advice: prefetch these when there is room, and evict others first."""
        self._residency.set_desired(adapters)

    def keep_on_host(self, adapters: list[AdapterRef]) -> None:
        """The controller's advice: these packs are to be in this node's memory, others may go."""
        self._keeper.keep(adapters)

    def purge(self, key: str) -> None:
        """Forgets a deleted adapter on this node: pool, memory, disk and cached prefixes."""
        self._residency.purge(key)
        self._keeper.forget(key)
        self._packs.remove(key)
        self._kv.forget(key)
        self._account.purged(key)
        for seq in self._sequences.values():
            seq.purged |= seq.adapter_key == key

    def report(self) -> EngineReport:
        return self._account.report(self._sequences.values())

    def close(self) -> None:
        """Stops the other ranks and the fetch threads."""
        if self.config.tp_size > 1:
            self._comm.broadcast_message(Step(stop=True).to_wire())
        self._fetcher.close()
        self._keeper.close()
        self._account.close()
        self._residency.close()
        self._grammars.close()
        self._comm.close()

    def _refuse(self, refusal: Refusal) -> TokenOutput:
        seq = refusal.seq
        request = seq.request
        log.warning("request refused: %s", refusal.error, extra=request.log_fields)
        del self._sequences[request.request_id]
        code: ErrorCode = "adapter_load_failed"
        if isinstance(refusal.error, AdapterTooLarge):
            code = "adapter_too_large"
        elif isinstance(refusal.error, DeadlinePassed):
            code = "deadline_exceeded"
            self._give_up_adapter(seq)
        return _failed(request.request_id, code, str(refusal.error))

    def _give_up_adapter(self, gone: Sequence) -> None:
        """A request has gone without its adapter: nothing comes for it any more, unless others
        wait for it too."""
        key = gone.adapter_key
        if key and all(other.adapter_key != key for other in self._sequences.values()):
            self._residency.give_up(key)

    def _launch(self, before: _Flight | None) -> tuple[_Flight | None, list[TokenOutput]]:
        """Schedules and launches a step, and refuses what can't ever start.

        Args:
            before: the step whose sampled ids aren't read yet.
        """
        scheduler = self._scheduler
        self._account.look(scheduler.waiting, len(scheduler.running))
        work, refusals = scheduler.schedule(time.monotonic())
        refused = [self._refuse(r) for r in refusals]
        carried = before.plan.index_of_draws() if before is not None else {}
        changes = self._residency.take_changes()
        plan = plan_step(work, changes, carried, self.config.model.eos_token_ids)
        overlaps = self.config.overlaps and not plan.host_state
        if overlaps and self.config.tp_size > 1:
            plan.step.shared_ids = len(plan.drawing)
        if self.config.tp_size > 1 and (work or changes):
            self._comm.broadcast_message(plan.step.to_wire())
        if not work:
            return None, refused
        flight = _Flight(plan, self._execute(plan), overlaps)
        self._account.launched(plan)
        for w in work:
            self._scheduler.launched(w)
        for seq in plan.drawing:
            seq.unread += 1
        return flight, refused

    def _execute(self, plan: Plan) -> Callable[[], StepResult]:
        # A step that waits for a load says nothing of how long its tokens take.
        return launch(self._runner, plan, timed=plan.prefills and not self._residency.loads_run)

    def _collect(self, flight: _Flight) -> list[TokenOutput]:
        """Reads a launched step's result; what it says of sequences that have ended is dropped."""
        plan, result = flight.plan, flight.wait()
        self._residency.speeds.prefilled(plan.tokens, result.seconds)
        for w in plan.work:
            if not w.seq.removed:
                prompt = w.count if w.count > 1 or not w.seq.started else 0
                self._account.tokens(w.seq, prompt=prompt)
            self._scheduler.landed(w)
        for p, logprobs in zip(plan.prompts, result.prompts, strict=True):
            if p.seq.prompt_logprobs is not None:
                p.seq.prompt_logprobs += logprobs
        drawn = result.drawn
        if drawn is None:
            return []
        outputs: list[TokenOutput] = []
        for seq, token, finite, logprob in zip(
            plan.drawing, drawn.tokens, drawn.finite, drawn.logprobs, strict=True
        ):
            if seq.removed:
                continue
            seq.unread -= 1
            if not finite:
                log.error("the output isn't finite", extra=seq.request.log_fields)
                self._end(seq)
                outputs.append(
                    _failed(
                        seq.request.request_id,
                        "nonfinite_logits",
                        "the model's output isn't finite; this adapter's weights overflow",
                    )
                )
                continue
            out = self._append(seq, token)
            if logprob is not None and out.token_ids:
                out.logprobs.append(logprob)
            outputs.append(out)
        return outputs

    def _append(self, seq: Sequence, token: int) -> TokenOutput:
        seq.tokens.append(token)
        if seq.host is not None:
            seq.host.advance(token)
            if seq.host.error is not None:
                self._end(seq)
                return _failed(seq.request.request_id, "grammar_failed", seq.host.error)
        out = TokenOutput(seq.request.request_id, [token])
        if not seq.started:
            seq.started = True
            seq.times.first_token_s = time.monotonic()
            out.tier, out.cached_tokens = seq.tier, seq.cached_tokens or 0
            out.prompt_logprobs = seq.prompt_logprobs
            seq.prompt_logprobs = None
        self._account.tokens(seq, output=1)
        out.finish_reason = seq.finish_reason(self.config.model.eos_token_ids)
        if out.finish_reason is not None:
            self._end(seq)
            if seq.request.traceparent is not None:
                out.spans = seq.times.spans(time.monotonic())
        return out

    def _end(self, seq: Sequence) -> None:
        self._account.ended()
        del self._sequences[seq.request.request_id]
        self._scheduler.remove(seq)


def _failed(request_id: str, code: ErrorCode, message: str) -> TokenOutput:
    return TokenOutput(request_id, finish_reason="error", error_code=code, error=message)
