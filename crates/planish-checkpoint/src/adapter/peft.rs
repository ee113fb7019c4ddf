//! The adapter folder of PEFT.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use planish_tensors::{self as tensors, HostTensor, TensorStore, without_wrappers};

use super::matrix::Matrix;
use super::names::{Leaf, PeftName, base_tensor, looks_like_embedding, mlx_name, peft_name, split_block, split_peft};
use super::peft_config::PeftConfig;
use super::validate::{self, Grid};
use super::{
    Adapter, AdapterReport, BaseModel, CONFIG_FILE, Fold, Method, PEFT_TENSOR_FILE, ReadOptions, Refusal, Sidecar,
};
use crate::error::{Error, Result};
use crate::exact::ExactF64;

pub(super) fn read(dir: &Path, options: &ReadOptions<'_>) -> Result<(Adapter, AdapterReport)> {
    let config_path = dir.join(CONFIG_FILE);
    let json = std::fs::read(&config_path).map_err(|e| Error::read(&config_path, e))?;
    let config = PeftConfig::parse(&json, &config_path, options.force)?;
    let tensor_path = dir.join(PEFT_TENSOR_FILE);
    let store = TensorStore::open(&tensor_path)?;
    let sidecar = Sidecar::read(dir)?;
    let refuse = |refusal| Error::refused(&tensor_path, refusal);
    let (mut modules, whole) = collect_modules(&store).map_err(refuse)?;
    check_embeddings(&modules, &config, options.base).map_err(refuse)?;
    let mut report = AdapterReport::default();
    pass_over_copies(&store, whole, options.base, &mut report)?;
    let scales = module_scales(&modules, &config, options, &mut report).map_err(refuse)?;
    let rank = modules.values().map(PeftModule::rank).max().unwrap_or(config.r);
    let scale = common_scale(&scales, &config, sidecar.as_ref());
    let mut sidecar = sidecar.unwrap_or_else(|| foreign_sidecar(&config));
    // Both describe the mlx-lm layout and are found anew.
    sidecar.padding.clear();
    sidecar.folds.clear();
    sidecar.rslora = config.use_rslora;
    sidecar.alpha = Some(ExactF64(config.alpha));
    for (name, module) in &mut modules {
        if !is_within_an_ulp(scales[name], scale) {
            let factor = scales[name] / scale;
            let alpha = config.module_alpha(name);
            module.b.fold(factor, &mut report, name);
            sidecar.folds.insert(
                name.clone(),
                Fold {
                    factor: factor.into(),
                    alpha: alpha.into(),
                },
            );
        }
        if module.rank() < rank {
            sidecar.padding.insert(name.clone(), module.rank());
            report.padded.push(name.clone());
            module.pad(rank);
        }
    }
    let method = if config.use_dora { Method::Dora } else { Method::Lora };
    let mut adapter = Adapter {
        sidecar,
        ..Adapter::new(method, rank, scale, config.dropout)
    };
    for (name, module) in modules {
        module.insert_into(&name, &mut adapter.tensors);
    }
    adapter.fill_keys();
    set_layers(&mut adapter, options.base, &mut report);
    validate::check(&adapter, options, &tensor_path, &mut report)?;
    Ok((adapter, report))
}

/// The tensors of one module, already transposed to mlx-lm's orientation.
struct PeftModule {
    a: Matrix,
    b: Matrix,
    m: Option<HostTensor>,
    is_embedding: bool,
}

/// PEFT saves the base's matrix beside each adapter of a head or an embedding. One that is the base's to the bit is no
/// training; any other is refused, as is one that nothing can be compared with.
fn pass_over_copies(
    store: &TensorStore,
    whole: Vec<String>,
    base: Option<&BaseModel>,
    report: &mut AdapterReport,
) -> Result<()> {
    let stored = match base
        .and_then(|base| base.folder.as_deref())
        .filter(|_| !whole.is_empty())
    {
        Some(folder) => Some(TensorStore::open(folder)?),
        None => None,
    };
    let mut trained = Vec::new();
    for name in whole {
        let (copy, in_base) = (store.require(&name)?, base_tensor(&without_wrappers(&name)));
        let original = stored.as_ref().and_then(|base| base.get(&in_base));
        if original.is_some_and(|base| (base.dtype, base.shape, base.bytes) == (copy.dtype, copy.shape, copy.bytes)) {
            report
                .notes
                .push(format!("{name} equals the base's {in_base} and is left out"));
        } else {
            trained.push(name);
        }
    }
    if trained.is_empty() {
        return Ok(());
    }
    Err(Error::refused(store.path(), Refusal::ModulesToSave { names: trained }))
}

