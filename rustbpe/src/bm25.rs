//! BM25 over files: [`Builder`] writes a segment, [`Bm25`] opens one or several and ranks their texts.
//!
//! Scores are computed at query time from term frequencies and text lengths, so that k1, b and the variant can change
//! and segments can be added without a rebuild: N, df and the mean length are summed over the segments. A search gives
//! exactly (bit for bit) what scoring every text gives, and the same for one segment or many; see `search.rs`.
//!
//! score(q, d) = sum over the words of q of idf(t) * tf / (tf + k1 (1 - b + b |d| / mean length)), in float32, greatest
//! idf first. Variants of idf and of the factor: [`Variant`].

mod build;
mod file;
mod search;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use build::{Builder, Counts};

use crate::terms::Rules;
use crate::{Error, Result};
use file::Segment;
use search::Scratch;

/// A block has at most this many texts: the number of a text in its block has 16 bits.
const BLOCK: usize = 1 << 16;

/// Formulae as named by Kamphuis et al. 2020 (ECIR, "Which BM25 do you mean?"), N texts, df of them with the term.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// idf = ln(1 + (N - df + .5) / (df + .5))
    Lucene,
    /// idf = ln((N - df + .5) / (df + .5)), 0 where that is negative
    Robertson,
    /// idf = ln(N / df), times k1 + 1
    Atire,
    /// What the package rank-bm25 calls BM25Okapi: Robertson's idf, a quarter of its mean over all terms where it is
    /// negative, times k1 + 1. Where that mean is negative itself (a handful of texts): 0.
    Okapi,
}

impl Variant {
    pub fn parse(name: &str) -> Result<Variant> {
        match name {
            "lucene" => Ok(Variant::Lucene),
            "robertson" => Ok(Variant::Robertson),
            "atire" => Ok(Variant::Atire),
            "okapi" => Ok(Variant::Okapi),
            _ => Err(Error(format!("variant={name:?}: pass 'lucene', 'robertson', 'atire' or 'okapi'"))),
        }
    }
}

/// k1 >= 0 (how fast repetition saturates), b in 0..=1 (how much length counts).
#[derive(Clone, Copy, Debug)]
pub struct Scheme {
    pub variant: Variant,
    pub k1: f64,
    pub b: f64,
}

impl Scheme {
    fn check(&self) -> Result<()> {
        if !(self.k1 >= 0.0 && self.k1 <= 1e6) {
            return Err(Error(format!("k1={}: pass a number from 0 on, usually 0.9 to 2", self.k1)));
        }
        if !(0.0..=1.0).contains(&self.b) {
            return Err(Error(format!("b={}: pass a number from 0 to 1", self.b)));
        }
        Ok(())
    }

    /// Never negative. `floor`: what Okapi puts for a negative idf.
    fn weight(&self, texts: u64, df: u64, floor: f64) -> f32 {
        let (texts, df) = (texts as f64, df as f64);
        let odds = (texts - df + 0.5) / (df + 0.5);
        let weight = match self.variant {
            Variant::Lucene => odds.ln_1p(),
            Variant::Robertson => odds.ln(),
            Variant::Atire => (texts / df).ln() * (self.k1 + 1.0),
            Variant::Okapi => (if odds < 1.0 { floor } else { odds.ln() }) * (self.k1 + 1.0),
        };
        weight.max(0.0) as f32
    }

    fn norm(&self, length: u32, mean: f64) -> f32 {
        (self.k1 * (1.0 - self.b + self.b * length as f64 / mean)) as f32
    }
}

/// One answer: number of the text through all segments, and its score (above 0).
pub type Hit = (u32, f32);

/// Segments opened for searching.
///
/// ```
/// use rustbpe::{bm25::{Bm25, Builder, Scheme, Variant}, terms::Rules};
/// let path = std::env::temp_dir().join(format!("bm25-example-{}", std::process::id()));
/// let mut builder = Builder::new(&path, Rules { stem: true, stop_words: true }, 1)?;
/// builder.add(&["A cat sleeps.", "The dogs run.", "A dog and a cat."])?;
/// builder.finish()?;
/// let bm25 = Bm25::open(&[&path], Scheme { variant: Variant::Lucene, k1: 1.5, b: 0.75 })?;
/// let hits = bm25.search(&["sleeping cats"], 10, None, 1)?;
/// assert_eq!(hits[0].iter().map(|hit| hit.0).collect::<Vec<_>>(), [0, 2]);
/// # std::fs::remove_file(&path)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Bm25 {
    segments: Vec<Segment>,
    scheme: Scheme,
    texts: u64,
    mean_length: f64,
    idf_floor: f64, // Okapi only
    scratches: Mutex<Vec<Scratch>>,
}

