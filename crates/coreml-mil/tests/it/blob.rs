//! The weight file, byte for byte against coremltools' writer. Golden: golden/make_blob.py, blob.bin, blob.json.

use coreml_mil::{BlobPlan, BlobReader, BlobWriter, DType, pack_bits};
use half::f16;
use serde_json::Value;

const BYTES: &[u8] = include_bytes!("golden/blob.bin");
const VALUES: &str = include_str!("golden/blob.json");

struct Item {
    dtype: DType,
    offset: u64,
    count: usize,
    data: Vec<u8>,
}

fn items() -> Vec<Item> {
    let json: Value = serde_json::from_str(VALUES).unwrap();
    let item = |blob: &Value| {
        let dtype = DType::from_name(blob["dtype"].as_str().unwrap()).unwrap();
        let values: Vec<f64> = blob["values"]
            .as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_f64().unwrap())
            .collect();
        let bytes: Vec<u8> = values.iter().map(|v| *v as i8 as u8).collect();
        let data = match dtype {
            DType::F16 => values.iter().flat_map(|v| f16::from_f64(*v).to_le_bytes()).collect(),
            DType::F32 => values.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect(),
            DType::I8 => bytes,
            sub_byte => pack_bits(
                &values.iter().map(|v| *v as i64 as u8).collect::<Vec<_>>(),
                sub_byte.bits(),
            ),
        };
        Item {
            dtype,
            offset: blob["offset"].as_u64().unwrap(),
            count: values.len(),
            data,
        }
    };
    json["blobs"].as_array().unwrap().iter().map(item).collect()
}

#[test]
fn golden_blob_file_equals_coremltools_writer() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("weight.bin");
    let mut plan = BlobPlan::default();
    for item in items() {
        assert_eq!(plan.add(item.dtype, item.count).unwrap(), item.offset);
    }
    let mut writer = BlobWriter::create(&path, &plan).unwrap();
    for item in items() {
        writer.next_blob().unwrap();
        let (head, tail) = item.data.split_at(item.data.len() / 2); // pieces of any size
        writer.write(head).unwrap();
        writer.write(tail).unwrap();
    }
    writer.finish().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), BYTES);
}

#[test]
fn golden_blob_file_reads_back() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/golden/blob.bin");
    let mut reader = BlobReader::open(path.as_ref()).unwrap();
    assert_eq!(
        reader.offsets().unwrap(),
        items().iter().map(|i| i.offset).collect::<Vec<_>>()
    );
    for item in items() {
        assert_eq!(reader.read(item.offset, item.dtype, item.count).unwrap(), item.data);
    }
}

#[test]
fn err_a_blob_that_is_not_filled() {
    let folder = tempfile::tempdir().unwrap();
    let mut plan = BlobPlan::default();
    plan.add(DType::F16, 4).unwrap();
    let mut writer = BlobWriter::create(&folder.path().join("weight.bin"), &plan).unwrap();
    writer.next_blob().unwrap();
    writer.write(&[0; 6]).unwrap();
    assert!(writer.write(&[0; 4]).is_err()); // two bytes too many
    assert!(writer.finish().is_err()); // two bytes too few
}
