//! The parsers on the three published mlx-metal 0.32.2 wheels, where they are in the cache.
//!
//! `cargo xtask mlx fetch --target macos14-arm64` (and macos15-, macos26-arm64) puts them there.

use metal_check::metallib::{self, HEADER_BYTES};
use metal_check::wheel::WHEELS;
use metal_check::{macho, version::Version};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// What the bytes of a wheel hold: tag, oldest system, functions, fence kernels, tensor-unit kernels, AIR, language.
const FACTS: [(&str, Version, usize, usize, usize, Version, Version); 3] = [
    (
        "macosx_14_0_arm64",
        Version(14, 0, 0),
        16_140,
        0,
        0,
        Version(2, 6, 0),
        Version(3, 1, 0),
    ),
    (
        "macosx_15_0_arm64",
        Version(15, 0, 0),
        16_143,
        3,
        0,
        Version(2, 7, 0),
        Version(3, 2, 0),
    ),
    (
        "macosx_26_0_arm64",
        Version(26, 2, 0),
        17_319,
        3,
        1_140,
        Version(2, 8, 0),
        Version(4, 0, 0),
    ),
];

#[test]
fn parsers_agree_with_the_published_wheels() {
    for (tag, minos, functions, fences, tensor_unit, air, language) in FACTS {
        let Some(path) = cached(tag) else {
            eprintln!("skipped: the wheel {tag} is not in the cache (cargo xtask mlx fetch --target …)");
            continue;
        };
        let wheel = WHEELS.iter().find(|wheel| wheel.tag == tag).unwrap();
        assert_eq!(wheel_fetch::sha256_file(&path).unwrap(), wheel.sha256, "{tag}");
        let mut archive = zip::ZipArchive::new(File::open(&path).unwrap()).unwrap();

        let image = macho::parse(&entry(&mut archive, "libmlx.dylib", usize::MAX).1).unwrap();
        assert_eq!(
            (image.minos, wheel.minos, image.sdk),
            (Some(minos), minos, Some(Version(26, 5, 0))),
            "{tag}"
        );
        assert_eq!(image.install_name.as_deref(), Some("@rpath/libmlx.dylib"));
        assert!(image.rpaths.is_empty());
        let foreign: &[&str] = if needs_jaccl(tag) {
            &["@rpath/libjaccl.dylib"]
        } else {
            &[]
        };
        assert_eq!(image.foreign_libraries(), foreign, "{tag}");
        assert!(
            image.weak_libraries.iter().any(|name| name.contains("Foundation")),
            "{tag}"
        );
        assert!(
            !image
                .undefined_symbols
                .iter()
                .any(|name| name.contains("isPlatformVersion")),
            "{tag}"
        );

        let (size, head) = entry(&mut archive, "mlx.metallib", HEADER_BYTES);
        let header = metallib::parse_header(&head, size).unwrap();
        assert_eq!((header.target_os, size), (minos, wheel.metallib_bytes), "{tag}");
        let list = header.functions;
        let (_, bytes) = entry(&mut archive, "mlx.metallib", (list.offset + list.size) as usize + 4);
        let summary = metallib::summarize(&metallib::parse_functions(&bytes[list.offset as usize..]).unwrap());
        assert_eq!(
            (summary.functions, summary.fences, summary.tensor_unit),
            (functions, fences, tensor_unit),
            "{tag}"
        );
        assert_eq!((summary.air, summary.language), (air, language), "{tag}");
    }
}

/// The library of the newest wheel needs a second one beside it.
fn needs_jaccl(tag: &str) -> bool {
    tag == "macosx_26_0_arm64"
}

/// Size and first bytes of the entry whose name ends so.
fn entry(archive: &mut zip::ZipArchive<File>, name: &str, limit: usize) -> (u64, Vec<u8>) {
    let full = archive
        .file_names()
        .map(|full| full.unwrap().into_owned())
        .find(|full| full.ends_with(name))
        .unwrap();
    let file = archive.by_name(&full).unwrap();
    let size = file.size();
    let mut bytes = Vec::new();
    file.take(limit as u64).read_to_end(&mut bytes).unwrap();
    (size, bytes)
}

fn cached(tag: &str) -> Option<PathBuf> {
    let cache = wheel_fetch::cache_dir().ok()?;
    find(&cache, &format!("mlx_metal-0.32.2-py3-none-{tag}.whl"), 3)
}

fn find(folder: &Path, name: &str, depth: usize) -> Option<PathBuf> {
    let here = folder.join(name);
    if here.is_file() {
        return Some(here);
    }
    let entries = std::fs::read_dir(folder).ok().filter(|_| depth > 0)?;
    entries
        .flatten()
        .filter(|entry| entry.path().is_dir())
        .find_map(|entry| find(&entry.path(), name, depth - 1))
}
