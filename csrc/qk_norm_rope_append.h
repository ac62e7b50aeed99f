// qk_norm_rope_append: what one thread does. A block serves a token: its threads hold q, k and v of the token whole,
// each PER packs of N neighbours, so the mean over the full width needs one pass over memory.
//     load -> squares -> (sum over the block; cos and sin of the token's pairs, once for all heads) -> finish
#pragma once

#include "portable.h"

#ifdef HIAR_EMULATE
#include <vector>
#endif

namespace hiar {

struct Ids {  // [B or 1, F] or [N, B or 1, F] on the device, int32 or int64
  const void* data;
  int64_t stride_n, stride_b, stride_f;
  bool is_long;

  HIAR_HD int64_t at(int64_t n, int64_t b, int64_t f) const {
    const int64_t i = n * stride_n + b * stride_b + f * stride_f;
    return is_long ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

struct Ring {  // [rows, slots * frame_tokens, H, D], adjacent channels
  void* data;
  Dtype dtype;
  int64_t stride_b, stride_t, stride_h;
};

struct AppendArgs {
  const void* qkv;  // [B, T, 3 H D], adjacent channels
  int64_t stride_b, stride_t;
  const void* weights[2];  // of q and of k: [H D], contiguous
  Dtype dtype, weight_dtypes[2];
  Ids frames, slots;  // slots and rows: of each of the places that k and v are written to
  Ids rows;           // [N, B, 1]: rows of the ring; data null: those of the batch
  int32_t places;     // N
  const int64_t* turns;  // [D / 2]: turns of a pair for one step along its axis, in units of 2^-64
  void* q;               // [B, T, H, D], contiguous, of qkv's dtype
  Ring k, v;
  int32_t blocks;  // B T
  int32_t tokens, frame_tokens, num_slots, num_rows;
  int32_t first_cell, columns;  // of the frame_tokens cells that are there, in a grid of so many columns
  int32_t width, head_dim;      // width = H D
  float eps;
};

constexpr int kMostWidth = 8192;
constexpr int kMostPlaces = 2;

struct AppendPlan {
  bool wide;
  int per, threads;  // packs of a thread; threads of a block, whole warps

  // Up to 8192 numbers; bfloat16 of 12 heads of 128: 192 threads x 1 pack, of 40: 320 x 2.
  static AppendPlan of(const AppendArgs& a) {
    const int n = 16 / size_of(a.dtype);
    AppendPlan plan{};
    plan.wide = a.head_dim % n == 0 && aligned(a.qkv, a.dtype, n, a.stride_b, a.stride_t) && aligned(a.q, a.dtype, n) &&
                aligned(a.k.data, a.k.dtype, n, a.k.stride_b, a.k.stride_t, a.k.stride_h) &&
                aligned(a.v.data, a.v.dtype, n, a.v.stride_b, a.v.stride_t, a.v.stride_h) &&
                aligned(a.weights[0], a.weight_dtypes[0], n) && aligned(a.weights[1], a.weight_dtypes[1], n);
    const int packs = a.width / (plan.wide ? n : 2);
    plan.per = !plan.wide ? 8 : packs <= 320 ? 1 : 2;
    const int threads = (packs + plan.per - 1) / plan.per;
    plan.threads = (threads + 31) / 32 * 32;
    return plan;
  }
};

struct Token {  // the place of a block's token, the same for all its threads
  int64_t row, batch, frame, frame_id;
  int32_t token, cell, line, column;  // token: within the row of the batch; cell: of those of its frame

  HIAR_HD Token(const AppendArgs& a, int32_t block) : row(block), batch(block / a.tokens), token(block % a.tokens) {
    frame = token / a.frame_tokens;
    cell = token % a.frame_tokens;
    line = (a.first_cell + cell) / a.columns;
    column = (a.first_cell + cell) % a.columns;
    frame_id = a.frames.at(0, batch, frame);
  }

  HIAR_HD int64_t source(const AppendArgs& a) const { return batch * a.stride_b + token * a.stride_t; }

};

struct Place {  // where k and v of a token begin in their rings; -1: a row or slot out of range, nothing is written
  int64_t k, v;

  HIAR_HD static Place of(const AppendArgs& a, const Token& token, int32_t n) {
    const int64_t slot = a.slots.at(n, token.batch, token.frame);
    const int64_t row = a.rows.data ? a.rows.at(n, token.batch, 0) : token.batch;
    if (slot < 0 || slot >= a.num_slots || row < 0 || row >= a.num_rows) return {-1, -1};
    const int64_t at = slot * a.frame_tokens + token.cell;
    return {row * a.k.stride_b + at * a.k.stride_t, row * a.v.stride_b + at * a.v.stride_t};
  }
};

// cos and sin of place * turns: whole turns fall off the top of the product, which is exact for any place.
HIAR_HD float2 cos_sin(int64_t place, int64_t turns) {
  const int64_t angle = static_cast<int64_t>(static_cast<uint64_t>(place) * static_cast<uint64_t>(turns));
  const int64_t quarter = ((angle >> 61) + 1) >> 1;  // the nearest quarter turn; what is left is t pi / 4, -1 <= t < 1
  const int32_t rest = static_cast<int32_t>(static_cast<int64_t>(static_cast<uint64_t>(angle) << 2) >> 32);
  const float t = static_cast<float>(rest) * 4.656612873077393e-10f;  // 2^-31
  const float z = t * t;
  // Taylor terms of sin(t pi / 4) and cos(t pi / 4): the first ones left out are below 2^-25
  float sine = -3.6576204e-05f + z * 3.1336162e-07f;
  sine = t * (0.78539816f + z * (-0.080745512f + z * (0.0024903946f + z * sine)));
  float cosine = 3.5908605e-06f + z * -2.4611370e-08f;
  cosine = 1.0f + z * (-0.30842514f + z * (0.015854344f + z * (-0.00032599189f + z * cosine)));
  const bool odd = quarter & 1;
  const float c = odd ? sine : cosine, s = odd ? cosine : sine;
  return make_float2((quarter + 1) & 2 ? -c : c, quarter & 2 ? -s : s);
}

// Of one pair of the token: c = D / 2 pairs are split c - 2 (c / 3), c / 3, c / 3 over frame, line and column.
HIAR_HD float2 turn_of(const AppendArgs& a, const Token& token, int32_t pair) {
  const int32_t pairs = a.head_dim / 2, third = pairs / 3;
  const int64_t place = pair < pairs - 2 * third ? token.frame_id : pair < pairs - third ? token.line : token.column;
  return cos_sin(place, read_only(reinterpret_cast<const long long*>(a.turns) + pair));
}

HIAR_HD float inverse_rms(float squares, const AppendArgs& a) {
  return 1.0f / sqrtf(squares / static_cast<float>(a.width) + a.eps);
}

template <typename T, int N, bool WIDE, int PER>
struct AppendThread {
  Pack<T, N> q[PER], k[PER], v[PER];

  HIAR_HD static bool begin(const AppendArgs& a, int i, int thread, int threads, int32_t& c) {
    c = (i * threads + thread) * N;
    return c < a.width;
  }

  HIAR_HD void load(const AppendArgs& a, const Token& token, int thread, int threads) {
    const T* source = static_cast<const T*>(a.qkv) + token.source(a);
    int32_t c;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (!begin(a, i, thread, threads, c)) continue;
      hiar::load<WIDE>(source + c, q[i]);
      hiar::load<WIDE>(source + a.width + c, k[i]);
      hiar::load<WIDE>(source + 2 * a.width + c, v[i]);
    }
  }

  // This thread's share of the sums of squares of q and k.
  HIAR_HD float2 squares(const AppendArgs& a, int thread, int threads) const {
    float2 sum = make_float2(0, 0);
    int32_t c;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (!begin(a, i, thread, threads, c)) continue;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float x = to_float(q[i].e[j]), y = to_float(k[i].e[j]);
        sum.x += x * x;
        sum.y += y * y;
      }
    }
    return sum;
  }

