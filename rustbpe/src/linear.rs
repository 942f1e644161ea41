//! y = x W^T for the few rows of a decoding step on a CPU: W is packed once, so that a step only reads it.
//!
//! A panel is 32 outputs: for each input their 32 weights, side by side. A tile of rows keeps its sums of a panel in
//! registers while the panel goes by. Every sum runs over the inputs in their order and by itself, so the bits of a row
//! depend neither on the rows beside it nor on the number of threads.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use crate::lanes::{BASELINE_FMA, LANES, Lanes, Level, fma};
use crate::scan::{Shared, run};

/// Outputs of a panel.
const WIDTH: usize = 2 * LANES;
/// Items between what is multiplied and what is asked of memory.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 64;
/// Multiplications below which more threads cost more than they give.
const ALONE: usize = 1 << 25;

/// The weights of a panel for one input.
trait Weights: Copy + Sync {
    type Number: Copy;
    fn pack(at: impl Fn(usize) -> Option<Self::Number>) -> Self;
    fn wide(&self) -> [Lanes; 2];
    /// # Safety
    /// The machine has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn wide512(&self) -> [__m512; 2];
}

impl Weights for [Lanes; 2] {
    type Number = f32;

    fn pack(at: impl Fn(usize) -> Option<f32>) -> Self {
        [0, LANES].map(|first| Lanes::new(|l| at(first + l).unwrap_or(0.0)))
    }

    #[inline(always)]
    fn wide(&self) -> [Lanes; 2] {
        *self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide512(&self) -> [__m512; 2] {
        // SAFETY: sixteen numbers, aligned.
        unsafe { [_mm512_load_ps(self[0].0.as_ptr()), _mm512_load_ps(self[1].0.as_ptr())] }
    }
}

/// bfloat16: the upper half of a float32.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Halves([u16; WIDTH]);

impl Weights for Halves {
    type Number = u16;

    fn pack(at: impl Fn(usize) -> Option<u16>) -> Self {
        Halves(std::array::from_fn(|i| at(i).unwrap_or(0)))
    }

