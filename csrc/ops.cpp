// The ops as torch sees them, hiar_cuda::<name>: tensors to arguments, then one launch. Of torch only its stable ABI
// (torch >= 2.11): one binary serves every later torch, and a CPU one is enough to build it.
//
// hiar_kernels/<op>/cuda.py checks what people pass and allocates results; the checks here keep memory safe. With
// HIAR_EMULATE the same ops are built for the host.
#ifndef USE_CUDA
#define USE_CUDA 1  // shows the CUDA part of the shim
#endif
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "merge_attention.h"
#include "qk_norm_rope_append.h"
#include "qk_norm_rope_append_fp8.h"
#include "ring_advance.h"

namespace hiar {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef HIAR_EMULATE

template <typename Args>
void launch_for(const char*, const Tensor&, const Args& args) {
  launch(args, nullptr);
}

#else

using CurrentStream = AOTITorchError (*)(int32_t, void**);

// Looked up at run time: as an undefined symbol it would keep the library from loading into a torch without CUDA.
CurrentStream current_stream() {
  static const CurrentStream found = [] {
    void* cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<CurrentStream>(cuda ? dlsym(cuda, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  return found;
}

// On the tensor's device, in torch's current stream, checked at once for a failed launch. Nothing is allocated and
// nothing waits, so a graph may capture it.
template <typename Args>
void launch_for(const char* op, const Tensor& tensor, const Args& args) {
  const int32_t device = tensor.get_device();
  const torch::stable::accelerator::DeviceGuard guard(device);
  STD_TORCH_CHECK(current_stream() != nullptr, op, ": this torch has no CUDA, libtorch_cuda.so is not loaded");
  void* stream = nullptr;
  STD_TORCH_CHECK(current_stream()(device, &stream) == 0, op, ": torch gave no current stream");
  launch(args, static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, op, ": ", cudaGetErrorString(error));
}

#endif

void require_here(const char* op, const char* name, const Tensor& x, const Tensor& first) {
#ifdef HIAR_EMULATE
  STD_TORCH_CHECK(!x.is_cuda(), op, ": ", name, " must be a CPU tensor, this is the emulation");
#else
  STD_TORCH_CHECK(x.is_cuda(), op, ": ", name, " must be a CUDA tensor");
#endif
  STD_TORCH_CHECK(x.get_device() == first.get_device(), op, ": ", name, " is on another device");
}

Dtype dtype_of(const char* op, const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op, ": ", name,
                  " must be bfloat16, float16 or float32");
  return type == ScalarType::Float ? Dtype::Float : type == ScalarType::Half ? Dtype::Half : Dtype::BFloat16;
}

int32_t narrow(int64_t n) { return static_cast<int32_t>(n); }

// ring_advance

void ring_advance(Tensor position, Tensor frames, Tensor slots, Tensor ring, Tensor advance, Tensor capacities,
                  int64_t first_frame, int64_t sink) {
  const char* const op = "ring_advance";
  const char* const names[] = {"position", "frames", "slots", "ring_frames", "advance", "capacities"};
  const Tensor* const all[] = {&position, &frames, &slots, &ring, &advance, &capacities};
  for (int i = 0; i < 6; ++i) {
    require_here(op, names[i], *all[i], position);
    STD_TORCH_CHECK(all[i]->scalar_type() == ScalarType::Int, op, ": ", names[i], " must be int32");
    STD_TORCH_CHECK(all[i]->size(0) == position.size(0), op, ": ", names[i], " has another number of rows");
  }
  RingArgs a{};
  a.position = static_cast<int32_t*>(position.mutable_data_ptr());
  a.frames = static_cast<int32_t*>(frames.mutable_data_ptr());
  a.slots = static_cast<int32_t*>(slots.mutable_data_ptr());
  a.ring = static_cast<int32_t*>(ring.mutable_data_ptr());
  a.advance = static_cast<const int32_t*>(advance.const_data_ptr());
  a.capacities = static_cast<const int32_t*>(capacities.const_data_ptr());
  a.stride_position = position.stride(0), a.stride_frames = frames.stride(0), a.stride_slots = slots.stride(0);
  a.stride_ring = ring.stride(0), a.stride_advance = advance.stride(0), a.stride_capacities = capacities.stride(0);
  a.rows = narrow(position.size(0)), a.count = narrow(frames.size(1)), a.columns = narrow(ring.size(1));
  a.first_frame = narrow(first_frame), a.sink = narrow(sink);
  if (a.rows > 0) launch_for(op, position, a);
}

// merge_attention

void merge_attention(std::vector<Tensor> outs, std::vector<Tensor> lses, Tensor out, Tensor lse) {
  const char* const op = "merge_attention";
  STD_TORCH_CHECK(!outs.empty() && outs.size() == lses.size() && outs.size() <= kMaxPartials, op, ": takes 1 to ",
                  kMaxPartials, " partial results, got ", outs.size(), " outs and ", lses.size(), " lses");
  require_here(op, "out", out, out);
  require_here(op, "lse", lse, out);
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(out.numel() / out.size(3) <= INT32_MAX, op, ": takes 2^31 rows of a head at most");
  MergeArgs a{};
  a.out = out.mutable_data_ptr();
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.dtype = dtype_of(op, "out", out);
  a.count = narrow(outs.size()), a.head_dim = narrow(out.size(3));
  a.tokens = narrow(out.size(1)), a.heads = narrow(out.size(2)), a.rows = narrow(out.numel() / out.size(3));
  for (int i = 0; i < a.count; ++i) {
    const Tensor &x = outs[i], &s = lses[i];
    require_here(op, "a partial output", x, out);
    require_here(op, "an lse", s, out);
    const bool fits = x.scalar_type() == out.scalar_type() && x.stride(3) == 1 && s.scalar_type() == ScalarType::Float;
    STD_TORCH_CHECK(fits, op, ": partial outputs must have the dtype of out and dense rows, every lse must be float32");
    a.partials[i] = {x.const_data_ptr(), static_cast<const float*>(s.const_data_ptr()),
                  x.stride(0), x.stride(1), x.stride(2), s.stride(0), s.stride(1), s.stride(2)};
  }
  launch_for(op, out, a);
}

// qk_norm_rope_append

// x [B or 1, F] or [N, B or 1, F].
Ids ids_of(const char* op, const char* name, const Tensor& x) {
  const bool is_long = x.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(is_long || x.scalar_type() == ScalarType::Int, op, ": ", name, " must be int32 or int64");
  const int64_t b = x.dim() - 2;
  return {x.const_data_ptr(), b > 0 ? x.stride(0) : 0, x.size(b) > 1 ? x.stride(b) : 0, x.stride(b + 1), is_long};
}

Ring ring_of(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.stride(3) == 1, op, ": ", name, " must have channels of stride 1");
  return {x.mutable_data_ptr(), dtype_of(op, name, x), x.stride(0), x.stride(1), x.stride(2)};
}

// Arguments of both: all but where keys and values go. slots: [N, B or 1, F].
AppendArgs append_args(const char* op, const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                       const Tensor& frames, const Tensor& slots, const std::optional<Tensor>& rows,
                       const Tensor& turns, const Tensor& q, int64_t frame_tokens, int64_t first_cell, int64_t columns,
                       double eps) {
  const char* const names[] = {"qkv", "q_weight", "k_weight", "frames", "slots", "turns", "q"};
  const Tensor* const all[] = {&qkv, &q_weight, &k_weight, &frames, &slots, &turns, &q};
  for (int i = 0; i < 7; ++i) require_here(op, names[i], *all[i], qkv);
  const int64_t blocks = qkv.size(0) * qkv.size(1), width = q_weight.numel();
  STD_TORCH_CHECK(width <= kMostWidth && blocks <= INT32_MAX, op, ": takes 8192 channels and 2^31 tokens at most");
  STD_TORCH_CHECK(qkv.stride(2) == 1 && turns.scalar_type() == ScalarType::Long && turns.is_contiguous(), op,
                  ": qkv must have channels of stride 1, turns be int64 and contiguous");
  AppendArgs a{};
  a.qkv = qkv.const_data_ptr();
  a.stride_b = qkv.stride(0), a.stride_t = qkv.stride(1);
  a.dtype = dtype_of(op, "qkv", qkv);
  a.weights[0] = q_weight.const_data_ptr(), a.weights[1] = k_weight.const_data_ptr();
  a.weight_dtypes[0] = dtype_of(op, "q_weight", q_weight), a.weight_dtypes[1] = dtype_of(op, "k_weight", k_weight);
  a.frames = ids_of(op, "frames", frames), a.slots = ids_of(op, "slots", slots);
  STD_TORCH_CHECK(slots.dim() == 3 && slots.size(0) <= kMostPlaces, op, ": slots must be [1 or 2, B or 1, F]");
  a.places = narrow(slots.size(0));
  if (rows.has_value()) {
    require_here(op, "rows", *rows, qkv);
    const bool fits = rows->dim() == 2 && rows->size(0) == slots.size(0) && rows->size(1) == qkv.size(0);
    STD_TORCH_CHECK(fits, op, ": rows must be [1 or 2, B] like slots");
    const Ids ids = ids_of(op, "rows", *rows);  // its "frames" are the rows of the batch
    a.rows = {ids.data, rows->stride(0), rows->stride(1), 0, ids.is_long};
  }
  a.turns = static_cast<const int64_t*>(turns.const_data_ptr());
  a.q = q.mutable_data_ptr();
  a.blocks = narrow(blocks), a.tokens = narrow(qkv.size(1));
  a.frame_tokens = narrow(frame_tokens), a.first_cell = narrow(first_cell), a.columns = narrow(columns);
  a.width = narrow(width), a.head_dim = narrow(q.size(3));
  a.eps = static_cast<float>(eps);
  return a;
}

void qk_norm_rope_append(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames, Tensor slots,
                         std::optional<Tensor> rows, Tensor turns, Tensor q, Tensor k_cache, Tensor v_cache,
                         int64_t frame_tokens, int64_t first_cell, int64_t columns, double eps) {
  const char* const op = "qk_norm_rope_append";
  require_here(op, "k_cache", k_cache, qkv);
  require_here(op, "v_cache", v_cache, qkv);
  AppendArgs a = append_args(op, qkv, q_weight, k_weight, frames, slots, rows, turns, q, frame_tokens, first_cell,
                             columns, eps);
  a.k = ring_of(op, "k_cache", k_cache), a.v = ring_of(op, "v_cache", v_cache);
  a.num_slots = narrow(k_cache.size(1) / frame_tokens), a.num_rows = narrow(k_cache.size(0));
  if (q.numel() > 0) launch_for(op, qkv, a);
}

// qk_norm_rope_append_fp8

Bytes bytes_of(const char* op, const char* name, const Tensor& x, bool values) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Byte && x.dim() == (values ? 5 : 4) && x.stride(x.dim() - 1) == 1, op,
                  ": ", name, " must be bytes, the last ones neighbours");
  return {static_cast<uint8_t*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2), values ? x.stride(3) : 1};
}

