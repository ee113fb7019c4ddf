//! Optimizers over named trainable tensors, with f32 master weights and f32 moments.
//!
//! Everything an update reads or writes is an MLX array made before the first step, so that nothing is read back to the
//! host inside a step: the learning rate is an input, the step count lives on the device, and a step that must not count
//! ([`Optimizer::step`] with `accept` false) leaves parameters, moments and count bit for bit as they were.
//!
//! Rules that treat every element alike (AdamW, Adam, SGD, Lion) run on one flat buffer a parameter group, a handful of
//! kernels for the whole adapter; rules that look at a matrix (Muon, Adafactor) run tensor by tensor.

mod adafactor;
mod adam;
mod adamw;
mod lion;
mod muon;
mod sgd;

use std::collections::BTreeMap;

use mlx_rs::{Array, Dtype, ops};

pub use adafactor::Adafactor;
pub use adam::Adam;
pub use adamw::AdamW;
pub use lion::Lion;
pub use muon::Muon;
pub use sgd::Sgd;

use crate::{Error, Result, clip};

/// The optimizer of a run: an update rule, the master weights, and the rule's state.
///
/// # Example
/// One step of AdamW moves a weight by about the learning rate, against its gradient.
/// ```
/// use mlx_rs::Array;
/// use planish_train::optimizer::{Groups, Optimizer, Rule};
///
/// let weights = [("layer.lora_a".to_owned(), Array::from_slice(&[1.0f32, -1.0], &[1, 2]))];
/// let mut optimizer = Optimizer::new(Rule::adamw(), Groups::default(), &weights)?;
/// let gradient = Array::from_slice(&[0.3f32, -0.2], &[1, 2]);
/// let accept = Array::from_bool(true);
/// let moved = optimizer.step(&optimizer.gather(&[gradient])?, 0.1, &accept)?;
/// let moved = moved[0].as_slice::<f32>();
/// assert!((moved[0] - 0.899).abs() < 1e-4 && (moved[1] + 0.899).abs() < 1e-4);
/// # Ok::<(), planish_train::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Optimizer {
    rule: Rule,
    units: Vec<Unit>,
    /// Updates that counted, i32 on the device.
    count: Array,
    n_trainables: usize,
}

/// An update rule and its settings.
#[derive(Debug, Clone, PartialEq)]
pub enum Rule {
    /// Adam with decoupled weight decay.
    AdamW(AdamW),
    /// Adam; without bias correction it is what mlx-lm trains with.
    Adam(Adam),
    /// Stochastic gradient descent with momentum.
    Sgd(Sgd),
    /// Sign of an interpolated momentum.
    Lion(Lion),
    /// Orthogonalised momentum for matrices, AdamW for the rest.
    Muon(Muon),
    /// Adaptive with factored second moments.
    Adafactor(Adafactor),
}

impl Rule {
    /// AdamW with its default settings.
    pub fn adamw() -> Self {
        Self::AdamW(AdamW::default())
    }

    /// The name used in configuration files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
            Self::Adam(_) => "adam",
            Self::Sgd(_) => "sgd",
            Self::Lion(_) => "lion",
            Self::Muon(_) => "muon",
            Self::Adafactor(_) => "adafactor",
        }
    }

    fn update(&self) -> &dyn UpdateRule {
        match self {
            Self::AdamW(rule) => rule,
            Self::Adam(rule) => rule,
            Self::Sgd(rule) => rule,
            Self::Lion(rule) => rule,
            Self::Muon(rule) => rule,
            Self::Adafactor(rule) => rule,
        }
    }
}

/// Which tensors get their own learning rate or no weight decay.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Groups {
    /// LoRA+: learning rate of every `lora_b` relative to the rest; 1 is off, 16 usual.
    pub lora_b_ratio: f64,
}

impl Default for Groups {
    fn default() -> Self {
        Self { lora_b_ratio: 1.0 }
    }
}

impl Groups {
    fn learning_rate_factor(&self, name: &str) -> f64 {
        if name.ends_with(".lora_b") {
            self.lora_b_ratio
        } else {
            1.0
        }
    }
}

/// Weight decay is for matrices: norms, biases, DoRA magnitudes and the `a` of an embedding (one row a token, most of
/// them without a gradient in any one step) are left alone.
pub fn decays(name: &str, shape: &[i32]) -> bool {
    let of_embedding = name.contains("embed_tokens") || name.contains("wte") || name.contains("embedding");
    shape.len() >= 2 && !(of_embedding && (name.ends_with(".lora_a") || name.ends_with(".weight")))
}

