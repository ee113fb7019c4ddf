//! What a training run computes with.

use planish_core::run_config::{Compat, Compile, KernelChoice, LoraInit, LoraMethod, RunConfig};
use planish_nn::{Kernels, LoadOptions, Purpose};

/// How to load the model for what the configuration asks for.
pub(crate) fn for_training(config: &RunConfig) -> LoadOptions {
    let kernels = match config.model.kernels {
        // Its arithmetic is that of MLX's operations.
        KernelChoice::Auto if config.train.compat == Compat::MlxLm => Some(Kernels::Composed),
        KernelChoice::Auto => None,
        KernelChoice::Composed => Some(Kernels::Composed),
        KernelChoice::Native => Some(Kernels::Native),
        KernelChoice::NativeBf16 => Some(Kernels::NativeBf16),
        KernelChoice::Fused => Some(Kernels::Fused),
    };
    // DoRA needs the norms of the weights in every step, PiSSA and full fine-tuning change the weights.
    let purpose = match (config.lora.method, config.lora.init) {
        (LoraMethod::Lora, LoraInit::Zero) => Purpose::Adapters,
        _ => Purpose::Weights,
    };
    LoadOptions {
        kernels,
        purpose,
        is_compiled: config.train.compile == Compile::True,
        ..LoadOptions::default()
    }
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
        assert_eq!(for_training(&config("mlx-lm")).kernels, Some(Kernels::Composed));
        assert_eq!(for_training(&config("none")).kernels, None);
    }
}
