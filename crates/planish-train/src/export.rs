//! The trained tensors as files hold them: one rank and one scale for all modules, against the model's original weights.

use std::collections::BTreeMap;
use std::path::Path;

use mlx_rs::Array;
use planish_checkpoint::ExactF64;
use planish_checkpoint::adapter::{Adapter, Fold, Method, SidecarBase};
use planish_core::target_modules::Blocks;
use planish_mlx::host;
use planish_nn::{LoraConfig, LoraInit, LoraMethod, LoraScale, Model};
use planish_tensors::HostTensor;

use crate::Result;
use crate::options::Tuning;
use crate::run_dir::to_host;

/// Turns the trainable tensors of a model into an adapter that can be written.
///
/// mlx-lm's layout has one rank and one multiplier. Modules of a smaller rank are filled up with zeros, and a module's own
/// multiplier goes into its `lora_b`; both are noted in the sidecar. A PiSSA update, whose base lost what the update began
/// with, becomes a plain one of twice the rank against the original weights: `a' = [a, a₀]`, `b' = [b; −b₀]`.
#[derive(Debug)]
pub(crate) struct Exporter {
    tuning: Tuning,
    /// Own rank and multiplier of each module.
    modules: BTreeMap<String, (usize, f64)>,
    /// Values before the first update, where they are part of the base.
    initial: BTreeMap<String, Array>,
    /// The model that is trained.
    base: SidecarBase,
}

impl Exporter {
    /// For a model whose adapters are fresh; `base` is its folder.
    pub(crate) fn new(tuning: &Tuning, modules: &[String], model: &Model, base: Option<&Path>) -> Result<Self> {
        let mut exporter = Self {
            tuning: tuning.clone(),
            modules: BTreeMap::new(),
            initial: BTreeMap::new(),
            base: base.map(SidecarBase::of_model).transpose()?.unwrap_or_default(),
        };
        if let Tuning::Adapters(lora) = tuning {
            let ranks = lora.ranks.resolve(lora.rank, modules)?;
            let alphas = lora.alphas.resolve(lora.scale.value(), modules)?;
            for (module, (rank, alpha)) in modules.iter().zip(ranks.into_iter().zip(alphas)) {
                exporter
                    .modules
                    .insert(module.clone(), (rank, lora.scale.factor(alpha, rank)));
            }
            if lora.init == LoraInit::Pissa {
                exporter.initial = model.trainables().into_iter().collect();
            }
        }
        Ok(exporter)
    }

    /// Whether the file holds the tensors just as they are trained.
    pub(crate) fn is_plain(&self) -> bool {
        let mut modules = self.modules.values();
        let first = modules.next();
        self.initial.is_empty() && modules.all(|module| Some(module) == first)
    }

    /// What the file holds.
    pub(crate) fn method(&self) -> Method {
        match &self.tuning {
            Tuning::Full => Method::Full,
            Tuning::Adapters(lora) if lora.method == LoraMethod::Dora => Method::Dora,
            Tuning::Adapters(_) => Method::Lora,
        }
    }

    /// Rank and multiplier of the file; rank 0 when all weights train.
    pub(crate) fn rank_and_scale(&self) -> (usize, f64) {
        let Tuning::Adapters(lora) = &self.tuning else {
            return (0, 1.0);
        };
        let rank = self.modules.values().map(|(rank, _)| *rank).max().unwrap_or(lora.rank);
        let scale = self.modules.values().map(|(_, scale)| *scale);
        let common = lora.scale.factor(lora.scale.value(), lora.rank);
        // Where all modules agree on another multiplier than the common one, nothing need be folded.
        let scale = match scale.clone().next() {
            Some(first) if scale.clone().all(|other| other == first) => first,
            _ => common,
        };
        (if self.initial.is_empty() { rank } else { 2 * rank }, scale)
    }

    /// Rank and multiplier that each module trains with.
    pub(crate) fn of_modules(&self, modules: &[String]) -> Vec<(usize, f64)> {
        modules
            .iter()
            .filter_map(|module| self.modules.get(module).copied())
            .collect()
    }

