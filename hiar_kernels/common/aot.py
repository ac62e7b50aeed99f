"""Compile Triton kernels ahead of time, for GPUs that need not be present, and inspect the result.

A Triton module of an op describes its production launches in ``compile_cases(arch) -> list[Case]``;
:func:`compile_case` compiles one, and :func:`problems` checks the result. Works in Triton 3.6 to 3.9,
in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .dispatch import require
from .triton_loader import interpreting

ARCHITECTURES = (80, 89, 90, 100, 120)
_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class Case:
    """One launch to compile.

    Attributes:
        name: the shape in a word or two; the kernel's own name is added in reports.
        kernel: the @triton.jit function.
        signature: argument -> "*bf16", "*fp32", "*i32", "i32", "i64", "fp32", "constexpr", "tensordesc<bf16[64, 128]>".
            Arguments in ``constexprs`` may be left out.
        constexprs: values of the constexpr arguments; None for a pointer that is not given.
        divisible: pointers and sizes that the launch is known to have as multiples of 16.
        tensor_cores: the kernel multiplies matrices, so tensor cores must be in use.
        max_registers: of a thread at launch; None: the compiler's choice.
        fp_fusion: products and sums may be contracted (``enable_fp_fusion`` of the launch).
        spills_allowed: bytes, where a tile with so many was measured to be faster than those without.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    max_registers: int | None = None
    fp_fusion: bool = True
    spills_allowed: int = 0

    @classmethod
    def of(
        cls,
        name: str,
        kernel: Any,
        types: dict[str, str],
        constexprs: dict[str, Any],
        aligned: tuple[str, ...] = ("stride_",),
        **options: Any,
    ) -> Case:
        """A launch whose pointers, and the sizes whose names begin with one of ``aligned``, are multiples of 16.

        ``types``: of arguments that are neither constexprs, int32 numbers nor pointers to such. ``options``: fields.
        """
        signature = {
            a: types.get(a, "*i32" if a.endswith("_ptr") else "i32") for a in kernel.arg_names if a not in constexprs
        }
        divisible = tuple(a for a in signature if a.endswith("_ptr") or a.startswith(aligned))
        return cls(name, kernel, signature, constexprs, divisible, **options)


@dataclass(frozen=True)
class Chip:
    """Limits of an architecture: of one SM, and the shared memory that one block may have (bytes).

    ``tensor_memory``: columns; ``tensor_core``: the instructions of which a matrix product must use one.
    """

    shared_block: int
    shared_sm: int
    warps: int
    blocks: int
    registers: int = 65536
    tensor_memory: int = 0
    tensor_core: tuple[str, ...] = ("mma",)


# CUDA programming guide, table of technical specifications per compute capability. A block takes 1 KB of shared memory
# beyond its own.
CHIPS = {
    80: Chip(163 * 1024, 164 * 1024, 64, 32),
    89: Chip(99 * 1024, 100 * 1024, 48, 24),
    90: Chip(227 * 1024, 228 * 1024, 64, 32, tensor_core=("wgmma",)),
    100: Chip(227 * 1024, 228 * 1024, 64, 32, tensor_memory=512, tensor_core=("tcgen05", "mma")),
    120: Chip(99 * 1024, 100 * 1024, 48, 24),
}


@dataclass(frozen=True)
class Report:
    """Resources and instructions of a compiled case.

    Attributes:
        registers: of one thread, as the kernel is launched.
        spills_bytes: bytes stored and loaded by spill code of one thread.
        shared_bytes: of one block.
        wgmma, mma, cp_async, tma, tcgen05: how many such instructions the code holds.
        warps: of one block, with those that warp specialisation adds.
        occupancy: blocks that one SM can hold; 0 when the kernel does not fit.
        seconds: of compiling; next to nothing when Triton had it in its cache.
        tensor_memory: columns of one block (sm_100).
        fma: contracted products and sums of float32.
        reduced: the types that sums, maxima and scans run over, as Triton names them.
    """

    registers: int
    spills_bytes: int
    shared_bytes: int
    wgmma: int
    mma: int
    cp_async: int
    tma: int
    tcgen05: int
    warps: int
    occupancy: int
    seconds: float
    tensor_memory: int = 0
    fma: int = 0
    reduced: tuple[str, ...] = ()


