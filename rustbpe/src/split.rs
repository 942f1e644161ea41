//! Cutting text into the pieces that BPE works on: what `regex.find_iter` would return, several times faster.
//!
//! The pattern string stays the definition. The spellings of three families (GPT-2 or r50k, GPT-4 or cl100k with any
//! `\p{N}{1,k}`, o200k) are recognised and scanned by hand; any other pattern runs on `fancy-regex`, the engine that
//! tiktoken uses. Alternatives are tried left to right, as a backtracking regex does. GPT-4's family cuts ASCII text 64
//! bytes at a time.

use fancy_regex::Regex;

use crate::unicode::{Classes, LETTER, LOWER, NEWLINE, NUMBER, SPACE, UPPER, mask};
use crate::{Error, Result};

/// GPT-4's pattern with numbers cut into at most two digits, which suits a small vocabulary.
pub const DEFAULT_PATTERN: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}",
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);

/// A compiled pattern.
pub enum Splitter {
    /// A family that is scanned by hand.
    Native(Scanner),
    /// Everything else.
    Regex(Box<Regex>),
}

impl Splitter {
    /// Recognise `pattern`, or compile it as a regex.
    ///
    /// ```
    /// use rustbpe::split::{DEFAULT_PATTERN, Splitter};
    /// let splitter = Splitter::new(DEFAULT_PATTERN)?;
    /// let (text, mut pieces) = ("it's 2024", vec![]);
    /// splitter.for_each(text, |start, end| pieces.push(&text[start..end]))?;
    /// assert_eq!(pieces, ["it", "'s", " ", "20", "24"]);
    /// # Ok::<(), rustbpe::Error>(())
    /// ```
    pub fn new(pattern: &str) -> Result<Splitter> {
        match Scanner::recognise(pattern) {
            Some(scanner) => Ok(Splitter::Native(scanner)),
            None => match Regex::new(pattern) {
                Ok(regex) => Ok(Splitter::Regex(Box::new(regex))),
                Err(e) => {
                    Err(Error(format!("pattern {pattern:?} is not a regex: {e}; pass one that fancy-regex takes")))
                }
            },
        }
    }

    /// "native" or "regex": which of the two will run.
    pub fn kind(&self) -> &'static str {
        match self {
            Splitter::Native(_) => "native",
            Splitter::Regex(_) => "regex",
        }
    }

    /// Call `visit(start, end)` for every piece of `text`, in order. Text that a regex does not match is skipped, and
    /// so are empty matches. Only a regex can fail (its limit on backtracking).
    #[inline]
    pub fn for_each(&self, text: &str, mut visit: impl FnMut(usize, usize)) -> Result<()> {
        let bytes = text.as_bytes();
        let (mut at, mut block) = (0, Block::default());
        while at < bytes.len() {
            let (start, end) = match self {
                Splitter::Native(scanner) => (at, block.end(scanner, bytes, at)),
                Splitter::Regex(regex) => match regex.find_from_pos(text, at) {
                    Ok(None) => break,
                    Ok(Some(found)) => (found.start(), found.end()),
                    Err(e) => return Err(Error(format!("pattern {:?} failed on a text: {e}", regex.as_str()))),
                },
            };
            if start == end {
                at = end + text[end..].chars().next().map_or(1, char::len_utf8);
                continue;
            }
            visit(start, end); // at one place only, so that it is compiled into the loop
            at = end;
        }
        Ok(())
    }
}

/// Which family, and its variations.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Family {
    Gpt2,
    Gpt4,
    O200k,
}

/// A hand-written scanner for one pattern.
#[derive(Clone, Copy)]
pub struct Scanner {
    family: Family,
    /// k of `\p{N}{1,k}` (not used by GPT-2, whose numbers have any length)
    digits: usize,
    /// whether `\s+$` comes before `\s*[\r\n]`: white space at the very end stays whole
    whole_tail: bool,
    classes: &'static Classes,
}

