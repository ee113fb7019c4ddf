//! Rules about which crate may see which.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use serde_json::Value;

use super::Finding;

const MLX: &str = "mlx-sys";
/// Where the rules are stated.
pub(crate) const PAGE: &str = "ARCHITECTURE.md";

/// What ARCHITECTURE.md states about crates: the page is the rule, and no list beside it.
pub(crate) struct Map {
    crates: BTreeMap<String, Place>,
}

/// One row of the page's tables: the last cell lists the crates of ours that this one stands on, or `anything`.
struct Place {
    /// Under the heading of the crates that must work where MLX does not build, tests included.
    is_without_mlx: bool,
    /// `None`: anything.
    stands_on: Option<BTreeSet<String>>,
}

/// Begins the heading of the crates that never reach MLX.
const WITHOUT_MLX: &str = "Without MLX";

impl Map {
    /// Reads the tables of the page: rows that begin with a crate's name, under the headings above them.
    pub(crate) fn read(page: &str) -> Self {
        let (mut crates, mut is_without_mlx) = (BTreeMap::new(), false);
        for line in page.lines() {
            if let Some(heading) = line.strip_prefix('#') {
                is_without_mlx = heading.trim_start_matches('#').trim().starts_with(WITHOUT_MLX);
            }
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            if let ["", name, .., stands_on, ""] = cells.as_slice()
                && let [name] = quoted(name).as_slice()
            {
                let stands_on = (*stands_on != "anything").then(|| quoted(stands_on).into_iter().collect());
                let place = Place {
                    is_without_mlx,
                    stands_on,
                };
                crates.insert(name.clone(), place);
            }
        }
        Self { crates }
    }
}

/// The words in backticks.
fn quoted(text: &str) -> Vec<String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

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

pub(crate) fn check(graph: &Graph, map: &Map) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (id, package) in graph.member_packages() {
        let Some(place) = map.crates.get(&package.name) else {
            findings.push(Finding::error(PAGE, format!("has no row for `{}`", package.name)));
            continue;
        };
        if place.is_without_mlx
            && let Some(chain) = graph.path_to(id, MLX)
        {
            let chain = chain.join(" → ");
            findings.push(Finding::error(&package.name, format!("reaches {MLX}: {chain}")));
        }
        findings.extend(check_place(graph, package, place));
    }
    let is_gone = |name: &&String| !graph.member_packages().any(|(_, package)| package.name == **name);
    let gone = map.crates.keys().filter(is_gone);
    findings.extend(gone.map(|name| Finding::error(PAGE, format!("has a row for `{name}`, which is no crate"))));
    findings
}

/// The row names the dependencies, all of them and no other.
fn check_place(graph: &Graph, package: &Package, place: &Place) -> Option<Finding> {
    let allowed = place.stands_on.as_ref()?;
    let ours = package.dependencies.iter().filter(|d| !d.is_dev_only);
    let actual: BTreeSet<String> = ours
        .filter(|dependency| graph.members.contains(&dependency.id))
        .filter_map(|dependency| Some(graph.packages.get(&dependency.id)?.name.clone()))
        .collect();
    let names = |set: &BTreeSet<String>| set.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
    (actual != *allowed).then(|| {
        let (actual, allowed) = (names(&actual), names(allowed));
        Finding::error(&package.name, format!("depends on [{actual}], {PAGE} says [{allowed}]"))
    })
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

    const PAGE_TEXT: &str = "### Without MLX: everywhere\n| crate | what | stands on |\n|---|---|---|\n\
        | `low` | below | |\n| `mid` | between | `low` |\n### On MLX\n| `mlx-sys` | bindings | |\n| `top` | all | anything |\n";

    fn messages(edges: &[(&str, &str, &str)]) -> Vec<String> {
        let every = [
            ("low", "y", "dev"),
            ("mid", "low", "normal"),
            ("mlx-sys", "y", "dev"),
            ("top", "y", "dev"),
        ];
        let mut graph = graph(&[&every[..], edges].concat());
        graph.members.retain(|name| !["x", "y"].contains(&name.as_str()));
        let findings = check(&graph, &Map::read(PAGE_TEXT));
        findings.into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn page_that_is_true_is_fine() {
        assert!(messages(&[("top", "mid", "normal"), ("mid", "x", "normal")]).is_empty());
    }

    #[test]
    fn err_crate_reaches_mlx_through_another() {
        let found = messages(&[("mid", "x", "normal"), ("x", "mlx-sys", "normal")]);
        assert_eq!(found, ["reaches mlx-sys: mid → x → mlx-sys"]);
    }

    #[test]
    fn err_tests_reach_mlx() {
        assert_eq!(
            messages(&[("low", "mlx-sys", "dev")]),
            ["reaches mlx-sys: low → mlx-sys"]
        );
    }

    #[test]
    fn dev_dependency_of_a_dependency_does_not_count() {
        assert!(messages(&[("mid", "x", "normal"), ("x", "mlx-sys", "dev")]).is_empty());
    }

    #[test]
    fn err_dependencies_are_not_those_of_the_page() {
        let found = messages(&[("low", "top", "normal")]);
        assert_eq!(found, ["depends on [top], ARCHITECTURE.md says []"]);
        let mut page = Map::read(PAGE_TEXT);
        page.crates.get_mut("low").unwrap().stands_on = Some(BTreeSet::from(["mid".into()]));
        assert_eq!(
            check(&graph(&[("low", "x", "dev")]), &page)[0].message,
            "depends on [], ARCHITECTURE.md says [mid]"
        );
    }

    #[test]
    fn err_crate_without_a_row_and_row_without_a_crate() {
        let found: Vec<String> = check(
            &graph(&[("novelty", "low", "dev")]),
            &Map::read("| `low` | x | |\n| `old` | x | |\n"),
        )
        .into_iter()
        .map(|finding| finding.message)
        .collect();
        assert_eq!(
            found,
            ["has no row for `novelty`", "has a row for `old`, which is no crate"]
        );
    }

    #[test]
    fn metadata_is_read() {
        let json = r#"{"packages": [{"id": "a 1", "name": "xtask"}, {"id": "b 1", "name": "mlx-sys"}], "workspace_members": ["a 1"],
            "resolve": {"nodes": [
                {"id": "a 1", "deps": [{"pkg": "b 1", "dep_kinds": [{"kind": "dev"}, {"kind": null}]}]},
                {"id": "b 1", "deps": []}]}}"#;
        let graph = Graph::from_metadata(json).unwrap();
        assert_eq!(graph.path_to("a 1", MLX).unwrap(), ["xtask", "mlx-sys"]);
        assert!(!graph.packages["a 1"].dependencies[0].is_dev_only);
    }
}
