//! Compiles our one C++ file against the headers that `mlx-sys` found.

use std::env;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=cpp");
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++20")
        .opt_level(2)
        .warnings(false)
        .file("cpp/host_kernel.cpp");
    for directory in
        env::split_paths(&env::var_os("DEP_MLX_INCLUDE").ok_or("mlx-sys did not say where the headers are")?)
    {
        build.flag("-isystem").flag(directory);
    }
    build.try_compile("planish_mlx")?;
    Ok(())
}
