// merge_attention: what one thread does with N numbers of one (video, token, head).
#pragma once

#include "portable.h"

namespace hiar {

constexpr int kMaxPartials = 32;  // they travel as kernel arguments: 64 bytes each, 4 KB at most

struct PartialResult {
  const void* out;
  const float* lse;
  int64_t out_b, out_t, out_h, lse_b, lse_h, lse_t;
};

struct MergeArgs {
  PartialResult partials[kMaxPartials];
  void* out;   // [B, T, H, D], contiguous
  float* lse;  // [B, H, T], contiguous
  Dtype dtype;  // of the partial outputs and of out
  int32_t count, head_dim;
  uint32_t tokens, heads, rows;  // rows = B * T * H
};

struct MergePlan {
  bool wide;
  int width, x, y;  // numbers of a thread; threads along a row; rows of a block

  static MergePlan of(const MergeArgs& a) {
    MergePlan plan{};
    const int n = 16 / size_of(a.dtype);
    plan.wide = a.head_dim % n == 0 && aligned(a.out, a.dtype, n);
    for (int i = 0; i < a.count; ++i) {
      const PartialResult& p = a.partials[i];
      plan.wide = plan.wide && aligned(p.out, a.dtype, n, p.out_b, p.out_t, p.out_h);
    }
    plan.width = plan.wide ? n : 1;
    const int packs = a.head_dim / plan.width;
    plan.x = packs < 64 ? packs : 64;
    plan.y = 256 / plan.x;
    return plan;
  }
};

// Numbers d .. d + N of a row; the thread at d = 0 also writes the logsumexp.
template <typename T, int N, bool WIDE>
HIAR_HD void merge_numbers(const MergeArgs& a, uint32_t row, int d) {
  const uint32_t per_video = a.tokens * a.heads;
  const int64_t b = row / per_video, t = row % per_video / a.heads, h = row % a.heads;
  float m = -INFINITY;
  for (int n = 0; n < a.count; ++n) {
    const PartialResult& p = a.partials[n];
    m = fmaxf(m, read_only(p.lse + b * p.lse_b + h * p.lse_h + t * p.lse_t));
  }
  if (m == -INFINITY) m = 0;  // no key is visible
  float l = 0, sum[N] = {};
  for (int n = 0; n < a.count; ++n) {
    const PartialResult& p = a.partials[n];
    const float weight = expf(read_only(p.lse + b * p.lse_b + h * p.lse_h + t * p.lse_t) - m);
    l += weight;
    if (weight == 0) continue;  // without a visible key it counts nothing, whatever it holds
    float x[N];
    load_floats<WIDE>(static_cast<const T*>(p.out) + b * p.out_b + t * p.out_t + h * p.out_h + d, x);
#pragma unroll
    for (int i = 0; i < N; ++i) sum[i] += weight * x[i];
  }
  const float scale = l == 0 ? 0 : 1 / l;
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] *= scale;
  store_floats<WIDE>(static_cast<T*>(a.out) + static_cast<int64_t>(row) * a.head_dim + d, sum);
  if (d == 0) a.lse[(b * a.heads + h) * a.tokens + t] = l == 0 ? -INFINITY : m + logf(l);
}

// All that a thread (x, y) of a block does.
template <typename T, int N, bool WIDE>
HIAR_HD void merge_thread(const MergeArgs& a, uint32_t block, int x, int y, int threads_x, int threads_y) {
  const uint64_t row = static_cast<uint64_t>(block) * threads_y + y;
  if (row >= a.rows) return;
  for (int d = x * N; d < a.head_dim; d += threads_x * N)
    merge_numbers<T, N, WIDE>(a, static_cast<uint32_t>(row), d);
}

void launch(const MergeArgs& a, cudaStream_t stream);

}  // namespace hiar
