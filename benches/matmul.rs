//! f32 matrix products: through MLX, through OpenBLAS called directly in the same process, and through the wheel as Apple
//! ships it (a child process with the unchanged copy on its loader path). Prints the two ratios that matter.

// A benchmark prints and stops where it cannot go on; `sgemm` is found with dlsym.
#![allow(clippy::print_stdout, clippy::expect_used, unsafe_code)]

use std::ffi::c_int;
use std::hint::black_box;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use criterion::Criterion;
use mlx_rs::Array;
use wheel_fetch::mlx::{Flavour, wheel_file};

/// Rows, output columns, inner dimension. The first is one projection of a 135M model on 512 tokens.
const SHAPES: [(usize, usize, usize); 2] = [(512, 1536, 576), (2048, 2048, 2048)];

const AS_SHIPPED: &str = "--as-shipped";

fn main() -> Result<()> {
    if std::env::args().any(|argument| argument == AS_SHIPPED) {
        let seconds: Vec<String> = SHAPES.map(|shape| median(3, || mlx(shape)).to_string()).into();
        println!("{}", seconds.join(" "));
        return Ok(());
    }
    let mut criterion = Criterion::default()
        .measurement_time(Duration::from_secs(4))
        .sample_size(20)
        .configure_from_args();
    for shape in SHAPES {
        assert_answers_agree(shape)?;
        let (m, n, k) = shape;
        let mut group = criterion.benchmark_group(format!("matmul/f32/{m}x{n}x{k}"));
        let (a, b) = operands(shape);
        group.bench_function("mlx", |bencher| bencher.iter(|| product(&a, &b)));
        if let Some(sgemm) = openblas() {
            let (x, y, mut z) = (vec![0.5_f32; m * k], vec![0.25_f32; k * n], vec![0_f32; m * n]);
            group.bench_function("openblas", |bencher| {
                bencher.iter(|| call(sgemm, shape, &x, &y, black_box(&mut z)))
            });
        }
        group.finish();
    }
    ratios()
}

/// The claim in one line a shape: MLX against OpenBLAS, alternating in this process, and against the wheel as shipped.
fn ratios() -> Result<()> {
    let shipped = as_shipped()?;
    for (index, shape) in SHAPES.into_iter().enumerate() {
        let (m, n, k) = shape;
        let flops = 2.0 * (m * n * k) as f64;
        let ours = median(15, || mlx(shape));
        let direct = openblas().map(|sgemm| {
            let (x, y, mut z) = (vec![0.5_f32; m * k], vec![0.25_f32; k * n], vec![0_f32; m * n]);
            median(15, || call(sgemm, shape, &x, &y, black_box(&mut z)))
        });
        print!("{m}x{n}x{k}: mlx {:.0} GFLOP/s", flops / ours / 1e9);
        if let Some(direct) = direct {
            print!(
                ", openblas {:.0} GFLOP/s, ratio {:.2}",
                flops / direct / 1e9,
                direct / ours
            );
        }
        if let Some(shipped) = shipped.as_ref().and_then(|seconds| seconds.get(index)) {
            print!(
                ", wheel as shipped {:.1} GFLOP/s, ratio {:.0}",
                flops / shipped / 1e9,
                shipped / ours
            );
        }
        println!();
    }
    Ok(())
}

fn operands((m, n, k): (usize, usize, usize)) -> (Array, Array) {
    let filled = |rows: usize, columns: usize, value: f32| {
        Array::from_slice(&vec![value; rows * columns], &[rows as i32, columns as i32])
    };
    (filled(m, k, 0.5), filled(k, n, 0.25))
}

fn product(a: &Array, b: &Array) -> Array {
    let product = a.matmul(b).expect("shapes fit");
    product.eval().expect("evaluates");
    product
}

fn mlx(shape: (usize, usize, usize)) {
    thread_local!(static OPERANDS: std::cell::RefCell<Vec<(usize, Array, Array)>> = const { std::cell::RefCell::new(Vec::new()) });
    OPERANDS.with_borrow_mut(|cache| {
        let key = shape.0 ^ (shape.1 << 20);
        if !cache.iter().any(|(found, ..)| *found == key) {
            let (a, b) = operands(shape);
            cache.push((key, a, b));
        }
        let (_, a, b) = cache.iter().find(|(found, ..)| *found == key).expect("just put in");
        black_box(product(a, b));
    });
}

fn assert_answers_agree(shape: (usize, usize, usize)) -> Result<()> {
    let (a, b) = operands(shape);
    let expect = 0.125 * shape.2 as f32;
    let found = product(&a, &b);
    anyhow::ensure!(
        found
            .as_slice::<f32>()
            .iter()
            .all(|value| (value - expect).abs() < 1e-3),
        "MLX's product is wrong"
    );
    Ok(())
}

/// Median seconds of one call, after one call to warm up.
fn median(times: usize, mut work: impl FnMut()) -> f64 {
    work();
    let mut seconds: Vec<f64> = (0..times)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds[times / 2]
}

type Sgemm = unsafe extern "C" fn(
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    c_int,
    f32,
    *const f32,
    c_int,
    *const f32,
    c_int,
    f32,
    *mut f32,
    c_int,
);

/// The `sgemm` of the OpenBLAS that libmlx itself was given; none on macOS.
fn openblas() -> Option<Sgemm> {
    // SAFETY: the symbol, if present, is CBLAS's sgemm with 32-bit integers, whose signature `Sgemm` states.
    unsafe {
        let symbol = libc::dlsym(libc::RTLD_DEFAULT, c"scipy_cblas_sgemm".as_ptr());
        (!symbol.is_null()).then(|| std::mem::transmute::<*mut libc::c_void, Sgemm>(symbol))
    }
}

fn call(sgemm: Sgemm, (m, n, k): (usize, usize, usize), a: &[f32], b: &[f32], c: &mut [f32]) {
    const ROW_MAJOR: c_int = 101;
    const NO_TRANSPOSE: c_int = 111;
    let (m, n, k) = (m as c_int, n as c_int, k as c_int);
    // SAFETY: the slices hold m·k, k·n and m·n numbers, rows packed without gaps.
    unsafe {
        let (a, b, c) = (a.as_ptr(), b.as_ptr(), c.as_mut_ptr());
        sgemm(
            ROW_MAJOR,
            NO_TRANSPOSE,
            NO_TRANSPOSE,
            m,
            n,
            k,
            1.0,
            a,
            k,
            b,
            n,
            0.0,
            c,
            n,
        );
    }
}

/// Seconds a product with the unchanged wheel, from a child process; `None` where the wheel's BLAS is not replaced.
fn as_shipped() -> Result<Option<Vec<f64>>> {
    let Ok(flavour) = Flavour::for_target(std::env::consts::OS, std::env::consts::ARCH, false, (14, 0)) else {
        return Ok(None);
    };
    if flavour.openblas().is_none() {
        return Ok(None);
    }
    let unchanged = tempfile::tempdir()?;
    wheel_fetch::unpack(&wheel_file(&flavour.mlx())?, unchanged.path(), |name| {
        !name.contains("/include/")
    })?;
    let output = Command::new(std::env::current_exe()?)
        .arg(AS_SHIPPED)
        .env("LD_LIBRARY_PATH", unchanged.path().join("mlx/lib"))
        .output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().last().context("the child printed nothing")?;
    Ok(Some(line.split(' ').map(str::parse).collect::<Result<_, _>>()?))
}
