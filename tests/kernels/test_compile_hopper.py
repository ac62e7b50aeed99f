"""The Hopper attention kernels as they are compiled, without a GPU: registers, operands, and what a launch hands over.

What is expected of a wgmma comes from the PTX ISA ("Register Fragments and Shared Memory Matrix Layouts"), not from
Triton's layouts.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from collections import defaultdict

import pytest
import torch
from on_hopper import CASES, IN_8_BITS

from hiar_kernels.attention import BlockCausal, gluon
from hiar_kernels.attention.inputs import AttentionInputs
from hiar_kernels.attention.schedule import allocate
from hiar_kernels.attention_fp8 import gluon as gluon_fp8
from hiar_kernels.attention_fp8.inputs import Float8Inputs
from hiar_kernels.common import aot
from hiar_kernels.common.float8 import E4M3, pack_values, padded

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(sys.platform != "linux", reason="triton is built for Linux; there its absence is a failure"),
]
KERNELS = ("attention", "attention_fp8")


@functools.cache
def module(op: str):
    return importlib.import_module(f"hiar_kernels.{op}.gluon_fwd")


@functools.cache
def compiled(op: str, number: int = 0) -> tuple[str, str]:
    """PTX and machine code of a compile case, the one in use by default."""
    asm = aot.build(module(op).compile_cases(90)[number], 90).asm
    return asm["ptx"], aot._dump(asm["cubin"])


@pytest.mark.parametrize("op", KERNELS)
def test_the_rescale_looks_at_every_factor_before_it_skips(op):
    """The rescale is left out where the factors looked at are 1: all that would multiply must be among them."""
    blocks = re.findall(r"\{ \.reg \.pred p; mov(.*?)DONE: \}", compiled(op)[0], re.DOTALL)
    assert len(blocks) >= 4  # two consumers, two halves of 64 numbers a thread
    for block in blocks:
        looked_at = set(re.findall(r"setp\.eq\S* p, (%r\d+),", block))
        factors = set(re.findall(r"mul\.f32 %r\d+, %r\d+, (%r\d+);", block))
        assert factors == looked_at and 0 < len(factors) <= 2


def in_flight(sass: str) -> tuple[int, int, list[str]]:
    """Warpgroup products, groups of them, and lines that touch a register of one before the wait that covers it."""
    products, flight, open_group, touched = 0, [], set(), []
    for line in sass.splitlines():
        text = re.sub(r"/\*[0-9a-fx]{4,}\*/", "", line).strip()
        product = re.search(r"GMMA\.64x(\d+)x\d+\S*\s+R(\d+),\s*(?:R(\d+),)?", text)
        if product:
            products += 1
            out, a = int(product[2]), product[3]
            open_group |= set(range(out, out + int(product[1]) // 2)) | set(range(int(a), int(a) + 4) if a else ())
            if "gsb0" in text:
                flight, open_group = [*flight, open_group], set()
        elif wait := re.search(r"DEPBAR\.LE gsb0, 0x(\d)", text):
            flight = flight[len(flight) - int(wait[1]) :] if int(wait[1]) else []
        elif re.search(r"\b(EXIT|BRX|RET)\b", text):
            flight, open_group = [], set()
        else:
            used = set()
            for register, width in re.findall(r"\bR(\d+)(\.64|\.128)?", text):
                used |= set(range(int(register), int(register) + {"": 1, ".64": 2, ".128": 4}[width]))
            touched += [text] * bool(used & open_group.union(*flight))
    return products, len(re.findall(r"GMMA.*gsb0", sass)), touched


def test_products_of_8_bits_stay_in_flight():
    """Both products are of 8 bits, not serialised by the compiler, and nothing touches their registers on the way."""
    for number, case in enumerate(module("attention_fp8").compile_cases(90)):
        _, sass = compiled("attention_fp8", number)
        products, groups, touched = in_flight(sass)
        assert not touched, f"{case.name}: {touched[:3]}"
        assert len(re.findall(r"QGMMA\S*E4M3", sass)) == products > 3 * groups
        assert "HGMMA" not in sass


def test_the_scan_notices_a_register_in_flight():
    loop = (
        "QGMMA.64x32x32.F32 R24, R88, gdesc[UR8], RZ, gsb0 ;\n{} ;\nWARPGROUP.DEPBAR.LE gsb0, 0x0 ;\nFADD R24, R24, R1"
    )
    assert in_flight(loop.format("FADD R2, R3, R4")) == (1, 1, [])
    for early in ("FADD R2, R24, R4", "F2FP R91, R3, R4"):
        assert in_flight(loop.format(early))[2] == [f"{early} ;"]


def registers_by_role(sass: str) -> list[tuple[int, int]]:
    """(registers that a role has taken, the highest that it names) of what each USETMAXREG leads to, up to another one,
    wherever the compiler put it.
    """
    code = re.findall(r"^\s*(?:/\*([0-9a-f]{4,})\*/)?\s*([^;/]+;)", sass, re.MULTILINE)
    place = {int(address, 16): i for i, (address, _) in enumerate(code) if address}
    roles = []
    for start, (_, text) in enumerate(code):
        if not (taken := re.search(r"USETMAXREG\S*\s+(?:UP\d+,\s*)?(0x[0-9a-f]+)", text)):
            continue
        ahead, reached, highest = [start + 1], set(), 0
        while ahead:
            i = ahead.pop()
            if i in reached or i >= len(code) or "USETMAXREG" in code[i][1]:
                continue
            reached.add(i)
            text = code[i][1]
            for register, width in re.findall(r"\bR(\d+)(\.64|\.128)?\b", text):
                highest = max(highest, int(register) + {"": 0, ".64": 1, ".128": 3}[width])
            if branch := re.search(r"\b(?:BRA|BSSY)\b.*\b(0x[0-9a-f]+)", text):
                ahead.append(place[int(branch[1], 16)])
            if not re.match(r"(BRA 0x|EXIT|BRX|RET)", text):
                ahead.append(i + 1)
        roles.append((int(taken[1], 16), highest))
    return roles


@pytest.mark.parametrize("op", KERNELS)
def test_no_role_names_a_register_that_it_gave_away(op):
    for number in {0, len(module(op).compile_cases(90)) - 1}:
        roles = registers_by_role(compiled(op, number)[1])
        assert {24, 240} < {size for size, _ in roles}
        assert all(highest < size for size, highest in roles), roles
        assert max(highest for size, highest in roles if size == 240) > 168, "consumers that need no more registers"


def test_a_register_too_many_is_noticed():
    code = "USETMAXREG.DEALLOC.CTAPOOL 0x18 ;\nIADD3 R23, R2, R3, RZ ;\nLDG.E.64 R22.64, [R4.64] ;\n{}"
    assert registers_by_role(code.format("EXIT")) == [(24, 23)]
    assert registers_by_role(code.format("MOV R24, R2 ;")) == [(24, 24)]
    apart = """
        /*0010*/ USETMAXREG.DEALLOC.CTAPOOL 0x18 ;
        /*0020*/ @P0 BRA 0x60 ;
        /*0030*/ EXIT ;
        /*0040*/ USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0 ;
        /*0050*/ EXIT ;
        /*0060*/ MOV R24, R2 ;
    """
    assert registers_by_role(apart) == [(24, 24), (240, 0)]


class Trace:
    """Where the numbers of a PTX program come from, followed back through all definitions of a register."""

    def __init__(self, ptx: str) -> None:
        self.defined: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
        self.scores: dict[str, int] = {}  # accumulator of Q K^T -> its number in the fragment
        self.operands: list[tuple[int, list[str]]] = []  # of P V: (which 32 of its keys, the four registers)
        part = 0
        for line in map(str.strip, ptx.splitlines()):
            if product := re.match(r"wgmma\.mma_async\S*\s+\{(.*?)\},\s*(\{.*?\}|%rd\d+),", line):
                out, first = (re.findall(r"%\w+", words) for words in product.groups())
                if product[2][0] == "{":
                    self.operands.append((part, first))
                    part += 1
                else:
                    self.scores |= {register: number for number, register in enumerate(out)}
            elif line.startswith("wgmma.commit_group"):
                part = 0
            elif move := re.match(r"([a-z][\w.:]*)\s+(%\w+)\s*,\s*(.*);", line):
                words = re.findall(r"[%\w.]+", move[3])
                self.defined[move[2]].append((move[1], words))

    def byte(self, register: str, number: int) -> set[str]:
        """Registers of the float32 that a byte was rounded from."""
        found: set[str] = set()
        for name, words in self.defined[register]:
            if name == "mov.b32" and len(words) == 2:  # two halves
                found |= self.byte(words[number // 2], number % 2)
            elif name.startswith("cvt.rn.satfinite.e4m3x2.f32"):  # the high one first
                found.add(words[1 - number])
            elif name == "prmt.b32":
                chosen = int(words[2].rstrip("U"), 16) >> 4 * number & 7
                found |= self.byte(words[chosen // 4], chosen % 4)
            elif name == "shr.s16" and words[1] == "8" and number == 0:
                found |= self.byte(words[0], 1)
            elif name == "mov.b32" or (name in ("cvt.u32.u16", "mov.b16", "mov.u16") and number < 2):
                found |= self.byte(words[0], number)
            else:
                raise AssertionError(f"byte {number} of {register}: {name} {words}")
        return found

    def scores_of(self, register: str) -> set[int]:
        """Numbers of the accumulators of Q K^T that a probability is computed from, beside its row's maximum."""
        found, seen, waiting = set(), set(), [register]
        while waiting:
            register = waiting.pop()
            if register in seen:
                continue
            seen.add(register)
            if register in self.scores:
                found.add(self.scores[register])
                continue
            for name, words in self.defined[register]:
                kept = {"sub": 1, "fma": 2}.get(name.partition(".")[0], len(words))  # not what is subtracted
                waiting += [word for word in words[:kept] if word.startswith("%r")]
        return found


