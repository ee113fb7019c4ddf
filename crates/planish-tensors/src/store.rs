use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use planish_core::model_config::TensorSpec;
use planish_core::suggest::nearest;

use super::dtype::Dtype;
use super::host::{HostTensor, TensorView, widen};
use super::report::{LoadReport, Mismatch};
use super::{INDEX_FILE, header, index};
use crate::error::{Error, Result};

/// The tensors of a safetensors file, of a sharded model, or of a model folder, mapped into memory.
///
/// Opening checks all headers and, for shards, that index and files agree: no tensor twice, none missing, none in
/// another shard than the index says, no shard left over. Contents are read when used; the mapped files must not be
/// changed meanwhile, which holds for files replaced by rename, as all files written by planish are.
///
/// ```
/// use std::collections::BTreeMap;
/// use planish_tensors::{self as tensors, HostTensor, TensorStore};
///
/// let dir = tempfile::tempdir()?;
/// let path = dir.path().join("model.safetensors");
/// let weights = BTreeMap::from([("w".to_string(), HostTensor::from_f32(&[2], &[1.0, 2.0]))]);
/// tensors::write(&path, &weights, &BTreeMap::new())?;
///
/// let store = TensorStore::open(dir.path())?;
/// assert_eq!(store.names().collect::<Vec<_>>(), ["w"]);
/// assert_eq!(store.require("w")?.to_f32()?, [1.0, 2.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct TensorStore {
    path: PathBuf,
    files: Vec<MappedFile>,
    entries: BTreeMap<String, Location>,
}

#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    /// For reading past the map.
    file: File,
    bytes: Mmap,
    header: header::Header,
}

#[derive(Clone, Copy, Debug)]
struct Location {
    file_idx: usize,
    entry_idx: usize,
}

/// What [`TensorStore::check`] lets pass.
#[derive(Clone, Debug, Default)]
pub struct LoadRules {
    /// Patterns of unexpected names to leave out, with `*` for any run of characters: rotary caches, vision towers.
    pub allow_unexpected: Vec<String>,
    /// Names that may be absent: only a head tied to the embedding.
    pub allow_missing: Vec<String>,
}

