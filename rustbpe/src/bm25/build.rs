//! Writing a segment, block after block: memory is that of one block, of the vocabulary and of the directory.

use std::fs::File;
use std::io::{Error, Result, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use bytemuck::cast_slice;

use super::BLOCK;
use super::file::{HEADER, Run, Sizes, mix};
use crate::table::{Key, Table};
use crate::terms::{Rules, for_each_word, lower_case};

/// A block ends at this many terms, where its texts are long: some 80 MiB while it is turned into postings.
const BLOCK_TERMS: usize = 1 << 23;

/// A thread's table of words is emptied when it has this many.
const WORDS: usize = 1 << 20;

const STOP: u32 = u32::MAX;
const NONE: u32 = u32::MAX;

/// What a finished segment holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    pub texts: u64,
    pub terms: u64,    // different ones
    pub length: u64,   // of all texts, in terms
    pub postings: u64, // pairs of text and term
}

/// Makes the file of one segment from texts that come in batches. Any number of threads writes the same bytes.
///
/// The file appears under its name when `finish` is done. A frequency above 65,535 counts as 65,535.
pub struct Builder {
    path: PathBuf,
    unfinished: Unfinished,
    file: File,
    rules: Rules,
    workers: Vec<Worker>,
    vocabulary: Mutex<Vocabulary>, // numbers terms as threads happen to meet them
    numbers: Vec<u32>, // of those, by the vocabulary's: numbers in the order of the texts; NONE: not yet met
    met: Vec<u32>,     // back again
    block: Vec<u32>,   // terms of the texts that are in no block yet
    lengths: Vec<u32>, // of all texts
    block_first: usize,
    blocks: Vec<[u64; 2]>,
    runs: Vec<(u32, [u32; 4])>, // (term, run) in order of blocks
    postings: u64,
}

/// Removes the temporary file when the builder goes, unless it was renamed.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0); // nothing to do about an error here: the first one is being reported
    }
}

#[derive(Default)]
struct Vocabulary {
    ids: Table<u32>, // 1 + the number
    terms: String,   // one after the other
    ends: Vec<usize>,
}

impl Vocabulary {
    fn id(&mut self, term: &str) -> u32 {
        let slot = self.ids.slot(&Key::new(term.as_bytes(), 0, term.len()), term.as_bytes());
        if *slot == 0 {
            self.terms.push_str(term);
            self.ends.push(self.terms.len());
            *slot = self.ends.len() as u32;
        }
        *slot - 1
    }

    fn term(&self, id: usize) -> &str {
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.terms[start..self.ends[id]]
    }
}

/// What a thread keeps: words it has met, and the terms of its share of the batch.
#[derive(Default)]
struct Worker {
    words: Table<u32>, // 1 + the number of the term, or STOP
    lower: String,
    terms: Vec<u32>,
    lengths: Vec<u32>,
}

impl Worker {
    fn read(&mut self, texts: &[&str], rules: Rules, vocabulary: &Mutex<Vocabulary>) {
        let Worker { words, lower, terms, lengths } = self;
        terms.clear();
        lengths.clear();
        if words.len() > WORDS {
            words.clear();
        }
        for text in texts {
            let before = terms.len();
            lower_case(text, lower);
            for_each_word(lower, |start, end| {
                let word = &lower[start..end];
                let slot = words.slot(&Key::new(lower.as_bytes(), start, end), word.as_bytes());
                if *slot == 0 {
                    let id = |term: &str| vocabulary.lock().unwrap_or_else(PoisonError::into_inner).id(term);
                    *slot = rules.term(word).map_or(STOP, |term| 1 + id(&term));
                }
                if *slot != STOP {
                    terms.push(*slot - 1);
                }
            });
            lengths.push((terms.len() - before) as u32);
        }
    }
}