  // inverse: 1 / rms of q and of k. turned [D / 2]: cos and sin of the token's pairs. places: a.places of them.
  HIAR_HD void finish(const AppendArgs& a, const Token& token, int thread, int threads, float2 inverse,
                      const float2* turned, const Place* places) const {
    int32_t c;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (!begin(a, i, thread, threads, c)) continue;
      const int32_t head = c / a.head_dim, d = c % a.head_dim;
      float x[N];
      normed(a, 0, q[i], inverse.x, c, turned + d / 2, x);
      store_floats<WIDE>(static_cast<T*>(a.q) + token.row * a.width + c, x);
      normed(a, 1, k[i], inverse.y, c, turned + d / 2, x);
#pragma unroll
      for (int32_t n = 0; n < kMostPlaces; ++n)
        if (n < a.places && places[n].k >= 0)
          store_floats<WIDE>(a.k.data, a.k.dtype, places[n].k + head * a.k.stride_h + d, x);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = to_float(v[i].e[j]);
#pragma unroll
      for (int32_t n = 0; n < kMostPlaces; ++n)
        if (n < a.places && places[n].v >= 0)
          store_floats<WIDE>(a.v.data, a.v.dtype, places[n].v + head * a.v.stride_h + d, x);
    }
  }

  HIAR_HD static void normed(const AppendArgs& a, int which, const Pack<T, N>& pack, float inverse, int32_t c,
                             const float2* turned, float (&x)[N]) {
    float weight[N];
    load_floats<WIDE>(a.weights[which], a.weight_dtypes[which], c, weight);
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const float even = to_float(pack.e[j]) * inverse * weight[j];
      const float odd = to_float(pack.e[j + 1]) * inverse * weight[j + 1];
      const float2 turn = turned[j / 2];
      x[j] = even * turn.x - odd * turn.y;
      x[j + 1] = even * turn.y + odd * turn.x;
    }
  }
};

template <int N, int PER>
constexpr int kMostThreads = PER == 1 ? 320 : kMostWidth / N / PER;

#ifdef HIAR_EMULATE

// What the threads of a block have in common before they write: 1 / rms of q and of k, and turned.
template <typename Thread>
float2 begin_block(std::vector<Thread>& block, const AppendArgs& a, const Token& token, std::vector<float2>& turned) {
  const int threads = static_cast<int>(block.size());
  for (int pair = 0; pair < a.head_dim / 2; ++pair) turned[pair] = turn_of(a, token, pair);
  std::vector<float2> share(threads);
  for (int i = 0; i < threads; ++i) {
    block[i].load(a, token, i, threads);
    share[i] = block[i].squares(a, i, threads);
  }
  float2 sum = make_float2(0, 0);
  for (int warp = 0; warp < threads; warp += 32) {
    for (int lanes = 16; lanes > 0; lanes /= 2)
      for (int i = warp; i < warp + lanes; ++i) share[i].x += share[i + lanes].x, share[i].y += share[i + lanes].y;
    sum.x += share[warp].x, sum.y += share[warp].y;
  }
  return make_float2(inverse_rms(sum.x, a), inverse_rms(sum.y, a));
}

#endif

void launch(const AppendArgs& a, cudaStream_t stream);

}  // namespace hiar
