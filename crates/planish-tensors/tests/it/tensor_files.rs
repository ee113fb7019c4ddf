use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use planish_tensors::{
    self as tensors, Dtype, Error, HostTensor, INDEX_FILE, LoadReport, ShardWriter, TensorInfo, TensorStore,
};
use proptest::prelude::*;
use safetensors::SafeTensors;

fn tensor_set() -> impl Strategy<Value = BTreeMap<String, HostTensor>> {
    let tensor = (
        prop::sample::select(&Dtype::ALL[..]),
        prop::collection::vec(0usize..5, 0..4),
        any::<u64>(),
    );
    let tensor = tensor.prop_map(|(dtype, shape, seed)| {
        let bytes = dtype.byte_len(&shape).unwrap();
        let bytes = (0..bytes as u64)
            .map(|i| (seed.wrapping_mul(i + 1) >> 32) as u8)
            .collect();
        HostTensor::new(dtype, &shape, bytes).unwrap()
    });
    prop::collection::btree_map("[a-z\"\\\\é.]{1,12}", tensor, 0..8)
}

fn as_map(store: &TensorStore) -> BTreeMap<String, HostTensor> {
    store
        .iter()
        .map(|view| (view.name.to_string(), view.to_host()))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn prop_written_file_reads_back_and_is_the_reference_layout(tensors in tensor_set()) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        tensors::write(&path, &tensors, &metadata).unwrap();

        let store = TensorStore::open(&path).unwrap();
        prop_assert_eq!(as_map(&store), tensors.clone());
        prop_assert_eq!(store.metadata(), BTreeMap::from([("format", "pt")]));

        let views = tensors.iter().map(|(name, tensor)| (name.clone(), reference_view(tensor)));
        let reference = safetensors::serialize(views, Some(HashMap::from_iter(metadata))).unwrap();
        prop_assert_eq!(fs::read(&path).unwrap(), reference);
    }

    /// Whatever we accept, the reference implementation accepts with the same content.
    #[test]
    fn prop_damaged_file_is_refused_or_means_the_same_elsewhere(
        tensors in tensor_set(), at in any::<prop::sample::Index>(), bit in 0u8..8, cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        tensors::write(&path, &tensors, &BTreeMap::new()).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(store) = TensorStore::open(&path) {
            let reference = SafeTensors::deserialize(&bytes).unwrap();
            prop_assert_eq!(store.len(), reference.len());
            for view in store.iter() {
                let theirs = reference.tensor(view.name).unwrap();
                prop_assert_eq!((view.shape, view.bytes), (theirs.shape(), theirs.data()));
            }
        }
    }
}

fn reference_view(tensor: &HostTensor) -> safetensors::tensor::TensorView<'_> {
    let dtype = serde_json::from_value(serde_json::Value::String(tensor.dtype.name().to_string())).unwrap();
    safetensors::tensor::TensorView::new(dtype, tensor.shape.clone(), &tensor.bytes).unwrap()
}

#[test]
fn equal_tensors_give_equal_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = BTreeMap::from([
        ("b".to_string(), HostTensor::from_f32(&[1], &[1.0])),
        ("a".to_string(), HostTensor::zeros(Dtype::U8, &[3])),
    ]);
    let metadata = (0..20).map(|i| (format!("key{i}"), format!("value{i}"))).collect();
    tensors::write(&dir.path().join("1"), &tensors, &metadata).unwrap();
    tensors::write(&dir.path().join("2"), &tensors, &metadata).unwrap();
    assert_eq!(
        fs::read(dir.path().join("1")).unwrap(),
        fs::read(dir.path().join("2")).unwrap()
    );
}

/// Two shards of one byte tensor each, `a` and `b`.
fn sharded_model() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let info = |name: &str| TensorInfo {
        name: name.to_string(),
        dtype: Dtype::U8,
        shape: vec![1],
    };
    let mut writer = ShardWriter::create(dir.path(), vec![info("a"), info("b")], 1).unwrap();
    writer.write_next(b"a").unwrap();
    writer.write_next(b"b").unwrap();
    writer.finish().unwrap();
    dir
}

const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

fn refusal(dir: &Path) -> LoadReport {
    match TensorStore::open(dir) {
        Err(Error::Refused { report, .. }) => *report,
        other => panic!("expected a refusal, got {other:?}"),
    }
}

fn write_one(path: &Path, names: &[&str]) {
    let tensors = names
        .iter()
        .map(|n| (n.to_string(), HostTensor::zeros(Dtype::U8, &[1])))
        .collect();
    tensors::write(path, &tensors, &BTreeMap::new()).unwrap();
}

