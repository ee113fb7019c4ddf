// A primitive whose evaluation on the CPU is a function from Rust. src/host_kernel.rs is the other side.
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "mlx/c/error.h"
#include "mlx/c/private/enums.h"
#include "mlx/c/private/vector.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace mx = mlx::core;

extern "C" {
// Row-contiguous memory of one input or output.
struct planish_buffer {
  void* data;
  size_t bytes;
};
// Returns 0, or 1 when the kernel failed.
using planish_run = int (*)(void* state, const planish_buffer* inputs, size_t n_inputs, const planish_buffer* outputs, size_t n_outputs);
using planish_drop = void (*)(void* state);
}

namespace {
struct State {
  void* pointer;
  planish_run run;
  planish_drop drop;
  State(void* pointer, planish_run run, planish_drop drop) : pointer(pointer), run(run), drop(drop) {}
  // A copy would free what the original refers to.
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    drop(pointer);
  }
};

class HostKernel : public mx::Primitive {
 public:
  HostKernel(mx::Stream stream, std::string name, std::shared_ptr<State> state)
      : mx::Primitive(stream), name_(std::move(name)), state_(std::move(state)) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    std::vector<planish_buffer> in, out;
    for (const auto& array : inputs) {
      // The graph makes every input contiguous before it comes here.
      in.push_back({const_cast<char*>(array.data<char>()), array.nbytes()});
    }
    for (auto& array : outputs) {
      array.set_data(mx::allocator::malloc(array.nbytes()));
      out.push_back({array.data<char>(), array.nbytes()});
    }
    // MLX keeps inputs and outputs alive until the stream has run this.
    auto task = [state = state_, name = name_, in = std::move(in), out = std::move(out)]() {
      if (state->run(state->pointer, in.data(), in.size(), out.data(), out.size()) != 0) {
        throw std::runtime_error("host kernel " + name + " failed");
      }
    };
    mx::cpu::get_command_encoder(stream()).dispatch(std::move(task));
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::runtime_error("host kernel " + name_ + " runs on the CPU only");
  }

  const char* name() const override {
    return name_.c_str();
  }

 private:
  std::string name_;
  std::shared_ptr<State> state_;
};
} // namespace

// Adds a call of `run` to the graph. Takes ownership of `pointer` whatever happens. `shapes` holds all output shapes end to
// end, `ndims` how many axes each has.
extern "C" int planish_host_kernel(
    mlx_vector_array* result,
    const char* name,
    void* pointer,
    planish_run run,
    planish_drop drop,
    const mlx_vector_array inputs,
    const int* shapes,
    const size_t* ndims,
    const mlx_dtype* dtypes,
    size_t n_outputs) {
  std::shared_ptr<State> state(new State{pointer, run, drop});
  try {
    auto stream = mx::default_stream(mx::Device(mx::Device::cpu));
    std::vector<mx::array> contiguous;
    for (const auto& array : mlx_vector_array_get_(inputs)) {
      contiguous.push_back(mx::contiguous(array, false, stream));
    }
    std::vector<mx::Shape> output_shapes;
    std::vector<mx::Dtype> output_dtypes;
    for (size_t index = 0; index < n_outputs; index++) {
      output_shapes.emplace_back(shapes, shapes + ndims[index]);
      output_dtypes.push_back(mlx_dtype_to_cpp(dtypes[index]));
      shapes += ndims[index];
    }
    auto primitive = std::make_shared<HostKernel>(stream, name, std::move(state));
    auto outputs = mx::array::make_arrays(std::move(output_shapes), output_dtypes, primitive, contiguous);
    mlx_vector_array_set_(*result, std::move(outputs));
    return 0;
  } catch (std::exception& e) {
    mlx_error(e.what());
    return 1;
  }
}
