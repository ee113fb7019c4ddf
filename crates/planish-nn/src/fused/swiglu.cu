// h = silu(g) * p for g = gate + u[:R] b_gate, p = up + u[R:] b_up. A thread has four columns, in ROWS rows; two rows are on their
// way while another is computed.
constexpr int V = 4;
constexpr int TOTAL = 2 * R;
const int column = (blockIdx.y * THREADS + threadIdx.x) * V;
const int first = blockIdx.x * ROWS;
__shared__ float inner[ROWS][R > 0 ? TOTAL : 1];
for (int i = threadIdx.x; i < TOTAL * ROWS; i += THREADS) {
  const int row = i / (R > 0 ? TOTAL : 1), r = i % (R > 0 ? TOTAL : 1);
  inner[row][r] = first + row < N ? static_cast<float>(u[(size_t)(first + row) * TOTAL + r]) : 0.0f;
}
__syncthreads();
if (column >= F) return;

using Pack = PlanishPack<T, V>;
Pack next_gate[2], next_up[2];
auto fetch = [&](int place, int n) {
  const size_t at = (size_t)min(n, N - 1) * F + column;
  next_gate[place] = *reinterpret_cast<const Pack*>(gate + at);
  next_up[place] = *reinterpret_cast<const Pack*>(up + at);
};
fetch(0, first);
fetch(1, first + 1);
float of_gate[R > 0 ? R : 1][V], of_up[R > 0 ? R : 1][V];
#pragma unroll
for (int r = 0; r < R; ++r) {
  planish_load<V>(b_gate + (size_t)r * F + column, of_gate[r]);
  planish_load<V>(b_up + (size_t)r * F + column, of_up[r]);
}
for (int pair = 0; pair < ROWS; pair += 2) {
#pragma unroll
  for (int place = 0; place < 2; ++place) {
    const int row = pair + place, n = first + row;
    float g[V], p[V];
    planish_unpack(next_gate[place], g);
    planish_unpack(next_up[place], p);
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
    for (int j = 0; j < V; ++j) p[j] *= __fdividef(g[j], 1.0f + __expf(-g[j]));
    if (n < N) planish_store<V>(h + (size_t)n * F + column, p);
  }
}