Scales scales_of(const char* op, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.dim() == 3, op, ": ", name, " must be float32 of 3 dimensions");
  return {static_cast<float*>(x.mutable_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// q: of qkv's dtype, or bytes beside q_scales [B, T, H]. k: memory for the keys, like q of qkv's dtype. parts:
// [2, B, F, H, P]. Caches as bytes.
void qk_norm_rope_append_fp8(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames, Tensor slots,
                             std::optional<Tensor> rows, Tensor turns, Tensor q, std::optional<Tensor> q_scales,
                             Tensor k, Tensor parts, Tensor k_cache, Tensor v_cache, Tensor k_scales, Tensor v_scales,
                             int64_t frame_tokens, int64_t columns, double eps) {
  const char* const op = "qk_norm_rope_append_fp8";
  const char* const names[] = {"k", "parts", "k_cache", "v_cache", "k_scales", "v_scales"};
  const Tensor* const all[] = {&k, &parts, &k_cache, &v_cache, &k_scales, &v_scales};
  for (int i = 0; i < 6; ++i) require_here(op, names[i], *all[i], qkv);
  AppendFp8Args f{};
  f.in = append_args(op, qkv, q_weight, k_weight, frames, slots, rows, turns, q, frame_tokens, 0, columns, eps);
  f.frames = narrow(qkv.size(1) / frame_tokens), f.heads = narrow(q.size(2)), f.places = narrow(v_cache.size(4));
  STD_TORCH_CHECK(f.heads <= kMostHeads, op, ": takes 2048 heads at most");
  STD_TORCH_CHECK(k.scalar_type() == qkv.scalar_type() && k.is_contiguous() && k.numel() == q.numel(), op,
                  ": k must be like q, of the dtype of qkv");
  STD_TORCH_CHECK(parts.scalar_type() == ScalarType::Float && parts.is_contiguous() &&
                      parts.numel() == 2 * qkv.size(0) * qkv.size(1) * f.heads, op, ": parts must be [2, B, F, H, P]");
  STD_TORCH_CHECK(q.scalar_type() == (q_scales.has_value() ? ScalarType::Byte : qkv.scalar_type()), op,
                  ": q must be of the dtype of qkv, or bytes beside q_scales");
  if (q_scales.has_value()) {
    require_here(op, "q_scales", *q_scales, qkv);
    f.q_scales = scales_of(op, "q_scales", *q_scales).data;
  }
  f.in.k = ring_of(op, "k", k), f.in.v = f.in.k;
  f.parts = static_cast<float*>(parts.mutable_data_ptr());
  f.k = bytes_of(op, "k_cache", k_cache, false), f.v = bytes_of(op, "v_cache", v_cache, true);
  f.k_scales = scales_of(op, "k_scales", k_scales), f.v_scales = scales_of(op, "v_scales", v_scales);
  f.in.num_slots = narrow(v_cache.size(1)), f.in.num_rows = narrow(v_cache.size(0));
  if (q.numel() > 0) launch_for(op, qkv, f);
}

}  // namespace
}  // namespace hiar