    /// The adapter of the model's current values.
    pub(crate) fn adapter(&self, model: &Model) -> Result<Adapter> {
        let Tuning::Adapters(lora) = &self.tuning else {
            let mut adapter = Adapter::new(Method::Full, 0, 1.0, 0.0);
            adapter.sidecar.base = self.base.clone();
            for (name, value) in model.trainables() {
                adapter.tensors.insert(name, to_host(&value)?);
            }
            return Ok(adapter);
        };
        let mut adapter = self.empty(lora);
        for (name, value) in model.trainables() {
            let tensor = self.exported(&name, &value, adapter.rank, adapter.scale)?;
            adapter.tensors.insert(name, tensor);
        }
        adapter.fill_keys();
        Ok(adapter)
    }

    fn empty(&self, lora: &LoraConfig) -> Adapter {
        let (rank, scale) = self.rank_and_scale();
        let mut adapter = Adapter::new(self.method(), rank, scale, f64::from(lora.dropout));
        adapter.n_adapted_layers = match lora.targets.blocks {
            Blocks::All => -1,
            Blocks::Last(n) => n.get() as i64,
        };
        let sidecar = &mut adapter.sidecar;
        sidecar.base = self.base.clone();
        sidecar.rslora = matches!(lora.scale, LoraScale::RankStabilised(_)) && self.is_plain();
        if lora.init == LoraInit::Pissa {
            sidecar.init = Some("pissa, converted".to_owned());
        }
        for (module, (own_rank, own_scale)) in &self.modules {
            let own_rank = if self.initial.is_empty() {
                *own_rank
            } else {
                2 * own_rank
            };
            if own_rank < rank {
                sidecar.padding.insert(module.clone(), own_rank);
            }
            if *own_scale != scale {
                let fold = Fold {
                    factor: ExactF64(own_scale / scale),
                    alpha: ExactF64(own_scale * own_rank as f64),
                };
                sidecar.folds.insert(module.clone(), fold);
            }
        }
        adapter
    }

    fn exported(&self, name: &str, value: &Array, rank: usize, scale: f64) -> Result<HostTensor> {
        let is_a = name.ends_with(".lora_a");
        let module = name.rsplit_once('.').map_or(name, |(module, _)| module);
        let own = self.modules.get(module);
        let (Some(&(_, own_scale)), true) = (own, is_a || name.ends_with(".lora_b")) else {
            return to_host(value);
        };
        let plain = to_host(value)?;
        if value.dim(if is_a { 1 } else { 0 }) as usize == rank && own_scale == scale {
            return Ok(plain);
        }
        let factor = if is_a { 1.0 } else { own_scale / scale };
        let mut values: Vec<f32> = scaled(&host::to_f32_vec(value)?, factor);
        let (mut rows, mut columns) = (value.dim(0) as usize, value.dim(1) as usize);
        if let Some(initial) = self.initial.get(name) {
            let before = host::to_f32_vec(initial)?;
            if is_a {
                values = beside(&values, &before, columns);
                columns *= 2;
            } else {
                values.extend(scaled(&before, -factor));
                rows *= 2;
            }
        }
        if is_a {
            values = beside(&values, &vec![0.0; rows * (rank - columns)], columns);
            columns = rank;
        } else {
            values.resize(rank * columns, 0.0);
            rows = rank;
        }
        Ok(HostTensor::from_f32(&[rows, columns], &values))
    }
}

/// Products in f64, rounded once.
fn scaled(values: &[f32], factor: f64) -> Vec<f32> {
    values.iter().map(|&x| (f64::from(x) * factor) as f32).collect()
}

/// Two matrices of as many rows side by side; `columns` are those of the left one.
fn beside(left: &[f32], right: &[f32], columns: usize) -> Vec<f32> {
    let rows = left.len() / columns;
    let of_right = right.len() / rows;
    (0..rows)
        .flat_map(|row| {
            let left = &left[row * columns..][..columns];
            left.iter().chain(&right[row * of_right..][..of_right]).copied()
        })
        .collect()
}
