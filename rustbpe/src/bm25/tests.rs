//! Against a plain implementation, and pruned against exhaustive search.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::*;

const RULES: Rules = Rules { stem: false, stop_words: false };
const LUCENE: Scheme = Scheme { variant: Variant::Lucene, k1: 1.5, b: 0.75 };

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 33) as usize) % n
    }

    /// Frequent words and rare ones.
    fn text(&mut self, words: usize, vocabulary: usize) -> String {
        let word = |r: &mut Random| format!("w{}", r.below(vocabulary) * r.below(vocabulary) / vocabulary);
        (0..words).map(|_| word(self)).collect::<Vec<_>>().join(" ")
    }
}

/// A folder of its own for each test, removed afterwards.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder = std::env::temp_dir().join(format!("bm25-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        Folder(folder)
    }

    fn build(&self, name: &str, texts: &[String], threads: usize) -> PathBuf {
        let (path, texts) = (self.0.join(name), texts.iter().map(String::as_str).collect::<Vec<_>>());
        let mut builder = Builder::new(&path, RULES, threads).unwrap();
        texts.chunks(1000).for_each(|texts| builder.add(texts).unwrap());
        builder.finish().unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// What search must give, from the scores of all texts.
fn best(scores: &[f32], k: usize, allowed: Option<&[bool]>) -> Vec<Hit> {
    let allow = |i: usize| allowed.is_none_or(|allowed| allowed[i]);
    let scores = scores.iter().enumerate().filter(|&(i, &score)| score > 0.0 && allow(i));
    let mut hits: Vec<Hit> = scores.map(|(i, &score)| (i as u32, score)).collect();
    hits.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    hits.truncate(k);
    hits
}

fn assert_search_is_exhaustive(bm25: &Bm25, query: &str, random: &mut Random) {
    let scores = bm25.scores(query).unwrap();
    let allowed: Vec<bool> = (0..bm25.len()).map(|_| random.below(3) == 0).collect();
    for k in [1, 10, 100, bm25.len(), bm25.len() + 5] {
        for allowed in [None, Some(&allowed[..])] {
            let hits = bm25.search(&[query], k, allowed, 1).unwrap().remove(0);
            assert!(hits == best(&scores, k, allowed), "{query:?}, k={k}, filtered: {}", allowed.is_some());
        }
    }
}

/// Lucene's formula in float64, word by word.
fn reference(texts: &[String], query: &str) -> Vec<f64> {
    let words: Vec<Vec<&str>> =
        texts.iter().map(|text| text.split(' ').filter(|word| !word.is_empty()).collect()).collect();
    let (n, mean) = (texts.len() as f64, words.iter().map(Vec::len).sum::<usize>() as f64 / texts.len() as f64);
    let mut df = BTreeMap::<&str, f64>::new();
    for text in &words {
        text.iter()
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .for_each(|word| *df.entry(word).or_default() += 1.0);
    }
    let score = |text: &Vec<&str>, word: &str| {
        let tf = text.iter().filter(|other| **other == word).count() as f64;
        let df = df.get(word).copied().unwrap_or(0.0);
        (1.0 + (n - df + 0.5) / (df + 0.5)).ln() * tf / (tf + 1.5 * (0.25 + 0.75 * text.len() as f64 / mean))
    };
    words.iter().map(|text| query.split(' ').map(|word| score(text, word)).sum()).collect()
}

#[test]
fn scores_equal_the_formula() {
    let (folder, mut random) = (Folder::new("formula"), Random(1));
    let mut texts: Vec<String> = (0..300).map(|i| random.text(i % 40, 50)).collect();
    texts.push("w1 ".repeat(500));
    let bm25 = Bm25::open(&[folder.build("a", &texts, 2)], LUCENE).unwrap();
    for _ in 0..50 {
        let words = 1 + random.below(8);
        let query = random.text(words, 60);
        for (ours, theirs) in bm25.scores(&query).unwrap().iter().zip(reference(&texts, &query)) {
            assert!((*ours as f64 - theirs).abs() <= 2e-6 * theirs, "{query}: {ours} {theirs}");
        }
    }
}

#[test]
fn pruning_changes_nothing() {
    let folder = Folder::new("pruning");
    for seed in 0..24 {
        let random = &mut Random(seed);
        let (n, vocabulary) = (1 + random.below(1500), 2 + random.below(400));
        let length = 1 + random.below(30);
        let texts: Vec<String> = (0..n)
            .map(|_| random.below(length + 1))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|words| random.text(words, vocabulary))
            .collect();
        let cut = random.below(n + 1);
        let paths = [folder.build("a", &texts[..cut], 1), folder.build("b", &texts[cut..], 3)];
        let variant = [Variant::Lucene, Variant::Robertson, Variant::Atire, Variant::Okapi][seed as usize % 4];
        let scheme = Scheme { variant, k1: [0.0, 0.9, 1.5][random.below(3)], b: [0.0, 0.4, 1.0][random.below(3)] };
        let bm25 = Bm25::open(&paths, scheme).unwrap();
        for _ in 0..10 {
            let words = 1 + random.below(12);
            let query = random.text(words, vocabulary);
            assert_search_is_exhaustive(&bm25, &query, random);
        }
    }
}

