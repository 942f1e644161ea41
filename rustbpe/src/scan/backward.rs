//! From the gradients of out and the last state to those of the inputs, chunk by chunk from the end.

use super::*;

/// What backward gives, each in the shape of what it is the gradient of; empty for an argument that was None.
#[derive(Default)]
pub struct Gradients {
    pub u: Vec<f32>,
    pub delta: Vec<f32>,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub c: Vec<f32>,
    pub d: Vec<f32>,
    pub z: Vec<f32>,
    pub delta_bias: Vec<f32>,
    pub initial: Vec<f32>,
}

/// What backward has of one chunk of one block.
struct Reversed {
    /// The gradient of out, then that of y.
    dy: [Lanes; CHUNK],
    /// z, then its gradient.
    z: [Lanes; CHUNK],
    dx: [Lanes; CHUNK],
    /// The gradient of dt by way of the decay.
    ddt: [Lanes; CHUNK],
}

/// The states and decays of one chunk of one block, and the gradients of B_t and C_t of a group, lane by lane.
struct Kept {
    /// One more than steps.
    h: Vec<Lanes>,
    decay: Vec<Lanes>,
    db: Vec<Lanes>,
    dc: Vec<Lanes>,
    zero: Vec<Lanes>,
}

impl Kept {
    fn new(states: usize) -> Kept {
        let steps = |n: usize| vec![Lanes::ZERO; n * states];
        Kept { h: steps(CHUNK + 1), decay: steps(CHUNK), db: steps(CHUNK), dc: steps(CHUNK), zero: steps(1) }
    }
}

/// What a block carries from chunk to chunk, last to first.
struct Carried {
    dh: Vec<Lanes>,
    da: Vec<Lanes>,
    dd: Lanes,
    dbias: Lanes,
}

/// As `advance`, from the border on, and every state and decay is kept.
#[inline(always)]
fn advance_again<const FMA: bool, const SMALL: bool>(
    s: &Scan,
    block: &Block,
    staged: &mut Staged,
    (start, end): (usize, usize),
    kept: &mut Kept,
) {
    let n = s.states;
    for t in start..end {
        let i = t - start;
        let (b, c) = s.weights(block.row, t);
        let (dt, x, mut y) = (staged.dt[i], staged.x[i], Lanes::ZERO);
        let (before, after) = kept.h.split_at_mut((i + 1) * n);
        let before = if block.resets(s, t) { &kept.zero[..] } else { &before[i * n..] };
        let now = after[..n].iter_mut().zip(&mut kept.decay[i * n..(i + 1) * n]);
        for (((((h, decays), &before), &a), &b), &c) in now.zip(before).zip(&block.a).zip(b).zip(c) {
            let (mut next, mut factor) = (before, a);
            for l in 0..LANES {
                factor.0[l] = decay::<FMA, SMALL>(dt.0[l], a.0[l]);
                next.0[l] = fma::<FMA>(factor.0[l], before.0[l], x.0[l] * b);
                y.0[l] = fma::<FMA>(c, next.0[l], y.0[l]);
            }
            (*h, *decays) = (next, factor);
        }
        staged.y[i] = y;
    }
}

/// Through the gate: the gradients of y (D u included) and z from that of out.
#[inline(always)]
fn reverse_gate<const FMA: bool>(block: &Block, staged: &Staged, reversed: &mut Reversed, steps: usize) {
    let d = block.d;
    for i in 0..steps {
        let (y, u, z, dout) = (staged.y[i], staged.u[i], reversed.z[i], reversed.dy[i]);
        let s = Lanes::new(|l| sigmoid::<FMA>(z.0[l]));
        reversed.dy[i] = Lanes::new(|l| dout.0[l] * z.0[l] * s.0[l]);
        reversed.z[i] = Lanes::new(|l| {
            let slope = s.0[l] * fma::<FMA>(z.0[l], 1.0 - s.0[l], 1.0); // of z sigmoid(z)
            dout.0[l] * fma::<FMA>(d.0[l], u.0[l], y.0[l]) * slope
        });
    }
}

