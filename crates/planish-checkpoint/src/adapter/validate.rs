//! Checks that hold for every adapter, whatever layout it came in.

use std::collections::BTreeMap;
use std::path::Path;

use planish_core::suggest::nearest;
use planish_tensors::HostTensor;

use super::names::{Leaf, mlx_name, split_block, split_mlx};
use super::{Adapter, AdapterReport, BaseModel, BaseModule, Method, ReadOptions, Refusal, Sidecar};
use crate::error::{Error, Result};

/// Every module complete, of the right rank, made of finite floats, and part of the base where that is known.
pub(super) fn check(
    adapter: &Adapter,
    options: &ReadOptions<'_>,
    path: &Path,
    report: &mut AdapterReport,
) -> Result<()> {
    check_values(adapter, path)?;
    let refusal = match adapter.method {
        Method::Full => None,
        Method::Lora | Method::Dora => find_refusal(adapter, options.base).err(),
    };
    match refusal {
        Some(refusal) => Err(Error::refused(path, refusal)),
        None => check_base_identity(&adapter.sidecar, options, path, report),
    }
}

fn check_values(adapter: &Adapter, path: &Path) -> Result<()> {
    for (name, tensor) in &adapter.tensors {
        if !tensor.dtype.is_float() {
            return Err(planish_tensors::Error::NotFloat { dtype: tensor.dtype }.into());
        }
        if let Some(found) = tensor.view(name).find_non_finite() {
            let (index, value) = (found.index, found.value);
            return Err(planish_tensors::Error::NonFinite {
                path: path.to_path_buf(),
                name: found.name,
                index,
                value,
            }
            .into());
        }
    }
    Ok(())
}

fn find_refusal(adapter: &Adapter, base: Option<&BaseModel>) -> Result<(), Refusal> {
    if adapter.tensors.is_empty() {
        return Err(Refusal::EmptyAdapter {
            reason: "it holds no tensors".to_string(),
        });
    }
    let unknown: Vec<String> = adapter
        .tensors
        .keys()
        .filter(|name| split_mlx(name).is_none())
        .cloned()
        .collect();
    if !unknown.is_empty() {
        return Err(Refusal::UnknownModule { names: unknown });
    }
    for module in adapter.modules() {
        check_module(adapter, module)?;
    }
    base.map_or(Ok(()), |base| check_base(adapter, base))
}

fn check_module(adapter: &Adapter, module: &str) -> Result<(), Refusal> {
    let need = |leaf: Leaf| {
        let name = mlx_name(module, leaf);
        let reason = format!("{name} is missing");
        adapter.tensors.get(&name).ok_or(Refusal::EmptyAdapter { reason })
    };
    let (a, b) = (need(Leaf::A)?, need(Leaf::B)?);
    let output_dims = match (a.shape.as_slice(), b.shape.as_slice()) {
        ([_, rank], [rank_b, output_dims]) | ([_, rank, _], [_, output_dims, rank_b])
            if a.shape.len() == 2 || a.shape[0] == b.shape[0] =>
        {
            check_rank(module, *rank, adapter.rank)?;
            check_rank(module, *rank_b, adapter.rank)?;
            *output_dims
        }
        _ => {
            let (name, expected) = (mlx_name(module, Leaf::B), vec![adapter.rank, 0]);
            return Err(Refusal::ShapeMismatch {
                name,
                found: b.shape.clone(),
                expected,
            });
        }
    };
    match (adapter.method, adapter.tensors.get(&mlx_name(module, Leaf::Magnitude))) {
        (Method::Dora, None) => need(Leaf::Magnitude).map(drop),
        (Method::Dora, Some(m)) => {
            // An embedding has one magnitude a token, a linear layer one an output.
            let lengths = [output_dims, a.shape[0]];
            let fits = m.shape.len() == 1 && lengths.contains(&m.shape[0]);
            let name = mlx_name(module, Leaf::Magnitude);
            if fits {
                Ok(())
            } else {
                Err(Refusal::ShapeMismatch {
                    name,
                    found: m.shape.clone(),
                    expected: vec![output_dims],
                })
            }
        }
        (_, Some(_)) => Err(Refusal::UnknownModule {
            names: vec![mlx_name(module, Leaf::Magnitude)],
        }),
        (_, None) => Ok(()),
    }
}

fn check_rank(module: &str, found: usize, expected: usize) -> Result<(), Refusal> {
    if found == expected {
        return Ok(());
    }
    Err(Refusal::RankConflict {
        module: module.to_string(),
        found,
        expected,
    })
}