impl TensorStore {
    /// Opens a `.safetensors` file, a shard index, or a folder with either.
    ///
    /// In a folder the index `model.safetensors.index.json` comes first, then `model.safetensors`, then the only
    /// `.safetensors` file there is.
    ///
    /// # Errors
    /// [`Error::Read`], [`Error::BadHeader`], [`Error::BadJson`]; [`Error::NoTensorFile`] and [`Error::NoIndex`] for a
    /// folder that cannot be understood; [`Error::Refused`] when index and shards disagree.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::read(path, e))?;
        if !metadata.is_dir() {
            return if path.extension().is_some_and(|e| e == "json") {
                open_sharded(path)
            } else {
                open_single(path)
            };
        }
        let (index, single) = (path.join(INDEX_FILE), path.join("model.safetensors"));
        if index.exists() {
            open_sharded(&index)
        } else if single.exists() {
            open_single(&single)
        } else {
            open_only_file_of(path)
        }
    }

    /// What was opened, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(|file| file.path.as_path())
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The tensor of that name.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, location) = self.entries.get_key_value(name)?;
        Some(self.view(name, *location))
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::NoTensor`] with the nearest name there is.
    pub fn require(&self, name: &str) -> Result<TensorView<'_>> {
        self.get(name).ok_or_else(|| Error::NoTensor {
            path: self.path.clone(),
            name: name.to_string(),
            nearest: nearest(name, self.names()).map(str::to_string),
        })
    }

    /// Rows `rows` of a tensor, read past the memory map; an element of a vector is a row.
    ///
    /// Pages of a map count as the process's own: a reader that touches every page once wants memory bounded by what it
    /// asks for.
    ///
    /// # Errors
    /// [`Error::NoTensor`]; [`Error::Read`].
    pub fn read_rows(&self, name: &str, rows: Range<usize>) -> Result<HostTensor> {
        let view = self.require(name)?;
        let columns: usize = view.shape.iter().skip(1).product();
        let row_bytes = columns * view.dtype.size();
        let mut bytes = vec![0; rows.len() * row_bytes];
        self.read_at(&view, rows.start * row_bytes, &mut bytes)?;
        let shape: Vec<usize> = std::iter::once(rows.len())
            .chain(view.shape.iter().skip(1).copied())
            .collect();
        HostTensor::new(view.dtype, &shape, bytes)
    }

    /// The same as f32, into a buffer that is used again.
    pub(crate) fn rows_into(&self, name: &str, rows: Range<usize>, values: &mut Vec<f32>) -> Result<()> {
        let view = self.require(name)?;
        let columns: usize = view.shape.iter().skip(1).product();
        let (start, len) = (rows.start * columns * view.dtype.size(), rows.len() * columns);
        values.resize(len, 0.0);
        if view.dtype == Dtype::F32 {
            return self.read_at(&view, start, bytemuck::cast_slice_mut(values));
        }
        let mut raw = vec![0; len * view.dtype.size()];
        self.read_at(&view, start, &mut raw)?;
        widen(view.dtype, &raw, values)
    }

    /// Bytes of a tensor from `start` on, from the file.
    fn read_at(&self, view: &TensorView<'_>, start: usize, out: &mut [u8]) -> Result<()> {
        let location = self.entries[view.name];
        let file = &self.files[location.file_idx];
        let offset = file.header.entries[location.entry_idx].range.start + start;
        let read = file.file.read_exact_at(out, offset as u64);
        read.map_err(|e| Error::read(&file.path, e))
    }

    /// Gives every tensor the name that `rename` says; none, where two would get the same.
    pub(crate) fn rename(&mut self, rename: impl Fn(&str) -> String) {
        let entries = self.entries.iter();
        let renamed: BTreeMap<String, Location> = entries.map(|(name, location)| (rename(name), *location)).collect();
        if renamed.len() == self.entries.len() {
            self.entries = renamed;
        }
    }

    /// All tensors, sorted by name.
    pub fn iter(&self) -> impl Iterator<Item = TensorView<'_>> {
        self.entries.iter().map(|(name, location)| self.view(name, *location))
    }

    /// The free text of the headers. Where files give one key different values, the first file counts.
    pub fn metadata(&self) -> BTreeMap<&str, &str> {
        let texts = self.files.iter().rev().flat_map(|file| &file.header.metadata);
        texts.map(|(key, value)| (key.as_str(), value.as_str())).collect()
    }

    /// Compares names, shapes and element types with what a model needs.
    ///
    /// Weights are `F32`, `F16` or `BF16`. Where `expected` has a `.scales` beside a `.weight`, the weight is packed
    /// and must be `U32`; scales without `.biases` (the microscaling formats) are `U8`.
    pub fn check(&self, expected: &[TensorSpec], rules: &LoadRules) -> LoadReport {
        let names: BTreeSet<&str> = expected.iter().map(|spec| spec.name.as_str()).collect();
        let mut report = LoadReport::default();
        for spec in expected {
            match self.get(&spec.name) {
                Some(view) => compare(&view, spec, &names, &mut report),
                None if rules.allow_missing.contains(&spec.name) => {}
                None => report.missing.add(|| format!("{} {:?}", spec.name, spec.shape)),
            }
        }
        for name in self.names().filter(|name| !names.contains(name)) {
            if rules.allow_unexpected.iter().any(|pattern| matches_glob(pattern, name)) {
                report.ignored.add(|| name.to_string());
            } else {
                report.unexpected.add(|| describe_unexpected(name, &names));
            }
        }
        report
    }

    /// SHA-256 of names, types and shapes of all tensors and of three strips of each: equal for copies of a model, another
    /// for one that was trained, merged or rounded. It reads little, whatever the size of the files.
    pub fn fingerprint(&self) -> String {
        const STRIP: usize = 512;
        let mut seen = Vec::new();
        for view in self.iter() {
            seen.extend(format!("{} {} {:?}\n", view.name, view.dtype, view.shape).bytes());
            for start in [0, view.bytes.len() / 2, view.bytes.len().saturating_sub(STRIP)] {
                seen.extend_from_slice(&view.bytes[start..view.bytes.len().min(start + STRIP)]);
            }
        }
        planish_core::hash::sha256_hex(&seen)
    }

    /// Gives back the memory of what was read so far, for readers that copy tensor after tensor out of the files: pages
    /// of a map count as the process's own, so that a model would take its size twice.
    ///
    /// Every tensor can be read again, and comes from the file then. It is advice: where the system does not take it,
    /// nothing else changes.
    pub fn release_pages(&mut self) {
        for file in &mut self.files {
            #[allow(unsafe_code)]
            // SAFETY: the exclusive borrow shows that nobody holds a slice of the map, and its pages, which are never
            // written, hold the bytes of the file when they come back.
            let _advice = unsafe { file.bytes.unchecked_advise(UncheckedAdvice::DontNeed) };
        }
    }

    fn view<'a>(&'a self, name: &'a str, location: Location) -> TensorView<'a> {
        let file = &self.files[location.file_idx];
        let entry = &file.header.entries[location.entry_idx];
        TensorView {
            name,
            dtype: entry.dtype,
            shape: &entry.shape,
            bytes: &file.bytes[entry.range.clone()],
            file: &file.path,
        }
    }
}

fn open_single(path: &Path) -> Result<TensorStore> {
    let files = vec![map_file(path)?];
    let entries = locations(&files).collect();
    Ok(TensorStore {
        path: path.to_path_buf(),
        files,
        entries,
    })
}

fn open_only_file_of(folder: &Path) -> Result<TensorStore> {
    let mut files = tensor_files_in(folder)?;
    match files.len() {
        0 => Err(Error::NoTensorFile {
            path: folder.to_path_buf(),
        }),
        1 => open_single(&folder.join(files.remove(0))),
        _ => Err(Error::NoIndex {
            path: folder.to_path_buf(),
            files,
        }),
    }
}

fn open_sharded(index_path: &Path) -> Result<TensorStore> {
    let folder = index_path.parent().unwrap_or(Path::new(""));
    let json = std::fs::read(index_path).map_err(|e| Error::read(index_path, e))?;
    let index = index::parse(&json, index_path)?;
    let named: BTreeSet<&str> = index.file_by_tensor.values().map(String::as_str).collect();
    let mut report = LoadReport::default();
    note_unused_shards(folder, &named, &mut report)?;
    let mut files = Vec::new();
    for name in named {
        if folder.join(name).exists() {
            files.push(map_file(&folder.join(name))?);
        } else {
            report.missing_shard.add(|| name.to_string());
        }
    }
    let entries = place_shards(&files, &index, &mut report);
    report.into_result(index_path)?;
    Ok(TensorStore {
        path: index_path.to_path_buf(),
        files,
        entries,
    })
}

/// Files called like shards that the index does not know. Other files of a folder (adapters, another layout's
/// `consolidated.safetensors`) are no business of the index.
fn note_unused_shards(folder: &Path, named: &BTreeSet<&str>, report: &mut LoadReport) -> Result<()> {
    for file in tensor_files_in(folder)? {
        if file.starts_with("model") && !named.contains(file.as_str()) {
            report.unused_shard.add(|| file.clone());
        }
    }
    Ok(())
}

/// Finds every tensor where the index says it is, and notes all that is elsewhere.
fn place_shards(files: &[MappedFile], index: &index::Index, report: &mut LoadReport) -> BTreeMap<String, Location> {
    let mut entries = BTreeMap::<String, Location>::new();
    for (name, location) in locations(files) {
        let shard = file_name(&files[location.file_idx].path);
        if let Some(first) = entries.get(&name) {
            let other = file_name(&files[first.file_idx].path);
            report.duplicate.add(|| format!("{name} in {other} and {shard}"));
            continue;
        }
        match index.file_by_tensor.get(&name) {
            None => report.unlisted.add(|| format!("{name} in {shard}")),
            Some(listed) if *listed != shard => {
                report
                    .misplaced
                    .add(|| format!("{name} is in {shard}, the index says {listed}"));
            }
            Some(_) => {}
        }
        entries.insert(name, location);
    }
    let opened: BTreeSet<String> = files.iter().map(|file| file_name(&file.path)).collect();
    for (name, shard) in &index.file_by_tensor {
        if opened.contains(shard) && !entries.contains_key(name) {
            report
                .misplaced
                .add(|| format!("{name} is in no shard, the index says {shard}"));
        }
    }
    entries
}

fn locations(files: &[MappedFile]) -> impl Iterator<Item = (String, Location)> {
    files.iter().enumerate().flat_map(|(file_idx, file)| {
        let entries = file.header.entries.iter().enumerate();
        entries.map(move |(entry_idx, entry)| (entry.name.clone(), Location { file_idx, entry_idx }))
    })
}

fn map_file(path: &Path) -> Result<MappedFile> {
    let read_error = |e| Error::read(path, e);
    let file = File::open(path).map_err(read_error)?;
    // An empty file cannot be mapped, and a directory opens on some systems: say so as for any other short file.
    if file.metadata().map_err(read_error)?.len() < 8 {
        let problem = Box::new(header::HeaderProblem::TooShort { file_bytes: 0 });
        return Err(Error::BadHeader {
            path: path.to_path_buf(),
            problem,
        });
    }
    #[allow(unsafe_code)]
    // SAFETY: the mapping is read-only. Another process that truncates the file in place while we read it would be
    // undefined behaviour; writers replace such files by rename instead, which leaves our mapping untouched.
    let bytes = unsafe { Mmap::map(&file) }.map_err(read_error)?;
    let header = header::parse(&bytes, path)?;
    Ok(MappedFile {
        path: path.to_path_buf(),
        file,
        bytes,
        header,
    })
}

/// Names of the `.safetensors` files of a folder, sorted.
fn tensor_files_in(folder: &Path) -> Result<Vec<String>> {
    let read_error = |e| Error::read(folder, e);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read_error)? {
        let name = entry.map_err(read_error)?.file_name().to_string_lossy().into_owned();
        if name.ends_with(".safetensors") && !name.starts_with('.') {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn compare(view: &TensorView<'_>, spec: &TensorSpec, names: &BTreeSet<&str>, report: &mut LoadReport) {
    let mismatch = |expected, found| Mismatch {
        name: spec.name.clone(),
        expected,
        found,
    };
    if view.shape != spec.shape {
        report
            .shape
            .add(|| mismatch(format!("{:?}", spec.shape), format!("{:?}", view.shape)));
        return;
    }
    let allowed = allowed_dtypes(&spec.name, names);
    if !allowed.contains(&view.dtype) {
        report
            .dtype
            .add(|| mismatch(list_dtypes(allowed), view.dtype.to_string()));
        return;
    }
    report.loaded += 1;
    *report.bytes_by_dtype.entry(view.dtype).or_default() += view.bytes.len() as u64;
}

fn allowed_dtypes(name: &str, names: &BTreeSet<&str>) -> &'static [Dtype] {
    let has = |module: &str, leaf: &str| names.contains(format!("{module}.{leaf}").as_str());
    match name.rsplit_once('.') {
        Some((module, "weight")) if has(module, "scales") => &[Dtype::U32],
        Some((module, "scales")) if !has(module, "biases") => &[Dtype::U8],
        _ => &[Dtype::F32, Dtype::F16, Dtype::BF16],
    }
}

fn list_dtypes(dtypes: &[Dtype]) -> String {
    dtypes.iter().map(|dtype| dtype.name()).collect::<Vec<_>>().join(" or ")
}

fn describe_unexpected(name: &str, expected: &BTreeSet<&str>) -> String {
    match nearest(name, expected.iter().copied()) {
        Some(near) => format!("{name} (the nearest expected is {near})"),
        None => name.to_string(),
    }
}

/// Whether `name` matches `pattern`, in which `*` stands for any run of characters.
fn matches_glob(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(mut name) = name.strip_prefix(head) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::HostTensor;

    fn spec(name: &str, shape: &[usize]) -> TensorSpec {
        TensorSpec {
            name: name.to_string(),
            shape: shape.to_vec(),
        }
    }

    fn store(tensors: &[(&str, HostTensor)]) -> (tempfile::TempDir, TensorStore) {
        let dir = tempfile::tempdir().unwrap();
        let tensors = tensors.iter().map(|(name, t)| (name.to_string(), t.clone())).collect();
        crate::write(&dir.path().join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
        let store = TensorStore::open(dir.path()).unwrap();
        (dir, store)
    }

    #[test]
    fn globs() {
        for (pattern, name, expect) in [
            ("a.b", "a.b", true),
            ("a.b", "a.bc", false),
            ("*.inv_freq", "layers.0.inv_freq", true),
            ("vision.*", "vision.x.y", true),
            ("*rotary*", "a.rotary_emb.b", true),
            ("a*a", "a", false),
            ("a*b*c", "a1c2c", false),
            ("a*b*c", "a1b2c", true),
            ("*", "", true),
        ] {
            assert_eq!(matches_glob(pattern, name), expect, "{pattern} {name}");
        }
    }

    #[test]
    fn each_disagreement_is_named() {
        let f32s = |n| HostTensor::zeros(Dtype::F32, &[n]);
        let (_dir, store) = store(&[
            ("fits", f32s(2)),
            ("narow", f32s(2)),
            ("reshaped", f32s(3)),
            ("retyped", HostTensor::zeros(Dtype::I32, &[2])),
            ("rotary.cache", f32s(2)),
        ]);
        let expected = [
            spec("fits", &[2]),
            spec("narrow", &[2]),
            spec("reshaped", &[2]),
            spec("retyped", &[2]),
            spec("head", &[2]),
        ];
        let rules = LoadRules {
            allow_unexpected: vec!["rotary.*".to_string()],
            allow_missing: vec!["head".to_string()],
        };
        let report = store.check(&expected, &rules);
        assert_eq!(report.loaded, 1);
        assert_eq!(report.bytes_by_dtype, BTreeMap::from([(Dtype::F32, 8)]));
        assert_eq!(report.missing.listed, ["narrow [2]"]);
        assert_eq!(report.unexpected.listed, ["narow (the nearest expected is narrow)"]);
        assert_eq!(report.ignored.listed, ["rotary.cache"]);
        assert_eq!(report.shape.listed[0].to_string(), "reshaped: expected [2], found [3]");
        assert_eq!(
            report.dtype.listed[0].to_string(),
            "retyped: expected F32 or F16 or BF16, found I32"
        );
        assert!(matches!(report.into_result(Path::new("m")), Err(Error::Refused { .. })));
    }

    #[test]
    fn quantised_layers_want_packed_words() {
        let expected = [
            spec("q.weight", &[4, 8]),
            spec("q.scales", &[4, 1]),
            spec("q.biases", &[4, 1]),
            spec("mx.weight", &[4, 8]),
            spec("mx.scales", &[4, 2]),
        ];
        let (_dir, store) = store(&[
            ("q.weight", HostTensor::zeros(Dtype::F32, &[4, 8])),
            ("q.scales", HostTensor::zeros(Dtype::BF16, &[4, 1])),
            ("q.biases", HostTensor::zeros(Dtype::BF16, &[4, 1])),
            ("mx.weight", HostTensor::zeros(Dtype::U32, &[4, 8])),
            ("mx.scales", HostTensor::zeros(Dtype::U8, &[4, 2])),
        ]);
        let report = store.check(&expected, &LoadRules::default());
        assert_eq!((report.loaded, report.count()), (4, 1));
        assert_eq!(report.dtype.listed[0].to_string(), "q.weight: expected U32, found F32");
    }

    #[test]
    fn released_pages_come_back_with_the_same_bytes() {
        let values: Vec<f32> = (0..1 << 20).map(|i| i as f32).collect(); // 4 MiB
        let (_dir, mut store) = store(&[
            ("large", HostTensor::from_f32(&[1 << 20], &values)),
            ("small", HostTensor::from_f32(&[1], &[0.5])),
        ]);
        for _ in 0..2 {
            assert_eq!(store.require("large").unwrap().to_f32().unwrap(), values);
            assert_eq!(store.require("small").unwrap().to_f32().unwrap(), [0.5]);
            if let Some(resident) = resident_bytes(&store) {
                assert!(resident >= 4 << 20, "{resident} B before");
            }
            store.release_pages();
            if let Some(resident) = resident_bytes(&store) {
                assert_eq!(resident, 0, "B after");
            }
        }
    }

    /// Bytes of the store's map that are in this process's memory, where `/proc` tells it.
    fn resident_bytes(store: &TensorStore) -> Option<usize> {
        let maps = std::fs::read_to_string("/proc/self/smaps").ok()?;
        let file = store.files().next()?.to_str()?;
        let map = maps.split_once(file)?.1;
        let line = map.lines().find(|line| line.starts_with("Rss:"))?;
        Some(line.split_whitespace().nth(1)?.parse::<usize>().ok()? * 1024)
    }

    #[test]
    fn err_absent_tensor_suggests_the_nearest() {
        let (_dir, store) = store(&[("model.norm.weight", HostTensor::zeros(Dtype::F32, &[1]))]);
        let error = store.require("model.nrom.weight").unwrap_err();
        assert!(matches!(&error, Error::NoTensor { nearest: Some(near), .. } if near == "model.norm.weight"));
    }
}
