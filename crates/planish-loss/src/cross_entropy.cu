// Cross-entropy of rows of logits [C, N] with its gradient softmax(logits) - onehot(target). A block does a row: once for the largest
// number and the sum of exponentials together, once for the gradient, when the row is still in the L2 cache.
constexpr int WARPS = THREADS / 32;
__shared__ float largest[WARPS], sums[WARPS];
const T* row = logits + (size_t)blockIdx.x * N;
T* out = gradient + (size_t)blockIdx.x * N;

float most = -3.0e38f, sum = 0.0f;
auto take = [&](const float* x) {
  float most_here = x[0];
#pragma unroll
  for (int j = 1; j < V; ++j) most_here = fmaxf(most_here, x[j]);
  if (most_here > most) {
    sum *= __expf(most - most_here);
    most = most_here;
  }
#pragma unroll
  for (int j = 0; j < V; ++j) sum += __expf(x[j] - most);
};
int start = threadIdx.x * V;
for (; start + THREADS * V < N; start += 2 * THREADS * V) {
  float x[V], y[V];
  planish_load<V>(row + start, x);
  planish_load<V>(row + start + THREADS * V, y);
  take(x);
  take(y);
}
if (start < N) {
  float x[V];
  planish_load<V>(row + start, x);
  take(x);
}
const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
float all = most;
#pragma unroll
for (int step = 16; step > 0; step /= 2) all = fmaxf(all, __shfl_xor_sync(0xffffffffu, all, step));
sum = planish_warp_sum(sum * __expf(most - all));
if (lane == 0) {
  largest[warp] = all;
  sums[warp] = sum;
}
__syncthreads();
most = largest[0];
for (int i = 1; i < WARPS; ++i) most = fmaxf(most, largest[i]);
sum = 0.0f;
for (int i = 0; i < WARPS; ++i) sum += sums[i] * __expf(largest[i] - most);
const float log_sum = most + logf(sum);
const int target = targets[blockIdx.x];
if (threadIdx.x == 0) nll[blockIdx.x] = log_sum - static_cast<float>(row[target]);

auto give = [&](int at, float* x) {
#pragma unroll
  for (int j = 0; j < V; ++j) x[j] = __expf(x[j] - log_sum) - (at + j == target ? 1.0f : 0.0f);
  planish_store<V>(out + at, x);
};
for (start = threadIdx.x * V; start + THREADS * V < N; start += 2 * THREADS * V) {
  float x[V], y[V];
  planish_load<V>(row + start, x);
  planish_load<V>(row + start + THREADS * V, y);
  give(start, x);
  give(start + THREADS * V, y);
}
if (start < N) {
  float x[V];
  planish_load<V>(row + start, x);
  give(start, x);
}
