use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use planish_checkpoint::adapter::{Adapter, Method, ReadOptions};
use planish_checkpoint::run_state::{Best, Checkpoint, Resume, Retention, RunDir, RunState, Verify};
use planish_checkpoint::{Error, ExactF64};
use planish_tensors::HostTensor;

/// In memory where there is such a place: the tests flush thousands of files.
fn temp_dir() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        tempfile::tempdir_in(memory).unwrap()
    } else {
        tempfile::tempdir().unwrap()
    }
}

/// The checkpoint of a made-up run at a step: every value follows from the step, so that equality can be checked.
fn checkpoint(step: u64) -> Checkpoint {
    let mut adapter = Adapter::new(Method::Lora, 2, 20.0, 0.0);
    let mut optimizer = BTreeMap::new();
    for layer in 0..2 {
        for (leaf, shape) in [("lora_a", [16, 2]), ("lora_b", [2, 24])] {
            let name = format!("model.layers.{layer}.mlp.up_proj.{leaf}");
            let values: Vec<f32> = (0..shape[0] * shape[1])
                .map(|i| (step as f32).sin() + i as f32)
                .collect();
            let tensor = HostTensor::from_f32(&shape, &values);
            optimizer.insert(format!("m/{name}"), tensor.clone());
            optimizer.insert(format!("v/{name}"), tensor.clone());
            adapter.tensors.insert(name, tensor);
        }
    }
    adapter.fill_keys();
    let mut state = RunState {
        schema: RunState::SCHEMA,
        ..RunState::default()
    };
    state.position.step = step;
    state.last_loss = Some(ExactF64(1.0 / step as f64));
    Checkpoint {
        adapter,
        optimizer,
        state,
    }
}

fn with_best(step: u64, best: u64) -> Checkpoint {
    let mut checkpoint = checkpoint(step);
    checkpoint.state.best = Some(Best {
        step: best,
        val_loss: ExactF64(0.5),
        dir: format!("step-{best:07}"),
    });
    checkpoint
}

const KEEP_ALL: Retention = Retention {
    keep_last: usize::MAX,
    keep_every: None,
};

fn save(out: &Path, steps: impl IntoIterator<Item = u64>) {
    let run = RunDir::open(out).unwrap();
    for step in steps {
        run.save(&checkpoint(step), &KEEP_ALL).unwrap();
    }
}

fn resume(out: &Path) -> Resume {
    RunDir::open(out).unwrap().resume(Verify::Everything).unwrap()
}

fn found_step(resume: &Resume) -> Option<u64> {
    resume
        .found
        .as_ref()
        .map(|(_, checkpoint)| checkpoint.state.position.step)
}

fn step_dir(out: &Path, step: u64) -> PathBuf {
    out.join(format!("checkpoints/step-{step:07}"))
}

