//! How much memory this process may use: that of the machine, or less in a container, a batch job or under `ulimit -v`.

use std::path::{Path, PathBuf};

/// The least of the machine's memory, the limits of this process's control groups (version 1 and 2, every level) and its
/// limit of address space; `None` where the system tells none of them.
pub fn available_bytes() -> Option<u64> {
    bytes_of(&|path| std::fs::read_to_string(path).ok()).or_else(|| darwin_bytes("hw.memsize"))
}

/// The same by the files that `read` gives.
fn bytes_of(read: &dyn Fn(&Path) -> Option<String>) -> Option<u64> {
    let text = |path: &str| read(Path::new(path)).unwrap_or_default();
    let machine = kilobytes(&text("/proc/meminfo"), "MemTotal:");
    let groups = group_files(&text("/proc/self/cgroup"), &text("/proc/self/mountinfo"));
    let of_groups = groups.iter().filter_map(|file| read(file)?.trim().parse().ok());
    let status = text("/proc/self/status");
    let address_space = address_space_limit(&text("/proc/self/limits")).map(|limit| {
        // What is mapped and not resident, such as libraries and stacks, takes addresses too.
        let mapped = kilobytes(&status, "VmSize:").unwrap_or(0);
        limit.saturating_sub(mapped.saturating_sub(kilobytes(&status, "VmRSS:").unwrap_or(0)))
    });
    machine.into_iter().chain(of_groups).chain(address_space).min()
}

/// Resident memory of this process, where `/proc` tells it.
pub fn resident_bytes() -> Option<u64> {
    kilobytes(&std::fs::read_to_string("/proc/self/status").ok()?, "VmRSS:")
}

/// A line `NAME   1234 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse::<u64>().ok()?.checked_mul(1024)
}

/// The soft limit in `/proc/self/limits`; `None` where it is unlimited.
fn address_space_limit(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max address space"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// The files that may hold a limit: for every hierarchy that counts memory, those of the group and of all above it.
fn group_files(own_groups: &str, mounts: &str) -> Vec<PathBuf> {
    let mounts = mounts.lines().filter_map(Mount::parse);
    let of_mount = mounts.filter_map(|mount| {
        let group = own_groups.lines().find_map(|line| mount.group_in(line))?;
        // In a container the group's path may be that of the host, and the mount shows what is below it.
        let below = Path::new(group).strip_prefix(&mount.root).unwrap_or(Path::new(""));
        let levels: Vec<PathBuf> = below
            .ancestors()
            .map(|level| mount.point.join(level).join(mount.file()))
            .collect();
        Some(levels)
    });
    of_mount.flatten().collect()
}

/// A mounted hierarchy of control groups.
struct Mount {
    is_v2: bool,
    /// The group that the mount point shows.
    root: PathBuf,
    point: PathBuf,
}

impl Mount {
    /// `36 35 0:30 ROOT POINT options - TYPE source SUPER_OPTIONS`
    fn parse(line: &str) -> Option<Self> {
        let (mount, kind) = line.split_once(" - ")?;
        let mut kind = kind.split(' ');
        let (name, options) = (kind.next()?, kind.nth(1).unwrap_or_default());
        let is_v2 = name == "cgroup2";
        let counts_memory = is_v2 || (name == "cgroup" && options.split(',').any(|option| option == "memory"));
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        counts_memory.then(|| Self {
            is_v2,
            root: root.into(),
            point: point.into(),
        })
    }

    /// The path of this process's group, where a line of `/proc/self/cgroup` (`ID:CONTROLLERS:PATH`) is of this hierarchy.
    fn group_in<'a>(&self, line: &'a str) -> Option<&'a str> {
        let mut fields = line.splitn(3, ':').skip(1);
        let (controllers, path) = (fields.next()?, fields.next()?);
        let is_this = if self.is_v2 {
            controllers.is_empty()
        } else {
            controllers.split(',').any(|controller| controller == "memory")
        };
        is_this.then_some(path)
    }

    fn file(&self) -> &'static str {
        if self.is_v2 {
            "memory.max"
        } else {
            "memory.limit_in_bytes"
        }
    }
}

/// A number that macOS's `sysctl` tells.
fn darwin_bytes(name: &str) -> Option<u64> {
    let output = std::process::Command::new("sysctl").args(["-n", name]).output().ok()?;
    String::from_utf8_lossy(&output.stdout).trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MEMINFO: (&str, &str) = ("/proc/meminfo", "MemTotal:       32000000 kB\nMemFree:        1 kB\n");
    const V2_MOUNT: &str =
        "25 1 0:22 / /proc rw - proc proc rw\n30 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n";

    /// What is found where only these files exist.
    fn check(files: &[(&str, &str)], expect: Option<u64>) {
        let read = |path: &Path| {
            let found = files.iter().find(|(name, _)| Path::new(name) == path);
            found.map(|(_, text)| (*text).to_owned())
        };
        assert_eq!(bytes_of(&read), expect, "{files:?}");
    }

    #[test]
    fn machine_without_limits_has_its_memory() {
        check(&[], None);
        check(&[MEMINFO], Some(32_768_000_000));
        let limits = "Limit   Soft Limit   Hard Limit   Units\nMax address space         unlimited            unlimited            bytes\n";
        check(&[MEMINFO, ("/proc/self/limits", limits)], Some(32_768_000_000));
    }

    #[test]
    fn least_limit_of_all_levels_of_version_2_counts() {
        let files = [
            MEMINFO,
            ("/proc/self/cgroup", "0::/slurm/job_7/step_0\n"),
            ("/proc/self/mountinfo", V2_MOUNT),
            ("/sys/fs/cgroup/slurm/job_7/step_0/memory.max", "max\n"),
            ("/sys/fs/cgroup/slurm/job_7/memory.max", "2000000000\n"),
            ("/sys/fs/cgroup/slurm/memory.max", "8000000000\n"),
        ];
        check(&files, Some(2_000_000_000));
    }

    #[test]
    fn container_sees_its_own_group_at_the_root() {
        let files = [
            MEMINFO,
            ("/proc/self/cgroup", "0::/\n"),
            ("/proc/self/mountinfo", V2_MOUNT),
            ("/sys/fs/cgroup/memory.max", "512000000\n"),
        ];
        check(&files, Some(512_000_000));
    }

    #[test]
    fn version_1_counts_where_memory_is_mounted() {
        let mounts = "31 23 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 23 0:28 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        let own = "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc/inner\n0::/\n";
        let unlimited = (
            "/sys/fs/cgroup/memory/inner/memory.limit_in_bytes",
            "9223372036854771712\n",
        );
        let limit = ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "1000000000\n");
        let files = [MEMINFO, ("/proc/self/cgroup", own), ("/proc/self/mountinfo", mounts)];
        check(&[&files[..], &[unlimited, limit]].concat(), Some(1_000_000_000));
        check(&[&files[..], &[unlimited]].concat(), Some(32_768_000_000));
        // The host's path, and a mount that shows something else.
        let elsewhere = [MEMINFO, ("/proc/self/cgroup", "4:memory:/other\n"), files[2], limit];
        check(&elsewhere, Some(1_000_000_000));
    }

    #[test]
    fn address_space_counts_less_what_is_mapped_and_not_resident() {
        let limits = "Max address space         1300000000           unlimited            bytes\n";
        let status = "VmSize:\t  400000 kB\nVmRSS:\t  100000 kB\n";
        let files = [MEMINFO, ("/proc/self/limits", limits), ("/proc/self/status", status)];
        check(&files, Some(1_300_000_000 - 300_000 * 1024));
    }
}
