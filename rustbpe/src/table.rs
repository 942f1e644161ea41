//! A hash table from pieces (byte strings) to small values, made for many look-ups of short keys.
//!
//! A piece of at most 15 bytes is its own key: its bytes and its length fill 16 bytes, so a look-up touches one place
//! and compares two words. A longer piece is kept in an arena and compared there. Open addressing, linear probing.

const INLINE: usize = 15;
const LONG: u64 = 0xff << 56;

/// By length: what to keep of 16 bytes.
const MASKS: [[u64; 2]; INLINE + 1] = {
    let mut masks = [[0; 2]; INLINE + 1];
    let mut len = 0;
    while len <= INLINE {
        let mask = (1u128 << (8 * len)) - 1;
        masks[len] = [mask as u64, (mask >> 64) as u64];
        len += 1;
    }
    masks
};

/// A piece made ready for look-up. `b` ends in the length, or in 255 for a long piece; it is never 0.
#[derive(Clone, Copy)]
pub struct Key {
    a: u64,
    b: u64,
    hash: u64,
}

impl Key {
    /// The key of `text[start..end]`. Takes the whole text because it reads 16 bytes at once.
    #[inline(always)]
    pub fn new(text: &[u8], start: usize, end: usize) -> Key {
        let len = end - start;
        if len > INLINE {
            let hash = hash_long(&text[start..end]);
            return Key { a: hash, b: LONG, hash };
        }
        let raw = match text.get(start..start + 16) {
            Some(sixteen) => u128::from_le_bytes(sixteen.try_into().expect("16 bytes")),
            None => {
                let mut sixteen = [0; 16];
                sixteen[..len].copy_from_slice(&text[start..end]);
                u128::from_le_bytes(sixteen)
            }
        };
        let [a, b] = MASKS[len];
        Key::short(raw as u64 & a, (raw >> 64) as u64 & b | (len as u64) << 56)
    }

    #[inline(always)]
    fn short(a: u64, b: u64) -> Key {
        Key { a, b, hash: fold(a ^ 0x9e37_79b9_7f4a_7c15, b ^ 0xd1b5_4a32_d192_ed03) }
    }

    fn is_long(&self) -> bool {
        self.b >= LONG
    }
}

/// Both halves of a 128-bit product, mixed.
#[inline(always)]
fn fold(x: u64, y: u64) -> u64 {
    let product = x as u128 * y as u128;
    product as u64 ^ (product >> 64) as u64
}

fn hash_long(bytes: &[u8]) -> u64 {
    let mut hash = bytes.len() as u64 ^ 0xa076_1d64_78bd_642f;
    for chunk in bytes.chunks(8) {
        let mut eight = [0; 8];
        eight[..chunk.len()].copy_from_slice(chunk);
        hash = fold(hash ^ u64::from_le_bytes(eight), 0x9e37_79b9_7f4a_7c15);
    }
    hash
}

#[derive(Clone, Copy, Default)]
struct Entry<V> {
    a: u64,
    b: u64, // 0: empty
    value: V,
}

/// Pieces and a value for each.
pub struct Table<V> {
    entries: Vec<Entry<V>>,
    len: usize,
    arena: Vec<u8>, // of each long piece its length in 8 bytes, then the piece
}

impl<V: Copy + Default> Default for Table<V> {
    fn default() -> Self {
        Table::with_room(0)
    }
}

impl<V: Copy + Default> Table<V> {
    /// A table that `pieces` pieces fill to a half at most.
    pub fn with_room(pieces: usize) -> Self {
        let entries = vec![Entry::default(); (2 * pieces).next_power_of_two().max(1 << 10)];
        Table { entries, len: 0, arena: Vec::new() }
    }

    /// Number of pieces.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no piece.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes held for long pieces.
    pub fn arena_len(&self) -> usize {
        self.arena.len()
    }

    /// Forget all pieces, keep the memory.
    pub fn clear(&mut self) {
        self.entries.fill(Entry::default());
        self.arena.clear();
        self.len = 0;
    }

    /// The value of `piece`, whose key is `key`.
    #[inline(always)]
    pub fn get(&self, key: &Key, piece: &[u8]) -> Option<V> {
        let entry = &self.entries[self.find(key, piece)];
        (entry.b != 0).then_some(entry.value)
    }

    /// The value of `piece` to change in place; a new piece starts with the default.
    ///
    /// ```
    /// use rustbpe::table::{Key, Table};
    /// let mut counts: Table<u64> = Table::default();
    /// let text = b"a b a";
    /// for (start, end) in [(0, 1), (2, 3), (4, 5)] {
    ///     *counts.slot(&Key::new(text, start, end), &text[start..end]) += 1;
    /// }
    /// assert_eq!(counts.get(&Key::new(b"a", 0, 1), b"a"), Some(2));
    /// ```
    #[inline(always)]
    pub fn slot(&mut self, key: &Key, piece: &[u8]) -> &mut V {
        let i = self.find(key, piece);
        if self.entries[i].b != 0 {
            return &mut self.entries[i].value;
        }
        self.insert(i, key, piece)
    }

