//! Against the definition in float64.

use super::*;

/// Numbers in lo..hi.
fn random(seed: &mut u64, len: usize, lo: f32, hi: f32) -> Vec<f32> {
    let mut next = || {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        lo + (hi - lo) * (*seed >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..len).map(|_| next()).collect()
}

struct Case {
    u: Vec<f32>,
    delta: Vec<f32>,
    a: Vec<f32>,
    b: Vec<f32>,
    c: Vec<f32>,
    z: Vec<f32>,
    channel: Vec<f32>,
    initial: Vec<f32>,
    resets: Vec<u8>,
    lengths: Vec<i64>,
}

const SIZES: [usize; 4] = [3, 70, 83, 5]; // B, T, E, N

impl Case {
    fn new() -> Case {
        let ([batch, time, channels, states], seed) = (SIZES, &mut 1);
        let (bte, btn) = (batch * time * channels, batch * time * states);
        Case {
            u: random(seed, bte, -1.0, 1.0),
            delta: random(seed, bte, -4.0, 1.0),
            a: random(seed, channels * states, -8.0, 0.0),
            b: random(seed, btn, -1.0, 1.0),
            c: random(seed, btn, -1.0, 1.0),
            z: random(seed, bte, -3.0, 3.0),
            channel: random(seed, channels, -1.0, 1.0),
            initial: random(seed, batch * channels * states, -1.0, 1.0),
            resets: (0..batch * time).map(|i| (i % 13 == 7) as u8).collect(),
            lengths: vec![70, 40, 0],
        }
    }

    fn scan(&self) -> Scan<'_> {
        let [batch, time, channels, states] = SIZES;
        let (d, z, initial) = (Some(&self.channel[..]), Some(&self.z[..]), Some(&self.initial[..]));
        let (resets, lengths) = (Some(&self.resets[..]), Some(&self.lengths[..]));
        Scan {
            batch,
            time,
            channels,
            states,
            u: &self.u,
            delta: &self.delta,
            a: &self.a,
            b: &self.b,
            c: &self.c,
            d,
            z,
            delta_bias: d,
            softplus: true,
            initial,
            resets,
            lengths,
        }
    }
}

/// The definition in float64: out and the last state.
fn naive(s: &Scan) -> (Vec<f64>, Vec<f64>) {
    let (e_len, n_len) = (s.channels, s.states);
    let mut h: Vec<f64> = s.initial.unwrap().iter().map(|&h| h as f64).collect();
    let mut out = vec![0.0; s.u.len()];
    for (i, out) in out.iter_mut().enumerate() {
        let (e, t, row) = (i % e_len, i / e_len % s.time, i / e_len / s.time);
        let valid = (t as i64) < s.lengths.unwrap()[row];
        let dt = (s.delta[i] as f64 + s.delta_bias.unwrap()[e] as f64).exp().ln_1p() * valid as u8 as f64;
        let (u, z) = (s.u[i] as f64, s.z.unwrap()[i] as f64);
        let mut y = s.d.unwrap()[e] as f64 * u;
        for n in 0..n_len {
            let h = &mut h[(row * e_len + e) * n_len + n];
            if valid && s.resets.unwrap()[row * s.time + t] != 0 {
                *h = 0.0;
            }
            let at = (row * s.time + t) * n_len + n;
            *h = (dt * s.a[e * n_len + n] as f64).exp() * *h + dt * u * s.b[at] as f64;
            y += s.c[at] as f64 * *h;
        }
        *out = y * z / (1.0 + (-z).exp());
    }
    (out, h)
}

fn levels() -> impl Iterator<Item = Level> {
    [Level::Baseline, Level::Avx2, Level::Avx512].into_iter().filter(|&level| level <= Level::best())
}

fn assert_close(got: &[f32], want: &[f64], bound: f64) {
    assert_eq!(got.len(), want.len());
    let error = got.iter().zip(want).map(|(&got, want)| (got as f64 - want).abs()).fold(0.0, f64::max);
    assert!(error < bound, "off by {error:e}");
}

