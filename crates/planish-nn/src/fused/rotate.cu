// Rows [H query heads | K key heads | K value heads]: adds the low-rank update u b, turns query and key by their positions, and
// writes the three apart. A thread has four columns of each half of a head, in ROWS rows.
constexpr int V = 4;
constexpr int HALF = HD / 2;
constexpr int ITEMS = D / (2 * V);
constexpr int TOTAL = 3 * R;
const int item = blockIdx.y * THREADS + threadIdx.x;
const int first = blockIdx.x * ROWS;
__shared__ float inner[ROWS][R > 0 ? TOTAL : 1];
for (int i = threadIdx.x; i < TOTAL * ROWS; i += THREADS) {
  const int row = i / (R > 0 ? TOTAL : 1), r = i % (R > 0 ? TOTAL : 1);
  inner[row][r] = first + row < N ? static_cast<float>(u[(size_t)(first + row) * TOTAL + r]) : 0.0f;
}
__syncthreads();
if (item >= ITEMS) return;

const int head = item / (HALF / V), i = item % (HALF / V) * V, column = head * HD + i;
const int part = head < H ? 0 : head < H + K ? 1 : 2;
float low[R > 0 ? R : 1][V], high[R > 0 ? R : 1][V];
#pragma unroll
for (int r = 0; r < R; ++r) {
  planish_load<V>(b + (size_t)(part * R + r) * D + column, low[r]);
  planish_load<V>(b + (size_t)(part * R + r) * D + column + HALF, high[r]);
}
T* out = part == 0 ? q : part == 1 ? k : v;
const int width = (part == 0 ? H : K) * HD;
const int at = column - (part == 0 ? 0 : part == 1 ? H * HD : (H + K) * HD);
using Pack = PlanishPack<T, V>;
Pack next[2][2];
auto fetch = [&](int place, int n) {
  const T* from = y + (size_t)min(n, N - 1) * D + column;
  next[place][0] = *reinterpret_cast<const Pack*>(from);
  next[place][1] = *reinterpret_cast<const Pack*>(from + HALF);
};
fetch(0, first);
fetch(1, first + 1);
#pragma unroll
for (int row = 0; row < ROWS; ++row) {
  const int n = first + row;
  if (n >= N) break;
  float one[V], other[V];
  planish_unpack(next[row % 2][0], one);
  planish_unpack(next[row % 2][1], other);
  fetch(row % 2, n + 2);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float of_rank = inner[row][part * R + r];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      one[j] += of_rank * low[r][j];
      other[j] += of_rank * high[r][j];
    }
  }
  if (part < 2) {
    float c[V], s[V];
    planish_load<V>(cosines + (size_t)(n % TABLE) * HALF + i, c);
    planish_load<V>(sines + (size_t)(n % TABLE) * HALF + i, s);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float turned = one[j] * c[j] - other[j] * s[j];
      other[j] = other[j] * c[j] + one[j] * s[j];
      one[j] = turned;
    }
  }
  planish_store<V>(out + (size_t)n * width + at, one);
  planish_store<V>(out + (size_t)n * width + at + HALF, other);
}