fn names_in(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Every file below `dir` with its content.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for name in names_in(dir) {
        let path = dir.join(name);
        if path.is_dir() {
            files.extend(tree(&path));
        } else {
            files.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    files
}

#[test]
fn saved_checkpoint_reads_back_equal_and_is_an_mlx_lm_adapter() {
    let out = temp_dir();
    save(out.path(), [100]);
    let resume = resume(out.path());
    assert!(resume.to_string().starts_with("resuming at step 100 from "), "{resume}");
    let (dir, found) = resume.found.unwrap();
    let expect = checkpoint(100);
    assert_eq!((&found.state, &found.optimizer), (&expect.state, &expect.optimizer));
    assert_eq!(
        (&found.adapter.tensors, found.adapter.scale),
        (&expect.adapter.tensors, 20.0)
    );
    assert_eq!(
        Adapter::read(&dir, &ReadOptions::default()).unwrap().0.tensors,
        expect.adapter.tensors
    );
    let files = [
        "adapter_config.json",
        "adapters.safetensors",
        "manifest.json",
        "optimizer.safetensors",
        "planish.json",
        "state.json",
    ];
    assert_eq!(names_in(&dir), files);
    assert_eq!(names_in(&out.path().join("checkpoints")), ["latest", "step-0000100"]);
}

#[test]
fn full_fine_tune_is_saved_in_shards() {
    let out = temp_dir();
    let mut full = checkpoint(1);
    full.adapter = Adapter::new(Method::Full, 0, 0.0, 0.0);
    full.adapter
        .tensors
        .insert("model.norm.weight".to_string(), HostTensor::from_f32(&[2], &[1.0, 2.0]));
    RunDir::open(out.path()).unwrap().save(&full, &KEEP_ALL).unwrap();
    let dir = step_dir(out.path(), 1);
    assert!(dir.join("model.safetensors.index.json").exists() && !dir.join("adapters.safetensors").exists());
    let found = Checkpoint::read(&dir, Verify::SizesOnly).unwrap();
    assert_eq!(
        (found.adapter.method, found.adapter.tensors),
        (Method::Full, full.adapter.tensors)
    );
}

#[test]
fn equal_state_gives_equal_files() {
    let (a, b) = (temp_dir(), temp_dir());
    save(a.path(), [7]);
    save(b.path(), [7]);
    let contents = |out: &Path| tree(&step_dir(out, 7)).into_values().collect::<Vec<_>>();
    assert_eq!(contents(a.path()), contents(b.path()));
}

#[test]
fn nothing_saved_means_step_0() {
    let out = temp_dir();
    let resume = resume(out.path());
    assert_eq!(
        (found_step(&resume), resume.to_string().as_str()),
        (None, "no checkpoint: starting at step 0")
    );
}

/// S-4: whatever is truncated or flipped in the newest checkpoint, it is named and the one before is used.
#[test]
fn damage_in_any_file_makes_the_reader_pass_the_checkpoint_over() {
    let out = temp_dir();
    save(out.path(), [1, 2]);
    let newest = step_dir(out.path(), 2);
    for name in names_in(&newest) {
        let path = newest.join(&name);
        let good = fs::read(&path).unwrap();
        let mut damaged: Vec<Vec<u8>> = vec![good[..good.len() - 1].to_vec(), Vec::new(), [&good[..], b"x"].concat()];
        for at in (0..good.len()).step_by(good.len().div_ceil(23)) {
            let mut flipped = good.clone();
            flipped[at] ^= 1 << (at % 8);
            damaged.push(flipped);
        }
        for bytes in damaged {
            fs::write(&path, &bytes).unwrap();
            let resume = resume(out.path());
            assert_eq!(found_step(&resume), Some(1), "{name}");
            assert_eq!(resume.passed_over.len(), 1);
            assert!(
                resume.passed_over[0].reason.contains(&name),
                "{name}: {}",
                resume.passed_over[0].reason
            );
            assert!(resume.to_string().contains("passed over step-0000002"), "{resume}");
        }
        fs::remove_file(&path).unwrap();
        assert_eq!(found_step(&resume(out.path())), Some(1), "{name} removed");
        fs::write(&path, &good).unwrap();
        assert_eq!(found_step(&resume(out.path())), Some(2), "{name} restored");
    }
}

#[test]
fn checkpoint_under_another_name_is_not_believed() {
    let out = temp_dir();
    save(out.path(), [1]);
    fs::rename(step_dir(out.path(), 1), step_dir(out.path(), 9)).unwrap();
    let error = RunDir::open(out.path())
        .unwrap()
        .resume(Verify::Everything)
        .unwrap_err();
    let Error::NoWholeCheckpoint { passed_over, .. } = &error else {
        panic!("{error}")
    };
    assert!(passed_over[0].reason.contains("of step 1"), "{error}");
    assert!(step_dir(out.path(), 9).exists());
}

/// S-7.
#[test]
fn pruning_keeps_the_last_the_best_and_the_round_ones() {
    let out = temp_dir();
    let run = RunDir::open(out.path()).unwrap();
    let retention = Retention {
        keep_last: 2,
        keep_every: Some(4),
    };
    let mut pruned = Vec::new();
    for step in 1..=9 {
        pruned.extend(run.save(&with_best(step, 3.min(step)), &retention).unwrap().pruned);
    }
    assert_eq!(run.steps().unwrap(), [3, 4, 8, 9]);
    assert_eq!(pruned, [1, 2, 5, 6, 7]);
    let checkpoints = out.path().join("checkpoints");
    assert_eq!(
        fs::read_to_string(checkpoints.join("latest")).unwrap(),
        "step-0000009\n"
    );
    assert_eq!(fs::read_to_string(checkpoints.join("best")).unwrap(), "step-0000003\n");
    assert_eq!(names_in(&checkpoints).len(), 6, "{:?}", names_in(&checkpoints));
    run.save(&with_best(10, 10), &retention).unwrap();
    assert_eq!(run.steps().unwrap(), [4, 8, 9, 10]);
}

#[test]
fn stale_pointer_is_only_a_hint() {
    let out = temp_dir();
    save(out.path(), [1, 2]);
    for text in ["step-0000001\n", "step-0000099\n", "", "../../etc"] {
        fs::write(out.path().join("checkpoints/latest"), text).unwrap();
        assert_eq!(found_step(&resume(out.path())), Some(2));
    }
}

#[test]
fn saving_a_step_again_keeps_an_equal_one_and_replaces_a_damaged_one() {
    let out = temp_dir();
    save(out.path(), [1]);
    let before = fs::metadata(step_dir(out.path(), 1)).unwrap().modified().unwrap();
    save(out.path(), [1]);
    assert_eq!(
        fs::metadata(step_dir(out.path(), 1)).unwrap().modified().unwrap(),
        before
    );
    fs::write(step_dir(out.path(), 1).join("state.json"), b"{}").unwrap();
    save(out.path(), [1]);
    assert_eq!(found_step(&resume(out.path())), Some(1));
    assert_eq!(names_in(&out.path().join("checkpoints")), ["latest", "step-0000001"]);
}

/// S-9.
#[test]
fn second_run_in_one_directory_is_refused() {
    let out = temp_dir();
    let first = RunDir::open(out.path()).unwrap();
    let error = RunDir::open(out.path()).unwrap_err();
    assert!(
        matches!(error, Error::Locked { pid: Some(pid), .. } if pid == std::process::id()),
        "{error}"
    );
    drop(first);
    RunDir::open(out.path()).unwrap();
}

#[test]
fn leftovers_of_interrupted_writes_are_removed_under_the_lock_only() {
    let out = temp_dir();
    save(out.path(), [1]);
    let run = RunDir::open(out.path()).unwrap();
    let checkpoints = out.path().join("checkpoints");
    for name in [".tmp-0000002-abc", ".trash-step-0000001-1"] {
        fs::create_dir(checkpoints.join(name)).unwrap();
        fs::write(checkpoints.join(name).join("x"), b"x").unwrap();
    }
    fs::write(checkpoints.join(".planish-tmp-1"), b"x").unwrap();
    assert!(RunDir::open(out.path()).is_err());
    assert_eq!(names_in(&checkpoints).len(), 5);
    drop(run);
    RunDir::open(out.path()).unwrap();
    assert_eq!(names_in(&checkpoints), ["latest", "step-0000001"]);
}

/// S-8, in part: an error at any step of the protocol (a full disk says it like that) leaves the checkpoint before.
#[test]
fn failure_at_any_step_leaves_the_previous_checkpoint_whole() {
    for failing in 0.. {
        let out = temp_dir();
        save(out.path(), [1]);
        let mut run = RunDir::open(out.path()).unwrap();
        let calls = AtomicUsize::new(0);
        run.set_hook(move |_| {
            let full = calls.fetch_add(1, Ordering::SeqCst) == failing;
            if full {
                Err(io::ErrorKind::StorageFull.into())
            } else {
                Ok(())
            }
        });
        let result = run.save(
            &checkpoint(2),
            &Retention {
                keep_last: 1,
                keep_every: None,
            },
        );
        drop(run);
        let resume = resume(out.path());
        let (_, found) = resume.found.as_ref().unwrap();
        let step = found.state.position.step;
        assert!(step == 1 || step == 2);
        assert_eq!(found.optimizer, checkpoint(step).optimizer);
        assert!(resume.passed_over.is_empty());
        if result.is_ok() {
            assert!(failing > 10, "the protocol has more steps than {failing}");
            assert_eq!(step, 2);
            return;
        }
        assert!(matches!(result, Err(Error::Write { source, .. }) if source.kind() == io::ErrorKind::StorageFull));
    }
}

/// S-8: a file system that is really full.
#[test]
fn err_full_disk_leaves_the_previous_checkpoint_whole() {
    let dir = temp_dir();
    let Some(mount) = SmallDisk::mount(dir.path()) else {
        println!("skipped: mounting a small file system needs root on Linux");
        return;
    };
    let out = dir.path().join("out");
    save(&out, [1]);
    let run = RunDir::open(&out).unwrap();
    let filler = dir.path().join("filler");
    let mut bytes = vec![0u8; 64 << 10];
    while fs::write(dir.path().join(format!("{}-{}", filler.display(), bytes.len())), &bytes).is_ok() {
        bytes.push(0);
    }
    let error = run.save(&checkpoint(2), &KEEP_ALL).unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. } | Error::Write { .. }), "{error}");
    // Also when the check beforehand cannot know, because there is no checkpoint to go by.
    fs::rename(step_dir(&out, 1), out.join("elsewhere")).unwrap();
    let error = run.save(&checkpoint(2), &KEEP_ALL).unwrap_err();
    assert!(
        matches!(&error, Error::Tensors(planish_tensors::Error::Write { source, .. }) if source.kind() == io::ErrorKind::StorageFull),
        "{error}"
    );
    fs::rename(out.join("elsewhere"), step_dir(&out, 1)).unwrap();
    drop(run);
    let resume = Checkpoint::read(&step_dir(&out, 1), Verify::Everything).unwrap();
    assert_eq!(resume.state.position.step, 1);
    drop(mount);
}

