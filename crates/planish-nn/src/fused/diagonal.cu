// Three matrices [R, width] on the diagonal of one; sizes are R and the widths.
const int R = sizes[0], D = sizes[1] + sizes[2] + sizes[3];
const int column = blockIdx.x * THREADS + threadIdx.x, row = blockIdx.y;
if (column >= D || row >= 3 * R) return;
const int i = column < sizes[1] ? 0 : column < sizes[1] + sizes[2] ? 1 : 2;
const int at = column - (i > 0 ? sizes[1] : 0) - (i > 1 ? sizes[2] : 0);
const T* from = i == 0 ? b0 : i == 1 ? b1 : b2;
const bool is_own = row / R == i;
matrix[(size_t)row * D + column] = is_own ? from[(size_t)(row - i * R) * sizes[1 + i] + at] : static_cast<T>(0.0f);
