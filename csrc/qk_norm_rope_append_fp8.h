// qk_norm_rope_append_fp8: what one thread does, in two launches. The scale of a frame and head needs all its tokens.
//   tokens   a block for a token, as in qk_norm_rope_append.h:
//       load -> squares -> (sum over the block) -> turn: q, k, the largest numbers of each head -> finish
//   tiles    a block for 64 keys and 128 channels of a frame and head:
//       largest -> (largest over the block) -> keys, stage (values, transposed in shared memory) -> values
#pragma once

#include "qk_norm_rope_append.h"

namespace hiar {

struct Bytes {  // e4m3 in a ring: [rows, slots * frame_tokens, H, D], or values [rows, slots, H, D, places]
  uint8_t* data;
  int64_t stride_r, stride_t, stride_h, stride_d;  // stride_t: of a token, or of a slot
};

struct Scales {  // [rows, slots, H]
  float* data;
  int64_t stride_r, stride_s, stride_h;
};

struct AppendFp8Args {
  AppendArgs in;  // its k is memory for keys as qk_norm_rope rounds them, [B, T, H, D]; v the same; q bytes or of qkv's dtype
  float* q_scales;  // [B, T, H]; null: q is not quantised
  float* parts;     // [2, B, F, H, frame_tokens]: the largest |k|, then |v| of a token and head; inf: one is not finite
  Bytes k, v;
  Scales k_scales, v_scales;
  int32_t frames, heads, places;  // of a row of the batch; of the keys of a frame, a multiple of 16
};

constexpr int kMostHeads = 2048;
constexpr float kInfinity = __builtin_huge_valf();

HIAR_HD float bigger(float a, float b) { return a > b ? a : b; }

// |x|, inf where x is not finite.
HIAR_HD float magnitude(float x) {
  x = fabsf(x);
  return x < kInfinity ? x : kInfinity;
}

template <typename T, int N>
HIAR_HD float largest_in(const Pack<T, N>& pack) {
  float largest = 0;
#pragma unroll
  for (int j = 0; j < N; ++j) largest = bigger(largest, magnitude(to_float(pack.e[j])));
  return largest;
}

HIAR_HD float scale_of(float largest) { return bigger(largest / 448.0f, 1.1754943508222875e-38f); }
HIAR_HD float stored_scale(float scale) { return scale < kInfinity ? scale : 1.0f; }

// x / scale in e4m3; NaN where the scale is inf.
HIAR_HD float divided(float x, float scale) {
  return scale < kInfinity ? fminf(fmaxf(x / scale, -448.0f), 448.0f) : __builtin_nanf("");
}

template <int N>
HIAR_HD void quantize(const float (&x)[N], float scale, Pack<uint8_t, N>& to) {
#pragma unroll
  for (int j = 0; j < N; j += 2) {
    const uint32_t two = to_e4m3(divided(x[j], scale), divided(x[j + 1], scale));
    to.e[j] = static_cast<uint8_t>(two);
    to.e[j + 1] = static_cast<uint8_t>(two >> 8);
  }
}

// Tokens

HIAR_HD void raise(uint32_t* largest, float x) {  // the order of floats of at least 0 is that of their bits
  uint32_t bits;
  memcpy(&bits, &x, 4);
#ifdef __CUDA_ARCH__
  atomicMax(largest, bits);
#else
  *largest = *largest > bits ? *largest : bits;
#endif
}

HIAR_HD float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

template <typename T, int N, bool WIDE, int PER>
struct AppendFp8Thread : AppendThread<T, N, WIDE, PER> {
  using Base = AppendThread<T, N, WIDE, PER>;

  // largest [3, H], 0 before: of q, k, v of each head.
  HIAR_HD void turn(const AppendFp8Args& f, const Token& token, int thread, int threads, float2 inverse,
                    const float2* turned, uint32_t* largest) {
    const AppendArgs& a = f.in;
    int32_t c;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (!Base::begin(a, i, thread, threads, c)) continue;
      const int32_t head = c / a.head_dim, d = c % a.head_dim;
      rounded(a, 0, this->q[i], inverse.x, c, turned + d / 2);
      if (f.q_scales) raise(largest + head, largest_in(this->q[i]));
      else store<WIDE>(static_cast<T*>(a.q) + token.row * a.width + c, this->q[i]);
      rounded(a, 1, this->k[i], inverse.y, c, turned + d / 2);
      store<WIDE>(static_cast<T*>(a.k.data) + token.row * a.width + c, this->k[i]);
      raise(largest + f.heads + head, largest_in(this->k[i]));
      raise(largest + 2 * f.heads + head, largest_in(this->v[i]));
    }
  }

