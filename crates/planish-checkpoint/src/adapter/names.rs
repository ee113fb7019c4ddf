//! Module paths and the tensors that hang on them.

/// A module path taken apart: `model.layers.3.mlp.up_proj` is layer 3, `mlp.up_proj`, after `model.layers.`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct BlockPath<'a> {
    /// Up to and including the dot before the layer index.
    pub(crate) prefix: &'a str,
    pub(crate) layer_idx: usize,
    /// The name inside the block.
    pub(crate) suffix: &'a str,
}

/// More blocks than any model has. It bounds the zeros that a false layer index can ask for.
const MAX_LAYERS: usize = 4096;

/// Takes the path of a module inside a block apart; `None` for a module outside the blocks.
pub(crate) fn split_block(module: &str) -> Option<BlockPath<'_>> {
    let start = if module.starts_with("layers.") {
        0
    } else {
        module.find(".layers.")? + 1
    } + "layers.".len();
    let (number, suffix) = module[start..].split_once('.')?;
    // No sign, no leading zeros: the path must come back as it was.
    let layer_idx = number
        .parse()
        .ok()
        .filter(|n: &usize| *n < MAX_LAYERS && n.to_string() == number)?;
    Some(BlockPath {
        prefix: &module[..start],
        layer_idx,
        suffix,
    })
}

/// The three kinds of tensors in an mlx-lm adapter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Leaf {
    A,
    B,
    Magnitude,
}

impl Leaf {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::A => "lora_a",
            Self::B => "lora_b",
            Self::Magnitude => "m",
        }
    }
}

/// The tensor name in an mlx-lm adapter.
pub(crate) fn mlx_name(module: &str, leaf: Leaf) -> String {
    format!("{module}.{}", leaf.name())
}

/// Module and kind of an mlx-lm tensor name.
pub(crate) fn split_mlx(name: &str) -> Option<(&str, Leaf)> {
    let (module, leaf) = name.rsplit_once('.')?;
    let leaf = [Leaf::A, Leaf::B, Leaf::Magnitude]
        .into_iter()
        .find(|l| l.name() == leaf)?;
    (!module.is_empty()).then_some((module, leaf))
}

/// Whether a module is an embedding, where no base model can tell.
pub(crate) fn looks_like_embedding(module: &str) -> bool {
    let last = module.rsplit('.').next().unwrap_or(module);
    matches!(
        last,
        "embed_tokens" | "wte" | "word_embeddings" | "tok_embeddings" | "embedding"
    )
}

/// A tensor name of a PEFT adapter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PeftName<'a> {
    /// A low-rank tensor or a magnitude.
    Adapter {
        module: &'a str,
        leaf: Leaf,
        is_embedding: bool,
    },
    /// The bias of `lora_B`.
    Bias,
    /// Anything else: a whole tensor.
    Other,
}

const PEFT_PREFIX: &str = "base_model.model.";

/// Takes a PEFT tensor name apart. Some writers leave the adapter's name (`default`) in it, others the prefix out.
pub(crate) fn split_peft(name: &str) -> PeftName<'_> {
    let path = name.strip_prefix(PEFT_PREFIX).unwrap_or(name);
    let kinds = [
        (".lora_A", Leaf::A, false, true),
        (".lora_B", Leaf::B, false, true),
        (".lora_embedding_A", Leaf::A, true, false),
        (".lora_embedding_B", Leaf::B, true, false),
        (".lora_magnitude_vector", Leaf::Magnitude, false, false),
    ];
    for (marker, leaf, is_embedding, needs_weight) in kinds {
        let Some((module, rest)) = path.rsplit_once(marker) else {
            continue;
        };
        let rest: Vec<&str> = rest.split('.').collect();
        let known = match rest.as_slice() {
            [""] => !needs_weight,
            ["", "weight"] | ["", _, "weight"] => true,
            ["", "bias"] | ["", _, "bias"] => return PeftName::Bias,
            ["", _] => !needs_weight,
            _ => false,
        };
        if known && !module.is_empty() {
            return PeftName::Adapter {
                module,
                leaf,
                is_embedding,
            };
        }
    }
    PeftName::Other
}

