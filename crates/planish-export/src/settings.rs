//! What the user asks for, and what follows from it for a given model.

use serde::Serialize;

use crate::{Error, Result, plain::Plain, weights::WeightFormat};

/// Largest dimension that is reported to stay on the Neural Engine.
pub const MAX_DIMENSION: usize = 16_384;
/// Largest package that is reported to stay on the Neural Engine, in bytes.
pub const MAX_PACKAGE_BYTES: u64 = 950_000_000;
/// Most layers of a package that are reported to stay on the Neural Engine.
pub const MAX_PACKAGE_LAYERS: usize = 15;
/// Context when none is asked for: a decode step's cost grows with it.
pub const DEFAULT_CONTEXT: usize = 1024;

/// Heads of more tokens are cut into twice as many parts.
const LARGE_VOCABULARY: usize = 1 << 17;

/// Which files are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Layout {
    /// One package from token ids to logits.
    #[default]
    Monolith,
    /// Embeddings, chunks of layers and head as packages of their own, with `meta.yaml`, as ANEMLL's hosts load them.
    Anemll,
}

/// Where the K/V cache lives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// In a Core ML state that the graph updates.
    #[default]
    State,
    /// With the caller, who passes it in and appends what comes out.
    Host,
}

/// Everything a user can choose. `Default` is what the command line does without flags.
#[derive(Clone, Debug, PartialEq)]
pub struct ExportOptions {
    /// Files.
    pub layout: Layout,
    /// Cache.
    pub cache: CacheMode,
    /// Positions of the cache; [`DEFAULT_CONTEXT`] or the model's own context, whichever is less, when `None`.
    pub context: Option<usize>,
    /// Tokens of a prefill call.
    pub prefill: usize,
    /// Packages that the layers are split into (ANEMLL layout); planned by size and layers when `None`.
    pub chunks: Option<usize>,
    /// Parts of the head; the usual number of the family, or one near it that divides the vocabulary, when `None`.
    pub head_parts: Option<usize>,
    /// Form of the linear layers' weights.
    pub weights: WeightFormat,
    /// Smallest epsilon of the norms: fp16 numbers below 6.1e-5 are subnormal and a device may take them for zero.
    pub min_epsilon: f32,
    /// Name of the functions that apply the adapter, which is then kept beside the base weights instead of merged.
    pub keep_adapter: Option<String>,
    /// Run the package on the CPU and compare it with the f32 forward pass before it gets its name.
    pub check: bool,
    /// Write script, inputs and expected values for a Mac beside the package.
    pub verify_bundle: bool,
    /// Token ids of a text like the user's: activation ranges, importance of inputs, perplexity; may be empty.
    pub calibration: Vec<u32>,
    /// Token ids to start the check from where there is no calibration text; may be empty.
    pub prompt: Vec<u32>,
}

impl Default for ExportOptions {
    fn default() -> Self {
        Self {
            layout: Layout::default(),
            cache: CacheMode::default(),
            context: None,
            prefill: 64,
            chunks: None,
            head_parts: None,
            weights: WeightFormat::Fp16,
            min_epsilon: 0.0,
            keep_adapter: None,
            check: false,
            verify_bundle: false,
            calibration: Vec::new(),
            prompt: Vec::new(),
        }
    }
}

/// The numbers that an export has settled on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Settings {
    /// Files.
    pub layout: Layout,
    /// Cache.
    pub cache: CacheMode,
    /// Positions of the cache.
    pub context: usize,
    /// Tokens of a prefill call.
    pub prefill: usize,
    /// First and last layer (exclusive) of each chunk; one chunk for a monolith.
    pub chunks: Vec<(usize, usize)>,
    /// Parts of the head.
    pub head_parts: usize,
}

impl Settings {
    /// Fits the options to a model. Returns advice beside the settings.
    ///
    /// # Errors
    /// [`Error::Option`] for a value that cannot be had, with what can.
    pub(crate) fn new(model: &Plain, options: &ExportOptions) -> Result<(Self, Vec<String>)> {
        if options.layout == Layout::Anemll && options.cache == CacheMode::Host {
            return Err(Error::option(
                "--cache",
                "host",
                "the anemll layout keeps its cache in a state: use state",
            ));
        }
        if options.layout == Layout::Anemll && model.config.family.anemll.is_none() {
            let rule = format!("it has no {} models: use monolith", model.config.family.model_type);
            return Err(Error::option("--layout", "anemll", rule));
        }
        let context = context(model, options)?;
        if options.prefill == 0 || options.prefill > context {
            return Err(Error::option(
                "--prefill",
                options.prefill,
                format!("use 1 to {context}, the context length"),
            ));
        }
        if options.layout == Layout::Monolith && options.chunks.is_some_and(|n| n != 1) {
            return Err(Error::option(
                "--chunks",
                options.chunks.unwrap_or(1),
                "a monolith is one package: use --layout anemll",
            ));
        }
        let settings = Self {
            layout: options.layout,
            cache: options.cache,
            context,
            prefill: options.prefill,
            chunks: chunks(model, options)?,
            head_parts: head_parts(model.arch.vocab_size, options.head_parts)?,
        };
        let advice = settings.advice(model, options);
        Ok((settings, advice))
    }

