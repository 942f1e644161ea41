//! Text to token ids: cut it into pieces, look each up, merge what is not known.
//!
//! Most pieces are one token and are found in the vocabulary. The others are looked up in a cache of pieces merged
//! before, one a thread, which is kept from call to call and has a bounded size. Memory is what a look-up waits for, so
//! pieces are taken in batches: the places where a batch will look are prefetched. Merging takes the pair of lowest rank
//! first, the leftmost of equals, as tiktoken does.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::split::Splitter;
use crate::table::{Key, Table};
use crate::{Error, Result};

const NO_RANK: u32 = u32::MAX;
const CHUNK: usize = 1 << 16; // bytes of text a thread takes at a time
const LONG_PIECE: usize = 128; // bytes from which merging uses a heap; longer pieces are not cached
const BATCH: usize = 64; // pieces that are cut and prefetched before the first is looked up
const CACHE_PIECES: usize = 3 << 17; // 24 bytes each, in a table that is 3/8 to 3/4 full
const CACHE_IDS: usize = 1 << 21; // 8 MB
const CACHE_BYTES: usize = 1 << 23; // of pieces longer than 15 bytes

/// Encodes with a fixed vocabulary, in which a token's id is its rank.
pub struct Encoder {
    splitter: Splitter,
    vocab: Table<u32>,
    bytes: [u32; 256], // the id of each byte
    pairs: Vec<u32>,   // the id of each two bytes, or NO_RANK
    longest: usize,    // bytes in the longest token
    max_id: u32,
    caches: Mutex<Vec<Cache>>, // those not in use
}

/// An integer type for ids: `u16` holds those of a vocabulary below 65536, `u32` all.
pub trait Id: Copy + Send {
    const MAX: u32;
    fn new(id: u32) -> Self;
}

impl Id for u16 {
    const MAX: u32 = u16::MAX as u32;
    fn new(id: u32) -> u16 {
        id as u16
    }
}

impl Id for u32 {
    const MAX: u32 = u32::MAX;
    fn new(id: u32) -> u32 {
        id
    }
}

/// What is known about pieces, and room to merge in.
#[derive(Default)]
struct Cache {
    table: Table<Known>,
    ids: Vec<u32>,
    pieces: Vec<Piece>, // of a batch
    parts: Vec<Part>,   // of a piece
}

/// The ids of a piece that is no token: `ids[at..at + len]`.
#[derive(Clone, Copy, Default)]
struct Known {
    at: u32,
    len: u32,
}

/// A token of a piece that is being merged.
#[derive(Clone, Copy)]
struct Part {
    start: usize,
    id: u32,
    rank: u32, // of this part and the next taken together
}

/// A piece of a text, and its key.
struct Piece {
    start: usize,
    end: usize,
    key: Key,
}

impl Piece {
    fn bytes<'a>(&self, text: &'a [u8]) -> &'a [u8] {
        &text[self.start..self.end]
    }
}

/// The ids of many texts: those of text i are `ids[offsets[i]..offsets[i + 1]]`.
pub struct Batch<T> {
    pub ids: Vec<T>,
    pub offsets: Vec<i64>,
}

impl<T> Default for Batch<T> {
    fn default() -> Self {
        Batch { ids: Vec::new(), offsets: vec![0] }
    }
}

