// What the kernels are written in. Every function here, and all work of a thread in the headers beside it, compiles for
// the device and for the host, so that the very same index arithmetic runs in tests without a GPU (HIAR_EMULATE).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <type_traits>

#define HIAR_HD __host__ __device__ __forceinline__

namespace hiar {

enum class Dtype : int32_t { Float, Half, BFloat16 };

HIAR_HD int size_of(Dtype dtype) { return dtype == Dtype::Float ? 4 : 2; }

HIAR_HD float to_float(float x) { return x; }
HIAR_HD float to_float(__half x) { return __half2float(x); }
HIAR_HD float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
HIAR_HD T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(x);
  else return __float2bfloat16_rn(x);
}

// float32 within +-448, or NaN -> the bits of e4m3, to the nearest, ties to even.
HIAR_HD uint32_t to_e4m3(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t magnitude = bits & 0x7fffffff, sign = bits >> 24 & 0x80;
  if (magnitude > 0x7f800000) return 0x7f | sign;
  if (magnitude >= 0x3c800000)  // 20 bits of the mantissa go; the exponent's bias falls from 127 to 7
    return (((magnitude + 0x7ffff + (magnitude >> 20 & 1)) >> 20) - ((127 - 7) << 3)) | sign;
  // below 2^-6 the format's steps are 2^-9: those of float32 at 2^14, which an addition rounds to
  const float raised = fabsf(x) + 16384.0f;
  memcpy(&bits, &raised, 4);
  return (bits - 0x46800000) | sign;
}

// Of two numbers, the first in the low byte.
HIAR_HD uint32_t to_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t two;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(two) : "f"(high), "f"(low));
  return two;
#else
  return to_e4m3(low) | to_e4m3(high) << 8;
#endif
}

// N neighbours in memory. WIDE: they begin at a multiple of min(16, their bytes) and move in pieces of that size.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  T e[N];
};

template <int BYTES> struct Piece { using Type = uint4; };
template <> struct Piece<8> { using Type = uint2; };
template <> struct Piece<4> { using Type = uint32_t; };

template <typename P>
HIAR_HD P read_only(const P* p) {
#ifdef __CUDA_ARCH__
  return __ldg(p);
#else
  return *p;
#endif
}

// What a device would answer with a fault that kills the process.
template <typename P>
HIAR_HD void check_aligned(const void* at) {
#if defined(HIAR_EMULATE) && !defined(__CUDA_ARCH__)
  if (reinterpret_cast<uintptr_t>(at) % sizeof(P) != 0) throw std::runtime_error("misaligned access");
#else
  (void)at;
#endif
}

// From memory that nobody writes while the kernel runs.
template <bool WIDE, typename T, int N>
HIAR_HD void load(const T* from, Pack<T, N>& to) {
  if constexpr (WIDE) {
    using P = typename Piece<sizeof(Pack<T, N>)>::Type;
    check_aligned<P>(from);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(to) / sizeof(P)); ++i) {
      const P piece = read_only(reinterpret_cast<const P*>(from) + i);
      memcpy(reinterpret_cast<char*>(&to) + i * sizeof(P), &piece, sizeof(P));
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to.e[i] = from[i];
  }
}

template <bool WIDE, typename T, int N>
HIAR_HD void store(T* to, const Pack<T, N>& from) {
  if constexpr (WIDE) {
    using P = typename Piece<sizeof(Pack<T, N>)>::Type;
    check_aligned<P>(to);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(from) / sizeof(P)); ++i) {
      P piece;
      memcpy(&piece, reinterpret_cast<const char*>(&from) + i * sizeof(P), sizeof(P));
      reinterpret_cast<P*>(to)[i] = piece;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from.e[i];
  }
}

template <bool WIDE, typename T, int N>
HIAR_HD void load_floats(const T* from, float (&to)[N]) {
  Pack<T, N> pack;
  load<WIDE>(from, pack);
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(pack.e[i]);
}

template <bool WIDE, typename T, int N>
HIAR_HD void store_floats(T* to, const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.e[i] = from_float<T>(from[i]);
  store<WIDE>(to, pack);
}

// The same where the type is known at run time only: one branch that all threads take alike.
template <bool WIDE, int N>
HIAR_HD void load_floats(const void* base, Dtype dtype, int64_t at, float (&to)[N]) {
  if (dtype == Dtype::BFloat16) load_floats<WIDE>(static_cast<const __nv_bfloat16*>(base) + at, to);
  else if (dtype == Dtype::Half) load_floats<WIDE>(static_cast<const __half*>(base) + at, to);
  else load_floats<WIDE>(static_cast<const float*>(base) + at, to);
}

template <bool WIDE, int N>
HIAR_HD void store_floats(void* base, Dtype dtype, int64_t at, const float (&from)[N]) {
  if (dtype == Dtype::BFloat16) store_floats<WIDE>(static_cast<__nv_bfloat16*>(base) + at, from);
  else if (dtype == Dtype::Half) store_floats<WIDE>(static_cast<__half*>(base) + at, from);
  else store_floats<WIDE>(static_cast<float*>(base) + at, from);
}

// launch(T()) with the type that is known at run time only.
template <typename Launch>
void with_type(Dtype dtype, Launch launch) {
  if (dtype == Dtype::Float) launch(float());
  else if (dtype == Dtype::Half) launch(__half());
  else launch(__nv_bfloat16());
}

// Whether packs of n numbers at these multiples of strides may move WIDE.
template <typename... Strides>
bool aligned(const void* base, Dtype dtype, int n, Strides... strides) {
  const int64_t bytes = n * size_of(dtype) < 16 ? n * size_of(dtype) : 16;
  bool ok = reinterpret_cast<uintptr_t>(base) % bytes == 0;
  ((ok = ok && strides * size_of(dtype) % bytes == 0), ...);
  return ok;
}

}  // namespace hiar