def test_probabilities_lie_as_values_are_stored():
    """Of m64nNk32: accumulator i of thread t of four has row 8 (i // 2 % 2) and column 8 (i // 4) + 2 t + i % 2; byte j
    of register r of the first operand has row 8 (r % 2) and column 16 (r // 2) + 4 t + j. pack_values says which key a
    place holds.
    """
    trace = Trace(compiled("attention_fp8")[0])
    key_at = pack_values(torch.arange(128)[:, None, None]).flatten().tolist()
    assert len(trace.operands) == 2 * (4 + 1 + 4 + 4)  # two consumers: masked, the end of a slot, the loop, the last
    for part, registers in trace.operands:
        for r, register in enumerate(registers):
            for j in range(4):
                sources = trace.byte(register, j)
                scores = set().union(*map(trace.scores_of, sources))
                assert sources and len(scores) == 1, f"{register}, byte {j}: {scores}"
                (i,) = scores
                assert i // 2 % 2 == r % 2, "another row"
                for t in range(4):
                    assert 8 * (i // 4) + 2 * t + i % 2 == key_at[32 * part + 16 * (r // 2) + 4 * t + j]


class LaunchRecorder:
    """A kernel in place of the real one, which keeps what it is launched with."""

    def __init__(self, kernel) -> None:
        self.parameters, self.launches = inspect.signature(kernel.fn), []

    def __getitem__(self, grid):
        return lambda *words, num_warps, maxnreg, enable_fp_fusion, **more: self.launches.append(
            (grid, self.parameters.bind(*words, **more).arguments)
        )


def launched(forward, monkeypatch, *arguments):
    """(out, logsumexp, grid, arguments by name) of a launch that a recorder takes in the kernel's place."""
    (name,) = (name for name in vars(forward) if name.endswith("_hopper_kernel"))
    kernel = LaunchRecorder(getattr(forward, name))
    monkeypatch.setattr(forward, name, kernel)
    monkeypatch.setattr(forward, "merge_cuts", lambda *_: None)
    out, lse = forward.launch(*arguments)
    ((grid, by_name),) = kernel.launches
    return out, lse, grid, by_name


def assert_encodable(descriptor, rows):
    """As cuTensorMapEncodeTiled takes it: addresses and strides of whole 16 bytes, boxes as wide as the swizzle."""
    assert descriptor.block_shape == [1, rows, 128] and descriptor.layout.swizzle_byte_width == 128
    size = descriptor.base.element_size()
    assert descriptor.layout.element_bitwidth == 8 * size and descriptor.base.data_ptr() % 16 == 0
    assert all(1 <= extent <= 2**32 for extent in descriptor.shape)
    *strides, last = descriptor.strides
    assert last == 1 and all(0 < stride * size < 2**40 and stride * size % 16 == 0 for stride in strides)
    reach = 1 + sum((n - 1) * stride for n, stride in zip(descriptor.shape, descriptor.strides, strict=True))
    assert reach * size <= descriptor.base.untyped_storage().nbytes() - descriptor.base.storage_offset() * size


@pytest.mark.parametrize("name", IN_8_BITS)
def test_what_a_launch_in_8_bits_hands_over(name, monkeypatch):
    mask, q_ids, k_ids, heads = IN_8_BITS[name]
    ids = [torch.tensor(x, dtype=torch.int32) for x in (q_ids, k_ids)]
    tokens, (batch, slots) = mask.frame_tokens, ids[1].shape
    room = slots + 2  # of which the call uses fewer, as a cache does
    sizes = (room * tokens, heads, 128), (room, heads, 128, padded(tokens)), (len(q_ids[0]) * tokens, heads, 128)
    k, v, q = (torch.zeros(batch, *size, dtype=torch.uint8).view(E4M3) for size in sizes)
    scales = torch.ones(2, batch, room, heads)[:, :, :slots]
    views, q_scales = (k[:, : slots * tokens], v[:, :slots], *scales), torch.ones(q.shape[:3])
    call = Float8Inputs(q, *views, q_scales, *ids, mask)
    assert gluon_fp8.unfit(call) is None
    schedule = allocate((*q.shape[:3], slots * tokens), tokens, 0, q.device, 132, one_slot=True)
    out, lse, grid, by_name = launched(module("attention_fp8"), monkeypatch, call, schedule)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and lse.shape == (batch, heads, q.shape[1])
    assert grid == (schedule.ctas,) and by_name["slot_stride"] == (slots if batch == 1 else room)
    for kind, rows in (("q", 64), ("k", 128), ("v", 128)):
        assert_encodable(by_name[f"{kind}_desc"], rows)
    assert by_name["k_desc"].shape == [(batch - 1) * room + slots, tokens, heads * 128]


def odd_strides(x):
    """x with strides of 3 along dimensions of size 1: nothing steps along them."""
    return x.as_strided(x.shape, [3 if n == 1 else step for n, step in zip(x.shape, x.stride(), strict=True)])


def test_strides_along_which_nothing_steps_do_not_matter(monkeypatch):
    """A ring of one slot, one head, one video and one token a frame, as a slice of something else has them."""
    mask, ids, scales = BlockCausal(1, 1, 1), torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, 1)
    row, ring = torch.zeros(1, 1, 1, 128, dtype=torch.uint8).view(E4M3), torch.zeros(1, 1, 1, 128, 16).to(E4M3)
    call = Float8Inputs(*map(odd_strides, (row, row, ring, scales, scales, scales)), ids, ids, mask)
    assert call.v.stride() == (3, 3, 3, 16, 1) and call.k_scales.stride() == (3, 3, 3)
    assert gluon_fp8.unfit(call) is None
    schedule = allocate((1, 1, 1, 1), 1, 0, ids.device, 132, one_slot=True)
    *_, by_name = launched(module("attention_fp8"), monkeypatch, call, schedule)
    for kind, rows in (("q", 64), ("k", 128), ("v", 128)):
        assert_encodable(by_name[f"{kind}_desc"], rows)
    q = odd_strides(torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16))
    assert gluon.unfit(AttentionInputs(q, q, q)) is None
    *_, by_name = launched(module("attention"), monkeypatch, q, q, q, allocate((1, 1, 1, 1), 1, 0, q.device, 132), 0.1)
    for kind, rows in (("q", 64), ("k", 128), ("v_slot", 128)):
        assert_encodable(by_name[f"{kind}_desc"], rows)


