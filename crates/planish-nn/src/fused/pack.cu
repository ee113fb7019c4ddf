// Row i * R + r of `packed` is scale[i] times column r of the i-th of up to three matrices [D, R]; sizes are D, R, and how many.
const int D = sizes[0], R = sizes[1], count = sizes[2];
const int column = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
if (column >= D || row >= R * count) return;
const int i = row / R, r = row % R;
const T* from = i == 0 ? a0 : i == 1 ? a1 : a2;
packed[(size_t)row * D + column] = static_cast<T>(scales[i] * static_cast<float>(from[(size_t)column * R + r]));
