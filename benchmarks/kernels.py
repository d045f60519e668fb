"""The Triton kernels: resources compiled ahead of time for sm_80 and sm_90 (no GPU needed), or times on this GPU.

    python -m benchmarks.kernels --aot [--json resources.json]   every kernel for both architectures, against the bars
    python -m benchmarks.kernels --gpu [--json times.json]       times, accuracy and ceilings on this machine's GPU

``--aot`` runs the host code of a training step on meta tensors with ``launch`` of ``copynce.kernels.launch`` replaced
by a recorder: launches, buffers and constants are those of training, and each recorded launch is compiled with the
divisibility hints that the runtime would add. Registers and stack come from cuobjdump, local loads and stores (spills)
from nvdisasm, both of the triton package, tensor-core, cp.async and vector instructions from the PTX. The exit status
is 1 if a bar is missed.

``--gpu`` checks each provider's results against float64, then times it with CUDA events: whole steps as Python starts
them, and as a replayed CUDA graph, where nothing but the device's work is left (a graph also proves that nothing waits
for the device). Each kernel stage stands beside its bound, bytes or FLOP over what this machine was measured to do. The
last-level cache is overwritten before every reading. ``--tune`` tries other launch configurations of each kernel. The
JSON has pytest-benchmark's rows (``pytest-benchmark compare`` reads them).

One long file, because both ways and the tuner stand on the same recorded launches and shapes, and a person at a GPU for
minutes carries one script.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from copynce.kernels import patch_overlap as overlap_module
from copynce.kernels.copynce import backward, forward, launch_config
from copynce.kernels.copynce.backward import copynce_bwd
from copynce.kernels.copynce.forward import copynce_fwd
from copynce.kernels.copynce.launch_config import keeps_cosines
from copynce.kernels.copynce.op import copynce_triton, copynce_triton_backward
from copynce.kernels.launch import next_power_of_2
from copynce.kernels.patch_overlap import empty_outputs, patch_overlap, patch_overlap_fwd, power_mode, power_table

ARCHITECTURES = (80, 90)
LARGEST_SHARED = 110 * 1024
BYTES_BARS = {"forward": 91e6, "backward": 149e6, "prior": 170e6}  # B=192, L=196, D=384
LAUNCHES_BAR, ATEN_BAR = 5, 4
PATCH = 16

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Shape:
    """Sizes and settings of one training step."""

    pairs: int = 192
    patches: int = 196
    channels: int = 384
    gamma: float = 3.0
    dtype: torch.dtype = torch.bfloat16
    released: bool = True

    @property
    def side(self) -> int:
        return math.isqrt(self.patches) * PATCH


GPU_SHAPES = {
    f"B{shape.pairs}-L{shape.patches}-D{shape.channels}": shape
    for shape in (Shape(), Shape(patches=256), Shape(channels=768), Shape(pairs=48, patches=441))
}


@dataclass(frozen=True)
class Launch:
    """One recorded kernel launch."""

    stage: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes and contains."""

    kernel: str
    stage: str
    arch: int
    patches: int
    channels: int
    gamma: float
    dtype: str
    registers: int
    stack: int
    local: int  # LDL and STL instructions
    shared: int
    mma: int
    wgmma: int
    cp_async: int
    vector_loads: int  # 128-bit global loads
    warps: int
    stages: int
    instructions: int  # all of the machine's
    overwritten: int  # products that still run when their loop fills the buffer they read (Hopper)


# ---- recording ------------------------------------------------------------------------------------------------------


@contextmanager
def recorder(stage: Callable[[], str]) -> Iterator[list[Launch]]:
    """Launches made inside, which start nothing."""
    launches: list[Launch] = []

    def record(kernel: Any, grid: Any, arguments: Any, constants: Any, warps: int, stages: int) -> None:
        launches.append(Launch(stage(), kernel, grid, arguments, constants, warps, stages))

    with ExitStack() as stack:
        for module in (overlap_module, forward, backward):
            stack.enter_context(mock.patch.object(module, "launch", record))
        yield launches