    /// Layout and cache as one word, such as `monolith/state`.
    pub fn layout_name(&self) -> &'static str {
        match (self.layout, self.cache) {
            (Layout::Monolith, CacheMode::State) => "monolith/state",
            (Layout::Monolith, CacheMode::Host) => "monolith/host",
            (Layout::Anemll, _) => "anemll/state",
        }
    }

    /// Rules of the Neural Engine that the settings do not meet; none of them keeps a package from being right.
    fn advice(&self, model: &Plain, options: &ExportOptions) -> Vec<String> {
        let mut out = Vec::new();
        let part = model.arch.vocab_size / self.head_parts;
        if part > MAX_DIMENSION {
            out.push(format!(
                "the head's parts have {part} rows, more than {MAX_DIMENSION}: expect the CPU to run them; pad the vocabulary to a multiple of a power of two, or set --head-parts"
            ));
        }
        for (name, size) in [
            ("hidden size", model.arch.hidden_size),
            ("feed-forward size", model.feed_forward_dims),
        ] {
            if size > MAX_DIMENSION {
                out.push(format!(
                    "the {name} {size} is above {MAX_DIMENSION}: expect the CPU or GPU to run such layers"
                ));
            }
        }
        if 2 * model.arch.hidden_size > MAX_DIMENSION && model.arch.hidden_size <= MAX_DIMENSION {
            out.push(format!(
                "norms work on {} numbers, above {MAX_DIMENSION}: expect the CPU or GPU to run them",
                2 * model.arch.hidden_size
            ));
        }
        if self.cache == CacheMode::State && !model.head_dim.is_multiple_of(32) {
            out.push(format!("the state's last dimension, the head size {}, is no multiple of 32: the Neural Engine may refuse it; try --cache host", model.head_dim));
        }
        if self.cache == CacheMode::State && self.prefill > 32 && model.head_dim >= 128 {
            out.push(format!("prefill updates {} rows of the state at once; more than 32 failed on some devices with head size 128: if it does, use --prefill 32", self.prefill));
        }
        if !self.context.is_multiple_of(self.prefill) {
            out.push(format!(
                "the context {} is no multiple of the prefill length {}: a host must not pad past the end",
                self.context, self.prefill
            ));
        }
        if model.eps.max(options.min_epsilon) < 6.1e-5 {
            out.push(format!("the norms' epsilon {:e} is subnormal in fp16 and a device may take it for zero; --min-epsilon 6.2e-5 avoids that and changes the numbers a little", model.eps));
        }
        if options.layout == Layout::Monolith && model.layers.len() > MAX_PACKAGE_LAYERS {
            out.push(format!("{} layers in one package; the Neural Engine is reported to take up to {MAX_PACKAGE_LAYERS}: --layout anemll splits them", model.layers.len()));
        }
        out
    }
}

fn context(model: &Plain, options: &ExportOptions) -> Result<usize> {
    let longest = model.config.max_position_embeddings;
    let window = model.window.unwrap_or(usize::MAX);
    let constant = model.rope.constant_up_to();
    let context = options
        .context
        .unwrap_or(DEFAULT_CONTEXT.min(longest).min(window).min(constant));
    if context == 0 || context > longest {
        return Err(Error::option(
            "--context",
            context,
            format!("use 1 to {longest}, the model's longest context"),
        ));
    }
    if context > window {
        let rule = format!("use 1 to {window}: beyond its sliding window this model would attend to too much");
        return Err(Error::option("--context", context, rule));
    }
    if context > constant {
        let rule = format!("use 1 to {constant}: beyond, this model's rotation depends on the length of the text");
        return Err(Error::option("--context", context, rule));
    }
    if i32::try_from(context).is_err() {
        return Err(Error::option("--context", context, "at most 2147483647"));
    }
    Ok(context)
}