impl Bm25 {
    /// An error names the file that is missing, cut short or changed, or the parameter that is out of range.
    pub fn open<P: AsRef<Path>>(paths: &[P], scheme: Scheme) -> Result<Bm25> {
        scheme.check()?;
        let mut segments = paths.iter().map(|path| Segment::open(path.as_ref())).collect::<Result<Vec<_>>>()?;
        if let Some(odd) = segments.iter().find(|segment| segment.rules != segments[0].rules) {
            let (a, b) = (segments[0].rules, odd.rules);
            return Err(Error(format!("{} was built with {b:?}, {} with {a:?}", odd.name(), segments[0].name())));
        }
        let texts: u64 = segments.iter().map(|segment| segment.texts as u64).sum();
        if texts > u32::MAX as u64 {
            return Err(Error(format!("{texts} texts are more than {}: split the base", u32::MAX)));
        }
        let length: u64 = segments.iter().map(|segment| segment.length).sum();
        let mean_length = if length == 0 { 1.0 } else { length as f64 / texts as f64 };
        for segment in &mut segments {
            segment.set_norms(|length| scheme.norm(length, mean_length));
        }
        let idf_floor = if scheme.variant == Variant::Okapi { idf_floor(&segments, texts)? } else { 0.0 };
        Ok(Bm25 { segments, scheme, texts, mean_length, idf_floor, scratches: Mutex::default() })
    }

    /// Number of texts in all segments.
    pub fn len(&self) -> usize {
        self.texts as usize
    }

    pub fn is_empty(&self) -> bool {
        self.texts == 0
    }

    /// How words became terms; None without segments.
    pub fn rules(&self) -> Option<Rules> {
        self.segments.first().map(|segment| segment.rules)
    }

    /// The best `k` texts for each query, best first, of equal ones the smaller number first. Fewer where fewer have a
    /// score above 0. `allowed`: one value for each text; the others are passed over.
    pub fn search(
        &self,
        queries: &[&str],
        k: usize,
        allowed: Option<&[bool]>,
        threads: usize,
    ) -> Result<Vec<Vec<Hit>>> {
        if let Some(allowed) = allowed.filter(|allowed| allowed.len() != self.len()) {
            return Err(Error(format!(
                "allowed has {} values, expected one for each of {} texts",
                allowed.len(),
                self.len()
            )));
        }
        let (next, k) = (AtomicUsize::new(0), k.min(self.len()));
        let work = || {
            self.with_scratch(|scratch| {
                let mut done = Vec::new();
                while let i = next.fetch_add(1, Ordering::Relaxed)
                    && let Some(query) = queries.get(i)
                {
                    done.push((i, self.search_one(scratch, query, k, allowed)?));
                }
                Ok(done)
            })
        };
        let threads = threads.clamp(1, queries.len().div_ceil(16).max(1)); // a thread costs as much as some queries
        let mut answers = vec![Vec::new(); queries.len()];
        let mut take = |done: Vec<(usize, Vec<Hit>)>| done.into_iter().for_each(|(i, hits)| answers[i] = hits);
        if threads == 1 {
            take(work()?);
            return Ok(answers);
        }
        std::thread::scope(|scope| {
            let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            running.into_iter().try_for_each(|thread| {
                take(thread.join().expect("a searching thread panicked")?);
                Ok::<(), Error>(())
            })
        })?;
        Ok(answers)
    }

    /// The score of every text for one query, 0 where no term of it occurs: the slow way, without pruning.
    pub fn scores(&self, query: &str) -> Result<Vec<f32>> {
        self.with_scratch(|scratch| self.score_all(scratch, query))
    }

    /// Memory for one query at a time, used again by later ones.
    fn with_scratch<T>(&self, work: impl FnOnce(&mut Scratch) -> Result<T>) -> Result<T> {
        let pool = || self.scratches.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let scratch = pool().pop();
        let mut scratch = scratch.unwrap_or_default();
        let result = work(&mut scratch)?; // after an error it is dropped: it may be half-used
        pool().push(scratch);
        Ok(result)
    }
}

/// A quarter of the mean idf over all terms (rank-bm25's epsilon).
fn idf_floor(segments: &[Segment], texts: u64) -> Result<f64> {
    let mut df = std::collections::HashMap::<&[u8], u64>::new();
    for segment in segments {
        for term in 0..segment.terms {
            *df.entry(segment.term(term)?).or_default() += segment.df(term)?;
        }
    }
    let idf = |df: u64| ((texts - df) as f64 + 0.5).ln() - (df as f64 + 0.5).ln();
    let mut sum: Vec<f64> = df.values().map(|&df| idf(df)).collect();
    sum.sort_by(f64::total_cmp); // the same sum in whatever order the map has them
    Ok((0.25 * sum.iter().sum::<f64>() / sum.len().max(1) as f64).max(0.0))
}
