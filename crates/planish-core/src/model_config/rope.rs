//! The rotary settings of a `config.json`, in each of their spellings.
//!
//! `rope_theta` beside `rope_scaling` (kind under `rope_type`, formerly `type`), or one `rope_parameters` object that holds
//! everything, for all layers or for each layer type. Where two places speak they must agree, and no key of these objects is passed
//! over. A `rope_parameters` of kind `default`, as programs write it unasked, gives way to a `rope_scaling` of another kind.

use serde_json::Value;

use super::keys::{Keys, describe};
use crate::Result;
use crate::arch::{Rope, RopePairs, RopeScaling};

const MAX_FACTOR: f64 = 1e6;
const MAX_CONTEXT: usize = 1 << 30;
/// Keys that concern other inputs than text.
const WITHOUT_EFFECT: [&str; 2] = ["mrope_section", "mrope_interleaved"];

/// What `rope_parameters` may be cut by.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

/// Where the settings stand, and what holds where they are silent.
pub(crate) struct RopeSettings<'a, 'k> {
    /// The model's keys.
    keys: &'k Keys<'a>,
    /// `rope_parameters` and `rope_scaling`, as far as present.
    objects: Vec<Keys<'a>>,
    /// Key for theta beside the objects; empty = none.
    pub(crate) theta_key: &'static str,
    /// Theta, if nothing says it.
    pub(crate) theta: f64,
    /// Share of each head that turns, if nothing says it; `None` = all of it, whatever a file says.
    pub(crate) partial: Option<f64>,
    /// Width of a head.
    pub(crate) head_dim: usize,
    /// The model's longest context.
    pub(crate) context: usize,
    /// Which numbers are a pair.
    pub(crate) pairs: RopePairs,
}

impl<'a, 'k> RopeSettings<'a, 'k> {
    /// One rotation for all layers.
    pub(crate) fn new(keys: &'k Keys<'a>, head_dim: usize, context: usize) -> Result<Self> {
        let mut objects = Vec::new();
        for name in ["rope_parameters", "rope_scaling"] {
            let Some(object) = keys.object(name)? else { continue };
            if object.map.values().any(Value::is_object) {
                return Err(keys.unsupported(name, "one set of parameters for all layers"));
            }
            objects.push(object);
        }
        // As in transformers, the whole of an object of kind `default` gives way, its theta too.
        if objects.len() == 2 && is_default(&objects[0]) && !is_default(&objects[1]) {
            objects.remove(0);
        }
        Ok(Self {
            objects,
            theta_key: "rope_theta",
            ..Self::silent(keys, head_dim, context)
        })
    }

    /// The rotation of layers of one type: what `rope_parameters` has under its name. `None` where it is not cut by type.
    pub(crate) fn of_type(
        keys: &'k Keys<'a>,
        layer_type: &str,
        head_dim: usize,
        context: usize,
    ) -> Result<Option<Self>> {
        let Some(parameters) = keys.object("rope_parameters")? else {
            return Ok(None);
        };
        if !parameters.map.values().any(Value::is_object) {
            return Ok(None);
        }
        let objects = parameters.object(layer_type)?.into_iter().collect();
        LAYER_TYPES.iter().for_each(|name| _ = parameters.present(name));
        parameters.refuse_unread()?;
        Ok(Some(Self {
            objects,
            ..Self::silent(keys, head_dim, context)
        }))
    }

    /// The rotation of layers that nothing speaks of.
    pub(crate) fn silent(keys: &'k Keys<'a>, head_dim: usize, context: usize) -> Self {
        Self {
            keys,
            objects: Vec::new(),
            theta_key: "",
            theta: 10_000.0,
            partial: None,
            head_dim,
            context,
            pairs: RopePairs::Halves,
        }
    }

