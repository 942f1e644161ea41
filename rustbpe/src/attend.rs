//! Attention of one query per row on a CPU (arXiv 1706.03762, equation 1), as decoding asks for it.
//!
//! A row and its heads of one group are a task: it reads each key and each value of that group once. Rows, of whatever
//! number of keys, do not change each other's bits.

use crate::lanes::{BASELINE_FMA, LANES, Lanes, Level, exp, fma};
use crate::scan::{Shared, dispatch, run};

/// A number of a key or a value.
trait Number: Copy {
    fn wide(self) -> f32;
}

impl Number for f32 {
    #[inline(always)]
    fn wide(self) -> f32 {
        self
    }
}

/// The bits of a bfloat16 number.
impl Number for u16 {
    #[inline(always)]
    fn wide(self) -> f32 {
        f32::from_bits((self as u32) << 16)
    }
}

#[inline(always)]
fn load<N: Number>(from: &[N]) -> Lanes {
    match <&[N; LANES]>::try_from(from) {
        Ok(all) => Lanes::new(|l| all[l].wide()),
        Err(_) => load_some(from),
    }
}

#[inline(never)]
fn load_some<N: Number>(from: &[N]) -> Lanes {
    let mut lanes = Lanes::ZERO;
    for (lane, n) in lanes.0.iter_mut().zip(from) {
        *lane = n.wide();
    }
    lanes
}

/// Keys and values, each (B, G, capacity, K).
#[derive(Clone, Copy)]
pub enum Kept<'a> {
    Float(&'a [f32], &'a [f32]),
    /// Bits of bfloat16.
    Half(&'a [u16], &'a [u16]),
}

/// One query a row, and the keys and values it attends to.
#[derive(Clone, Copy)]
pub struct Attend<'a> {
    /// Of queries, and of keys and values; the first is a multiple of the second.
    pub heads: usize,
    pub groups: usize,
    /// Places for keys in each row.
    pub capacity: usize,
    /// Numbers of a query, a key, a value.
    pub size: usize,
    /// (B, H, K)
    pub q: &'a [f32],
    pub kept: Kept<'a>,
    /// (B): keys of each row, the first of its places; 1 to capacity
    pub lengths: &'a [i64],
}

impl Attend<'_> {
    fn check(&self) {
        let rows = self.lengths.len();
        let kept = rows * self.groups * self.capacity * self.size;
        let (keys, values) = match self.kept {
            Kept::Float(k, v) => (k.len(), v.len()),
            Kept::Half(k, v) => (k.len(), v.len()),
        };
        assert_eq!((self.q.len(), keys, values), (rows * self.heads * self.size, kept, kept));
        assert_eq!(self.heads % self.groups, 0);
        assert!(self.lengths.iter().all(|&n| 0 < n && n as usize <= self.capacity));
    }
}

/// Vectors that are added up side by side, so that one addition need not wait for the other.
const WIDE: usize = 4;

#[inline(always)]
fn dot<const FMA: bool, N: Number>(a: &[f32], b: &[N]) -> f32 {
    let mut sums = [Lanes::ZERO; WIDE];
    let (wide_a, wide_b) = (a.chunks_exact(WIDE * LANES), b.chunks_exact(WIDE * LANES));
    let mut rest = Lanes::ZERO;
    for (a, b) in wide_a.remainder().chunks(LANES).zip(wide_b.remainder().chunks(LANES)) {
        let (a, b, old) = (Lanes::load(a), load(b), rest);
        rest = Lanes::new(|l| fma::<FMA>(a.0[l], b.0[l], old.0[l]));
    }
    for (a, b) in wide_a.zip(wide_b) {
        for i in 0..WIDE {
            let old = sums[i];
            sums[i] = Lanes::new(|l| fma::<FMA>(a[i * LANES + l], b[i * LANES + l].wide(), old.0[l]));
        }
    }
    Lanes::new(|l| (sums[0].0[l] + sums[1].0[l]) + (sums[2].0[l] + sums[3].0[l]) + rest.0[l]).sum()
}

