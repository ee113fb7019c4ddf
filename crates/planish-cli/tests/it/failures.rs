//! What goes wrong around a run: every time a named error, nothing lost, and the run goes on from what is whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::run::{Ran, copy_of_the_model, planish, text};

/// A run of six updates on six short conversations, saved after every second.
struct Run {
    dir: tempfile::TempDir,
    model: PathBuf,
}

impl Run {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let model = copy_of_the_model(dir.path());
        let run = Self { dir, model };
        std::fs::create_dir(run.path("data")).unwrap();
        run.write_rows("It is");
        run
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write_rows(&self, answer: &str) {
        let row = |i: usize| {
            let turn = |role: &str, content: String| serde_json::json!({"role": role, "content": content});
            let messages = [
                turn("user", format!("What is {i}?")),
                turn("assistant", format!("{answer} {i}, my dear.")),
            ];
            format!("{}\n", serde_json::json!({"messages": messages}))
        };
        let rows: String = (0..6).map(row).collect();
        std::fs::write(self.path("data/train.jsonl"), rows).unwrap();
    }

    fn train(&self, out: &Path, more: &[&str]) -> Ran {
        let data = self.path("data");
        let args = [
            "train",
            "--model",
            text(&self.model),
            "--data",
            text(&data),
            "--out",
            text(out),
        ];
        let settings = [
            "train.steps=6",
            "checkpoint.every=2",
            "checkpoint.keep_last=3",
            "lora.rank=2",
            "train.batch_size=2",
        ];
        let settings: Vec<&str> = settings.iter().flat_map(|setting| ["--set", setting]).collect();
        planish(&[&args[..], &settings, more].concat())
    }

    /// Runs to the end in a new folder.
    fn done(&self) -> PathBuf {
        let out = self.path("out");
        self.train(&out, &[]).success();
        out
    }
}

fn step(out: &Path, step: usize) -> PathBuf {
    out.join(format!("checkpoints/step-{step:07}"))
}

/// Every file under a folder with its bytes, but for what tells of time and place.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.insert(
                    path.strip_prefix(dir).unwrap().to_path_buf(),
                    std::fs::read(&path).unwrap(),
                );
            }
        }
    }
    files
}

fn copy(from: &Path, to: &Path) {
    for (name, bytes) in tree(from) {
        let path = to.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

fn results(out: &Path) -> [Vec<u8>; 3] {
    [
        "adapters.safetensors",
        "checkpoints/step-0000006/adapters.safetensors",
        "checkpoints/step-0000006/optimizer.safetensors",
    ]
    .map(|file| std::fs::read(out.join(file)).unwrap())
}

/// One byte of each file of the newest checkpoint, a file cut short, a hash that lies, a file that is gone: the checkpoint
/// is passed over by name, and the run ends as if nothing had happened.
#[test]
fn cli_damaged_checkpoint_is_passed_over_by_name() {
    let run = Run::new();
    let whole = run.done();
    let expect = results(&whole);
    let files: Vec<String> = std::fs::read_dir(step(&whole, 6))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(files.len(), 6, "{files:?}");
    type Damage = fn(&mut Vec<u8>);
    let flip: Damage = |bytes| {
        let at = bytes.len() / 2;
        bytes[at] ^= 1;
    };
    let mut cases: Vec<(&str, &str, Damage)> = files.iter().map(|file| (file.as_str(), "flipped", flip)).collect();
    cases.push(("optimizer.safetensors", "cut", |bytes| bytes.truncate(bytes.len() - 7)));
    cases.push(("state.json", "emptied", Vec::clear));
    cases.push(("manifest.json", "another hash", |bytes| {
        let at = bytes.windows(8).position(|part| part == b"\"sha256\"").unwrap() + 12;
        bytes[at] = if bytes[at] == b'0' { b'1' } else { b'0' };
    }));
    for (i, (file, what, damage)) in cases.into_iter().enumerate() {
        let out = run.path(&format!("damaged-{i}"));
        copy(&whole, &out);
        let path = step(&out, 6).join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        damage(&mut bytes);
        std::fs::write(&path, bytes).unwrap();
        let ran = run.train(&out, &["--resume"]);
        assert_eq!(ran.code, Some(0), "{file} {what}: {}", ran.stderr);
        // A manifest that lies accuses the file it lies about.
        let named = if what == "another hash" { "step-0000006" } else { file };
        for word in ["step-0000006", named, "step 4"] {
            assert!(
                ran.stderr.contains(word),
                "{file} {what}: {word:?} is not in {}",
                ran.stderr
            );
        }
        assert_eq!(results(&out), expect, "{file} {what}");
    }
}

#[test]
fn cli_two_runs_in_one_directory_are_refused() {
    let run = Run::new();
    let out = run.done();
    let lock = planish_checkpoint::run_state::RunLock::take(&out).unwrap();
    let mut before = tree(&out);
    let ran = run.train(&out, &["--resume"]);
    assert_eq!(ran.code, Some(1));
    let pid = std::process::id().to_string();
    assert!(
        ran.stderr.contains(&pid) && ran.stderr.contains(text(&out)),
        "{}",
        ran.stderr
    );
    before.remove(Path::new("run.lock"));
    let mut after = tree(&out);
    after.remove(Path::new("run.lock"));
    assert_eq!(after, before);
    drop(lock);
    run.train(&out, &["--resume"]).success();
}

/// Base model, data, tokenizer, configuration: each is named, nothing is changed, and the way out works.
#[test]
fn cli_resume_names_what_has_changed() {
    let run = Run::new();
    let out = run.done();
    // Something is left to do.
    std::fs::remove_dir_all(step(&out, 6)).unwrap();
    let before = tree(&out);
    let refused = |run: &Run, more: &[&str], name: &str| {
        let ran = run.train(&out, &[&["--resume"], more].concat());
        assert_eq!(ran.code, Some(1), "{name}: {}", ran.stderr);
        assert!(
            ran.stderr.contains(name) && ran.stderr.contains("--resume-weights-only"),
            "{name}: {}",
            ran.stderr
        );
        let mut after = tree(&out);
        after.remove(Path::new("run.lock"));
        let unlocked = before.iter().filter(|(name, _)| *name != Path::new("run.lock"));
        assert!(after.iter().eq(unlocked), "{name}: the folder has changed");
    };
    refused(&run, &["--set", "optimizer.learning_rate=3e-4"], "configuration");

    run.write_rows("It was");
    refused(&run, &[], "data");
    run.write_rows("It is");

    let weights = run.model.join("model.safetensors");
    let kept = std::fs::read(&weights).unwrap();
    let mut other = kept.clone();
    *other.last_mut().unwrap() ^= 1;
    std::fs::write(&weights, &other).unwrap();
    refused(&run, &[], "base model");
    std::fs::write(&weights, &kept).unwrap();

    let tokenizer = run.model.join("tokenizer_config.json");
    let kept = std::fs::read_to_string(&tokenizer).unwrap();
    std::fs::write(&tokenizer, kept.replace("<|im_start|>", "<|im_start|> ")).unwrap();
    refused(&run, &[], "chat template");
    std::fs::write(&tokenizer, &kept).unwrap();

    // What is accepted by name is passed over, and said; the rest is still refused.
    run.write_rows("It was");
    let learning_rate = ["--set", "optimizer.learning_rate=3e-4"];
    refused(
        &run,
        &[&learning_rate[..], &["--accept-changed", "data"]].concat(),
        "--accept-changed configuration",
    );
    let accepted = [
        &["--resume", "--accept-changed", "data,configuration"],
        &learning_rate[..],
    ]
    .concat();
    let other = run.path("other");
    copy(&out, &other);
    let ran = run.train(&other, &accepted);
    for name in ["data", "configuration"] {
        let note = format!("the {name} has changed, as accepted");
        assert!(ran.stderr.contains(&note), "{note}: {}", ran.stderr);
    }
    ran.success();
    assert!(step(&other, 6).join("state.json").exists());
    run.write_rows("It is");

    // Nothing has changed: it goes on. And a change can be insisted on, from the weights alone.
    run.train(&out, &["--resume"]).success();
    let ran = run.train(
        &out,
        &["--resume-weights-only", "--set", "optimizer.learning_rate=3e-4"],
    );
    assert!(ran.stderr.contains("weights only"), "{}", ran.stderr);
    ran.success();
}

#[test]
fn cli_damaged_base_model_is_named_and_nothing_is_written() {
    let run = Run::new();
    let weights = run.model.join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() - 10]).unwrap();
    let out = run.path("out");
    let ran = run.train(&out, &[]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.contains("model.safetensors"), "{}", ran.stderr);
    assert!(!out.exists());
}