impl Builder {
    pub fn new(path: &Path, rules: Rules, threads: usize) -> Result<Builder> {
        let mut temporary = path.as_os_str().to_owned();
        temporary.push(format!(".{}.tmp", std::process::id()));
        let unfinished = Unfinished(temporary.into());
        let mut file = File::create(&unfinished.0)?;
        file.write_all(&[0; 8 * HEADER])?;
        Ok(Builder {
            path: path.to_owned(),
            unfinished,
            file,
            rules,
            workers: (0..threads.max(1)).map(|_| Worker::default()).collect(),
            vocabulary: Mutex::default(),
            numbers: Vec::new(),
            met: Vec::new(),
            block: Vec::new(),
            lengths: Vec::new(),
            block_first: 0,
            blocks: Vec::new(),
            runs: Vec::new(),
            postings: 0,
        })
    }

    pub fn add(&mut self, texts: &[&str]) -> Result<()> {
        let shares = shares(texts, self.workers.len());
        let (rules, vocabulary) = (self.rules, &self.vocabulary);
        std::thread::scope(|scope| {
            let mut work = self.workers.iter_mut().zip(&shares);
            let first = work.next();
            work.for_each(|(worker, share)| drop(scope.spawn(move || worker.read(share, rules, vocabulary))));
            first.into_iter().for_each(|(worker, share)| worker.read(share, rules, vocabulary));
        });
        let mut workers = std::mem::take(&mut self.workers);
        let result = workers[..shares.len()].iter().try_for_each(|worker| self.take(worker));
        workers.iter_mut().for_each(|worker| worker.terms.clear());
        self.workers = workers;
        result
    }

    /// Append a worker's terms to the block, ending it when it is full.
    fn take(&mut self, worker: &Worker) -> Result<()> {
        let vocabulary = self.vocabulary.lock().unwrap_or_else(PoisonError::into_inner).ends.len();
        self.numbers.resize(vocabulary, NONE);
        let mut at = 0;
        for &length in &worker.lengths {
            if self.block_texts() == BLOCK || self.block.len() >= BLOCK_TERMS {
                self.end_block()?;
            }
            for &term in &worker.terms[at..at + length as usize] {
                let number = &mut self.numbers[term as usize];
                if *number == NONE {
                    *number = self.met.len() as u32;
                    self.met.push(term);
                }
                self.block.push(*number);
            }
            self.lengths.push(length);
            at += length as usize;
        }
        Ok(())
    }

    fn block_texts(&self) -> usize {
        self.lengths.len() - self.block_first
    }

    /// Turn the block's terms into postings, term after term, and write them.
    fn end_block(&mut self) -> Result<()> {
        let lengths = &self.lengths[self.block_first..];
        if self.blocks.len() == BLOCK {
            return Err(Error::other(format!("more than {BLOCK} blocks of texts: split the base")));
        }
        let (places, texts) = invert(&self.block, lengths, self.met.len());
        let mut postings: Vec<u32> = Vec::with_capacity(texts.len());
        for (term, place) in places.windows(2).enumerate().filter(|(_, place)| place[0] < place[1]) {
            let (start, mut max_tf, mut min_length) = (postings.len(), 0, u32::MAX);
            for same in texts[place[0] as usize..place[1] as usize].chunk_by(|a, b| a == b) {
                let tf = same.len().min(u16::MAX as usize) as u32;
                max_tf = max_tf.max(tf);
                min_length = min_length.min(lengths[same[0] as usize]);
                postings.push((same[0] as u32) << 16 | tf);
            }
            let (block, len) = (self.blocks.len() as u32, (postings.len() - start) as u32);
            let run = Run { block, max_tf, min_length, start: start as u32, len };
            self.runs.push((term as u32, run.pack()));
        }
        self.file.write_all(cast_slice(&postings))?;
        self.blocks.push([self.block_first as u64, self.postings]);
        self.postings += postings.len() as u64;
        self.block_first = self.lengths.len();
        self.block.clear();
        Ok(())
    }

