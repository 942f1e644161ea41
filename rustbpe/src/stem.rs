//! Snowball's English stemmer (Porter 2), as of Snowball 3: https://snowballstem.org/algorithms/english/stemmer.html
//!
//! Words here hold no apostrophes, so its rules for those are left out.

/// A word in the making. One byte for each character: those beyond ASCII are OTHER, a consonant. Y: a y that is one.
struct Word {
    w: Vec<u8>,
    r1: usize, // after the first consonant that follows a vowel
    r2: usize, // the same again from r1 on
}

const OTHER: u8 = 0x80;

/// Words that the rules would spoil. An empty stem: the word itself.
const EXCEPTIONS: [(&str, &str); 15] = [
    ("skis", "ski"),
    ("skies", "sky"),
    ("idly", "idl"),
    ("gently", "gentl"),
    ("ugly", "ugli"),
    ("early", "earli"),
    ("only", "onli"),
    ("singly", "singl"),
    ("sky", ""),
    ("news", ""),
    ("howe", ""),
    ("atlas", ""),
    ("cosmos", ""),
    ("bias", ""),
    ("andes", ""),
];

/// R1 begins after these.
const PREFIXES: [&str; 9] = ["gener", "commun", "arsen", "past", "univers", "later", "emerg", "organ", "inter"];

/// Complete once a plural s is gone.
const COMPLETE: [&str; 9] =
    ["inning", "outing", "canning", "herring", "earring", "evening", "proceed", "exceed", "succeed"];

/// Suffixes with what takes their place, the longer of two that fit before the shorter.
const STEP_2: [(&str, &str); 25] = [
    ("ational", "ate"),
    ("ization", "ize"),
    ("fulness", "ful"),
    ("ousness", "ous"),
    ("iveness", "ive"),
    ("tional", "tion"),
    ("biliti", "ble"),
    ("lessli", "less"),
    ("entli", "ent"),
    ("ation", "ate"),
    ("alism", "al"),
    ("aliti", "al"),
    ("ousli", "ous"),
    ("iviti", "ive"),
    ("fulli", "ful"),
    ("ogist", "og"),
    ("enci", "ence"),
    ("anci", "ance"),
    ("abli", "able"),
    ("izer", "ize"),
    ("ator", "ate"),
    ("alli", "al"),
    ("bli", "ble"),
    ("ogi", "og"), // after l
    ("li", ""),    // after one of cdeghkmnrt
];

const STEP_3: [(&str, &str); 9] = [
    ("ational", "ate"),
    ("tional", "tion"),
    ("alize", "al"),
    ("icate", "ic"),
    ("iciti", "ic"),
    ("ative", ""), // in R2
    ("ical", "ic"),
    ("ness", ""),
    ("ful", ""),
];

const STEP_4: [&str; 18] = [
    "ement", "ance", "ence", "able", "ible", "ment", "ant", "ent", "ism", "ate", "iti", "ous", "ive", "ize",
    "ion", // after s or t
    "al", "er", "ic",
];

/// The stem of a lower-cased word.
///
/// ```
/// assert_eq!(rustbpe::stem::stem("organizations"), "organiz");
/// ```
pub fn stem(word: &str) -> String {
    if let Some((_, stem)) = EXCEPTIONS.iter().find(|(exception, _)| *exception == word) {
        return if stem.is_empty() { word } else { stem }.to_string();
    }
    let w: Vec<u8> = word.chars().map(|c| if c.is_ascii() { c as u8 } else { OTHER }).collect();
    if w.len() < 3 {
        return word.to_string();
    }
    let mut stemmed = Word::new(w);
    stemmed.step_1a();
    if !COMPLETE.iter().any(|complete| complete.as_bytes() == stemmed.w) {
        stemmed.step_1b();
        stemmed.step_1c();
        stemmed.step_2();
        stemmed.step_3();
        stemmed.step_4();
        stemmed.step_5();
    }
    let w = stemmed.w.iter().map(|&byte| if byte == b'Y' { 'y' } else { byte as char });
    if word.is_ascii() {
        return w.collect();
    }
    w.zip(word.chars().chain(std::iter::repeat(' '))).map(|(new, old)| if new.is_ascii() { new } else { old }).collect()
}

fn vowel(byte: u8) -> bool {
    matches!(byte, b'a' | b'e' | b'i' | b'o' | b'u' | b'y')
}

/// Where the region after the first consonant that follows a vowel begins, from `from` on.
fn region(w: &[u8], from: usize) -> usize {
    let pair = (from + 1..w.len()).find(|&i| vowel(w[i - 1]) && !vowel(w[i]));
    pair.map_or(w.len(), |i| i + 1)
}

impl Word {
    fn new(mut w: Vec<u8>) -> Word {
        for i in 0..w.len() {
            if w[i] == b'y' && (i == 0 || vowel(w[i - 1])) {
                w[i] = b'Y';
            }
        }
        let prefix = PREFIXES.iter().find(|prefix| w.starts_with(prefix.as_bytes()));
        let r1 = prefix.map_or_else(|| region(&w, 0), |prefix| prefix.len());
        let r2 = region(&w, r1);
        Word { w, r1, r2 }
    }

    fn ends(&self, suffix: &str) -> bool {
        self.w.ends_with(suffix.as_bytes())
    }

