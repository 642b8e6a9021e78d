"""What the GPU benchmarks share: timing, a model and its batches, rows written as they come.

Only public names of the library, and nothing that needs jsonargparse, so that the scripts run on a
machine that has PyTorch and no package index. `--dry` tries them out on a CPU with tiny sizes.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from common import show, write
from torch import Tensor

from skylar.models.decoder import CausalLM
from skylar.models.presets import get_config
from skylar.training.objective import LossOutput
from skylar.utils.accelerators import datasheet_flops

TINY = dict(vocab_size=512, d_model=64, n_heads=2, n_kv_heads=1, d_head=32, n_layers=2, d_ff=128)


def parse(description: str) -> argparse.Namespace:
    """`--dry`, `--out`; device and its name follow from them."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--dry", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--out", help="folder of the JSON; default: bench/results, dry: none")
    args = parser.parse_args()
    args.device = "cpu" if args.dry else "cuda"
    return args


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU (dry run)"


def measure(name: str, args: argparse.Namespace, rows: Iterator[dict], **notes) -> None:
    """Write the JSON anew after each row: a time limit costs the last one only."""
    if args.device == "cuda" and not torch.cuda.is_available():
        write(name, [], args.out, status="not run: no GPU on the measuring machine")
        return print(f"{name}: no GPU here; try --dry")
    done = []
    notes = {"device": device_name(args.device), "status": "cut off by its time limit", **notes}
    for row in rows:
        done.append(row)
        show(row)
        if args.out or not args.dry:
            write(name, done, args.out, **notes)
    if args.out or not args.dry:
        write(name, done, args.out, **notes | {"status": "dry run" if args.dry else "run"})


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was asked."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, rounds: int, warmup: int = 3) -> float:
    """Median of `rounds` timed calls."""
    times = []
    for _ in range(warmup + rounds):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[warmup:])


def matmul_flops(device: str, size: int) -> float:
    """FLOP/s of a bf16 product of two (size, size) matrices: this device's own ceiling."""
    a, b = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / seconds(lambda: a @ b, device, 9)


def peak_flops(device: str) -> float | None:
    """The data sheet's bf16 FLOP/s, where the device is known."""
    return datasheet_flops(device_name(device))


def build_model(preset: str, dry: bool, device: str, backend: str | None = None,
                family: str | None = None, **overrides):
    """A seeded model of a preset; `backend` names the attention kernel."""
    torch.manual_seed(0)
    sizes = overrides | TINY if dry else overrides
    config = get_config("test" if dry else preset, family, **sizes)
    with torch.device(device):
        model = CausalLM(config)
    if backend:
        model.set_attention_backend(backend)
    return model


def mean_loss(output: LossOutput) -> Tensor:
    """What the update minimizes."""
    return output.loss_sum / output.n_valid


def packed_documents(batch_size: int, seq_len: int) -> Tensor:  # (B, T)
    """Document ids of packed sequences: lengths of 20 to 500 tokens, the same every time."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(20, 500, (batch_size, seq_len), generator=generator)
    ends = lengths.cumsum(1).unsqueeze(1).contiguous()  # (B, 1, T): far more than fit
    positions = torch.arange(seq_len).expand(batch_size, 1, seq_len).contiguous()
    return torch.searchsorted(ends, positions, right=True).squeeze(1)


def random_batch(
    vocab_size: int, batch_size: int, seq_len: int, packed: bool, device: str
) -> dict[str, Tensor]:
    """Random ids; labels are the next tokens, but for the last one of each document."""
    ids = torch.randint(vocab_size, (batch_size, seq_len))
    labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], -100)], dim=1)
    batch = {"input_ids": ids, "labels": labels}
    if packed:
        documents = packed_documents(batch_size, seq_len)
        last = documents[:, :-1] != documents[:, 1:]  # (B, T-1)
        labels[:, :-1] = labels[:, :-1].masked_fill(last, -100)
        batch["document_ids"] = documents
    return {name: tensor.to(device) for name, tensor in batch.items()}
