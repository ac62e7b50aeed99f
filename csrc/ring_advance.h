// ring_advance: what one thread does. A warp (or any group of `lanes` threads) serves a row.
#pragma once

#include "portable.h"

namespace hiar {

struct RingArgs {
  int32_t* position;
  int32_t* frames;
  int32_t* slots;
  int32_t* ring;
  const int32_t* advance;
  const int32_t* capacities;
  int64_t stride_position, stride_frames, stride_slots, stride_ring, stride_advance, stride_capacities;
  int32_t rows, count, columns;  // count: frames of a visit; columns: of ring
  int32_t first_frame, sink;
};

HIAR_HD int32_t ring_slot(int32_t g, int32_t size, int32_t sink) {
  if (g < sink && g < size) return g;
  const int32_t round_trip = size > sink ? size - sink : 1;
  return sink + (g - sink) % round_trip;
}

HIAR_HD void ring_visit(const RingArgs& a, int32_t row, int32_t lane, int32_t lanes) {
  const int32_t position = a.position[row * a.stride_position], size = a.capacities[row * a.stride_capacities];
  for (int32_t i = lane; i < a.count; i += lanes) {
    const int32_t g = position + i, slot = ring_slot(g, size, a.sink), frame = a.first_frame + g;
    a.frames[row * a.stride_frames + i] = frame;
    a.slots[row * a.stride_slots + i] = slot;
    if (slot < a.columns) a.ring[row * a.stride_ring + slot] = frame;  // never into other memory
  }
}

// After every lane has read the position.
HIAR_HD void ring_move(const RingArgs& a, int32_t row) {
  a.position[row * a.stride_position] += a.advance[row * a.stride_advance];
}

void launch(const RingArgs& a, cudaStream_t stream);

}  // namespace hiar