    /// The rotation.
    pub(crate) fn read(self) -> Result<Rope> {
        let theta = self.number(self.theta_key, "rope_theta", f64::from(f32::MAX))?;
        let partial = self.number("partial_rotary_factor", "partial_rotary_factor", 1.0)?;
        if self.partial.is_none() && partial.is_some_and(|share| share != 1.0) {
            return Err(self
                .keys
                .unsupported("partial_rotary_factor", "this family turns whole heads"));
        }
        let dims = (self.head_dim as f64 * partial.or(self.partial).unwrap_or(1.0)) as usize;
        if dims < 2 || !dims.is_multiple_of(2) {
            let rule = format!("a share of head_dim = {} that is an even number", self.head_dim);
            return Err(self.keys.wrong("partial_rotary_factor", &dims.to_string(), &rule));
        }
        let theta = theta.unwrap_or(self.theta) as f32;
        let scaling = self.scaling(theta, dims)?;
        for object in &self.objects {
            for key in WITHOUT_EFFECT {
                object.present(key);
            }
            if let Some(context) = object.optional_size("max_position_embeddings", MAX_CONTEXT)?
                && context != self.context
            {
                let rule = format!("max_position_embeddings = {}, or no such key", self.context);
                return Err(object.wrong("max_position_embeddings", &context.to_string(), &rule));
            }
            object.refuse_unread()?;
        }
        Ok(Rope {
            theta,
            dims,
            pairs: self.pairs,
            scaling,
        })
    }

