// Turns the gradients of query and key back and lays those of query, key and value beside each other.
constexpr int V = 4;
constexpr int HALF = HD / 2;
constexpr int ITEMS = D / (2 * V);
const int item = blockIdx.y * THREADS + threadIdx.x;
if (item >= ITEMS) return;
const int head = item / (HALF / V), i = item % (HALF / V) * V, column = head * HD + i;
const int part = head < H ? 0 : head < H + K ? 1 : 2;
const T* from = part == 0 ? dq : part == 1 ? dk : dv;
const int width = (part == 0 ? H : K) * HD;
const int at = column - (part == 0 ? 0 : part == 1 ? H * HD : (H + K) * HD);
for (int row = 0; row < ROWS; ++row) {
  const int n = blockIdx.x * ROWS + row;
  if (n >= N) break;
  float one[V], other[V];
  planish_load<V>(from + (size_t)n * width + at, one);
  planish_load<V>(from + (size_t)n * width + at + HALF, other);
  if (part < 2) {
    float c[V], s[V];
    planish_load<V>(cosines + (size_t)(n % TABLE) * HALF + i, c);
    planish_load<V>(sines + (size_t)(n % TABLE) * HALF + i, s);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const float turned = one[j] * c[j] + other[j] * s[j];
      other[j] = other[j] * c[j] - one[j] * s[j];
      one[j] = turned;
    }
  }
  planish_store<V>(dy + (size_t)n * D + column, one);
  planish_store<V>(dy + (size_t)n * D + column + HALF, other);
}