@pytest.mark.parametrize("name", CASES)
def test_what_a_launch_hands_over(name, monkeypatch):
    mask, q_ids, k_ids, heads = CASES[name]
    tokens, batch, slots = mask.frame_tokens, len(k_ids), len(k_ids[0])
    q = torch.zeros(batch, len(q_ids[0]) * tokens, heads, 128, dtype=torch.bfloat16)
    rings = torch.zeros(2, batch, (slots + 2) * tokens, heads, 128, dtype=torch.bfloat16)
    k, v = rings[:, :, : slots * tokens]
    ids = [torch.tensor(x, dtype=torch.int32) for x in (q_ids, k_ids)]
    call = AttentionInputs(q, k, v, mask=mask, q_frames=ids[0], kv_frames=ids[1])
    assert gluon.unfit(call) is None
    schedule = allocate((*q.shape[:3], slots * tokens), tokens, 0, q.device, 132)
    out, lse, grid, by_name = launched(module("attention"), monkeypatch, q, k, v, schedule, 0.1)
    assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == (batch, heads, q.shape[1])
    stride = slots + 2 if batch > 1 else slots
    assert grid == (schedule.ctas,) and by_name["slot_stride"] == stride and by_name["slot_tokens"] == tokens
    assert_encodable(by_name["q_desc"], 64)
    for kind in "kv":
        assert_encodable(by_name[f"{kind}_desc"], 128)
        assert_encodable(by_name[f"{kind}_slot_desc"], 128)
        assert by_name[f"{kind}_slot_desc"].shape == [(batch - 1) * stride + slots, tokens, heads * 128]
