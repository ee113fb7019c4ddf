//! `cargo xtask mlx`: the prebuilt MLX, for this machine or another.

use anyhow::{Result, bail};
use clap::Subcommand;
use wheel_fetch::mlx::{Flavour, VERSION, prefix, wheel_file};

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Download a prebuilt MLX (hash-checked) into the cache, so that later builds need no network
    Fetch {
        /// Which one; without it, the one for this machine
        #[arg(long, value_name = "TARGET")]
        target: Option<String>,
    },
    /// List the prebuilt MLX wheels and their hashes
    List,
}

pub(crate) fn run(command: &Command) -> Result<()> {
    match command {
        Command::Fetch { target } => fetch(target.as_deref()),
        Command::List => {
            for flavour in Flavour::ALL {
                let wheel = flavour.mlx();
                println!(
                    "{:<22} {} {} {}",
                    flavour.name(),
                    wheel.package,
                    wheel.platform,
                    wheel.sha256
                );
            }
            Ok(())
        }
    }
}

fn fetch(target: Option<&str>) -> Result<()> {
    let flavour = target.map_or_else(this_machine, by_name)?;
    eprintln!("MLX {VERSION} for {}", flavour.name());
    let wheel = wheel_file(&flavour.mlx())?;
    println!("{}", wheel.display());
    match flavour.openblas() {
        // A Linux copy is finished (fast BLAS) by the build of mlx-sys, which has the C compiler at hand.
        Some(openblas) => println!("{}", wheel_file(&openblas)?.display()),
        None => println!("{}", prefix(flavour, |_| Ok(()))?.display()),
    }
    Ok(())
}

fn this_machine() -> Result<Flavour> {
    if cfg!(target_os = "macos") {
        let output = std::process::Command::new("sw_vers").arg("-productVersion").output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut parts = text.trim().split('.').map(|part| part.parse().unwrap_or(0));
        let version = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
        return Ok(Flavour::for_target("macos", std::env::consts::ARCH, false, version)?);
    }
    Ok(Flavour::for_target(
        std::env::consts::OS,
        std::env::consts::ARCH,
        false,
        (0, 0),
    )?)
}

fn by_name(name: &str) -> Result<Flavour> {
    let Some(flavour) = Flavour::ALL.into_iter().find(|flavour| flavour.name() == name) else {
        bail!(
            "no target {name:?}; one of: {}",
            Flavour::ALL.map(Flavour::name).join(", ")
        );
    };
    Ok(flavour)
}