def record_step(shape: Shape) -> list[Launch]:
    """Launches of prior, forward and backward of one step, on tensors without memory."""
    stage = "prior"
    size = (shape.side, shape.side)
    with torch.device("meta"), recorder(lambda: stage) as launches:
        overlaps = [empty_outputs(torch.empty(0), shape.pairs, size, size, PATCH, shape.gamma) for _ in range(2)]
        tables = [torch.empty(shape.pairs, *size, dtype=torch.int32) for _ in range(2)]
        for table, overlap in zip(tables, overlaps, strict=True):
            patch_overlap_fwd(table, *overlap, size, PATCH, shape.gamma, shape.released)
        query, reference = (torch.empty(shape.pairs, shape.patches, shape.channels, dtype=shape.dtype) for _ in "qr")
        pair_weight, upstream = torch.empty(shape.pairs), torch.empty(())
        mode = power_mode(shape.gamma)
        powers = pair_weight if mode else power_table(shape.gamma, PATCH**2, torch.device("meta"))
        common = (*overlaps[0], *overlaps[1])
        stage = "forward"
        stash = keeps_cosines(query, reference)
        _, cosine, of_query, of_reference = copynce_fwd(
            query, reference, *common, pair_weight, powers, 1 / 16, mode, shape.released, stash
        )
        stage = "backward"
        sides = (query, reference, *common, of_query, of_reference)
        copynce_bwd(upstream, *sides, pair_weight, powers, cosine, 1 / 16, mode, shape.released)
    return launches


def bytes_of(launches: list[Launch], stage: str) -> int:
    """Bytes of all distinct buffers that a stage's launches read or write: each byte moved at least once."""
    buffers = {}
    for launch in launches:
        if launch.stage == stage:
            mode = launch.constants.get("POWER")
            for name, value in launch.arguments.items():
                if isinstance(value, Tensor) and not (name == "p_power" and mode != 0):
                    buffers[id(value)] = value.numel() * value.element_size()
    return sum(buffers.values())


