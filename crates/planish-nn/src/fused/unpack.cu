// The way back from pack.cu for gradients.
const int D = sizes[0], R = sizes[1], count = sizes[2];
const int column = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
if (column >= D || row >= R * count) return;
const int i = row / R, r = row % R;
T* to = i == 0 ? a0 : i == 1 ? a1 : a2;
to[(size_t)column * R + r] = static_cast<T>(scales[i] * static_cast<float>(packed[(size_t)row * D + column]));
