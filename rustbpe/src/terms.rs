//! From text to search terms: lower-cased words, without stop words, stemmed.

use std::borrow::Cow;

use crate::stem::stem;

/// Lucene's 33 English stop words (`EnglishAnalyzer.ENGLISH_STOP_WORDS_SET`), sorted.
pub const STOP_WORDS: [&str; 33] = [
    "a", "an", "and", "are", "as", "at", "be", "but", "by", "for", "if", "in", "into", "is", "it", "no", "not", "of",
    "on", "or", "such", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "will", "with",
];

/// What becomes of a word. The rules are part of an index: queries go through those of the texts.
///
/// ```
/// use rustbpe::terms::Rules;
/// let rules = Rules { stem: true, stop_words: true };
/// assert_eq!(rules.terms("The Runners were running in 1999"), ["runner", "were", "run", "1999"]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// Snowball's English stemmer (Porter 2).
    pub stem: bool,
    /// Leave out [`STOP_WORDS`]; they are looked up before stemming.
    pub stop_words: bool,
}

impl Rules {
    /// The term of a lower-cased word; None for a stop word.
    pub fn term<'a>(&self, word: &'a str) -> Option<Cow<'a, str>> {
        if self.stop_words && STOP_WORDS.binary_search(&word).is_ok() {
            return None;
        }
        Some(if self.stem { stem(word).into() } else { word.into() })
    }

    /// All terms of a text, in order.
    pub fn terms(&self, text: &str) -> Vec<String> {
        let (mut lower, mut terms) = (String::new(), Vec::new());
        lower_case(text, &mut lower);
        for_each_word(&lower, |start, end| terms.extend(self.term(&lower[start..end]).map(Cow::into_owned)));
        terms
    }
}

/// `text` in lower case into `lower`, whose memory is used again.
pub fn lower_case(text: &str, lower: &mut String) {
    lower.clear();
    if text.is_ascii() {
        lower.push_str(text);
        lower.make_ascii_lowercase();
    } else {
        *lower = text.to_lowercase();
    }
}

/// Call `visit(start, end)` for each run of at least two alphanumeric characters (Unicode) or underscores.
#[inline(always)]
pub fn for_each_word(text: &str, mut visit: impl FnMut(usize, usize)) {
    let bytes = text.as_bytes();
    let (mut at, mut start, mut chars) = (0, 0, 0);
    while at < bytes.len() {
        let (inside, len) = match bytes[at] {
            byte @ 0..0x80 => (IN_WORD[byte as usize], 1),
            _ => text[at..].chars().next().map_or((false, 1), |c| (c.is_alphanumeric(), c.len_utf8())),
        };
        if inside {
            chars += 1;
        } else {
            if chars > 1 {
                visit(start, at);
            }
            (start, chars) = (at + len, 0);
        }
        at += len;
    }
    if chars > 1 {
        visit(start, at);
    }
}

const IN_WORD: [bool; 128] = {
    let mut table = [false; 128];
    let mut byte = 0;
    while byte < 128 {
        table[byte] = (byte as u8).is_ascii_alphanumeric() || byte as u8 == b'_';
        byte += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Rules = Rules { stem: false, stop_words: false };

    #[test]
    fn words_are_runs_of_two_or_more_word_characters() {
        assert_eq!(PLAIN.terms("I am x_1, a b-cd; e"), ["am", "x_1", "cd"]);
        assert_eq!(PLAIN.terms("Größe ΟΔΟΣ Привет 東京 東 é1"), ["größe", "οδος", "привет", "東京", "é1"]);
        assert_eq!(PLAIN.terms(" \u{a0}–\n"), [""; 0]);
        assert_eq!(PLAIN.terms(&"ab".repeat(100_000))[0].len(), 200_000);
    }

    #[test]
    fn the_ascii_path_equals_the_other_one() {
        let text: String = (0..20_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 25) as u8 as char).collect();
        let mut other = PLAIN.terms(&format!("{text} é"));
        other.retain(|term| term != "é");
        assert_eq!(PLAIN.terms(&text), other);
    }

    #[test]
    fn stop_words_are_sorted_for_the_look_up() {
        assert!(STOP_WORDS.is_sorted());
        let rules = Rules { stem: false, stop_words: true };
        assert_eq!(rules.terms("To be or not to be in Verona"), ["verona"]);
    }
}
