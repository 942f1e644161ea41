//! Ranking texts by BM25, block after block, without scoring what cannot be among the best.
//!
//! In a block the terms are added one after the other, greatest weight first, into an array with one score for each
//! text. Each term's share is bounded (greatest frequency, shortest text): once the terms that remain cannot lift an
//! untouched text to the k-th best score, they are only looked up for the texts that still can reach it (MaxScore,
//! Turtle and Flood 1995, doi 10.1016/0306-4573(95)00020-H, a block at a time). Every text gets its shares in the same
//! order whichever way, so scores are those of exhaustive scoring, bit for bit.

use super::file::{Block, Run};
use super::{BLOCK, Bm25, Hit};
use crate::Result;
use crate::table::{Key, Table};
use crate::terms::{for_each_word, lower_case};

/// A word looked up: its term, what the term weighs, and per segment where its runs are.
struct Found {
    term: Box<str>,
    weight: f32,
    runs: Box<[std::ops::Range<u32>]>,
}

/// A term of a query; the weight is multiplied by how often it stands there.
struct Term {
    weight: f32,
    found: usize, // number in Scratch::found
}

/// A term in a block. bound: no share of it in this block is greater.
struct Share<'a> {
    weight: f32,
    bound: f64,
    postings: &'a [u32],
}

/// What one query needs, kept for the next.
pub struct Scratch {
    words: Table<u32>, // 1 + number in `found`; STOP: a stop word, or in no text
    found: Vec<Found>,
    lower: String,
    scores: Box<[f32; BLOCK]>, // all 0 between blocks
    touched: Vec<u16>,
    candidates: Vec<(u16, f32)>,
    sample: Vec<f32>,
}

const STOP: u32 = u32::MAX;
const WORDS: usize = 1 << 16; // the words kept
const GROUP: usize = 32; // texts compared at a time
const LOOK_UP: usize = 8; // postings added in the time of one look-up

impl Default for Scratch {
    fn default() -> Self {
        Scratch {
            words: Table::default(),
            found: Vec::new(),
            lower: String::new(),
            scores: vec![0.0; BLOCK].try_into().expect("BLOCK scores"),
            touched: Vec::new(),
            candidates: Vec::new(),
            sample: Vec::new(),
        }
    }
}

/// The k best so far. `floor`: nothing below it can be among them.
struct Best {
    k: usize,
    hits: Vec<Hit>,
    floor: f32,
}

impl Best {
    fn push(&mut self, hit: Hit) {
        if hit.1 >= self.floor {
            self.hits.push(hit);
            if self.hits.len() >= 2 * self.k + 64 {
                self.cut();
            }
        }
    }

    /// Keep the k best; of equal ones the smaller number.
    fn cut(&mut self) {
        if self.hits.len() >= self.k {
            self.hits.select_nth_unstable_by(self.k - 1, better);
            self.hits.truncate(self.k);
            self.floor = self.hits[self.k - 1].1;
        }
    }
}

fn better(a: &Hit, b: &Hit) -> std::cmp::Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

#[inline(always)]
fn share(weight: f32, posting: u32, norm: f32) -> f32 {
    let tf = (posting & 0xffff) as i32 as f32;
    weight * (tf / (tf + norm))
}

impl Bm25 {
    pub(super) fn search_one(
        &self,
        scratch: &mut Scratch,
        query: &str,
        k: usize,
        allowed: Option<&[bool]>,
    ) -> Result<Vec<Hit>> {
        if k == 0 {
            return Ok(Vec::new());
        }
        let terms = self.terms(scratch, query)?;
        let mut best = Best { k, hits: Vec::new(), floor: 0.0 };
        self.for_each_block(scratch, &terms, |scratch, block, first, shares| {
            let allowed = allowed.map(|allowed| &allowed[first..first + block.len]);
            scratch.search_block(block, first, shares, allowed, &mut best);
            best.cut();
        })?;
        best.hits.sort_unstable_by(better);
        Ok(best.hits)
    }

    pub(super) fn score_all(&self, scratch: &mut Scratch, query: &str) -> Result<Vec<f32>> {
        let (terms, mut scores) = (self.terms(scratch, query)?, vec![0.0; self.len()]);
        self.for_each_block(scratch, &terms, |_, block, first, shares| {
            for term in shares {
                for &posting in term.postings {
                    let text = (posting >> 16) as usize;
                    if text < block.len {
                        scores[first + text] += share(term.weight, posting, block.norms[text]);
                    }
                }
            }
        })?;
        Ok(scores)
    }