impl Encoder {
    /// An encoder for the tokens and ranks that training (or a tiktoken file) gives; every byte must be a token.
    ///
    /// ```
    /// use rustbpe::{encode::Encoder, split::{DEFAULT_PATTERN, Splitter}};
    /// let mut ranks: Vec<(Vec<u8>, u32)> = (0..=255).map(|b| (vec![b], b as u32)).collect();
    /// ranks.push((b"hi".to_vec(), 256));
    /// let encoder = Encoder::new(&ranks, Splitter::new(DEFAULT_PATTERN)?)?;
    /// assert_eq!(encoder.encode("hi!")?, [256, 33]);
    /// # Ok::<(), rustbpe::Error>(())
    /// ```
    pub fn new(ranks: &[(Vec<u8>, u32)], splitter: Splitter) -> Result<Encoder> {
        let mut vocab = Table::<u32>::with_room(ranks.len());
        let (mut bytes, mut pairs) = ([NO_RANK; 256], vec![NO_RANK; 1 << 16]);
        let (mut longest, mut max_id) = (0, 0);
        for (token, rank) in ranks {
            if token.is_empty() || *rank == NO_RANK {
                return Err(Error(format!(
                    "token {token:?} with rank {rank}: tokens have bytes, ranks are below 2**32 - 1"
                )));
            }
            let id = vocab.slot(&Key::new(token, 0, token.len()), token); // 0 if new: rank + 1 is stored until all are in
            if *id != 0 {
                return Err(Error(format!(
                    "token {token:?} occurs twice, with ranks {} and {rank}: drop one",
                    *id - 1
                )));
            }
            *id = rank + 1;
            match token[..] {
                [b] => bytes[b as usize] = *rank,
                [a, b] => pairs[usize::from(a) << 8 | usize::from(b)] = *rank,
                _ => {}
            }
            longest = longest.max(token.len());
            max_id = max_id.max(*rank);
        }
        vocab.values_mut().for_each(|id| *id -= 1);
        if let Some(missing) = bytes.iter().position(|&id| id == NO_RANK) {
            return Err(Error(format!(
                "no token for byte 0x{missing:02x}: mergeable_ranks must hold all 256 single bytes (rustbpe.train gives them)"
            )));
        }
        let mut seen: Vec<u32> = ranks.iter().map(|(_, rank)| *rank).collect();
        seen.sort_unstable();
        if let Some(two) = seen.windows(2).find(|two| two[0] == two[1]) {
            return Err(Error(format!("two tokens have rank {}: every token needs its own", two[0])));
        }
        Ok(Encoder { splitter, vocab, bytes, pairs, longest, max_id, caches: Mutex::default() })
    }

    /// The greatest id.
    pub fn max_id(&self) -> u32 {
        self.max_id
    }