/// The low-rank tensors by module, and the names of the others.
fn collect_modules(store: &TensorStore) -> Result<(BTreeMap<String, PeftModule>, Vec<String>), Refusal> {
    let mut parts = BTreeMap::<(String, Leaf), (HostTensor, bool)>::new();
    let (mut whole, mut twice) = (Vec::new(), Vec::new());
    for view in store.iter() {
        match split_peft(&without_wrappers(view.name)) {
            PeftName::Adapter {
                module,
                leaf,
                is_embedding,
            } => {
                let key = (module.to_string(), leaf);
                if parts.insert(key, (view.to_host(), is_embedding)).is_some() {
                    twice.push(view.name.to_string());
                }
            }
            PeftName::Bias => {
                return Err(Refusal::LoraBias {
                    cause: view.name.to_string(),
                });
            }
            PeftName::Other => whole.push(view.name.to_string()),
        }
    }
    if !twice.is_empty() {
        return Err(Refusal::UnknownModule { names: twice });
    }
    let names: BTreeSet<String> = parts.keys().map(|(module, _)| module.clone()).collect();
    let modules = names
        .into_iter()
        .map(|name| Ok((name.clone(), take_module(&name, &mut parts)?)))
        .collect::<Result<_, Refusal>>()?;
    Ok((modules, whole))
}

fn take_module(name: &str, parts: &mut BTreeMap<(String, Leaf), (HostTensor, bool)>) -> Result<PeftModule, Refusal> {
    let mut take = |leaf| parts.remove(&(name.to_string(), leaf));
    let m = take(Leaf::Magnitude).map(|(tensor, _)| tensor);
    let mut matrix = |leaf| {
        let missing = || Refusal::EmptyAdapter {
            reason: format!("{} is missing", peft_name(name, leaf, false)),
        };
        let (tensor, is_embedding) = take(leaf).ok_or_else(missing)?;
        let found = tensor.shape.clone();
        let full_name = peft_name(name, leaf, is_embedding);
        let transposed = Matrix::transposed(&tensor);
        let refusal = Refusal::ShapeMismatch {
            name: full_name,
            found,
            expected: vec![0, 0],
        };
        Ok((transposed.ok_or(refusal)?, is_embedding))
    };
    let ((a, is_embedding), (b, b_is_embedding)) = (matrix(Leaf::A)?, matrix(Leaf::B)?);
    if a.columns() != b.rows() || a.columns() == 0 || is_embedding != b_is_embedding {
        let name = peft_name(name, Leaf::B, b_is_embedding);
        let (found, expected) = (vec![b.columns(), b.rows()], vec![b.columns(), a.columns()]);
        return Err(Refusal::ShapeMismatch { name, found, expected });
    }
    Ok(PeftModule { a, b, m, is_embedding })
}

fn check_embeddings(
    modules: &BTreeMap<String, PeftModule>,
    config: &PeftConfig,
    base: Option<&BaseModel>,
) -> Result<(), Refusal> {
    for (name, _) in modules.iter().filter(|(_, module)| module.is_embedding) {
        check_embedding(name, config.use_dora, base)?;
    }
    Ok(())
}

fn check_embedding(module: &str, is_dora: bool, base: Option<&BaseModel>) -> Result<(), Refusal> {
    if is_dora {
        return Err(Refusal::DoraEmbedding {
            module: module.to_string(),
        });
    }
    if base.is_none_or(|base| base.tied_head) {
        return Err(Refusal::TiedEmbeddingLora {
            module: module.to_string(),
        });
    }
    Ok(())
}