    #[inline(always)]
    fn wide(&self) -> [Lanes; 2] {
        [0, LANES].map(|first| Lanes::new(|l| f32::from_bits((self.0[first + l] as u32) << 16)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide512(&self) -> [__m512; 2] {
        // SAFETY: twice sixteen numbers, aligned; the caller answers for the machine.
        unsafe {
            let (low, high) = (self.0.as_ptr(), self.0.as_ptr().add(LANES));
            [low, high].map(|half| {
                let bits = _mm512_cvtepu16_epi32(_mm256_load_si256(half.cast()));
                _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
            })
        }
    }
}

/// (N, K) -> panels, each of K items; outputs beyond N are zero.
fn pack<W: Weights>(weight: &[W::Number], inputs: usize) -> Vec<W> {
    let (outputs, mut panels) = (weight.len() / inputs, Vec::new());
    panels.reserve_exact(outputs.div_ceil(WIDTH) * inputs);
    for first in (0..outputs).step_by(WIDTH) {
        panels.extend((0..inputs).map(|k| W::pack(|i| weight.get((first + i) * inputs + k).copied())));
    }
    panels
}

enum Panels {
    Float(Vec<[Lanes; 2]>),
    Half(Vec<Halves>),
}

/// A weight (N, K), packed.
///
/// ```
/// use rustbpe::{lanes::Level, linear::Packed};
/// let packed = Packed::float(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2); // three outputs of two inputs
/// assert_eq!(packed.multiply(&[1.0, 10.0], 1, Level::best()), [21.0, 43.0, 65.0]);
/// ```
pub struct Packed {
    pub outputs: usize,
    pub inputs: usize,
    panels: Panels,
}

impl Packed {
    /// Of float32 numbers, row-major, a multiple of `inputs` of them.
    pub fn float(weight: &[f32], inputs: usize) -> Packed {
        assert_eq!(weight.len() % inputs, 0);
        Packed { outputs: weight.len() / inputs, inputs, panels: Panels::Float(pack(weight, inputs)) }
    }

    /// Of the bits of bfloat16 numbers; they are kept as they are, and widened as they are read.
    pub fn half(weight: &[u16], inputs: usize) -> Packed {
        assert_eq!(weight.len() % inputs, 0);
        Packed { outputs: weight.len() / inputs, inputs, panels: Panels::Half(pack(weight, inputs)) }
    }

    /// x (M, K) -> y (M, N), added up in float32.
    pub fn multiply(&self, x: &[f32], threads: usize, level: Level) -> Vec<f32> {
        let level = level.min(Level::best());
        match &self.panels {
            Panels::Float(panels) => self.run(panels, x, threads, level),
            Panels::Half(panels) => self.run(panels, x, threads, level),
        }
    }

    fn run<W: Weights>(&self, panels: &[W], x: &[f32], threads: usize, level: Level) -> Vec<f32> {
        assert_eq!(x.len() % self.inputs, 0);
        let mut y = vec![0.0; x.len() / self.inputs * self.outputs];
        let threads = if x.len() * self.outputs < ALONE { 1 } else { threads };
        let to = Shared::new(&mut y);
        run(panels.len() / self.inputs, threads, |next| {
            while let Some(task) = next() {
                let panel = &panels[task * self.inputs..(task + 1) * self.inputs];
                let part = Part { outputs: self.outputs, first: task * WIDTH, to: &to };
                multiply_panel(panel, x, &part, level);
            }
        });
        y
    }
}

/// Where the products of a panel go.
struct Part<'a> {
    outputs: usize,
    first: usize,
    to: &'a Shared<'a>,
}

impl Part<'_> {
    /// Put the sums of a row where they belong.
    #[inline(always)]
    fn store(&self, row: usize, sums: &[f32; WIDTH]) {
        let width = WIDTH.min(self.outputs - self.first);
        // SAFETY: each panel has its own outputs of every row.
        let y = unsafe { self.to.part(row * self.outputs + self.first, width) };
        y.copy_from_slice(&sums[..width]);
    }
}

fn multiply_panel<W: Weights>(panel: &[W], x: &[f32], to: &Part, level: Level) {
    let rows = x.len() / panel.len();
    match level {
        // SAFETY: `multiply` has seen to it that the machine is of this level.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 => tiles(rows, 8, |first, n| unsafe {
            match n {
                8 => tile_avx512::<8, W>(panel, x, first, to),
                4 => tile_avx512::<4, W>(panel, x, first, to),
                2 => tile_avx512::<2, W>(panel, x, first, to),
                _ => tile_avx512::<1, W>(panel, x, first, to),
            }
        }),
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Level::Avx2 => tiles(rows, 2, |first, n| unsafe {
            match n {
                2 => tile_avx2::<2, W>(panel, x, first, to),
                _ => tile_avx2::<1, W>(panel, x, first, to),
            }
        }),
        _ => tiles(rows, 1, |first, _| tile::<BASELINE_FMA, 1, W>(panel, x, first, to)),
    }
}

/// Cut rows into tiles of `most` and then of smaller powers of two: work(first row, rows).
#[inline(always)]
fn tiles(rows: usize, most: usize, work: impl Fn(usize, usize)) {
    let (mut first, mut n) = (0, most);
    while first < rows {
        while n > rows - first {
            n /= 2;
        }
        work(first, n);
        first += n;
    }
}

/// The rows of x (M, K) from `first` on.
#[inline(always)]
fn rows_of<const ROWS: usize>(x: &[f32], first: usize, inputs: usize) -> [&[f32]; ROWS] {
    std::array::from_fn(|r| &x[(first + r) * inputs..(first + r + 1) * inputs])
}

