use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use base64::Engine;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result, io_at};

/// SHA-256 of a file as lower-case hex.
///
/// # Errors
/// [`Error::Io`].
pub fn sha256_file(path: &Path) -> Result<String> {
    Ok(digest(path)?.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Unpacks the entries of a wheel that `keep` accepts into `into`, syncing each file.
///
/// `into` should be a temporary directory that the caller renames when everything is in place: a half-finished unpack
/// must never be mistaken for a whole one.
///
/// # Errors
/// [`Error::BadArchive`] for a file that is no zip archive, an entry that fails its checksum, or a path that would leave
/// `into`; [`Error::Io`] when writing fails (a full disk, for one).
pub fn unpack(wheel: &Path, into: &Path, keep: impl Fn(&str) -> bool) -> Result<()> {
    let bad = |message: String| Error::BadArchive {
        path: wheel.to_owned(),
        message,
    };
    let file = File::open(wheel).map_err(io_at(wheel))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| bad(error.to_string()))?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(|error| bad(error.to_string()))?;
        let name = entry.name().map_err(|error| bad(error.to_string()))?.into_owned();
        if entry.is_dir() || !keep(&name) {
            continue;
        }
        let Some(relative) = entry.enclosed_name() else {
            return Err(bad(format!("entry {name:?} leaves the archive")));
        };
        let target = into.join(relative);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent).map_err(io_at(parent))?;
        }
        let mut out = File::create(&target).map_err(io_at(&target))?;
        copy_entry(&mut entry, &mut out).map_err(|error| match error {
            CopyError::Read(message) => bad(message),
            CopyError::Write(source) => Error::Io {
                path: target.clone(),
                source,
            },
        })?;
    }
    Ok(())
}

enum CopyError {
    Read(String),
    Write(io::Error),
}

/// `io::copy`, but knowing which side failed: a corrupt wheel and a full disk need different advice.
fn copy_entry(entry: &mut impl Read, out: &mut File) -> std::result::Result<(), CopyError> {
    use io::Write as _;
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = entry
            .read(&mut buffer)
            .map_err(|error| CopyError::Read(error.to_string()))?;
        if count == 0 {
            return out.sync_all().map_err(CopyError::Write);
        }
        out.write_all(&buffer[..count]).map_err(CopyError::Write)?;
    }
}

/// Compares an unpacked tree with the wheel's own `*.dist-info/RECORD`: size and SHA-256 of every file that `check` accepts.
///
/// # Errors
/// [`Error::Altered`] for the first file that is missing or differs.
pub(crate) fn verify_record(root: &Path, record: &Path, check: impl Fn(&str) -> bool) -> Result<()> {
    let text = fs::read_to_string(record).map_err(io_at(record))?;
    for line in text.lines() {
        let mut fields = line.rsplitn(3, ',');
        let (Some(size), Some(hash), Some(name)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let Some(hash) = hash.strip_prefix("sha256=").filter(|_| check(name)) else {
            continue;
        };
        let path = root.join(name);
        let altered = |message: String| Error::Altered {
            path: path.clone(),
            root: root.to_owned(),
            message,
        };
        let found_size = fs::metadata(&path).map_err(|error| altered(error.to_string()))?.len();
        if size.parse() != Ok(found_size) {
            return Err(altered(format!("is {found_size} bytes, the wheel says {size}")));
        }
        let found = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(digest(&path)?);
        if found != hash {
            return Err(altered("its SHA-256 is not the wheel's".to_owned()));
        }
    }
    Ok(())
}

fn digest(path: &Path) -> Result<[u8; 32]> {
    let mut file = File::open(path).map_err(io_at(path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file.read(&mut buffer).map_err(io_at(path))?;
        if count == 0 {
            return Ok(hasher.finalize().into());
        }
        hasher.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn archive(dir: &Path, entries: &[(&str, &[u8])]) -> std::path::PathBuf {
        let path = dir.join("a.whl");
        let mut writer = zip::ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes) in entries {
            writer
                .start_file(*name, zip::write::SimpleFileOptions::default())
                .unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    #[test]
    fn unpacks_what_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = archive(dir.path(), &[("a/b.txt", b"hello"), ("skip/c.txt", b"x")]);
        let out = dir.path().join("out");
        unpack(&wheel, &out, |name| name.starts_with("a/")).unwrap();
        assert_eq!(fs::read(out.join("a/b.txt")).unwrap(), b"hello");
        assert!(!out.join("skip").exists());
    }

    #[test]
    fn err_entry_outside_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = archive(dir.path(), &[("../evil.txt", b"x")]);
        let error = unpack(&wheel, &dir.path().join("out"), |_| true).unwrap_err();
        assert!(matches!(error, Error::BadArchive { .. }), "{error}");
        assert!(!dir.path().join("evil.txt").exists());
    }

    #[test]
    fn err_truncated_wheel() {
        let dir = tempfile::tempdir().unwrap();
        let wheel = archive(dir.path(), &[("a.txt", &[7; 5000])]);
        let bytes = fs::read(&wheel).unwrap();
        fs::write(&wheel, &bytes[..bytes.len() / 2]).unwrap();
        let error = unpack(&wheel, &dir.path().join("out"), |_| true).unwrap_err();
        assert!(matches!(error, Error::BadArchive { .. }), "{error}");
    }

    #[test]
    fn record_finds_one_flipped_byte() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.txt");
        fs::write(&file, b"hello").unwrap();
        let record = dir.path().join("RECORD");
        fs::write(
            &record,
            "a.txt,sha256=LPJNul-wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ,5\nRECORD,,\n",
        )
        .unwrap();
        verify_record(dir.path(), &record, |_| true).unwrap();
        fs::write(&file, b"hellp").unwrap();
        assert!(matches!(
            verify_record(dir.path(), &record, |_| true),
            Err(Error::Altered { .. })
        ));
        verify_record(dir.path(), &record, |name| name != "a.txt").unwrap();
    }
}