  HIAR_HD void finish(const AppendFp8Args& f, const Token& token, int thread, int threads,
                      const uint32_t* largest) const {
    const AppendArgs& a = f.in;
    int32_t c;
    if (f.q_scales) {
#pragma unroll
      for (int i = 0; i < PER; ++i) {
        if (!Base::begin(a, i, thread, threads, c)) continue;
        float x[N];
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] = to_float(this->q[i].e[j]);
        Pack<uint8_t, N> values;
        quantize(x, scale_of(as_float(largest[c / a.head_dim])), values);
        store<WIDE>(static_cast<uint8_t*>(a.q) + token.row * a.width + c, values);
      }
    }
    const int64_t frames = static_cast<int64_t>(a.blocks) / a.frame_tokens;  // of the batch
    float* const parts = f.parts + (token.batch * f.frames + token.frame) * f.heads * a.frame_tokens + token.cell;
    for (int head = thread; head < f.heads; head += threads) {
      if (f.q_scales) f.q_scales[token.row * f.heads + head] = stored_scale(scale_of(as_float(largest[head])));
      parts[static_cast<int64_t>(head) * a.frame_tokens] = as_float(largest[f.heads + head]);
      parts[(frames * f.heads + head) * a.frame_tokens] = as_float(largest[2 * f.heads + head]);
    }
  }

  HIAR_HD static void rounded(const AppendArgs& a, int which, Pack<T, N>& pack, float inverse, int32_t c,
                              const float2* turned) {
    float x[N];
    Base::normed(a, which, pack, inverse, c, turned, x);
#pragma unroll
    for (int j = 0; j < N; ++j) pack.e[j] = from_float<T>(x[j]);
  }
};

// Tiles

constexpr int kTileKeys = 64, kTileChannels = 128, kTileThreads = 256;
constexpr int kTileRow = kTileKeys + 16;  // bytes of a channel in shared memory, so that few channels share a bank

struct Tile {  // what all threads of a block share
  int32_t first_key, first_channel, head;
  int64_t batch, frame, item;  // item: of all frames of the batch

  HIAR_HD Tile(const AppendFp8Args& f, int32_t x, int32_t y, int32_t z) : head(y), item(z) {
    const int32_t chunks = (f.in.head_dim + kTileChannels - 1) / kTileChannels;
    first_key = x / chunks * kTileKeys;
    first_channel = x % chunks * kTileChannels;
    batch = item / f.frames;
    frame = item % f.frames;
  }

  HIAR_HD static int32_t blocks(const AppendFp8Args& f) {
    return (f.places + kTileKeys - 1) / kTileKeys * ((f.in.head_dim + kTileChannels - 1) / kTileChannels);
  }
};

struct Fp8Place {  // where a frame goes; slot -1: out of range, nothing is written
  int64_t row, slot;

  HIAR_HD static Fp8Place of(const AppendFp8Args& f, const Tile& tile, int32_t n) {
    const AppendArgs& a = f.in;
    const int64_t slot = a.slots.at(n, tile.batch, tile.frame);
    const int64_t row = a.rows.data ? a.rows.at(n, tile.batch, 0) : tile.batch;
    const bool there = slot >= 0 && slot < a.num_slots && row >= 0 && row < a.num_rows;
    return {row, there ? slot : -1};
  }
};

template <typename T, bool WIDE>
struct TileThread {
  const AppendFp8Args& f;
  const Tile& tile;
  int thread;

  // This thread's share of the largest numbers: of keys, of values.
  HIAR_HD float2 largest() const {
    const int32_t tokens = f.in.frame_tokens;
    const int64_t all = static_cast<int64_t>(f.in.blocks) * f.heads;
    const float* const parts = f.parts + (tile.item * f.heads + tile.head) * tokens;
    float2 most = make_float2(0, 0);
    for (int32_t n = thread; n < tokens; n += kTileThreads) {
      most.x = bigger(most.x, parts[n]);
      most.y = bigger(most.y, parts[all + n]);
    }
    return most;
  }

  HIAR_HD void scales(float2 scale, const Fp8Place* places) const {
    if (thread != 0 || tile.first_key != 0 || tile.first_channel != 0) return;
    for (int32_t n = 0; n < f.in.places; ++n) {
      if (places[n].slot < 0) continue;
      const Scales &k = f.k_scales, &v = f.v_scales;
      k.data[places[n].row * k.stride_r + places[n].slot * k.stride_s + tile.head * k.stride_h] = stored_scale(scale.x);
      v.data[places[n].row * v.stride_r + places[n].slot * v.stride_s + tile.head * v.stride_h] = stored_scale(scale.y);
    }
  }