/// A file system of 256 kB, gone when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Option<Self> {
        let mut mount = Command::new("mount");
        mount
            .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
            .arg(at)
            .stderr(Stdio::null());
        mount.status().ok()?.success().then(|| Self(at.to_path_buf()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[cfg(target_os = "linux")]
#[test]
fn err_read_only_directory() {
    let dir = temp_dir();
    let Some(mount) = SmallDisk::mount(dir.path()) else {
        println!("skipped: mounting a small file system needs root on Linux");
        return;
    };
    let out = dir.path().join("out");
    save(&out, [1]);
    let remounted = Command::new("mount")
        .args(["-o", "remount,ro"])
        .arg(dir.path())
        .status()
        .unwrap();
    assert!(remounted.success());
    let error = RunDir::open(&out).unwrap_err();
    assert!(
        matches!(&error, Error::Write { source, .. } if source.kind() == io::ErrorKind::ReadOnlyFilesystem),
        "{error}"
    );
    assert!(Checkpoint::read(&step_dir(&out, 1), Verify::Everything).is_ok());
    drop(mount);
}

const CHILD_DIR: &str = "PLANISH_TEST_RUN_DIR";
const CHILD_KILL_AT: &str = "PLANISH_TEST_KILL_AT";
const LAST_STEP: u64 = 7;

/// Not a test of its own: the run that the tests below kill. It goes on from its newest checkpoint to the last step.
#[test]
fn killed_run_child() {
    let Ok(out) = std::env::var(CHILD_DIR) else { return };
    let kill_at: Option<usize> = std::env::var(CHILD_KILL_AT).ok().and_then(|n| n.parse().ok());
    let mut run = RunDir::open(Path::new(&out)).unwrap();
    let calls = AtomicUsize::new(0);
    run.set_hook(move |_| {
        if Some(calls.fetch_add(1, Ordering::SeqCst)) == kill_at {
            rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)?;
            std::thread::sleep(Duration::from_secs(60));
        }
        Ok(())
    });
    let resume = run.resume(Verify::Everything).unwrap();
    assert!(resume.passed_over.is_empty(), "{resume}");
    let start = found_step(&resume).unwrap_or(0);
    if let Some((_, found)) = &resume.found {
        run.settle(&found.state, &Retention::default()).unwrap();
        assert_eq!(found.adapter.tensors, checkpoint(start).adapter.tensors);
    }
    for step in start + 1..=LAST_STEP {
        run.save(&with_best(step, 2.min(step)), &Retention::default()).unwrap();
    }
}

fn child(out: &Path, kill_at: Option<usize>) -> Command {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child
        .args(["--exact", "run_checkpoints::killed_run_child"])
        .env(CHILD_DIR, out)
        .env_remove(CHILD_KILL_AT);
    child.stdout(Stdio::null()).stderr(Stdio::null());
    if let Some(n) = kill_at {
        child.env(CHILD_KILL_AT, n.to_string());
    }
    child
}

/// What an uninterrupted run leaves, by path below its directory. The lock is not part of it.
fn relative_tree(out: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let tree = tree(out)
        .into_iter()
        .map(|(path, bytes)| (path.strip_prefix(out).unwrap().to_path_buf(), bytes));
    tree.filter(|(path, _)| path != Path::new("run.lock")).collect()
}

fn uninterrupted() -> BTreeMap<PathBuf, Vec<u8>> {
    let out = temp_dir();
    assert!(child(out.path(), None).status().unwrap().success());
    relative_tree(out.path())
}

/// S-3: killed at every step of the protocol in turn, then finished.
#[test]
fn killed_at_every_step_of_the_protocol_and_resumed_equals_uninterrupted() {
    let expect = uninterrupted();
    let steps: Vec<_> = expect.keys().filter(|path| path.ends_with("state.json")).collect();
    assert_eq!(steps.len(), 4, "the best and the last three: {steps:?}");
    let mut kills = 0;
    for kill_at in 0.. {
        let out = temp_dir();
        if child(out.path(), Some(kill_at)).status().unwrap().success() {
            break;
        }
        kills += 1;
        assert!(
            child(out.path(), None).status().unwrap().success(),
            "killed at {kill_at}"
        );
        assert!(relative_tree(out.path()) == expect, "killed at {kill_at}");
    }
    assert!(kills > 60, "{kills}");
}

/// S-3: killed at any time whatever, several times in one run, and at last left to finish.
#[test]
fn killed_at_random_times_and_resumed_equals_uninterrupted() {
    let begun = Instant::now();
    let expect = uninterrupted();
    // The whole life of the process, however loaded the machine is.
    let longest = begun.elapsed().as_micros() as u64;
    let (mut kills, mut seed) = (0, 0x2545_f491_4f6c_dd1d_u64);
    for _ in 0..10 {
        let out = temp_dir();
        for _ in 0..5 {
            let mut running = child(out.path(), None).spawn().unwrap();
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            std::thread::sleep(Duration::from_micros((seed >> 33) % longest));
            let ended = running.try_wait().unwrap();
            assert!(ended.is_none_or(|status| status.success()), "the run failed by itself");
            running.kill().unwrap();
            running.wait().unwrap();
            kills += usize::from(ended.is_none());
        }
        assert!(child(out.path(), None).status().unwrap().success());
        assert!(relative_tree(out.path()) == expect);
    }
    assert!(
        kills >= 10,
        "only {kills} of 50 runs were still alive when they were to be killed"
    );
}
