// qk_norm_rope_append_fp8: q and k normed over the full width and turned, a block for a token; then k and v into the
// ring in 8 bits, values transposed, a block for a tile of a frame and head.
#include "qk_norm_rope_append_fp8.h"

namespace hiar {
namespace {

#ifdef HIAR_EMULATE

template <typename T, int N, bool WIDE, int PER>
void launch_tokens(const AppendFp8Args& f, const AppendPlan& plan, cudaStream_t) {
  const AppendArgs& a = f.in;
  if (plan.threads > kMostThreads<N, PER>) throw std::runtime_error("more threads than the kernel may have");
  std::vector<AppendFp8Thread<T, N, WIDE, PER>> block(plan.threads);
  std::vector<float2> turned(a.head_dim / 2);
  for (int32_t b = 0; b < a.blocks; ++b) {
    const Token token(a, b);
    std::vector<uint32_t> largest(3 * f.heads);
    const float2 inverse = begin_block(block, a, token, turned);
    for (int i = 0; i < plan.threads; ++i) block[i].turn(f, token, i, plan.threads, inverse, turned.data(), largest.data());
    for (int i = 0; i < plan.threads; ++i) block[i].finish(f, token, i, plan.threads, largest.data());
  }
}

template <typename T, bool WIDE>
void launch_tiles(const AppendFp8Args& f, cudaStream_t) {
  for (int32_t z = 0; z < f.in.blocks / f.in.frame_tokens; ++z)
    for (int32_t y = 0; y < f.heads; ++y)
      for (int32_t x = 0; x < Tile::blocks(f); ++x) {
        const Tile tile(f, x, y, z);
        std::vector<uint8_t> shared(kTileChannels * kTileRow, 0xff);
        Fp8Place places[kMostPlaces];
        for (int n = 0; n < f.in.places; ++n) places[n] = Fp8Place::of(f, tile, n);
        float2 most = make_float2(0, 0);
        for (int i = 0; i < kTileThreads; ++i) {
          const float2 mine = TileThread<T, WIDE>{f, tile, i}.largest();
          most = make_float2(bigger(most.x, mine.x), bigger(most.y, mine.y));
        }
        const float2 scale = make_float2(scale_of(most.x), scale_of(most.y));
        for (int i = 0; i < kTileThreads; ++i) {
          const TileThread<T, WIDE> thread{f, tile, i};
          thread.scales(scale, places);
          thread.keys(scale.x, places);
          thread.stage(scale.y, shared.data());
        }
        for (int i = 0; i < kTileThreads; ++i) TileThread<T, WIDE>{f, tile, i}.values(shared.data(), places);
      }
}

#else

// Blocks of an SM are named, so that ptxas does not spill for the sake of more of them (sm_100, sm_120).
template <typename T, int N, bool WIDE, int PER>
__global__ void __launch_bounds__(kMostThreads<N, PER>, PER == 1 ? 3 : 1)
    tokens_of_qk_norm_rope_append_fp8_kernel(const __grid_constant__ AppendFp8Args f) {
  extern __shared__ float2 turned[];  // [D / 2], then the largest numbers [3, H]
  __shared__ float2 shares[32];
  const AppendArgs& a = f.in;
  uint32_t* const largest = reinterpret_cast<uint32_t*>(turned + a.head_dim / 2);
  const int thread = threadIdx.x, threads = blockDim.x;
  const Token token(a, blockIdx.x);
  AppendFp8Thread<T, N, WIDE, PER> mine;
  mine.load(a, token, thread, threads);
  for (int pair = thread; pair < a.head_dim / 2; pair += threads) turned[pair] = turn_of(a, token, pair);
  for (int i = thread; i < 3 * f.heads; i += threads) largest[i] = 0;
  float2 sum = mine.squares(a, thread, threads);
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    sum.x += __shfl_xor_sync(0xffffffff, sum.x, lanes);
    sum.y += __shfl_xor_sync(0xffffffff, sum.y, lanes);
  }
  if (thread % 32 == 0) shares[thread / 32] = sum;
  __syncthreads();
  sum = make_float2(0, 0);
  for (int warp = 0; warp < threads / 32; ++warp) sum.x += shares[warp].x, sum.y += shares[warp].y;
  mine.turn(f, token, thread, threads, make_float2(inverse_rms(sum.x, a), inverse_rms(sum.y, a)), turned, largest);
  __syncthreads();
  mine.finish(f, token, thread, threads, largest);
}

template <typename T, int N, bool WIDE, int PER>
void launch_tokens(const AppendFp8Args& f, const AppendPlan& plan, cudaStream_t stream) {
  const size_t shared = f.in.head_dim / 2 * sizeof(float2) + 3 * f.heads * sizeof(uint32_t);
  tokens_of_qk_norm_rope_append_fp8_kernel<T, N, WIDE, PER><<<f.in.blocks, plan.threads, shared, stream>>>(f);
}

template <typename T, bool WIDE>
__global__ void __launch_bounds__(kTileThreads, 4)
    tiles_of_qk_norm_rope_append_fp8_kernel(const __grid_constant__ AppendFp8Args f) {
  __shared__ alignas(16) uint8_t shared[kTileChannels * kTileRow];
  __shared__ float2 shares[kTileThreads / 32];
  __shared__ Fp8Place places[kMostPlaces];
  const Tile tile(f, blockIdx.x, blockIdx.y, blockIdx.z);
  const TileThread<T, WIDE> thread{f, tile, static_cast<int>(threadIdx.x)};
  float2 most = thread.largest();
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    most.x = bigger(most.x, __shfl_xor_sync(0xffffffff, most.x, lanes));
    most.y = bigger(most.y, __shfl_xor_sync(0xffffffff, most.y, lanes));
  }
  if (threadIdx.x % 32 == 0) shares[threadIdx.x / 32] = most;
  if (threadIdx.x < f.in.places) places[threadIdx.x] = Fp8Place::of(f, tile, threadIdx.x);
  __syncthreads();
#pragma unroll
  for (int warp = 0; warp < kTileThreads / 32; ++warp)
    most = make_float2(bigger(most.x, shares[warp].x), bigger(most.y, shares[warp].y));
  const float2 scale = make_float2(scale_of(most.x), scale_of(most.y));
  thread.scales(scale, places);
  thread.keys(scale.x, places);
  thread.stage(scale.y, shared);
  __syncthreads();
  thread.values(shared, places);
}

template <typename T, bool WIDE>
void launch_tiles(const AppendFp8Args& f, cudaStream_t stream) {
  const dim3 grid(Tile::blocks(f), f.heads, f.in.blocks / f.in.frame_tokens);
  tiles_of_qk_norm_rope_append_fp8_kernel<T, WIDE><<<grid, kTileThreads, 0, stream>>>(f);
}

#endif

template <typename T>
void launch_type(const AppendFp8Args& f, cudaStream_t stream) {
  constexpr int N = 16 / sizeof(T);
  const AppendPlan plan = AppendPlan::of(f.in);
  if (!plan.wide) launch_tokens<T, 2, false, 8>(f, plan, stream);
  else if (plan.per == 1) launch_tokens<T, N, true, 1>(f, plan, stream);
  else launch_tokens<T, N, true, 2>(f, plan, stream);
  if (wide_tiles(f)) launch_tiles<T, true>(f, stream);
  else launch_tiles<T, false>(f, stream);
}

}  // namespace

void launch(const AppendFp8Args& f, cudaStream_t stream) {
  with_type(f.in.dtype, [&](auto number) { launch_type<decltype(number)>(f, stream); });
}

}  // namespace hiar
