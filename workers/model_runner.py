"""One rank's model, KV cache and adapter pool, and how a step message is run on them."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..adapter_store import Pack, host_memory
from ..kernels import MAX_RANK, TUNED_ADAPTERS, LoraBatch, MoeRunner, backend_for
from .attention import PagedKVCache, plan_attention
from .comm import Comm
from .compile_watch import CompileWatch
from .config import EngineConfig
from .decode_graphs import CaptureReport, DecodeGraphs, DecodeRows
from .dummy_weights import DummyCheckpoint
from .errors import WorkerError
from .host_copies import to_device
from .memory import Sizes, log_sizes, measure, share_out
from .models import load_model
from .pool.adapter_pool import AdapterPool
from .pool.pinned import PinnedMemory
from .request import SamplingParams
from .sampling.sampler import sample
from .sampling.sampling_batch import Draw, SamplingBatch
from .shard import Shard
from .step import SequenceStep, Step
from .step_inputs import StepInputs
from .weights import Checkpoint

log = logging.getLogger(__name__)

_PROBE_POOL_BYTES = 1 << 20
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
        self.config, self._comm = config, comm
        self._shard = shard = Shard(model, comm.rank, comm.size, config.ep_size)
        # The ids that the last step sampled, for tokens that the host hasn't read.
        self._sampled = torch.zeros(config.max_running, dtype=torch.int32, device=self.device)
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
        self.graphs: DecodeGraphs | None = None  # None: decode steps run as others do
        self.captured: CaptureReport | None = None
        self.compiles = CompileWatch()
        self._pinned = PinnedMemory(self.device)
        if config.host_folder is not None:
            # Now, because it takes a while: the first load would wait for it, and its requests.
            self._pinned.register(host_memory(Path(config.host_folder)))
        # Until every rank has loaded: the first step would wait for the slowest, and count as hung.
        comm.all_reduce(torch.zeros(1, device=self.device))
        sizes = self._sizes()
        self.config = replace(config, kv_tokens=sizes.kv_tokens, pool_bytes=sizes.pool_bytes)
        self._make_memory(self.config)
        if on_gpu:
            self._warm_up_sampling()
            self.warm_up()
            self.pool.warm_up()
            if config.cuda_graphs:
                self.graphs = self.decode_graphs()
                self.captured = self.graphs.capture()
            self.compiles.start()
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

    def _make_memory(self, config: EngineConfig) -> None:
        """KV cache and adapter pool of the sizes that `config` says."""
        assert config.kv_tokens is not None
        assert config.pool_bytes is not None
        model, on_gpu = config.model, self.device.type == "cuda"
        latent = model.latent
        self.kv_blocks = config.kv_tokens // config.block_size
        self.cache = PagedKVCache(
            model.num_layers,
            self.kv_blocks,
            config.block_size,
            self._shard.kv_heads,
            latent.cached if latent else model.head_dim,
            self.dtype,
            self.device,
            value_dim=latent.kv_rank if latent else None,
            latent=latent is not None,
        )
        self.pool = AdapterPool(
            model,
            self._shard,
            config.pool_bytes,
            self.dtype,
            self.device,
            config.max_slots,
            max_rank=config.max_lora_rank if on_gpu else MAX_RANK,
            rank_multiple=_GPU_RANK_MULTIPLE if on_gpu else 1,
            pinned=self._pinned,
        )

    def _sizes(self) -> Sizes:
        """Of KV cache and pool, the same on all ranks: those that the fullest has room for."""
        config, block = self.config, self.config.block_size
        if self.device.type != "cuda":
            if config.kv_tokens is None or config.pool_bytes is None:
                raise WorkerError(
                    "kv_tokens and pool_bytes are derived on a GPU only; give both for a CPU"
                )
            return Sizes(config.kv_tokens, config.pool_bytes)
        # Just enough to run the largest step.
        kv_tokens = -(-config.max_batch_tokens // block) * block
        self._make_memory(replace(config, kv_tokens=kv_tokens, pool_bytes=_PROBE_POOL_BYTES))
        kv_bytes = self.cache.k.nbytes + (0 if self.cache.latent else self.cache.v.nbytes)

        def largest_step() -> None:
            for slot, adapters in ((-1, None), (0, TUNED_ADAPTERS[-1])):
                self.run(Step(self._sequences_of(config.max_batch_tokens, slot)), adapters)

        usage = measure(self.device, largest_step, kv_bytes + self.pool.buffer.nbytes)
        given = config.kv_tokens is not None and config.pool_bytes is not None
        fraction = 1.0 if given else config.memory_fraction
        (left,) = self._comm.smallest([usage.left(fraction)])
        sizes = share_out(
            left,
            kv_bytes // kv_tokens,
            block,
            config.kv_tokens,
            config.pool_bytes,
            config.adapter_fraction,
        )
        log_sizes(usage, sizes, fraction, kv_bytes // kv_tokens)
        del self.cache, self.pool
        torch.cuda.empty_cache()
        return sizes

    def warm_up(self) -> None:
        """Runs steps of all kinds and sizes, so that no request waits while a kernel is compiled.

        Which kernels run depends on the size's power of two, on whether it is a multiple of 16,
        and on tiles that change between two powers of two. All ranks must come here at the same
        point, before the first step: every sequence writes to the same blocks.
        """
        largest = self.config.max_batch_tokens
        sizes = {m << k for k in range(largest.bit_length()) for m in (1, 3)}
        sizes |= {n + 1 for n in sizes} | {largest}
        for tokens in sorted(n for n in sizes if n <= largest):
            self.run(Step(self._sequences_of(tokens, -1)))
            for adapters in TUNED_ADAPTERS:  # slot 0 is empty: kernels run and find nothing to add
                self.run(Step(self._sequences_of(tokens, 0)), adapters)
        last = self._longest - 1  # the keys of one long sequence are shared among programs
        blocks = list(range(last // self.config.block_size + 1))
        self.run(Step([SequenceStep([0], last, blocks, -1, 0)]))
        self.cache.clear()

    def _warm_up_sampling(self) -> None:
        logits = self.run(Step(self._sequences_of(1, -1)))
        if self._comm.rank != 0:
            return
        params = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, min_p=0.1, logprobs=1)
        batch = SamplingBatch.build([Draw(params, 0)], logits.shape[1], self.device)
        sample(logits, batch).to_host()

    def decode_graphs(self) -> DecodeGraphs:
        """Fixed buffers for decode steps, nothing captured yet."""
        config = self.config
        return DecodeGraphs(
            self._decode, config.max_running, self._longest, config.block_size, self.device
        )

    @property
    def _longest(self) -> int:
        """Most tokens of a sequence."""
        return min(self.config.context_length, self.kv_blocks * self.config.block_size)

    def _sequences_of(self, tokens: int, slot: int) -> list[SequenceStep]:
        size = self.config.block_size
        sequences = []
        while tokens > 0:
            n = min(tokens, self._longest)
            sequences.append(SequenceStep([0] * n, 0, list(range(-(-n // size))), slot, n - 1))
            tokens -= n
        return sequences

    def apply_changes(self, step: Step) -> None:
        """Follows rank 0's pool: the same loads and unloads in the same order."""
        for change in step.changes:
            if change.what == "load":
                assert change.path is not None
                self.pool.start_load(change.slot, Pack.open(change.path, verify=False))
            elif change.what == "show":
                self.pool.show(change.slot)
            else:
                self.pool.unload(change.slot)

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
        inputs = StepInputs.of(step)
        if self.graphs is not None and inputs.decode and num_adapters is None:
            self.pool.await_layer()
            hidden = self.graphs.run(step.sequences, inputs)[: len(step.sequences)]
        else:
            hidden = self._forward(step, inputs, num_adapters or inputs.num_adapters)
        if self._comm.rank != 0:
            return hidden[:0]
        if inputs.logit_rows.size < hidden.shape[0]:
            rows = to_device({"rows": inputs.logit_rows}, self.device)["rows"]
            hidden = hidden.index_select(0, rows)
        return self.model.logits(hidden)

    def _forward(self, step: Step, inputs: StepInputs, num_adapters: int) -> torch.Tensor:
        """Hidden states [T, H] of any step."""
        there = to_device(inputs.by_token(), self.device)
        token_ids, token_slot = there["token_ids"], there["token_slot"]
        if (inputs.carried >= 0).any():
            token_ids = self._with_carried(token_ids, there["carried"])
        lora = None
        if inputs.num_adapters:
            lora = LoraBatch.from_token_slot(token_slot, ordered=True, num_adapters=num_adapters)
        return self.model.forward(
            token_ids,
            there["positions"],
            plan_attention(step.sequences, self.config.block_size, self.device),
            self.cache,
            self.pool,
            lora,
        )

    def _decode(self, rows: DecodeRows, num_adapters: int) -> torch.Tensor:
        """Hidden states [B, H] of a bucket's rows: what graphs are captured of."""
        lora = None
        if num_adapters:
            lora = LoraBatch.from_token_slot(
                rows.token_slot, ordered=True, num_adapters=num_adapters
            )
        return self.model.forward(
            self._with_carried(rows.token_ids, rows.carried),
            rows.positions,
            rows.attention,
            self.cache,
            self.pool,
            lora,
            rows.padding(),
        )

    def keep_sampled(self, ids: torch.Tensor, shared: int) -> None:
        """Keeps rank 0's sampled ids [N] for the next step's carried tokens, and sends them to the
        other ranks where `shared` is N."""
        self._sampled[: ids.shape[0]].copy_(ids)
        self._share_sampled(shared)

    def follow(self, step: Step) -> None:
        """What a rank other than 0 does at a step."""
        self.apply_changes(step)
        if step.sequences:
            self.run(step)
            self._share_sampled(step.shared_ids)

    def _share_sampled(self, n: int) -> None:
        if n:
            self._comm.broadcast(self._sampled[:n])

    def _with_carried(self, token_ids: torch.Tensor, carried: torch.Tensor) -> torch.Tensor:
        """`token_ids` [T], with the last sampled ids in place of those that weren't read yet."""
        sampled = self._sampled.index_select(0, carried.clamp(min=0))
        return torch.where(carried >= 0, sampled, token_ids)


def run_follower(config: EngineConfig, rank: int) -> None:
    """A rank other than 0: obeys step messages until one says stop."""
    comm = Comm(rank, config.tp_size, config.rendezvous, config.device)
    try:
        runner = ModelRunner(config, comm)
        while True:
            step = Step.from_wire(comm.broadcast_message())
            if step.stop:
                return
            runner.follow(step)
    finally:
        comm.close()
