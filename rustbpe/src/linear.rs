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

/// The weights of a panel for INPUTS inputs.
trait Weights: Copy + Sync {
    type Number: Copy;
    const INPUTS: usize;
    /// at(output, input) of the panel; None = beyond the weight.
    fn pack(at: impl Fn(usize, usize) -> Option<Self::Number>) -> Self;
    fn wide(&self, input: usize) -> [Lanes; 2];
    /// # Safety
    /// The machine has AVX-512F.
    #[cfg(target_arch = "x86_64")]
    unsafe fn wide512(&self, input: usize) -> [__m512; 2];
}

impl Weights for [Lanes; 2] {
    type Number = f32;
    const INPUTS: usize = 1;

    fn pack(at: impl Fn(usize, usize) -> Option<f32>) -> Self {
        [0, LANES].map(|first| Lanes::new(|l| at(first + l, 0).unwrap_or(0.0)))
    }

    #[inline(always)]
    fn wide(&self, _: usize) -> [Lanes; 2] {
        *self
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide512(&self, _: usize) -> [__m512; 2] {
        // SAFETY: sixteen numbers, aligned.
        unsafe { [_mm512_load_ps(self[0].0.as_ptr()), _mm512_load_ps(self[1].0.as_ptr())] }
    }
}

/// bfloat16, the upper half of a float32: in each word an output's weights for two inputs, the first one below.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Pairs([u32; WIDTH]);

impl Weights for Pairs {
    type Number = u16;
    const INPUTS: usize = 2;

    fn pack(at: impl Fn(usize, usize) -> Option<u16>) -> Self {
        Pairs(std::array::from_fn(|o| (0..2).map(|i| (at(o, i).unwrap_or(0) as u32) << (16 * i)).sum()))
    }

    #[inline(always)]
    fn wide(&self, input: usize) -> [Lanes; 2] {
        [0, LANES].map(|first| Lanes::new(|l| f32::from_bits((self.0[first + l] >> (16 * input)) << 16)))
    }

    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn wide512(&self, input: usize) -> [__m512; 2] {
        // SAFETY: sixteen words, aligned; the caller answers for the machine.
        unsafe {
            let (low, high) = (self.0.as_ptr(), self.0.as_ptr().add(LANES));
            [low, high].map(|words| {
                let words = _mm512_load_si512(words.cast());
                let first = _mm512_slli_epi32::<16>(words);
                let second = _mm512_and_si512(words, _mm512_set1_epi32(!0xffff));
                _mm512_castsi512_ps(if input == 0 { first } else { second })
            })
        }
    }
}

/// (N, K) -> panels, each of K / INPUTS items; what lies beyond N and K is zero.
fn pack<W: Weights>(weight: &[W::Number], inputs: usize) -> Vec<W> {
    let (outputs, mut panels) = (weight.len() / inputs, Vec::new());
    panels.reserve_exact(outputs.div_ceil(WIDTH) * inputs.div_ceil(W::INPUTS));
    for first in (0..outputs).step_by(WIDTH) {
        panels.extend((0..inputs).step_by(W::INPUTS).map(|k| {
            W::pack(|o, i| if k + i < inputs { weight.get((first + o) * inputs + k + i).copied() } else { None })
        }));
    }
    panels
}

/// Rows of K numbers -> rows of pairs of bfloat16, rounded to the nearest, ties to even.
#[cfg(any(test, target_arch = "x86_64"))]
fn to_pairs(x: &[f32], inputs: usize) -> Vec<u32> {
    let round = |x: f32| {
        let bits = x.to_bits();
        if x.is_nan() { 0x7fc0 } else { (bits + 0x7fff + (bits >> 16 & 1)) >> 16 }
    };
    let pair = |pair: &[f32]| round(pair[0]) | if pair.len() > 1 { round(pair[1]) << 16 } else { 0 };
    x.chunks(inputs).flat_map(|row| row.chunks(2)).map(pair).collect()
}

enum Panels {
    Float(Vec<[Lanes; 2]>),
    Half(Vec<Pairs>),
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

    /// Of the bits of bfloat16 numbers; they are kept as they are, and widened as they are read where the machine does
    /// not multiply pairs of them. Where it does, x is rounded to bfloat16, as torch does.
    pub fn half(weight: &[u16], inputs: usize) -> Packed {
        assert_eq!(weight.len() % inputs, 0);
        Packed { outputs: weight.len() / inputs, inputs, panels: Panels::Half(pack(weight, inputs)) }
    }