STABLE_TORCH_LIBRARY(hiar_cuda, m) {
  m.def(
      "ring_advance(Tensor(a!) position, Tensor(b!) frames, Tensor(c!) slots, Tensor(d!) ring_frames, Tensor advance, "
      "Tensor capacities, int first_frame, int sink_frames) -> ()");
  m.def("merge_attention(Tensor[] outs, Tensor[] lses, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "qk_norm_rope_append(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames, Tensor slots, Tensor? rows, "
      "Tensor turns, Tensor(a!) q, Tensor(b!) k_cache, Tensor(c!) v_cache, int frame_tokens, int first_cell, int columns, "
      "float eps) -> ()");
  m.def(
      "qk_norm_rope_append_fp8(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor frames, Tensor slots, Tensor? rows, "
      "Tensor turns, Tensor(a!) q, Tensor(b!)? q_scales, Tensor(c!) k, Tensor(d!) parts, Tensor(e!) k_cache, "
      "Tensor(f!) v_cache, Tensor(g!) k_scales, Tensor(h!) v_scales, int frame_tokens, int columns, float eps) -> ()");
}

// For tensors of any device: those of a wrong one get one line.
STABLE_TORCH_LIBRARY_IMPL(hiar_cuda, CompositeExplicitAutograd, m) {
  m.impl("ring_advance", TORCH_BOX(&hiar::ring_advance));
  m.impl("merge_attention", TORCH_BOX(&hiar::merge_attention));
  m.impl("qk_norm_rope_append", TORCH_BOX(&hiar::qk_norm_rope_append));
  m.impl("qk_norm_rope_append_fp8", TORCH_BOX(&hiar::qk_norm_rope_append_fp8));
}
