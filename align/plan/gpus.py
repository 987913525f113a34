"""Kinds of GPU known offline: memory, dense bfloat16 throughput and bandwidth, by their makers' data sheets."""

from dataclasses import dataclass

from align.config.suggest import nearest
from align.errors import fail

GIB = 2**30

USABLE = 0.97
"""Share of the memory that a process can allocate; the driver keeps the rest."""


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory: float
    """Bytes."""
    tflops: float
    """Dense bfloat16 TFLOP/s with float32 sums (float16 where there is no bfloat16)."""
    bandwidth: float
    """Bytes per second."""
    reach: float = 0.72
    """Share of the nominal throughput that large products reach (power limits; GeForce cards are rated lower)."""
    bfloat16: bool = True
    flash: bool = True
    """Whether FlashAttention 2 runs on it."""

    @property
    def products(self) -> float:
        """FLOP/s that large matrix products reach."""
        return self.reach * self.tflops * 1e12

    @property
    def usable(self) -> float:
        """Bytes that a stage can plan with."""
        return self.memory * USABLE


def _gpu(name: str, gib: float, tflops: float, gb_s: float, *, turing: bool = False) -> Gpu:
    reach = 0.9 if name.startswith("RTX") else 0.72
    return Gpu(name, gib * GIB, tflops, gb_s * 1e9, reach, not turing, not turing)


GPUS = {
    gpu.name.lower(): gpu
    for gpu in (
        _gpu("T4", 15, 65, 320, turing=True),
        _gpu("RTX-3090", 24, 71, 936),
        _gpu("RTX-4090", 24, 165, 1008),
        _gpu("RTX-5090", 32, 210, 1792),
        _gpu("L4", 22.5, 121, 300),
        _gpu("A10", 22.5, 125, 600),
        _gpu("A6000", 48, 155, 768),
        _gpu("L40S", 45, 362, 864),
        _gpu("A100-40", 40, 312, 1555),
        _gpu("A100-80", 80, 312, 2039),
        _gpu("H100", 80, 989, 3350),
        _gpu("H200", 141e9 / GIB, 989, 4800),
        _gpu("B200", 180e9 / GIB, 2250, 8000),
        _gpu("MI300X", 192e9 / GIB, 1307, 5300),
    )
}

DEFAULT = "h100"


def find_gpu(name: str) -> Gpu:
    """The kind of that name (`rtx 4090`, `A100-80`, `4090`, `a100` for the larger of both).

    Raises:
        AlignError: no such kind; the hint lists all.
    """
    wanted = name.lower().replace("_", "-").replace(" ", "-").removesuffix("gb").rstrip("-")
    for spelling in (wanted, f"rtx-{wanted}", f"{wanted}-80", wanted.removeprefix("nvidia-")):
        if spelling in GPUS:
            return GPUS[spelling]
    close = nearest(wanted, list(GPUS))
    known = ", ".join(gpu.name for gpu in GPUS.values())
    hint = f"did you mean `{GPUS[close].name}`? " if close else ""
    fail(
        "is no kind of GPU that is known here", where=f"--gpu {name}", hint=f"{hint}Known: {known}"
    )
