//! The selective scan of Mamba-1 (arXiv 2312.00752, equation 2 and section 3.3) on a CPU: forward, backward, one step.
//!
//! ```text
//! dt = softplus(delta + bias);  h = exp(dt A) h + dt u B_t;  y = C_t h + D u;  out = y silu(z)
//! ```
//!
//! The decay is its own for every channel and state, so there is no matrix product to use and time is walked step by
//! step. Sixteen channels make one vector, a block, whose state stays in the first-level cache. A task is a row and a
//! group of blocks; it reads, scans and writes a chunk of steps at a time. Forward keeps the state at the chunks' borders,
//! backward makes the rest again. No sum depends on which thread did what.
//!
//! Arrays are row-major. B rows (batch), T steps (time), E channels, N states.

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::lanes::{BASELINE_FMA, EXP2_MAX, LANES, Lanes, Level, exp2, exp2_product, fma, sigmoid, softplus};

/// Compile `$body::<FMA>` once for each level, and call the one that `$level` names.
macro_rules! dispatch {
    ($level:expr, $body:ident($($arg:ident: $type:ty),*)) => {{
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx512f")]
        fn avx512($($arg: $type),*) {
            $body::<true>($($arg),*)
        }
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = "avx2,fma")]
        fn avx2($($arg: $type),*) {
            $body::<true>($($arg),*)
        }
        match $level {
            // SAFETY: the caller has seen to it that the machine is of this level.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Bf16 => unsafe { avx512($($arg),*) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2($($arg),*) },
            _ => $body::<BASELINE_FMA>($($arg),*),
        }
    }};
}
pub(crate) use dispatch;

mod backward;
mod forward;
mod step;
#[cfg(test)]
mod tests;

pub use backward::{Gradients, backward};
pub use forward::{Output, forward};
pub use step::{Step, step};

/// Steps between two kept states.
pub const CHUNK: usize = 32;
/// Blocks of a task: next to each other in memory, and their gradients of B_t and C_t are added up in one buffer.
const GROUP: usize = 8;
const LOG2_E: f32 = std::f32::consts::LOG2_E;

/// What a scan is given.
#[derive(Clone, Copy, Default)]
pub struct Scan<'a> {
    pub batch: usize,
    pub time: usize,
    pub channels: usize,
    pub states: usize,
    /// (B, T, E)
    pub u: &'a [f32],
    /// (B, T, E): dt before bias and softplus
    pub delta: &'a [f32],
    /// (E, N)
    pub a: &'a [f32],
    /// (B, T, N)
    pub b: &'a [f32],
    /// (B, T, N)
    pub c: &'a [f32],
    /// (E)
    pub d: Option<&'a [f32]>,
    /// (B, T, E)
    pub z: Option<&'a [f32]>,
    /// (E)
    pub delta_bias: Option<&'a [f32]>,
    pub softplus: bool,
    /// (B, E, N); zero if there is none
    pub initial: Option<&'a [f32]>,
    /// (B, T): not 0 where a document begins, which sees nothing of what came before
    pub resets: Option<&'a [u8]>,
    /// (B): from this step on the state stays as it is (dt = 0, no reset)
    pub lengths: Option<&'a [i64]>,
}

impl Scan<'_> {
    fn blocks(&self) -> usize {
        self.channels.div_ceil(LANES)
    }

    fn groups(&self) -> usize {
        self.blocks().div_ceil(GROUP)
    }

    fn chunks(&self) -> usize {
        self.time.div_ceil(CHUNK)
    }

    /// Numbers in `Output::borders`.
    pub fn border_len(&self) -> usize {
        self.batch * self.blocks() * self.chunks() * self.states * LANES
    }

    /// Every array has its size. The unchecked writes below rely on the sizes, the reads panic.
    fn check(&self) {
        let (be, bte, btn) =
            (self.channels, self.batch * self.time * self.channels, self.batch * self.time * self.states);
        assert_eq!((self.u.len(), self.delta.len()), (bte, bte));
        assert_eq!((self.a.len(), self.b.len(), self.c.len()), (self.channels * self.states, btn, btn));
        assert!(self.d.is_none_or(|d| d.len() == be) && self.delta_bias.is_none_or(|bias| bias.len() == be));
        assert!(self.z.is_none_or(|z| z.len() == bte));
        assert!(self.initial.is_none_or(|h| h.len() == self.batch * self.channels * self.states));
        assert!(self.resets.is_none_or(|resets| resets.len() == self.batch * self.time));
        assert!(self.lengths.is_none_or(|lengths| lengths.len() == self.batch));
    }

    /// B_t and C_t of a row at step t.
    #[inline(always)]
    fn weights(&self, row: usize, t: usize) -> (&[f32], &[f32]) {
        let at = (row * self.time + t) * self.states;
        (&self.b[at..at + self.states], &self.c[at..at + self.states])
    }
}

