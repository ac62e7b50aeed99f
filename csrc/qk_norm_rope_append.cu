// qk_norm_rope_append: q and k normed over the full width and turned, k and v into the ring; a block for a token.
#include "qk_norm_rope_append.h"

namespace hiar {
namespace {

#ifdef HIAR_EMULATE

template <typename T, int N, bool WIDE, int PER>
void launch_one(const AppendArgs& a, const AppendPlan& plan, cudaStream_t) {
  if (plan.threads > kMostThreads<N, PER>) throw std::runtime_error("more threads than the kernel may have");
  std::vector<AppendThread<T, N, WIDE, PER>> block(plan.threads);
  std::vector<float2> turned(a.head_dim / 2);
  for (int32_t b = 0; b < a.blocks; ++b) {
    const Token token(a, b);
    const float2 inverse = begin_block(block, a, token, turned);
    Place places[kMostPlaces];
    for (int n = 0; n < a.places; ++n) places[n] = Place::of(a, token, n);
    for (int i = 0; i < plan.threads; ++i) block[i].finish(a, token, i, plan.threads, inverse, turned.data(), places);
  }
}

#else

template <typename T, int N, bool WIDE, int PER>
__global__ void __launch_bounds__(kMostThreads<N, PER>)
    qk_norm_rope_append_kernel(const __grid_constant__ AppendArgs a) {
  extern __shared__ float2 turned[];  // [D / 2]
  __shared__ float2 shares[32];
  __shared__ Place places[kMostPlaces];
  const int thread = threadIdx.x, threads = blockDim.x;
  const Token token(a, blockIdx.x);
  AppendThread<T, N, WIDE, PER> mine;
  mine.load(a, token, thread, threads);
  for (int pair = thread; pair < a.head_dim / 2; pair += threads) turned[pair] = turn_of(a, token, pair);
  float2 sum = mine.squares(a, thread, threads);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum.x += __shfl_xor_sync(0xffffffff, sum.x, lanes);
    sum.y += __shfl_xor_sync(0xffffffff, sum.y, lanes);
  }
  if (thread % 32 == 0) shares[thread / 32] = sum;
  if (thread < a.places) places[thread] = Place::of(a, token, thread);
  __syncthreads();
  sum = make_float2(0, 0);
  for (int warp = 0; warp < threads / 32; ++warp) sum.x += shares[warp].x, sum.y += shares[warp].y;
  mine.finish(a, token, thread, threads, make_float2(inverse_rms(sum.x, a), inverse_rms(sum.y, a)), turned, places);
}

template <typename T, int N, bool WIDE, int PER>
void launch_one(const AppendArgs& a, const AppendPlan& plan, cudaStream_t stream) {
  const size_t shared = a.head_dim / 2 * sizeof(float2);
  qk_norm_rope_append_kernel<T, N, WIDE, PER><<<a.blocks, plan.threads, shared, stream>>>(a);
}

#endif

template <typename T>
void launch_type(const AppendArgs& a, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const AppendPlan plan = AppendPlan::of(a);
  if (!plan.wide) launch_one<T, 2, false, 8>(a, plan, stream);
  else if (plan.per == 1) launch_one<T, N, true, 1>(a, plan, stream);
  else launch_one<T, N, true, 2>(a, plan, stream);
}

}  // namespace

void launch(const AppendArgs& a, cudaStream_t stream) {
  with_type(a.dtype, [&](auto number) { launch_type<decltype(number)>(a, stream); });
}

}  // namespace hiar
