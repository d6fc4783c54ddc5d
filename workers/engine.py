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
from concurrent.futures import Future, wait
from dataclasses import dataclass

from .comm import Comm
from .config import EngineConfig
from .engine_account import EngineAccount
from .errors import AdapterTooLarge, DeadlinePassed, GrammarInvalid
from .flight import StepResult, launch
from .host_state import HostState
from .kv_blocks import KVBlocks
from .model_runner import ModelRunner
from .pace import Pace
from .planning import Plan, plan_step
from .pool.host_keeper import HostKeeper
from .pool.node_packs import PackLister
from .pool.packs import PackFetcher, PackSource
from .pool.residency import Residency
from .report import REPORTED_TENANTS, EngineReport
from .request import AdapterRef, ErrorCode, FinishReason, GenerationRequest, TokenOutput
from .sampling.grammar import Grammars
from .scheduler import Refusal, Scheduler
from .sequence import Sequence
from .step import Step
from .turns import expected_waits

log = logging.getLogger(__name__)

_COMPILE_S = 10.0  # that a request's grammar may take, waiting for others' included
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
        self._keeper, self._lister = HostKeeper(packs), PackLister(packs)
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
        self._pace = Pace()
        self._ended = 0  # sequences, since the last step
        self._sequences: dict[str, Sequence] = {}
        self._flight: _Flight | None = None  # launched, not read
        self._early: list[TokenOutput] = []  # refusals made outside a step
        # Requests whose grammar is compiled first, and until when that may take.
        self._compiling: dict[str, tuple[GenerationRequest, Future[object], float]] = {}
        self._arrivals = 0
        self._report = EngineReport(
            weights_bytes=self._runner.weights_bytes,
            weights_seconds=self._runner.weights_seconds,
            ready_seconds=self._runner.ready_seconds,
        )
        self._purged: set[str] = set()  # whose counts go with the next report
        self._account = EngineAccount(self._report, self._residency, self._kv, self._runner.device)

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request. What is wrong with it comes as its output of the next step."""
        wrong = self._wrong_with(request)
        if wrong is not None:
            code, message = wrong
            self._early.append(_failed(request.request_id, code, message))
            return
        grammar = request.sampling.grammar
        compiling = None if grammar is None else self._grammars.compiling(grammar)
        now = time.monotonic()
        if compiling is None:
            self._accept(request, now)
        else:
            self._compiling[request.request_id] = request, compiling, now + _COMPILE_S

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
        waiting = self._compiling.pop(request_id, None)
        if waiting is not None:
            waiting[1].cancel()
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
            wait([compiling for _, compiling, _ in self._compiling.values()], _REST_S)
        for request_id, (request, compiling, deadline) in list(self._compiling.items()):
            late = time.monotonic() > deadline
            if not (compiling.done() or late):
                continue
            del self._compiling[request_id]
            if compiling.done():
                self._accept(request, deadline - _COMPILE_S)
            else:
                compiling.cancel()
                text = f"the grammar takes more than {_COMPILE_S:.0f} s to compile; make it simpler"
                self._early.append(_failed(request_id, "invalid_grammar", text))

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
            self._report.steps += 1
        if flight is not None or before is not None:
            seconds = time.perf_counter() - started
            self._report.step_seconds += seconds
            timed = read or flight
            work = [] if timed is None else timed.plan.work
            self._pace.stepped(seconds, sum(w.count for w in work if w.count > 1), self._ended)
            self._ended = 0
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
        self._purged.add(key)
        for seq in self._sequences.values():
            seq.purged |= seq.adapter_key == key

    def report(self) -> EngineReport:
        r, s, res = self._report, self._scheduler, self._residency
        r.queued, r.running = len(s.waiting), len(s.running)
        r.token_s = self._pace.token_s
        r.max_running = self.config.max_running
        backlogs = s.backlogs()
        r.prompt_tokens_pending = sum(b.tokens for b in backlogs.values())
        c = self.config
        waits = expected_waits(backlogs, s.vtc, self._pace, c.max_running, c.max_batch_tokens)
        r.wait_s, r.turn_s, r.floods = waits.all_s, waits.turn_s, waits.floods
        r.end_s = self._pace.ends_every_s
        r.kv_blocks_total, r.kv_blocks_used = self._kv.total, self._kv.used
        r.preemptions, r.prefix_hit_tokens = s.preemptions, s.prefix_hit_tokens
        waiting = s.waiting.by_tenant()
        r.tenant_leads = s.vtc.leads(waiting, REPORTED_TENANTS)
        r.tenants_waiting = {t: waiting.get(t, 0) for t in r.tenant_leads}
        r.pool_bytes_total = self._runner.pool.total_bytes
        r.pool_bytes_used = self._runner.pool.used_bytes
        loading = res.loading
        node = self._lister.latest(loading)
        r.gpu, r.disk, r.host = res.resident(), node.disk, node.host
        r.loading = [*dict.fromkeys([*loading, *node.loading])]
        r.host_bytes_total = self._packs.host_bytes
        r.loads, r.load_seconds, r.load_bytes = dict(res.loads), res.load_seconds, res.load_bytes
        r.load_failures, r.evictions = res.load_failures, res.evictions
        r.compiles_after_ready = len(self._runner.compiles.kernels)
        self._account.fill()
        report = EngineReport.from_wire(r.to_wire())
        # After they were told once more: reports that never forgot would grow with every upload.
        for key in self._purged - {seq.owner for seq in self._sequences.values()}:
            self._purged.discard(key)
            r.prompt_tokens.pop(key, None)
            r.output_tokens.pop(key, None)
        return report

    def close(self) -> None:
        """Stops the other ranks and the fetch threads."""
        if self.config.tp_size > 1:
            self._comm.broadcast_message(Step(stop=True).to_wire())
        self._fetcher.close()
        self._keeper.close()
        self._lister.close()
        self._residency.close()
        self._grammars.close()
        self._comm.close()

    def _wrong_with(self, request: GenerationRequest) -> tuple[ErrorCode, str] | None:
        config, n = self.config, len(request.prompt_ids)
        if request.request_id in self._sequences or request.request_id in self._compiling:
            return "duplicate_request", f"request id {request.request_id!r} is in use"
        if n == 0:
            return "empty_prompt", "the prompt has no tokens"
        tokens = (*request.prompt_ids, *request.output_ids)
        bad = [t for t in tokens if not 0 <= t < config.model.vocab_size]
        if bad:
            limit = config.model.vocab_size - 1
            return "invalid_token", f"token id {bad[0]} is outside 0..{limit}"
        if n >= config.context_length:
            return (
                "context_length_exceeded",
                f"the prompt has {n} tokens; at most {config.context_length - 1} fit the context "
                f"of {config.context_length} with one token of output",
            )
        return None

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
                self._count_tokens(w.seq, prompt=w.count if w.count > 1 or not w.seq.started else 0)
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
        self._count_tokens(seq, output=1)
        out.finish_reason = self._finish_reason(seq, token)
        if out.finish_reason is not None:
            self._end(seq)
            if seq.request.traceparent is not None:
                out.spans = seq.times.spans(time.monotonic())
        return out

    def _finish_reason(self, seq: Sequence, token: int) -> FinishReason | None:
        params = seq.request.sampling
        if seq.host is not None and seq.host.finished:
            return "stop"
        if seq.output_count >= params.min_tokens:
            if token in params.stop_token_ids:
                return "stop"
            if not params.ignore_eos and token in self.config.model.eos_token_ids:
                return "stop"
        return "length" if len(seq.tokens) >= seq.limit else None

    def _count_tokens(self, seq: Sequence, prompt: int = 0, output: int = 0) -> None:
        for counts, n in (
            (self._report.prompt_tokens, prompt),
            (self._report.output_tokens, output),
        ):
            if n:
                counts[seq.owner] = counts.get(seq.owner, 0) + n

    def _end(self, seq: Sequence) -> None:
        self._ended += 1
        del self._sequences[seq.request.request_id]
        self._scheduler.remove(seq)


def _failed(request_id: str, code: ErrorCode, message: str) -> TokenOutput:
    return TokenOutput(request_id, finish_reason="error", error_code=code, error=message)
