//! The compilers of the link check: fetched once, unpacked into the cache, never installed.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use wheel_fetch::mlx::wheel_file;
use wheel_fetch::{CacheLock, Wheel, cache_dir, unpack};

/// Debian's Rust for building browsers: the one whose sources of the standard library come along.
const PACKAGES: [&str; 6] = [
    "rustc-web",
    "rust-web-src",
    "cargo-web",
    "libstd-rust-web-1.96",
    "libstd-rust-web-dev",
    "libllvm22",
];

/// A C and C++ compiler and linker for every system, with macOS's headers.
const ZIG: Wheel = Wheel {
    package: "ziglang",
    version: "0.17.1",
    platform: "manylinux_2_12_x86_64",
    sha256: "ea6cc5d87b033cf0aedfbc8f9549a908cae6c50ac31f1698188fa48a74524b54",
    instead: "PATH",
};

/// Bump when what [`Tools::prepare`] leaves in the cache changes.
const LAYOUT: &str = "r1";

/// Why the check cannot run here, if it cannot.
pub(super) fn unsuitable() -> Option<String> {
    if !cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Some("the link check runs on Linux x86-64 only (on a Mac, cargo build is the check)".into());
    }
    let missing: Vec<&str> = ["apt-get", "dpkg", "python3"]
        .into_iter()
        .filter(|program| !exists(program))
        .collect();
    (!missing.is_empty()).then(|| format!("the link check needs Debian; not found: {}", missing.join(", ")))
}

fn exists(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok()
}

/// Where the compilers lie.
pub(super) struct Tools {
    root: PathBuf,
    /// Directory of the zig program with its `lib`.
    pub(super) zig: PathBuf,
}

impl Tools {
    /// Takes them from the cache, fetching what is not there.
    pub(super) fn prepare() -> Result<Self> {
        let parent = cache_dir()?.join("link-check");
        let root = parent.join(LAYOUT);
        let _lock = CacheLock::acquire(&parent)?;
        if !root.exists() {
            let staging = parent.join(format!(".unpack-{}", std::process::id()));
            fs::create_dir_all(&staging)?;
            let unpacked = unpack_zig(&staging.join("zig")).and_then(|()| unpack_debian(&staging));
            if let Err(error) = unpacked.and_then(|()| fs::rename(&staging, &root).map_err(Into::into)) {
                // A half-finished copy must never be used.
                fs::remove_dir_all(&staging).context("cannot remove a half-unpacked copy")?;
                return Err(error);
            }
        }
        let tools = Self {
            zig: root.join("zig/ziglang"),
            root,
        };
        tools.write_wrappers()?;
        Ok(tools)
    }

    /// Path of a wrapper script.
    pub(super) fn wrapper(&self, name: &str) -> PathBuf {
        self.root.join("bin").join(name)
    }

    fn write_wrappers(&self) -> Result<()> {
        fs::create_dir_all(self.root.join("bin"))?;
        let (debian, zig) = (self.root.join("debian/usr"), self.zig.join("zig"));
        let rustc = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH={0}/lib/x86_64-linux-gnu:{0}/lib/llvm-22/lib exec {0}/bin/rustc \"$@\"\n",
            debian.display()
        );
        let scripts = [
            ("rustc", rustc),
            ("zig-cc", compiler(&zig, "cc", "")),
            // zig's C++ headers and libmlx's disagree about who defines these two.
            (
                "zig-c++",
                compiler(
                    &zig,
                    "c++",
                    "'-DINFINITY=__builtin_inff()' '-DNAN=__builtin_nanf(\"\")'",
                ),
            ),
            ("zig-ar", format!("#!/bin/sh\nexec {} ar \"$@\"\n", zig.display())),
        ];
        for (name, text) in scripts {
            let path = self.wrapper(name);
            planish_core::fs::write_atomic(&path, text.as_bytes())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
        Ok(())
    }
}

/// A script that calls zig with the target in zig's own words and without the flags it does not take.
fn compiler(zig: &Path, language: &str, extra: &str) -> String {
    format!(
        "#!/bin/bash\n\
         # rustc's own libraries are not for other programs.\n\
         unset LD_LIBRARY_PATH\n\
         kept=()\n\
         compiles= named=\n\
         for argument in \"$@\"; do\n\
         \x20 case \"$argument\" in -c) compiles=1 ;; -o*) named=1 ;; esac\n\
         \x20 case \"$argument\" in\n\
         \x20   --target=* | -mmacosx-version-min=* | -march=* | -liconv) ;;\n\
         \x20   *) kept+=(\"$argument\") ;;\n\
         \x20 esac\n\
         done\n\
         # A build script that only asks whether something compiles would leave an object in the crate's folder.\n\
         if [ -n \"$compiles\" ] && [ -z \"$named\" ]; then kept+=(-o /dev/null); fi\n\
         exec {} {language} -target aarch64-macos.14.0 {extra} \"${{kept[@]}}\"\n",
        zig.display()
    )
}

fn unpack_zig(into: &Path) -> Result<()> {
    unpack(&wheel_file(&ZIG)?, into, |_| true)?;
    let program = into.join("ziglang/zig");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))
        .with_context(|| format!("no {}", program.display()))
}

/// Downloads with apt's own client, lists and downloads in our directory, and unpacks without installing.
fn unpack_debian(staging: &Path) -> Result<()> {
    let (downloads, lists) = (staging.join("downloads"), staging.join("lists"));
    for directory in [&downloads, &lists.join("partial"), &staging.join("archives/partial")] {
        fs::create_dir_all(directory)?;
    }
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.current_dir(&downloads).arg("-qq");
        command.arg("-o").arg(format!("Dir::State::Lists={}", lists.display()));
        command
            .arg("-o")
            .arg(format!("Dir::Cache={}", staging.join("archives").display()));
        command.args(["-o", "APT::Sandbox::User=root"]).args(arguments);
        run(command, "apt-get")
    };
    apt(&["update"])?;
    apt(&[&["download"], PACKAGES.as_slice()].concat())?;
    for package in fs::read_dir(&downloads)? {
        let mut command = Command::new("dpkg");
        command.arg("-x").arg(package?.path()).arg(staging.join("debian"));
        run(command, "dpkg")?;
    }
    fs::remove_dir_all(&downloads)?;
    fs::remove_dir_all(&lists)?;
    fs::remove_dir_all(staging.join("archives"))?;
    Ok(())
}

fn run(mut command: Command, name: &str) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start {name}"))?;
    if !output.status.success() {
        bail!(
            "{name} failed (are the security updates of Debian 12 or later among its sources?): {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
