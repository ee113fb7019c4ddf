// Gradient of h (passed on), n = norm(h) * w and n a^T with respect to h, and, where there is an a, n once more. A block does ROWS
// rows.
constexpr int V = 8;
constexpr int WARPS = THREADS / 32;
constexpr int PASSES = (D + THREADS * V - 1) / (THREADS * V);
const float eps = __int_as_float(EPS_BITS);
const int first = blockIdx.x * ROWS;
__shared__ float rank_gradients[R > 0 ? R : 1][ROWS];
__shared__ float partial[2 * ROWS][WARPS];
for (int i = threadIdx.x; i < R * ROWS; i += THREADS) {
  const int row = i / (R > 0 ? R : 1), r = i % (R > 0 ? R : 1);
  rank_gradients[r][row] = first + row < N ? static_cast<float>(du[(size_t)(first + row) * R + r]) : 0.0f;
}
__syncthreads();

using Pack = PlanishPack<T, V>;
Pack residual[PASSES][ROWS];
float g[PASSES][ROWS][V], value[PASSES][ROWS][V];
float squares[ROWS] = {}, products[ROWS] = {};
#pragma unroll
for (int pass = 0; pass < PASSES; ++pass) {
  const int column = (pass * THREADS + threadIdx.x) * V;
  if (column < D) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const size_t at = (size_t)min(first + row, N - 1) * D + column;
      planish_load<V>(dn + at, g[pass][row]);
      planish_load<V>(x + at, value[pass][row]);
      residual[pass][row] = *reinterpret_cast<const Pack*>(dh + at);
    }
#pragma unroll 8
    for (int r = 0; r < R; ++r) {
      float factor[V];
      planish_load<V>(a + (size_t)r * D + column, factor);
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float of_rank = rank_gradients[r][row];
#pragma unroll
        for (int v = 0; v < V; ++v) g[pass][row][v] += of_rank * factor[v];
      }
    }
    float gain[V];
    planish_load<V>(w + column, gain);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        g[pass][row][v] *= gain[v];
        squares[row] += value[pass][row][v] * value[pass][row][v];
        products[row] += g[pass][row][v] * value[pass][row][v];
      }
    }
  }
}
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
for (int row = 0; row < ROWS; ++row) {
  const float one = planish_warp_sum(squares[row]), other = planish_warp_sum(products[row]);
  if (lane == 0) {
    partial[2 * row][warp] = one;
    partial[2 * row + 1][warp] = other;
  }
}
__syncthreads();
#pragma unroll
for (int row = 0; row < ROWS; ++row) {
  if (first + row >= N) break;
  float of_squares = 0.0f, of_products = 0.0f;
  for (int i = 0; i < WARPS; ++i) {
    of_squares += partial[2 * row][i];
    of_products += partial[2 * row + 1][i];
  }
  const float scale = rsqrtf(of_squares / D + eps);
  const float slope = scale * scale * scale * of_products / D;
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int column = (pass * THREADS + threadIdx.x) * V;
    if (column < D) {
      float out[V];
      planish_unpack(residual[pass][row], out);
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] += scale * g[pass][row][v] - slope * value[pass][row][v];
      const size_t at = (size_t)(first + row) * D + column;
      planish_store<V>(dx + at, out);
      if (R > 0) {
        float gain[V];
        planish_load<V>(w + column, gain);
#pragma unroll
        for (int v = 0; v < V; ++v) gain[v] *= value[pass][row][v] * scale;
        planish_store<V>(n + at, gain);
      }
    }
  }
}