    /// The ids of one text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        self.with_cache(|cache| {
            let mut ids = Vec::new();
            self.encode_into(text, cache, &mut ids)?;
            Ok(ids)
        })
    }

    /// Append the ids of many texts. The result does not depend on the number of threads. `T` must hold `max_id`.
    ///
    /// ```
    /// # use rustbpe::{encode::{Batch, Encoder}, split::{DEFAULT_PATTERN, Splitter}};
    /// # let ranks: Vec<(Vec<u8>, u32)> = (0..=255).map(|b| (vec![b], b as u32)).collect();
    /// # let encoder = Encoder::new(&ranks, Splitter::new(DEFAULT_PATTERN)?)?;
    /// let mut batch: Batch<u16> = Batch::default();
    /// encoder.extend(&mut batch, &["hi", "", "!"], 2)?;
    /// assert_eq!((batch.ids, batch.offsets), (vec![104, 105, 33], vec![0, 2, 2, 3]));
    /// # Ok::<(), rustbpe::Error>(())
    /// ```
    pub fn extend<T: Id>(&self, batch: &mut Batch<T>, texts: &[&str], threads: usize) -> Result<()> {
        assert!(self.max_id <= T::MAX, "max_id={} does not fit the type of ids", self.max_id);
        let chunks = chunks(texts);
        let threads = threads.min(chunks.len());
        if threads <= 1 {
            return self.with_cache(|cache| self.extend_with(cache, batch, texts));
        }
        let next = AtomicUsize::new(0);
        let work = || {
            self.with_cache(|cache| {
                let mut done = Vec::new();
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let Some(chunk) = chunks.get(i) else { return Ok(done) };
                    let mut part = Batch::<T>::default();
                    self.extend_with(cache, &mut part, &texts[chunk.clone()])?;
                    done.push((i, part));
                }
            })
        };
        let mut done = std::thread::scope(|scope| -> Result<Vec<_>> {
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mut done = work()?;
            for thread in others {
                done.extend(thread.join().expect("an encoding thread panicked")?);
            }
            Ok(done)
        })?;
        done.sort_unstable_by_key(|(i, _)| *i);
        batch.ids.reserve(done.iter().map(|(_, part)| part.ids.len()).sum());
        for (_, part) in done {
            let base = batch.ids.len() as i64;
            batch.offsets.extend(part.offsets[1..].iter().map(|offset| base + offset));
            batch.ids.extend_from_slice(&part.ids);
        }
        Ok(())
    }

    fn extend_with<T: Id>(&self, cache: &mut Cache, batch: &mut Batch<T>, texts: &[&str]) -> Result<()> {
        batch.ids.reserve(texts.iter().map(|text| text.len()).sum::<usize>() / 4);
        for text in texts {
            self.encode_into(text, cache, &mut batch.ids)?;
            batch.offsets.push(batch.ids.len() as i64);
        }
        Ok(())
    }

    /// Lend a cache to `work`: one that an earlier call left, or a new one.
    fn with_cache<T>(&self, work: impl FnOnce(&mut Cache) -> Result<T>) -> Result<T> {
        let caches = || self.caches.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut cache = caches().pop().unwrap_or_default();
        let result = work(&mut cache);
        caches().push(cache);
        result
    }

    fn encode_into<T: Id>(&self, text: &str, cache: &mut Cache, out: &mut Vec<T>) -> Result<()> {
        let bytes = text.as_bytes();
        let mut pieces = std::mem::take(&mut cache.pieces);
        pieces.clear();
        self.splitter.for_each(text, |start, end| {
            let key = Key::new(bytes, start, end);
            self.vocab.prefetch(&key);
            pieces.push(Piece { start, end, key });
            if pieces.len() == BATCH {
                self.encode_batch(bytes, &pieces, cache, out);
                pieces.clear();
            }
        })?;
        self.encode_batch(bytes, &pieces, cache, out);
        cache.pieces = pieces;
        Ok(())
    }

    /// Append the ids of a batch: first look up the tokens, then the rest, which has been prefetched by then.
    #[inline(never)]
    fn encode_batch<T: Id>(&self, text: &[u8], pieces: &[Piece], cache: &mut Cache, out: &mut Vec<T>) {
        let mut tokens = [NO_RANK; BATCH];
        for (token, piece) in tokens.iter_mut().zip(pieces) {
            match self.vocab.get(&piece.key, piece.bytes(text)) {
                Some(id) => *token = id,
                None => cache.table.prefetch(&piece.key),
            }
        }
        out.reserve(BATCH);
        for (&token, piece) in tokens.iter().zip(pieces) {
            match token {
                NO_RANK => self.encode_other(text, piece, cache, out),
                id => out.push(T::new(id)),
            }
        }
    }

    /// A piece that is no token: take its ids from the cache, or merge it and remember it unless it is long.
    fn encode_other<T: Id>(&self, text: &[u8], piece: &Piece, cache: &mut Cache, out: &mut Vec<T>) {
        let bytes = piece.bytes(text);
        if let Some(Known { at, len }) = cache.table.get(&piece.key, bytes) {
            return out.extend(cache.ids[at as usize..][..len as usize].iter().map(|&id| T::new(id)));
        }
        if bytes.len() >= LONG_PIECE {
            return self.merge_long(bytes, |id| out.push(T::new(id)));
        }
        self.merge(text, piece.start, piece.end, &mut cache.parts);
        out.extend(cache.parts.iter().map(|part| T::new(part.id)));
        if cache.table.len() >= CACHE_PIECES || cache.ids.len() >= CACHE_IDS || cache.table.arena_len() >= CACHE_BYTES {
            cache.ids.clear();
            cache.table.clear();
        }
        *cache.table.slot(&piece.key, bytes) = Known { at: cache.ids.len() as u32, len: cache.parts.len() as u32 };
        cache.ids.extend(cache.parts.iter().map(|part| part.id));
    }

    /// Rank of `text[start..end]` as a token, or NO_RANK.
    #[inline(always)]
    fn rank(&self, text: &[u8], start: usize, end: usize) -> u32 {
        match end - start {
            2 => self.pairs[usize::from(text[start]) << 8 | usize::from(text[start + 1])],
            len if len > self.longest => NO_RANK,
            _ => self.vocab.get(&Key::new(text, start, end), &text[start..end]).unwrap_or(NO_RANK),
        }
    }

    /// Merge `text[start..end]` by scanning for the lowest rank: quadratic, but the fastest way for short pieces.
    fn merge(&self, text: &[u8], start: usize, end: usize, parts: &mut Vec<Part>) {
        parts.clear();
        for at in start..end {
            let rank = if at + 1 < end { self.rank(text, at, at + 2) } else { NO_RANK };
            parts.push(Part { start: at, id: self.bytes[usize::from(text[at])], rank });
        }
        loop {
            let (mut best, mut rank) = (0, NO_RANK);
            for (i, part) in parts.iter().enumerate() {
                if part.rank < rank {
                    (best, rank) = (i, part.rank);
                }
            }
            if rank == NO_RANK {
                return;
            }
            parts[best].id = rank;
            parts.remove(best + 1);
            // A part reaches to where the one after the next begins.
            let end_of_two = |parts: &[Part], i: usize| parts.get(i + 2).map_or(end, |part| part.start);
            let joined = |parts: &[Part], i: usize| match i + 1 < parts.len() {
                true => self.rank(text, parts[i].start, end_of_two(parts, i)),
                false => NO_RANK,
            };
            parts[best].rank = joined(parts, best);
            if best > 0 {
                parts[best - 1].rank = joined(parts, best - 1);
            }
        }
    }

    /// The same for a long piece: a heap of pairs and linked parts, n log n.
    fn merge_long(&self, piece: &[u8], mut visit: impl FnMut(u32)) {
        let n = piece.len();
        // By start of a part: where the next begins, where the one before began, and the parts' own ids and ranks.
        let mut next: Vec<usize> = (1..=n).collect();
        let mut before: Vec<usize> = (0..n).map(|i| i.wrapping_sub(1)).collect();
        let mut ids: Vec<u32> = piece.iter().map(|&b| self.bytes[usize::from(b)]).collect();
        let mut ranks: Vec<u32> =
            (0..n).map(|i| if i + 1 < n { self.rank(piece, i, i + 2) } else { NO_RANK }).collect();
        let mut heap: BinaryHeap<Reverse<(u32, usize)>> = ranks
            .iter()
            .enumerate()
            .filter(|(_, rank)| **rank != NO_RANK)
            .map(|(i, rank)| Reverse((*rank, i)))
            .collect();
        while let Some(Reverse((rank, at))) = heap.pop() {
            if ranks[at] != rank {
                continue; // the pair is gone
            }
            let middle = next[at];
            let after = next[middle];
            ids[at] = rank;
            ranks[middle] = NO_RANK;
            next[at] = after;
            if after < n {
                before[after] = at;
            }
            let mut update = |i: usize| {
                let middle = next[i];
                ranks[i] = if middle < n { self.rank(piece, i, next[middle]) } else { NO_RANK };
                if ranks[i] != NO_RANK {
                    heap.push(Reverse((ranks[i], i)));
                }
            };
            update(at);
            if at > 0 {
                update(before[at]);
            }
        }
        let mut at = 0;
        while at < n {
            visit(ids[at]);
            at = next[at];
        }
    }
}