/// A disk that fills up in the middle of the run, and one that cannot be written to: the earlier checkpoint is whole, and
/// with room again the run ends as it would have.
#[cfg(target_os = "linux")]
#[test]
fn cli_full_or_read_only_disk_loses_nothing() {
    let run = Run::new();
    let whole = run.done();
    let expect = results(&whole);
    let one = tree(&step(&whole, 6)).values().map(Vec::len).sum::<usize>();
    let disk = run.path("disk");
    std::fs::create_dir(&disk).unwrap();
    // Two checkpoints fit, with what else a run writes; three do not.
    let size = format!("size={}", one * 2 + one * 3 / 4);
    if !mount(&["-t", "tmpfs", "-o", &size, "tmpfs"], &disk) {
        println!("skipped: mounting a small file system needs root");
        return;
    }
    let guard = Unmount(disk.clone());
    let out = disk.join("out");
    let ran = run.train(&out, &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    // Noticed beforehand, or by the write itself: either way it says that room is missing.
    assert!(
        ran.stderr.contains("make room") || ran.stderr.contains("No space left"),
        "{}",
        ran.stderr
    );
    let newest = if step(&out, 4).exists() { 4 } else { 2 };
    assert!(step(&out, newest).exists() && !step(&out, 6).exists(), "{}", ran.stderr);

    assert!(mount(&["-o", "remount,ro"], &disk));
    let ran = run.train(&out, &["--resume"]);
    assert_eq!(ran.code, Some(1));
    assert!(ran.stderr.to_lowercase().contains("read-only"), "{}", ran.stderr);

    assert!(mount(&["-o", "remount,rw,size=64m"], &disk));
    let ran = run.train(&out, &["--resume"]);
    assert!(ran.stderr.contains(&format!("step {newest}")), "{}", ran.stderr);
    ran.success();
    assert_eq!(results(&out), expect);
    drop(guard);
}

#[cfg(target_os = "linux")]
fn mount(args: &[&str], at: &Path) -> bool {
    let mut command = Command::new("mount");
    command.args(args).arg(at).stderr(std::process::Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[cfg(target_os = "linux")]
struct Unmount(PathBuf);

#[cfg(target_os = "linux")]
impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
