#include <metal_stdlib>
using namespace metal;

kernel void float_atomics(device atomic<float>* sum [[buffer(0)]], uint lane [[thread_position_in_grid]]) {
  float seen = atomic_load_explicit(sum, memory_order_relaxed);
  while (!atomic_compare_exchange_weak_explicit(sum, &seen, seen + float(lane), memory_order_relaxed, memory_order_relaxed)) {
  }
}

kernel void native_bfloat(device bfloat* out [[buffer(0)]], uint lane [[thread_position_in_grid]]) {
  out[lane] = bfloat(float(lane));
}