/// Sixteen channels of one row (fewer at the end), and what they need all along.
struct Block {
    row: usize,
    /// The first channel and the number of channels.
    first: usize,
    width: usize,
    /// Steps that are not padding.
    length: usize,
    bias: Lanes,
    d: Lanes,
    /// A log2(e), a vector for each state.
    a: Vec<Lanes>,
    /// Largest |A| log2(e) of a channel.
    a_max: Lanes,
}

impl Block {
    fn new(s: &Scan, row: usize, block: usize) -> Block {
        let first = block * LANES;
        let width = LANES.min(s.channels - first);
        let channels = first..first + width;
        let a = rows_to_lanes(&s.a[first * s.states..(first + width) * s.states], s.states, LOG2_E);
        let a_max = Lanes::new(|l| a.iter().fold(0.0, |most: f32, a| most.max(a.0[l].abs())));
        Block {
            row,
            first,
            width,
            length: s.lengths.map_or(s.time, |lengths| lengths[row].clamp(0, s.time as i64) as usize),
            bias: s.delta_bias.map_or(Lanes::ZERO, |bias| Lanes::load(&bias[channels.clone()])),
            d: s.d.map_or(Lanes::ZERO, |d| Lanes::load(&d[channels])),
            a,
            a_max,
        }
    }

    /// The blocks of a task.
    fn group(s: &Scan, task: usize) -> Vec<Block> {
        let (row, first) = (task / s.groups(), task % s.groups() * GROUP);
        (first..s.blocks().min(first + GROUP)).map(|block| Block::new(s, row, block)).collect()
    }

    /// The part of a (B, E, N) array that belongs to this block; zero where there is none.
    fn state(&self, s: &Scan, array: Option<&[f32]>) -> Vec<Lanes> {
        let (start, len) = self.state_part(s);
        array.map_or_else(|| vec![Lanes::ZERO; s.states], |h| rows_to_lanes(&h[start..start + len], s.states, 1.0))
    }

    /// Where that part begins, and its length.
    fn state_part(&self, s: &Scan) -> (usize, usize) {
        ((self.row * s.channels + self.first) * s.states, self.width * s.states)
    }

    /// Where these channels are in a (B, T, E) array at step t.
    #[inline(always)]
    fn at(&self, s: &Scan, t: usize) -> std::ops::Range<usize> {
        let start = (self.row * s.time + t) * s.channels + self.first;
        start..start + self.width
    }

    #[inline(always)]
    fn resets(&self, s: &Scan, t: usize) -> bool {
        t < self.length && s.resets.is_some_and(|resets| resets[self.row * s.time + t] != 0)
    }

    /// Where the state before a chunk is in `Output::borders`.
    fn border(&self, s: &Scan, chunk: usize) -> usize {
        ((self.row * s.blocks() + self.first / LANES) * s.chunks() + chunk) * s.states * LANES
    }
}

/// (width, N) -> N vectors of `width` lanes, times `scale`.
fn rows_to_lanes(rows: &[f32], states: usize, scale: f32) -> Vec<Lanes> {
    let mut lanes = vec![Lanes::ZERO; states];
    for (l, row) in rows.chunks(states).enumerate() {
        for (lane, x) in lanes.iter_mut().zip(row) {
            lane.0[l] = x * scale;
        }
    }
    lanes
}