  // Keys: 16 channels of a key at a time, straight into the rings.
  HIAR_HD void keys(float scale, const Fp8Place* places) const {
    const AppendArgs& a = f.in;
    constexpr int kGroups = kTileChannels / 16;
#pragma unroll
    for (int i = thread; i < kTileKeys * kGroups; i += kTileThreads) {
      const int32_t key = tile.first_key + i / kGroups, d = tile.first_channel + i % kGroups * 16;
      if (key >= a.frame_tokens || d >= a.head_dim) continue;
      const int64_t token = tile.item * a.frame_tokens + key;
      float x[16];
      channels<16>(static_cast<const T*>(a.k.data) + token * a.width + tile.head * a.head_dim, d, x);
      Pack<uint8_t, 16> values;
      quantize(x, scale, values);
#pragma unroll
      for (int32_t n = 0; n < kMostPlaces; ++n) {
        if (n >= a.places || places[n].slot < 0) continue;
        const int64_t to = places[n].slot * a.frame_tokens + key;
        put(f.k.data + places[n].row * f.k.stride_r + to * f.k.stride_t + tile.head * f.k.stride_h + d, values,
            a.head_dim - d);
      }
    }
  }

  // Values of 4 neighbouring places and 8 channels: a word for each channel, into shared memory [channel, kTileRow].
  // Places 4 t + {0, 1} of 16 hold keys 2 t + {0, 1}, places 4 t + {2, 3} keys 8 + 2 t + {0, 1}.
  HIAR_HD void stage(float scale, uint8_t* shared) const {
    const AppendArgs& a = f.in;
    constexpr int kGroups = kTileChannels / 8;
    const T* const source = static_cast<const T*>(a.qkv) + tile.batch * a.stride_b + 2 * a.width + tile.head * a.head_dim;
#pragma unroll
    for (int i = thread; i < kTileKeys / 4 * kGroups; i += kTileThreads) {
      const int32_t word = i / kGroups, group = i % kGroups, d = tile.first_channel + group * 8;
      const int32_t first = tile.first_key + word / 4 * 16 + word % 4 * 2;
      if (d >= a.head_dim || tile.first_key + word * 4 >= f.places) continue;
      Pack<uint8_t, 8> values[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int32_t key = first + j % 2 + j / 2 * 8;
        if (key < a.frame_tokens) {
          float x[8];
          channels<8>(source + (tile.frame * a.frame_tokens + key) * a.stride_t, d, x);
          quantize(x, scale, values[j]);
        } else {
          values[j] = {};
        }
      }
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const uint8_t four[4] = {values[0].e[c], values[1].e[c], values[2].e[c], values[3].e[c]};
        memcpy(shared + row(group * 8 + c) * kTileRow + word * 4, four, 4);
      }
    }
  }

  // From shared memory into the rings, 16 places of a channel at a time.
  HIAR_HD void values(const uint8_t* shared, const Fp8Place* places) const {
    const AppendArgs& a = f.in;
    constexpr int kGroups = kTileKeys / 16;
#pragma unroll
    for (int i = thread; i < kTileChannels * kGroups; i += kTileThreads) {
      const int32_t c = i / kGroups, at = i % kGroups * 16, d = tile.first_channel + c;
      if (d >= a.head_dim || tile.first_key + at >= f.places) continue;
      Pack<uint8_t, 16> sixteen;
      memcpy(&sixteen, shared + row(c) * kTileRow + at, 16);
#pragma unroll
      for (int32_t n = 0; n < kMostPlaces; ++n) {
        if (n >= a.places || places[n].slot < 0) continue;
        put(f.v.data + places[n].row * f.v.stride_r + places[n].slot * f.v.stride_t + tile.head * f.v.stride_h +
                d * f.v.stride_d + tile.first_key + at,
            sixteen, 16);
      }
    }
  }

  // Neighbouring threads hold every eighth channel; their rows of shared memory are neighbours.
  HIAR_HD static int32_t row(int32_t channel) { return channel % 8 * (kTileChannels / 8) + channel / 8; }

  template <int N>
  HIAR_HD void channels(const T* from, int32_t d, float (&x)[N]) const {
    if constexpr (WIDE) {
      load_floats<true>(from + d, x);
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = d + j < f.in.head_dim ? to_float(from[d + j]) : 0.0f;
    }
  }

  HIAR_HD static void put(uint8_t* to, const Pack<uint8_t, 16>& from, int32_t count) {
    if constexpr (WIDE) {
      store<true>(to, from);
    } else {
#pragma unroll
      for (int j = 0; j < 16; ++j)
        if (j < count) to[j] = from.e[j];
    }
  }
};

// Whether tiles move 16 bytes at a time.
inline bool wide_tiles(const AppendFp8Args& f) {
  const AppendArgs& a = f.in;
  const auto fits = [](const Bytes& x, int64_t last) {
    return (reinterpret_cast<uintptr_t>(x.data) | x.stride_r | x.stride_t | x.stride_h | last) % 16 == 0;
  };
  const int n = 16 / size_of(a.dtype);
  return a.head_dim % 16 == 0 && aligned(a.qkv, a.dtype, n, a.stride_b, a.stride_t) && fits(f.k, 0) &&
         fits(f.v, f.v.stride_d);
}

void launch(const AppendFp8Args& f, cudaStream_t stream);

}  // namespace hiar