#[test]
fn forward_equals_the_definition() {
    let case = Case::new();
    let (out, last) = naive(&case.scan());
    for level in levels() {
        let got = forward(&case.scan(), false, 2, level);
        assert_close(&got.out, &out, 1e-5);
        assert_close(&got.last, &last, 1e-5);
        assert!(got.borders.is_empty());
    }
}

/// The slope of sum(out * weight) in a random direction of every argument, from float64 differences.
#[test]
fn backward_is_the_slope_of_forward() {
    let case = Case::new();
    let weight = random(&mut 5, case.u.len(), -1.0, 1.0);
    let total = |s: &Scan| -> f64 { naive(s).0.iter().zip(&weight).map(|(y, &w)| y * w as f64).sum() };
    for level in levels() {
        let s = case.scan();
        let to = forward(&s, true, 1, level);
        let g = backward(&s, &to.borders, &weight, None, 2, level);
        let along = |grad: &[f32], direction: &[f32]| -> f64 {
            assert_eq!(grad.len(), direction.len());
            grad.iter().zip(direction).map(|(&g, &d)| g as f64 * d as f64).sum()
        };
        macro_rules! check {
            ($($field:ident: $array:expr, $wrap:expr;)*) => {$(
                let direction = random(&mut 9, $array.len(), -1.0, 1.0);
                let moved = |by: f32| -> Vec<f32> {
                    $array.iter().zip(&direction).map(|(x, d)| x + by * d).collect()
                };
                let (up, down) = (moved(1.0 / 1024.0), moved(-1.0 / 1024.0));
                let slope = 512.0 * (total(&Scan { $field: $wrap(&up[..]), ..s }) - total(&Scan { $field: $wrap(&down[..]), ..s }));
                let got = along(&g.$field, &direction);
                assert!((got - slope).abs() < 2e-3 * (1.0 + slope.abs()), "{}: {got} {slope}", stringify!($field));
            )*};
        }
        let id = |x| x;
        check! {
            u: case.u, id; delta: case.delta, id; a: case.a, id; b: case.b, id; c: case.c, id;
            d: case.channel, Some; z: case.z, Some; delta_bias: case.channel, Some; initial: case.initial, Some;
        }
    }
}

#[test]
fn steps_equal_the_scan() {
    let case = Case::new();
    let s = Scan { resets: None, lengths: None, ..case.scan() };
    let [batch, time, channels, states] = SIZES;
    for level in levels() {
        let want = forward(&s, false, 1, level);
        let mut state = case.initial.clone();
        for t in 0..time {
            let cut = |array: &[f32], n: usize| -> Vec<f32> {
                (0..batch).flat_map(|b| array[(b * time + t) * n..(b * time + t + 1) * n].to_vec()).collect()
            };
            let [x, dt, z] = [&case.u, &case.delta, &case.z].map(|array| cut(array, channels));
            let [b, c] = [&case.b, &case.c].map(|array| cut(array, states));
            let step_of = Step {
                batch,
                channels,
                states,
                x: &x,
                dt: &dt,
                a: &case.a,
                b: &b,
                c: &c,
                d: s.d,
                z: Some(&z),
                dt_bias: s.delta_bias,
                softplus: true,
            };
            let y = step(&step_of, &mut state, 1, level);
            let want: Vec<f64> = cut(&want.out, channels).iter().map(|&y| y as f64).collect();
            assert_close(&y, &want, 1e-5);
        }
        assert_close(&state, &want.last.iter().map(|&h| h as f64).collect::<Vec<_>>(), 1e-5);
    }
}

#[test]
fn threads_do_not_change_a_bit() {
    let case = Case::new();
    let s = case.scan();
    let run = |threads| {
        let to = forward(&s, true, threads, Level::best());
        let g = backward(&s, &to.borders, &case.z, Some(&case.initial), threads, Level::best());
        [to.out, to.last, to.borders, g.u, g.delta, g.a, g.b, g.c, g.d, g.z, g.delta_bias, g.initial]
    };
    let first = run(1);
    for threads in [2, 3, 100] {
        assert!(run(threads) == first);
    }
}