    /// x (M, K) -> y (M, N), added up in float32.
    pub fn multiply(&self, x: &[f32], threads: usize, level: Level) -> Vec<f32> {
        assert_eq!(x.len() % self.inputs, 0);
        let (rows, level) = (x.len() / self.inputs, level.min(Level::best()));
        match &self.panels {
            Panels::Float(panels) => self.run(panels, rows, threads, |panel, to| multiply_panel(panel, x, to, level)),
            #[cfg(target_arch = "x86_64")]
            Panels::Half(panels) if level == Level::Avx512Bf16 => {
                let x = to_pairs(x, self.inputs);
                self.run(panels, rows, threads, |panel, to| multiply_pairs(panel, &x, to))
            }
            Panels::Half(panels) => {
                let even = self.inputs.is_multiple_of(2);
                let padded = if even { Vec::new() } else { x.chunks(self.inputs).flat_map(padded_row).collect() };
                let x = if even { x } else { &padded };
                self.run(panels, rows, threads, |panel, to| multiply_panel(panel, x, to, level))
            }
        }
    }

    /// work(panel, where its products go) for every panel.
    fn run<W: Weights>(
        &self,
        panels: &[W],
        rows: usize,
        threads: usize,
        work: impl Fn(&[W], &Part) + Sync,
    ) -> Vec<f32> {
        let mut y = vec![0.0; rows * self.outputs];
        let threads = if rows * self.inputs * self.outputs < ALONE { 1 } else { threads };
        let (to, items) = (Shared::new(&mut y), self.inputs.div_ceil(W::INPUTS));
        run(panels.len() / items, threads, |next| {
            while let Some(task) = next() {
                let part = Part { outputs: self.outputs, first: task * WIDTH, to: &to };
                work(&panels[task * items..(task + 1) * items], &part);
            }
        });
        y
    }
}

fn padded_row(row: &[f32]) -> impl Iterator<Item = f32> {
    row.iter().copied().chain([0.0])
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
    let rows = x.len() / (panel.len() * W::INPUTS);
    match level {
        // SAFETY: `multiply` has seen to it that the machine is of this level.
        #[cfg(target_arch = "x86_64")]
        Level::Avx512 | Level::Avx512Bf16 => tiles(rows, 8, |first, n| unsafe {
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

/// As multiply_panel, where the machine multiplies pairs.
#[cfg(target_arch = "x86_64")]
fn multiply_pairs(panel: &[Pairs], x: &[u32], to: &Part) {
    // SAFETY: `multiply` has seen to it that the machine is of this level.
    tiles(x.len() / panel.len(), 8, |first, n| unsafe {
        match n {
            8 => tile_pairs::<8>(panel, x, first, to),
            4 => tile_pairs::<4>(panel, x, first, to),
            2 => tile_pairs::<2>(panel, x, first, to),
            _ => tile_pairs::<1>(panel, x, first, to),
        }
    })
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
fn rows_of<const ROWS: usize, T>(x: &[T], first: usize, inputs: usize) -> [&[T]; ROWS] {
    std::array::from_fn(|r| &x[(first + r) * inputs..(first + r + 1) * inputs])
}

/// Ask for what is multiplied AHEAD items from here; the panels are one array.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn ask_ahead<W>(item: &W) {
    let ahead = std::ptr::from_ref(item).wrapping_add(AHEAD).cast::<i8>();
    for line in (0..size_of::<W>()).step_by(64) {
        _mm_prefetch::<_MM_HINT_T0>(ahead.wrapping_add(line));
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn store512(row: usize, sums: [__m512; 2], to: &Part) {
    let mut numbers = [0.0; WIDTH];
    // SAFETY: twice sixteen of the 32 numbers.
    unsafe {
        _mm512_storeu_ps(numbers.as_mut_ptr(), sums[0]);
        _mm512_storeu_ps(numbers.as_mut_ptr().add(LANES), sums[1]);
    }
    to.store(row, &numbers);
}

/// By hand: of eight rows LLVM would keep the sums in memory.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn tile_avx512<const ROWS: usize, W: Weights>(panel: &[W], x: &[f32], first: usize, to: &Part) {
    let x: [&[f32]; ROWS] = rows_of(x, first, panel.len() * W::INPUTS);
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (k, item) in panel.iter().enumerate() {
        ask_ahead(item);
        for i in 0..W::INPUTS {
            // SAFETY: this is the machine.
            let weights = unsafe { item.wide512(i) };
            for r in 0..ROWS {
                let x = _mm512_set1_ps(x[r][k * W::INPUTS + i]);
                for v in 0..2 {
                    sums[r][v] = _mm512_fmadd_ps(x, weights[v], sums[r][v]);
                }
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        store512(first + r, sums, to);
    }
}

/// Two inputs at a time, in bfloat16.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bf16")]
fn tile_pairs<const ROWS: usize>(panel: &[Pairs], x: &[u32], first: usize, to: &Part) {
    let x: [&[u32]; ROWS] = rows_of(x, first, panel.len());
    let mut sums = [[_mm512_setzero_ps(); 2]; ROWS];
    for (k, item) in panel.iter().enumerate() {
        ask_ahead(item);
        // SAFETY: sixteen words, aligned, and the same bits.
        let weights = [0, LANES].map(|v| unsafe {
            std::mem::transmute::<__m512i, __m512bh>(_mm512_load_si512(item.0.as_ptr().add(v).cast()))
        });
        for r in 0..ROWS {
            // SAFETY: the same bits.
            let x = unsafe { std::mem::transmute::<__m512i, __m512bh>(_mm512_set1_epi32(x[r][k] as i32)) };
            for v in 0..2 {
                sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, weights[v]);
            }
        }
    }
    for (r, sums) in sums.into_iter().enumerate() {
        store512(first + r, sums, to);
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn tile_avx2<const ROWS: usize, W: Weights>(panel: &[W], x: &[f32], first: usize, to: &Part) {
    tile::<true, ROWS, W>(panel, x, first, to)
}

#[inline(always)]
fn tile<const FMA: bool, const ROWS: usize, W: Weights>(panel: &[W], x: &[f32], first: usize, to: &Part) {
    let x: [&[f32]; ROWS] = rows_of(x, first, panel.len() * W::INPUTS);
    let mut sums = [[Lanes::ZERO; 2]; ROWS];
    for (k, item) in panel.iter().enumerate() {
        for i in 0..W::INPUTS {
            let weights = item.wide(i);
            for r in 0..ROWS {
                let x = x[r][k * W::INPUTS + i];
                for v in 0..2 {
                    for l in 0..LANES {
                        sums[r][v].0[l] = fma::<FMA>(x, weights[v].0[l], sums[r][v].0[l]);
                    }
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
        Level::ALL.into_iter().filter(|&level| level <= Level::best())
    }

    #[test]
    fn equals_the_sum_in_float64() {
        for (rows, outputs, inputs) in [(1, 1, 1), (3, 33, 7), (8, 32, 64), (13, 70, 65), (64, 31, 300)] {
            let (x, weight) = (random(1, rows * inputs), random(2, outputs * inputs));
            let bits: Vec<u16> = weight.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
            let cut: Vec<f32> = bits.iter().map(|&bits| f32::from_bits((bits as u32) << 16)).collect();
            for (packed, weight, half) in
                [(Packed::float(&weight, inputs), &weight, false), (Packed::half(&bits, inputs), &cut, true)]
            {
                for level in levels() {
                    let y = packed.multiply(&x, 1, level);
                    assert_eq!(y.len(), rows * outputs);
                    for (i, &y) in y.iter().enumerate() {
                        let (x, w) = (&x[i / outputs * inputs..][..inputs], &weight[i % outputs * inputs..][..inputs]);
                        let rounded = half && level == Level::Avx512Bf16;
                        let x = x.iter().map(|&x| if rounded { f32::from_bits(to_pairs(&[x], 1)[0] << 16) } else { x });
                        let terms = x.zip(w).map(|(x, &w)| x as f64 * w as f64);
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
        let (x, weight) = (random(1, 64 * inputs), random(2, outputs * inputs));
        let bits: Vec<u16> = weight.iter().map(|w| (w.to_bits() >> 16) as u16).collect();
        for packed in [Packed::float(&weight, inputs), Packed::half(&bits, inputs)] {
            for level in levels() {
                let all = packed.multiply(&x, 1, level);
                for rows in [1, 2, 3, 5, 8, 15, 33] {
                    let first = 64 - rows;
                    assert!(packed.multiply(&x[first * inputs..], 1, level) == all[first * outputs..]);
                }
            }
        }
    }
}