#[test]
fn sharded_model_opens_by_folder_and_by_index() {
    let dir = sharded_model();
    for path in [dir.path().to_path_buf(), dir.path().join(INDEX_FILE)] {
        let store = TensorStore::open(&path).unwrap();
        assert_eq!(store.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(store.require("b").unwrap().bytes, b"b");
        assert!(store.require("b").unwrap().file.ends_with(SECOND));
    }
}

#[test]
fn err_missing_shard_is_named() {
    let dir = sharded_model();
    fs::remove_file(dir.path().join(SECOND)).unwrap();
    assert_eq!(refusal(dir.path()).missing_shard.listed, [SECOND]);
}

#[test]
fn err_tensor_in_two_shards_is_named() {
    let dir = sharded_model();
    write_one(&dir.path().join(SECOND), &["a", "b"]);
    assert_eq!(
        refusal(dir.path()).duplicate.listed,
        [format!("a in {FIRST} and {SECOND}")]
    );
}

#[test]
fn err_tensor_in_the_wrong_shard_is_named() {
    let dir = sharded_model();
    write_one(&dir.path().join(FIRST), &["b"]);
    write_one(&dir.path().join(SECOND), &["a"]);
    let report = refusal(dir.path());
    assert_eq!(report.misplaced.count, 2);
    assert_eq!(
        report.misplaced.listed[0],
        format!("b is in {FIRST}, the index says {SECOND}")
    );
}

#[test]
fn err_tensor_in_no_shard_is_named() {
    let dir = sharded_model();
    write_one(&dir.path().join(SECOND), &[]);
    assert_eq!(
        refusal(dir.path()).misplaced.listed,
        [format!("b is in no shard, the index says {SECOND}")]
    );
}

#[test]
fn err_tensor_unknown_to_the_index_is_named() {
    let dir = sharded_model();
    write_one(&dir.path().join(SECOND), &["b", "extra"]);
    assert_eq!(refusal(dir.path()).unlisted.listed, [format!("extra in {SECOND}")]);
}

#[test]
fn err_unused_shard_is_named_and_other_files_are_not() {
    let dir = sharded_model();
    write_one(&dir.path().join("model-00003-of-00003.safetensors"), &["c"]);
    write_one(&dir.path().join("consolidated.safetensors"), &["c"]);
    assert_eq!(
        refusal(dir.path()).unused_shard.listed,
        ["model-00003-of-00003.safetensors"]
    );
}

#[test]
fn err_truncated_shard_is_named() {
    let dir = sharded_model();
    let bytes = fs::read(dir.path().join(SECOND)).unwrap();
    fs::write(dir.path().join(SECOND), &bytes[..bytes.len() - 1]).unwrap();
    let error = TensorStore::open(dir.path()).unwrap_err();
    assert!(
        matches!(&error, Error::BadHeader { path, .. } if path.ends_with(SECOND)),
        "{error}"
    );
    assert!(error.to_string().contains("truncated"), "{error}");
}

#[test]
fn err_folder_without_or_with_too_many_files() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(TensorStore::open(dir.path()), Err(Error::NoTensorFile { .. })));
    write_one(&dir.path().join("x.safetensors"), &["a"]);
    assert_eq!(TensorStore::open(dir.path()).unwrap().len(), 1);
    write_one(&dir.path().join("y.safetensors"), &["b"]);
    assert!(matches!(TensorStore::open(dir.path()), Err(Error::NoIndex { files, .. }) if files.len() == 2));
    assert!(matches!(
        TensorStore::open(&dir.path().join("none")),
        Err(Error::Read { .. })
    ));
}

#[test]
fn err_empty_file_is_no_tensor_file() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    assert!(matches!(TensorStore::open(dir.path()), Err(Error::BadHeader { .. })));
}

#[test]
fn err_writer_refuses_wrong_bytes_and_missing_tensors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let info = TensorInfo {
        name: "a".to_string(),
        dtype: Dtype::F32,
        shape: vec![2],
    };
    let create = || tensors::TensorFileWriter::create(&path, vec![info.clone()], &BTreeMap::new()).unwrap();
    assert!(matches!(create().write_next(&[0; 7]), Err(Error::WriterMisuse { .. })));
    assert!(matches!(create().finish(), Err(Error::WriterMisuse { .. })));
    assert!(!path.exists());
    let twice = tensors::TensorFileWriter::create(&path, vec![info.clone(), info], &BTreeMap::new());
    assert!(matches!(twice, Err(Error::WriterMisuse { .. })));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn shared_tiny_model_is_exactly_what_its_config_expects() {
    let dir = Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../../shared/models/tiny-llama-1m"
    ));
    if !dir.exists() {
        println!("skipped: no shared models beside the checkout");
        return;
    }
    let config = planish_core::model_config::ModelConfig::from_file(&dir.join("config.json")).unwrap();
    let store = TensorStore::open(dir).unwrap();
    let report = store.check(&config.expected_tensors(), &tensors::LoadRules::default());
    assert!(report.is_clean(), "{report}");
}
