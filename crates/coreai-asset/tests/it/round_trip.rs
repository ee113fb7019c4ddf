//! Bytes and back.

use std::{fs, path::Path};

use coreai_asset::{Asset, AssetWriter, Error, fuzzing};
use proptest::prelude::*;

use crate::support::{small_program, write_small};

#[test]
fn a_written_program_is_read_back_equal() {
    let folder = tempfile::tempdir().unwrap();
    let report = write_small(folder.path());
    let asset = Asset::open(folder.path()).unwrap();
    assert_eq!(asset.program(), &small_program());
    assert_eq!(asset.weight(0, 0..3).unwrap(), [244, 245, 246]);
    assert_eq!(asset.weight(1, 0..2).unwrap(), half::f16::from_f32(0.03).to_le_bytes());
    assert_eq!(
        fs::metadata(folder.path().join("main.mlirb")).unwrap().len(),
        report.bytes
    );
}

#[test]
fn equal_programs_give_equal_bytes() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let reports = folders.each_ref().map(|folder| write_small(folder.path()));
    assert_eq!(reports[0], reports[1]);
    for name in ["main.mlirb", "main.hash", "metadata.json"] {
        let read = |folder: &tempfile::TempDir| fs::read(folder.path().join(name)).unwrap();
        assert_eq!(read(&folders[0]), read(&folders[1]), "{name}");
    }
}

#[test]
fn golden_bytes_of_the_small_program() {
    // The container and every code: a change here changes what Apple's loader is given.
    let folder = tempfile::tempdir().unwrap();
    let hash = write_small(folder.path()).hash;
    let hex: String = hash.iter().map(|b| format!("{b:02x}")).collect();
    let golden = include_str!("golden/small.sha256");
    assert_eq!(
        hex,
        golden.trim(),
        "checked with coreai-core 1.0.0b3 by cargo xtask coreai-check"
    );
}

#[test]
fn err_a_flipped_bit_is_noticed_by_the_hash() {
    let folder = tempfile::tempdir().unwrap();
    write_small(folder.path());
    let path = folder.path().join("main.mlirb");
    let mut bytes = fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, bytes).unwrap();
    let error = Asset::open(folder.path()).unwrap_err();
    assert!(
        matches!(&error, Error::BadAsset { path, .. } if path.ends_with("main.hash")),
        "{error}"
    );
}

#[test]
fn err_weights_of_another_length_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut writer = AssetWriter::create(folder.path(), &small_program()).unwrap();
    writer.next_weight().unwrap();
    writer.write(&[0; 20]).unwrap();
    let problem = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert_eq!(problem(writer.write(&[0; 5])), "weight w: more data than planned");
    assert_eq!(problem(writer.next_weight()), "weight w: 4 bytes are missing");
    writer.write(&[0; 4]).unwrap();
    assert_eq!(
        problem(writer.finish().map(|_| ())),
        "weight w: weights after it were never written"
    );
}

fn small_bytes() -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    write_small(folder.path());
    fs::read(Path::new(folder.path()).join("main.mlirb")).unwrap()
}

proptest! {
    #[test]
    fn prop_damaged_files_never_panic(
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = small_bytes();
        for (place, byte) in changes {
            let at = place.index(bytes.len());
            bytes[at] = byte;
        }
        fuzzing::program(&bytes);
        bytes.truncate(cut.index(bytes.len()));
        fuzzing::program(&bytes);
    }

    #[test]
    fn prop_any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(!fuzzing::program(&bytes));
        let headed = [&b"ML\xefR\x0dx\0"[..], &bytes].concat();
        fuzzing::program(&headed);
    }
}