/// The scale of each module; its rank by the configuration must be the one of its shapes.
fn module_scales(
    modules: &BTreeMap<String, PeftModule>,
    config: &PeftConfig,
    options: &ReadOptions<'_>,
    report: &mut AdapterReport,
) -> Result<BTreeMap<String, f64>, Refusal> {
    let mut scales = BTreeMap::new();
    for (name, module) in modules {
        let (found, expected) = (module.rank(), config.rank(name));
        if found != expected {
            if !options.trust_shapes {
                return Err(Refusal::RankConflict {
                    module: name.clone(),
                    found,
                    expected,
                });
            }
            report.notes.push(format!(
                "{name}: rank {found} taken from the shapes; the configuration says {expected}"
            ));
        }
        scales.insert(name.clone(), config.scale_of_rank(name, found));
    }
    Ok(scales)
}

/// The scale of the most modules; of equally frequent ones the configuration's own, then the smallest.
///
/// The sidecar's exact scale stands in for the scale from which the configuration's alpha was derived.
fn common_scale(scales: &BTreeMap<String, f64>, config: &PeftConfig, sidecar: Option<&Sidecar>) -> f64 {
    let mut counts = BTreeMap::<u64, usize>::new();
    for scale in scales.values() {
        *counts.entry(scale.to_bits()).or_default() += 1;
    }
    let own = config.default_scale().to_bits();
    let best = counts
        .into_iter()
        .max_by_key(|(bits, count)| (*count, *bits == own, std::cmp::Reverse(*bits)));
    let scale = f64::from_bits(best.map_or(own, |(bits, _)| bits));
    match sidecar.and_then(|sidecar| sidecar.scale) {
        Some(exact) if is_within_an_ulp(exact.0, scale) => exact.0,
        _ => scale,
    }
}

/// Relative difference of at most 2^-52: what `(scale · r) / r` can lose.
fn is_within_an_ulp(a: f64, b: f64) -> bool {
    (a - b).abs() <= f64::EPSILON * b.abs()
}

fn foreign_sidecar(config: &PeftConfig) -> Sidecar {
    let text = |key: &str| config.raw.get(key).and_then(Value::as_str).map(str::to_string);
    let mut sidecar = Sidecar {
        source_format: Some("peft".to_string()),
        ..Sidecar::default()
    };
    sidecar.source_config = Some(Value::Object(config.raw.clone()));
    sidecar.base.path_or_repo = text("base_model_name_or_path");
    sidecar.base.revision = text("revision");
    sidecar
}

/// Chooses `num_layers`, and puts zeros where mlx-lm would adapt a module that the adapter does not have.
fn set_layers(adapter: &mut Adapter, base: Option<&BaseModel>, report: &mut AdapterReport) {
    let same_keys = |a: &[String], b: &[String]| a.iter().collect::<BTreeSet<_>>() == b.iter().collect();
    if let (Some(layers), true) = (adapter.sidecar.layers, same_keys(&adapter.sidecar.keys, &adapter.keys)) {
        adapter.keys.clone_from(&adapter.sidecar.keys);
        adapter.n_adapted_layers = layers;
        fill_holes(adapter, adapter.sidecar.holes.clone(), report);
        return;
    }
    let modules: Vec<String> = adapter.modules().into_iter().map(str::to_string).collect();
    let grid = Grid::of(modules.iter().map(String::as_str));
    let layers = grid.layers();
    let (Some(first), Some(last)) = (layers.first(), layers.last()) else {
        return;
    };
    let range = match base {
        Some(base) if *first > 0 => {
            adapter.n_adapted_layers = base.n_layers.saturating_sub(*first).max(1) as i64;
            *first..base.n_layers
        }
        Some(base) => 0..base.n_layers,
        // The layers after the last one seen cannot be known; mlx-lm starts them unchanged anyway.
        None => 0..last + 1,
    };
    if base.is_none() && *first > 0 {
        let note = "the base model is not known, so num_layers is -1 (all): layers without tensors stay unchanged";
        report.notes.push(note.to_string());
    }
    let holes = find_holes(&grid, range, base);
    fill_holes(adapter, holes, report);
}