def build(case: Case, arch: int) -> Any:
    """A case compiled for ``sm_<arch>``, as Triton returns it."""
    if arch not in CHIPS:
        raise ValueError(f"compile_case: no limits known for sm_{arch}; legal: {', '.join(map(str, CHIPS))}")
    require(not interpreting(), "compile_case: needs a process without TRITON_INTERPRET=1, got one with it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(case.kernel.arg_names)
    types = {**case.signature, **dict.fromkeys(case.constexprs, "constexpr")}
    missing, unknown = [n for n in names if n not in types], sorted(types.keys() - set(names))
    of = f"compile_case: {case.kernel.__name__}, case {case.name!r}"
    if missing:
        raise ValueError(f"{of}: no type for {', '.join(missing)}")
    if unknown:
        raise ValueError(f"{of}: the kernel has no {', '.join(unknown)}")
    valueless = [n for n in names if types[n] == "constexpr" and n not in case.constexprs]
    if valueless:
        raise ValueError(f"{of}: no value for {', '.join(valueless)}")
    make_source = ASTSource
    if case.kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        make_source = GluonASTSource
    source = make_source(
        fn=case.kernel,
        signature={name: types[name] for name in names},
        constexprs=case.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "enable_fp_fusion": case.fp_fusion}
    if case.max_registers is not None:
        options["maxnreg"] = case.max_registers
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_case(case: Case, arch: int) -> Report:
    """Compile for ``sm_<arch>`` and report registers, spills, shared memory and instructions."""
    start = time.perf_counter()
    compiled = build(case, arch)
    seconds = time.perf_counter() - start

    ptx = compiled.asm["ptx"]
    resources = _dump(compiled.asm["cubin"], "--dump-resource-usage")
    match = re.search(r"\bREG:(\d+) STACK:(\w+)", resources)
    assert match is not None, resources
    registers, shared, warps = int(match[1]), int(compiled.metadata.shared), int(compiled.metadata.num_warps)
    columns = int(getattr(compiled.metadata, "tmem_size", 0) or 0)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, ptx))

    return Report(
        registers=registers,
        spills_bytes=0 if match[2] == "0" else _spills(ptx, arch),  # they lie on the stack
        shared_bytes=shared,
        wgmma=count(r"wgmma\.mma_async"),
        mma=count(r"\bmma\.sync"),
        cp_async=count(r"cp\.async\.c[ag]\."),
        tma=count(r"cp\.async\.bulk\.tensor"),
        tcgen05=count(r"tcgen05\.mma"),
        warps=warps,
        occupancy=occupancy(arch, registers, shared, warps, columns),
        seconds=seconds,
        tensor_memory=columns,
        fma=count(r"\bfma\.rn\.f32"),
        reduced=_reduced(compiled.asm.get("ttir") or compiled.asm["ttgir"]),
    )


def _reduced(ir: str) -> tuple[str, ...]:
    """Operand types of the reductions and scans of a kernel."""
    combined = re.findall(r'"tt\.(?:reduce|scan)"\(.*?\^bb0\((.*?)\):', ir, re.DOTALL)
    return tuple(sorted({kind for pair in combined for kind in re.findall(r": (\w+)", pair)}))


