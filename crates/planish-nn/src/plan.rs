//! What computes a model: chosen in one place, part by part, and said together with what stands in the way of something faster.

use std::fmt;

use planish_loss::HeadKernel;
use planish_mlx::Dtype;
use planish_mlx::cuda_kernel;
use planish_mlx::device::{self, DeviceKind};

use crate::decoder::Decoder;
use crate::fused::{FusedAttention, FusedFeedForward};
use crate::{Kernels, Result};

/// What a model is loaded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Purpose {
    /// Training low-rank adapters beside weights that stay as they are.
    #[default]
    Adapters,
    /// Training that reads or changes the weights themselves: all of them, DoRA, PiSSA.
    Weights,
    /// Evaluation and generation, without more rounding than the stored weights have.
    Inference,
}

/// The kernels of a model, and why they are not faster ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChosenKernels {
    /// What computes its blocks.
    pub kernels: Kernels,
    /// What stands in the way of the next faster ones, where something does.
    pub obstacle: Option<&'static str>,
}

impl ChosenKernels {
    /// The fastest kernels on the default device for a model of this dtype (docs/performance.md says what was measured).
    ///
    /// # Errors
    /// [`crate::Error::Mlx`] when the device cannot be asked.
    pub fn fastest(dtype: Dtype, purpose: Purpose, is_compiled: bool) -> Result<Self> {
        Ok(match device::default_kind()? {
            DeviceKind::Gpu if cuda_kernel::is_supported()? => Self::new(Kernels::Fused, None),
            DeviceKind::Gpu => Self::new(
                Kernels::Composed,
                Some("fused kernels need an NVIDIA GPU of compute capability 8"),
            ),
            DeviceKind::Cpu => Self::on_cpu(planish_kernels::level(), dtype, purpose, is_compiled),
        })
    }

    fn on_cpu(level: planish_kernels::Level, dtype: Dtype, purpose: Purpose, is_compiled: bool) -> Self {
        use planish_kernels::Level;
        let has_vectors = level != Level::Portable || cfg!(target_arch = "aarch64");
        let obstacle = match (dtype, purpose) {
            (Dtype::Float32, _) if is_compiled => "kernels of our own for the CPU cannot be compiled into an update",
            (Dtype::Float32, _) if !has_vectors => {
                "this CPU lacks the vector units that native kernels are written for"
            }
            (Dtype::Float32, Purpose::Weights) => "packed bf16 weights cannot be trained or taken apart",
            (Dtype::Float32, Purpose::Inference) => "packed bf16 weights would round what is evaluated",
            (Dtype::Float32, Purpose::Adapters) if level != Level::Avx512Bf16 => {
                "this CPU has no products of bf16 numbers"
            }
            (Dtype::Float32, Purpose::Adapters) => return Self::new(Kernels::NativeBf16, None),
            _ => "native kernels compute in f32",
        };
        let is_native = dtype == Dtype::Float32 && has_vectors && !is_compiled;
        let kernels = if is_native { Kernels::Native } else { Kernels::Composed };
        Self::new(kernels, Some(obstacle))
    }

    fn new(kernels: Kernels, obstacle: Option<&'static str>) -> Self {
        Self { kernels, obstacle }
    }
}

/// What computes each kind of part of a model in training.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What was chosen for the whole model, and why not more.
    pub chosen: ChosenKernels,
    /// Its parts.
    pub parts: Vec<PlannedPart>,
}

/// Parts that are computed in one way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedPart {
    /// Such as `linear layer`.
    pub name: &'static str,
    /// How many there are.
    pub count: usize,
    /// What computes them.
    pub by: &'static str,
    /// What stands in the way of the chosen kernels, where something does.
    pub obstacle: Option<&'static str>,
}

/// What computes a part, and what stands in the way of the chosen kernels.
pub(crate) type Path = (&'static str, Option<&'static str>);

