//! Name and shape of every tensor in a model's files, quantisation included.

use super::{LinearSpec, ModelConfig, QuantizationMode};
use crate::arch::ArchTensor;

/// Name and shape of one tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major; a linear weight is `[output_dims, input_dims]`.
    pub shape: Vec<usize>,
}

impl ModelConfig {
    /// Every tensor that the checkpoint of such a model holds, in the order of the computation.
    ///
    /// For a quantised model: `weight` (u32, packed), `scales` and, for the affine mode, `biases` of each quantised module.
    pub fn expected_tensors(&self) -> Vec<TensorSpec> {
        self.arch
            .tensors()
            .iter()
            .flat_map(|tensor| self.stored(tensor))
            .collect()
    }

    /// The linear layers of all blocks, in the order of the computation: [`Arch::linears`](crate::arch::Arch::linears).
    pub fn block_linear_layers(&self) -> Vec<LinearSpec> {
        self.arch.linears()
    }

    /// What the files hold of one tensor: a matrix may be packed, `bits` bits per input in 32-bit words, one scale per group.
    fn stored(&self, tensor: &ArchTensor) -> Vec<TensorSpec> {
        let quantization = self.quantization.as_ref().and_then(|q| q.for_module(&tensor.module));
        let spec = |kind: &str, shape: Vec<usize>| TensorSpec {
            name: format!("{}.{kind}", tensor.module),
            shape,
        };
        let (&[output_dims, input_dims], Some(layer)) = (tensor.shape.as_slice(), quantization) else {
            return vec![spec(tensor.kind, tensor.shape.clone())];
        };
        let groups = vec![output_dims, input_dims / layer.group_size];
        let mut stored = vec![
            spec("weight", vec![output_dims, input_dims * layer.bits / 32]),
            spec("scales", groups.clone()),
        ];
        if layer.mode == QuantizationMode::Affine {
            stored.push(spec("biases", groups));
        }
        stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(extra: &str) -> ModelConfig {
        let json = format!(
            r#"{{"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 32,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 10{extra}}}"#
        );
        ModelConfig::from_json_str(&json, "config.json".as_ref()).unwrap()
    }

    fn listed(config: &ModelConfig) -> Vec<(String, Vec<usize>)> {
        config
            .expected_tensors()
            .into_iter()
            .map(|t| (t.name, t.shape))
            .collect()
    }

    #[test]
    fn qwen3_block_is_complete() {
        let expect: Vec<(String, Vec<usize>)> = [
            ("model.embed_tokens.weight", vec![10, 64]),
            ("model.layers.0.input_layernorm.weight", vec![64]),
            ("model.layers.0.self_attn.q_proj.weight", vec![128, 64]),
            ("model.layers.0.self_attn.k_proj.weight", vec![64, 64]),
            ("model.layers.0.self_attn.v_proj.weight", vec![64, 64]),
            ("model.layers.0.self_attn.o_proj.weight", vec![64, 128]),
            ("model.layers.0.self_attn.q_norm.weight", vec![32]),
            ("model.layers.0.self_attn.k_norm.weight", vec![32]),
            ("model.layers.0.post_attention_layernorm.weight", vec![64]),
            ("model.layers.0.mlp.gate_proj.weight", vec![96, 64]),
            ("model.layers.0.mlp.up_proj.weight", vec![96, 64]),
            ("model.layers.0.mlp.down_proj.weight", vec![64, 96]),
            ("model.norm.weight", vec![64]),
            ("lm_head.weight", vec![10, 64]),
        ]
        .map(|(name, shape)| (name.to_string(), shape))
        .to_vec();
        assert_eq!(listed(&config("")), expect);
    }

    #[test]
    fn tied_model_has_no_head() {
        assert!(
            !listed(&config(r#", "tie_word_embeddings": true"#))
                .iter()
                .any(|(name, _)| name.starts_with("lm_head"))
        );
    }

    #[test]
    fn quantised_modules_are_packed_and_exceptions_are_not() {
        let quantised = config(
            r#", "quantization": {"group_size": 32, "bits": 4, "lm_head": false,
                 "model.layers.0.mlp.up_proj": {"group_size": 64, "bits": 6}}"#,
        );
        let tensors = listed(&quantised);
        let shape = |name: &str| tensors.iter().find(|(n, _)| n == name).map(|(_, s)| s.clone());
        assert_eq!(shape("model.embed_tokens.weight"), Some(vec![10, 8]));
        assert_eq!(shape("model.embed_tokens.scales"), Some(vec![10, 2]));
        assert_eq!(shape("model.embed_tokens.biases"), Some(vec![10, 2]));
        assert_eq!(shape("model.layers.0.mlp.up_proj.weight"), Some(vec![96, 12]));
        assert_eq!(shape("model.layers.0.mlp.up_proj.scales"), Some(vec![96, 1]));
        assert_eq!(shape("lm_head.weight"), Some(vec![10, 64]));
        assert_eq!(shape("lm_head.scales"), None);
        assert_eq!(shape("model.norm.scales"), None);
    }

    #[test]
    fn seven_linear_layers_a_block() {
        let layers = config("").block_linear_layers();
        assert_eq!(layers.len(), 7);
        assert_eq!(layers[3].path, "model.layers.0.self_attn.o_proj");
        assert_eq!((layers[3].input_dims, layers[3].output_dims), (128, 64));
    }
}
