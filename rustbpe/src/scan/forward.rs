//! From the inputs to out and the last state.

use super::*;

/// What forward gives.
pub struct Output {
    /// (B, T, E)
    pub out: Vec<f32>,
    /// (B, E, N)
    pub last: Vec<f32>,
    /// The state where each chunk begins, for `backward`; empty unless asked for.
    pub borders: Vec<f32>,
}

/// A chunk of forward: the state h is carried through, y filled in.
#[inline(always)]
fn advance<const FMA: bool, const SMALL: bool>(
    s: &Scan,
    block: &Block,
    staged: &mut Staged,
    (start, end): (usize, usize),
    state: &mut [Lanes],
) {
    for t in start..end {
        let next = block.at(s, t + CHUNK).start;
        prefetch(s.u, next);
        prefetch(s.delta, next);
        if let Some(z) = s.z {
            prefetch(z, block.at(s, t).start);
        }
        if block.resets(s, t) {
            state.fill(Lanes::ZERO);
        }
        let (b, c) = s.weights(block.row, t);
        let (dt, x, mut y) = (staged.dt[t - start], staged.x[t - start], Lanes::ZERO);
        for (((state, &a), &b), &c) in state.iter_mut().zip(&block.a).zip(b).zip(c) {
            let mut h = *state; // a copy: LLVM makes vectors of a loop only where it knows that nothing overlaps
            for l in 0..LANES {
                h.0[l] = fma::<FMA>(decay::<FMA, SMALL>(dt.0[l], a.0[l]), h.0[l], x.0[l] * b);
                y.0[l] = fma::<FMA>(c, h.0[l], y.0[l]);
            }
            *state = h;
        }
        staged.y[t - start] = y;
    }
}

#[inline(always)]
fn forward_task<const FMA: bool>(s: &Scan, to: &ForwardTo, staged: &mut [Staged], task: usize) {
    let blocks = Block::group(s, task);
    let mut states: Vec<_> = blocks.iter().map(|block| block.state(s, s.initial)).collect();
    for (chunk, start) in (0..s.time).step_by(CHUNK).enumerate() {
        let range = (start, s.time.min(start + CHUNK));
        stage::<FMA>(s, &blocks, staged, range);
        for ((block, staged), h) in blocks.iter().zip(staged.iter_mut()).zip(&mut states) {
            if let Some(borders) = &to.borders {
                // SAFETY: each block of each row has its own borders.
                let border = unsafe { borders.part(block.border(s, chunk), s.states * LANES) };
                for (h, border) in h.iter().zip(border.chunks_mut(LANES)) {
                    h.store(border);
                }
            }
            if staged.small(block) {
                advance::<FMA, true>(s, block, staged, range, h);
            } else {
                advance::<FMA, false>(s, block, staged, range, h);
            }
        }
        for t in range.0..range.1 {
            for (block, staged) in blocks.iter().zip(staged.iter()) {
                let (at, d, u, mut y) = (block.at(s, t), block.d, staged.u[t - start], staged.y[t - start]);
                y = Lanes::new(|l| fma::<FMA>(d.0[l], u.0[l], y.0[l]));
                if let Some(z) = s.z {
                    let z = Lanes::load(&z[at.clone()]);
                    y = Lanes::new(|l| y.0[l] * z.0[l] * sigmoid::<FMA>(z.0[l]));
                }
                // SAFETY: these channels of this row are this task's alone.
                y.store(unsafe { to.out.part(at.start, block.width) });
            }
        }
    }
    for (block, h) in blocks.iter().zip(&states) {
        let (start, len) = block.state_part(s);
        // SAFETY: as above.
        lanes_to_rows(h, unsafe { to.last.part(start, len) });
    }
}

struct ForwardTo<'a> {
    out: Shared<'a>,
    last: Shared<'a>,
    borders: Option<Shared<'a>>,
}

/// out, the last state and, if `keep`, what `backward` needs.
///
/// ```
/// use rustbpe::{lanes::Level, scan::*};
/// let (u, dt, b) = ([1.0, 0.0, 0.0], [1.0; 3], [1.0; 3]); // one row, three steps, one channel, one state
/// let a = [-std::f32::consts::LN_2]; // half is left after each step
/// let sizes = Scan { batch: 1, time: 3, channels: 1, states: 1, ..Scan::default() };
/// let scan = Scan { u: &u, delta: &dt, a: &a, b: &b, c: &b, ..sizes };
/// assert_eq!(forward(&scan, false, 1, Level::best()).out, [1.0, 0.5, 0.25]);
/// ```
pub fn forward(s: &Scan, keep: bool, threads: usize, level: Level) -> Output {
    s.check();
    let level = level.min(Level::best());
    let mut to = Output {
        out: vec![0.0; s.u.len()],
        last: vec![0.0; s.batch * s.channels * s.states],
        borders: vec![0.0; if keep { s.border_len() } else { 0 }],
    };
    let shared = ForwardTo {
        out: Shared::new(&mut to.out),
        last: Shared::new(&mut to.last),
        borders: keep.then(|| Shared::new(&mut to.borders)),
    };
    run(s.batch * s.groups(), threads, |next| {
        let (to, mut staged) = (&shared, Staged::group());
        let staged = &mut staged[..];
        while let Some(task) = next() {
            dispatch!(level, forward_task(s: &Scan, to: &ForwardTo, staged: &mut [Staged], task: usize));
        }
    });
    to
}