    /// Put `new` in the place of the last `len` letters.
    fn replace(&mut self, len: usize, new: &str) {
        self.w.truncate(self.w.len() - len);
        self.w.extend_from_slice(new.as_bytes());
    }

    /// The rest of the word without its last `len` letters.
    fn before(&self, len: usize) -> &[u8] {
        &self.w[..self.w.len() - len]
    }

    fn ends_in_short_syllable(&self, len: usize) -> bool {
        match *self.before(len) {
            [.., a, b, c] if !vowel(a) && vowel(b) && !vowel(c) && !matches!(c, b'w' | b'x' | b'Y') => true,
            [a, b] => vowel(a) && !vowel(b),
            ref w => w.ends_with(b"past"),
        }
    }

    /// Plurals.
    fn step_1a(&mut self) {
        if self.ends("sses") {
            self.replace(2, "");
        } else if self.ends("ied") || self.ends("ies") {
            self.replace(3, if self.w.len() > 4 { "i" } else { "ie" });
        } else if self.ends("s") && !self.ends("us") && !self.ends("ss") && self.before(2).iter().any(|&c| vowel(c)) {
            self.replace(1, "");
        }
    }

    /// -ed and -ing.
    fn step_1b(&mut self) {
        if let Some(suffix) = ["eedly", "eed"].into_iter().find(|suffix| self.ends(suffix)) {
            if self.w.len() - suffix.len() >= self.r1 {
                self.replace(suffix.len(), "ee");
            }
            return;
        }
        let Some(suffix) = ["ingly", "edly", "ing", "ed"].into_iter().find(|suffix| self.ends(suffix)) else { return };
        match *self.before(suffix.len()) {
            [a, b'y'] if suffix == "ing" && !vowel(a) => return self.replace(4, "ie"),
            ref w if !w.iter().any(|&c| vowel(c)) => return,
            _ => self.replace(suffix.len(), ""),
        }
        match self.w[..] {
            [.., b'a', b't'] | [.., b'b', b'l'] | [.., b'i', b'z'] => self.replace(0, "e"),
            [b'a' | b'e' | b'o', a, b] if a == b && b"bdfgmnprt".contains(&a) => {}
            [.., a, b] if a == b && b"bdfgmnprt".contains(&a) => self.replace(1, ""),
            _ if self.w.len() == self.r1 && self.ends_in_short_syllable(0) => self.replace(0, "e"),
            _ => {}
        }
    }

    fn step_1c(&mut self) {
        if let [_, .., a, b'y' | b'Y'] = self.w[..]
            && self.w.len() > 2
            && !vowel(a)
        {
            self.replace(1, "i");
        }
    }

    fn step_2(&mut self) {
        let Some((suffix, new)) = STEP_2.iter().find(|(suffix, _)| self.ends(suffix)) else { return };
        let before = self.before(suffix.len());
        let allowed = match *suffix {
            "ogi" => before.ends_with(b"l"),
            "li" => before.last().is_some_and(|c| b"cdeghkmnrt".contains(c)),
            _ => true,
        };
        if allowed && before.len() >= self.r1 {
            self.replace(suffix.len(), new);
        }
    }

    fn step_3(&mut self) {
        let Some((suffix, new)) = STEP_3.iter().find(|(suffix, _)| self.ends(suffix)) else { return };
        let region = if *suffix == "ative" { self.r2.max(self.r1) } else { self.r1 };
        if self.w.len() - suffix.len() >= region {
            self.replace(suffix.len(), new);
        }
    }

    fn step_4(&mut self) {
        let Some(suffix) = STEP_4.iter().find(|suffix| self.ends(suffix)) else { return };
        let before = self.before(suffix.len());
        let allowed = *suffix != "ion" || matches!(before.last(), Some(b's' | b't'));
        if allowed && before.len() >= self.r2 {
            self.replace(suffix.len(), "");
        }
    }

    fn step_5(&mut self) {
        let rest = self.w.len() - 1; // at least two letters are left by now
        let delete = match self.w[..] {
            [.., b'e'] => rest >= self.r2 || rest >= self.r1 && !self.ends_in_short_syllable(1),
            [.., b'l', b'l'] => rest >= self.r2,
            _ => false,
        };
        if delete {
            self.replace(1, "");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// tests/test_bm25.py compares all words of a dictionary with the reference.
    #[test]
    fn stems_are_those_of_the_published_sample() {
        for (word, expected) in [
            ("consistency", "consist"),
            ("consolations", "consol"),
            ("knightly", "knight"),
            ("knackeries", "knackeri"),
            ("kneeling", "kneel"),
            ("hopping", "hop"),
            ("hoping", "hope"),
            ("generously", "generous"),
            ("ties", "tie"),
            ("gas", "gas"),
            ("sayings", "say"),
            ("vying", "vie"),
            ("added", "add"),
            ("university", "universiti"),
            ("yy", "yy"),
        ] {
            assert_eq!(stem(word), expected, "{word}");
        }
    }

    #[test]
    fn other_letters_stay_where_they_are() {
        assert_eq!(stem("größeres"), "größere");
        assert_eq!(stem("naïvely"), "naïv");
        assert_eq!(stem("привет"), "привет");
        assert_eq!(stem("éies"), "éie");
    }
}
