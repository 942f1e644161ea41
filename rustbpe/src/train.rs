//! Learning the merges: byte-pair encoding on counted pieces (Sennrich et al., arXiv:1508.07909, algorithm 1).
//!
//! All pieces lie one after the other in one array of slots, one slot a byte. A token fills as many slots as it has
//! bytes and writes its id in its first and last slot, so both neighbours are found from the lengths of tokens, with no
//! links. Every pair owns the list of positions where it was seen.
//!
//! Two facts make a table of pair counts needless. A pair can only appear while the newer of its two tokens is being
//! made, so its list is complete, and in order, after that one merge; afterwards its count only falls. The heap
//! therefore keeps counts that may be too high. A pair that comes to the top is counted again, exactly: if the count
//! still stands, the pair is the best one, else it goes back with the new count.

use crate::count::Counts;
use crate::{Error, Result};

type Pair = (u32, u32);

const BOUNDARY: u32 = u32::MAX; // between two pieces
const INSIDE: u32 = u32::MAX - 1; // where a token began that is now the right part of a longer one

/// Which of two equally frequent pairs is merged first.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Tie {
    /// The one with the smaller ids, left token first.
    SmallerIds,
    /// The one whose bytes are greater, left token first (the rule of the Stanford CS336 assignment).
    GreaterBytes,
}

/// Learn tokens until there are `vocab_size`, or no pair is left: the 256 bytes, then one token a merge.
///
/// ```
/// use rustbpe::{count::Counter, split::{DEFAULT_PATTERN, Splitter}, train::{Tie, train}};
/// let splitter = Splitter::new(DEFAULT_PATTERN)?;
/// let mut counter = Counter::new(&splitter, 1);
/// counter.add(&["hug hugs pug"])?;
/// let tokens = train(counter.finish(), 258, Tie::SmallerIds)?;
/// assert_eq!(tokens[256..], [b"ug".to_vec(), b"hug".to_vec()]); // 3 times, then 2 times
/// # Ok::<(), rustbpe::Error>(())
/// ```
pub fn train(counts: Counts, vocab_size: usize, tie: Tie) -> Result<Vec<Vec<u8>>> {
    check_vocab_size(vocab_size)?;
    let mut trainer = Trainer::new(counts, tie)?;
    while trainer.tokens.len() < vocab_size && trainer.step() {}
    Ok(trainer.tokens)
}

/// Whether `train` can make so many tokens.
pub fn check_vocab_size(vocab_size: usize) -> Result<()> {
    if (256..INSIDE as usize).contains(&vocab_size) {
        return Ok(());
    }
    Err(Error(format!(
        "vocab_size={vocab_size}, but the 256 single bytes are always part of it: pass 256 or more (below 2**32 - 2)"
    )))
}

#[derive(Clone, Copy)]
struct Slot {
    id: u32,
    weight: u32, // index in `weights`: how often the piece occurs
}

/// A pair with its positions, `positions[start..start + len]`.
#[derive(Clone, Copy)]
struct Candidate {
    count: u64, // never below the true count
    pair: Pair,
    start: u32,
    len: u32,
}

/// What one merge adds next to one neighbour token.
#[derive(Clone, Copy, Default)]
struct Group {
    count: u64,
    len: u32,
    end: u32,
}

struct Trainer {
    tokens: Vec<Vec<u8>>,
    slots: Vec<Slot>,
    weights: Vec<u64>,
    positions: Vec<u32>,
    heap: Heap,
    groups: [Vec<Group>; 2],      // by neighbour id: (neighbour, new) and (new, neighbour)
    touched: [Vec<u32>; 2],       // which groups are in use
    fresh: Vec<(u32, u32, bool)>, // new pairs in order: neighbour, position, whether it is on the right
}

impl Trainer {
    fn new(counts: Counts, tie: Tie) -> Result<Trainer> {
        let (slots, weights) = lay_out(counts)?;
        let tokens = (0..=255u8).map(|b| vec![b]).collect();
        let mut trainer = Trainer {
            tokens,
            slots,
            weights,
            positions: Vec::new(),
            heap: Heap { tie, items: Vec::new() },
            groups: [vec![Group::default(); 256], vec![Group::default(); 256]],
            touched: [Vec::new(), Vec::new()],
            fresh: Vec::new(),
        };
        trainer.first_pairs();
        Ok(trainer)
    }

    /// The pairs of bytes, by counting sort.
    fn first_pairs(&mut self) {
        let mut groups = vec![Group::default(); 1 << 16];
        let index = |a: Slot, b: Slot| (a.id < 256 && b.id < 256).then_some((a.id as usize) << 8 | b.id as usize);
        for two in self.slots.windows(2) {
            if let Some(pair) = index(two[0], two[1]) {
                groups[pair].len += 1;
                groups[pair].count += self.weights[two[0].weight as usize];
            }
        }
        let mut total = 0;
        for (pair, group) in groups.iter_mut().enumerate().filter(|(_, group)| group.len > 0) {
            let pair = (pair as u32 >> 8, pair as u32 & 255);
            self.heap.items.push(Candidate { count: group.count, pair, start: total, len: group.len });
            group.end = total;
            total += group.len;
        }
        self.positions = vec![0; total as usize];
        for (at, two) in self.slots.windows(2).enumerate() {
            if let Some(pair) = index(two[0], two[1]) {
                self.positions[groups[pair].end as usize] = at as u32;
                groups[pair].end += 1;
            }
        }
        for i in (0..self.heap.items.len()).rev() {
            self.heap.sift_down(i, &self.tokens);
        }
    }