fn check_base(adapter: &Adapter, base: &BaseModel) -> Result<(), Refusal> {
    let unknown: Vec<&str> = adapter
        .modules()
        .into_iter()
        .filter(|m| !base.modules.contains_key(*m))
        .collect();
    if let Some(fused) = unknown.iter().find_map(|module| fused_projection(module, base)) {
        return Err(fused);
    }
    if !unknown.is_empty() {
        let describe = |module: &str| match nearest(module, base.modules.keys().map(String::as_str)) {
            Some(near) => format!("{module} (the nearest is {near})"),
            None => module.to_string(),
        };
        return Err(Refusal::UnknownModule {
            names: unknown.into_iter().map(describe).collect(),
        });
    }
    for module in adapter.modules() {
        check_shapes(adapter, module, base.modules[module])?;
    }
    Ok(())
}

fn check_shapes(adapter: &Adapter, module: &str, base: BaseModule) -> Result<(), Refusal> {
    let expect = |leaf: Leaf, expected: Vec<usize>| match adapter.tensor(module, leaf) {
        Some(HostTensor { shape, .. }) if *shape != expected => Err(Refusal::ShapeMismatch {
            name: mlx_name(module, leaf),
            found: shape.clone(),
            expected,
        }),
        _ => Ok(()),
    };
    expect(Leaf::A, vec![base.input_dims, adapter.rank])?;
    expect(Leaf::B, vec![adapter.rank, base.output_dims])?;
    expect(
        Leaf::Magnitude,
        vec![if base.is_embedding {
            base.input_dims
        } else {
            base.output_dims
        }],
    )
}

/// Projections that some families fuse, by the names of the fused module and of its parts.
const FUSED: [(&[&str], &[&str]); 2] = [
    (
        &["qkv_proj", "query_key_value", "Wqkv", "W_pack", "c_attn"],
        &["q_proj", "k_proj", "v_proj"],
    ),
    (&["gate_up_proj"], &["gate_proj", "up_proj"]),
];

/// When the base has the same projections in another cut: fused where the adapter has them apart, or the reverse.
fn fused_projection(module: &str, base: &BaseModel) -> Option<Refusal> {
    let (parent, name) = module.rsplit_once('.')?;
    let base_names = |names: &[&'static str]| {
        let there = names
            .iter()
            .filter(|n| base.modules.contains_key(&format!("{parent}.{n}")));
        there.copied().collect::<Vec<_>>().join(", ")
    };
    FUSED.iter().find_map(|(fused, parts)| {
        let other = if fused.contains(&name) {
            base_names(parts)
        } else if parts.contains(&name) {
            base_names(fused)
        } else {
            return None;
        };
        (!other.is_empty()).then(|| Refusal::FusedProjection {
            module: module.to_string(),
            base_has: other,
        })
    })
}

/// Whether it was trained on this base, where both are known.
pub(super) fn check_base_identity(
    sidecar: &Sidecar,
    options: &ReadOptions<'_>,
    path: &Path,
    report: &mut AdapterReport,
) -> Result<()> {
    match base_mismatch(sidecar, options) {
        None => Ok(()),
        Some(refusal) if options.note_another_base => {
            report.notes.push(format!("{}: {refusal}", path.display()));
            Ok(())
        }
        Some(refusal) => Err(Error::refused(path, refusal)),
    }
}

/// The first of the marks known of both that differs.
fn base_mismatch(sidecar: &Sidecar, options: &ReadOptions<'_>) -> Option<Refusal> {
    let (trained_on, given) = (&sidecar.base, &options.base.filter(|_| !options.force)?.identity);
    let marks = [
        (
            "SHA-256 of config.json",
            &trained_on.config_sha256,
            &given.config_sha256,
        ),
        (
            "the fingerprint of the weights",
            &trained_on.weights_fingerprint,
            &given.weights_fingerprint,
        ),
    ];
    marks.into_iter().find_map(|(what, expected, found)| {
        let (expected, found) = (expected.as_ref()?, found.as_ref()?);
        (expected != found).then(|| Refusal::BaseMismatch {
            what: what.to_string(),
            expected: expected.clone(),
            found: found.clone(),
        })
    })
}

/// Layers and modules of an adapter as a grid: which suffix occurs in which layer.
pub(super) struct Grid<'a> {
    /// What stands before the layer index.
    pub(super) prefix: &'a str,
    pub(super) layers_by_suffix: BTreeMap<&'a str, Vec<usize>>,
    /// Modules outside the blocks.
    pub(super) outside: Vec<&'a str>,
}

impl<'a> Grid<'a> {
    pub(super) fn of(modules: impl IntoIterator<Item = &'a str>) -> Self {
        let mut grid = Self {
            prefix: "model.layers.",
            layers_by_suffix: BTreeMap::new(),
            outside: Vec::new(),
        };
        for module in modules {
            match split_block(module) {
                Some(block) => {
                    grid.prefix = block.prefix;
                    grid.layers_by_suffix
                        .entry(block.suffix)
                        .or_default()
                        .push(block.layer_idx);
                }
                None => grid.outside.push(module),
            }
        }
        grid
    }

    pub(super) fn layers(&self) -> Vec<usize> {
        let mut layers: Vec<usize> = self.layers_by_suffix.values().flatten().copied().collect();
        layers.sort_unstable();
        layers.dedup();
        layers
    }
}