def occupancy(arch: int, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> int:
    """Blocks of ``warps`` warps that one SM holds; registers are handed to warps in units of 256."""
    chip = CHIPS[arch]
    if shared > chip.shared_block or tensor_memory > chip.tensor_memory:
        return 0
    per_warp = -(-registers * 32 // 256) * 256
    # Each of the four quarters of an SM has its own registers and its own warps.
    by_registers = 4 * (chip.registers // 4 // per_warp) // warps if per_warp else chip.blocks
    by_columns = chip.tensor_memory // tensor_memory if tensor_memory else chip.blocks
    return min(chip.blocks, chip.warps // warps, by_registers, by_columns, chip.shared_sm // (shared + 1024))


def problems(case: Case, arch: int, report: Report) -> list[str]:
    """The failed gates of a compiled case, one line each."""
    chip, failures = CHIPS[arch], []
    if report.spills_bytes > case.spills_allowed:
        failures.append(f"{report.spills_bytes} bytes of register spills, allowed {case.spills_allowed}")
    if report.shared_bytes > chip.shared_block:
        failures.append(f"{report.shared_bytes} bytes of shared memory, sm_{arch} has {chip.shared_block}")
    if report.tensor_memory > chip.tensor_memory:
        failures.append(f"{report.tensor_memory} columns of tensor memory, sm_{arch} has {chip.tensor_memory}")
    if case.tensor_cores and not any(getattr(report, kind) for kind in chip.tensor_core):
        failures.append(f"no {' or '.join(chip.tensor_core)} instruction, so no tensor cores in use")
    described = any(kind.startswith("tensordesc") for kind in case.signature.values())
    if described and arch >= 90 and not report.tma:
        failures.append("no bulk tensor copy, though the kernel has tensor descriptors")
    narrow = [kind for kind in report.reduced if kind != "f32" and not re.fullmatch(r"i\d+", kind)]
    if narrow:  # the dtype that they sum in changed between Triton 3.7 and 3.9
        failures.append(f"a reduction over {', '.join(narrow)}, allowed: float32 and integers; cast first")
    if not failures and report.occupancy == 0:
        failures.append(f"{report.warps} warps of {report.registers} registers do not fit on an SM of sm_{arch}")
    return failures


def triton_modules() -> dict[str, list[str]]:
    """Folder of an op -> its Triton modules, as names that import."""
    by_folder: dict[str, list[str]] = {}
    paths = [*_PACKAGE.glob("*/triton_*.py"), *_PACKAGE.glob("*/gluon_*.py")]
    for path in sorted(paths, reverse=True):  # forward before backward
        if path.parent == Path(__file__).parent:  # the loader: no kernels
            continue
        by_folder.setdefault(path.parent.name, []).append(f"{_PACKAGE.name}.{path.parent.name}.{path.stem}")
    return dict(sorted(by_folder.items()))


def cases(op: str, arch: int) -> list[Case]:
    """The compile cases of an op's folder for an architecture."""
    modules = triton_modules()
    if op not in modules:
        raise ValueError(f"no Triton kernels of {op!r}; legal: {', '.join(modules) or 'none yet'}")
    all_cases: list[Case] = []
    for name in modules[op]:
        listed = getattr(importlib.import_module(name), "compile_cases", None)
        if listed is not None and listed.__module__ == name:  # not one that was imported
            all_cases += listed(arch)
    return all_cases


def _tool(name: str) -> str:
    """Path of a CUDA toolkit program bundled with Triton."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
    if not path.exists():
        raise ValueError(f"this Triton has no {name}: {path} does not exist")
    return str(path)


def _dump(cubin: bytes, option: str = "--dump-sass") -> str:
    """What cuobjdump prints of a compiled kernel: machine code, or resources, which take a hundredth of the time."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [_tool("cuobjdump"), option, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _spills(ptx: str, arch: int) -> int:
    """Bytes of spill stores and loads reported by ptxas; a kernel's own stack is not a spill."""
    from triton.backends.nvidia.compiler import get_ptxas  # one of two, by a rule that Triton 3.9 changed

    ptxas = get_ptxas(arch).path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        target = f"--gpu-name=sm_{arch}{'a' if arch >= 90 else ''}"
        output = ""
        for extra in (["--regAllocOptLevel=2"], []):  # Triton 3.7 passes it; older ptxas do not know it
            command = [ptxas, "-v", "-lineinfo", *extra, target, str(file), "-o", f"{file}.cubin"]
            done = subprocess.run(command, capture_output=True, text=True)
            output = done.stderr
            if done.returncode == 0:
                break
    sizes = re.findall(r"(\d+) bytes spill (?:stores|loads)", output)
    if not bool(sizes):
        raise ValueError(f"ptxas for sm_{arch} printed no spills: {output.strip()[-200:]}")
    return sum(map(int, sizes))
