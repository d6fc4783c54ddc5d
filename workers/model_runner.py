"""One rank's model, KV cache and adapter pool, and how a step message is run on them."""

from __future__ import annotations

import contextlib
import logging
import time

import torch

from ..adapter_store import Pack
from ..kernels import MAX_RANK, TUNED_ADAPTERS, LoraBatch, MoeRunner, backend_for
from .adapter_pool import AdapterPool
from .attention import PagedKVCache, plan_attention
from .comm import Comm
from .config import EngineConfig
from .dummy_weights import DummyCheckpoint
from .errors import WorkerError
from .models import load_model
from .shard import Shard
from .step import SequenceStep, Step
from .weights import Checkpoint

log = logging.getLogger(__name__)

_GPU_RANK_MULTIPLE = 8  # 16 bytes of a half-precision factor


class ModelRunner:
    """Everything on a rank's device. The same on all ranks; rank 0 also takes logits."""

    def __init__(self, config: EngineConfig, comm: Comm):
        started = time.perf_counter()
        if config.torch_threads:
            torch.set_num_threads(config.torch_threads)
        model = config.model
        self.device = torch.device(config.device)
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            # cuDNN makes a new plan for every shape, and the shapes change from step to step.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.dtype = getattr(torch, config.dtype)
        self._config, self._comm = config, comm
        shard = Shard(model, comm.rank, comm.size, config.ep_size)
        self.kv_blocks = config.kv_tokens // config.block_size
        latent = model.latent
        self.cache = PagedKVCache(
            model.num_layers,
            self.kv_blocks,
            config.block_size,
            shard.kv_heads,
            latent.cached if latent else model.head_dim,
            self.dtype,
            self.device,
            value_dim=latent.kv_rank if latent else None,
            latent=latent is not None,
        )
        self.pool = AdapterPool(
            model,
            shard,
            config.pool_bytes,
            self.dtype,
            self.device,
            config.max_slots,
            max_rank=config.max_lora_rank if on_gpu else MAX_RANK,
            rank_multiple=_GPU_RANK_MULTIPLE if on_gpu else 1,
        )
        with contextlib.ExitStack() as files:
            if config.load_format == "dummy":
                source = DummyCheckpoint(self.dtype, config.device)
            else:
                source = files.enter_context(
                    Checkpoint(config.model_path, self.dtype, config.device)
                )
            loading = time.perf_counter()
            self.model = load_model(
                model,
                shard,
                source,
                comm,
                MoeRunner(backend_for(self.device)),
                config.context_length,
                self.device,
            )
            self.weights_seconds = time.perf_counter() - loading
            self.weights_bytes = source.read_bytes
        # Until every rank has loaded: the first step would wait for the slowest, and count as hung.
        comm.all_reduce(torch.zeros(1, device=self.device))
        if on_gpu:
            self.warm_up()
        self.ready_seconds = time.perf_counter() - started
        log.info(
            "rank %d: weights: %.2f GB %s in %.1f s, %.2f GB/s; ready in %.1f s",
            comm.rank,
            self.weights_bytes / 1e9,
            "made" if config.load_format == "dummy" else "read",
            self.weights_seconds,
            self.weights_bytes / 1e9 / self.weights_seconds,
            self.ready_seconds,
        )

    def warm_up(self) -> None:
        """Runs steps of all kinds and sizes, so that no request waits while a kernel is compiled.

        Which kernels run depends on the size's power of two, on whether it is a multiple of 16,
        and on tiles that change between two powers of two. All ranks must come here at the same
        point, before the first step: every sequence writes to the same blocks.
        """
        largest = self._config.max_batch_tokens
        sizes = {m << k for k in range(largest.bit_length()) for m in (1, 3)}
        sizes |= {n + 1 for n in sizes} | {largest}
        for tokens in sorted(n for n in sizes if n <= largest):
            self.run(Step(self._sequences_of(tokens, -1)))
            for adapters in TUNED_ADAPTERS:  # slot 0 is empty: kernels run and find nothing to add
                self.run(Step(self._sequences_of(tokens, 0)), adapters)
        # One more token after a long context, whose keys several programs share.
        (longest,) = self._sequences_of(self._longest(), -1)
        self.run(Step([SequenceStep([0], len(longest.token_ids) - 1, longest.blocks, -1, 0)]))
        self.cache.clear()

    def _sequences_of(self, tokens: int, slot: int) -> list[SequenceStep]:
        size, longest = self._config.block_size, self._longest()
        sequences = []
        while tokens > 0:
            n = min(tokens, longest)
            sequences.append(SequenceStep([0] * n, 0, list(range(-(-n // size))), slot, n - 1))
            tokens -= n
        return sequences

    def _longest(self) -> int:
        return min(self._config.context_length, self.kv_blocks * self._config.block_size)

    def apply_changes(self, step: Step) -> None:
        """Follows rank 0's pool: the same loads and unloads in the same order."""
        for change in step.changes:
            if change.path is None:
                self.pool.unload(change.slot)
            else:
                self.pool.load(change.slot, Pack.open(change.path, verify=False))

    @torch.inference_mode()
    def run(self, step: Step, num_adapters: int | None = None) -> torch.Tensor:
        """Runs the sequences of a step.

        Args:
            num_adapters: choose tiles as for so many adapters; by default as many as there are.

        Returns:
            Rank 0: float32 logits [N, vocab] of the rows that sequences ask for, in order.
            Other ranks: an empty tensor.

        Raises:
            WorkerError: the sequences aren't ordered by slot.
        """
        seqs = step.sequences
        slots = [s.slot for s in seqs]
        if slots != sorted(slots):
            raise WorkerError("sequences of a step must be ordered by adapter slot")
        counts = [len(s.token_ids) for s in seqs]
        ids = torch.tensor([t for s in seqs for t in s.token_ids], device=self.device)
        positions = torch.cat([torch.arange(s.start, s.start + len(s.token_ids)) for s in seqs])
        lora = None
        if slots[-1] >= 0:
            token_slot = torch.repeat_interleave(
                torch.tensor(slots, dtype=torch.int32), torch.tensor(counts)
            )
            lora = LoraBatch.from_token_slot(
                token_slot.to(self.device),
                ordered=True,
                num_adapters=num_adapters or len(set(slots) - {-1}),
            )
        hidden = self.model.forward(
            ids,
            positions.to(self.device),
            plan_attention(seqs, self._config.block_size, self.device),
            self.cache,
            self.pool,
            lora,
        )
        if self._comm.rank != 0:
            return hidden[:0]
        rows, first = [], 0
        for s, n in zip(seqs, counts, strict=True):
            if s.logits_from >= 0:
                rows.extend(range(first + s.logits_from, first + n))
            first += n
        return self.model.logits(hidden[torch.tensor(rows, dtype=torch.int64, device=self.device)])


def run_follower(config: EngineConfig, rank: int) -> None:
    """A rank other than 0: obeys step messages until one says stop."""
    comm = Comm(rank, config.tp_size, config.rendezvous, config.device)
    try:
        runner = ModelRunner(config, comm)
        while True:
            step = Step.from_wire(comm.broadcast_message())
            if step.stop:
                return
            runner.apply_changes(step)
            if step.sequences:
                runner.run(step)
    finally:
        comm.close()