/// to <- scale times the sum of `weights` times the values' columns from `first` on, up to W vectors of them.
#[inline(always)]
fn columns<const FMA: bool, const W: usize, N: Number>(
    (values, size, first): (&[N], usize, usize),
    weights: &[f32],
    scale: f32,
    to: &mut [f32],
) {
    let mut sums = [Lanes::ZERO; W];
    for (value, &p) in values.chunks_exact(size).zip(weights) {
        let value = &value[first..first + to.len()];
        if W == 1 {
            let (v, old) = (load(value), sums[0]);
            sums[0] = Lanes::new(|l| fma::<FMA>(p, v.0[l], old.0[l]));
        } else {
            let value = &value[..W * LANES];
            for i in 0..W {
                let old = sums[i];
                sums[i] = Lanes::new(|l| fma::<FMA>(p, value[i * LANES + l].wide(), old.0[l]));
            }
        }
    }
    for i in 0..W {
        let sum = sums[i];
        let end = to.len().min((i + 1) * LANES);
        Lanes::new(|l| sum.0[l] * scale).store(&mut to[i * LANES..end]);
    }
}

/// Scores -> exponentials of their distance from the largest; their sum is returned.
#[inline(always)]
fn exponentials<const FMA: bool>(scores: &mut [f32]) -> f32 {
    let most = scores.iter().fold(f32::NEG_INFINITY, |most, &s| if s > most || s.is_nan() { s } else { most });
    let mut total = Lanes::ZERO;
    for part in scores.chunks_mut(LANES) {
        let (s, old) = (Lanes::load(part), total);
        let e = Lanes::new(|l| exp::<FMA>(s.0[l] - most));
        e.store(part);
        let e = Lanes::load(part); // zero where there is no score
        total = Lanes::new(|l| old.0[l] + e.0[l]);
    }
    total.sum()
}

#[inline(always)]
fn attend_task<const FMA: bool>(a: &Attend, to: &Shared, scores: &mut Vec<f32>, task: usize) {
    match a.kept {
        Kept::Float(k, v) => attend_kept::<FMA, f32>(a, (k, v), to, scores, task),
        Kept::Half(k, v) => attend_kept::<FMA, u16>(a, (k, v), to, scores, task),
    }
}

#[inline(always)]
fn attend_kept<const FMA: bool, N: Number>(
    a: &Attend,
    (k, v): (&[N], &[N]),
    to: &Shared,
    scores: &mut Vec<f32>,
    task: usize,
) {
    let (row, n, shared) = (task / a.groups, a.lengths[task / a.groups] as usize, a.heads / a.groups);
    let kept = task * a.capacity * a.size..(task * a.capacity + n) * a.size;
    let first = row * a.heads + task % a.groups * shared;
    let queries = &a.q[first * a.size..(first + shared) * a.size];
    let scale = (a.size as f32).powf(-0.5);
    scores.clear();
    scores.resize(shared * n, 0.0);
    for (s, key) in k[kept.clone()].chunks_exact(a.size).enumerate() {
        for (h, query) in queries.chunks_exact(a.size).enumerate() {
            scores[h * n + s] = scale * dot::<FMA, N>(query, key);
        }
    }
    // SAFETY: these heads of this row are this task's alone.
    let y = unsafe { to.part(first * a.size, shared * a.size) };
    for (y, scores) in y.chunks_exact_mut(a.size).zip(scores.chunks_exact_mut(n)) {
        let scale = 1.0 / exponentials::<FMA>(scores);
        let (wide, values) = (a.size / (WIDE * LANES) * WIDE * LANES, &v[kept.clone()]);
        for (i, y) in y[..wide].chunks_mut(WIDE * LANES).enumerate() {
            columns::<FMA, WIDE, N>((values, a.size, i * WIDE * LANES), scores, scale, y);
        }
        for (i, y) in y[wide..].chunks_mut(LANES).enumerate() {
            columns::<FMA, 1, N>((values, a.size, wide + i * LANES), scores, scale, y);
        }
    }
}

/// Multiplications below which more threads cost more than they give.
const ALONE: usize = 1 << 23;

