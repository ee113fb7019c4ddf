//! Which vector instructions the processor has, and arithmetic that compilers turn into them.

use std::sync::OnceLock;

/// Vector instructions that kernels are compiled for, each level including the ones before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What every processor of the target has.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    Avx512,
    /// And its bf16 dot products.
    Avx512Bf16,
}

/// The best level of this processor, found once.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(detect)
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    match (avx2, avx512, is_x86_feature_detected!("avx512bf16")) {
        (true, true, true) => Level::Avx512Bf16,
        (true, true, false) => Level::Avx512,
        (true, false, _) => Level::Avx2,
        _ => Level::Portable,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Portable
}

/// Compiles the body of a function once a level and calls the best one at run time.
///
/// The body is a generic function over `const FMA: bool`, marked `#[inline(always)]`.
macro_rules! multiversion {
    ($(#[$doc:meta])* $vis:vis fn $name:ident = $body:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?) => {
        $(#[$doc])*
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                #[allow(unsafe_code)]
                match crate::simd::level() {
                    // SAFETY: `level` found these instructions on this processor.
                    crate::simd::Level::Avx512 | crate::simd::Level::Avx512Bf16 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    crate::simd::Level::Portable => {}
                }
            }
            // Fused multiply-add is a slow library call where the instruction may be missing.
            $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// `a · b + c`, fused where that is one instruction.
#[inline(always)]
pub(crate) fn mul_add<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// `eˣ` for finite `x` and −∞, relative error below 2.5e-7; 0 below −87.3, the largest finite powers near 88.7.
///
/// Cody-Waite reduction to |r| ≤ ln 2 / 2, then a polynomial of degree 6. Written without branches, so that a loop over it
/// becomes vector code.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2²³: adding it rounds to an integer
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // NaN must stay NaN; `max` and `min` would drop it, and so would a comparison the wrong way round.
    let clamped = if x < -87.33 { -87.33 } else { x };
    let clamped = if clamped > 88.72 { 88.72 } else { clamped };
    let shifted = mul_add::<FMA>(clamped, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = mul_add::<FMA>(n, -LN2_HIGH, clamped);
    let r = mul_add::<FMA>(n, -LN2_LOW, r);
    let mut p = 1.388_888_9e-3;
    for coefficient in [8.333_333e-3, 4.166_666_6e-2, 1.666_666_7e-1, 0.5, 1.0, 1.0] {
        p = mul_add::<FMA>(p, r, coefficient);
    }
    // n + 127 can be 255 for the largest arguments: multiply in two halves.
    let bits = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = bits >> 1;
    let power = |n: i32| f32::from_bits((n.wrapping_add(127) as u32) << 23);
    let y = p * power(half) * power(bits - half);
    if x < -87.33 { 0.0 } else { y }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(fma: bool) {
        let mut worst = 0_f64;
        for step in -87_200..88_700 {
            let x = step as f32 / 1000.0;
            let found = if fma { exp::<true>(x) } else { exp::<false>(x) };
            let expect = f64::from(x).exp();
            worst = worst.max(((f64::from(found) - expect) / expect).abs());
        }
        assert!(worst < 2.5e-7, "{worst}");
    }

    #[test]
    fn exp_is_exact_to_two_units() {
        check(true);
        check(false);
    }

    #[test]
    fn exp_at_the_edges() {
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(-1000.0), 0.0);
        assert_eq!(exp::<true>(0.0), 1.0);
        assert!(exp::<true>(f32::NAN).is_nan());
        assert!(exp::<true>(f32::INFINITY) > 3e38);
    }
}