impl Plan {
    /// Of a model with its adapters; `can_fuse`: whether adapters train, all of them of sizes that fused kernels read.
    pub(crate) fn of(chosen: ChosenKernels, decoder: &Decoder, can_fuse: bool, head: &HeadKernel) -> Self {
        let mut plan = Self {
            chosen,
            parts: Vec::new(),
        };
        let sizes = (!can_fuse).then_some("fused blocks train adapters of sizes that are multiples of 8");
        let ropes = (!decoder.has_one_rope()).then_some("rotations that differ between layers");
        for block in &decoder.blocks {
            let (attention, feed_forward) = (&block.attention, &block.feed_forward);
            let norms = block
                .plain_norms()
                .is_none()
                .then_some("norms other than one before each half");
            let of_part =
                |fused: Option<&'static str>, native| of_block(chosen.kernels, sizes.or(norms).or(fused), native);
            let fused = ropes.or(FusedAttention::obstacle(attention));
            plan.add("attention", of_part(fused, attention.native_obstacle()));
            let fused = FusedFeedForward::obstacle(feed_forward);
            plan.add("feed-forward network", of_part(fused, feed_forward.native_obstacle()));
        }
        for (_, linear) in decoder.clone().linears_mut() {
            plan.add("linear layer", linear.path());
        }
        plan.add("loss", of_head(chosen.kernels, head));
        plan
    }

    fn add(&mut self, name: &'static str, (by, obstacle): Path) {
        let alike = |part: &&mut PlannedPart| (part.name, part.by, part.obstacle) == (name, by, obstacle);
        match self.parts.iter_mut().find(alike) {
            Some(part) => part.count += 1,
            None => self.parts.push(PlannedPart {
                name,
                count: 1,
                by,
                obstacle,
            }),
        }
    }
}

/// An attention or a feed-forward network; `fused` and `native`: what stands in the way of its fused block and of its kernel.
fn of_block(kernels: Kernels, fused: Option<&'static str>, native: Option<&'static str>) -> Path {
    match (kernels, fused) {
        (Kernels::Native | Kernels::NativeBf16, _) if native.is_some() => ("MLX operations", native),
        (Kernels::Native | Kernels::NativeBf16, _) => ("native kernel, f32", None),
        (Kernels::Fused, None) => ("fused block in compiled updates", None),
        (Kernels::Fused, obstacle) => ("MLX operations", obstacle),
        (Kernels::Composed, _) => ("MLX operations", None),
    }
}

fn of_head(kernels: Kernels, head: &HeadKernel) -> Path {
    match head {
        HeadKernel::Packed(_) => ("one kernel with the head, bf16", None),
        HeadKernel::Cpu if kernels == Kernels::NativeBf16 => (
            "native kernel after the head, f32",
            Some("the head is more than a product with a packed weight"),
        ),
        HeadKernel::Cpu => ("native kernel after the head, f32", None),
        HeadKernel::Cuda => ("one kernel after the head", None),
        HeadKernel::Composed => ("MLX operations", None),
    }
}

impl fmt::Display for ChosenKernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.kernels.describe(), Reason(self.obstacle))
    }
}

impl fmt::Display for PlannedPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = if self.count == 1 {
            String::new()
        } else {
            format!(" × {}", self.count)
        };
        write!(f, "{}{times}: {}{}", self.name, self.by, Reason(self.obstacle))
    }
}

/// Why not something faster, in brackets.
struct Reason(Option<&'static str>);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(obstacle) => write!(f, " ({obstacle})"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use planish_kernels::Level;

    use super::*;

    #[test]
    fn the_fastest_that_can_do_what_is_wanted_is_chosen_with_its_reason() {
        let choose = |level, dtype, purpose, is_compiled| ChosenKernels::on_cpu(level, dtype, purpose, is_compiled);
        let (best, f32) = (Level::Avx512Bf16, Dtype::Float32);
        let cases = [
            (choose(best, f32, Purpose::Adapters, false), Kernels::NativeBf16, None),
            (
                choose(best, f32, Purpose::Weights, false),
                Kernels::Native,
                Some("trained"),
            ),
            (
                choose(best, f32, Purpose::Inference, false),
                Kernels::Native,
                Some("round"),
            ),
            (
                choose(best, f32, Purpose::Adapters, true),
                Kernels::Composed,
                Some("compiled"),
            ),
            (
                choose(best, Dtype::Bfloat16, Purpose::Adapters, false),
                Kernels::Composed,
                Some("f32"),
            ),
            (
                choose(Level::Avx2, f32, Purpose::Adapters, false),
                Kernels::Native,
                Some("bf16"),
            ),
        ];
        for (choice, kernels, reason) in cases {
            assert_eq!(choice.kernels, kernels, "{choice}");
            match reason {
                Some(reason) => assert!(choice.obstacle.is_some_and(|text| text.contains(reason)), "{choice}"),
                None => assert_eq!(choice.obstacle, None),
            }
        }
    }
}