/// softmax(q k^T / sqrt(K)) v, (B, H, K).
///
/// ```
/// use rustbpe::{attend::*, lanes::Level};
/// let (q, k, v) = ([1.0, 0.0], [0.0; 6], [1.0, 2.0, 3.0, 4.0, 9.0, 9.0]); // keys alike: the mean of two values
/// let a = Attend { heads: 1, groups: 1, capacity: 3, size: 2, q: &q, kept: Kept::Float(&k, &v), lengths: &[2] };
/// assert_eq!(attend(&a, 1, Level::best()), [2.0, 3.0]);
/// ```
pub fn attend(a: &Attend, threads: usize, level: Level) -> Vec<f32> {
    a.check();
    let level = level.min(Level::best());
    let keys: i64 = a.lengths.iter().sum();
    let threads = if keys as usize * a.heads * a.size * 2 < ALONE { 1 } else { threads };
    let mut y = vec![0.0; a.q.len()];
    let to = Shared::new(&mut y);
    run(a.lengths.len() * a.groups, threads, |next| {
        let (to, mut scores) = (&to, Vec::new());
        let scores = &mut scores;
        while let Some(task) = next() {
            dispatch!(level, attend_task(a: &Attend, to: &Shared, scores: &mut Vec<f32>, task: usize));
        }
    });
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition_and_rows_are_independent() {
        let (heads, groups, capacity, size) = (6, 2, 9, 20);
        let lengths = [9, 1, 4];
        let wave = |len: usize, f: f32| (0..len).map(|i| (i as f32 * f).sin() * 3.0).collect::<Vec<f32>>();
        let (q, kept) = (wave(3 * heads * size, 0.37), 3 * groups * capacity * size);
        let (k, v) = (wave(kept, 0.73), wave(kept, 0.11));
        let half = |x: &[f32]| x.iter().map(|x| (x.to_bits() >> 16) as u16).collect::<Vec<u16>>();
        let cut = |x: &[u16]| x.iter().map(|&x| x.wide()).collect::<Vec<f32>>();
        let (half_k, half_v) = (half(&k), half(&v));
        let (cut_k, cut_v) = (cut(&half_k), cut(&half_v));
        let all = Attend { heads, groups, capacity, size, q: &q, kept: Kept::Float(&k, &v), lengths: &lengths };
        for level in Level::ALL.into_iter().filter(|&l| l <= Level::best()) {
            let y = attend(&all, 1, level);
            for (i, &y) in y.iter().enumerate() {
                let (b, h, c) = (i / (heads * size), i / size % heads, i % size);
                let at = |s: usize| ((b * groups + h / (heads / groups)) * capacity + s) * size;
                let exps: Vec<f64> = (0..lengths[b] as usize)
                    .map(|s| (0..size).map(|c| q[i - i % size + c] as f64 * k[at(s) + c] as f64).sum::<f64>())
                    .map(|dot| (dot / (size as f64).sqrt()).exp())
                    .collect();
                let want: f64 = exps.iter().enumerate().map(|(s, e)| e * v[at(s) + c] as f64).sum();
                let want = want / exps.iter().sum::<f64>();
                assert!((y as f64 - want).abs() < 1e-5, "{y} {want} {level:?}");
            }
            let (one, rest) = (heads * size, groups * capacity * size);
            let kept = Kept::Float(&k[2 * rest..], &v[2 * rest..]);
            let last = Attend { q: &q[2 * one..], kept, lengths: &lengths[2..], ..all };
            assert!(attend(&last, 1, level) == y[2 * one..]);
            let [half, cut] = [Kept::Half(&half_k, &half_v), Kept::Float(&cut_k, &cut_v)];
            assert!(attend(&Attend { kept: half, ..all }, 1, level) == attend(&Attend { kept: cut, ..all }, 1, level));
        }
    }

    #[test]
    fn a_nan_reaches_the_output() {
        let (k, v) = ([1.0, f32::NAN, 1.0], [1.0; 3]);
        let kept = Kept::Float(&k, &v);
        let a = Attend { heads: 1, groups: 1, capacity: 3, size: 1, q: &[1.0], kept, lengths: &[3] };
        assert!(attend(&a, 1, Level::best())[0].is_nan());
        assert!(!attend(&Attend { lengths: &[1], ..a }, 1, Level::best())[0].is_nan());
    }
}