    /// Make one token. False when there is no pair left.
    fn step(&mut self) -> bool {
        while let Some(&top) = self.heap.items.first() {
            let exact = self.recount(top);
            if exact.count == top.count {
                self.heap.pop(&self.tokens);
                self.merge(exact);
                return true;
            }
            if exact.count == 0 {
                self.heap.pop(&self.tokens);
            } else {
                self.heap.items[0] = exact;
                self.heap.sift_down(0, &self.tokens);
            }
        }
        false
    }

    /// Drop the positions where the pair is gone, and count the others.
    fn recount(&mut self, mut pair: Candidate) -> Candidate {
        let (left, right) = pair.pair;
        let width = self.tokens[left as usize].len();
        let (start, mut kept) = (pair.start as usize, pair.start as usize);
        pair.count = 0;
        for i in start..start + pair.len as usize {
            let at = self.positions[i] as usize;
            let slot = self.slots[at];
            if slot.id == left && self.slots[at + width].id == right {
                pair.count += self.weights[slot.weight as usize];
                self.positions[kept] = at as u32;
                kept += 1;
            }
        }
        pair.len = (kept - start) as u32;
        pair
    }

    /// Replace the pair by a new token everywhere, and queue the pairs that this makes.
    fn merge(&mut self, found: Candidate) {
        let (left, right) = found.pair;
        let (left_len, right_len) = (self.tokens[left as usize].len(), self.tokens[right as usize].len());
        let width = left_len + right_len;
        let new = self.tokens.len() as u32;
        self.tokens.push([&self.tokens[left as usize][..], &self.tokens[right as usize][..]].concat());
        self.groups.iter_mut().for_each(|groups| groups.push(Group::default()));

        for i in found.start..found.start + found.len {
            let at = self.positions[i as usize] as usize;
            let Slot { id, weight } = self.slots[at];
            if id != left || self.slots[at + left_len].id != right {
                continue; // "aaa": the second "aa" overlaps the first
            }
            self.slots[at].id = new;
            self.slots[at + left_len].id = INSIDE;
            self.slots[at + width - 1].id = new;
            let count = self.weights[weight as usize];
            let before = self.slots[at - 1].id;
            if before != BOUNDARY {
                self.add(before, at - self.tokens[before as usize].len(), false, count);
            }
            let after = self.slots[at + width].id;
            if after != BOUNDARY {
                self.add(after, at, true, count);
            }
        }
        self.queue(new);
    }

    #[inline(always)]
    fn add(&mut self, neighbour: u32, at: usize, right: bool, count: u64) {
        let group = &mut self.groups[usize::from(right)][neighbour as usize];
        if group.len == 0 {
            self.touched[usize::from(right)].push(neighbour);
        }
        group.len += 1;
        group.count += count;
        self.fresh.push((neighbour, at as u32, right));
    }

    /// Turn the pairs that the last merge made into candidates: a counting sort by neighbour.
    fn queue(&mut self, new: u32) {
        let mut total = self.positions.len() as u32;
        for right in [false, true] {
            for &neighbour in &self.touched[usize::from(right)] {
                let group = &mut self.groups[usize::from(right)][neighbour as usize];
                let pair = if right { (new, neighbour) } else { (neighbour, new) };
                self.heap.push(Candidate { count: group.count, pair, start: total, len: group.len }, &self.tokens);
                group.end = total;
                total += group.len;
            }
        }
        self.positions.resize(total as usize, 0);
        for &(neighbour, at, right) in &self.fresh {
            let group = &mut self.groups[usize::from(right)][neighbour as usize];
            self.positions[group.end as usize] = at;
            group.end += 1;
        }
        self.fresh.clear();
        for right in [0, 1] {
            for neighbour in self.touched[right].drain(..) {
                self.groups[right][neighbour as usize] = Group::default();
            }
        }
    }
}

/// The pieces in slots, with a boundary before, between and after them, and the counts that occur.
fn lay_out(counts: Counts) -> Result<(Vec<Slot>, Vec<u64>)> {
    let (mut weights, mut total) = (Vec::new(), 1);
    counts.for_each(|piece, count| {
        weights.push(count);
        total += piece.len() + 1;
    });
    weights.sort_unstable();
    weights.dedup();
    // Each position is listed at most three times: at the start, and twice for each of the merges, of which there are
    // fewer than slots.
    if total > u32::MAX as usize / 3 {
        return Err(Error(format!("{total} bytes of different pieces; at most 2**32 / 3 fit: train on less text")));
    }
    let boundary = Slot { id: BOUNDARY, weight: 0 };
    let mut slots = Vec::with_capacity(total);
    slots.push(boundary);
    counts.for_each(|piece, count| {
        let weight = weights.partition_point(|&w| w < count) as u32;
        slots.extend(piece.iter().map(|&b| Slot { id: b as u32, weight }));
        slots.push(boundary);
    });
    Ok((slots, weights))
}