/// By hand: of eight rows LLVM would keep the sums in memory.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn tile_avx512<const ROWS: usize, W: Weights>(panel: &[W], x: &[f32], first: usize, to: &Part) {
    let x: [&[f32]; ROWS] = rows_of(x, first, panel.len());
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (k, weights) in panel.iter().enumerate() {
        let ahead = std::ptr::from_ref(weights).wrapping_add(AHEAD).cast::<i8>(); // the panels are one array
        for line in (0..size_of::<W>()).step_by(64) {
            _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line));
        }
        // SAFETY: this is the machine.
        let weights = unsafe { weights.wide512() };
        for r in 0..ROWS {
            let x = _mm512_set1_ps(x[r][k]);
            for v in 0..2 {
                sums[r][v] = _mm512_fmadd_ps(x, weights[v], sums[r][v]);
            }
        }
    }
    for (r, [low, high]) in sums.into_iter().enumerate() {
        let mut row = [0.0; WIDTH];
        // SAFETY: twice sixteen of the 32 numbers.
        unsafe {
            _mm512_storeu_ps(row.as_mut_ptr(), low);
            _mm512_storeu_ps(row.as_mut_ptr().add(LANES), high);
        }
        to.store(first + r, &row);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn tile_avx2<const ROWS: usize, W: Weights>(panel: &[W], x: &[f32], first: usize, to: &Part) {
    tile::<true, ROWS, W>(panel, x, first, to)
}

#[inline(always)]
fn tile<const FMA: bool, const ROWS: usize, W: Weights>(panel: &[W], x: &[f32], first: usize, to: &Part) {
    let x: [&[f32]; ROWS] = rows_of(x, first, panel.len());
    let mut sums = [[Lanes::ZERO; 2]; ROWS];
    for (k, weights) in panel.iter().enumerate() {
        let weights = weights.wide();
        for r in 0..ROWS {
            let x = x[r][k];
            for v in 0..2 {
                for l in 0..LANES {
                    sums[r][v].0[l] = fma::<FMA>(x, weights[v].0[l], sums[r][v].0[l]);
                }
            }
        }
    }
    for (r, [low, high]) in sums.into_iter().enumerate() {
        let mut row = [0.0; WIDTH];
        row[..LANES].copy_from_slice(&low.0);
        row[LANES..].copy_from_slice(&high.0);
        to.store(first + r, &row);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: u64, len: usize) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        (0..len).map(|_| next()).collect()
    }

    fn levels() -> impl Iterator<Item = Level> {
        [Level::Baseline, Level::Avx2, Level::Avx512].into_iter().filter(|&level| level <= Level::best())
    }

    #[test]
    fn equals_the_sum_in_float64() {
        for (rows, outputs, inputs) in [(1, 1, 1), (3, 33, 7), (8, 32, 64), (13, 70, 65), (64, 31, 300)] {
            let (x, weight) = (random(1, rows * inputs), random(2, outputs * inputs));
            let bits: Vec<u16> = weight.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let cut: Vec<f32> = bits.iter().map(|&bits| f32::from_bits((bits as u32) << 16)).collect();
            for (packed, weight) in [(Packed::float(&weight, inputs), &weight), (Packed::half(&bits, inputs), &cut)] {
                for level in levels() {
                    let y = packed.multiply(&x, 1, level);
                    assert_eq!(y.len(), rows * outputs);
                    for (i, &y) in y.iter().enumerate() {
                        let (x, w) = (&x[i / outputs * inputs..][..inputs], &weight[i % outputs * inputs..][..inputs]);
                        let terms = x.iter().zip(w).map(|(&x, &w)| x as f64 * w as f64);
                        let (want, size) = terms.fold((0.0, 0.0), |(sum, size), t| (sum + t, size + t.abs()));
                        assert!((y as f64 - want).abs() <= 1e-6 * size, "{rows} {outputs} {inputs} {level:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn company_does_not_change_a_bit() {
        let (inputs, outputs) = (65, 70);
        let (x, packed) = (random(1, 64 * inputs), Packed::float(&random(2, outputs * inputs), inputs));
        for level in levels() {
            let all = packed.multiply(&x, 1, level);
            for rows in [1, 2, 3, 5, 8, 15, 33] {
                let first = 64 - rows;
                assert!(packed.multiply(&x[first * inputs..], 1, level) == all[first * outputs..]);
            }
        }
    }
}