impl Scanner {
    /// The scanner that means the same as `pattern`, if there is one.
    fn recognise(pattern: &str) -> Option<Scanner> {
        let mut rest = pattern;
        let (mut digits, mut whole_tail) = (usize::MAX, false);
        let family = if eat(&mut rest, &[r"'(?:[sdmt]|ll|ve|re)", r"'s|'t|'re|'ve|'m|'ll|'d"]) {
            Family::Gpt2
        } else if eat(&mut rest, &[r"'(?i:[sdmt]|ll|ve|re)", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"]) {
            Family::Gpt4
        } else {
            Family::O200k
        };
        let known = match family {
            Family::Gpt2 => {
                eat(&mut rest, &[r" ?\p{L}+", r" ?\p{L}++"])
                    && eat(&mut rest, &[r" ?\p{N}+", r" ?\p{N}++"])
                    && eat(&mut rest, &[r" ?[^\s\p{L}\p{N}]+", r" ?[^\s\p{L}\p{N}]++"])
            }
            Family::Gpt4 => {
                let prefix = [r"[^\r\n\p{L}\p{N}]?\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}+", r"[^\r\n\p{L}\p{N}]?+\p{L}++"];
                let other =
                    [r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*", r" ?[^\s\p{L}\p{N}]++[\r\n]*+"];
                eat(&mut rest, &prefix) && eat_digits(&mut rest, &mut digits) && eat(&mut rest, &other)
            }
            Family::O200k => {
                let [head, tail] = [r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"];
                let word = |h, t| format!(r"[^\r\n\p{{L}}\p{{N}}]?{head}{h}{tail}{t}(?i:'s|'t|'re|'ve|'m|'ll|'d)?");
                eat(&mut rest, &[&word('*', '+')])
                    && eat(&mut rest, &[&word('+', '*')])
                    && eat_digits(&mut rest, &mut digits)
                    && eat(&mut rest, &[r" ?[^\s\p{L}\p{N}]+[\r\n/]*"])
            }
        };
        if family == Family::Gpt2 {
            eat(&mut rest, &[r"\s+$", r"\s++$"]); // means what \s+(?!\S) does there
        } else {
            whole_tail = eat(&mut rest, &[r"\s+$", r"\s++$"]);
        }
        let lines = family == Family::Gpt2 || eat(&mut rest, &[r"\s*[\r\n]", r"\s*[\r\n]+"]);
        let spaces = eat(&mut rest, &[r"\s+(?!\S)"]) && eat(&mut rest, &[r"\s", r"\s+"]);
        let whole = rest.is_empty() && !pattern.ends_with('|');
        (known && lines && spaces && whole).then(|| Scanner { family, digits, whole_tail, classes: Classes::get() })
    }

    /// End of the piece that starts at `i`.
    #[inline(always)]
    fn end(&self, text: &[u8], i: usize) -> usize {
        match self.family {
            Family::Gpt2 => self.gpt2(text, i),
            Family::Gpt4 => self.gpt4(text, i),
            Family::O200k => self.o200k(text, i),
        }
    }

    /// Contraction, ` ?L+`, ` ?N+`, ` ?other+`, white space.
    #[inline(never)]
    fn gpt2(&self, text: &[u8], i: usize) -> usize {
        if let Some(end) = contraction(text, i, false) {
            return end;
        }
        let at = i + usize::from(text[i] == b' ' && i + 1 < text.len());
        let (class, width) = self.classes.at(text, at);
        match class & (LETTER | NUMBER | SPACE) {
            LETTER => self.letters(text, at + width, LETTER),
            NUMBER => self.run(text, at + width, |c| c & NUMBER != 0),
            0 => self.run(text, at + width, is_other),
            _ => self.spaces(text, i),
        }
    }

    /// Contraction, `[^\r\n L N]?L+`, `N{1,k}`, ` ?other+[\r\n]*`, white space.
    #[inline(never)]
    fn gpt4(&self, text: &[u8], i: usize) -> usize {
        let (class, width) = self.classes.at(text, i);
        if class & LETTER != 0 {
            return self.letters(text, i + width, LETTER);
        }
        let next = i + width;
        if class & (NUMBER | NEWLINE) == 0 && next < text.len() {
            if let Some(end) = contraction(text, i, true) {
                return end;
            }
            let (class, width) = self.classes.at(text, next);
            if class & LETTER != 0 {
                return self.letters(text, next + width, LETTER);
            }
        }
        self.rest(text, i, class, |b| b == b'\r' || b == b'\n')
    }

    /// Two shapes of word, each with an optional `[^\r\n L N]` before and contraction after; then as GPT-4, but `/` may
    /// follow the other characters too.
    #[inline(never)]
    fn o200k(&self, text: &[u8], i: usize) -> usize {
        let (class, width) = self.classes.at(text, i);
        let word = if class & (NEWLINE | LETTER | NUMBER) == 0 {
            // The prefix is tried first, but a mark may also be the first character of the word itself.
            let (tailed, bare) = self.word(text, i + width);
            let (tailed_here, bare_here) = if class & UPPER != 0 { self.word(text, i) } else { (None, None) };
            tailed.or(tailed_here).or(bare).or(bare_here)
        } else if class & LETTER != 0 {
            let (tailed, bare) = self.word(text, i);
            tailed.or(bare)
        } else {
            None
        };
        match word {
            Some(end) => contraction(text, end, true).unwrap_or(end),
            None => self.rest(text, i, class, |b| b == b'\r' || b == b'\n' || b == b'/'),
        }
    }

    /// Ends of `HEAD*TAIL+` and of `HEAD+` at `i`. Modifier letters, other letters and marks are in both classes, so
    /// the greedy `HEAD*` gives characters back until a tail can start.
    fn word(&self, text: &[u8], mut i: usize) -> (Option<usize>, Option<usize>) {
        let start = i;
        let mut last_both = None;
        while i < text.len() {
            let (class, width) = self.classes.at(text, i);
            if class & UPPER == 0 {
                if class & LOWER != 0 {
                    return (Some(self.letters(text, i, LOWER)), None);
                }
                break;
            }
            i += width;
            if class & LOWER != 0 {
                last_both = Some(i);
            }
        }
        (last_both, (i > start).then_some(i))
    }

    /// What follows the words in GPT-4 and o200k: numbers, other characters with their line ends, white space.
    #[inline(always)]
    fn rest(&self, text: &[u8], i: usize, class: u8, trails: impl Fn(u8) -> bool) -> usize {
        if class & NUMBER != 0 {
            let mut left = self.digits;
            return self.run(text, i, |c| {
                left = left.wrapping_sub(1);
                c & NUMBER != 0 && left != usize::MAX
            });
        }
        let from = i + usize::from(text[i] == b' ');
        let mut end = self.run(text, from, is_other);
        if end == from {
            return self.spaces(text, i);
        }
        while end < text.len() && trails(text[end]) {
            end += 1;
        }
        end
    }

    /// `\s+$`, `\s*[\r\n]`, `\s+(?!\S)`, `\s+` at `i`, as far as the family has them.
    fn spaces(&self, text: &[u8], mut i: usize) -> usize {
        let (mut last, mut after_newline) = (i, i);
        let start = i;
        while i < text.len() {
            let (class, width) = self.classes.at(text, i);
            if class & SPACE == 0 {
                break;
            }
            last = i;
            i += width;
            if class & NEWLINE != 0 {
                after_newline = i;
            }
        }
        if self.family != Family::Gpt2 && after_newline > start && !(self.whole_tail && i == text.len()) {
            after_newline
        } else if i < text.len() && last > start {
            last // the last space belongs to what comes next
        } else {
            i
        }
    }

    /// End of the run of characters from `i` whose class `is` accepts.
    #[inline(always)]
    fn run(&self, text: &[u8], mut i: usize, mut is: impl FnMut(u8) -> bool) -> usize {
        while i < text.len() {
            let (class, width) = self.classes.at(text, i);
            if !is(class) {
                break;
            }
            i += width;
        }
        i
    }

    /// End of the run from `i` of `kind`, which is LETTER or LOWER: eight ASCII letters a step.
    #[inline(always)]
    fn letters(&self, text: &[u8], mut i: usize, kind: u8) -> usize {
        while let Some(eight) = text.get(i..i + 8) {
            let count = ascii_letters(u64::from_le_bytes(eight.try_into().expect("eight bytes")), kind == LETTER);
            i += count;
            if count < 8 {
                if text[i] < 128 {
                    return i;
                }
                let (class, width) = self.classes.at(text, i);
                if class & kind == 0 {
                    return i;
                }
                i += width;
            }
        }
        self.run(text, i, |c| c & kind != 0)
    }
}

/// The ends of pieces in 64 bytes, found at once by arithmetic on bits: bit i of a word is about byte i.
#[derive(Default)]
struct Block {
    start: usize,
    ends: u64,
    slow: usize, // what begins before here goes to the scanner
}

impl Block {
    /// End of the piece that starts at `i`, where the one before ended.
    #[inline(always)]
    fn end(&mut self, scanner: &Scanner, text: &[u8], i: usize) -> usize {
        if self.ends == 0 && i >= self.slow && scanner.family == Family::Gpt4 {
            let mut bytes = [0xff; 64]; // past the end of the text not ASCII, which leaves the last pieces to the scanner
            match text[i..].first_chunk() {
                Some(all) => bytes = *all,
                None => bytes[..text.len() - i].copy_from_slice(&text[i..]),
            }
            let hard;
            (self.ends, hard) = gpt4_starts(&bytes, scanner.digits);
            (self.start, self.slow) = (i, i + 64 - hard.leading_zeros() as usize);
        }
        if self.ends == 0 {
            return scanner.end(text, i);
        }
        let end = self.start + self.ends.trailing_zeros() as usize;
        self.ends &= self.ends - 1;
        end
    }
}

/// Where pieces of GPT-4 start after the one at byte 0, and the bytes that need the scanner. There are no starts from
/// the byte before the first of those on, nor at the last byte, because what follows may decide.
#[inline(always)]
fn gpt4_starts(bytes: &[u8; 64], digits: usize) -> (u64, u64) {
    let letter = mask(bytes, |b| (b | 0x20).wrapping_sub(b'a') < 26);
    let digit = mask(bytes, |b| b.wrapping_sub(b'0') < 10);
    let blank = mask(bytes, |b| b == b' ');
    let newline = mask(bytes, |b| b == b'\n' || b == b'\r');
    let space = blank | newline;
    let inner = blank & space << 1 & space >> 1; // a line end later in the white space would decide
    let hard = mask(bytes, |b| b >= 128 || b == b'\t' || b == 0x0b || b == 0x0c) | inner;
    let other = !(letter | digit | space | hard);

    let other_starts = other & !((other | blank) << 1);
    let mut starts = other_starts
        | letter & (digit | newline | other & !other_starts) << 1 // else the character before belongs to the word
        | blank & !(space << 1 & space >> 1)
        | newline & (letter | digit) << 1;
    let mut number = digit & !(digit << 1);
    while number != 0 {
        starts |= number;
        (0..digits.min(64)).for_each(|_| number = number << 1 & digit);
    }
    let mut quotes = other_starts & mask(bytes, |b| b == b'\'');
    while quotes != 0 {
        if let Some(end @ ..64) = contraction(bytes, quotes.trailing_zeros() as usize, true) {
            starts |= letter & 1 << end;
        }
        quotes &= quotes - 1;
    }
    let sure = (1 << hard.trailing_zeros().saturating_sub(1)) - 1;
    (starts & sure & !1, hard)
}

fn is_other(class: u8) -> bool {
    class & (LETTER | NUMBER | SPACE) == 0
}

/// How many of eight bytes, from the lowest, are ASCII letters, or small ASCII letters.
#[inline(always)]
fn ascii_letters(word: u64, any_case: bool) -> usize {
    const EACH: u64 = 0x0101_0101_0101_0101;
    const HIGH: u64 = 0x80 * EACH;
    let lower = if any_case { word | (0x20 * EACH) } else { word } & !HIGH;
    let from_a = lower + (0x80 - b'a' as u64) * EACH; // the high bit says: >= 'a'
    let past_z = lower + (0x80 - b'z' as u64 - 1) * EACH; // the high bit says: > 'z'
    let letters = from_a & !past_z & !word & HIGH;
    ((letters ^ HIGH).trailing_zeros() / 8) as usize
}

/// End of `'s 'd 'm 't 'll 've 're` at `i`. Without regard to case, U+017F (long s) counts as s, as Unicode says.
#[inline(always)]
fn contraction(text: &[u8], i: usize, any_case: bool) -> Option<usize> {
    if text.get(i) != Some(&b'\'') {
        return None;
    }
    let fold = |b: &u8| if any_case { b.to_ascii_lowercase() } else { *b };
    match (text.get(i + 1).map(fold)?, text.get(i + 2)) {
        (b's' | b'd' | b'm' | b't', _) => Some(i + 2),
        (first, Some(second)) => match (first, fold(second)) {
            (b'l', b'l') | (b'v' | b'r', b'e') => Some(i + 3),
            (0xc5, 0xbf) if any_case => Some(i + 3),
            _ => None,
        },
        _ => None,
    }
}

/// Take one of the spellings of an alternative, and the bar after it, from the front of a pattern.
fn eat(rest: &mut &str, spellings: &[&str]) -> bool {
    for spelling in spellings {
        if let Some(after) = rest.strip_prefix(spelling)
            && let Some(after) = if after.is_empty() { Some(after) } else { after.strip_prefix('|') }
        {
            *rest = after;
            return true;
        }
    }
    false
}

/// Take `\p{N}{1,k}` or `\p{N}`, possessive or not.
fn eat_digits(rest: &mut &str, digits: &mut usize) -> bool {
    if eat(rest, &[r"\p{N}"]) {
        *digits = 1;
        return true;
    }
    let Some((count, after)) = rest.strip_prefix(r"\p{N}{1,").and_then(|r| r.split_once('}')) else { return false };
    *digits = if count.bytes().all(|b| b.is_ascii_digit()) { count.parse().unwrap_or(0) } else { 0 };
    *rest = after;
    *digits > 0 && eat(rest, &["", "+"])
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
    const R50K: &str = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s";
    const GPT4: &str = concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    const CL100K: &str = concat!(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+",
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    );
    const QWEN: &str = concat!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    const O200K: &str = concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|",
        r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );

    fn pieces(splitter: &Splitter, text: &str) -> Vec<String> {
        let mut all = vec![];
        splitter.for_each(text, |start, end| all.push(text[start..end].to_string())).unwrap();
        all
    }

    #[test]
    fn scanners_cut_like_the_regex_on_random_text() {
        let alphabet: Vec<char> =
            "'sSdlLvVeErRtTmMaZ{@`[09٣²  \t\n\r\u{85}\u{a0}\u{3000}./!éÉſKÅǅʰªµ中ก้́ा\u{200d}😀_".chars().collect();
        let ascii: Vec<char> = (0..128).map(char::from).collect();
        let prose: Vec<char> = "sdmtlverSTaaaaaaaaaaaaaaaaaa     ''''.,(019\n\r é".chars().collect();
        let mut state = 1u64;
        let mut random = |n: usize| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for pattern in [DEFAULT_PATTERN, GPT2, R50K, GPT4, CL100K, QWEN, O200K] {
            let native = Splitter::new(pattern).unwrap();
            assert_eq!(native.kind(), "native", "{pattern}");
            let regex = Splitter::Regex(Box::new(Regex::new(pattern).unwrap()));
            for i in 0..4000 {
                let (letters, len) = [(&alphabet, 24), (&alphabet, 24), (&ascii, 200), (&prose, 200)][i % 4];
                let text: String = (0..random(len)).map(|_| letters[random(letters.len())]).collect();
                assert_eq!(pieces(&native, &text), pieces(&regex, &text), "{pattern} on {text:?}");
            }
        }
    }

    #[test]
    fn other_patterns_run_on_the_regex_engine() {
        for pattern in
            [r"\p{L}+|\s", &format!("{DEFAULT_PATTERN}|"), r"\w+", &DEFAULT_PATTERN.replace("{1,2}", "{1,x}")]
        {
            assert_eq!(Splitter::new(pattern).map(|s| s.kind()).unwrap_or("error"), "regex", "{pattern}");
        }
        assert_eq!(pieces(&Splitter::new(r"\w+").unwrap(), "a, b"), ["a", "b"]);
        assert_eq!(pieces(&Splitter::new("a*").unwrap(), "é aa\u{301}aé"), ["aa", "a"]); // no empty pieces
        assert!(Splitter::new("(").is_err());
    }

    #[test]
    fn letters_of_a_word_are_counted() {
        for b in 0..=255u8 {
            let word = u64::from_le_bytes([b'a', b'z', b'm', b, b'a', b'a', b'a', b'a']);
            assert_eq!(ascii_letters(word, true), if b.is_ascii_alphabetic() { 8 } else { 3 }, "{b}");
            assert_eq!(ascii_letters(word, false), if b.is_ascii_lowercase() { 8 } else { 3 }, "{b}");
        }
    }
}
