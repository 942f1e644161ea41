//! Character classes as bit flags: one table lookup per character instead of a regex engine.
//!
//! The classes come from `regex-syntax`, the tables behind the `regex` crate, so `\p{L}` here and in a regex agree.

use std::sync::OnceLock;

use regex_syntax::hir::{Class, HirKind};

/// `\p{L}`
pub const LETTER: u8 = 1;
/// `\p{N}`
pub const NUMBER: u8 = 2;
/// `\s`
pub const SPACE: u8 = 4;
/// `[\r\n]`
pub const NEWLINE: u8 = 8;
/// `[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]`: what o200k calls the head of a word
pub const UPPER: u8 = 16;
/// `[\p{Ll}\p{Lm}\p{Lo}\p{M}]`: what o200k calls the tail of a word
pub const LOWER: u8 = 32;

const PAGE: usize = 256;

const CLASSES: [(&str, u8); 6] = [
    (r"\p{L}", LETTER),
    (r"\p{N}", NUMBER),
    (r"\s", SPACE),
    (r"[\r\n]", NEWLINE),
    (r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", UPPER),
    (r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", LOWER),
];

/// Flags of the 128 ASCII characters, known at compile time.
const ASCII: [u8; 128] = ascii();

const fn ascii() -> [u8; 128] {
    let mut table = [0; 128];
    let mut b = 0;
    while b < 128 {
        table[b as usize] = match b {
            b'A'..=b'Z' => LETTER | UPPER,
            b'a'..=b'z' => LETTER | LOWER,
            b'0'..=b'9' => NUMBER,
            b'\r' | b'\n' => SPACE | NEWLINE,
            b'\t' | 0x0b | 0x0c | b' ' => SPACE,
            _ => 0,
        };
        b += 1;
    }
    table
}

/// Two levels: the page of a code point, then its flags. Equal pages are stored once (about 50 KB in all).
pub struct Classes {
    pages: Vec<u16>,
    flags: Vec<u8>,
}

impl Classes {
    /// The tables, built on first use (a few milliseconds).
    ///
    /// ```
    /// use rustbpe::unicode::{Classes, LETTER, SPACE};
    /// let classes = Classes::get();
    /// assert_eq!(classes.at("é".as_bytes(), 0).0 & LETTER, LETTER);
    /// assert_eq!(classes.at("\u{3000}".as_bytes(), 0), (SPACE, 3)); // flags, bytes
    /// ```
    pub fn get() -> &'static Classes {
        static TABLES: OnceLock<Classes> = OnceLock::new();
        TABLES.get_or_init(Classes::build)
    }

    fn build() -> Classes {
        let mut all = vec![0u8; 0x11_0000];
        for (pattern, flag) in CLASSES {
            let hir = regex_syntax::parse(pattern).expect("a constant pattern");
            let HirKind::Class(Class::Unicode(class)) = hir.kind() else {
                unreachable!("{pattern} is a Unicode class")
            };
            for range in class.ranges() {
                for flags in &mut all[range.start() as usize..=range.end() as usize] {
                    *flags |= flag;
                }
            }
        }
        let mut classes = Classes { pages: Vec::new(), flags: Vec::new() };
        for page in all.chunks(PAGE) {
            let known = classes.flags.chunks(PAGE).position(|seen| seen == page);
            classes.pages.push(known.unwrap_or(classes.flags.len() / PAGE) as u16);
            if known.is_none() {
                classes.flags.extend_from_slice(page);
            }
        }
        classes
    }

    /// Flags and length in bytes of the character that starts at `text[i]`; `text` is UTF-8, `i` a boundary in it.
    #[inline(always)]
    pub fn at(&self, text: &[u8], i: usize) -> (u8, usize) {
        let b = text[i];
        if b < 128 { (ASCII[b as usize], 1) } else { self.wide(text, i) }
    }

    fn wide(&self, text: &[u8], i: usize) -> (u8, usize) {
        let tail = |k: usize| (text[i + k] & 0x3f) as usize;
        let (point, width) = match text[i] {
            b @ 0..0xe0 => ((b as usize & 0x1f) << 6 | tail(1), 2),
            b @ 0xe0..0xf0 => ((b as usize & 0x0f) << 12 | tail(1) << 6 | tail(2), 3),
            b => ((b as usize & 0x07) << 18 | tail(1) << 12 | tail(2) << 6 | tail(3), 4),
        };
        (self.flags[self.pages[point / PAGE] as usize * PAGE + point % PAGE], width)
    }
}

/// Bit i says what `is` says of byte i. Sixteen bytes a step where `is` is made of comparisons.
///
/// ```
/// use rustbpe::unicode::mask;
/// assert_eq!(mask(&[b'a'; 64], |b| b == b'a'), u64::MAX);
/// ```
#[inline(always)]
pub fn mask(bytes: &[u8; 64], is: impl Fn(u8) -> bool) -> u64 {
    high_bits(&bytes.map(|b| if is(b) { 0x80 } else { 0 }))
}

/// The highest bit of each byte.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
#[inline(always)]
fn high_bits(bytes: &[u8; 64]) -> u64 {
    use std::arch::x86_64::{_mm_movemask_epi8, _mm_set_epi64x};
    let sixteens = bytes.as_chunks::<16>().0.iter().rev();
    sixteens.fold(0, |bits, sixteen| {
        let all = i128::from_le_bytes(*sixteen);
        // SAFETY: both are SSE2, which every x86_64 has.
        let sixteen = unsafe { _mm_movemask_epi8(_mm_set_epi64x((all >> 64) as i64, all as i64)) };
        bits << 16 | sixteen as u64
    })
}

/// The highest bit of each byte: a product brings those of eight bytes together.
#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn high_bits(bytes: &[u8; 64]) -> u64 {
    let eights = bytes.as_chunks::<8>().0.iter().rev();
    eights.fold(0, |bits, eight| {
        let ones = u64::from_le_bytes(*eight) >> 7 & 0x0101_0101_0101_0101;
        bits << 8 | ones.wrapping_mul(0x0102_0408_1020_4080) >> 56
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_has_the_bit_of_each_byte() {
        for first in [0u8, 64, 128, 192] {
            let bytes: [u8; 64] = std::array::from_fn(|i| first + i as u8);
            for b in bytes {
                assert_eq!(mask(&bytes, |x| x == b), 1 << (b - first), "{b}");
            }
            assert_eq!(
                mask(&bytes, |x| x % 3 == 0).count_ones() as usize,
                bytes.iter().filter(|b| *b % 3 == 0).count()
            );
        }
    }

    #[test]
    fn every_character_has_the_flags_of_the_regex_classes() {
        let classes = Classes::get();
        let regexes = CLASSES.map(|(p, flag)| (fancy_regex::Regex::new(&format!("^(?:{p})$")).unwrap(), flag));
        for c in (0..=0x1_ffff).filter_map(char::from_u32) {
            let s = c.to_string();
            let expected = regexes.iter().filter(|(r, _)| r.is_match(&s).unwrap()).fold(0, |all, (_, flag)| all | flag);
            assert_eq!(classes.at(s.as_bytes(), 0), (expected, c.len_utf8()), "U+{:04X}", c as u32);
        }
    }
}