impl Optimizer {
    /// Prepares f32 masters and all state for `trainables`, whose order every later call keeps.
    ///
    /// # Errors
    /// [`Error::Config`] for a setting out of range; MLX's own.
    pub fn new(rule: Rule, groups: Groups, trainables: &[(String, Array)]) -> Result<Self> {
        rule.update().check()?;
        if !(groups.lora_b_ratio > 0.0 && groups.lora_b_ratio.is_finite()) {
            let reason = format!("{} is not a positive number", groups.lora_b_ratio);
            return Err(Error::Config {
                key: "optimizer.lora_b_ratio",
                reason,
            });
        }
        let units = Unit::cut(rule.update(), &groups, trainables)?;
        let optimizer = Self {
            rule,
            units,
            count: Array::from_int(0),
            n_trainables: trainables.len(),
        };
        mlx_rs::transforms::eval(optimizer.pending())?;
        Ok(optimizer)
    }

    /// The rule in use.
    pub fn rule(&self) -> &Rule {
        &self.rule
    }

    /// Brings per-tensor gradients (in the order of the trainables) into the optimizer's own layout, in f32.
    ///
    /// # Errors
    /// [`Error::OptimizerState`] when the number of gradients is wrong; MLX's own.
    pub fn gather(&self, gradients: &[Array]) -> Result<Gradients> {
        if gradients.len() != self.n_trainables {
            let reason = format!(
                "{} gradients for {} trainable tensors",
                gradients.len(),
                self.n_trainables
            );
            return Err(Error::OptimizerState { reason });
        }
        Ok(Gradients(
            self.units
                .iter()
                .map(|unit| unit.gather(gradients))
                .collect::<Result<_>>()?,
        ))
    }

    /// One update at learning rate `lr`; returns the new trainables, in order and in their own dtype, unevaluated.
    ///
    /// `accept` is a boolean scalar: where it is false nothing changes, not even the step count.
    ///
    /// # Errors
    /// MLX's own.
    pub fn step(&mut self, gradients: &Gradients, lr: f64, accept: &Array) -> Result<Vec<Array>> {
        self.step_at(gradients, &self.learning_rates(lr), accept)?;
        self.trainables()
    }

    /// The learning rate of each unit at learning rate `lr`, f32 scalars.
    pub(crate) fn learning_rates(&self, lr: f64) -> Vec<Array> {
        let of_unit = |unit: &Unit| Array::from_f32((lr * unit.learning_rate_factor) as f32);
        self.units.iter().map(of_unit).collect()
    }

    /// [`step`](Self::step) at the [`learning_rates`](Self::learning_rates) of the units.
    pub(crate) fn step_at(&mut self, gradients: &Gradients, learning_rates: &[Array], accept: &Array) -> Result<()> {
        let next_count = self.count.add(Array::from_int(1))?;
        let t = next_count.as_dtype(Dtype::Float32)?;
        for ((unit, gradient), lr) in self.units.iter_mut().zip(&gradients.0).zip(learning_rates) {
            let step = Step {
                lr: lr.clone(),
                t: t.clone(),
                decays: unit.decays,
            };
            let (master, slots) = self.rule.update().update(&step, &unit.master, gradient, &unit.slots)?;
            unit.master = ops::select(accept, master, &unit.master)?;
            for (slot, next) in unit.slots.iter_mut().zip(slots) {
                *slot = ops::select(accept, next, &*slot)?;
            }
        }
        self.count = ops::select(accept, next_count, &self.count)?;
        Ok(())
    }

    /// The arrays to evaluate together with the trainables after a step.
    pub fn pending(&self) -> Vec<&Array> {
        let of_units = self
            .units
            .iter()
            .flat_map(|unit| std::iter::once(&unit.master).chain(&unit.slots));
        of_units.chain(std::iter::once(&self.count)).collect()
    }

    /// Replaces what [`pending`](Self::pending) lists.
    pub(crate) fn set_pending(&mut self, values: &[Array]) -> Result<()> {
        let places = self
            .units
            .iter_mut()
            .flat_map(|unit| std::iter::once(&mut unit.master).chain(&mut unit.slots))
            .chain(std::iter::once(&mut self.count));
        let mut n_places = 0;
        for (place, value) in places.zip(values) {
            *place = value.clone();
            n_places += 1;
        }
        if n_places != values.len() || n_places != self.pending().len() {
            let reason = format!("{} arrays for {} places", values.len(), self.pending().len());
            return Err(Error::OptimizerState { reason });
        }
        Ok(())
    }