/// A chunk of backward: dh is carried from its end to its start.
#[inline(always)]
fn reverse<const FMA: bool>(
    s: &Scan,
    block: &Block,
    (staged, reversed): (&Staged, &mut Reversed),
    (start, end): (usize, usize),
    (kept, carried): (&mut Kept, &mut Carried),
    grad_out: &[f32],
) {
    let n = s.states;
    for t in (start..end).rev() {
        let i = t - start;
        let (b, c) = s.weights(block.row, t);
        let (dt, x, dy) = (staged.dt[i], staged.x[i], reversed.dy[i]);
        let (mut ddt, mut dx) = (Lanes::ZERO, Lanes::ZERO);
        if let Some(t) = t.checked_sub(CHUNK) {
            let next = block.at(s, t).start;
            for array in [s.u, s.delta, grad_out, s.z.unwrap_or_default()] {
                prefetch(array, next);
            }
        }
        let fresh = block.resets(s, t);
        let before = if fresh { &kept.zero[..] } else { &kept.h[i * n..(i + 1) * n] };
        let states = before.iter().zip(&kept.h[(i + 1) * n..(i + 2) * n]).zip(&kept.decay[i * n..(i + 1) * n]);
        let weights = block.a.iter().zip(b).zip(c);
        let sums = kept.db[i * n..(i + 1) * n].iter_mut().zip(&mut kept.dc[i * n..(i + 1) * n]);
        let carries = carried.dh.iter_mut().zip(&mut carried.da);
        for (((((&before, &h), &decay), ((&a, &b), &c)), (db_sum, dc_sum)), (dh_carried, da_sum)) in
            states.zip(weights).zip(sums).zip(carries)
        {
            let (mut db, mut dc, mut dh, mut da) = (*db_sum, *dc_sum, *dh_carried, *da_sum);
            for l in 0..LANES {
                let g = fma::<FMA>(c, dy.0[l], dh.0[l]);
                dc.0[l] = fma::<FMA>(dy.0[l], h.0[l], dc.0[l]);
                db.0[l] = fma::<FMA>(g, x.0[l], db.0[l]);
                dx.0[l] = fma::<FMA>(g, b, dx.0[l]);
                dh.0[l] = g * decay.0[l];
                let slope = dh.0[l] * before.0[l]; // the gradient of dt A
                ddt.0[l] = fma::<FMA>(slope, a.0[l], ddt.0[l]);
                da.0[l] = fma::<FMA>(slope, dt.0[l], da.0[l]);
            }
            (*db_sum, *dc_sum, *dh_carried, *da_sum) = (db, dc, dh, da);
        }
        if fresh {
            carried.dh.fill(Lanes::ZERO);
        }
        reversed.dx[i] = dx;
        reversed.ddt[i] = Lanes::new(|l| ddt.0[l] / LOG2_E);
    }
}

/// Write the gradients of u, delta and z of a chunk.
#[inline(always)]
fn finish<const FMA: bool>(
    s: &Scan,
    blocks: &[Block],
    (staged, reversed, carried): (&[Staged], &[Reversed], &mut [Carried]),
    (start, end): (usize, usize),
    to: &BackwardTo,
) {
    for t in start..end {
        let i = t - start;
        for (((block, staged), reversed), carried) in blocks.iter().zip(staged).zip(reversed).zip(carried.iter_mut()) {
            let (at, d, bias) = (block.at(s, t), block.d, block.bias);
            let (u, dt, dy, dx, ddt) = (staged.u[i], staged.dt[i], reversed.dy[i], reversed.dx[i], reversed.ddt[i]);
            let du = Lanes::new(|l| fma::<FMA>(dx.0[l], dt.0[l], dy.0[l] * d.0[l]));
            let mut ddelta = Lanes::new(|l| fma::<FMA>(dx.0[l], u.0[l], ddt.0[l]));
            if s.softplus {
                let delta = Lanes::load(&s.delta[at.clone()]);
                ddelta = Lanes::new(|l| ddelta.0[l] * sigmoid::<FMA>(delta.0[l] + bias.0[l]));
            }
            if t >= block.length {
                ddelta = Lanes::ZERO;
            }
            let (dd, dbias) = (carried.dd, carried.dbias);
            carried.dd = Lanes::new(|l| fma::<FMA>(dy.0[l], u.0[l], dd.0[l]));
            carried.dbias = Lanes::new(|l| dbias.0[l] + ddelta.0[l]);
            // SAFETY: these channels of this row are this task's alone.
            unsafe {
                du.store(to.u.part(at.start, block.width));
                ddelta.store(to.delta.part(at.start, block.width));
                if let Some(z) = &to.z {
                    reversed.z[i].store(z.part(at.start, block.width));
                }
            }
        }
    }
}