fn head_parts(v: usize, wanted: Option<usize>) -> Result<usize> {
    let divisors = (1..=v.min(1024)).filter(|n| v.is_multiple_of(*n));
    if let Some(n) = wanted {
        if n > 0 && v.is_multiple_of(n) {
            return Ok(n);
        }
        let near: Vec<String> = divisors.filter(|d| *d <= 4 * n.max(8)).map(|d| d.to_string()).collect();
        let rule = format!(
            "all parts must be equal; use a divisor of the vocabulary {v}: {}",
            near.join(", ")
        );
        return Err(Error::option("--head-parts", n, rule));
    }
    let usual = if v > LARGE_VOCABULARY { 16usize } else { 8 };
    let fitting = divisors.filter(|n| v / n <= MAX_DIMENSION);
    Ok(fitting.min_by_key(|n| n.abs_diff(usual)).unwrap_or(1))
}

fn chunks(model: &Plain, options: &ExportOptions) -> Result<Vec<(usize, usize)>> {
    let n_layers = model.layers.len();
    if let Some(n) = options.chunks {
        if n == 0 || n > n_layers {
            return Err(Error::option(
                "--chunks",
                n,
                format!("use 1 to {n_layers}, the number of layers"),
            ));
        }
        if n > 99 {
            return Err(Error::option("--chunks", n, "at most 99: file names have two digits"));
        }
        return Ok(ranges(n_layers, n));
    }
    if options.layout == Layout::Monolith {
        return Ok(vec![(0, n_layers)]);
    }
    let layer_bytes = layer_bytes(model, options.weights);
    let fits = |n: &usize| {
        let longest = ranges(n_layers, *n).iter().map(|(a, b)| b - a).max().unwrap_or(0);
        longest <= MAX_PACKAGE_LAYERS && longest as u64 * layer_bytes <= MAX_PACKAGE_BYTES
    };
    let n = (1..=n_layers.min(99)).find(fits).unwrap_or(n_layers.min(99));
    Ok(ranges(n_layers, n))
}

/// `n` runs of layers whose lengths differ by one at most.
fn ranges(n_layers: usize, n: usize) -> Vec<(usize, usize)> {
    (0..n).map(|i| (n_layers * i / n, n_layers * (i + 1) / n)).collect()
}

/// Bytes of one layer's matrices, scales and tables included.
fn layer_bytes(model: &Plain, format: WeightFormat) -> u64 {
    let linears = model.arch.linears();
    let of_layer = linears.iter().take(linears.len() / model.layers.len());
    of_layer
        .map(|l| {
            let side: usize = match format {
                WeightFormat::Fp16 => 0,
                _ => format.side_shape(l.output_dims, l.input_dims).iter().product(),
            };
            format.data_type().byte_len(l.output_dims * l.input_dims) + 2 * side as u64
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use planish_core::model_config::ModelConfig;

    use super::*;

    fn settings(options: &ExportOptions) -> Result<(Settings, Vec<String>)> {
        let json = r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
            "max_position_embeddings": 40960}"#;
        let config = ModelConfig::from_json_str(json, Path::new("config.json")).unwrap();
        Settings::new(&Plain::of(&config).unwrap(), options)
    }

    fn anemll() -> ExportOptions {
        ExportOptions {
            layout: Layout::Anemll,
            ..ExportOptions::default()
        }
    }

    #[test]
    fn qwen3_is_planned_as_its_usual_packages_are() {
        let (settings, _) = settings(&anemll()).unwrap();
        assert_eq!(settings.head_parts, 16);
        assert_eq!(settings.chunks, [(0, 14), (14, 28)]); // 15 layers at most
        assert_eq!(settings.context, 1024);
    }

    #[test]
    fn err_parts_of_unequal_length_name_the_divisors() {
        let options = ExportOptions {
            head_parts: Some(10),
            ..anemll()
        };
        let error = settings(&options).unwrap_err().to_string();
        assert!(error.contains("8, 16, 32"), "{error}");
    }

    #[test]
    fn err_context_beyond_the_model() {
        let options = ExportOptions {
            context: Some(40961),
            ..anemll()
        };
        let error = settings(&options).unwrap_err().to_string();
        assert!(error.contains("40960"), "{error}");
    }

    #[test]
    fn err_host_cache_in_the_anemll_layout() {
        let options = ExportOptions {
            cache: CacheMode::Host,
            ..anemll()
        };
        assert!(matches!(
            settings(&options),
            Err(Error::Option { option: "--cache", .. })
        ));
    }

    #[test]
    fn chunks_cover_all_layers_once() {
        for layers in 1..40 {
            for n in 1..=layers {
                let ranges = ranges(layers, n);
                assert_eq!((ranges[0].0, ranges[n - 1].1), (0, layers));
                assert!(ranges.windows(2).all(|p| p[0].1 == p[1].0) && ranges.iter().all(|(a, b)| a < b));
            }
        }
    }
}
