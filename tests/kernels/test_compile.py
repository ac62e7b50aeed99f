"""Every Triton kernel compiled ahead of time at production shapes: no spills, shared memory fits, tensor cores in use.

Nothing of Triton is imported while tests are collected: other tiers collect this file too.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import itertools
import re
import sys
import types
from pathlib import Path

import pytest

from hiar_kernels import compile_report
from hiar_kernels.common import aot
from hiar_kernels.common.aot import (
    ARCHITECTURES,
    Case,
    Report,
    cases,
    compile_case,
    occupancy,
    problems,
    triton_modules,
)

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux; there its absence is a failure"),
]

PACKAGE = Path(aot.__file__).parent.parent
FINE = Report(
    registers=128, spills_bytes=0, shared_bytes=65536, wgmma=8, mma=8, cp_async=0, tma=0, tcgen05=0, warps=4,
    occupancy=3, seconds=0.1,
)  # fmt: skip


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("op", triton_modules())
def test_kernels_pass_the_gates(op, arch):
    listed = cases(op, arch)
    assert listed, f"no module of {op} names its compile_cases"
    names = [(case.kernel.__name__, case.name) for case in listed]
    assert len(set(names)) == len(names), f"two cases of one name: {names}"
    rows = [compile_report.inspect(op, case, arch) for case in listed]
    failed = [f"{row.name}: {line}" for row in rows for line in row.failed]
    assert not failed, "\n" + "\n".join(failed)


def test_gradients_of_norms_cancel_exactly():
    """A contracted product would differ from the one that was summed into the mean: see ``UNFUSED``."""
    backward = [case for case in cases("norm", 90) if case.kernel.__name__ == "_norm_bwd_kernel"]
    assert len({case.name.split(",")[0] for case in backward}) == 6  # five ops, one with and without a gate
    assert not any(compile_case(case, 90).fma for case in backward)
    assert compile_case(dataclasses.replace(backward[0], fp_fusion=True), 90).fma > 0


def test_launches_say_whether_products_and_sums_are_contracted():
    """As their compile cases do: Triton's default changes with 3.10."""
    fused: dict[str, set[bool]] = {}
    for path in sorted(PACKAGE.glob("*/*.py")):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                kernel = ast.unparse(call.func.value)
                if kernel.endswith("_kernel"):
                    unpacked = {ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg is None}
                    assert len(unpacked & {"FUSED", "UNFUSED"}) == 1, f"{path.name}: {kernel} leaves it to Triton"
                    fused.setdefault(kernel, set()).add("FUSED" in unpacked)
    compiled: dict[str, set[bool]] = {}
    for op, arch in itertools.product(triton_modules(), ARCHITECTURES):
        for case in cases(op, arch):
            compiled.setdefault(case.kernel.__name__, set()).add(case.fp_fusion)
    assert compiled == fused


def test_a_nan_outlives_the_maximum_of_rms_silu_pad():
    """GPUs drop a NaN in a plain tl.maximum; the interpreter of Triton 3.7.1 keeps it."""
    ptx = aot.build(cases("rms_silu_pad", 90)[0], 90).asm["ptx"]
    assert set(re.findall(r"\bmax\.[\w.]*f32", ptx)) == {"max.NaN.f32"}


def test_logsumexps_are_compiled_as_they_are_launched():
    """In float32: with another type fewer registers are needed, and spills stay unseen."""
    backward = importlib.import_module("hiar_kernels.attention.triton_bwd").compile_cases(90)
    types = {kind for case in backward for name, kind in case.signature.items() if "lse" in name or "delta" in name}
    assert types == {"*fp32"}


@pytest.mark.parametrize("arch", [80, 100, 120])
def test_attention_candidates_compile_and_fit(arch):
    """The configurations that wait to be measured."""
    found = []
    for kernels in ("triton_fwd", "triton_bwd"):
        found += importlib.import_module(f"hiar_kernels.attention.{kernels}").candidate_cases(arch)
    assert found
    for tile, case in found:
        assert not problems(case, arch, compile_case(case, arch)), tile


def test_forward_and_backward_are_listed():
    for op, modules in triton_modules().items():
        assert modules == sorted(modules, reverse=True)
        assert f"hiar_kernels.{op}.triton_fwd" in modules


