//! Sixteen float32 at a time in plain Rust, which LLVM turns into whatever vectors the machine has.
//!
//! The elementary functions take `FMA`: whether `mul_add` is one instruction here. Where it is not it would be a call
//! into libm, so a product and a sum stand in for it. Polynomials: Remez, relative error below 4e-9 before rounding.

/// Numbers in a vector.
pub const LANES: usize = 16;

/// One vector; aligned so that a load never touches two cache lines.
#[derive(Clone, Copy)]
#[repr(align(64))]
pub struct Lanes(pub [f32; LANES]);

impl Lanes {
    pub const ZERO: Lanes = Lanes([0.0; LANES]);

    /// `f(lane)` in every lane.
    #[inline(always)]
    pub fn new(f: impl Fn(usize) -> f32) -> Lanes {
        let mut lanes = Lanes::ZERO;
        for l in 0..LANES {
            lanes.0[l] = f(l);
        }
        lanes
    }

    /// Up to sixteen numbers; the other lanes are zero.
    #[inline(always)]
    pub fn load(from: &[f32]) -> Lanes {
        match from.try_into() {
            Ok(all) => Lanes(all),
            Err(_) => Lanes::load_some(from),
        }
    }

    /// The first `to.len()` lanes.
    #[inline(always)]
    pub fn store(&self, to: &mut [f32]) {
        match <&mut [f32; LANES]>::try_from(&mut *to) {
            Ok(all) => *all = self.0,
            Err(_) => self.store_some(to),
        }
    }

    // Out of line, else LLVM makes both cases one call of memmove.
    #[inline(never)]
    fn load_some(from: &[f32]) -> Lanes {
        let mut lanes = Lanes::ZERO;
        lanes.0[..from.len()].copy_from_slice(from);
        lanes
    }

    #[inline(never)]
    fn store_some(&self, to: &mut [f32]) {
        to.copy_from_slice(&self.0[..to.len()]);
    }

    /// The sum of all lanes, by halves.
    #[inline(always)]
    pub fn sum(&self) -> f32 {
        let v = &self.0;
        let eight: [f32; 8] = std::array::from_fn(|l| v[l] + v[l + 8]);
        let four: [f32; 4] = std::array::from_fn(|l| eight[l] + eight[l + 4]);
        (four[0] + four[2]) + (four[1] + four[3])
    }
}

/// Which instructions the kernels use. All levels give the same numbers up to rounding.
///
/// ```
/// use rustbpe::lanes::Level;
/// assert!(Level::best() >= Level::Baseline);
/// assert_eq!(Level::parse("baseline").unwrap().name(), "baseline");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// What the crate is compiled for: SSE2 on x86-64, NEON on aarch64.
    Baseline,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512F.
    Avx512,
    /// AVX-512F and its products of bfloat16 pairs.
    Avx512Bf16,
}

impl Level {
    /// From the lowest.
    pub const ALL: [Level; 4] = [Level::Baseline, Level::Avx2, Level::Avx512, Level::Avx512Bf16];

    /// The highest level of this machine.
    pub fn best() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            if std::arch::is_x86_feature_detected!("avx512f") {
                let pairs = std::arch::is_x86_feature_detected!("avx512bf16");
                return if pairs { Level::Avx512Bf16 } else { Level::Avx512 };
            }
            if std::arch::is_x86_feature_detected!("avx2") && std::arch::is_x86_feature_detected!("fma") {
                return Level::Avx2;
            }
        }
        Level::Baseline
    }

    /// "avx512bf16", "avx512", "avx2" or "baseline"; an error if unknown or above what this machine has.
    pub fn parse(name: &str) -> crate::Result<Level> {
        let best = Level::best();
        match Level::ALL.into_iter().find(|level| level.name() == name) {
            Some(level) if level <= best => Ok(level),
            Some(_) => Err(crate::Error(format!("simd={name:?}: the best of this machine is {:?}", best.name()))),
            None => {
                Err(crate::Error(format!("simd={name:?}: expected 'avx512bf16', 'avx512', 'avx2', 'baseline' or None")))
            }
        }
    }

    /// As `parse` takes it.
    pub fn name(self) -> &'static str {
        match self {
            Level::Baseline => "baseline",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Avx512Bf16 => "avx512bf16",
        }
    }
}

/// Whether the baseline of this target multiplies and adds in one instruction.
pub const BASELINE_FMA: bool = cfg!(any(target_feature = "fma", target_arch = "aarch64"));

/// a * b + c
#[inline(always)]
pub fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

const ROUND: f32 = (3 << 22) as f32 + 127.0; // added to x, leaves round(x) + 127 in the low bits of the mantissa
const EXP2: [f32; 6] = [0.693_147_24, 0.240_226_53, 0.055_503_104, 0.009_617_693, 0.001_340_664_3, 0.000_155_946_78];