/// More than one block; rare words decide, frequent ones are looked up.
#[test]
fn pruning_changes_nothing_in_many_blocks() {
    let (folder, random) = (Folder::new("blocks"), &mut Random(7));
    let texts: Vec<String> = (0..2 * BLOCK + 4321).map(|i| format!("{} rare{}", random.text(3, 30), i / 50)).collect();
    let bm25 = Bm25::open(&[folder.build("a", &texts, 2)], LUCENE).unwrap();
    assert_eq!(bm25.len(), texts.len());
    for query in ["rare7 w0 w1", "w0 w1 w2", "rare2000 rare1311 w5 w5", "w29", "absent", ""] {
        assert_search_is_exhaustive(&bm25, query, random);
    }
}

#[test]
fn segments_and_threads_do_not_change_a_bit() {
    let (folder, random) = (Folder::new("segments"), &mut Random(3));
    let texts: Vec<String> = (0..5000).map(|_| random.text(20, 300)).collect();
    let whole = folder.build("whole", &texts, 1);
    assert!(std::fs::read(&whole).unwrap() == std::fs::read(folder.build("threads", &texts, 3)).unwrap());
    let parts = [folder.build("a", &texts[..100], 1), folder.build("b", &[], 1), folder.build("c", &texts[100..], 2)];
    let queries: Vec<String> = (0..200).map(|_| random.text(6, 330)).collect();
    let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
    for variant in [Variant::Lucene, Variant::Okapi] {
        let scheme = Scheme { variant, ..LUCENE };
        let (one, many) = (Bm25::open(&[&whole], scheme).unwrap(), Bm25::open(&parts, scheme).unwrap());
        let hits = one.search(&queries, 20, None, 1).unwrap();
        assert!(hits == many.search(&queries, 20, None, 3).unwrap());
        assert_eq!(hits[7], many.search(&queries[7..8], 20, None, 1).unwrap()[0]);
    }
}

#[test]
fn nothing_is_found_in_nothing() {
    let folder = Folder::new("nothing");
    let empty = folder.build("empty", &[], 1);
    let blank = folder.build("blank", &["".into(), "- .".into()], 1);
    for paths in [&[][..], std::slice::from_ref(&empty), &[empty.clone(), blank]] {
        let bm25 = Bm25::open(paths, LUCENE).unwrap();
        assert_eq!(bm25.search(&["word", ""], 5, None, 1).unwrap(), [vec![], vec![]]);
    }
    let error = Bm25::open(&[&empty], LUCENE).unwrap().search(&["word"], 5, Some(&[true]), 1).unwrap_err();
    assert!(error.0.contains("allowed has 1 values"), "{error}");
}

/// A damaged file is an error that names it, or (in the postings) other scores; never a panic.
#[test]
fn damage_is_an_error_or_harmless() {
    let (folder, random) = (Folder::new("damage"), &mut Random(5));
    let texts: Vec<String> = (0..400).map(|_| random.text(20, 60)).collect();
    let path = folder.build("a", &texts, 1);
    let (whole, header) = (std::fs::read(&path).unwrap(), 8 * file::HEADER);
    let postings = 4 * u64::from_ne_bytes(whole[8..16].try_into().unwrap()) as usize;
    let mut changed = 0;
    for i in 0..600 {
        let mut bytes = whole.clone();
        let at = if i % 3 == 0 { random.below(header) } else { random.below(whole.len()) };
        bytes[at] ^= 1 << random.below(8);
        std::fs::write(&path, &bytes).unwrap();
        match Bm25::open(&[&path], LUCENE) {
            Ok(bm25) => {
                assert!((header..header + postings.next_multiple_of(8)).contains(&at), "byte {at} of {}", whole.len());
                bm25.search(&["w1 w2 w3 w9"], 400, None, 1).unwrap();
                changed += 1;
            }
            Err(error) => assert!(error.0.starts_with(path.to_str().unwrap()), "{error}"),
        }
    }
    assert!((1..600).contains(&changed));
    for len in (0..whole.len()).step_by(97) {
        std::fs::write(&path, &whole[..len]).unwrap();
        let error = Bm25::open(&[&path], LUCENE).err().expect("cut short");
        assert!(error.0.starts_with(path.to_str().unwrap()), "{error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(Bm25::open(&[&path], LUCENE).err().expect("missing").0.contains("cannot be opened"));
}

#[test]
fn an_unfinished_build_leaves_nothing() {
    let folder = Folder::new("unfinished");
    let mut builder = Builder::new(&folder.0.join("a"), RULES, 1).unwrap();
    builder.add(&["some words"]).unwrap();
    drop(builder);
    assert_eq!(std::fs::read_dir(&folder.0).unwrap().count(), 0);
}