# The gates themselves: each must be able to fail.


def matmul(name: str = "small", block_m: int = 64, precision: str = "tf32", element: str = "bf16", **changes) -> Case:
    from matmul_kernel import matmul_kernel

    pointers = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr"), f"*{element}")
    sizes = {"K": "i32", "stride_am": "i32"}
    constexprs = {"PRECISION": precision, "BLOCK_M": block_m, "N": 128}
    case = Case(name, matmul_kernel, {**pointers, **sizes}, constexprs, (*pointers, *sizes), tensor_cores=True)
    return dataclasses.replace(case, **changes)


@pytest.mark.parametrize(("arch", "kind"), [(80, "mma"), (90, "wgmma"), (100, "tcgen05"), (120, "mma")])
def test_a_plain_matmul_passes(arch, kind):
    case = matmul()
    report = compile_case(case, arch)
    assert problems(case, arch, report) == []
    assert getattr(report, kind) > 0
    assert report.cp_async > 0, "not pipelined"
    assert report.warps == 4
    assert report.occupancy > 0


@pytest.mark.parametrize(
    ("changes", "arch", "line"),
    [
        ({"block_m": 256}, 80, r"^\d+ bytes of register spills, allowed 0$"),
        ({"num_stages": 8}, 89, r"^\d+ bytes of shared memory, sm_89 has 101376$"),
        ({"precision": "ieee", "element": "fp32"}, 90, "^no wgmma instruction, so no tensor cores in use$"),
    ],
)
def test_a_bad_kernel_fails_the_gate(changes, arch, line):
    row = compile_report.inspect("op", matmul(**changes), arch)
    assert [problem for problem in row.failed if re.search(line, problem)], row.failed
    assert row.cells()[-1] == "FAIL"


@pytest.mark.parametrize(("wide", "kinds"), [(True, ("f32",)), (False, ("bf16",))])
def test_the_types_of_reductions_are_seen(wide, kinds):
    from matmul_kernel import sum_kernel

    case = Case("sum", sum_kernel, {"x_ptr": "*bf16", "out_ptr": "*bf16"}, {"N": 64, "WIDE": wide})
    report = compile_case(case, 80)
    assert report.reduced == kinds
    assert bool(problems(case, 80, report)) != wide


def test_spills_of_a_measured_tile():
    """So many as were measured, and not one more."""
    case, spilling = Case("c", None, {}, spills_allowed=8), dataclasses.replace(FINE, spills_bytes=8)
    assert problems(case, 90, spilling) == []
    more = dataclasses.replace(FINE, spills_bytes=12)
    assert problems(case, 90, more) == ["12 bytes of register spills, allowed 8"]


def test_a_kernel_that_does_not_compile_fails_the_gate():
    row = compile_report.inspect("op", matmul(block_m=48), 90)  # no power of two
    assert row.report is None
    assert row.failed[0].startswith("does not compile: ")
    assert len(row.cells()) == len(compile_report.COLUMNS)


@pytest.mark.parametrize(
    ("changes", "arch", "line"),
    [
        ({"spills_bytes": 8}, 90, "8 bytes of register spills, allowed 0"),
        ({"shared_bytes": 102400}, 120, "102400 bytes of shared memory, sm_120 has 101376"),
        ({"tensor_memory": 640}, 100, "640 columns of tensor memory, sm_100 has 512"),
        ({"wgmma": 0}, 90, "no wgmma instruction, so no tensor cores in use"),
        ({"mma": 0}, 100, "no tcgen05 or mma instruction, so no tensor cores in use"),
        ({"mma": 0}, 80, "no mma instruction, so no tensor cores in use"),
        ({"reduced": ("bf16", "f32", "i32")}, 80, "a reduction over bf16, allowed: float32 and integers; cast first"),
        ({"occupancy": 0}, 80, "4 warps of 128 registers do not fit on an SM of sm_80"),
    ],
)
def test_each_gate(changes, arch, line):
    case = Case("c", None, {}, tensor_cores=True)
    assert problems(case, arch, FINE) == []
    assert problems(case, arch, dataclasses.replace(FINE, **changes)) == [line]
    if "no " in line and "instruction" in line:
        plain = dataclasses.replace(case, tensor_cores=False)
        assert problems(plain, arch, dataclasses.replace(FINE, **changes)) == []


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "blocks"),
    [
        (80, 32, 0, 8, 8),  # by warps: 64 of 8
        (80, 128, 0, 8, 2),  # by registers: 65536 of 128 x 256
        (80, 129, 0, 8, 1),  # rounded up to 136
        (90, 168, 98304, 4, 2),  # by shared memory: 228 KB of 97
        (90, 32, 0, 1, 32),  # by blocks
        (120, 32, 0, 4, 12),
        (120, 32, 101376, 4, 1),
        (120, 32, 101377, 4, 0),
        (90, 255, 0, 16, 0),
    ],
)
def test_occupancy(arch, registers, shared, warps, blocks):
    assert occupancy(arch, registers, shared, warps) == blocks