    /// The f32 weights, one array a unit.
    pub(crate) fn masters(&self) -> Vec<Array> {
        self.units.iter().map(|unit| unit.master.clone()).collect()
    }

    /// The current trainables, in order and in their own dtype.
    ///
    /// # Errors
    /// MLX's own.
    pub fn trainables(&self) -> Result<Vec<Array>> {
        self.trainables_of(&self.masters(), None)
    }

    /// The trainables of other [`masters`](Self::masters), in `dtype` instead of their own if one is given: narrowed all at
    /// once, before they are cut.
    pub(crate) fn trainables_of(&self, masters: &[Array], dtype: Option<Dtype>) -> Result<Vec<Array>> {
        let mut values: Vec<(usize, Array)> = Vec::with_capacity(self.n_trainables);
        for (unit, master) in self.units.iter().zip(masters) {
            match dtype {
                Some(dtype) => values.extend(unit.scatter(&master.as_dtype(dtype)?, false)?),
                None => values.extend(unit.scatter(master, true)?),
            }
        }
        values.sort_by_key(|(index, _)| *index);
        Ok(values.into_iter().map(|(_, value)| value).collect())
    }

    /// Updates that counted. Reads the device.
    ///
    /// # Errors
    /// MLX's own.
    pub fn count(&self) -> Result<u64> {
        Ok(self.count.try_item_exact::<i32>()?.max(0) as u64)
    }

    /// Everything needed to continue exactly: `<slot>/<tensor>` in f32, and `w/<tensor>` where the trainable itself is
    /// not f32. The step count is kept apart, as an integer ([`count`](Self::count)).
    ///
    /// # Errors
    /// MLX's own.
    pub fn state(&self) -> Result<BTreeMap<String, Array>> {
        let mut state = BTreeMap::new();
        for unit in &self.units {
            for (slot, array) in self.rule.update().slots(unit.master.shape()).iter().zip(&unit.slots) {
                unit.export(slot, array, &mut state)?;
            }
            for (part, (_, master)) in unit.parts.iter().zip(unit.scatter(&unit.master, false)?) {
                if part.dtype != Dtype::Float32 {
                    state.insert(format!("w/{}", part.name), master);
                }
            }
        }
        Ok(state)
    }

    /// Puts saved state back; `trainables` are the values saved beside it.
    ///
    /// # Errors
    /// [`Error::OptimizerState`] naming a tensor that is missing, unexpected or of another shape.
    pub fn restore(&mut self, state: &BTreeMap<String, Array>, trainables: &[Array], count: u64) -> Result<()> {
        let mut unused: std::collections::BTreeSet<&str> = state.keys().map(String::as_str).collect();
        let mut find = |name: String, shape: &[i32]| -> Result<Array> {
            let (key, value) = state.get_key_value(&name).ok_or_else(|| Error::OptimizerState {
                reason: format!("{name} is missing"),
            })?;
            if value.shape() != shape {
                let reason = format!("{name}: expected shape {shape:?}, found {:?}", value.shape());
                return Err(Error::OptimizerState { reason });
            }
            unused.remove(key.as_str());
            Ok(value.clone())
        };
        for unit in &mut self.units {
            unit.restore(self.rule.update(), trainables, &mut find)?;
        }
        if let Some(name) = unused.first() {
            return Err(Error::OptimizerState {
                reason: format!("{name} belongs to no trainable tensor"),
            });
        }
        let count = i32::try_from(count).map_err(|_| Error::OptimizerState {
            reason: format!("step count {count}"),
        })?;
        self.count = Array::from_int(count);
        Ok(mlx_rs::transforms::eval(self.pending())?)
    }
}

/// Gradients in the optimizer's layout, f32.
#[derive(Debug, Clone)]
pub struct Gradients(Vec<Array>);

impl Gradients {
    /// Element-wise sum of two gradients of the same optimizer.
    ///
    /// # Errors
    /// MLX's own.
    pub fn add(&self, other: &Self) -> Result<Self> {
        let sums = self
            .0
            .iter()
            .zip(&other.0)
            .map(|(a, b)| a.add(b))
            .collect::<Result<_, _>>()?;
        Ok(Self(sums))
    }

    /// Every gradient times one scalar.
    ///
    /// # Errors
    /// MLX's own.
    pub fn scale(&self, factor: &Array) -> Result<Self> {
        Ok(Self(
            self.0.iter().map(|g| g.multiply(factor)).collect::<Result<_, _>>()?,
        ))
    }