    /// The query's terms with a weight above 0, greatest first, in an order that does not depend on the segments.
    fn terms(&self, scratch: &mut Scratch, query: &str) -> Result<Vec<Term>> {
        if scratch.words.len() > WORDS {
            scratch.words.clear();
            scratch.found.clear();
        }
        let mut lower = std::mem::take(&mut scratch.lower);
        lower_case(query, &mut lower);
        let (mut numbers, mut result) = (Vec::new(), Ok(()));
        for_each_word(&lower, |start, end| {
            let (word, key) = (&lower[start..end], Key::new(lower.as_bytes(), start, end));
            let number = scratch.words.get(&key, word.as_bytes()).map_or_else(|| self.look_up(scratch, word, &key), Ok);
            match number {
                Ok(STOP) => {}
                Ok(number) => numbers.push(number as usize - 1),
                Err(error) => result = Err(error),
            }
        });
        scratch.lower = lower;
        result?;
        let found = &scratch.found;
        numbers.sort_unstable_by(|&a, &b| found[a].term.cmp(&found[b].term)); // words of one stem meet
        let mut terms: Vec<Term> = numbers
            .chunk_by(|&a, &b| found[a].term == found[b].term)
            .map(|same| Term { weight: found[same[0]].weight * same.len() as f32, found: same[0] })
            .filter(|term| term.weight > 0.0)
            .collect();
        terms.sort_by(|a, b| b.weight.total_cmp(&a.weight)); // stable: equal weights in the order of the terms
        Ok(terms)
    }

    fn look_up(&self, scratch: &mut Scratch, word: &str, key: &Key) -> Result<u32> {
        let (mut runs, mut df, mut number) = (Vec::with_capacity(self.segments.len()), 0, STOP);
        if let Some(term) = self.rules().and_then(|rules| rules.term(word)) {
            for segment in &self.segments {
                let found = segment.find(term.as_bytes())?;
                let range = found.map_or(Ok(0..0), |term| segment.run_range(term))?;
                df += found.map_or(Ok(0), |term| segment.df(term))?;
                runs.push(range.start as u32..range.end as u32);
            }
            if df > 0 {
                let weight = self.scheme.weight(self.texts, df, self.idf_floor);
                scratch.found.push(Found { term: term.into(), weight, runs: runs.into() });
                number = scratch.found.len() as u32;
            }
        }
        *scratch.words.slot(key, word.as_bytes()) = number;
        Ok(number)
    }

    /// Call `visit(scratch, block, number of its first text, terms in it)` for each block with a term.
    fn for_each_block(
        &self,
        scratch: &mut Scratch,
        terms: &[Term],
        mut visit: impl FnMut(&mut Scratch, &Block, usize, &[Share]),
    ) -> Result<()> {
        let mut first = 0;
        for (i, segment) in self.segments.iter().enumerate() {
            let runs = |term: &Term| {
                let range = &scratch.found[term.found].runs[i];
                segment.runs(range.start as usize..range.end as usize)
            };
            let mut runs = terms.iter().map(runs).collect::<Result<Vec<_>>>()?; // of each term, those still to come
            let next = |runs: &[&[[u32; 4]]]| {
                runs.iter().filter_map(|runs| runs.first()).map(|&run| Run::unpack(run).block).min()
            };
            while let Some(number) = next(&runs) {
                let block = segment.block(number as usize)?;
                let mut shares = Vec::with_capacity(terms.len());
                for (term, runs) in terms.iter().zip(&mut runs) {
                    if let Some((&run, later)) = runs.split_first()
                        && let run = Run::unpack(run)
                        && run.block == number
                    {
                        *runs = later;
                        let norm = self.scheme.norm(run.min_length, self.mean_length);
                        let bound = share(term.weight, run.max_tf, norm) as f64;
                        shares.push(Share { weight: term.weight, bound, postings: segment.postings(&block, &run)? });
                    }
                }
                visit(scratch, &block, first + block.first, &shares);
            }
            first += segment.texts;
        }
        Ok(())
    }
}

impl Scratch {
    /// `first`: number of the block's first text. Leaves `scores` at 0.
    fn search_block(
        &mut self,
        block: &Block,
        first: usize,
        shares: &[Share],
        allowed: Option<&[bool]>,
        best: &mut Best,
    ) {
        // A score is a sum of rounded shares: this much (relative) above what the bounds say is possible.
        let slack = 1.0 + (shares.len() + 16) as f64 * f32::EPSILON as f64;
        let mut rest: Vec<f64> = vec![0.0; shares.len() + 1]; // bound of the shares from i on
        for (i, term) in shares.iter().enumerate().rev() {
            rest[i] = rest[i + 1] + term.bound;
        }
        let mut floor = best.floor as f64 / slack;
        let mut to_come: usize = shares.iter().map(|term| term.postings.len()).sum();
        let (mut added, mut postings, mut dense) = (0, 0, false);
        self.touched.clear();
        for (i, term) in shares.iter().enumerate() {
            let len = term.postings.len();
            if floor == 0.0 && postings >= best.k && len > postings {
                floor = self.kth_partial(best.k, dense, allowed, block.len) as f64 / slack;
            }
            // A look-up costs as much as adding some postings, and counting the candidates of a block as much as some more.
            if rest[i] < floor
                && (!dense || to_come > block.len / 16)
                && LOOK_UP * self.count(dense, floor - rest[i], block.len) <= to_come
            {
                break;
            }
            if !dense && self.touched.len() + len > block.len / 8 {
                dense = true;
            }
            if dense {
                self.add::<false>(term, block.norms);
            } else {
                self.add::<true>(term, block.norms);
            }
            (added, postings, to_come) = (i + 1, postings + len, to_come - len);
        }
        if floor == 0.0 {
            floor = self.kth_partial(best.k, dense, allowed, block.len) as f64 / slack;
        }
        self.collect(dense, floor - rest[added], allowed, block.len);
        if !dense && added < shares.len() {
            self.candidates.sort_unstable_by_key(|candidate| candidate.0); // the look-ups go one way
        }
        for (i, term) in shares.iter().enumerate().skip(added) {
            self.candidates.retain(|candidate| candidate.1 as f64 + rest[i] >= floor);
            look_up(&mut self.candidates, term, block.norms);
        }
        self.candidates.iter().for_each(|&(text, score)| best.push(((first + text as usize) as u32, score)));
    }