    /// Write the directory, flush, and give the file its name.
    pub fn finish(mut self) -> Result<Counts> {
        if self.block_texts() > 0 {
            self.end_block()?;
        }
        let vocabulary = std::mem::take(&mut self.vocabulary).into_inner().unwrap_or_else(PoisonError::into_inner);
        let term = |number: u32| vocabulary.term(self.met[number as usize] as usize);
        let mut order: Vec<u32> = (0..self.met.len() as u32).collect();
        order.sort_unstable_by_key(|&number| term(number));
        let (firsts, runs) = sort_runs(&order, &self.runs);
        let (mut offsets, mut bytes) = (vec![0u64], Vec::with_capacity(vocabulary.terms.len()));
        for &number in &order {
            bytes.extend_from_slice(term(number).as_bytes());
            offsets.push(bytes.len() as u64);
        }
        let mut checksum = 0;
        self.pad(4 * self.postings as usize)?;
        let (lengths, blocks) = (cast_slice(&self.lengths), cast_slice(&self.blocks));
        for section in [lengths, blocks, cast_slice(&runs), cast_slice(&firsts), cast_slice(&offsets), &bytes] {
            checksum = mix(checksum, section);
            (&self.file).write_all(section)?;
            self.pad(section.len())?;
        }
        let sizes = Sizes {
            postings: self.postings,
            texts: self.lengths.len() as u64,
            blocks: self.blocks.len() as u64,
            runs: runs.len() as u64,
            terms: order.len() as u64,
            bytes: bytes.len() as u64,
        };
        let length = self.lengths.iter().map(|&length| length as u64).sum();
        self.file.seek(SeekFrom::Start(0))?;
        self.file.write_all(cast_slice(&sizes.header(self.rules, length, checksum)))?;
        self.file.sync_all()?;
        std::fs::rename(&self.unfinished.0, &self.path)?;
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()?; // the new name
        Ok(Counts { texts: sizes.texts, terms: sizes.terms, length, postings: self.postings })
    }

    /// Zeros after `bytes` bytes up to a multiple of 8.
    fn pad(&self, bytes: usize) -> Result<()> {
        (&self.file).write_all(&[0; 8][..bytes.next_multiple_of(8) - bytes])
    }
}

/// At most `n` shares of about as many bytes each, in order.
fn shares<'a, 'b>(texts: &'a [&'b str], n: usize) -> Vec<&'a [&'b str]> {
    let share = texts.iter().map(|text| text.len() + 1).sum::<usize>().div_ceil(n);
    let (mut shares, mut start, mut size) = (Vec::with_capacity(n), 0, 0);
    for (i, text) in texts.iter().enumerate() {
        size += text.len() + 1;
        if size >= share {
            shares.push(&texts[start..=i]);
            (start, size) = (i + 1, 0);
        }
    }
    if start < texts.len() {
        shares.push(&texts[start..]);
    }
    shares
}

/// (places, texts): text numbers of each occurrence of term t at places[t]..places[t + 1], rising.
fn invert(block: &[u32], lengths: &[u32], terms: usize) -> (Vec<u32>, Vec<u16>) {
    let mut places = vec![0u32; terms + 2]; // two ahead: filling moves each place to where the next one starts
    block.iter().for_each(|&term| places[term as usize + 2] += 1);
    for term in 2..places.len() {
        places[term] += places[term - 1];
    }
    let (mut texts, mut at) = (vec![0u16; block.len()], 0);
    for (text, &length) in lengths.iter().enumerate() {
        for &term in &block[at..at + length as usize] {
            let place = &mut places[term as usize + 1];
            texts[*place as usize] = text as u16;
            *place += 1;
        }
        at += length as usize;
    }
    places.pop();
    (places, texts)
}

/// (first run of each term in `order` and the number of runs, the runs in that order).
fn sort_runs(order: &[u32], runs: &[(u32, [u32; 4])]) -> (Vec<u32>, Vec<[u32; 4]>) {
    let mut counts = vec![0u32; order.len()];
    runs.iter().for_each(|(term, _)| counts[*term as usize] += 1);
    let (mut firsts, mut at) = (Vec::with_capacity(order.len() + 1), 0);
    for &term in order {
        firsts.push(at);
        at += std::mem::replace(&mut counts[term as usize], at); // from now on: where the term's next run goes
    }
    firsts.push(at);
    let mut sorted = vec![[0; 4]; runs.len()];
    for (term, run) in runs {
        let place = &mut counts[*term as usize];
        sorted[*place as usize] = *run;
        *place += 1;
    }
    (firsts, sorted)
}
