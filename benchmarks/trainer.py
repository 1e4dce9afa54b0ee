"""Training for the testbed: a small Llama on all its programs, then LoRA adapters side by side.

Adapters of one call are trained together: every linear layer holds the updates of all of them, and
each adapter sees its own part of the batch. Nothing passes between them, so an adapter comes out
as if it had been trained alone, and eight take hardly longer than one.
"""

import math
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from programs import BOS, LENGTH, NOP, OUTPUT, TOKENS, VOCABULARY, curriculum, sample
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

SCALING = 2.0  # alpha / r of every adapter
PRINT_EVERY = 500
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    bos_token_id=BOS,
    eos_token_id=None,
    pad_token_id=NOP,
)
Factors = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """One adapter to train: what on, of which rank, and the names its seeds are made of."""

    programs: tuple[str, ...]
    rank: int
    seed: str
    initial: str


def seed_of(*names: object) -> int:
    """A seed that depends on names alone, not on what else is trained or in which order."""
    return zlib.crc32(" ".join(map(str, names)).encode())


def generator(device: str, *names: object) -> torch.Generator:
    """Random numbers on a device, seeded by names."""
    return torch.Generator(device=device).manual_seed(seed_of(*names))


def answers(model: nn.Module, sequences: Tensor) -> Tensor:
    """Logits of the eight outputs, each given the right ones before it. [n, 8, vocabulary]"""
    logits: Tensor = model(sequences[:, :-1], use_cache=False, logits_to_keep=LENGTH).logits
    return logits


def train_base(
    steps: int, batch: int, samples: int, seed: int, device: str, peak: float = 1.5e-3
) -> LlamaForCausalLM:
    """A model that solves every program of the curriculum, given steps enough (10,000)."""
    model = _fresh_base(seed).to(device)
    draw = generator(device, "base", seed)
    pool = torch.cat([sample(name, samples, draw).to(torch.uint8) for name in curriculum()[0]])
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
    )

    def loss() -> Tensor:
        chosen = torch.randint(0, len(pool), (batch,), generator=draw, device=device)
        return _loss(model, pool[chosen].long()).mean()

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
        return min(1.0, (step + 1) / 500) * (0.02 + 0.98 * cosine)

    for _ in _descend(loss, optimizer, rate, steps, clip=list(model.parameters())):
        pass  # each step is taken as it is asked for
    return model


def _fresh_base(seed: int) -> LlamaForCausalLM:
    """The model before training; drawn here, so that it is the same under any library version."""
    model = LlamaForCausalLM(CONFIG)
    draw = generator("cpu", "initial", seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if weight.dim() == 2:
                size = 0.05 if "embed" in name else 0.02 if "lm_head" in name else 0.03
                if "o_proj" in name or "down_proj" in name:  # what is added to the residual
                    size /= math.sqrt(2 * CONFIG.num_hidden_layers)
                weight.normal_(0, size, generator=draw)
    return model


class SideBySide(nn.Module):
    """A frozen linear layer with one update per adapter, each for its own part of the batch.

    A [jobs, rank, in], B [jobs, out, rank]; ranks below the largest are rows of zeros, whose
    gradient is zero too.
    """

    def __init__(self, linear: nn.Linear, name: str, jobs: Sequence[Job]) -> None:
        super().__init__()
        self.linear = linear
        rank = max(job.rank for job in jobs)
        A = torch.zeros(len(jobs), rank, linear.in_features)
        bound = 1 / math.sqrt(linear.in_features)
        for row, job in zip(A, jobs, strict=True):
            draw = generator("cpu", job.initial, name)
            row[: job.rank].uniform_(-bound, bound, generator=draw)
        device = linear.weight.device
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(len(jobs), linear.out_features, rank, device=device))

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(len(self.A), -1, x.shape[-1])
        update = SCALING * (parts @ self.A.mT @ self.B.mT)
        output: Tensor = self.linear(x)
        return output + update.view(output.shape)


def train_adapters(
    base: LlamaForCausalLM,
    jobs: Sequence[Job],
    steps: int,
    batch: int,
    samples: int,
    device: str,
    peak: float = 1e-3,
    checkpoint: int = 0,
) -> tuple[list[Factors], list[Factors]]:
    """Factors (A [r, in], B [out, r]) by module for each job, SCALING not folded in.

    First those after all steps, then those after `checkpoint` of them, if that is not 0. `base` is
    changed: its linear layers hold all updates afterwards. `samples` sequences are drawn for each
    job, and every step looks at `batch` of them.
    """
    layers = _wrapped(base.requires_grad_(False).to(device), jobs)
    pools = torch.stack([_pool(job, samples, device) for job in jobs])
    draw = generator(device, "order")
    parameters = [factor for layer in layers.values() for factor in (layer.A, layer.B)]
    optimizer = torch.optim.Adam(parameters, lr=peak, betas=(0.9, 0.98))

    def loss() -> Tensor:
        chosen = torch.randint(0, samples, (batch,), generator=draw, device=device)
        sequences = pools[:, chosen].reshape(-1, TOKENS).long()
        return _loss(base, sequences).view(len(jobs), -1).mean(1).sum()

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / 50) * (1 - step / steps)

    early: list[Factors] = []
    for taken in _descend(loss, optimizer, rate, steps):
        if taken == checkpoint:
            early = _factors(layers, jobs)
    return _factors(layers, jobs), early


def _factors(layers: dict[str, SideBySide], jobs: Sequence[Job]) -> list[Factors]:
    """A copy of what each job has learned so far."""
    return [
        {
            name: (
                layer.A[i, : job.rank].detach().cpu().clone(),
                layer.B[i, :, : job.rank].detach().cpu().clone(),
            )
            for name, layer in layers.items()
        }
        for i, job in enumerate(jobs)
    ]


def _wrapped(base: nn.Module, jobs: Sequence[Job]) -> dict[str, SideBySide]:
    """Every linear layer but the head, by name, replaced in place."""
    linear = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    layers = {name: SideBySide(module, name, jobs) for name, module in linear.items()}
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(base.get_submodule(parent), own, layer)
    return layers


def _pool(job: Job, samples: int, device: str) -> Tensor:
    """Sequences of all the job's programs in turn. [samples, 20] uint8"""
    count = math.ceil(samples / len(job.programs))
    drawn = [
        sample(name, count, generator(device, "pool", job.seed, name)) for name in job.programs
    ]
    return torch.stack(drawn, 1).view(-1, TOKENS)[:samples].to(torch.uint8)


def _loss(model: nn.Module, sequences: Tensor) -> Tensor:
    """Cross entropy of each output of each sequence. [n, 8]"""
    on_gpu = sequences.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
        logits = answers(model, sequences)
    return functional.cross_entropy(logits.float().mT, sequences[:, OUTPUT:], reduction="none")


def _descend(
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    rate: Callable[[int], float],
    steps: int,
    clip: Sequence[Tensor] = (),
) -> Iterator[int]:
    """Take `steps` steps at `rate(step)` times the optimizer's learning rate, and count them."""
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    began = time.perf_counter()
    for step in range(steps):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        if clip:
            nn.utils.clip_grad_norm_(clip, 1.0)
        optimizer.step()
        schedule.step()
        if step % PRINT_EVERY == 0 or step == steps - 1:
            loss_now, seconds = value.item(), time.perf_counter() - began
            print(f"  step {step:6d}  loss {loss_now:.4f}  {seconds:.0f} s", flush=True)
        yield step + 1
