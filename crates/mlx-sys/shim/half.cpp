// The half-precision accessors that mlx-c leaves out where <arm_fp16.h> does not exist. src/half.rs declares them.
#include <cstdint>

#include "mlx/c/error.h"
#include "mlx/c/private/array.h"

namespace {
using mlx::core::bfloat16_t;
using mlx::core::float16_t;
static_assert(sizeof(float16_t) == 2 && sizeof(bfloat16_t) == 2);

template <typename T>
int item(T* out, mlx_array array) {
  try {
    *out = mlx_array_get_(array).item<T>();
    return 0;
  } catch (std::exception& e) {
    mlx_error(e.what());
    return 1;
  }
}

template <typename T>
const T* data(mlx_array array) {
  try {
    return mlx_array_get_(array).data<T>();
  } catch (std::exception& e) {
    mlx_error(e.what());
    return nullptr;
  }
}
} // namespace

extern "C" {
int mlx_array_item_float16(float16_t* out, mlx_array array) {
  return item(out, array);
}
int mlx_array_item_bfloat16(bfloat16_t* out, mlx_array array) {
  return item(out, array);
}
const float16_t* mlx_array_data_float16(mlx_array array) {
  return data<float16_t>(array);
}
const bfloat16_t* mlx_array_data_bfloat16(mlx_array array) {
  return data<bfloat16_t>(array);
}
}