    #[inline(never)]
    fn insert(&mut self, mut i: usize, key: &Key, piece: &[u8]) -> &mut V {
        if self.len * 4 >= self.entries.len() * 3 {
            self.grow();
            i = self.find(key, piece);
        }
        let mut b = key.b;
        if key.is_long() {
            b |= self.arena.len() as u64; // the offset, below the mark
            self.arena.extend_from_slice(&(piece.len() as u64).to_le_bytes());
            self.arena.extend_from_slice(piece);
        }
        self.len += 1;
        self.entries[i] = Entry { a: key.a, b, value: V::default() };
        &mut self.entries[i].value
    }

    /// Ask for the memory that a look-up of `key` reads first: by the time of the look-up it may be there.
    #[inline(always)]
    pub fn prefetch(&self, key: &Key) {
        prefetch(&self.entries[key.hash as usize & (self.entries.len() - 1)]);
    }

    /// Index of the entry of `piece`, or of the empty one where it belongs.
    #[inline(always)]
    fn find(&self, key: &Key, piece: &[u8]) -> usize {
        let mask = self.entries.len() - 1;
        let mut i = key.hash as usize & mask;
        loop {
            let entry = &self.entries[i];
            let hit = if key.is_long() {
                entry.a == key.a && entry.b >= LONG && self.long(entry) == piece
            } else {
                entry.a == key.a && entry.b == key.b
            };
            if hit || entry.b == 0 {
                return i;
            }
            i = (i + 1) & mask;
        }
    }

    fn long(&self, entry: &Entry<V>) -> &[u8] {
        let start = (entry.b ^ LONG) as usize;
        let mut len = [0; 8];
        len.copy_from_slice(&self.arena[start..start + 8]);
        &self.arena[start + 8..start + 8 + u64::from_le_bytes(len) as usize]
    }

    fn grow(&mut self) {
        let bigger = vec![Entry::default(); self.entries.len() * 2];
        let mask = bigger.len() - 1;
        for entry in std::mem::replace(&mut self.entries, bigger) {
            if entry.b == 0 {
                continue;
            }
            let hash = if entry.b >= LONG { entry.a } else { Key::short(entry.a, entry.b).hash };
            let mut i = hash as usize & mask;
            while self.entries[i].b != 0 {
                i = (i + 1) & mask;
            }
            self.entries[i] = entry;
        }
    }

    /// All values, in no particular order.
    pub fn values_mut(&mut self) -> impl Iterator<Item = &mut V> {
        self.entries.iter_mut().filter(|entry| entry.b != 0).map(|entry| &mut entry.value)
    }

    /// Call `visit(piece, value)` for every piece, in no particular order.
    pub fn for_each(&self, mut visit: impl FnMut(&[u8], V)) {
        for entry in self.entries.iter().filter(|e| e.b != 0) {
            if entry.b >= LONG {
                visit(self.long(entry), entry.value);
            } else {
                let bytes = (entry.a as u128 | (entry.b as u128) << 64).to_le_bytes();
                visit(&bytes[..(entry.b >> 56) as usize], entry.value);
            }
        }
    }
}

/// Nothing where the standard library has no such instruction.
#[allow(unsafe_code)]
#[inline(always)]
fn prefetch<T>(_place: &T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: SSE, which every x86_64 has; it reads nothing into the program, and the place is a valid one.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(std::ptr::from_ref(_place).cast());
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn a_table_agrees_with_a_hash_map() {
        let text: Vec<u8> = (0..40_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8 % 3).collect();
        let (mut table, mut map) = (Table::<u64>::default(), HashMap::<Vec<u8>, u64>::new());
        let mut start = 0;
        for len in (1..=24).cycle() {
            if start + len > text.len() {
                break;
            }
            *table.slot(&Key::new(&text, start, start + len), &text[start..start + len]) += 1;
            *map.entry(text[start..start + len].to_vec()).or_default() += 1;
            start += len;
        }
        assert_eq!(table.len(), map.len());
        table.for_each(|piece, count| assert_eq!(map[piece], count));
        for piece in map.keys() {
            assert_eq!(table.get(&Key::new(piece, 0, piece.len()), piece), map.get(piece).copied());
        }
        let absent = [9; 20];
        assert_eq!(table.get(&Key::new(&absent, 0, 20), &absent), None);
        table.clear();
        assert!(table.is_empty());
    }

    #[test]
    fn zero_bytes_and_lengths_are_told_apart() {
        let mut table = Table::<u64>::default();
        let zeros = [0u8; 40];
        for len in 1..=40 {
            *table.slot(&Key::new(&zeros, 0, len), &zeros[..len]) += len as u64;
        }
        for len in 1..=40 {
            assert_eq!(table.get(&Key::new(&zeros, 0, len), &zeros[..len]), Some(len as u64));
        }
    }
}
