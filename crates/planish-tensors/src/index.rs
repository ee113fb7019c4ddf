use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use crate::error::{Error, Result};

/// Which shard holds which tensor.
#[derive(Debug)]
pub(crate) struct Index {
    pub(crate) file_by_tensor: BTreeMap<String, String>,
}

/// Reads a shard index. Shard names must be plain file names: an index never points outside its folder.
pub(crate) fn parse(json: &[u8], path: &Path) -> Result<Index> {
    let raw: RawIndex = serde_json::from_slice(json).map_err(|source| Error::json(path, &source))?;
    let bad = |reason: String| Error::BadJson {
        path: path.to_path_buf(),
        reason,
    };
    if raw.weight_map.0.is_empty() {
        return Err(bad("`weight_map` lists no tensor".to_string()));
    }
    for (tensor, file) in &raw.weight_map.0 {
        if !is_plain_file_name(file) {
            return Err(bad(format!(
                "{tensor:?} points to {file:?}; expected the name of a .safetensors file"
            )));
        }
    }
    Ok(Index {
        file_by_tensor: raw.weight_map.0,
    })
}

fn is_plain_file_name(file: &str) -> bool {
    file.ends_with(".safetensors") && !file.contains(['/', '\\', '\0'])
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: WeightMap,
}

/// A map that refuses a key given twice.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(WeightMapVisitor)
    }
}

struct WeightMapVisitor;

impl<'de> Visitor<'de> for WeightMapVisitor {
    type Value = WeightMap;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of file names by tensor name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
        let mut weight_map = BTreeMap::new();
        while let Some((tensor, file)) = map.next_entry::<String, String>()? {
            if weight_map.contains_key(&tensor) {
                return Err(A::Error::custom(format!(
                    "tensor {tensor:?} is listed twice in `weight_map`"
                )));
            }
            weight_map.insert(tensor, file);
        }
        Ok(WeightMap(weight_map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check_refused(json: &str, expect: &str) {
        let error = parse(json.as_bytes(), Path::new("index.json")).unwrap_err().to_string();
        assert!(error.contains(expect), "{error}");
    }

    #[test]
    fn err_index_that_cannot_be_meant() {
        check_refused("{}", "weight_map");
        check_refused(r#"{"weight_map":{}}"#, "lists no tensor");
        check_refused(
            r#"{"weight_map":{"a":"x.safetensors","a":"y.safetensors"}}"#,
            "listed twice",
        );
        check_refused(r#"{"weight_map":{"a":"../x.safetensors"}}"#, "../x.safetensors");
        check_refused(r#"{"weight_map":{"a":"pytorch_model.bin"}}"#, "pytorch_model.bin");
    }
}
