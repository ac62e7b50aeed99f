// ring_advance: the ring state of all rows in one launch, a warp for a row.
#include "ring_advance.h"

namespace hiar {

#ifdef HIAR_EMULATE

void launch(const RingArgs& a, cudaStream_t) {
  for (int32_t row = 0; row < a.rows; ++row) {
    for (int32_t lane = 31; lane >= 0; --lane) ring_visit(a, row, lane, 32);
    ring_move(a, row);
  }
}

#else

namespace {

constexpr int kRows = 4;  // of a block

__global__ void __launch_bounds__(kRows * 32) ring_advance_kernel(const __grid_constant__ RingArgs a) {
  const int32_t row = static_cast<int32_t>(blockIdx.x) * kRows + static_cast<int32_t>(threadIdx.x) / 32;
  const int32_t lane = threadIdx.x % 32;
  if (row >= a.rows) return;
  ring_visit(a, row, lane, 32);
  __syncwarp();
  if (lane == 0) ring_move(a, row);
}

}  // namespace

void launch(const RingArgs& a, cudaStream_t stream) {
  ring_advance_kernel<<<(a.rows + kRows - 1) / kRows, kRows * 32, 0, stream>>>(a);
}

#endif

}  // namespace hiar
