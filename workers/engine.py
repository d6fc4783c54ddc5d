"""The engine of a worker group: rank 0's loop body over scheduler, model runner and sampler."""

from __future__ import annotations

import time

import torch

from .comm import Comm
from .config import EngineConfig
from .errors import AdapterTooLarge, GrammarInvalid
from .grammar import Grammars
from .host_state import HostState
from .kv_blocks import KVBlocks
from .logprobs import token_logprobs
from .model_runner import ModelRunner
from .packs import PackFetcher, PackSource
from .report import EngineReport
from .request import AdapterRef, FinishReason, GenerationRequest, TokenOutput
from .residency import Residency
from .sampler import Draw, SamplingBatch, sample
from .scheduler import Refusal, Scheduled, Scheduler
from .sequence import Sequence
from .step import SequenceStep, Step


class Engine:
    """Serves requests on rank 0 and leads the other ranks. One thread makes all calls."""

    def __init__(self, config: EngineConfig, packs: PackSource, comm: Comm | None = None):
        """
        Args:
            packs: where the packs of adapters come from.
            comm: rank 0's; made from the config when None.
        """
        self.config = config
        self._comm = comm or Comm(0, config.tp_size, config.rendezvous, config.device)
        self._runner = ModelRunner(config, self._comm)
        self._packs = packs
        self._fetcher = PackFetcher(packs, config.load_threads)
        self._kv = KVBlocks(self._runner.kv_blocks, config.block_size)
        self._residency = Residency(self._runner.pool, self._fetcher, config.base_fingerprint)
        self._scheduler = Scheduler(
            self._kv,
            self._residency,
            config.max_batch_tokens,
            config.max_running,
            config.overtake_limit,
        )
        model = config.model
        self._grammars = Grammars(config.model_path, model.vocab_size, model.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}
        self._early: list[TokenOutput] = []  # refusals made outside a step
        self._arrivals = 0
        self._report = EngineReport(
            weights_bytes=self._runner.weights_bytes,
            weights_seconds=self._runner.weights_seconds,
            ready_seconds=self._runner.ready_seconds,
        )

    def submit(self, request: GenerationRequest) -> None:
        """Queues a request. What is wrong with it comes as its output of the next step."""
        wrong = self._wrong_with(request)
        if wrong is not None:
            code, message = wrong
            self._early.append(_failed(request.request_id, code, message))
            return
        seq = Sequence(request, self._arrivals)
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
        seq = self._sequences.pop(request_id, None)
        if seq is not None:
            self._scheduler.remove(seq)

    def has_work(self) -> bool:
        return bool(self._sequences or self._early or self._residency.prefetch_ready)

    def step(self) -> list[TokenOutput]:
        """Runs one model step and returns what it produced; empty when everything still loads."""
        outputs, self._early = self._early, []
        self._residency.prefetch()
        started = time.perf_counter()
        work, refusals = self._scheduler.schedule()
        outputs += [self._refuse(r) for r in refusals]
        work.sort(key=lambda w: w.seq.slot if w.seq.slot is not None else -1)
        step = Step([_sequence_step(w) for w in work], self._residency.take_changes())
        if not step.sequences and not step.changes:
            return outputs
        if self.config.tp_size > 1:
            self._comm.broadcast_message(step.to_wire())
        if step.sequences:
            logits = self._runner.run(step)
            outputs += self._finish_step(work, step, logits)
            self._report.steps += 1
            self._report.step_seconds += time.perf_counter() - started
        return outputs

    def set_desired(self, adapters: list[AdapterRef]) -> None:
        """The controller's advice: prefetch these when there is room, and evict others first."""
        self._residency.set_desired(adapters)

    def purge(self, key: str) -> None:
        """Forgets a deleted adapter on this node: pool, disk and cached prefixes."""
        self._residency.purge(key)
        self._packs.remove(key)
        self._kv.forget(key)

    def report(self) -> EngineReport:
        r, s, res = self._report, self._scheduler, self._residency
        r.queued, r.running = len(s.waiting), len(s.running)
        r.kv_blocks_total, r.kv_blocks_used = self._kv.total, self._kv.used
        r.preemptions, r.prefix_hit_tokens = s.preemptions, s.prefix_hit_tokens
        r.pool_bytes_total = self._runner.pool.total_bytes
        r.pool_bytes_used = self._runner.pool.used_bytes
        r.gpu, r.disk, r.loading = res.resident(), self._packs.resident(), res.loading
        r.loads, r.load_seconds, r.load_bytes = dict(res.loads), res.load_seconds, res.load_bytes
        r.load_failures, r.evictions = res.load_failures, res.evictions
        return EngineReport.from_wire(r.to_wire())

    def close(self) -> None:
        """Stops the other ranks and the fetch threads."""
        if self.config.tp_size > 1:
            self._comm.broadcast_message(Step(stop=True).to_wire())
        self._fetcher.close()
        self._comm.close()

    def _wrong_with(self, request: GenerationRequest) -> tuple[str, str] | None:
        config, n = self.config, len(request.prompt_ids)
        if request.request_id in self._sequences:
            return "duplicate_request", f"request id {request.request_id!r} is in use"
        if n == 0:
            return "empty_prompt", "the prompt has no tokens"
        bad = [t for t in request.prompt_ids if not 0 <= t < config.model.vocab_size]
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
        del self._sequences[refusal.seq.request.request_id]
        too_large = isinstance(refusal.error, AdapterTooLarge)
        code = "adapter_too_large" if too_large else "adapter_load_failed"
        return _failed(refusal.seq.request.request_id, code, str(refusal.error))

    def _finish_step(
        self, work: list[Scheduled], step: Step, logits: torch.Tensor
    ) -> list[TokenOutput]:
        outputs: list[TokenOutput] = []
        draws: list[Draw] = []
        last_rows: list[int] = []
        drawing: list[Sequence] = []
        row = 0
        for w, s in zip(work, step.sequences, strict=True):
            seq = w.seq
            self._count_tokens(seq, prompt=w.count if w.count > 1 or not seq.started else 0)
            self._scheduler.computed(w)
            if s.logits_from < 0:
                continue
            n = w.count - s.logits_from
            if seq.prompt_logprobs is not None:
                self._add_prompt_logprobs(seq, s, logits[row : row + n])
            row += n
            if seq.pending == 0:
                last_rows.append(row - 1)
                drawing.append(seq)
                draws.append(self._draw(seq))
        if not drawing:
            return outputs
        logits = logits[torch.tensor(last_rows, device=logits.device)]
        batch = SamplingBatch.build(draws, logits.shape[1], logits.device)
        chosen = sample(logits, batch).to_host()
        for i, seq in enumerate(drawing):
            if not chosen.finite[i]:
                self._end(seq)
                outputs.append(
                    _failed(
                        seq.request.request_id,
                        "nonfinite_logits",
                        "the model's output isn't finite; this adapter's weights overflow",
                    )
                )
                continue
            out = self._append(seq, chosen.tokens[i])
            logprob = chosen.logprobs[i]
            if logprob is not None and out.token_ids:
                out.logprobs.append(logprob)
            outputs.append(out)
        return outputs

    def _draw(self, seq: Sequence) -> Draw:
        draw = Draw(seq.request.sampling, len(seq.tokens), self._banned(seq))
        if seq.host is not None:
            draw.counts, draw.grammar = seq.host.counts, seq.host.grammar
        return draw

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
            out.tier, out.cached_tokens = seq.tier, seq.cached_tokens
            out.prompt_logprobs = seq.prompt_logprobs
            seq.prompt_logprobs = None
        self._count_tokens(seq, output=1)
        out.finish_reason = self._finish_reason(seq, token)
        if out.finish_reason is not None:
            self._end(seq)
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
        if seq.output_count >= params.max_tokens or len(seq.tokens) >= self.config.context_length:
            return "length"
        return None

    def _banned(self, seq: Sequence) -> tuple[int, ...]:
        params = seq.request.sampling
        if seq.output_count >= params.min_tokens:
            return ()
        return (*self.config.model.eos_token_ids, *params.stop_token_ids)

    def _add_prompt_logprobs(self, seq: Sequence, step: SequenceStep, logits: torch.Tensor) -> None:
        assert seq.prompt_logprobs is not None
        first = step.start + step.logits_from + 1  # position that the first row predicts
        # A preempted prompt is computed again: what is known of it already stays.
        known = len(seq.prompt_logprobs) - first
        targets = list(seq.request.prompt_ids[first + known : first + len(logits)])
        if targets:
            top = [seq.request.sampling.prompt_logprobs or 0] * len(targets)
            rows = logits[known : known + len(targets)]
            seq.prompt_logprobs += token_logprobs(rows, targets, top)

    def _count_tokens(self, seq: Sequence, prompt: int = 0, output: int = 0) -> None:
        for counts, n in (
            (self._report.prompt_tokens, prompt),
            (self._report.output_tokens, output),
        ):
            if n:
                counts[seq.owner] = counts.get(seq.owner, 0) + n

    def _end(self, seq: Sequence) -> None:
        del self._sequences[seq.request.request_id]
        self._scheduler.remove(seq)


def _sequence_step(w: Scheduled) -> SequenceStep:
    seq, end = w.seq, w.seq.computed + w.count
    if seq.prompt_logprobs is not None and seq.computed < len(seq.request.prompt_ids):
        logits_from = 0
    else:
        logits_from = w.count - 1 if end == len(seq.tokens) else -1
    assert seq.slot is not None
    return SequenceStep(
        seq.tokens[seq.computed : end], seq.computed, list(seq.blocks), seq.slot, logits_from
    )


def _failed(request_id: str, code: str, message: str) -> TokenOutput:
    return TokenOutput(request_id, finish_reason="error", error_code=code, error=message)