def test_descriptors_need_bulk_copies():
    """Before sm_90 there are none: Triton turns descriptors into pointers."""
    case = Case("c", None, {"k_desc": "tensordesc<bf16[1, 64, 1, 128]>"})
    assert problems(case, 90, FINE) == ["no bulk tensor copy, though the kernel has tensor descriptors"]
    assert problems(case, 90, dataclasses.replace(FINE, tma=2)) == problems(case, 80, FINE) == []


def test_occupancy_by_tensor_memory():
    assert [occupancy(100, 64, 0, 4, columns) for columns in (0, 128, 256, 512, 513)] == [8, 4, 2, 1, 0]


# What users see.


@pytest.fixture
def stub(monkeypatch):
    """One op with one case, and a function that says what compiling it shall give."""
    kernel = types.SimpleNamespace(__name__="_norm_kernel", arg_names=[])
    case = Case("1.3B", kernel, {}, tensor_cores=True)
    monkeypatch.setattr(compile_report, "triton_modules", lambda: {"norm": []})
    monkeypatch.setattr(compile_report, "cases", lambda op, arch: [case])
    return lambda report: monkeypatch.setattr(compile_report, "compile_case", lambda case, arch: report)


def test_report_of_kernels_that_pass(stub, capsys, tmp_path):
    stub(FINE)
    page = tmp_path / "docs" / "report.md"
    assert compile_report.main(["--arch", "90", "120", "--markdown", str(page)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[:4] == ["op", "kernel", "case", "sm"]
    assert " ".join(said[1].split()) == "norm _norm_kernel 1.3B 90 128 0 64.0 8 0 8 0 0 4 3 19% pass"
    assert "2 of 2 pass" in said
    text = page.read_text()
    assert "`python -m hiar_kernels.compile_report --arch 90 120`" in text
    assert "| norm | _norm_kernel | 1.3B | 128 | 0 | 64.0 |" in text
    assert "2 of 2 pass." in text


def test_report_of_kernels_that_fail(stub, capsys):
    stub(dataclasses.replace(FINE, spills_bytes=16))
    assert compile_report.main(["--arch", "90"]) == 1
    said = capsys.readouterr().out
    assert "FAIL norm: _norm_kernel 1.3B on sm_90: 16 bytes of register spills, allowed 0" in said
    assert "0 of 1 pass" in said


def test_bad_input_is_refused_in_one_line(monkeypatch, capsys):
    with pytest.raises(ValueError, match=r"^compile_case: no limits known for sm_70; legal: 80, 89, 90, 100, 120$"):
        compile_case(matmul(), 70)
    untyped = matmul()
    del untyped.signature["K"]
    with pytest.raises(ValueError, match=r"^compile_case: matmul_kernel, case 'small': no type for K$"):
        compile_case(untyped, 90)
    with pytest.raises(ValueError, match=r"^compile_case: matmul_kernel, case 'small': the kernel has no L$"):
        compile_case(matmul(constexprs={**matmul().constexprs, "L": 1}), 90)
    with pytest.raises(ValueError, match=r"^no Triton kernels of 'nothing'; legal: "):
        aot.cases("nothing", 90)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"^compile_case: needs a process without TRITON_INTERPRET=1"):
        compile_case(matmul(), 90)
    with pytest.raises(SystemExit):
        compile_report.main(["--arch", "90"])
    assert "needs a process without TRITON_INTERPRET=1" in capsys.readouterr().err