/// Modules of the grid that the adapter lacks and the base has.
fn find_holes(grid: &Grid<'_>, layers: std::ops::Range<usize>, base: Option<&BaseModel>) -> Vec<String> {
    let mut holes = Vec::new();
    for (suffix, present) in &grid.layers_by_suffix {
        let absent = layers.clone().filter(|layer_idx| !present.contains(layer_idx));
        holes.extend(absent.map(|layer_idx| format!("{}{layer_idx}.{suffix}", grid.prefix)));
    }
    holes.retain(|hole| base.is_none_or(|base| base.modules.contains_key(hole)));
    holes
}

/// Zeros of the size that the same module has in another layer. DoRA leaves holes open: the magnitude that changes
/// nothing is the row norm of the base weight, with which mlx-lm begins.
fn fill_holes(adapter: &mut Adapter, holes: Vec<String>, report: &mut AdapterReport) {
    if adapter.method == Method::Dora {
        report.notes.extend(
            holes
                .iter()
                .map(|hole| format!("{hole} has no tensors and stays unchanged")),
        );
        return;
    }
    let mut examples = BTreeMap::<String, String>::new();
    for module in adapter.modules() {
        if let Some(block) = split_block(module) {
            examples.insert(block.suffix.to_string(), module.to_string());
        }
    }
    for hole in holes {
        let example = split_block(&hole).and_then(|block| examples.get(block.suffix));
        let Some(example) = example.filter(|_| adapter.tensor(&hole, Leaf::A).is_none()) else {
            continue;
        };
        for leaf in [Leaf::A, Leaf::B] {
            if let Some(like) = adapter.tensor(example, leaf) {
                let zeros = HostTensor::zeros(like.dtype, &like.shape);
                adapter.tensors.insert(mlx_name(&hole, leaf), zeros);
            }
        }
        report.holes.push(hole.clone());
        if !adapter.sidecar.holes.contains(&hole) {
            adapter.sidecar.holes.push(hole);
        }
    }
}

pub(super) fn write(adapter: &Adapter, dir: &Path, base: Option<&BaseModel>) -> Result<AdapterReport> {
    let refuse = |refusal| Error::refused(dir, refusal);
    if adapter.method == Method::Full {
        return Err(refuse(Refusal::FullAsAdapter));
    }
    let mut report = AdapterReport::default();
    let modules = modules_for_peft(adapter, base, &mut report).map_err(refuse)?;
    let config = config_for(adapter, &modules);
    let mut tensors = BTreeMap::new();
    for (name, module) in &modules {
        tensors.insert(peft_name(name, Leaf::A, module.is_embedding), module.a.transpose());
        tensors.insert(peft_name(name, Leaf::B, module.is_embedding), module.b.transpose());
        if let Some(m) = &module.m {
            tensors.insert(peft_name(name, Leaf::Magnitude, false), m.clone());
        }
    }
    std::fs::create_dir_all(dir).map_err(|e| Error::write(dir, e))?;
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    tensors::write(&dir.join(PEFT_TENSOR_FILE), &tensors, &metadata)?;
    adapter.current_sidecar().write(dir)?;
    super::write_json(&dir.join(CONFIG_FILE), &config)?;
    Ok(report)
}

/// The modules without what was only put in for mlx-lm: holes, padding, folded scales.
fn modules_for_peft(
    adapter: &Adapter,
    base: Option<&BaseModel>,
    report: &mut AdapterReport,
) -> Result<BTreeMap<String, PeftModule>, Refusal> {
    let mut modules = BTreeMap::new();
    for name in adapter.modules() {
        let mut module = module_for_peft(adapter, name, base)?;
        if adapter.sidecar.holes.iter().any(|hole| hole == name) {
            if module.is_zero() {
                continue;
            }
            report.notes.push(format!(
                "{name} was a hole filled with zeros and has been trained since: it is kept"
            ));
        }
        if let Some(true_rank) = adapter.sidecar.padding.get(name) {
            if module.unpad(*true_rank) {
                report.padded.retain(|padded| padded != name);
            } else {
                report.notes.push(format!(
                    "{name} was padded with zeros and has been trained since: it keeps its rank"
                ));
            }
        }
        if let Some(fold) = valid_fold(adapter, name, module.rank()) {
            module.b.fold(1.0 / fold.factor.0, report, name);
        }
        modules.insert(name.to_string(), module);
    }
    if modules.is_empty() {
        return Err(Refusal::EmptyAdapter {
            reason: "it holds no adapter tensors".to_string(),
        });
    }
    Ok(modules)
}