    /// Global L2 norm, a lazy scalar.
    ///
    /// # Errors
    /// MLX's own.
    pub fn norm(&self) -> Result<Array> {
        clip::global_norm(&self.0)
    }

    /// Gradients from the arrays behind others of the same optimizer.
    pub(crate) fn from_arrays(arrays: &[Array]) -> Self {
        Self(arrays.to_vec())
    }

    /// The arrays behind it.
    pub fn arrays(&self) -> &[Array] {
        &self.0
    }
}

/// What a rule needs to know about one update.
pub(crate) struct Step {
    /// Learning rate, f32 scalar.
    pub(crate) lr: Array,
    /// Number of this update among those that counted, from 1, f32 scalar.
    pub(crate) t: Array,
    /// Whether weight decay applies.
    pub(crate) decays: bool,
}

impl Step {
    /// `1 − β^t`, in f32 without the cancellation that `1 − powf(β, t)` suffers for small `t`.
    pub(crate) fn bias_correction(&self, beta: f64) -> Result<Array> {
        Ok(ops::expm1(self.t.multiply(scalar(beta.ln()))?)?.negative()?)
    }
}

/// One optimizer: how a parameter moves, and what it remembers.
pub(crate) trait UpdateRule {
    /// Refuses settings out of range.
    fn check(&self) -> Result<()>;

    /// True when elements do not influence one another, so that tensors may be laid end to end.
    fn is_elementwise(&self) -> bool;

    /// What is remembered for a parameter of this shape.
    fn slots(&self, shape: &[i32]) -> Vec<Slot>;

    /// The moved parameter and the new slots.
    fn update(&self, step: &Step, parameter: &Array, gradient: &Array, slots: &[Array]) -> Result<(Array, Vec<Array>)>;
}

/// Something remembered for a parameter, starting at zero.
pub(crate) struct Slot {
    pub(crate) name: &'static str,
    pub(crate) shape: Vec<i32>,
}

impl Slot {
    pub(crate) fn new(name: &'static str, shape: &[i32]) -> Self {
        Self {
            name,
            shape: shape.to_vec(),
        }
    }
}

/// One array that a rule updates at once: a flat parameter group or a single tensor.
#[derive(Debug, Clone)]
struct Unit {
    parts: Vec<Part>,
    master: Array,
    slots: Vec<Array>,
    learning_rate_factor: f64,
    decays: bool,
    flat: bool,
}

/// A trainable inside a unit.
#[derive(Debug, Clone)]
struct Part {
    index: usize,
    name: String,
    shape: Vec<i32>,
    dtype: Dtype,
    size: i32,
}

impl Unit {
    fn cut(rule: &dyn UpdateRule, groups: &Groups, trainables: &[(String, Array)]) -> Result<Vec<Self>> {
        let mut cuts: BTreeMap<(u64, bool, usize), Vec<usize>> = BTreeMap::new();
        for (index, (name, value)) in trainables.iter().enumerate() {
            let factor = groups.learning_rate_factor(name).to_bits();
            let own_unit = if rule.is_elementwise() { 0 } else { index };
            cuts.entry((factor, decays(name, value.shape()), own_unit))
                .or_default()
                .push(index);
        }
        cuts.into_iter()
            .map(|((factor, decays, _), members)| {
                let parts: Vec<Part> = members
                    .iter()
                    .map(|&index| Part::of(index, &trainables[index]))
                    .collect();
                let flat = rule.is_elementwise();
                let values: Vec<Array> = trainables.iter().map(|(_, value)| value.clone()).collect();
                let mut unit = Self {
                    parts,
                    master: Array::from_int(0),
                    slots: Vec::new(),
                    learning_rate_factor: f64::from_bits(factor),
                    decays,
                    flat,
                };
                unit.master = unit.gather(&values)?;
                let slots = rule.slots(unit.master.shape());
                unit.slots = slots
                    .iter()
                    .map(|slot| ops::zeros::<f32>(&slot.shape))
                    .collect::<Result<_, _>>()?;
                Ok(unit)
            })
            .collect()
    }

    fn gather(&self, values: &[Array]) -> Result<Array> {
        if !self.flat {
            return Ok(values[self.parts[0].index].as_dtype(Dtype::Float32)?);
        }
        let dtype = values[self.parts[0].index].dtype();
        if self.parts.iter().all(|part| values[part.index].dtype() == dtype) {
            // Widened all at once.
            let flattened = self.parts.iter().map(|part| values[part.index].reshape(&[-1]));
            return Ok(join(flattened.collect::<Result<Vec<_>, _>>()?)?.as_dtype(Dtype::Float32)?);
        }
        let flattened = self
            .parts
            .iter()
            .map(|part| values[part.index].as_dtype(Dtype::Float32)?.reshape(&[-1]));
        join(flattened.collect::<Result<Vec<_>, _>>()?)
    }

