//! RMSNorm without parameters (arXiv 1910.07467) of few rows, and rotary position embedding (arXiv 2104.09864) after it.

use crate::lanes::{BASELINE_FMA, LANES, Lanes, Level, fma};
use crate::scan::dispatch;

const EPS: f32 = 1e-6; // NORM_EPS of nanochat/ops/dense.py

/// What the vectors of a token are turned by: (tokens, half a vector) each; token t takes row t % rows.
#[derive(Clone, Copy)]
pub struct Turn<'a> {
    /// Vectors of a token.
    pub heads: usize,
    pub cos: &'a [f32],
    pub sin: &'a [f32],
}

#[inline(always)]
fn normed<const FMA: bool>(x: &[f32], y: &mut [f32]) {
    let mut squares = Lanes::ZERO;
    for part in x.chunks(LANES) {
        let (v, old) = (Lanes::load(part), squares);
        squares = Lanes::new(|l| fma::<FMA>(v.0[l], v.0[l], old.0[l]));
    }
    let scale = 1.0 / (squares.sum() / x.len() as f32 + EPS).sqrt();
    for (y, x) in y.chunks_mut(LANES).zip(x.chunks(LANES)) {
        let x = Lanes::load(x);
        Lanes::new(|l| x.0[l] * scale).store(y);
    }
}

/// Halves layout: number i turns with number i + size / 2.
#[inline(always)]
fn turned<const FMA: bool>(y: &mut [f32], cos: &[f32], sin: &[f32]) {
    let (first, second) = y.split_at_mut(cos.len());
    let tables = cos.chunks(LANES).zip(sin.chunks(LANES));
    for ((to_a, to_b), (cos, sin)) in first.chunks_mut(LANES).zip(second.chunks_mut(LANES)).zip(tables) {
        let (a, b, cos, sin) = (Lanes::load(to_a), Lanes::load(to_b), Lanes::load(cos), Lanes::load(sin));
        Lanes::new(|l| fma::<FMA>(b.0[l], sin.0[l], a.0[l] * cos.0[l])).store(to_a);
        Lanes::new(|l| fma::<FMA>(-a.0[l], sin.0[l], b.0[l] * cos.0[l])).store(to_b);
    }
}

#[inline(always)]
fn all<const FMA: bool>(x: &[f32], size: usize, turn: Option<Turn>, y: &mut [f32]) {
    for (n, (x, y)) in x.chunks_exact(size).zip(y.chunks_exact_mut(size)).enumerate() {
        normed::<FMA>(x, y);
        if let Some(turn) = turn {
            let half = size / 2;
            let at = n / turn.heads * half % turn.cos.len();
            turned::<FMA>(y, &turn.cos[at..at + half], &turn.sin[at..at + half]);
        }
    }
}

/// Each `size` numbers over their root mean square, then turned. A vector's bits depend on no other vector.
///
/// ```
/// use rustbpe::{lanes::Level, norm::*};
/// let turn = Turn { heads: 1, cos: &[0.0], sin: &[1.0] };
/// let y = rms_norm(&[3.0, 3.0], 2, Some(turn), Level::best());
/// assert!((y[0] - 1.0).abs() < 1e-6 && (y[1] + 1.0).abs() < 1e-6);
/// ```
pub fn rms_norm(x: &[f32], size: usize, turn: Option<Turn>, level: Level) -> Vec<f32> {
    assert!(x.len().is_multiple_of(size));
    if let Some(turn) = turn {
        let half = size / 2;
        assert!(size.is_multiple_of(2) && turn.cos.len() == turn.sin.len() && turn.heads > 0);
        assert!(turn.cos.len() >= half && turn.cos.len().is_multiple_of(half));
    }
    let mut y = vec![0.0; x.len()];
    let (level, to) = (level.min(Level::best()), y.as_mut_slice());
    dispatch!(level, all(x: &[f32], size: usize, turn: Option<Turn>, to: &mut [f32]));
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equals_the_definition() {
        let (tokens, heads, size, rows) = (6, 3, 20, 2);
        let wave = |len: usize, f: f32| (0..len).map(|i| (i as f32 * f).sin() * 3.0).collect::<Vec<f32>>();
        let (x, angles) = (wave(tokens * heads * size, 0.37), wave(rows * size / 2, 0.91));
        let (cos, sin): (Vec<_>, Vec<_>) = angles.iter().map(|a| (a.cos(), a.sin())).unzip();
        let turn = Turn { heads, cos: &cos, sin: &sin };
        for level in Level::ALL.into_iter().filter(|&l| l <= Level::best()) {
            for (turn, y) in [None, Some(turn)].map(|turn| (turn, rms_norm(&x, size, turn, level))) {
                for (i, &y) in y.iter().enumerate() {
                    let (start, at, half) = (i / size * size, i % size, size / 2);
                    let mean = x[start..start + size].iter().map(|&v| (v as f64).powi(2)).sum::<f64>() / size as f64;
                    let n = |at: usize| x[start + at] as f64 / (mean + EPS as f64).sqrt();
                    let table = i / size / heads % rows * half + at % half;
                    let (c, s) = (cos[table] as f64, sin[table] as f64);
                    let want = match turn {
                        None => n(at),
                        Some(_) if at < half => n(at) * c + n(at + half) * s,
                        Some(_) => n(at) * c - n(at - half) * s,
                    };
                    assert!((y as f64 - want).abs() < 1e-6, "{i}: {y} {want} {level:?}");
                }
            }
        }
    }
}
