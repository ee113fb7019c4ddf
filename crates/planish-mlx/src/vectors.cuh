// Neighbouring numbers read and written at once, computed with in f32; and sums over a warp.

template <typename T, int N>
struct alignas(sizeof(T) * N) PlanishPack {
  T v[N];
};

template <typename T, int N>
__device__ inline void planish_unpack(const PlanishPack<T, N>& from, float* to) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = static_cast<float>(from.v[i]);
}

template <int N, typename T>
__device__ inline void planish_load(const T* from, float* to) {
  constexpr int W = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    planish_unpack(*reinterpret_cast<const PlanishPack<T, W>*>(from + i), to + i);
  }
}

template <int N, typename T>
__device__ inline void planish_store(T* to, const float* from) {
  constexpr int W = sizeof(T) * N > 16 ? 16 / sizeof(T) : N;
#pragma unroll
  for (int i = 0; i < N; i += W) {
    PlanishPack<T, W> pack;
#pragma unroll
    for (int j = 0; j < W; ++j) pack.v[j] = static_cast<T>(from[i + j]);
    *reinterpret_cast<PlanishPack<T, W>*>(to + i) = pack;
  }
}

__device__ inline float planish_warp_sum(float x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}