    /// The parts of an array in this unit's layout, shaped, with their place among the trainables.
    fn scatter(&self, array: &Array, own_dtype: bool) -> Result<Vec<(usize, Array)>> {
        let pieces = if self.flat {
            split(array, &self.parts)?
        } else {
            vec![array.clone()]
        };
        let shaped = self.parts.iter().zip(pieces).map(|(part, piece)| {
            let piece = piece.reshape(&part.shape)?;
            Ok((part.index, if own_dtype { piece.as_dtype(part.dtype)? } else { piece }))
        });
        shaped.collect()
    }

    fn export(&self, slot: &Slot, array: &Array, state: &mut BTreeMap<String, Array>) -> Result<()> {
        if !self.flat {
            state.insert(format!("{}/{}", slot.name, self.parts[0].name), array.clone());
            return Ok(());
        }
        for (part, (_, piece)) in self.parts.iter().zip(self.scatter(array, false)?) {
            state.insert(format!("{}/{}", slot.name, part.name), piece);
        }
        Ok(())
    }

    fn restore(
        &mut self,
        rule: &dyn UpdateRule,
        trainables: &[Array],
        find: &mut dyn FnMut(String, &[i32]) -> Result<Array>,
    ) -> Result<()> {
        let masters = self.parts.iter().map(|part| {
            if part.dtype == Dtype::Float32 {
                return Ok(trainables[part.index].reshape(&[-1])?);
            }
            Ok(find(format!("w/{}", part.name), &part.shape)?.reshape(&[-1])?)
        });
        self.master = join(masters.collect::<Result<Vec<_>>>()?)?.reshape(self.master.shape())?;
        let slots = rule.slots(self.master.shape()).into_iter().map(|slot| {
            if !self.flat {
                return find(format!("{}/{}", slot.name, self.parts[0].name), &slot.shape);
            }
            let pieces = self.parts.iter().map(|part| {
                let piece = find(format!("{}/{}", slot.name, part.name), &part.shape)?;
                Ok(piece.reshape(&[-1])?)
            });
            join(pieces.collect::<Result<Vec<_>>>()?)
        });
        self.slots = slots.collect::<Result<Vec<_>>>()?;
        Ok(())
    }
}

impl Part {
    fn of(index: usize, (name, value): &(String, Array)) -> Self {
        Self {
            index,
            name: name.clone(),
            shape: value.shape().to_vec(),
            dtype: value.dtype(),
            size: value.size() as i32,
        }
    }
}

fn join(pieces: Vec<Array>) -> Result<Array> {
    match pieces.as_slice() {
        [only] => Ok(only.clone()),
        _ => Ok(ops::concatenate(&pieces, 0)?),
    }
}

fn split(array: &Array, parts: &[Part]) -> Result<Vec<Array>> {
    let mut ends: Vec<i32> = parts
        .iter()
        .scan(0, |end, part| {
            *end += part.size;
            Some(*end)
        })
        .collect();
    ends.pop();
    if ends.is_empty() {
        Ok(vec![array.clone()])
    } else {
        Ok(array.split_at_indices(&ends, 0)?)
    }
}

pub(crate) fn scalar(value: f64) -> Array {
    Array::from_f32(value as f32)
}

/// `β·average + (1 − β)·value`, with `1 − β` taken in f64.
pub(crate) fn moving_average(average: &Array, value: &Array, beta: f64) -> Result<Array> {
    Ok(average
        .multiply(scalar(beta))?
        .add(value.multiply(scalar(1.0 - beta))?)?)
}

/// The same with a `β` that lives on the device.
pub(crate) fn moving_average_by(average: &Array, value: &Array, beta: &Array) -> Result<Array> {
    Ok(average
        .multiply(beta)?
        .add(value.multiply(scalar(1.0).subtract(beta)?)?)?)
}

pub(crate) fn check_range(holds: bool, key: &'static str, value: f64, range: &str) -> Result<()> {
    if holds {
        Ok(())
    } else {
        Err(Error::Config {
            key,
            reason: format!("{value} is outside {range}"),
        })
    }
}

pub(crate) fn check_betas(betas: [f64; 2]) -> Result<()> {
    betas
        .iter()
        .try_for_each(|&b| check_range((0.0..1.0).contains(&b), "optimizer.betas", b, "[0, 1)"))
}