/// A fold of the sidecar, while scale and rank are still those it was made for.
fn valid_fold(adapter: &Adapter, name: &str, rank: usize) -> Option<Fold> {
    let fold = adapter.sidecar.folds.get(name)?;
    let (own, folded) = (fold.alpha.0 / divisor(adapter, rank), adapter.scale * fold.factor.0);
    ((own - folded).abs() <= 4.0 * f64::EPSILON * own.abs()).then_some(*fold)
}

/// What alpha is divided by for the scale.
fn divisor(adapter: &Adapter, rank: usize) -> f64 {
    if adapter.sidecar.rslora {
        (rank as f64).sqrt()
    } else {
        rank as f64
    }
}

fn module_for_peft(adapter: &Adapter, name: &str, base: Option<&BaseModel>) -> Result<PeftModule, Refusal> {
    let get = |leaf| {
        let reason = format!("{} is missing", mlx_name(name, leaf));
        adapter
            .tensor(name, leaf)
            .cloned()
            .ok_or(Refusal::EmptyAdapter { reason })
    };
    let (a, b) = (get(Leaf::A)?, get(Leaf::B)?);
    if a.shape.len() != 2 || b.shape.len() != 2 {
        return Err(Refusal::SwitchLoraToPeft {
            name: mlx_name(name, Leaf::A),
        });
    }
    let known = base.and_then(|base| base.modules.get(name));
    let is_embedding = known.map_or_else(|| looks_like_embedding(name), |module| module.is_embedding);
    if is_embedding {
        check_embedding(name, adapter.method == Method::Dora, base)?;
    }
    Ok(PeftModule {
        a: Matrix(a),
        b: Matrix(b),
        m: adapter.tensor(name, Leaf::Magnitude).cloned(),
        is_embedding,
    })
}

/// The original configuration when it still describes the adapter, or a new one.
fn config_for(adapter: &Adapter, modules: &BTreeMap<String, PeftModule>) -> Value {
    let sidecar = &adapter.sidecar;
    if sidecar.source_format.as_deref() == Some("peft")
        && let Some(original @ Value::Object(_)) = &sidecar.source_config
        && describes(original, adapter, modules)
    {
        return original.clone();
    }
    new_config(adapter, modules)
}

fn describes(config: &Value, adapter: &Adapter, modules: &BTreeMap<String, PeftModule>) -> bool {
    let Ok(config) = PeftConfig::parse(config.to_string().as_bytes(), Path::new(CONFIG_FILE), true) else {
        return false;
    };
    let grew = modules.keys().any(|name| adapter.sidecar.holes.contains(name));
    let fits = |name: &String, module: &PeftModule| {
        let fold = valid_fold(adapter, name, module.rank()).map_or(1.0, |fold| fold.factor.0);
        let (own, ours) = (config.scale(name), adapter.scale * fold);
        config.rank(name) == module.rank() && (own - ours).abs() <= 4.0 * f64::EPSILON * own.abs()
    };
    let is_dora = adapter.method == Method::Dora;
    !grew && config.use_dora == is_dora && modules.iter().all(|(name, module)| fits(name, module))
}

/// The PEFT whose configuration is written; newer ones read it.
const PEFT_VERSION: &str = "0.21.2";

