//! One token: decoding.

use super::*;

/// One token of decoding: x and dt take the places of u and delta.
#[derive(Clone, Copy, Default)]
pub struct Step<'a> {
    pub batch: usize,
    pub channels: usize,
    pub states: usize,
    /// (B, E)
    pub x: &'a [f32],
    /// (B, E): before bias and softplus
    pub dt: &'a [f32],
    /// (E, N)
    pub a: &'a [f32],
    /// (B, N)
    pub b: &'a [f32],
    /// (B, N)
    pub c: &'a [f32],
    /// (E)
    pub d: Option<&'a [f32]>,
    /// (B, E)
    pub z: Option<&'a [f32]>,
    /// (E)
    pub dt_bias: Option<&'a [f32]>,
    pub softplus: bool,
}

impl Step<'_> {
    fn check(&self, state: &[f32]) {
        let (be, bn, en) = (self.batch * self.channels, self.batch * self.states, self.channels * self.states);
        assert_eq!((self.x.len(), self.dt.len(), state.len()), (be, be, self.batch * en));
        assert_eq!((self.a.len(), self.b.len(), self.c.len()), (en, bn, bn));
        assert!(self.z.is_none_or(|z| z.len() == be));
        assert!([self.d, self.dt_bias].iter().flatten().all(|x| x.len() == self.channels));
    }

    fn groups(&self) -> usize {
        self.channels.div_ceil(LANES * GROUP)
    }
}

struct StepTo<'a> {
    state: Shared<'a>,
    y: Shared<'a>,
}

/// The state of one channel, sixteen of its numbers at a time: h <- 2^(dt a) h + x B_t; C_t h is returned.
#[inline(always)]
fn step_channel<const FMA: bool>(h: &mut [f32], dt: f32, x: f32, (a, b, c): (&[f32], &[f32], &[f32])) -> f32 {
    let whole = h.len() / LANES * LANES;
    let mut sum = Lanes::ZERO;
    for i in (0..whole).step_by(LANES) {
        let part = i..i + LANES;
        let (h, a, b, c) = (&mut h[part.clone()], &a[part.clone()], &b[part.clone()], &c[part]);
        for l in 0..LANES {
            h[l] = fma::<FMA>(exp2::<FMA>(dt * a[l]), h[l], x * b[l]);
            sum.0[l] = fma::<FMA>(c[l], h[l], sum.0[l]);
        }
    }
    if whole < h.len() {
        let (h, a, b, c) =
            (&mut h[whole..], Lanes::load(&a[whole..]), Lanes::load(&b[whole..]), Lanes::load(&c[whole..]));
        let (old, before) = (Lanes::load(h), sum);
        let new = Lanes::new(|l| fma::<FMA>(exp2::<FMA>(dt * a.0[l]), old.0[l], x * b.0[l]));
        new.store(h);
        sum = Lanes::new(|l| fma::<FMA>(c.0[l], new.0[l], before.0[l]));
    }
    sum.sum()
}

#[inline(always)]
fn step_task<const FMA: bool>(s: &Step, to: &StepTo, task: usize) {
    let (row, n) = (task / s.groups(), s.states);
    let start = task % s.groups() * LANES * GROUP;
    let (b, c) = (&s.b[row * n..(row + 1) * n], &s.c[row * n..(row + 1) * n]);
    for first in (start..s.channels.min(start + LANES * GROUP)).step_by(LANES) {
        let channels = first..s.channels.min(first + LANES);
        let at = row * s.channels + channels.start..row * s.channels + channels.end;
        let load = |array: Option<&[f32]>| array.map_or(Lanes::ZERO, |array| Lanes::load(&array[channels.clone()]));
        let (x, dt, bias, d) =
            (Lanes::load(&s.x[at.clone()]), Lanes::load(&s.dt[at.clone()]), load(s.dt_bias), load(s.d));
        let mut dt = Lanes::new(|l| dt.0[l] + bias.0[l]);
        if s.softplus {
            dt = Lanes::new(|l| softplus::<FMA>(dt.0[l]));
        }
        // SAFETY: each task has its own channels of its own row.
        let (state, to) = unsafe { (to.state.part(at.start * n, at.len() * n), to.y.part(at.start, at.len())) };
        let mut y = Lanes::ZERO;
        for (l, (h, a)) in state.chunks_mut(n).zip(s.a[channels.start * n..].chunks(n)).enumerate() {
            y.0[l] = step_channel::<FMA>(h, dt.0[l] * LOG2_E, dt.0[l] * x.0[l], (a, b, c));
        }
        y = Lanes::new(|l| fma::<FMA>(d.0[l], x.0[l], y.0[l]));
        if let Some(z) = s.z {
            let z = Lanes::load(&z[at]);
            y = Lanes::new(|l| y.0[l] * z.0[l] * sigmoid::<FMA>(z.0[l]));
        }
        y.store(to);
    }
}

/// Numbers of state below which more threads cost more than they give.
const STEP_ALONE: usize = 1 << 17;

/// Advance `state` (B, E, N) by one token and return y (B, E).
///
/// ```
/// use rustbpe::{lanes::Level, scan::*};
/// let (one, a) = ([1.0], [-std::f32::consts::LN_2]);
/// let sizes = Step { batch: 1, channels: 1, states: 1, ..Step::default() };
/// let mut state = [4.0];
/// let y = step(&Step { x: &one, dt: &one, a: &a, b: &one, c: &one, ..sizes }, &mut state, 1, Level::best());
/// assert_eq!((y, state), (vec![3.0], [3.0])); // 4 / 2 + 1
/// ```
pub fn step(s: &Step, state: &mut [f32], threads: usize, level: Level) -> Vec<f32> {
    s.check(state);
    let level = level.min(Level::best());
    let threads = if state.len() < STEP_ALONE { 1 } else { threads };
    let mut y = vec![0.0; s.x.len()];
    let to = StepTo { state: Shared::new(state), y: Shared::new(&mut y) };
    run(s.batch * s.groups(), threads, |next| {
        let to = &to;
        while let Some(task) = next() {
            dispatch!(level, step_task(s: &Step, to: &StepTo, task: usize));
        }
    });
    y
}