/// What a whole tensor of a PEFT adapter is called in the base.
pub(crate) fn base_tensor(name: &str) -> String {
    name.strip_prefix(PEFT_PREFIX)
        .unwrap_or(name)
        .replace(".base_layer.", ".")
}

/// The tensor name in a PEFT adapter.
pub(crate) fn peft_name(module: &str, leaf: Leaf, is_embedding: bool) -> String {
    let end = match (leaf, is_embedding) {
        (Leaf::A, false) => "lora_A.weight",
        (Leaf::B, false) => "lora_B.weight",
        (Leaf::A, true) => "lora_embedding_A",
        (Leaf::B, true) => "lora_embedding_B",
        (Leaf::Magnitude, _) => "lora_magnitude_vector",
    };
    format!("{PEFT_PREFIX}{module}.{end}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_paths() {
        let split = |m| split_block(m).map(|b| (b.prefix, b.layer_idx, b.suffix));
        assert_eq!(
            split("model.layers.13.mlp.up_proj"),
            Some(("model.layers.", 13, "mlp.up_proj"))
        );
        assert_eq!(split("layers.0.q"), Some(("layers.", 0, "q")));
        for outside in [
            "lm_head",
            "model.embed_tokens",
            "model.layers.x.q",
            "model.layers.01.q",
            "model.layers.3",
            "sublayers.1.q",
        ] {
            assert_eq!(split(outside), None, "{outside}");
        }
    }

    #[test]
    fn peft_names_go_there_and_back() {
        for (leaf, is_embedding) in [(Leaf::A, false), (Leaf::B, false), (Leaf::A, true), (Leaf::B, true)] {
            let name = peft_name("model.x", leaf, is_embedding);
            assert_eq!(
                split_peft(&name),
                PeftName::Adapter {
                    module: "model.x",
                    leaf,
                    is_embedding
                }
            );
        }
    }

    #[test]
    fn peft_names_may_keep_the_adapter_name() {
        let expect = |leaf, is_embedding| PeftName::Adapter {
            module: "a.b",
            leaf,
            is_embedding,
        };
        assert_eq!(
            split_peft("base_model.model.a.b.lora_A.default.weight"),
            expect(Leaf::A, false)
        );
        assert_eq!(
            split_peft("base_model.model.a.b.lora_embedding_B.default"),
            expect(Leaf::B, true)
        );
        assert_eq!(
            split_peft("base_model.model.a.b.lora_magnitude_vector.default.weight"),
            expect(Leaf::Magnitude, false)
        );
        assert_eq!(
            split_peft("base_model.model.a.b.lora_magnitude_vector"),
            expect(Leaf::Magnitude, false)
        );
    }

    #[test]
    fn peft_names_may_lack_the_prefix() {
        let expect = PeftName::Adapter {
            module: "model.a",
            leaf: Leaf::A,
            is_embedding: false,
        };
        assert_eq!(split_peft("model.a.lora_A.weight"), expect);
    }

    #[test]
    fn copies_of_the_base_are_named_after_it() {
        assert_eq!(
            base_tensor("base_model.model.lm_head.base_layer.weight"),
            "lm_head.weight"
        );
        assert_eq!(base_tensor("base_model.model.model.norm.weight"), "model.norm.weight");
    }

    #[test]
    fn whole_tensors_and_biases_are_told_apart() {
        assert_eq!(split_peft("base_model.model.lm_head.weight"), PeftName::Other);
        assert_eq!(split_peft("base_model.model.a.lora_A"), PeftName::Other);
        assert_eq!(split_peft("base_model.model.a.lora_A.x.y.weight"), PeftName::Other);
        assert_eq!(split_peft("a.weight"), PeftName::Other);
        assert_eq!(split_peft("base_model.model.a.lora_B.bias"), PeftName::Bias);
    }
}
