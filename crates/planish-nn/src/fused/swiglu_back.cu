// Gradients of swiglu.cu with respect to gate and up; that of h is dh + du a, what came back through the product h a^T. Gives h once
// more. Rows are fetched as there.
constexpr int V = 4;
constexpr int TOTAL = 2 * R;
const int column = (blockIdx.y * THREADS + threadIdx.x) * V;
const int first = blockIdx.x * ROWS;
__shared__ float inner[ROWS][R > 0 ? TOTAL : 1];
__shared__ float below[ROWS][RD > 0 ? RD : 1];
for (int i = threadIdx.x; i < TOTAL * ROWS; i += THREADS) {
  const int row = i / (R > 0 ? TOTAL : 1), r = i % (R > 0 ? TOTAL : 1);
  inner[row][r] = first + row < N ? static_cast<float>(u[(size_t)(first + row) * TOTAL + r]) : 0.0f;
}
for (int i = threadIdx.x; i < RD * ROWS; i += THREADS) {
  const int row = i / (RD > 0 ? RD : 1), r = i % (RD > 0 ? RD : 1);
  below[row][r] = first + row < N ? static_cast<float>(du[(size_t)(first + row) * RD + r]) : 0.0f;
}
__syncthreads();
if (column >= F) return;

using Pack = PlanishPack<T, V>;
Pack next_gate[2], next_up[2], next_gradient[2];
auto fetch = [&](int place, int n) {
  const size_t at = (size_t)min(n, N - 1) * F + column;
  next_gate[place] = *reinterpret_cast<const Pack*>(gate + at);
  next_up[place] = *reinterpret_cast<const Pack*>(up + at);
  next_gradient[place] = *reinterpret_cast<const Pack*>(dh + at);
};
fetch(0, first);
fetch(1, first + 1);
float of_gate[R > 0 ? R : 1][V], of_up[R > 0 ? R : 1][V], of_down[RD > 0 ? RD : 1][V];
#pragma unroll
for (int r = 0; r < R; ++r) {
  planish_load<V>(b_gate + (size_t)r * F + column, of_gate[r]);
  planish_load<V>(b_up + (size_t)r * F + column, of_up[r]);
}
#pragma unroll
for (int r = 0; r < RD; ++r) planish_load<V>(a + (size_t)r * F + column, of_down[r]);
for (int pair = 0; pair < ROWS; pair += 2) {
#pragma unroll
  for (int place = 0; place < 2; ++place) {
    const int row = pair + place, n = first + row;
    float g[V], p[V], gradient[V], again[V];
    planish_unpack(next_gate[place], g);
    planish_unpack(next_up[place], p);
    planish_unpack(next_gradient[place], gradient);
    fetch(place, n + 2);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const float one = inner[row][r], other = inner[row][R + r];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        g[j] += one * of_gate[r][j];
        p[j] += other * of_up[r][j];
      }
    }
#pragma unroll
    for (int r = 0; r < RD; ++r) {
      const float one = below[row][r];
#pragma unroll
      for (int j = 0; j < V; ++j) gradient[j] += one * of_down[r][j];
    }
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float sigmoid = __fdividef(1.0f, 1.0f + __expf(-g[j])), silu = g[j] * sigmoid;
      again[j] = silu * p[j];
      g[j] = gradient[j] * p[j] * sigmoid * (1.0f + g[j] * (1.0f - sigmoid));
      p[j] = gradient[j] * silu;
    }
    if (n < N) {
      const size_t at = (size_t)n * F + column;
      planish_store<V>(d_gate + at, g);
      planish_store<V>(d_up + at, p);
      planish_store<V>(h + at, again);
    }
  }
}
