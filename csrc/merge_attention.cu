// merge_attention: n partial attentions in one pass, each read where it lies.
#include "merge_attention.h"

namespace hiar {
namespace {

#ifdef HIAR_EMULATE

template <typename T, int N, bool WIDE>
void launch_one(const MergeArgs& a, const MergePlan& plan, uint32_t blocks, cudaStream_t) {
  for (uint32_t block = 0; block < blocks; ++block)
    for (int y = 0; y < plan.y; ++y)
      for (int x = 0; x < plan.x; ++x) merge_thread<T, N, WIDE>(a, block, x, y, plan.x, plan.y);
}

#else

template <typename T, int N, bool WIDE>
__global__ void __launch_bounds__(256, 6) merge_attention_kernel(const __grid_constant__ MergeArgs a) {
  merge_thread<T, N, WIDE>(a, blockIdx.x, threadIdx.x, threadIdx.y, blockDim.x, blockDim.y);
}

template <typename T, int N, bool WIDE>
void launch_one(const MergeArgs& a, const MergePlan& plan, uint32_t blocks, cudaStream_t stream) {
  merge_attention_kernel<T, N, WIDE><<<blocks, dim3(plan.x, plan.y), 0, stream>>>(a);
}

#endif

template <typename T>
void launch_type(const MergeArgs& a, cudaStream_t stream) {
  const MergePlan plan = MergePlan::of(a);
  const uint32_t blocks = (a.rows + plan.y - 1) / plan.y;
  if (plan.wide) launch_one<T, 16 / sizeof(T), true>(a, plan, blocks, stream);
  else launch_one<T, 1, false>(a, plan, blocks, stream);
}

}  // namespace

void launch(const MergeArgs& a, cudaStream_t stream) {
  with_type(a.dtype, [&](auto number) { launch_type<decltype(number)>(a, stream); });
}

}  // namespace hiar