class _Counter(TorchDispatchMode):
    """Counts ATen operators that start device work."""

    FREE = ("empty", "new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name not in self.FREE and func.namespace == "aten":
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def aten_operators() -> list[str]:
    """ATen operators with device work in the forward and backward of the registered operators, besides the kernels."""
    shape = Shape(pairs=2, patches=4, channels=16)
    size = (shape.side, shape.side)
    settings = PATCH, shape.gamma, shape.released
    # The operators are called as the dispatcher does, below autograd, on real memory that nothing writes.
    with recorder(lambda: "") as launches, _Counter() as counter:
        table = torch.zeros(2, *size, dtype=torch.int32)
        tokens = torch.zeros(2, 4, 16, dtype=torch.bfloat16)
        traced, upstream = torch.ones(2, dtype=torch.bool), torch.ones(())
        counter.names.clear()
        overlaps = [patch_overlap._init_fn(table, *size, *settings) for _ in range(2)]
        common = (*overlaps[0], *overlaps[1])
        _, cosine, *factors, pair_weight = copynce_triton._init_fn(
            tokens, tokens, *common, traced, PATCH, 1 / 16, *settings[1:], True
        )
        copynce_triton_backward._init_fn(
            upstream, tokens, tokens, *common, cosine, *factors, pair_weight, PATCH, 1 / 16, *settings[1:]
        )
    assert len(launches) == LAUNCHES_BAR
    return counter.names


# ---- compiling ------------------------------------------------------------------------------------------------------


@functools.cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compile a recorded launch for ``arch`` with the hints that the runtime derives from its arguments."""
    signature: dict[str, str] = {}
    attributes = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if name in launch.constants:
            signature[name] = "constexpr"
        elif isinstance(value, Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            assert isinstance(value, int)
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, launch.constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources_of(launch: Launch, arch: int, shape: Shape) -> Resources:
    """Resources of a recorded launch of a step of ``shape``, compiled for ``arch``."""
    compiled = compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
        machine = _run(_tool("nvdisasm"), "-c", file.name)
    ptx, program = compiled.asm["ptx"], compiled.asm["ttgir"]
    function = re.search(r"Function (\w+):\s*REG:(\d+) STACK:(\d+)", usage)
    assert function is not None, f"cuobjdump reports no function: {usage}"
    return Resources(
        kernel=launch.kernel.__name__.strip("_").removesuffix("_kernel"),
        stage=launch.stage,
        arch=arch,
        patches=shape.patches,
        channels=shape.channels,
        gamma=shape.gamma,
        dtype=str(shape.dtype).removeprefix("torch."),
        registers=int(function[2]),
        stack=int(function[3]),
        local=len(re.findall(r"\b(?:LDL|STL)\b", machine)),
        shared=compiled.metadata.shared,
        mma=len(re.findall(r"\bmma\.sync", ptx)),
        wgmma=len(re.findall(r"\bwgmma\.mma_async", ptx)),
        cp_async=len(re.findall(r"\bcp\.async\.c[ag]", ptx)),
        vector_loads=len(re.findall(r"\bld\.global\S*\.v4\.", ptx)),
        warps=launch.warps,
        stages=launch.stages,
        instructions=len(re.findall(r"^\s*/\*[0-9a-f]{4,}\*/", machine, re.MULTILINE)),
        overwritten=overwritten_products(program),
    )


def overwritten_products(program: str) -> int:
    """Products of a TTGIR program that may still run when their loop fills the buffer they read (Hopper).

    A product runs on until a wait leaves fewer ``pendings`` than were started since. Turn t of a pipelined loop reads
    buffer t and fills buffer t + as many as were filled before the loop, both modulo the number of buffers. So each
    innermost loop is played for some turns, with every buffer that it fills and every product that it starts.
    """
    lines = program.splitlines()
    owner: dict[str, str] = {}  # of a view: the allocation; later lines may use a name again
    buffers: dict[str, int] = {}
    ahead: dict[str, int] = {}
    found = 0

    def filled_by(line: str) -> str | None:
        """Note what names stand for; the allocation that ``line`` fills, if any."""
        if made := re.match(r"\s*(%\w+) = ttg\.local_alloc (%\w+)?.*-> !ttg\.memdesc<([\dx]+)x[a-z]", line):
            name, value, sizes = made[1], made[2], made[3].split("x")
            owner[name], ahead[name] = name, 0
            buffers[name] = int(sizes[0]) if len(sizes) == 3 else 1
            return name if value else None
        if view := re.match(r"\s*(%\w+) = ttg\.memdesc_\w+ (%[\w#]+)", line):
            owner[view[1]] = owner.get(view[2], "")
        if wait := re.match(r"\s*(%\w+):\d+ = ttng\.warp_group_dot_wait ([^{]*)", line):
            for index, name in enumerate(wait[2].split(",")):
                owner[f"{wait[1]}#{index}"] = owner.get(name.strip(), "")
        fill = re.search(r"(?:async_copy_global_to_local|local_store) %[\w#]+, (%[\w#]+)", line)
        return owner.get(fill[1]) if fill else None

    for start, header in enumerate(lines):
        filled = filled_by(header)
        if filled is not None and "local_alloc" not in header:
            ahead[filled] += 1
        if "scf.for" not in header:
            continue
        indent = header[: len(header) - len(header.lstrip())]
        end = next(index for index in range(start + 1, len(lines)) if lines[index].startswith(indent + "}"))
        body = lines[start + 1 : end]
        if any("scf.for" in line for line in body):
            continue
        running: list[tuple[int, int, set[str]]] = []  # line, turn, allocations read
        lost = set()
        for turn in range(2 + max(buffers.values(), default=1)):
            for index, line in enumerate(body):
                filled = filled_by(line)
                for product, started, read in running:
                    if filled in read and (ahead[filled] + turn - started) % buffers[filled] == 0:
                        lost.add(product)
                if dot := re.search(r"ttng\.warp_group_dot ([^{]*)", line):
                    running.append((index, turn, {owner.get(name.strip(), "") for name in dot[1].split(",")} - {""}))
                elif wait := re.search(r"warp_group_dot_wait.*pendings = (\d+)", line):
                    running = running[len(running) - min(int(wait[1]), len(running)) :]
        found += len(lost)
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def faults_of(resources: Resources) -> list[str]:
    """Bars that a kernel misses."""
    faults = []
    if resources.stack or resources.local:
        faults.append(f"spills: {resources.stack} bytes of stack, {resources.local} LDL/STL")
    if resources.overwritten:
        faults.append(f"{resources.overwritten} products may still run when the buffer they read is filled again")
    if resources.shared > LARGEST_SHARED:
        faults.append(f"{resources.shared} bytes of shared memory, over {LARGEST_SHARED}")
    if resources.kernel in ("copynce_fwd", "copynce_bwd"):
        wide = resources.arch >= 90 and resources.patches <= 256
        if not (resources.wgmma if wide else resources.mma):
            faults.append(f"no {'wgmma' if wide else 'mma.sync'}")
        if not resources.cp_async:
            faults.append("no cp.async")
        if resources.vector_loads < (8 if resources.kernel == "copynce_fwd" else 12):
            faults.append(f"{resources.vector_loads} vector loads: counts or cosines are read one by one")
    return faults


def traffic() -> tuple[dict[str, float], int, list[str]]:
    """Bytes of each stage, Triton launches and ATen operators of one step at B=192, L=196, D=384 in bfloat16."""
    launches = record_step(Shape())
    moved: dict[str, float] = {stage: bytes_of(launches, stage) for stage in ("forward", "backward", "prior")}
    return moved, len(launches), aten_operators()


def ahead_of_time(patches: list[int], channels: list[int], gammas: list[float], path: Path | None) -> int:
    """Compile the whole matrix, print the table and check the bars; the number of bars missed."""
    moved, launches, operators = traffic()
    faults = [
        f"{name}: {moved[name] / 1e6:.1f} MB, over {bar / 1e6:g}"
        for name, bar in BYTES_BARS.items()
        if moved[name] > bar
    ]
    print("one step, B=192 L=196 D=384, bfloat16 tokens")
    for name, number in moved.items():
        print(
            f"  {name:45} {number / 1e6:7.1f} MB" + (f"   bar {BYTES_BARS[name] / 1e6:g}" if name in BYTES_BARS else "")
        )
    print(
        f"  Triton launches {launches} (bar {LAUNCHES_BAR}), "
        f"ATen operators {len(operators)} (bar {ATEN_BAR}): {', '.join(operators)}"
    )
    if launches > LAUNCHES_BAR or len(operators) > ATEN_BAR:
        faults.append(f"{launches} Triton launches and {len(operators)} ATen operators")
    print()
    columns = ["kernel", "sm", "L", "D", "gamma", "tokens", "reg", "stack", "LDL/STL", "shared", "mma", "wgmma"]
    columns += ["cp.async", "v4 loads", "warps"]
    widths = (21, 3, 5, 4, 6, 9, 4, 6, 8, 7, 4, 6, 9, 9, 6)
    print(" ".join(name.rjust(width) for name, width in zip(columns, widths, strict=True)))
    rows = []
    for shape in [Shape(patches=l, channels=d, gamma=g) for l in patches for d in channels for g in gammas]:  # noqa: E741
        for launch in record_step(shape):
            if launch.stage == "prior" and shape.channels != channels[0]:
                continue
            for arch in ARCHITECTURES:
                row = resources_of(launch, arch, shape)
                if row in rows:
                    continue
                rows.append(row)
                missed = faults_of(row)
                faults += [
                    f"{row.kernel} sm_{arch} L={row.patches} D={row.channels} gamma={row.gamma:g}: {m}" for m in missed
                ]
                values = [row.kernel, arch, row.patches, row.channels, f"{row.gamma:g}", row.dtype, row.registers]
                values += [row.stack, row.local, row.shared, row.mma, row.wgmma, row.cp_async, row.vector_loads]
                values += [row.warps]
                line = " ".join(str(value).rjust(width) for value, width in zip(values, widths, strict=True))
                print(line + "".join(f"   <- {m}" for m in missed), flush=True)
    print(
        "\n" + ("\n".join(f"missed: {fault}" for fault in faults) or f"all bars held by {len(rows)} compiled kernels")
    )
    if path is not None:
        report = {
            "versions": {"torch": torch.__version__, "triton": triton.__version__},
            "bytes": moved,
            "triton_launches": launches,
            "aten_operators": operators,
            "kernels": [asdict(row) for row in rows],
            "missed": faults,
        }
        path.write_text(json.dumps(report, indent=1) + "\n")
    return len(faults)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def times_ms(call: Callable[[], object], rounds: int = 30) -> list[float]:
    """Milliseconds of each of ``rounds`` calls on the GPU, after warm-up and with nothing in its last-level cache."""
    for _ in range(3):
        call()
    cache = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    torch.cuda.synchronize()
    for start, end in events:
        cache.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    """``call`` captured as a CUDA graph, to be replayed; raises where it waits for the device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def ceilings() -> tuple[float, float]:
    """Bytes per second of a large copy and FLOP per second of a large bfloat16 product, measured here."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() / (min(times_ms(lambda: target.copy_(source))) / 1e3)
    side = 8192
    one = torch.randn(side, side, dtype=torch.bfloat16, device="cuda")
    multiplied = 2 * side**3 / (min(times_ms(lambda: one @ one, 10)) / 1e3)
    return copied, multiplied


def flop_of(shape: Shape) -> dict[str, float]:
    """FLOP of the products alone, without padding: one forward, two backward."""
    one = 2.0 * shape.pairs * shape.patches**2 * shape.channels
    return {"forward": one, "backward": 2 * one}


def bounds_of(shape: Shape, bandwidth: float, rate: float) -> dict[str, float]:
    """Seconds that each stage takes at least: its bytes over the copy's rate or its FLOP over the product's."""
    launches = record_step(shape)
    moved = {stage: bytes_of(launches, stage) / bandwidth for stage in ("prior", "forward", "backward")}
    products = flop_of(shape)
    moved["forward"] = max(moved["forward"], products["forward"] / rate)
    moved["backward"] = max(moved["backward"], products["backward"] / rate)
    return moved


def stages_of(shape: Shape, batch: list[Tensor]) -> dict[str, Callable[[], object]]:
    """The kernel stages of a step on ``batch``, each a call of a registered operator."""
    query, reference, *tables = batch
    size = (shape.side, shape.side)
    settings = PATCH, shape.gamma, shape.released
    traced = torch.ones(shape.pairs, dtype=torch.bool, device="cuda")
    overlaps = [patch_overlap(table, *size, *settings) for table in tables]
    common = (query.detach(), reference.detach(), *overlaps[0], *overlaps[1])
    form = PATCH, 1 / 16, shape.gamma, shape.released
    stash = keeps_cosines(query, reference)
    *_, pair_weight = kept = copynce_triton(*common, traced, *form, stash)[1:]
    upstream = torch.ones((), device="cuda")
    return {
        "prior": lambda: [patch_overlap(table, *size, *settings) for table in tables],
        "forward": lambda: copynce_triton(*common, traced, *form, stash),
        "backward": lambda: copynce_triton_backward(upstream, *common, *kept[:-1], pair_weight, *form),
    }


def compile_step(name: str) -> None:
    """Compile the kernels of a step of the size ``name``, on few pairs, into Triton's cache."""
    from benchmarks.bench_copynce_loss import make_batch
    from copynce.losses import copynce_loss

    shape = GPU_SHAPES[name]
    batch = [tensor.detach().cuda() for tensor in make_batch(2, shape.side, PATCH, shape.channels)]
    _loss_and_gradients([batch[0].bfloat16(), batch[1].bfloat16(), *batch[2:]], copynce_loss, "triton")
    torch.cuda.synchronize()


def on_gpu(path: Path | None, tune: bool, providers: list[str], shapes: list[str]) -> int:
    """Check and time providers and kernels on this machine's GPU; the number of failed checks."""
    from benchmarks.bench_copynce_loss import make_batch
    from copynce.losses import copynce_loss

    if not torch.cuda.is_available():
        raise SystemExit("--gpu needs a CUDA device and finds none; --aot works without")
    bandwidth, rate = ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: "
        f"copy {bandwidth / 1e12:.2f} TB/s, bfloat16 product {rate / 1e12:.0f} TFLOP/s"
    )
    known = {
        "eager": (copynce_loss, "reference"),
        "compiled": (torch.compile(copynce_loss), "reference"),
        "triton": (copynce_loss, "triton"),
    }
    rows: list[dict[str, Any]] = []
    failed = 0
    for name in shapes:
        shape = GPU_SHAPES[name]
        batch = [tensor.detach().cuda() for tensor in make_batch(shape.pairs, shape.side, PATCH, shape.channels)]
        half = [batch[0].bfloat16(), batch[1].bfloat16(), *batch[2:]]
        exact = _loss_and_gradients([half[0].double(), half[1].double(), *half[2:]], copynce_loss, "reference")
        bounds = bounds_of(shape, bandwidth, rate)
        bounds["step"] = bounds["prior"] + bounds["forward"] + bounds["backward"]

        def report(mode: str, provider: str, call: Callable[[], object], bound: float, **information: Any) -> None:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            times = times_ms(call)
            peak = (torch.cuda.max_memory_allocated() - before - (1 << 28)) / 2**20
            row = _row(f"copynce_loss {mode} {name}", provider, times)  # noqa: B023
            row["extra_info"] = {"bound_ms": bound * 1e3, "peak_mib": peak, **information}
            rows.append(row)
            median = row["stats"]["median"]
            print(
                f"{name} {mode:24} {provider:9} {median * 1e3:8.3f} ms   bound {bound * 1e3:.3f} ms "  # noqa: B023
                f"({median / bound:5.2f} x)   peak {peak:5.0f} MiB",
                flush=True,
            )

        for provider in providers:
            function, backend = known[provider]
            step = functools.partial(_loss_and_gradients, half, function, backend)
            results = [step() for _ in range(2)]
            errors = [
                float((one.double() - other).norm() / other.norm())
                for one, other in zip(results[0], exact, strict=True)
            ]
            same = all(torch.equal(one, other) for one, other in zip(*results, strict=True))
            print(f"{name} {provider}: errors {' '.join(f'{error:.1e}' for error in errors)}, repeatable {same}")
            if provider == "triton" and not (errors[0] <= 1e-5 and max(errors[1:]) <= 3e-3 and same):
                failed += 1
                print(f"FAILED {name}: errors {errors}, repeatable {same}")
            about = {"relative_errors": errors, "bitwise_repeatable": same}
            del results
            report("step", provider, step, bounds["step"], **about)
            if provider == "triton":
                report("step replayed", provider, graphed(step), bounds["step"], **about)
        if "triton" in providers:
            for stage, call in stages_of(shape, half).items():
                report(stage, "triton", graphed(call), bounds[stage])
        if tune:
            _tune(shape, half)
    if path is not None:
        report_json = {
            "machine_info": {
                "gpu": torch.cuda.get_device_name(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cuda": torch.version.cuda,
                "copy_bytes_per_second": bandwidth,
                "product_flop_per_second": rate,
            },
            "commit_info": {"id": _commit()},
            "datetime": datetime.datetime.now(datetime.UTC).isoformat(),
            "version": "5.2.3",
            "benchmarks": rows,
        }
        path.write_text(json.dumps(report_json, indent=1) + "\n")
    return failed


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or None


def _loss_and_gradients(batch: list[Tensor], function: Callable[..., Tensor], backend: str) -> list[Tensor]:
    query, reference = (tokens.detach().requires_grad_() for tokens in batch[:2])
    loss = function(query, reference, *batch[2:], gamma=3.0, backend=backend)
    return [loss.detach(), *torch.autograd.grad(loss, (query, reference))]


def _row(group: str, name: str, times: list[float]) -> dict[str, Any]:
    """One result in pytest-benchmark's form, in seconds."""
    seconds = torch.tensor(times, dtype=torch.float64).div(1e3)
    low, middle, high = (float(seconds.quantile(share)) for share in (0.25, 0.5, 0.75))
    stats = {
        "min": float(seconds.min()),
        "max": float(seconds.max()),
        "mean": float(seconds.mean()),
        "stddev": float(seconds.std()),
        "median": middle,
        "q1": low,
        "q3": high,
        "iqr": high - low,
        "rounds": len(times),
        "iterations": 1,
        "ops": 1 / float(seconds.mean()),
        "total": float(seconds.sum()),
        "outliers": "",
    }
    return {
        "group": group,
        "name": f"{group} {name}",
        "fullname": f"{group} {name}",
        "params": {"provider": name},
        "stats": stats,
    }


#: What --tune tries for forward and, with each of CHUNKS, for backward: rows, channels, warps, stages.
CANDIDATES = (
    *((64, channels, warps, stages) for channels in (32, 64) for warps in (4, 8, 16) for stages in (1, 2, 3)),
    *((64, 128, warps, stages) for warps in (4, 8, 16) for stages in (1, 2)),
    *((32, channels, 4, stages) for channels in (64, 128) for stages in (2, 3)),
    *((128, 64, warps, 2) for warps in (8, 16)),
)
CHUNKS = (32, 64)
#: (histogram bins of a program, warps) of the prior.
PRIOR_CANDIDATES = tuple((bins, warps) for bins in (256, 512, 1024, 2048, 4096) for warps in (1, 2, 4, 8))


def _candidates(shape: Shape) -> Iterator[tuple[str, str, list[Any]]]:
    """(stage, what is tried, patches of module attributes that set it)."""
    width = max(256, next_power_of_2(shape.patches))
    for stage, table, chunks in (
        ("forward", launch_config.FORWARD, (0,)),
        ("backward", launch_config.BACKWARD, CHUNKS),
    ):
        for settings, chunk in itertools.product(CANDIDATES, chunks):
            config = launch_config.Config(*settings, chunk)
            yield stage, str(config), [mock.patch.dict(table, {width: config})]
    for bins, warps in PRIOR_CANDIDATES:
        patches = [
            mock.patch.object(overlap_module, name, value) for name, value in (("_BINS", bins), ("_WARPS", warps))
        ]
        yield "prior", f"bins={bins}, warps={warps}", patches


def _time_candidate(shape: Shape, batch: list[Tensor], index: int, rounds: int) -> float | str:
    """Milliseconds of the candidate's stage, or why it cannot run."""
    stage, _, patches = list(_candidates(shape))[index]
    stages = stages_of(shape, batch)  # what the stage reads comes from the settings of training
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            if not rounds:
                stages[stage]()
                torch.cuda.synchronize()
                return 0.0
            times = times_ms(graphed(stages[stage]), rounds)
        except (triton.runtime.errors.TritonError, RuntimeError) as error:
            return str(error).strip().partition("\n")[0]
    return sorted(times)[len(times) // 2]


def _compile_candidate(shape: Shape, index: int) -> None:
    """Compile a candidate into Triton's cache, in a process of its own."""
    from benchmarks.bench_copynce_loss import make_batch

    small = replace(shape, pairs=2)
    batch = [tensor.detach().cuda() for tensor in make_batch(2, shape.side, PATCH, shape.channels)]
    _time_candidate(small, [batch[0].bfloat16(), batch[1].bfloat16(), *batch[2:]], index, 0)


def _tune(shape: Shape, batch: list[Tensor]) -> None:
    """Print the median time of each stage under its candidate launch configurations, fastest first."""
    candidates = list(_candidates(shape))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), spawn) as pool:
        # A compiler that dies on a candidate takes its process along, no more.
        done = [pool.submit(_compile_candidate, shape, index) for index in range(len(candidates))]
        for future in done:
            future.exception()
    times: dict[str, list[tuple[float, str]]] = {}
    for index, (stage, name, _) in enumerate(candidates):
        taken = _time_candidate(shape, batch, index, 20)
        times.setdefault(stage, []).append((math.inf, f"{name}: {taken}") if isinstance(taken, str) else (taken, name))
    for stage, found in times.items():
        for taken, name in sorted(found):
            print(f"  {stage:18} {taken * 1e3:8.1f} us   {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--aot", action="store_true", help="compile for sm_80 and sm_90 and check the bars")
    mode.add_argument("--gpu", action="store_true", help="check and time on this machine's GPU")
    providers = ["eager", "compiled", "triton"]
    parser.add_argument("--providers", nargs="+", choices=providers, default=providers, help="what --gpu measures")
    parser.add_argument("--shapes", nargs="+", choices=GPU_SHAPES, default=list(GPU_SHAPES), help="sizes of --gpu")
    parser.add_argument("--tune", action="store_true", help="with --gpu: also time candidate launch configurations")
    parser.add_argument("--patches", type=int, nargs="+", default=[196, 256, 441], help="L of --aot (square numbers)")
    parser.add_argument("--channels", type=int, nargs="+", default=[384, 768], help="D of --aot")
    parser.add_argument("--gamma", type=float, nargs="+", default=[1.0, 2.0, 3.0], help="exponents of --aot")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    if arguments.aot:
        faults = ahead_of_time(arguments.patches, arguments.channels, arguments.gamma, arguments.json)
    else:
        faults = on_gpu(arguments.json, arguments.tune, arguments.providers, arguments.shapes)
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