#[inline(always)]
fn backward_task<const FMA: bool>(s: &Scan, from: &BackwardFrom, to: &BackwardTo, desk: &mut Desk, task: usize) {
    let blocks = Block::group(s, task);
    let Desk { staged, reversed, kept } = desk;
    let mut carried: Vec<_> = blocks
        .iter()
        .map(|block| Carried {
            dh: block.state(s, from.last),
            da: vec![Lanes::ZERO; s.states],
            dd: Lanes::ZERO,
            dbias: Lanes::ZERO,
        })
        .collect();
    for chunk in (0..s.chunks()).rev() {
        let range = (chunk * CHUNK, s.time.min((chunk + 1) * CHUNK));
        stage::<FMA>(s, &blocks, staged, range);
        for t in range.0..range.1 {
            for (block, reversed) in blocks.iter().zip(reversed.iter_mut()) {
                reversed.dy[t - range.0] = Lanes::load(&from.out[block.at(s, t)]);
                if let Some(z) = s.z {
                    reversed.z[t - range.0] = Lanes::load(&z[block.at(s, t)]);
                }
            }
        }
        kept.db.fill(Lanes::ZERO);
        kept.dc.fill(Lanes::ZERO);
        for (k, block) in blocks.iter().enumerate() {
            let border = &from.borders[block.border(s, chunk)..];
            for (h, border) in kept.h[..s.states].iter_mut().zip(border.chunks(LANES)) {
                *h = Lanes::load(border);
            }
            if staged[k].small(block) {
                advance_again::<FMA, true>(s, block, &mut staged[k], range, kept);
            } else {
                advance_again::<FMA, false>(s, block, &mut staged[k], range, kept);
            }
            if s.z.is_some() {
                reverse_gate::<FMA>(block, &staged[k], &mut reversed[k], range.1 - range.0);
            }
            reverse::<FMA>(s, block, (&staged[k], &mut reversed[k]), range, (kept, &mut carried[k]), from.out);
        }
        finish::<FMA>(s, &blocks, (staged, reversed, &mut carried), range, to);
        let (group, row) = (task % s.groups(), task / s.groups());
        let (start, len) = (((group * s.batch + row) * s.time + range.0) * s.states, (range.1 - range.0) * s.states);
        // SAFETY: each group has its own sums of each row.
        let (db, dc) = unsafe { (to.b.part(start, len), to.c.part(start, len)) };
        for (sum, lanes) in db.iter_mut().zip(&kept.db).chain(dc.iter_mut().zip(&kept.dc)) {
            *sum = lanes.sum();
        }
    }
    for (block, carried) in blocks.iter().zip(&carried) {
        let (start, len) = block.state_part(s);
        let channels = (block.row * s.channels + block.first, block.width);
        // SAFETY: these channels of this row are this task's alone.
        unsafe {
            lanes_to_rows(&carried.dh, to.initial.part(start, len));
            lanes_to_rows(&carried.da, to.a.part(start, len));
            carried.dd.store(to.d.part(channels.0, channels.1));
            carried.dbias.store(to.delta_bias.part(channels.0, channels.1));
        }
    }
}

struct BackwardFrom<'a> {
    out: &'a [f32],
    last: Option<&'a [f32]>,
    borders: &'a [f32],
}