    /// Add a term's shares to the scores; `LIST`: note which texts were at 0.
    fn add<const LIST: bool>(&mut self, term: &Share, norms: &[f32; BLOCK]) {
        let scores = &mut self.scores;
        let noted = self.touched.len();
        if LIST {
            self.touched.resize(noted + term.postings.len(), 0);
        }
        let (new, mut count) = (&mut self.touched[noted..], 0);
        let mut add = |posting: u32, share: f32| {
            let text = (posting >> 16) as usize;
            if LIST {
                new[count] = text as u16;
                count += (scores[text] == 0.0) as usize;
            }
            scores[text] += share;
        };
        let (eights, last) = term.postings.as_chunks::<8>();
        for eight in eights {
            let shares = eight.map(|posting| share(term.weight, posting, norms[(posting >> 16) as usize]));
            (0..8).for_each(|i| add(eight[i], shares[i])); // apart, so that the divisions are vectorised
        }
        last.iter().for_each(|&posting| add(posting, share(term.weight, posting, norms[(posting >> 16) as usize])));
        if LIST {
            self.touched.truncate(noted + count);
        }
    }

    /// A score that at least k texts have so far, 0 where none is known. Scores only grow.
    fn kth_partial(&mut self, k: usize, dense: bool, allowed: Option<&[bool]>, len: usize) -> f32 {
        let Scratch { scores, touched, sample, .. } = self;
        let score = |text: usize| if allowed.is_none_or(|a| a.get(text) == Some(&true)) { scores[text] } else { 0.0 };
        sample.clear();
        if dense {
            let greatest = |group: usize| (group..len.min(group + GROUP)).map(score).fold(0.0, f32::max);
            sample.extend((0..len).step_by(GROUP).map(greatest));
        } else {
            sample.extend(touched.iter().map(|&text| score(text as usize)));
        }
        if sample.len() < k {
            return 0.0;
        }
        *sample.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
    }

    /// How many texts have a score that is at least `low`.
    fn count(&self, dense: bool, low: f64, len: usize) -> usize {
        let low = low as f32;
        if dense {
            self.scores[..len].iter().map(|&score| (score >= low) as u32).sum::<u32>() as usize
        } else {
            self.touched.iter().filter(|&&text| self.scores[text as usize] >= low).count()
        }
    }

    /// Candidates: the allowed texts with a score that is at least `low`; all scores go back to 0.
    fn collect(&mut self, dense: bool, low: f64, allowed: Option<&[bool]>, len: usize) {
        let Scratch { scores, touched, candidates, .. } = self;
        let low = (low * (1.0 - 1e-6)).max(f32::MIN_POSITIVE as f64) as f32; // rounded down; above 0: touched
        let allow = |text: usize| text < len && allowed.is_none_or(|allowed| allowed[text]);
        candidates.clear();
        if !dense {
            for &text in touched.iter() {
                let score = std::mem::take(&mut scores[text as usize]);
                if score >= low && allow(text as usize) {
                    candidates.push((text, score));
                }
            }
            return;
        }
        for (i, some) in scores.chunks_exact_mut(GROUP).take(len.div_ceil(GROUP)).enumerate() {
            if some.iter().fold(false, |any, &score| any | (score >= low)) {
                for (j, &score) in some.iter().enumerate().filter(|(_, score)| **score >= low) {
                    if allow(GROUP * i + j) {
                        candidates.push(((GROUP * i + j) as u16, score));
                    }
                }
            }
            some.fill(0.0);
        }
        // where a damaged posting names a text beyond the block
        scores[len.next_multiple_of(GROUP).min(BLOCK)..]
            .iter_mut()
            .filter(|score| **score != 0.0)
            .for_each(|score| *score = 0.0);
    }
}

/// Add the shares of a term to candidates, whose texts rise, by galloping through its postings.
fn look_up(candidates: &mut [(u16, f32)], term: &Share, norms: &[f32; BLOCK]) {
    let mut postings = term.postings;
    for (text, score) in candidates {
        let before = |posting: &u32| ((posting >> 16) as u16) < *text;
        let mut step = 1;
        while step < postings.len() && before(&postings[step]) {
            step *= 2;
        }
        let from = step / 2;
        let skip = from + postings[from..postings.len().min(step)].partition_point(before);
        postings = &postings[skip..];
        let Some(&posting) = postings.first() else { return };
        if (posting >> 16) as u16 == *text {
            *score += share(term.weight, posting, norms[*text as usize]);
        }
    }
}