/// 2^(a * b) for |a * b| <= `EXP2_MAX`; 0 gives exactly 1. The product is not rounded where `FMA`.
#[inline(always)]
pub fn exp2_product<const FMA: bool>(a: f32, b: f32) -> f32 {
    let t = fma::<FMA>(a, b, ROUND);
    let r = fma::<FMA>(a, b, ROUND - t); // in [-0.5, 0.5]
    let scale = f32::from_bits(t.to_bits() << 23);
    fma::<FMA>(scale * r, exp2_tail::<FMA>(r), scale)
}

/// Where `exp2_product` holds.
pub const EXP2_MAX: f32 = 126.0;

/// 2^x of any x: 0 below -126.5 (there are no subnormals), infinity from 128 on, NaN for NaN.
#[inline(always)]
pub fn exp2<const FMA: bool>(x: f32) -> f32 {
    // comparisons rather than f32::max and min, which would drop a NaN
    let x = if x < -127.0 { -127.0 } else { x };
    let x = if x > 128.0 { 128.0 } else { x };
    let t = x + ROUND;
    let r = x - (t - ROUND);
    f32::from_bits(t.to_bits() << 23) * fma::<FMA>(r, exp2_tail::<FMA>(r), 1.0)
}

/// (2^r - 1) / r for r in [-0.5, 0.5].
#[inline(always)]
fn exp2_tail<const FMA: bool>(r: f32) -> f32 {
    let mut q = EXP2[5];
    q = fma::<FMA>(q, r, EXP2[4]);
    q = fma::<FMA>(q, r, EXP2[3]);
    q = fma::<FMA>(q, r, EXP2[2]);
    q = fma::<FMA>(q, r, EXP2[1]);
    fma::<FMA>(q, r, EXP2[0])
}

/// e^x of x between -87 and 87; beyond, e^-87 or e^87.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 87.0 { 87.0 } else { x };
    exp2_product::<FMA>(x, std::f32::consts::LOG2_E)
}

/// 1 / (1 + e^-x)
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

const ATANH: [f32; 5] = [2.0, 0.666_663_17, 0.400_249_1, 0.279_606, 0.281_783_34];

/// log(1 + e^x) = max(x, 0) + 2 artanh(y / (2 + y)), y = e^-|x|.
#[inline(always)]
pub fn softplus<const FMA: bool>(x: f32) -> f32 {
    let y = exp::<FMA>(-x.abs());
    let s = y / (2.0 + y); // at most 1/3
    let w = s * s;
    let mut p = ATANH[4];
    p = fma::<FMA>(p, w, ATANH[3]);
    p = fma::<FMA>(p, w, ATANH[2]);
    p = fma::<FMA>(p, w, ATANH[1]);
    p = fma::<FMA>(p, w, ATANH[0]);
    fma::<FMA>(s, p, if x > 0.0 { x } else { 0.0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f32, want: f64, bound: f64, x: f32) {
        let error = (got as f64 - want).abs() / want.abs().max(f32::MIN_POSITIVE as f64);
        assert!(error < bound, "at {x}: {got} instead of {want}, off by {error:e}");
    }

    fn functions<const FMA: bool>() {
        let bound = if FMA { 6e-7 } else { 2e-6 }; // the product x log2(e): of rounded log2(e), or rounded itself
        for i in -100_000..=100_000 {
            let x = i as f32 * 0.001_25; // -125 ..= 125
            close(exp2::<FMA>(x), (x as f64).exp2(), 1.3e-7, x);
            close(exp2_product::<FMA>(x, 1.0), (x as f64).exp2(), 1.3e-7, x);
            let x = x * 0.16; // -20 ..= 20
            let e = (x as f64).exp();
            close(softplus::<FMA>(x), e.ln_1p(), bound, x);
            close(sigmoid::<FMA>(x), e / (1.0 + e), bound, x);
        }
    }

    #[test]
    fn functions_are_accurate() {
        functions::<true>();
        functions::<false>();
    }

    #[test]
    fn exp2_at_its_ends() {
        for f in [exp2::<true>, exp2::<false>] {
            assert_eq!([f(0.0), f(-0.0), f(1.0), f(-126.0)], [1.0, 1.0, 2.0, f32::MIN_POSITIVE]);
            assert_eq!([f(-128.0), f(-1e30), f(f32::NEG_INFINITY)], [0.0; 3]);
            assert_eq!([f(128.0), f(1e30), f(f32::INFINITY)], [f32::INFINITY; 3]);
            assert!(f(f32::NAN).is_nan());
        }
        assert_eq!([exp2_product::<true>(0.0, -3.0), exp2_product::<false>(7.0, 0.0)], [1.0; 2]);
        assert!(exp2_product::<true>(f32::NAN, 1.0).is_nan() && exp2_product::<false>(f32::NAN, 1.0).is_nan());
    }

    #[test]
    fn sum_adds_every_lane() {
        assert_eq!(Lanes::new(|l| (1 << l) as f32).sum(), 65535.0);
    }
}
