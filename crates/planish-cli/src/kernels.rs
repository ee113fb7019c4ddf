//! What a training run computes with.

use anyhow::Result;
use planish_core::run_config::{Compat, Compile, KernelChoice, LoraInit, LoraMethod, RunConfig};
use planish_nn::Kernels;

/// What the configuration asks for, or the fastest on the chosen device that can train what shall be trained.
pub(crate) fn for_training(config: &RunConfig) -> Result<Kernels> {
    Ok(match config.model.kernels {
        // Its arithmetic is that of MLX's operations.
        KernelChoice::Auto if config.train.compat == Compat::MlxLm => Kernels::Composed,
        KernelChoice::Auto if config.train.compile == Compile::True => Kernels::fastest_compiled()?,
        // DoRA needs the norms of the weights in every step, PiSSA and full fine-tuning change the weights.
        KernelChoice::Auto if config.lora.method == LoraMethod::Lora && config.lora.init == LoraInit::Zero => {
            Kernels::fastest()?
        }
        KernelChoice::Auto => Kernels::fastest_f32()?,
        KernelChoice::Composed => Kernels::Composed,
        KernelChoice::Native => Kernels::Native,
        KernelChoice::NativeBf16 => Kernels::NativeBf16,
        KernelChoice::Fused => Kernels::Fused,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parity_with_mlx_lm_is_computed_by_mlx_operations() {
        let config = |compat: &str| {
            let builder = RunConfig::builder().set(&format!("train.compat={compat}")).unwrap();
            builder.build().unwrap()
        };
        assert_eq!(for_training(&config("mlx-lm")).unwrap(), Kernels::Composed);
        assert_eq!(for_training(&config("none")).unwrap(), Kernels::fastest().unwrap());
    }

    #[test]
    fn compiled_updates_get_kernels_that_can_be_compiled() {
        let builder = RunConfig::builder().set("train.compile=true").unwrap();
        assert!(!for_training(&builder.build().unwrap()).unwrap().is_native());
    }
}