/// Sums over rows or channels are kept apart by row or group; `sum_parts` joins them in their order.
struct BackwardTo<'a> {
    u: Shared<'a>,
    delta: Shared<'a>,
    z: Option<Shared<'a>>,
    initial: Shared<'a>,
    /// (B, E, N)
    a: Shared<'a>,
    /// (groups, B, T, N)
    b: Shared<'a>,
    c: Shared<'a>,
    /// (B, E)
    d: Shared<'a>,
    delta_bias: Shared<'a>,
}

/// What one thread works with in backward.
struct Desk {
    staged: Vec<Staged>,
    reversed: Vec<Reversed>,
    kept: Kept,
}

impl Desk {
    fn new(states: usize) -> Desk {
        let steps = [Lanes::ZERO; CHUNK];
        let reversed = (0..GROUP).map(|_| Reversed { dy: steps, z: steps, dx: steps, ddt: steps }).collect();
        Desk { staged: Staged::group(), reversed, kept: Kept::new(states) }
    }
}

/// (parts, len) -> (len), added in order.
fn sum_parts(mut parts: Vec<f32>, len: usize) -> Vec<f32> {
    if len < parts.len() {
        let (sum, rest) = parts.split_at_mut(len);
        for part in rest.chunks(len.max(1)) {
            for (sum, x) in sum.iter_mut().zip(part) {
                *sum += x;
            }
        }
    }
    parts.truncate(len);
    parts
}

/// The gradients of everything `s` has, from those of out (B, T, E) and of the last state (B, E, N).
pub fn backward(
    s: &Scan,
    borders: &[f32],
    grad_out: &[f32],
    grad_last: Option<&[f32]>,
    threads: usize,
    level: Level,
) -> Gradients {
    s.check();
    assert_eq!((borders.len(), grad_out.len()), (s.border_len(), s.u.len()));
    assert!(grad_last.is_none_or(|dh| dh.len() == s.batch * s.channels * s.states));
    let level = level.min(Level::best());
    let (bte, ben, btn) = (s.u.len(), s.batch * s.channels * s.states, s.b.len());
    let zeros = |len: usize| vec![0.0; len];
    let mut to = Gradients {
        u: zeros(bte),
        delta: zeros(bte),
        a: zeros(ben),
        b: zeros(s.groups() * btn),
        c: zeros(s.groups() * btn),
        d: zeros(s.batch * s.channels),
        z: zeros(s.z.map_or(0, <[f32]>::len)),
        delta_bias: zeros(s.batch * s.channels),
        initial: zeros(ben),
    };
    let from = BackwardFrom { out: grad_out, last: grad_last, borders };
    let shared = BackwardTo {
        u: Shared::new(&mut to.u),
        delta: Shared::new(&mut to.delta),
        z: s.z.is_some().then(|| Shared::new(&mut to.z)),
        initial: Shared::new(&mut to.initial),
        a: Shared::new(&mut to.a),
        b: Shared::new(&mut to.b),
        c: Shared::new(&mut to.c),
        d: Shared::new(&mut to.d),
        delta_bias: Shared::new(&mut to.delta_bias),
    };
    run(s.batch * s.groups(), threads, |next| {
        let (from, to, desk) = (&from, &shared, &mut Desk::new(s.states));
        while let Some(task) = next() {
            dispatch!(
                level,
                backward_task(s: &Scan, from: &BackwardFrom, to: &BackwardTo, desk: &mut Desk, task: usize)
            );
        }
    });
    to.a = sum_parts(to.a, s.channels * s.states);
    to.b = sum_parts(to.b, btn);
    to.c = sum_parts(to.c, btn);
    to.d = s.d.map_or_else(Vec::new, |d| sum_parts(to.d, d.len()));
    to.delta_bias = s.delta_bias.map_or_else(Vec::new, |bias| sum_parts(to.delta_bias, bias.len()));
    if s.initial.is_none() {
        to.initial = Vec::new();
    }
    to
}