/// A binary heap with the best candidate first. Not the one of `std`, because a tie may need the bytes of the tokens.
struct Heap {
    tie: Tie,
    items: Vec<Candidate>,
}

impl Heap {
    #[inline]
    fn better(&self, x: &Candidate, y: &Candidate, tokens: &[Vec<u8>]) -> bool {
        if x.count != y.count {
            return x.count > y.count;
        }
        let bytes = |pair: Pair| (&tokens[pair.0 as usize], &tokens[pair.1 as usize]);
        match self.tie {
            Tie::SmallerIds => x.pair < y.pair,
            Tie::GreaterBytes => bytes(x.pair) > bytes(y.pair),
        }
    }

    fn push(&mut self, item: Candidate, tokens: &[Vec<u8>]) {
        let mut i = self.items.len();
        self.items.push(item);
        while i > 0 && self.better(&item, &self.items[(i - 1) / 2], tokens) {
            self.items[i] = self.items[(i - 1) / 2];
            i = (i - 1) / 2;
        }
        self.items[i] = item;
    }

    fn pop(&mut self, tokens: &[Vec<u8>]) {
        self.items.swap_remove(0);
        self.sift_down(0, tokens);
    }

    fn sift_down(&mut self, mut i: usize, tokens: &[Vec<u8>]) {
        let Some(&item) = self.items.get(i) else { return };
        loop {
            let mut child = 2 * i + 1;
            if child + 1 < self.items.len() && self.better(&self.items[child + 1], &self.items[child], tokens) {
                child += 1;
            }
            if child >= self.items.len() || !self.better(&self.items[child], &item, tokens) {
                break;
            }
            self.items[i] = self.items[child];
            i = child;
        }
        self.items[i] = item;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::table::Key;

    /// The definition: count all pairs anew for every merge.
    fn naive(words: &[(Vec<u8>, u64)], vocab_size: usize, tie: Tie) -> Vec<Vec<u8>> {
        let mut words: Vec<(Vec<Vec<u8>>, u64)> =
            words.iter().map(|(w, n)| (w.iter().map(|&b| vec![b]).collect(), *n)).collect();
        let mut tokens: Vec<Vec<u8>> = (0..=255u8).map(|b| vec![b]).collect();
        while tokens.len() < vocab_size {
            let mut counts: HashMap<(Vec<u8>, Vec<u8>), u64> = HashMap::new();
            for (word, n) in &words {
                word.windows(2).for_each(|p| *counts.entry((p[0].clone(), p[1].clone())).or_default() += n);
            }
            let id = |t: &Vec<u8>| tokens.iter().position(|x| x == t).unwrap(); // no token is made twice
            let best = counts.into_iter().max_by(|((a, b), n), ((c, d), m)| {
                n.cmp(m).then_with(|| match tie {
                    Tie::SmallerIds => (id(c), id(d)).cmp(&(id(a), id(b))),
                    Tie::GreaterBytes => (a, b).cmp(&(c, d)),
                })
            });
            let Some(((a, b), _)) = best else { break };
            let new = [&a[..], &b[..]].concat();
            for (word, _) in &mut words {
                let mut i = 0;
                while i + 1 < word.len() {
                    if word[i] == a && word[i + 1] == b {
                        word[i] = new.clone();
                        word.remove(i + 1);
                    }
                    i += 1;
                }
            }
            tokens.push(new);
        }
        tokens
    }

    fn table(words: &[(Vec<u8>, u64)]) -> Counts {
        let mut counts = Counts::default();
        words.iter().for_each(|(w, n)| *counts.slot(&Key::new(w, 0, w.len()), w) += n);
        counts
    }

    #[test]
    fn merges_are_those_of_the_definition() {
        let mut state = 7u64;
        let mut random = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for round in 0..60 {
            let letters = 1 + round % 4;
            let mut words: HashMap<Vec<u8>, u64> = HashMap::new();
            for _ in 0..random(30) {
                let word = (0..1 + random(20)).map(|_| b'a' + random(letters) as u8).collect();
                *words.entry(word).or_default() += 1 + random(3);
            }
            let words: Vec<_> = words.into_iter().collect();
            for tie in [Tie::SmallerIds, Tie::GreaterBytes] {
                assert_eq!(train(table(&words), 300, tie).unwrap(), naive(&words, 300, tie), "{tie:?} {words:?}");
            }
        }
    }

    #[test]
    fn counts_beyond_32_bits_keep_their_order() {
        let words = [(b"ab".to_vec(), 1 << 33), (b"cd".to_vec(), (1 << 33) + 1)];
        assert_eq!(train(table(&words), 257, Tie::SmallerIds).unwrap()[256], b"cd");
    }

    #[test]
    fn vocab_size_below_256_is_refused() {
        assert!(train(Counts::default(), 255, Tie::SmallerIds).unwrap_err().to_string().contains("256"));
    }
}
