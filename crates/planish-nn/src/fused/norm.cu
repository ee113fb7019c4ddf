// h = x + y + u b, n = norm(h) * w. A block does ROWS rows.
constexpr int V = 8;
constexpr int WARPS = THREADS / 32;
constexpr int PASSES = (D + THREADS * V - 1) / (THREADS * V);
const float eps = __int_as_float(EPS_BITS);
const int first = blockIdx.x * ROWS;
__shared__ float inner[R > 0 ? R : 1][ROWS];
__shared__ float partial[ROWS][WARPS];
for (int i = threadIdx.x; i < R * ROWS; i += THREADS) {
  const int row = i / (R > 0 ? R : 1), r = i % (R > 0 ? R : 1);
  inner[r][row] = first + row < N ? static_cast<float>(u[(size_t)(first + row) * R + r]) : 0.0f;
}
__syncthreads();

float value[PASSES][ROWS][V];
float squares[ROWS] = {};
#pragma unroll
for (int pass = 0; pass < PASSES; ++pass) {
  const int column = (pass * THREADS + threadIdx.x) * V;
  if (column < D) {
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      const size_t at = (size_t)min(first + row, N - 1) * D + column;
      float one[V];
      planish_load<V>(x + at, one);
      planish_load<V>(y + at, value[pass][row]);
#pragma unroll
      for (int v = 0; v < V; ++v) value[pass][row][v] += one[v];
    }
#pragma unroll 8
    for (int r = 0; r < R; ++r) {
      float factor[V];
      planish_load<V>(b + (size_t)r * D + column, factor);
#pragma unroll
      for (int row = 0; row < ROWS; ++row) {
        const float of_rank = inner[r][row];
#pragma unroll
        for (int v = 0; v < V; ++v) value[pass][row][v] += of_rank * factor[v];
      }
    }
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        // What is written is what is normed.
        value[pass][row][v] = static_cast<float>(static_cast<T>(value[pass][row][v]));
        squares[row] += value[pass][row][v] * value[pass][row][v];
      }
      if (first + row < N) planish_store<V>(h + (size_t)(first + row) * D + column, value[pass][row]);
    }
  }
}
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
for (int row = 0; row < ROWS; ++row) {
  const float one = planish_warp_sum(squares[row]);
  if (lane == 0) partial[row][warp] = one;
}
__syncthreads();
#pragma unroll
for (int row = 0; row < ROWS; ++row) {
  if (first + row >= N) break;
  float sum = 0.0f;
  for (int i = 0; i < WARPS; ++i) sum += partial[row][i];
  const float scale = rsqrtf(sum / D + eps);
#pragma unroll
  for (int pass = 0; pass < PASSES; ++pass) {
    const int column = (pass * THREADS + threadIdx.x) * V;
    if (column < D) {
      float gain[V];
      planish_load<V>(w + column, gain);
#pragma unroll
      for (int v = 0; v < V; ++v) gain[v] *= value[pass][row][v] * scale;
      planish_store<V>(n + (size_t)(first + row) * D + column, gain);
    }
  }
}
