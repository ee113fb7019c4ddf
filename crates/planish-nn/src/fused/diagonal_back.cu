// The matrices on the diagonal of diagonal.cu.
const int R = sizes[0], D = sizes[1] + sizes[2] + sizes[3];
const int column = blockIdx.x * THREADS + threadIdx.x, r = blockIdx.y;
if (column >= D || r >= R) return;
const int i = column < sizes[1] ? 0 : column < sizes[1] + sizes[2] ? 1 : 2;
const int at = column - (i > 0 ? sizes[1] : 0) - (i > 1 ? sizes[2] : 0);
T* to = i == 0 ? b0 : i == 1 ? b1 : b2;
to[(size_t)r * sizes[1 + i] + at] = matrix[(size_t)(i * R + r) * D + column];