fn lanes_to_rows(lanes: &[Lanes], rows: &mut [f32]) {
    for (l, row) in rows.chunks_mut(lanes.len()).enumerate() {
        for (x, lane) in row.iter_mut().zip(lanes) {
            *x = lane.0[l];
        }
    }
}

/// One chunk of one block, made ready.
struct Staged {
    u: [Lanes; CHUNK],
    dt: [Lanes; CHUNK],
    /// dt u
    x: [Lanes; CHUNK],
    /// C_t h
    y: [Lanes; CHUNK],
    /// Largest |dt| of each channel.
    dt_max: Lanes,
}

impl Staged {
    fn group() -> Vec<Staged> {
        let steps = [Lanes::ZERO; CHUNK];
        (0..GROUP).map(|_| Staged { u: steps, dt: steps, x: steps, y: steps, dt_max: Lanes::ZERO }).collect()
    }

    /// Whether dt A is small enough for `exp2_product` (which keeps a NaN).
    fn small(&self, block: &Block) -> bool {
        (0..LANES).all(|l| self.dt_max.0[l] * block.a_max.0[l] <= EXP2_MAX)
    }
}

/// Read a chunk. All blocks of a step together, because they are neighbours in memory and two steps are not.
#[inline(always)]
fn stage<const FMA: bool>(s: &Scan, blocks: &[Block], staged: &mut [Staged], (start, end): (usize, usize)) {
    for to in staged.iter_mut() {
        to.dt_max = Lanes::ZERO;
    }
    for t in start..end {
        for (block, to) in blocks.iter().zip(staged.iter_mut()) {
            let (at, i) = (block.at(s, t), t - start);
            let (delta, u, bias, most) =
                (Lanes::load(&s.delta[at.clone()]), Lanes::load(&s.u[at]), block.bias, to.dt_max);
            let mut dt = Lanes::new(|l| delta.0[l] + bias.0[l]);
            if s.softplus {
                dt = Lanes::new(|l| softplus::<FMA>(dt.0[l]));
            }
            if t >= block.length {
                dt = Lanes::ZERO;
            }
            to.dt_max = Lanes::new(|l| if dt.0[l].abs() > most.0[l] { dt.0[l].abs() } else { most.0[l] });
            to.u[i] = u;
            to.dt[i] = dt;
            to.x[i] = Lanes::new(|l| dt.0[l] * u.0[l]);
        }
    }
}

/// Ask for the cache line of array[at]: two steps lie too far apart for the machine to foresee the next one.
#[inline(always)]
fn prefetch(array: &[f32], at: usize) {
    #[cfg(target_arch = "x86_64")]
    if let Some(x) = array.get(at) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint, without effect on memory; SSE is part of x86-64.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(x).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (array, at);
}

/// 2^(dt a)
#[inline(always)]
fn decay<const FMA: bool, const SMALL: bool>(dt: f32, a: f32) -> f32 {
    if SMALL { exp2_product::<FMA>(dt, a) } else { exp2::<FMA>(dt * a) }
}

/// An array that threads fill together, each its own parts.
pub(crate) struct Shared<'a> {
    data: *mut f32,
    len: usize,
    lifetime: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only way in is `part`, whose callers answer for it.
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(array: &'a mut [f32]) -> Shared<'a> {
        Shared { data: array.as_mut_ptr(), len: array.len(), lifetime: PhantomData }
    }

    /// # Safety
    /// No other part that is alive, in any thread, overlaps this one.
    #[expect(clippy::mut_from_ref, reason = "the parts are disjoint")]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [f32] {
        assert!(start + len <= self.len);
        // SAFETY: inside the array, which is borrowed mutably for 'a; the caller answers for the overlap.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(start), len) }
    }
}

/// Run tasks 0..tasks; each thread takes the next one when it is free.
pub(crate) fn run(tasks: usize, threads: usize, work: impl Fn(&mut dyn FnMut() -> Option<usize>) + Sync) {
    let next = AtomicUsize::new(0);
    let work = || work(&mut || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|&task| task < tasks));
    std::thread::scope(|scope| {
        for _ in 1..threads.min(tasks) {
            scope.spawn(work);
        }
        work();
    });
}