/// Runs of texts of about CHUNK bytes each.
fn chunks(texts: &[&str]) -> Vec<Range<usize>> {
    let (mut all, mut start, mut bytes) = (Vec::new(), 0, 0);
    for (i, text) in texts.iter().enumerate() {
        bytes += text.len() + 1;
        if bytes >= CHUNK || i + 1 == texts.len() {
            all.push(start..i + 1);
            (start, bytes) = (i + 1, 0);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::count::Counter;
    use crate::split::DEFAULT_PATTERN;
    use crate::train::{Tie, train};

    fn encoder(vocab_size: usize, texts: &[&str]) -> (Encoder, Vec<(Vec<u8>, u32)>) {
        let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
        let mut counter = Counter::new(&splitter, 1);
        counter.add(texts).unwrap();
        let tokens = train(counter.finish(), vocab_size, Tie::SmallerIds).unwrap();
        let ranks: Vec<_> = tokens.into_iter().zip(0..).collect();
        (Encoder::new(&ranks, splitter).unwrap(), ranks)
    }

    /// The definition: merge the lowest rank until none is left.
    fn naive(piece: &[u8], ranks: &[(Vec<u8>, u32)]) -> Vec<u32> {
        let rank = |t: &[u8]| ranks.iter().find(|(token, _)| token == t).map(|(_, rank)| *rank);
        let mut parts: Vec<Vec<u8>> = piece.iter().map(|&b| vec![b]).collect();
        let best = |parts: &[Vec<u8>]| {
            let pairs = parts.windows(2).enumerate();
            pairs.filter_map(|(i, p)| rank(&p.concat()).map(|r| (r, i))).min()
        };
        while let Some((_, i)) = best(&parts) {
            let right = parts.remove(i + 1);
            parts[i].extend(right);
        }
        parts.iter().map(|p| rank(p).unwrap()).collect()
    }

    #[test]
    fn both_ways_to_merge_agree_with_the_definition() {
        let text = "abracadabra banana bandana aaaa aaaaaaaa cabana canada arcade badaaa";
        let (encoder, ranks) = encoder(290, &[text]);
        let mut state = 3u64;
        for _ in 0..300 {
            let piece: Vec<u8> = (0..40)
                .map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    b"abcdrn"[(state >> 33) as usize % 6]
                })
                .collect();
            let (mut parts, mut long) = (vec![], vec![]);
            encoder.merge(&piece, 0, piece.len(), &mut parts);
            encoder.merge_long(&piece, |id| long.push(id));
            let expected = naive(&piece, &ranks);
            assert_eq!(parts.iter().map(|p| p.id).collect::<Vec<_>>(), expected);
            assert_eq!(long, expected);
        }
    }

    #[test]
    fn threads_and_the_cache_do_not_change_the_ids() {
        let texts: Vec<String> =
            (0..3000).map(|i| format!("text {i} über {} naïve words, \n\n again", i * i)).collect();
        let texts: Vec<&str> = texts.iter().map(|t| &t[..]).collect();
        let (encoder, _) = encoder(400, &texts[..50]);
        let batch = |threads| {
            let mut batch = Batch::<u16>::default();
            encoder.extend(&mut batch, &texts[..1000], threads).unwrap();
            encoder.extend(&mut batch, &texts[1000..], threads).unwrap();
            (batch.ids, batch.offsets)
        };
        let first = batch(1);
        for threads in [1, 2, 3] {
            assert_eq!(batch(threads), first);
        }
        let one_by_one: Vec<u32> = texts.iter().flat_map(|t| encoder.encode(t).unwrap()).collect();
        assert_eq!(first.0.into_iter().map(u32::from).collect::<Vec<_>>(), one_by_one);
    }

    #[test]
    fn broken_vocabularies_are_refused() {
        let bytes: Vec<(Vec<u8>, u32)> = (0..=255).map(|b| (vec![b], b as u32)).collect();
        let error = |ranks: &[(Vec<u8>, u32)]| {
            let splitter = Splitter::new(DEFAULT_PATTERN).unwrap();
            Encoder::new(ranks, splitter).err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert!(error(&bytes[1..]).contains("0x00"));
        assert!(error(&[&bytes[..], &[(vec![7], 300)]].concat()).contains("twice"));
        assert!(error(&[&bytes[..], &[(vec![7, 7], 255)]].concat()).contains("rank 255"));
        assert!(error(&[&bytes[..], &[(vec![], 256)]].concat()).contains("tokens have bytes"));
    }
}
