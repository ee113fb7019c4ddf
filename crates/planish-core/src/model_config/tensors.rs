//! The one place that knows the name and shape of every weight, in the Hugging Face layout.

use super::{ModelConfig, QuantizationConfig, QuantizationMode};

/// Name and shape of one tensor of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Such as `model.layers.0.self_attn.q_proj.weight`.
    pub name: String,
    /// Row-major; a linear weight is `[output_dims, input_dims]`.
    pub shape: Vec<usize>,
}

/// One linear layer: `y = x Wᵀ (+ bias)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Module path, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Width of `x`.
    pub input_dims: usize,
    /// Width of `y`.
    pub output_dims: usize,
    /// Whether there is a bias `[output_dims]`.
    pub has_bias: bool,
}

impl ModelConfig {
    /// Every tensor that the checkpoint of such a model holds, in the order of the computation.
    ///
    /// For a quantised model: `weight` (u32, packed), `scales` and, for the affine mode, `biases` of each quantised module.
    pub fn expected_tensors(&self) -> Vec<TensorSpec> {
        let mut list = TensorList {
            quantization: self.quantization.as_ref(),
            specs: Vec::new(),
        };
        list.matrix("model.embed_tokens", self.vocab_size, self.hidden_size);
        for layer_idx in 0..self.n_layers {
            let block = format!("model.layers.{layer_idx}");
            list.vector(format!("{block}.input_layernorm.weight"), self.hidden_size);
            for linear in self.block_linears(layer_idx) {
                list.matrix(&linear.path, linear.output_dims, linear.input_dims);
                if linear.has_bias {
                    list.vector(format!("{}.bias", linear.path), linear.output_dims);
                }
            }
            if self.qk_norm {
                list.vector(format!("{block}.self_attn.q_norm.weight"), self.head_dim);
                list.vector(format!("{block}.self_attn.k_norm.weight"), self.head_dim);
            }
            list.vector(format!("{block}.post_attention_layernorm.weight"), self.hidden_size);
        }
        list.vector("model.norm.weight".into(), self.hidden_size);
        if !self.tie_word_embeddings {
            list.matrix("lm_head", self.vocab_size, self.hidden_size);
        }
        list.specs
    }

    /// The linear layers of all blocks, in the order of the computation: what an adapter can attach to. The head and the
    /// embedding are not among them.
    pub fn block_linear_layers(&self) -> Vec<LinearSpec> {
        (0..self.n_layers)
            .flat_map(|layer_idx| self.block_linears(layer_idx))
            .collect()
    }

    fn block_linears(&self, layer_idx: usize) -> [LinearSpec; 7] {
        let (d, ff) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim);
        let (qkv_bias, o_bias) = (self.attention_qkv_bias, self.attention_output_bias);
        let linear = |name: &str, input_dims, output_dims, has_bias| LinearSpec {
            path: format!("model.layers.{layer_idx}.{name}"),
            input_dims,
            output_dims,
            has_bias,
        };
        [
            linear("self_attn.q_proj", d, q, qkv_bias),
            linear("self_attn.k_proj", d, kv, qkv_bias),
            linear("self_attn.v_proj", d, kv, qkv_bias),
            linear("self_attn.o_proj", q, d, o_bias),
            linear("mlp.gate_proj", d, ff, self.mlp_bias),
            linear("mlp.up_proj", d, ff, self.mlp_bias),
            linear("mlp.down_proj", ff, d, self.mlp_bias),
        ]
    }
}

struct TensorList<'a> {
    quantization: Option<&'a QuantizationConfig>,
    specs: Vec<TensorSpec>,
}

impl TensorList<'_> {
    fn vector(&mut self, name: String, dims: usize) {
        self.specs.push(TensorSpec {
            name,
            shape: vec![dims],
        });
    }

    /// A matrix that quantisation may have packed: `bits` bits an input in 32-bit words, one scale a group.
    fn matrix(&mut self, path: &str, output_dims: usize, input_dims: usize) {
        let Some(layer) = self.quantization.and_then(|q| q.for_module(path)) else {
            self.specs.push(TensorSpec {
                name: format!("{path}.weight"),
                shape: vec![output_dims, input_dims],
            });
            return;
        };
        let words = input_dims * layer.bits / 32;
        let groups = vec![output_dims, input_dims / layer.group_size];
        self.specs.push(TensorSpec {
            name: format!("{path}.weight"),
            shape: vec![output_dims, words],
        });
        self.specs.push(TensorSpec {
            name: format!("{path}.scales"),
            shape: groups.clone(),
        });
        if layer.mode == QuantizationMode::Affine {
            self.specs.push(TensorSpec {
                name: format!("{path}.biases"),
                shape: groups,
            });
        }
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
            ("model.layers.0.mlp.gate_proj.weight", vec![96, 64]),
            ("model.layers.0.mlp.up_proj.weight", vec![96, 64]),
            ("model.layers.0.mlp.down_proj.weight", vec![64, 96]),
            ("model.layers.0.self_attn.q_norm.weight", vec![32]),
            ("model.layers.0.self_attn.k_norm.weight", vec![32]),
            ("model.layers.0.post_attention_layernorm.weight", vec![64]),
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
