//! CPU kernels over plain slices: vectorised, parallel, and without MLX.
//!
//! MLX's own CPU operations run on one thread, a lane at a time where a function is not a plain sum or product. These do
//! the work of a training step in few passes over memory. Each comes with its gradient and is tested against its
//! definition in f64; `planish-nn` and `planish-loss` put them into MLX's graph.
//!
//! Legend: `t` tokens, `d` hidden width, `v` vocabulary; arrays are f32, row by row, without gaps. Every kernel spreads over
//! the threads of the rayon pool it is called from. Lengths that do not fit are a programming error and panic.

mod attention;
mod cross_entropy;
mod elementwise;
mod packed;
mod simd;
mod skinny;
mod threads;
mod vector;

pub use attention::{AttentionShape, Forward, Projections, Rotation, attention, attention_backward};
pub use cross_entropy::{linear_cross_entropy, softmax_gradient, softmax_gradients};
pub use elementwise::{rms_norm, rms_norm_backward, swiglu, swiglu_backward};
pub use packed::{LowRank, PackedLinear, PackedMatrix};
pub use simd::{Level, level};
pub use skinny::{skinny_product, skinny_transposed_product, transpose};
pub use threads::on_pool;
pub use vector::matrix_vector;