fn new_config(adapter: &Adapter, modules: &BTreeMap<String, PeftModule>) -> Value {
    let (r, alpha) = (most_common_rank(modules), adapter.alpha());
    let default_alpha = if r == adapter.rank {
        alpha
    } else {
        adapter.scale * divisor(adapter, r)
    };
    let (mut rank_pattern, mut alpha_pattern) = (Map::new(), Map::new());
    for (name, module) in modules {
        let fold = valid_fold(adapter, name, module.rank());
        let module_alpha = match fold {
            Some(fold) => fold.alpha.0,
            None if module.rank() == r => default_alpha,
            None => adapter.scale * divisor(adapter, module.rank()),
        };
        if module.rank() != r {
            rank_pattern.insert(name.replace('.', r"\."), module.rank().into());
        }
        if module_alpha != default_alpha {
            alpha_pattern.insert(name.replace('.', r"\."), json!(module_alpha));
        }
    }
    let (target_modules, layers) = targets(modules, adapter.n_adapted_layers);
    let base = &adapter.sidecar.base;
    json!({
        "alpha_pattern": alpha_pattern,
        "base_model_name_or_path": base.path_or_repo,
        "bias": "none",
        "exclude_modules": null,
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "layers_pattern": layers.as_ref().map(|_| "layers"),
        "layers_to_transform": layers,
        "lora_alpha": number(default_alpha),
        "lora_dropout": adapter.dropout,
        "modules_to_save": null,
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": r,
        "rank_pattern": rank_pattern,
        "revision": base.revision,
        "target_modules": target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": adapter.method == Method::Dora,
        "use_rslora": adapter.sidecar.rslora,
    })
}

/// A whole number without `.0`, because PEFT declares `lora_alpha` as an integer.
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 2f64.powi(53) {
        json!(value as i64)
    } else {
        json!(value)
    }
}

fn most_common_rank(modules: &BTreeMap<String, PeftModule>) -> usize {
    let mut counts = BTreeMap::<usize, usize>::new();
    for module in modules.values() {
        *counts.entry(module.rank()).or_default() += 1;
    }
    counts
        .into_iter()
        .max_by_key(|(rank, count)| (*count, *rank))
        .map_or(0, |(rank, _)| rank)
}

/// `target_modules` and `layers_to_transform` that select exactly these modules.
///
/// Suffixes when every suffix occurs in the same layers, otherwise every path in full: a full path selects one module
/// whatever the layers are.
fn targets(modules: &BTreeMap<String, PeftModule>, n_adapted_layers: i64) -> (Vec<String>, Option<Vec<usize>>) {
    let grid = Grid::of(modules.keys().map(String::as_str));
    let layers = grid.layers();
    if grid
        .layers_by_suffix
        .values()
        .any(|present| present.len() != layers.len())
    {
        return (modules.keys().cloned().collect(), None);
    }
    let names = grid
        .layers_by_suffix
        .keys()
        .chain(&grid.outside)
        .map(|name| name.to_string())
        .collect();
    let is_all = n_adapted_layers <= 0 && layers.iter().enumerate().all(|(i, layer)| i == *layer);
    (names, (!is_all && !layers.is_empty()).then_some(layers))
}

impl PeftModule {
    fn rank(&self) -> usize {
        self.a.columns()
    }

    /// Zero columns for `a`, zero rows for `b`: the update stays the same.
    fn pad(&mut self, rank: usize) {
        self.a = self.a.resized(self.a.rows(), rank);
        self.b = self.b.resized(rank, self.b.columns());
    }

    /// Takes padding away if it is still zero.
    fn unpad(&mut self, rank: usize) -> bool {
        let (a, b) = (
            self.a.resized(self.a.rows(), rank),
            self.b.resized(rank, self.b.columns()),
        );
        let is_padding = rank > 0
            && rank <= self.rank()
            && a.resized(a.rows(), self.rank()).0 == self.a.0
            && b.resized(self.rank(), b.columns()).0 == self.b.0;
        if is_padding {
            (self.a, self.b) = (a, b);
        }
        is_padding
    }

    fn is_zero(&self) -> bool {
        self.a.0.bytes.iter().chain(&self.b.0.bytes).all(|byte| *byte == 0)
    }

    fn insert_into(self, name: &str, tensors: &mut BTreeMap<String, HostTensor>) {
        tensors.insert(mlx_name(name, Leaf::A), self.a.0);
        tensors.insert(mlx_name(name, Leaf::B), self.b.0);
        if let Some(m) = self.m {
            tensors.insert(mlx_name(name, Leaf::Magnitude), m);
        }
    }
}
