//! Rules about which crate may see which.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

use super::Finding;

const MLX: &str = "mlx-sys";

/// Crates that must work where MLX does not build, tests included.
const WITHOUT_MLX: &[&str] = &[
    "planish-core",
    "planish-tensors",
    "planish-data",
    "planish-hub",
    "planish-checkpoint",
    "planish-kernels",
    "wheel-fetch",
    "metal-check",
    "coreml-mil",
    "coreai-asset",
    "planish-export",
    "xtask",
];

/// Our crates from the bottom up, each with those of ours that it may depend on. `*` = any.
const LAYERS: &[(&str, &[&str])] = &[
    ("planish-core", &[]),
    ("wheel-fetch", &[]),
    ("planish-kernels", &[]),
    ("metal-check", &[]),
    ("coreml-mil", &[]),
    ("coreai-asset", &[]),
    ("planish-data", &["planish-core"]),
    ("planish-tensors", &["planish-core"]),
    ("planish-checkpoint", &["planish-core", "planish-tensors"]),
    ("planish-hub", &["planish-core", "planish-tensors", "wheel-fetch"]),
    ("mlx-sys", &["wheel-fetch"]),
    ("planish-mlx", &["mlx-sys", "planish-core"]),
    (
        "planish-backend",
        &[
            "metal-check",
            "planish-core",
            "planish-checkpoint",
            "planish-mlx",
            "mlx-sys",
        ],
    ),
    (
        "planish-nn",
        &[
            "planish-core",
            "planish-tensors",
            "planish-checkpoint",
            "planish-kernels",
            "planish-mlx",
            "mlx-sys",
        ],
    ),
    (
        "planish-loss",
        &["planish-core", "planish-kernels", "planish-mlx", "mlx-sys"],
    ),
    (
        "planish-train",
        &[
            "planish-core",
            "planish-data",
            "planish-tensors",
            "planish-checkpoint",
            "planish-mlx",
            "mlx-sys",
            "planish-backend",
            "planish-nn",
            "planish-loss",
        ],
    ),
    (
        "planish-export",
        &["coreml-mil", "planish-core", "planish-tensors", "planish-checkpoint"],
    ),
    ("planish-cli", &["*"]),
    ("planish-examples", &["*"]),
    ("planish-benches", &["*"]),
    (
        "xtask",
        &[
            "metal-check",
            "wheel-fetch",
            "planish-core",
            "planish-tensors",
            "planish-checkpoint",
        ],
    ),
];

/// The packages of a build and what each depends on.
pub(crate) struct Graph {
    packages: BTreeMap<String, Package>,
    members: BTreeSet<String>,
}

struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

struct Dependency {
    id: String,
    /// Only for the tests and benches of the package itself.
    is_dev_only: bool,
}

impl Graph {
    /// Reads the output of `cargo metadata`.
    pub(crate) fn from_metadata(json: &str) -> Result<Self> {
        let metadata: Value = serde_json::from_str(json).context("cargo metadata printed something else than JSON")?;
        let mut names = BTreeMap::new();
        for package in list(&metadata["packages"]) {
            names.insert(text(&package["id"])?, text(&package["name"])?);
        }
        let mut packages = BTreeMap::new();
        for node in list(&metadata["resolve"]["nodes"]) {
            let id = text(&node["id"])?;
            let name = names
                .get(&id)
                .with_context(|| format!("cargo metadata: no package {id}"))?
                .clone();
            let dependencies = list(&node["deps"])
                .iter()
                .map(Dependency::from_json)
                .collect::<Result<_>>()?;
            packages.insert(id, Package { name, dependencies });
        }
        let members = list(&metadata["workspace_members"])
            .iter()
            .map(text)
            .collect::<Result<_>>()?;
        Ok(Self { packages, members })
    }

    fn member_packages(&self) -> impl Iterator<Item = (&String, &Package)> {
        self.packages.iter().filter(|(id, _)| self.members.contains(*id))
    }

    /// The chain of names from a package to one called `goal`, over everything its tests need.
    fn path_to<'a>(&'a self, start: &'a str, goal: &str) -> Option<Vec<&'a str>> {
        let mut came_from: BTreeMap<&'a str, &'a str> = BTreeMap::new();
        let mut open = vec![start];
        while let Some(id) = open.pop() {
            let package = self.packages.get(id)?;
            if package.name == goal && id != start {
                return Some(self.chain(&came_from, start, id));
            }
            for dependency in &package.dependencies {
                // The dev-dependencies of a dependency are not built.
                let is_built = id == start || !dependency.is_dev_only;
                if is_built && dependency.id != start && !came_from.contains_key(dependency.id.as_str()) {
                    came_from.insert(&dependency.id, id);
                    open.push(&dependency.id);
                }
            }
        }
        None
    }

    fn chain<'a>(&'a self, came_from: &BTreeMap<&'a str, &'a str>, start: &str, end: &'a str) -> Vec<&'a str> {
        let mut ids = vec![end];
        while let Some(previous) = ids.last().filter(|id| **id != start).and_then(|id| came_from.get(id)) {
            ids.push(previous);
        }
        ids.reverse();
        ids.iter()
            .filter_map(|id| self.packages.get(*id).map(|package| package.name.as_str()))
            .collect()
    }
}

impl Dependency {
    fn from_json(value: &Value) -> Result<Self> {
        let is_dev_only = list(&value["dep_kinds"]).iter().all(|kind| kind["kind"] == "dev");
        Ok(Self {
            id: text(&value["pkg"])?,
            is_dev_only,
        })
    }
}