    fn scaling(&self, theta: f32, dims: usize) -> Result<RopeScaling> {
        let Some((object, key, kind)) = self.kind()? else {
            return Ok(RopeScaling::None);
        };
        match kind {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear {
                factor: self.factor(object)?,
            }),
            "dynamic" if dims > 2 => Ok(RopeScaling::Dynamic {
                factor: self.factor(object)?,
                original_max_position_embeddings: self.context,
            }),
            "llama3" => self.llama3(object),
            "yarn" if theta > 1.0 => self.yarn(object),
            "longrope" | "su" => self.longrope(object, dims),
            "dynamic" | "yarn" => Err(object.unsupported(key, "it needs a theta above 1 and more than one pair")),
            _ => Err(object.unsupported(key, "planish has default, linear, dynamic, llama3, yarn and longrope")),
        }
    }

    /// The object that says how the rotation is stretched, under which key, and how.
    fn kind(&self) -> Result<Option<(&Keys<'a>, &'static str, &'a str)>> {
        let mut found: Option<(&Keys<'a>, &'static str, &'a str)> = None;
        for object in &self.objects {
            let own = match (object.text("rope_type")?, object.text("type")?) {
                (Some(kind), Some(older)) if kind != older => {
                    return Err(object.wrong("type", older, &format!("rope_type = {kind}, or no such key")));
                }
                (Some(kind), _) => ("rope_type", kind),
                (None, Some(kind)) => ("type", kind),
                (None, None) if self.says_more_than_theta(object) => {
                    return Err(object.missing("rope_type", "a kind of scaling, such as linear or llama3"));
                }
                (None, None) => continue,
            };
            found = match found {
                Some((_, _, "default")) | None => Some((object, own.0, own.1)),
                Some(earlier) if own.1 == "default" || own.1 == earlier.2 => Some(earlier),
                Some(earlier) => {
                    let rule = format!(
                        "{} = {}, or one of the two objects",
                        earlier.0.dotted(earlier.1),
                        earlier.2
                    );
                    return Err(object.wrong(own.0, own.1, &rule));
                }
            };
        }
        Ok(found)
    }

    fn says_more_than_theta(&self, object: &Keys<'a>) -> bool {
        let known = ["rope_theta", "partial_rotary_factor"];
        let mut keys = object.map.iter().filter(|(_, value)| !value.is_null());
        keys.any(|(key, _)| !known.contains(&key.as_str()))
    }

    fn factor(&self, object: &Keys<'a>) -> Result<f32> {
        match self.required(object, "factor")? {
            factor if factor >= 1.0 => Ok(factor as f32),
            factor => Err(object.wrong("factor", &factor.to_string(), "at least 1")),
        }
    }

    fn required(&self, object: &Keys<'a>, key: &'static str) -> Result<f64> {
        self.number("", key, MAX_FACTOR)?
            .ok_or_else(|| object.missing(key, "a positive number"))
    }

    fn llama3(&self, object: &Keys<'a>) -> Result<RopeScaling> {
        let (low, high) = (
            self.required(object, "low_freq_factor")?,
            self.required(object, "high_freq_factor")?,
        );
        if low >= high {
            let rule = format!("less than high_freq_factor = {high}");
            return Err(object.wrong("low_freq_factor", &low.to_string(), &rule));
        }
        Ok(RopeScaling::Llama3 {
            factor: self.factor(object)?,
            low_freq_factor: low as f32,
            high_freq_factor: high as f32,
            original_max_position_embeddings: object.size("original_max_position_embeddings", MAX_CONTEXT)?,
        })
    }

    fn yarn(&self, object: &Keys<'a>) -> Result<RopeScaling> {
        let factor = self.factor(object)?;
        let optional = |key: &'static str| self.number("", key, MAX_FACTOR);
        let growth = |scale: f64| 0.1 * scale * f64::from(factor).ln() + 1.0;
        let attention_factor = match (
            optional("attention_factor")?,
            optional("mscale")?,
            optional("mscale_all_dim")?,
        ) {
            (Some(given), ..) => given,
            (None, Some(scale), Some(of_all)) => growth(scale) / growth(of_all),
            (None, ..) => growth(1.0),
        };
        let (fast, slow) = (
            optional("beta_fast")?.unwrap_or(32.0),
            optional("beta_slow")?.unwrap_or(1.0),
        );
        if fast < slow {
            return Err(object.wrong("beta_fast", &fast.to_string(), &format!("at least beta_slow = {slow}")));
        }
        Ok(RopeScaling::Yarn {
            factor,
            beta_fast: fast as f32,
            beta_slow: slow as f32,
            truncate: object.flag("truncate")?.unwrap_or(true),
            attention_factor: attention_factor as f32,
            original_max_position_embeddings: self.original()?.unwrap_or(self.context),
        })
    }

    fn longrope(&self, object: &Keys<'a>, dims: usize) -> Result<RopeScaling> {
        let list = |key: &str| match object.positives(key)? {
            Some(list) if list.len() == dims / 2 => Ok(list),
            Some(list) => Err(object.wrong(
                key,
                &format!("{} numbers", list.len()),
                &format!("{}, one per pair", dims / 2),
            )),
            None => Err(object.missing(key, "a list of numbers, one per pair")),
        };
        let key = "original_max_position_embeddings";
        let original = self
            .original()?
            .ok_or_else(|| object.missing(key, "a positive integer"))?;
        let stretch = self
            .number("", "factor", MAX_FACTOR)?
            .unwrap_or(self.context as f64 / original as f64);
        let growth = match stretch > 1.0 && original > 1 {
            true => (1.0 + stretch.ln() / (original as f64).ln()).sqrt(),
            false => 1.0,
        };
        let given = self.number("", "attention_factor", MAX_FACTOR)?;
        Ok(RopeScaling::LongRope {
            short_factor: list("short_factor")?,
            long_factor: list("long_factor")?,
            attention_factor: given.unwrap_or(growth) as f32,
            original_max_position_embeddings: original,
        })
    }

    /// The context before stretching: in the objects or beside them.
    fn original(&self) -> Result<Option<usize>> {
        let key = "original_max_position_embeddings";
        let number = self.number(key, key, MAX_CONTEXT as f64)?;
        Ok(number.map(|number| number as usize).filter(|number| *number > 0))
    }

    /// A number above 0 that `beside` (a key of the model, if not empty) and `key` of the objects agree on.
    fn number(&self, beside: &str, key: &'static str, max: f64) -> Result<Option<f64>> {
        let top = if beside.is_empty() {
            None
        } else {
            self.keys
                .positive(beside, max)?
                .map(|number| (beside.to_owned(), number))
        };
        let mut places: Vec<(String, f64)> = top.into_iter().collect();
        for object in &self.objects {
            places.extend(object.positive(key, max)?.map(|number| (object.dotted(key), number)));
        }
        match places.as_slice() {
            [first, others @ ..] => match others.iter().find(|other| other.1 != first.1) {
                Some((name, number)) => {
                    let rule = format!("{name} = {number}, or no such key");
                    Err(self.keys.wrong(&first.0, &describe(&first.1.into()), &rule))
                }
                None => Ok(Some(first.1)),
            },
            [] => Ok(None),
        }
    }
}

/// Whether an object says nothing of stretching.
fn is_default(object: &Keys<'_>) -> bool {
    let kind = object.present("rope_type").or_else(|| object.present("type"));
    kind.is_none_or(|kind| kind.as_str() == Some("default"))
}