pub(crate) fn check(graph: &Graph) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (id, package) in graph.member_packages() {
        if WITHOUT_MLX.contains(&package.name.as_str())
            && let Some(chain) = graph.path_to(id, MLX)
        {
            findings.push(Finding::error(
                &package.name,
                format!("reaches {MLX}: {}", chain.join(" → ")),
            ));
        }
        findings.extend(check_layer(graph, package));
    }
    findings
}

fn check_layer(graph: &Graph, package: &Package) -> Vec<Finding> {
    let Some((_, allowed)) = LAYERS.iter().find(|(name, _)| *name == package.name) else {
        return vec![Finding::error(
            &package.name,
            "has no layer: give it one in xtask/src/tidy/layers.rs",
        )];
    };
    let ours = package
        .dependencies
        .iter()
        .filter(|d| !d.is_dev_only && graph.members.contains(&d.id));
    ours.filter_map(|dependency| graph.packages.get(&dependency.id))
        .filter(|dependency| !allowed.contains(&"*") && !allowed.contains(&dependency.name.as_str()))
        .map(|dependency| {
            Finding::error(
                &package.name,
                format!("must not depend on {}: see ARCHITECTURE.md", dependency.name),
            )
        })
        .collect()
}

/// Every crate has its place in the map that a newcomer reads, by its name or, for `planish-examples` and its like, by its
/// folder at the root.
pub(crate) fn check_listed(graph: &Graph, architecture: &str) -> Vec<Finding> {
    graph
        .member_packages()
        .filter(|(_, package)| !is_mentioned(&package.name, architecture))
        .map(|(_, package)| Finding::error("ARCHITECTURE.md", format!("does not mention `{}`", package.name)))
        .collect()
}

fn is_mentioned(name: &str, architecture: &str) -> bool {
    let folder = name.strip_prefix("planish-").unwrap_or(name);
    architecture.contains(&format!("`{name}`")) || architecture.contains(&format!("`{folder}/`"))
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map(Vec::as_slice).unwrap_or_default()
}

fn text(value: &Value) -> Result<String> {
    value
        .as_str()
        .map(str::to_string)
        .with_context(|| format!("cargo metadata: expected a text, found {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `edges`: package, dependency, kind. Every package is a member.
    fn graph(edges: &[(&str, &str, &str)]) -> Graph {
        let names: BTreeSet<&str> = edges.iter().flat_map(|(from, to, _)| [*from, *to]).collect();
        let dependency = |to: &str, kind: &str| Dependency {
            id: to.into(),
            is_dev_only: kind == "dev",
        };
        let package = |name: &str| Package {
            name: name.into(),
            dependencies: edges
                .iter()
                .filter(|e| e.0 == name)
                .map(|e| dependency(e.1, e.2))
                .collect(),
        };
        Graph {
            packages: names.iter().map(|name| (name.to_string(), package(name))).collect(),
            members: names.iter().map(|name| name.to_string()).collect(),
        }
    }

    fn messages(edges: &[(&str, &str, &str)]) -> Vec<String> {
        check(&graph(edges))
            .into_iter()
            .map(|finding| finding.message)
            .collect()
    }

    #[test]
    fn err_core_reaches_mlx_through_another_crate() {
        let found = messages(&[
            ("planish-core", "planish-mlx", "normal"),
            ("planish-mlx", "mlx-sys", "normal"),
        ]);
        assert!(
            found.contains(&"reaches mlx-sys: planish-core → planish-mlx → mlx-sys".into()),
            "{found:?}"
        );
    }

    #[test]
    fn err_tests_of_core_reach_mlx() {
        assert_eq!(messages(&[("planish-core", "mlx-sys", "dev")]).len(), 1);
    }

    #[test]
    fn dev_dependency_of_a_dependency_does_not_count() {
        assert!(
            messages(&[
                ("planish-data", "planish-core", "normal"),
                ("planish-core", "planish-nn", "dev")
            ])
            .is_empty()
        );
    }

    #[test]
    fn err_siblings_see_each_other() {
        let found = messages(&[("planish-data", "planish-checkpoint", "normal")]);
        assert_eq!(found, ["must not depend on planish-checkpoint: see ARCHITECTURE.md"]);
    }

    #[test]
    fn err_crate_without_a_layer() {
        assert_eq!(messages(&[("planish-novelty", "planish-core", "normal")]).len(), 1);
    }

    #[test]
    fn err_crate_missing_from_the_map() {
        let found = check_listed(
            &graph(&[("planish-data", "planish-core", "normal")]),
            "- `planish-data` …",
        );
        assert_eq!(
            found,
            [Finding::error("ARCHITECTURE.md", "does not mention `planish-core`")]
        );
    }

    #[test]
    fn metadata_is_read() {
        let json = r#"{"packages": [{"id": "a 1", "name": "xtask"}, {"id": "b 1", "name": "mlx-sys"}], "workspace_members": ["a 1"],
            "resolve": {"nodes": [
                {"id": "a 1", "deps": [{"pkg": "b 1", "dep_kinds": [{"kind": "dev"}, {"kind": null}]}]},
                {"id": "b 1", "deps": []}]}}"#;
        let graph = Graph::from_metadata(json).unwrap();
        assert_eq!(check(&graph).len(), 1);
        assert!(!graph.packages["a 1"].dependencies[0].is_dev_only);
    }
}
